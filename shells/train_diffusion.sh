#!/usr/bin/env bash
# Diffusion VLA on cached features (guide 5). One GPU: bash shells/train_diffusion.sh    Four: bash shells/train_diffusion.sh --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of train_diffusion.py --help, e.g. --ddim-steps 20
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_diffusion.py configs/diffusion.yaml "$@"
