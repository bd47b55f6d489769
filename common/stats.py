"""Normalisation statistics: computed by one function, stored in one file format, applied by one class.

File (YAML or JSON by suffix): format_version, num_episodes, num_frames, action_definition {source, dim, rotation_unit},
episodes [names it was computed over], excluded_episodes [names held out], and for action and observation.state
{mean, std, min, max, q01, q99, mask, count}, lists of one number per dimension in the data's own units."""

import json
from pathlib import Path

import numpy as np
import yaml

from common import UserError, require

FORMAT_VERSION = 1
LISTS = ("mean", "std", "min", "max", "q01", "q99")
MODES = dict(q01_q99=("q01", "q99"), min_max=("min", "max"), mean_std=("mean", "std"), identity=())


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
    require(path.suffix in (".yaml", ".yml", ".json"), f"'{path}': the suffix must be .yaml, .yml or .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    as_yaml = dict(sort_keys=False, default_flow_style=None, width=1000)
    path.write_text(json.dumps(stats, indent=2) if path.suffix == ".json" else yaml.safe_dump(stats, **as_yaml))


def load_stats(path, keys=("action",), definition=None, held_out=(), trained=(), command=None):
    """Read and check a statistics file. `definition` (a dict) must equal its action_definition; it must not have been
    computed over any of the episodes `held_out`, but over at least one of `trained`. `command`: how to make it."""
    path = Path(path)
    again = f"Make it with: {command or f'python compute_stats.py --dataset.root_dir DATA --output {path}'}"

    def check(ok, wrong):
        require(ok, f"{path} {wrong}. {again}")

    require(path.is_file(), f"{path.name} not found: '{path}' does not exist. {again}")
    try:
        text = path.read_text(encoding="utf-8")
        stats = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not JSON, or not text
        raise UserError(f"{path} is not a statistics file ({' '.join(str(error).split())}). {again}") from error
    check(isinstance(stats, dict), f"is not a statistics file (it holds a {type(stats).__name__})")
    for key in keys:
        expected = f"{', '.join(LISTS)}: lists of the same length, of finite numbers, min <= max, q01 <= q99"
        check(is_table(stats.get(key)), f"has no complete '{key}' ({expected}); it has {sorted(stats)}")
    version, made_for = stats.get("format_version"), stats.get("action_definition")
    check(version == FORMAT_VERSION, f"has format_version {version}, this code reads {FORMAT_VERSION}")
    check(definition in (None, made_for), f"was computed for actions {made_for}, this run trains on {definition}")
    inside = set(stats.get("episodes", ()))
    check(not trained or set(trained) & inside, f"was computed over other data: {len(inside)} episodes, none used here")
    seen = sorted(set(held_out) & inside)
    check(not seen, f"was computed over {len(seen)} episode(s) that this run validates on, e.g. {''.join(seen[:1])}")
    return stats


def is_table(entry):
    """Has it all LISTS, of the same length, in order and finite?"""
    try:
        values = np.array([*(entry[name] for name in LISTS), entry.get("mask", entry["mean"])], np.float64)
    except (KeyError, TypeError, ValueError):  # one is missing or shorter than the others, or holds something else
        return False
    in_order = values.ndim == 2 and (values[[2, 4]] <= values[[3, 5]]).all() and (values[1] >= 0).all()
    return bool(in_order and np.isfinite(values).all())


class Normalizer:
    """Maps data to training units and back, per dimension, for arrays (..., D) in NumPy.

    "q01_q99" and "min_max" map [low, high] to [-1, 1] and clip, unless `clip` is false; "mean_std" subtracts and
    divides; "identity", and dimensions whose mask is False, pass through. A constant dimension maps to 0 and back to
    its constant. Where q01 = q99 although the data moves (a rare jump), min and max are used, so that it survives."""

    def __init__(self, entry, mode="q01_q99", clip=True):
        require(mode in MODES, f"normalisation mode '{mode}': expected {', '.join(MODES)}")
        missing = [name for name in MODES[mode] if name not in entry]
        require(not missing, f"the statistics lack {missing}, which mode {mode} needs; they have {sorted(entry)}")
        self.mode, self.dim = mode, len(next(v for v in entry.values() if np.ndim(v) == 1))
        self.mask = np.asarray(entry.get("mask", [True] * self.dim), bool) & (mode != "identity")
        self.clip = clip and mode in ("q01_q99", "min_max")
        first, second = (np.asarray(entry[name], np.float64) for name in MODES[mode] or ("mean", "mean"))
        self.center, self.half = first, second
        if mode in ("q01_q99", "min_max"):
            flat = second - first <= 1e-12 * np.maximum(np.abs(first), np.abs(second))
            low, high = np.where(flat, entry.get("min", first), first), np.where(flat, entry.get("max", second), second)
            self.center, self.half = (low + high) / 2, (high - low) / 2
        self.center, self.half = np.where(self.mask, self.center, 0.0), np.where(self.mask, self.half, 1.0)
        # float32 noise around a constant is no motion: relative to the size of the value it is below 1e-7
        self.constant = self.mask & (self.half <= 1e-7 * np.abs(self.center))

    def normalize(self, x):
        """(..., D) in data units -> float32 in training units."""
        y = (x - self.center) / np.where(self.constant, 1.0, self.half)
        y = np.clip(y, -1.0, 1.0) if self.clip else y
        return np.where(self.mask, np.where(self.constant, 0.0, y), x).astype(np.float32)

    def unnormalize(self, y):
        """(..., D) in training units -> float32 in data units."""
        x = np.asarray(y, np.float64) * self.half + self.center
        return np.where(self.constant, self.center, x).astype(np.float32)
