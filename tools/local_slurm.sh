#!/usr/bin/env bash
# A real SLURM on this one machine: one slurmctld and several slurmd, on the loopback interface, without systemd or munge.
#   tools/local_slurm.sh up [nodes=2] [gpus=0] [cpus=8] [idle_minutes=30] [dir=FOLDER]
#   tools/local_slurm.sh status|down [dir=FOLDER]
#   tools/local_slurm.sh install              only the packages (up does it too, as root)
# `up` prints the line that points sbatch, squeue and scancel at the cluster. It stops by itself after `idle_minutes`
# without a job. `gpus` are names without a device, for trying job scripts. Everything lies in `dir`.
# Exit status: 2 wrong usage, 3 SLURM is not installed and may not be, 1 anything else that fails.
set -euo pipefail

die() { echo "local_slurm: $1" >&2; exit "${2:-1}"; }
usage() { sed -n '2,5s/^# *//p' "$0" >&2; exit 2; }

verb=${1:-}; shift || usage
nodes=2 gpus=0 cpus=8 idle_minutes=30 dir=${TMPDIR:-/tmp}/megavlm_slurm_$(id -u)
for setting in "$@"; do
    name=${setting%%=*} value=${setting#*=}
    case $setting in
        nodes=* | gpus=* | cpus=* | idle_minutes=*)
            [[ $value =~ ^[0-9]+$ ]] || die "$setting: must be a whole number." 2
            printf -v "$name" %d "$((10#$value))" ;;
        dir=?*) dir=$value ;;
        *) usage ;;
    esac
done
((nodes >= 1 && nodes <= 64)) || die "nodes=$nodes: must be from 1 to 64." 2
((cpus >= 1 && idle_minutes >= 1)) || die "cpus=$cpus, idle_minutes=$idle_minutes: must be at least 1." 2
dir=$(realpath -m "$dir")
export SLURM_CONF=$dir/slurm.conf PATH=$PATH:/usr/sbin:/sbin
packages=(slurmctld slurmd slurm-client)

install() {
    if command -v slurmctld slurmd sbatch >/dev/null; then return; fi
    local command="apt-get install -y --no-install-recommends ${packages[*]}"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        die "SLURM is not installed. Run as root: $command" 3
    fi
    echo "local_slurm: installing ${packages[*]}" >&2
    export DEBIAN_FRONTEND=noninteractive
    # dpkg's lock: another job of this machine may be installing
    local options=(-qq -o DPkg::Lock::Timeout=120)
    apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}" >&2 ||
        { apt-get "${options[@]}" update >&2 &&
            apt-get "${options[@]}" install -y --no-install-recommends "${packages[@]}" >&2; } ||
        die "apt-get could not install SLURM. Run as root: apt-get update && $command" 3
}

# Whether the process of a pid file still is what wrote it: numbers of ended processes are given out again.
lives() {
    local pid
    pid=$(cat "$1" 2>/dev/null) && [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] &&
        tr '\0' ' ' <"/proc/$pid/cmdline" | grep -qF -- "$dir"
}

is_up() { lives "$dir/run/slurmctld.pid"; }

