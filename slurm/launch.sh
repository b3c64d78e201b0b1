# shellcheck shell=bash
# Sourced by the job scripts of this folder: from SLURM's variables to ranks that know each other, and from their end to
# done, requeued or failed. Gives the scripts two words:
#   train RECIPE [KEY=VALUE ...]     record, preflight, training; again after a time limit, pre-emption or crash
#   run_once NODES RANKS_PER_NODE VERB ...     one `megavlm VERB ...`; its exit status is the job's
set -euo pipefail
MEGAVLM_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export MEGAVLM_HOME
# shellcheck source=slurm/cluster.env
source "${MEGAVLM_CLUSTER_ENV:-$MEGAVLM_HOME/slurm/cluster.env}"

make_room='Is the disk full? Make room, then submit again: it resumes.'
say() { echo "[$(date '+%F %T')] job ${SLURM_JOB_ID:-?}: $*"; }
fail() { say "$1" >&2; exit "${2:-1}"; }

[ -n "${SLURM_JOB_ID:-}" ] || fail "not in a SLURM job. Start it with: sbatch $0"

# --signal=B:USR1@120 asks this shell, pre-emption sends SIGTERM to all; the ranks finish the step, save and end.
asked_by='' interrupted=''
ask_to_stop() {
    asked_by=${asked_by:-$1} interrupted=yes
    say "got $1: the ranks finish their step, save and end"
    scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null || true   # the steps, not this shell
    (sleep 20 && scancel --signal=USR1 "$SLURM_JOB_ID" 2>/dev/null) >/dev/null &   # again, for a step that was just starting
}
trap 'ask_to_stop SIGUSR1' USR1
trap 'ask_to_stop SIGTERM' TERM

