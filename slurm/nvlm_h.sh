#!/usr/bin/env bash
#SBATCH --job-name=nvlm_h
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Trains NVLM-H. 120 seconds before the time limit it saves and goes to the end of the queue.
#   sbatch slurm/nvlm_h.sh [KEY=VALUE ...]
#   RECIPE=examples/nvlm/nvlm_h_72b_sft.yaml sbatch --nodes=32 slurm/nvlm_h.sh data.train.path=/data/sft.jsonl
source "${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
train "${RECIPE:-$MEGAVLM_HOME/examples/nvlm/tiny_h.yaml}" "$@"
