#!/usr/bin/env bash
# Recordings -> data.pkl (guide 5, step 0), once per recording: bash shells/create_datapkl.sh --dataset-dirs DATA    Look first: --dry-run
# one process that starts its own workers, whatever NUM_GPUS says
NUM_GPUS=1 exec bash "$(dirname "$(readlink -f "$0")")/launch.sh" create_datapkl.py configs/datapkl.yaml "$@"
