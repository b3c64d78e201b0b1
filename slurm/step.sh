#!/usr/bin/env bash
# One step of the job that it is called in: NODES RANKS_PER_NODE [PYTHON ARGUMENT ...], on the first nodes of the job.
source "${MEGAVLM_HOME:?}/slurm/launch.sh"
num_nodes=$1 ranks=$2
shift 2
record=${JOB_FOLDER:-$PWD/runs/jobs}/$SLURM_JOB_ID
run_step "bench" "$num_nodes" "$ranks" --kill-on-bad-exit=1 -- "$@"
exit "$step_status"
