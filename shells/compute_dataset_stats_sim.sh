#!/usr/bin/env bash
# Statistics of guide 2's training episodes -> dataset_stats_sim.yaml in the present folder. Other data: --config my_config.yaml or --dataset.root_dir DATA
# one process, whatever NUM_GPUS says
NUM_GPUS=1 exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" compute_stats.py configs/smolvla_sim.yaml --output dataset_stats_sim.yaml "$@"
