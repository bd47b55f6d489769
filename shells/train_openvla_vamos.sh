#!/usr/bin/env bash
# OpenVLA + LoRA on VAMOS (guide 3). One GPU: bash shells/train_openvla_vamos.sh    Four: bash shells/train_openvla_vamos.sh --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of train_openvla_vamos.py --help, e.g. --data_root_dir DATA --batch_size 8 --grad_accumulation_steps 2
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_openvla_vamos.py configs/openvla_vamos.yaml "$@"
