"""Normalisation statistics of insertion episodes, with the reader, split and action definition of the training.

    python compute_stats.py --config configs/smolvla_sim.yaml --output dataset_stats_sim.yaml
    python compute_stats.py --dataset.root_dir DATA --use_ee_pose_delta_as_action --num_val_episodes 20

Reads `dataset`, `validation` and `seed` of a training's YAML and ignores the other keys, holds out the same episodes,
and writes mean, std, min, max, q01, q99 per dimension of action and state (format: common/stats.py). A training needs
no such file, for it computes the same numbers itself: use one to look at the data, or to share its statistics.
"""

from dataclasses import dataclass, field
from typing import Literal

from common import episodes as ep
from common import require
from common.program import launch
from common.stats import LISTS, save_stats


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with the recordings, searched recursively
    use_ee_pose_delta_as_action: bool = False  # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]
    use_ee_pose: bool = True  # observation.state contains ee_pose
    use_qpos: bool = False  # observation.state contains qpos, before ee_pose
    num_val_episodes: int = 0  # the last N files of the sorted list are held out (guide 1)
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping


@dataclass
class ValidationConfig:
    enable: bool = True  # false: none are drawn
    num_episodes: int = 0  # this many episodes, drawn with the seed, are held out (guide 2)


@dataclass
class Config:
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    seed: int = 1000  # of the draw
    output: str = "dataset_stats.yaml"  # file to write; .yaml, .yml or .json


def main(cfg):
    d = cfg.dataset
    drawn = cfg.validation.num_episodes if cfg.validation.enable else 0
    both = f"dataset.num_val_episodes is {d.num_val_episodes} and validation.num_episodes {drawn}"
    require(not (d.num_val_episodes and drawn), f"{both}: a training has one of them, set the other to 0")
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes)
    for message in excluded:
        print(f"excluded  {message}")
    parts = ep.hold_out(len(found), drawn, cfg.seed) if drawn else ep.hold_out(len(found), d.num_val_episodes)
    train, validation = ([found[i] for i in part] for part in parts)
    used = [key for key in ("qpos", "ee_pose") if getattr(d, f"use_{key}")]
    keys = [key for key in used if getattr(found[0], key) is not None] or ["no_state"]
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    stats = ep.insertion_stats(train, definition, [e.name for e in validation], keys)
    save_stats(cfg.output, stats)
    about = f"action: {definition.source}, rotation in {definition.rotation_unit}"
    print(f"{len(train)} episodes, {stats['num_frames']} frames, {len(validation)} held out; {about}")
    for key in ("action", "observation.state"):
        print(key)
        for name in LISTS:
            print(f"  {name:<5}" + " ".join(f"{v:11.4g}" for v in stats[key][name]))
    print(f"statistics: {cfg.output}")


if __name__ == "__main__":
    launch(main, Config, partial=True)
