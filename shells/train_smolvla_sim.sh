#!/usr/bin/env bash
# SmolVLA on simulation episodes (guide 2). One GPU: bash shells/train_smolvla_sim.sh    Five: NUM_GPUS=5 bash shells/train_smolvla_sim.sh, or --num-gpus 5
# Own settings: --config my_config.yaml, and any key of train_smolvla_sim.py --help, e.g. --steps 5000 --lr 0.00001
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" train_smolvla_sim.py configs/smolvla_sim.yaml "$@"
