#!/usr/bin/env bash
# Mobile VLA, Kosmos-2 + LoRA (guide 4). One GPU: bash shells/train_mobile_kosmos.sh    Four: bash shells/train_mobile_kosmos.sh --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of train_mobile_kosmos.py --help, e.g. --max_epochs 20 --lora_rank 16
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_mobile_kosmos.py configs/mobile_kosmos.yaml "$@"