is_free() { ! (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# First of nodes + 1 free ports, below those that the system gives out by itself.
free_ports() {
    local base port
    for _ in {1..100}; do
        base=$((10000 + RANDOM % 20000))
        for ((port = base; port <= base + nodes; port++)); do is_free $port || continue 2; done
        echo $base
        return
    done
    die "no $((nodes + 1)) free ports in a row were found between 10000 and 30000."
}

configure() {
    local base=$1 me host resources=
    me=$(id -un) host=$(hostname -s)
    if ((gpus)); then
        mkdir -p "$dir/dev"
        for ((i = 0; i < gpus; i++)); do  # a gpu needs a device file; only root can make one
            [ -e "$dir/dev/nvidia$i" ] || mknod "$dir/dev/nvidia$i" c 1 3 2>/dev/null || touch "$dir/dev/nvidia$i"
        done
        echo "NodeName=n[1-$nodes] Name=gpu File=$dir/dev/nvidia[0-$((gpus - 1))]" >"$dir/gres.conf"
        resources=" Gres=gpu:$gpus"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$base
# no munge: everybody on this machine is trusted
AuthType=auth/none
CredType=cred/none
# a requeued job waits until its old credentials expire: two minutes if this is not set
AuthInfo=cred_expire=5
SlurmUser=$me
SlurmdUser=$me
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/run/slurmctld.pid
SlurmdPidFile=$dir/run/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
# no cgroups, which containers and machines without systemd do not give
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SwitchType=switch/none
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
# more processors and memory than the machine has
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
TCPTimeout=5
MailProg=/bin/true
# two clusters on one machine have different job numbers, from which job scripts take their ports
FirstJobId=$((base * 10))
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((base + 1))-$((base + nodes))] CPUs=$cpus RealMemory=1000000$resources State=UNKNOWN
PartitionName=batch Nodes=n[1-$nodes] Default=YES MaxTime=INFINITE State=UP
CONF
}

# Ends the processes of pid files: a request to all, then, after five seconds, force.
end() {
    local file
    for file in "$@"; do if lives "$file"; then kill "$(cat "$file")" 2>/dev/null || true; fi; done
    for file in "$@"; do
        for _ in {1..50}; do lives "$file" || continue 2; sleep 0.1; done
        kill -9 "$(cat "$file")" 2>/dev/null || true
    done
}

# Every process of the cluster, jobs included: its daemons name the folder, its jobs carry it in their environment.
processes() {
    local entry pid
    for entry in /proc/[0-9]*; do
        pid=${entry#/proc/}
        [ "$pid" != $$ ] && [ "$pid" != "$BASHPID" ] || continue
        if tr '\0' '\n' <"$entry/environ" 2>/dev/null | grep -qxF "SLURM_CONF=$SLURM_CONF" &&
            { tr '\0' '\n' <"$entry/environ" 2>/dev/null | grep -q '^SLURM_JOB_ID=' ||
                grep -qzE '^(slurmctld|slurmd|slurmstepd)|/slurm(ctld|d|stepd)$' "$entry/cmdline" 2>/dev/null; }; then
            echo "$pid"
        fi
    done 2>/dev/null
}

start_daemons() {
    slurmctld -i -c -f "$SLURM_CONF" 2>>"$dir/log/start.log" || return 1
    for ((i = 1; i <= nodes; i++)); do slurmd -c -N "n$i" -f "$SLURM_CONF" 2>>"$dir/log/start.log" || return 1; done
    for _ in {1..100}; do
        [ "$(timeout 20 sinfo --noheader --Node --states=idle 2>/dev/null | wc -l)" = "$nodes" ] && return
        sleep 0.2
    done
    return 1
}

# Runs beside the cluster: stops it when there was no job for idle_minutes, or when somebody removed its folder.
watch_idle() {
    local idle_since=$SECONDS
    while sleep 5 && is_up; do
        [ -z "$(timeout 20 squeue --noheader 2>/dev/null)" ] || idle_since=$SECONDS
        ((SECONDS - idle_since < idle_minutes * 60)) || break
    done
    stop
}

stop() {
    if is_up; then timeout 5 scancel --user="$(id -un)" 2>/dev/null || true; fi
    end "$dir"/run/slurmd.*.pid "$dir/run/slurmctld.pid"
    for pid in $(processes); do kill -9 "$pid" 2>/dev/null || true; done
}

case $verb in
    install) install ;;
    up)
        install
        if is_up; then
            echo "local_slurm: is up already; export SLURM_CONF=$SLURM_CONF"
            exit
        fi
        mkdir -p "$dir"/{state,log,run}
        for ((i = 1; i <= nodes; i++)); do mkdir -p "$dir/spool/n$i"; done
        # one at a time: a port that is free now must still be so when a daemon takes it
        exec 9>"${TMPDIR:-/tmp}/megavlm_slurm.lock.$(id -u)"
        flock --wait 60 9 || die "another start has not ended for a minute."
        started=
        for _ in 1 2 3; do
            configure "$(free_ports)"
            if start_daemons 9>&-; then started=yes && break; fi
            stop
        done
        flock --unlock 9
        exec 9>&-
        [ -n "$started" ] || die "SLURM did not start; see $dir/log."
        setsid "$0" watch "dir=$dir" "idle_minutes=$idle_minutes" "nodes=$nodes" </dev/null >>"$dir/log/watch.log" 2>&1 &
        echo $! >"$dir/run/watch.pid"
        sinfo --Node --format '%N %t %c cpus %G'
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    watch) watch_idle ;;
    status)
        is_up || die "is not up in $dir."
        sinfo --Node --format '%N %t %c cpus %G'
        squeue
        echo "export SLURM_CONF=$SLURM_CONF"
        ;;
    down)
        # a process group of its own, with the sleep that it waits for
        if lives "$dir/run/watch.pid"; then kill -- "-$(cat "$dir/run/watch.pid")" 2>/dev/null || true; fi
        stop
        ;;
    *) usage ;;
esac
