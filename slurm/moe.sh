#!/usr/bin/env bash
#SBATCH --job-name=moe
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Trains a mixture of experts. 120 seconds before the time limit it saves and goes to the end of the queue.
#   sbatch slurm/moe.sh [KEY=VALUE ...]
source "${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
train "${RECIPE:-$MEGAVLM_HOME/examples/moe/tiny.yaml}" "$@"
