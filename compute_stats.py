"""Normalisation statistics of a data set, with the same reader and the same action definition as the training.

    python compute_stats.py --config configs/nora.yaml --output dataset_stats.yaml
    python compute_stats.py --dataset.root_dir DATA --use_ee_pose_delta_as_action --num_val_episodes 20 --output dataset_stats.json

Reads the `dataset` group of a training config (other keys of that file are accepted and not used), leaves out the validation
episodes that the training will hold out, and writes mean, std, min, max, q01, q99 per dimension of the action and the state.
"""
import dataclasses
import os
import sys
from dataclasses import dataclass, field

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from common.config import parse_config
from common.stats import save_stats

import train_nora


@dataclass
class Config(train_nora.Config):
    output: str = "dataset_stats.yaml"  # file to write; .yaml, .yml or .json


def main(cfg):
    data = train_nora.load_data(cfg)


if __name__ == "__main__":
    main(parse_config(Config))