# The ranks import MegaVLM from here, not from the folder the job was submitted in.
export PYTHONPATH=$MEGAVLM_HOME${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export MEGAVLM_ATTEMPT=${SLURM_RESTART_COUNT:-0}
: "${RANKS_PER_NODE:=${SLURM_NTASKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}}"
export RANKS_PER_NODE
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MEGAVLM_NODES=${nodes[*]}

# Rank 0 runs on the first node. Its address, not its name: names of nodes need not resolve.
MASTER_ADDR=$(scontrol show node "${nodes[0]}" --oneliner | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
export MASTER_ADDR

container=()
if [ -n "$CONTAINER_IMAGE" ]; then
    container=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD"
        --container-mounts="$MEGAVLM_HOME:$MEGAVLM_HOME,$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
fi

# A port that jobs on the same node do not share, another one for each step, none that the system gives out by itself.
num_steps=0
choose_port() {
    num_steps=$((num_steps + 1))
    MASTER_PORT=$((10000 + (SLURM_JOB_ID * 8 + MEGAVLM_ATTEMPT * 3 + num_steps) % 20000))
    while (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done
    export MASTER_PORT
}

# run_step NAME NODES RANKS_PER_NODE [SRUN OPTION ...] -- COMMAND ...
# Sets step_status. A rank that fails ends the others: see docs/SLURM.md for how soon.
run_step() {
    local name=$1 num_nodes=$2 ranks=$3 cpus threads pid last
    step_status=130
    [ -z "$asked_by" ] || return 0
    shift 3
    local options=(--nodes="$num_nodes" --ntasks=$((num_nodes * ranks)) --ntasks-per-node="$ranks" --distribution=block)
    # without it srun waits for ever for ranks whose node has gone and come back meanwhile
    options+=(--wait="$END_SECONDS")
    while [ "$1" != -- ]; do options+=("$1") && shift; done
    shift
    cpus=$((${SLURM_CPUS_ON_NODE:-$ranks} / ranks))
    options+=(--cpus-per-task=$((cpus > 0 ? cpus : 1)) --export=ALL --mpi=none --job-name="$name")
    [ -z "${SLURM_GPUS_ON_NODE:-}" ] || options+=(--gpu-bind=none)   # ranks choose their GPU by LOCAL_RANK
    threads=$(env -u OMP_NUM_THREADS nproc)
    threads=$(((threads < ${SLURM_CPUS_ON_NODE:-$threads} ? threads : SLURM_CPUS_ON_NODE) / ranks))
    export LOCAL_WORLD_SIZE=$ranks STEP_FOLDER=$record/$name OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
    mkdir -p "$STEP_FOLDER" || fail "$STEP_FOLDER: cannot be made. $make_room"
    choose_port
    # shellcheck disable=SC2086  # CONTAINER_COMMAND is several words
    srun "${options[@]}" "${container[@]}" $CONTAINER_COMMAND bash "$MEGAVLM_HOME/slurm/rank.sh" "$PYTHON" "$@" &
    pid=$! step_status=127
    while true; do   # a signal ends the wait, not the step
        interrupted='' last=0
        wait "$pid" || last=$?
        [ "$last" = 127 ] || step_status=$last
        [ -n "$interrupted" ] || break
    done
}

run_once() {
    local num_nodes=$1 ranks=$2
    shift 2
    record=${JOB_FOLDER:-$PWD/runs/jobs}/$SLURM_JOB_ID
    run_step "$1" "$num_nodes" "$ranks" --kill-on-bad-exit=1 -- -m megavlm "$@"
    [ "$step_status" = 0 ] || fail "megavlm $1 ended with exit status $step_status; what each rank said: $STEP_FOLDER" "$step_status"
}

train() {
    local variables RUN_FOLDER TRAIN_ITERS RECORD
    # shellcheck disable=SC2086
    variables=$(srun --nodes=1 --ntasks=1 --mpi=none --export=ALL "${container[@]}" \
        $CONTAINER_COMMAND "$PYTHON" -m megavlm record "$@") || fail "the recipe cannot be used, or its run not recorded"
    eval "$(grep -E '^[A-Z_]+=' <<<"$variables")"   # RUN_FOLDER, TRAIN_ITERS, RECORD
    record=$RECORD attempts=$(dirname "$RECORD")/attempts.txt
    scontrol show job "$SLURM_JOB_ID" >"$record/job.txt" 2>/dev/null || true
    scontrol write batch_script "$SLURM_JOB_ID" "$record/job.sh" >/dev/null 2>&1 || true
    begin_attempt
    run_step preflight "${#nodes[@]}" "$RANKS_PER_NODE" --kill-on-bad-exit=0 --wait=15 -- \
        -m megavlm preflight "$@" --timeout-seconds "$PREFLIGHT_SECONDS"
    if [ "$step_status" != 0 ] && [ -z "$asked_by" ]; then
        note "failed in preflight" || true
        fail "preflight failed. Leave out a node it names with: sbatch --exclude=NODE"
    fi
    run_step train "${#nodes[@]}" "$RANKS_PER_NODE" --kill-on-bad-exit=1 -- -m megavlm train "$@"
    end_attempt
}

saved_step() { cat "$RUN_FOLDER/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0; }
note() {
    echo "attempt $MEGAVLM_ATTEMPT: $1 $(date '+%F %T'), step $(saved_step) saved, $SLURM_JOB_NODELIST" >>"$attempts" ||
        { say "$attempts: cannot be written to. $make_room" >&2 && return 1; }
}
count() { grep -cE "^attempt [0-9]+: $1" "$attempts" || true; }

# An attempt that was started and left no other line ended with its node: it counts as crashed.
begin_attempt() {
    touch "$attempts" || fail "$attempts: cannot be made. $make_room"
    num_crashes=$(($(count started) - $(count stopped)))
    first_step=$(saved_step)
    if ((num_crashes > MAX_RESTARTS)); then
        fail "$num_crashes crashes, and MAX_RESTARTS=$MAX_RESTARTS. Look into $(dirname "$record"), then submit again."
    fi
    note started || exit 1   # attempts that are not counted could go on for ever
    say "attempt $MEGAVLM_ATTEMPT on ${nodes[*]}, $RANKS_PER_NODE rank(s) each, after step $first_step; record: $record"
}

# done: all steps are saved. stopped: somebody asked, or the recipe's own time was up. crashed: anything else.
end_attempt() {
    local state
    state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" 2>/dev/null || true)
    if [ "$step_status" = 0 ] && [ "$(saved_step)" -ge "$TRAIN_ITERS" ]; then
        note done || true
        say "done: all $TRAIN_ITERS steps, in $RUN_FOLDER"
    elif [ "$asked_by" = SIGTERM ] && [ "$state" != RUNNING ]; then
        note "stopped (cancelled)" || true
        fail "cancelled after step $(saved_step); the same command resumes it" 143
    elif [ -n "$asked_by" ] || { [ "$step_status" = 0 ] && [ "$(saved_step)" != "$first_step" ]; }; then
        note "stopped" || true
        requeue "stopped after step $(saved_step) of $TRAIN_ITERS"
    else
        note "crashed (exit status $step_status)" || true
        num_crashes=$((num_crashes + 1))
        say "training ended with exit status $step_status; what each rank said: $STEP_FOLDER" >&2
        if ((num_crashes > MAX_RESTARTS)); then
            fail "$num_crashes crashes, and MAX_RESTARTS=$MAX_RESTARTS: giving up after step $(saved_step) of $TRAIN_ITERS"
        fi
        requeue "crash $num_crashes, of which MAX_RESTARTS=$MAX_RESTARTS are forgiven; last saved step $(saved_step)"
    fi
}

requeue() {
    say "$1: requeued"
    trap '' TERM USR1
    scontrol requeue "$SLURM_JOB_ID" || fail "SLURM did not requeue it; submit it again, and it resumes"
    sleep 60 || true   # SLURM ends this shell
}
