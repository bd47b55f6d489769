#!/usr/bin/env bash
# SmolVLA on simulation episodes (guide 2), on every GPU that there is. Fewer: --num-gpus 2, or NUM_GPUS=2
# Own settings: --config my_config.yaml, and any key of train_smolvla_sim.py --help, e.g. --steps 5000 --lr 0.00001
NUM_GPUS="${NUM_GPUS:-all}" exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" train_smolvla_sim.py configs/smolvla_sim.yaml "$@"
