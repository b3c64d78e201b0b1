#!/usr/bin/env bash
#SBATCH --job-name=bench
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
# Times some training steps of a recipe on all nodes of the job; saves nothing but the figures.
#   RECIPE=examples/nvlm/speed.yaml sbatch --nodes=4 slurm/bench.sh [KEY=VALUE ...] [megavlm bench speed's options]
source "${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
mkdir -p "$PWD/runs/bench"
run_once "${#nodes[@]}" "$RANKS_PER_NODE" bench speed "${RECIPE:-$MEGAVLM_HOME/examples/nvlm/tiny.yaml}" \
    --json "$PWD/runs/bench/$SLURM_JOB_ID.json" "$@"
