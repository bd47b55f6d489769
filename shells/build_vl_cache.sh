#!/usr/bin/env bash
# Qwen2.5-VL features of all sessions (guide 5, step 1). One GPU: bash shells/build_vl_cache.sh --dataset-dirs DATA    Four: add --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of build_vl_cache.py --help, e.g. --micro-batch 8
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" build_vl_cache.py configs/vl_cache.yaml "$@"
