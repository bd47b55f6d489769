"""Normalisation statistics: computed by one function, stored in one file form, applied by one class.

File (YAML or JSON by suffix):
    format_version, num_episodes, num_frames, action_definition {source, dim, rotation_unit}, excluded_episodes [names held out],
    action, observation.state: {mean, std, min, max, q01, q99, mask, count}, lists of one number per dimension, in the data's own units.
"""

import json
from pathlib import Path

import numpy as np
import yaml

FORMAT_VERSION = 1
LISTS = ("mean", "std", "min", "max", "q01", "q99")


def compute_stats(arrays):
    """{key: list of (n, D) arrays} -> {key: {...}}: population std, exact quantiles over all rows, float64."""
    out = {}
    for key, parts in arrays.items():
        x = np.concatenate(parts).astype(np.float64)
        q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
        values = dict(mean=x.mean(0), std=x.std(0), min=x.min(0), max=x.max(0), q01=q01, q99=q99)
        out[key] = {name: v.tolist() for name, v in values.items()} | {"mask": [True] * x.shape[1], "count": len(x)}
    return out


def save_stats(path, stats):
    """Write `stats` as YAML or JSON, by the suffix of `path`."""
    path = Path(path)
    if path.suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"statistics file '{path}': the suffix must be .yaml, .yml or .json")
    text = (
        json.dumps(stats, indent=2)
        if path.suffix == ".json"
        else yaml.safe_dump(stats, sort_keys=False, default_flow_style=None, width=1000)
    )
    path.write_text(text)


def load_stats(path, keys=("action",), definition=None, held_out=()):
    """Read and check a statistics file.

    `definition` (a dict) must equal the file's action_definition; every name in `held_out` must be among the file's
    excluded_episodes, or its numbers contain validation data. Raises FileNotFoundError or ValueError with the next command.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path.name} not found: '{path}' does not exist. Make it with: python compute_stats.py --dataset.root_dir DATA --output {path}"
        )
    again = f"Make it again: python compute_stats.py --dataset.root_dir DATA --output {path}"
    try:
        text = path.read_text(encoding="utf-8")
        stats = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not JSON, or not text
        raise ValueError(f"{path} is not a statistics file ({error}). {again}") from error
    if not isinstance(stats, dict):
        raise ValueError(f"{path} is not a statistics file (it holds a {type(stats).__name__}). {again}")
    for key in keys:
        entry = stats.get(key)
        if not isinstance(entry, dict) or any(name not in entry for name in LISTS):
            raise ValueError(f"{path} has no complete '{key}' ({', '.join(LISTS)}); it has {sorted(stats)}. {again}")
        try:
            values, mask = (
                np.array([entry[name] for name in LISTS], np.float64),
                np.array(entry.get("mask", entry["mean"])),
            )
        except (TypeError, ValueError):  # a list is shorter than the others, or holds something else
            values = mask = np.zeros(0)
        if values.ndim != 2 or not np.isfinite(values).all() or mask.shape != values[0].shape:
            raise ValueError(
                f"{path}: '{key}' must have {', '.join(LISTS)} and mask as lists of the same length, of finite numbers. {again}"
            )
    if stats.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {stats.get('format_version')}, this code reads {FORMAT_VERSION}. {again}"
        )
    if definition is not None and stats.get("action_definition") != definition:
        raise ValueError(
            f"{path} was computed for actions {stats.get('action_definition')}, this run trains on {definition}. {again}"
        )
    seen = sorted(set(held_out) - set(stats.get("excluded_episodes") or ()))
    if seen:
        raise ValueError(
            f"{path} was computed over {len(seen)} episode(s) that this run validates on, e.g. {seen[0]}. Use the same num_val_episodes: {again}"
        )
    return stats


class Normalizer:
    """Maps data to training units and back, per dimension, for arrays (..., D) in NumPy.

    "q01_q99" and "min_max" map [low, high] to [-1, 1] and clip; "mean_std" subtracts and divides. A dimension whose mask is
    False passes unchanged. A constant dimension maps to 0 and back to its constant. Where q01 = q99 although the data moves
    (a rare jump), min and max are used, so that the jump survives.
    """

    def __init__(self, entry, mode="q01_q99"):
        if mode not in ("q01_q99", "min_max", "mean_std"):
            raise ValueError(f"normalisation mode '{mode}': expected q01_q99, min_max or mean_std")
        values = {name: np.asarray(entry[name], np.float64) for name in LISTS}
        self.mode, self.dim, self.mask = (
            mode,
            len(entry["mean"]),
            np.asarray(entry.get("mask", [True] * len(entry["mean"])), bool),
        )
        if mode == "mean_std":
            self.center, self.half = values["mean"], values["std"]
        else:
            low, high = (values["q01"], values["q99"]) if mode == "q01_q99" else (values["min"], values["max"])
            flat = high - low <= 1e-12 * np.maximum(np.abs(low), np.abs(high))
            low, high = np.where(flat, values["min"], low), np.where(flat, values["max"], high)
            self.center, self.half = (low + high) / 2, (high - low) / 2
        # float32 noise around a constant is no motion: relative to the size of the value it is below 1e-7
        self.constant = self.half <= 1e-7 * np.abs(self.center)

    def normalize(self, x):
        """(..., D) in data units -> float32 in training units."""
        y = (x - self.center) / np.where(self.constant, 1.0, self.half)
        if self.mode != "mean_std":
            y = np.clip(y, -1.0, 1.0)
        return np.where(self.mask, np.where(self.constant, 0.0, y), x).astype(np.float32)

    def unnormalize(self, y):
        """(..., D) in training units -> float32 in data units."""
        x = np.where(self.constant, self.center, np.asarray(y, np.float64) * self.half + self.center)
        return np.where(self.mask, x, y).astype(np.float32)
