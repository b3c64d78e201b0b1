#!/usr/bin/env bash
# Runs a recorded job again: its code, its recipe, its number of nodes, into a new run folder. Not a job script itself.
#   slurm/replay.sh RUN/jobs/JOB/attempt_N NEW_RUN_FOLDER [sbatch options]
# The code is checked out beside the record. Packages are those of PYTHON (slurm/cluster.env); compare packages.txt.
set -euo pipefail
record=$(realpath "${1:?"give the folder of a record"}") target=$(realpath -m "${2:?"give a new run folder"}")
shift 2
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
value() { sed -n "s/^$1=//p" "$record/environment.txt" | tr -d \'; }

commit=$(sed -n 's/^commit: //p' "$record/code.txt")
if [ ! -d "$record/code" ]; then
    git -C "$home" worktree add --quiet --detach "$record/code" "$commit"
    [ ! -s "$record/code.patch" ] || git -C "$record/code" apply --binary "$record/code.patch"
fi
export MEGAVLM_HOME=$record/code RECIPE=$record/recipe.yaml
MEGAVLM_CLUSTER_ENV=${MEGAVLM_CLUSTER_ENV:-$home/slurm/cluster.env} PYTHON=${PYTHON:-$home/.venv/bin/python}
export MEGAVLM_CLUSTER_ENV PYTHON
RANKS_PER_NODE=${RANKS_PER_NODE:-$(value RANKS_PER_NODE)}
export RANKS_PER_NODE
eval "$(head -n 1 "$record/command.txt")"   # cd: relative paths of the recipe begin there
exec sbatch --nodes="$(value SLURM_JOB_NUM_NODES)" "$@" "$record/job.sh" checkpoint.save="$target"
