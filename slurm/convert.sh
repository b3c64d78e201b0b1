#!/usr/bin/env bash
#SBATCH --job-name=convert
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.txt
#SBATCH --open-mode=append
# Converts weights between Hugging Face folders and run folders, on one node, without a GPU.
#   sbatch slurm/convert.sh SOURCE TARGET [megavlm convert's options]
source "${MEGAVLM_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
run_once 1 1 convert "$@"
