#!/usr/bin/env bash
# SmolVLA on simulation episodes (guide 2), on every GPU that there is. Fewer: --num-gpus 2, or NUM_GPUS=2
# Own settings: --config my_config.yaml, and any key of train_smolvla_sim.py --help, e.g. --steps 5000 --lr 0.00001
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l)"
export NUM_GPUS="${NUM_GPUS:-$((gpus > 1 ? gpus : 1))}"
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" train_smolvla_sim.py configs/smolvla_sim.yaml "$@"
