#!/usr/bin/env bash
# One rank of a step: says in torchrun's words who it is, keeps its output in a file of its own, becomes the command.
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# tee must outlive the signals that ask the rank to save and stop
exec > >(trap '' INT TERM USR1 && exec tee -a "$STEP_FOLDER/rank_$(printf %05d "$RANK").txt") 2>&1
exec "$@"
