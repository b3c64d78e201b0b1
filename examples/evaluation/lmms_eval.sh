#!/bin/sh
# Evaluates a Hugging Face folder with lmms-eval: lmms_eval.sh FOLDER TASKS [MODEL]
# Written after lmms-eval's examples/models/internvl_hf.sh; not run by this project's tests.
set -eu
folder=${1:?usage: lmms_eval.sh FOLDER TASKS [MODEL], e.g. lmms_eval.sh hf/my_model docvqa_val,chartqa}
tasks=${2:?usage: lmms_eval.sh FOLDER TASKS [MODEL], e.g. lmms_eval.sh hf/my_model docvqa_val,chartqa}
model=${3:-internvl_hf}
exec accelerate launch --num_processes "${NPROC:-1}" --main_process_port "${PORT:-12380}" -m lmms_eval \
    --model "$model" \
    --model_args "pretrained=$folder" \
    --tasks "$tasks" \
    --batch_size 1 \
    --log_samples \
    --output_path "${OUTPUT:-logs}"
