#!/usr/bin/env bash
# Asynchronous VLA on cached features (guide 5). One GPU: bash shells/train_async.sh    Four: bash shells/train_async.sh --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of train_async.py --help, e.g. --vlm-reuse-count 4
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_async.py configs/async.yaml "$@"
