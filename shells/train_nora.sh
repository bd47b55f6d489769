#!/usr/bin/env bash
# NORA on HDF5 episodes (guide 1). One GPU: bash shells/train_nora.sh    Four: bash shells/train_nora.sh --multi-gpu --num-gpus 4
# Own settings: --config my_config.yaml, and any key of train_nora.py --help, e.g. --mixed-precision bf16
exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_nora.py configs/nora.yaml "$@"
