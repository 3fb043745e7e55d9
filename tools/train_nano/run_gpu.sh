#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# One leg of training on a GPU machine: run_gpu.sh OUT WORK MINUTES LEG_MINUTES [further options of train.py]
# Continues from WORK/checkpoint.pt where there is one. OUT gets the weights, configuration, scores and log.
set -u
out=$1 work=$2 minutes=$3 leg=$4
shift 4
mkdir -p "$out" "$work"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor"
resume=()
[ -f "$work/checkpoint.pt" ] && resume=(--resume "$work")
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
timeout --signal=INT 575 python3 -m tools.train_nano.train --out "$work/run" --work "$work" \
    --tokenizer vericache/assets/vericache-nano --minutes "$minutes" --leg-minutes "$leg" "${resume[@]}" "$@"
code=$?
cp "$work"/run/model/{model-*.safetensors,model.safetensors.index.json,config.json,generation_config.json,README.md} "$out"
cp "$work"/run/{eval.json,log.jsonl} "$out"
exit $code
