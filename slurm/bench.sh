#!/usr/bin/env bash
#SBATCH --job-name=bench
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Times training steps; saves nothing but the figures. Of a recipe, on all nodes of the job:
#   RECIPE=examples/nvlm/speed.yaml sbatch --nodes=4 slurm/bench.sh [KEY=VALUE ...] [megavlm bench speed's options]
# Or of many layouts on 1, 2 ... of the nodes, each row a step of its own. A job that ends too early goes on when requeued:
#   SWEEP=examples/nvlm/layouts.yaml sbatch --nodes=16 slurm/bench.sh [KEY=VALUE ...] [megavlm bench layouts' options]
source "${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
mkdir -p "$PWD/runs/bench"
if [ -z "${SWEEP:-}" ]; then
    run_once "${#nodes[@]}" "$RANKS_PER_NODE" bench speed "${RECIPE:-$MEGAVLM_HOME/examples/nvlm/tiny.yaml}" \
        --json "$PWD/runs/bench/$SLURM_JOB_ID.json" "$@"
    exit
fi

# The sweep itself runs here, outside of any step and container: it starts the steps.
"$PYTHON" -m megavlm bench layouts "$SWEEP" --num-nodes "${#nodes[@]}" --nproc-per-node "$RANKS_PER_NODE" \
    --launcher "bash $MEGAVLM_HOME/slurm/step.sh" "$@" &
sweep=$! status=127
trap 'asked_by=SIGUSR1; kill -USR1 "$sweep"' USR1   # 120 s before the time limit
trap 'asked_by=SIGTERM; kill -TERM "$sweep"' TERM
while [ "$status" -ge 127 ] && kill -0 "$sweep" 2>/dev/null; do wait "$sweep" && status=0 || status=$?; done
[ "$status" != 138 ] || requeue "the sweep was stopped before its end"
[ "$status" = 0 ] || fail "the sweep ended with exit status $status" "$status"
