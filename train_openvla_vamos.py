"""OpenVLA with LoRA on VAMOS: one picture and an instruction -> the velocity (v_x, v_y) of the next step, as two action tokens.

Model: Kim et al. 2024, arXiv 2406.09246; modeling_openvla.py holds it, weight-compatible with openvla/openvla-7b. Data: VAMOS (arXiv 2510.20818), parquet files.
v = (p[t+1] - p[t])[:2] of a recorded path, x forward, y left, metres per recorded step (there is no clock in the data; --trajectory_hz makes it m/s).

    python train_openvla_vamos.py --data_root_dir DATA --check                          # look at the data, no weights needed
    bash shells/train_openvla_vamos.sh --data_root_dir DATA                             # one GPU
    torchrun --standalone --nnodes 1 --nproc-per-node 4 train_openvla_vamos.py --vla_path openvla/openvla-7b --data_root_dir DATA --dataset_name vamos ...
    python train_openvla_vamos.py --config configs/demo/openvla_vamos.yaml --max_steps 20   # smoke run on a CPU, on make_demo.py's output

Output: run_root_dir/EXP_ID/ is the merged model (opens with transformers, trust_remote_code=True) with dataset_statistics.json, beside log/ (metrics.jsonl, loss.png,
config.yaml, validation_episodes.txt). adapter_tmp_dir/EXP_ID/ is the newest LoRA adapter (opens with peft), beside steps_N/, from which a run resumes.

Letters in shapes: B batch, P patches of the image, T text tokens, A action dims (2), r LoRA rank.
"""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
try:
    import torchvision  # noqa: F401  not used here, but transformers imports it where it is installed ...
except (ImportError, OSError, RuntimeError, AttributeError):
    sys.modules["torchvision"] = None  # ... and would break over one that does not fit this torch

import contextlib
import dataclasses
import datetime
import gc
import hashlib
import io
import json
import math
import re
import shutil
import time
import warnings
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import modeling_openvla
from common import checkpoint as ckpt
from common import runlog
from common.config import parse_config, save_config
from common.sampler import RankBatches, epoch_order, generator_at, torch_seed_at
from common.stats import Normalizer, compute_stats
from modeling_openvla import (
    EMPTY_TOKEN,
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    PrismaticProcessor,
    pad_right,
    prompt_of,
)

FORMAT = 1  # of steps_N/ and meta.json
KEY = "vamos_dataset"  # of the statistics in the exported model
# what "all-linear" meant to OpenVLA's authors (peft 0.11): these leaf names, the patch convolutions and the head included
LORA_LEAVES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv",
    "proj",
    "fc1",
    "fc2",
    "fc3",
    "q",
    "kv",
    "lm_head",
)


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    vla_path: str = "openvla/openvla-7b"  # model to start from: hub id or directory in OpenVLA's format
    data_root_dir: str = ""  # folder with data/train-*.parquet and data/validation-*.parquet (or the files themselves)
    dataset_name: str = "vamos"  # vamos
    run_root_dir: str = "runs"  # EXP_ID/ in it becomes the merged model
    adapter_tmp_dir: str = "adapter-tmp"  # EXP_ID/ in it holds adapter, optimizer and position: what a run resumes from
    run_id_note: str | None = None  # appended to EXP_ID
    # data
    samples: Literal["all", "first"] = (
        "all"  # all: every step of a path is a sample (of the one picture); first: the first step only
    )
    instruction_column: Literal["auto", "lang_goal", "text"] = (
        "auto"  # auto: lang_goal, unless most of it is goal points (<point ...>), then text; empty cells use the other one
    )
    trajectory_hz: float | None = None  # points per second of the paths: actions in m/s; null: metres per step
    image_aug: bool = False  # brightness, contrast, saturation, hue; never a crop, which would move the goal
    shuffle_rows: int = 1024  # rows shuffled together: whole row groups in random order, then their samples; a loader worker holds this many pictures (0.2 to 0.4 MB each)
    skip_bad_episodes: bool = False  # leave unreadable parquet files out, listed and counted, instead of stopping
    # LoRA
    lora_rank: int = 32  # r; scale = min(r, 16) / r
    lora_dropout: float = 0.0  # of what enters the adapters
    lora_targets: Literal["used", "all-linear"] = (
        "used"  # used: the layers that influence the output; all-linear: also the 13 that never do, as upstream
    )
    use_quantization: bool = False  # frozen weights in 4 bits (nf4, needs bitsandbytes); implies gradient_checkpointing
    gradient_checkpointing: bool = (
        False  # recompute activations in the backward pass: less memory, about a third more time
    )
    # training
    batch_size: int = 16  # samples per GPU and micro-batch
    grad_accumulation_steps: int = 1  # micro-batches per optimizer step
    learning_rate: float = 5e-4  # AdamW
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: to 0 at max_steps
    weight_decay: float = 0.01  # decoupled
    max_grad_norm: float = 1.0  # largest gradient norm; 0: no clipping
    max_steps: int = 200000  # optimizer steps
    save_steps: int = 5000  # optimizer steps between checkpoints of adapter and optimizer
    save_latest_checkpoint_only: bool = (
        True  # false: every checkpoint is also merged, into run_root_dir/EXP_ID--N_chkpt
    )
    keep_checkpoints: int = 2  # newest steps_N kept beside the best; 0: all
    val_steps: int = 1000  # optimizer steps between validations
    val_samples: int = 256  # samples of validation-*.parquet, evenly spread
    log_steps: int = 10  # optimizer steps
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 7  # of order, augmentation, dropout and new adapters
    # logging
    wandb_project: str | None = None  # W&B project; null: no W&B
    wandb_entity: str | None = None  # W&B team or user
    wandb_mode: Literal["online", "offline", "disabled"] = (
        "online"  # online falls back to offline when nobody is logged in
    )
    # what to do
    resume_from_checkpoint: str | None = None  # a steps_N directory, or "auto" for the newest one of this EXP_ID
    load_model_weights: str | None = None  # new run from the adapter in this steps_N directory
    merge: str | None = (
        None  # write the merged model of this steps_N directory to run_root_dir/EXP_ID--N_chkpt, and stop
    )
    check: bool = False  # read the data, build and print one batch, stop
    check_images: bool = False  # with check: decode every picture


ALIASES = {"resume": "resume_from_checkpoint"}


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    for name in (
        "batch_size",
        "grad_accumulation_steps",
        "max_steps",
        "save_steps",
        "val_steps",
        "val_samples",
        "log_steps",
        "lora_rank",
        "shuffle_rows",
    ):
        if getattr(cfg, name) < 1:
            raise ValueError(f"{name} is {getattr(cfg, name)}: expected 1 or more")
    if cfg.dataset_name not in ("vamos", KEY):
        raise ValueError(f"dataset_name is '{cfg.dataset_name}': this script reads VAMOS, expected vamos")
    if cfg.trajectory_hz is not None and cfg.trajectory_hz <= 0:
        raise ValueError(f"trajectory_hz is {cfg.trajectory_hz}: expected points per second, above 0")
    if not 0 <= cfg.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {cfg.lora_dropout}: expected 0 to below 1")
    if cfg.resume_from_checkpoint and cfg.load_model_weights:
        raise ValueError(
            f"--resume {cfg.resume_from_checkpoint} continues a run, --load_model_weights {cfg.load_model_weights} starts one: give one of them"
        )


def exp_id(cfg):
    """Name of a run's folders, as OpenVLA's script forms it."""
    name = f"{cfg.vla_path.rstrip('/').split('/')[-1]}+{cfg.dataset_name}+b{cfg.batch_size * cfg.grad_accumulation_steps}+lr-{cfg.learning_rate}+lora-r{cfg.lora_rank}+dropout-{cfg.lora_dropout}"
    return (
        name
        + "+q-4bit" * cfg.use_quantization
        + (f"--{cfg.run_id_note}" if cfg.run_id_note else "")
        + "--image_aug" * cfg.image_aug
    )


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Spec:
    """What the actions and instructions of a run are; in every checkpoint and beside every exported model."""

    instruction_column: str  # lang_goal or text
    unit: str  # of the actions: m/step or m/s
    trajectory_hz: float | None
    samples: str  # all or first
    key: str = KEY  # of the statistics


@dataclass
class Rows:
    """The usable rows of some parquet files, in file order: where each picture is, what was said, and its actions."""

    paths: list  # of the files
    file: np.ndarray  # (R,) int32, index into paths
    group: np.ndarray  # (R,) int32, row group in the file
    row: np.ndarray  # (R,) int32, row in the group
    lang_goal: list  # (R,) str or None
    text: list  # (R,) str or None
    ends: np.ndarray  # (R,) int64, samples up to and including the row
    actions: np.ndarray  # (N, 2) float32, one sample each
    step: np.ndarray  # (N,) int32, index of the sample in its path
    counts: Counter  # what was seen and left out
    instruction: list = None  # (R,) str, chosen

    def locate(self, i):
        """Sample -> its row."""
        return int(np.searchsorted(self.ends, i, side="right"))

    def groups(self):
        """-> (first sample (G,), samples (G,), rows (G,)) of the row groups"""
        new = np.flatnonzero(np.diff(self.file, prepend=-1) | np.diff(self.group, prepend=-1))
        first = np.concatenate([[0], self.ends])[new]
        return first, np.diff(first, append=self.ends[-1]), np.diff(new, append=len(self.row))


def find_files(root):
    """-> (train files, validation files), sorted"""
    if not str(root):
        raise ValueError(
            "data_root_dir is not set: expected the folder with data/train-*.parquet. Set --data_root_dir; make_demo.py vamos writes a small set"
        )
    for folder in (Path(root) / "data", Path(root)):
        if train := sorted(folder.glob("train-*.parquet")):
            return train, sorted(folder.glob("validation-*.parquet"))
    there = sorted(p.name for p in Path(root).glob("*"))[:5] if Path(root).is_dir() else None
    raise FileNotFoundError(
        f"no train-*.parquet in '{root}/data' or '{root}' ({'the folder has ' + str(there) if there else 'no such folder' if there is None else 'the folder is empty'}); "
        "expected data_root_dir/data/train-*.parquet. Set --data_root_dir; make_demo.py vamos writes a small set"
    )


def steps_of(column):
    """Arrow column of paths, list<list<number>> -> (lengths (R,), steps (M, 2) float64): p[t+1] - p[t] of neighbouring points, path after path; NaN where a point is
    not finite or has fewer than 2 numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column.combine_chunks().cast(pa.list_(pa.list_(pa.float64())))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    points = column.flatten()
    size = pc.fill_null(pc.list_value_length(points), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = np.append(points.flatten().to_numpy(zero_copy_only=False).astype(np.float64), np.nan)
    at = np.where(size >= 2, np.cumsum(size) - size, len(values) - 1)
    xy = np.stack([values[at], values[np.minimum(at + 1, len(values) - 1)]], axis=1)
    ends = np.cumsum(lengths)
    keep = np.ones(max(len(xy) - 1, 0), bool)
    inner = ends[(ends > 0) & (ends < len(xy))] - 1  # from the last point of a path to the first of the next
    keep[inner] = False
    return lengths, np.diff(xy, axis=0)[keep]


def read_rows(paths, cfg, progress=False):
    """Read everything but the pictures, one row group at a time -> (Rows, messages of files left out by skip_bad_episodes)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts, counts, bad, used = (
        {k: [] for k in ("file", "group", "row", "lang_goal", "text", "count", "actions", "step")},
        Counter(),
        [],
        [],
    )
    for path in tqdm(paths, desc="reading paths", unit="file", disable=None if progress else True, leave=False):
        found, seen = {k: [] for k in parts}, Counter()
        try:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
            if missing := [c for c in ("image", "trajectory_3d") if c not in names]:
                raise ValueError(f"no column '{missing[0]}'; it has {', '.join(names)}")
            for g in range(file.num_row_groups):
                table = file.read_row_group(
                    g, columns=["trajectory_3d", *(c for c in ("lang_goal", "text") if c in names)]
                )
                lengths, steps = steps_of(table["trajectory_3d"])
                transitions = np.maximum(lengths - 1, 0)
                row, step = (
                    np.repeat(np.arange(len(lengths)), transitions),
                    np.arange(len(steps)) - np.repeat(np.cumsum(transitions) - transitions, transitions),
                )
                pictured = has_picture(file, g, len(lengths))
                wanted = (step == 0) if cfg.samples == "first" else np.ones(len(step), bool)
                good = np.isfinite(steps).all(1) & pictured[row]
                seen.update(
                    rows=len(lengths),
                    short=int((lengths < 2).sum()),
                    unpictured=int((~pictured).sum()),
                    nonfinite=int((wanted & ~np.isfinite(steps).all(1)).sum()),
                )
                good &= wanted
                count = np.bincount(row[good], minlength=len(lengths))
                rows = np.flatnonzero(count)
                found["file"].append(np.full(len(rows), len(used), np.int32))
                found["group"].append(np.full(len(rows), g, np.int32))
                found["row"].append(rows.astype(np.int32))
                found["count"].append(count[rows])
                found["actions"].append((steps[good] * (cfg.trajectory_hz or 1.0)).astype(np.float32))
                found["step"].append(step[good].astype(np.int32))
                for c in ("lang_goal", "text"):
                    found[c].extend(table[c].take(rows).to_pylist() if c in names else [None] * len(rows))
        except (pa.ArrowException, OSError, ValueError) as error:
            message = f"{path}: not a readable VAMOS file ({error})"
            if not cfg.skip_bad_episodes:
                raise ValueError(f"{message}. Copy it again, or leave such files out: --skip_bad_episodes") from error
            bad.append(message)
            continue
        used.append(path)
        counts.update(seen)
        for k in parts:
            parts[k].extend(found[k])
    join = lambda k, empty: np.concatenate(parts[k] or [empty])  # noqa: E731
    none = np.zeros(0, np.int32)
    return Rows(
        used,
        join("file", none),
        join("group", none),
        join("row", none),
        parts["lang_goal"],
        parts["text"],
        np.cumsum(join("count", none)),
        join("actions", np.zeros((0, 2), np.float32)),
        join("step", none),
        counts,
    ), bad


def has_picture(file, g, rows):
    """(rows,) bool, False where the picture is null. The file's own statistics answer it, unless they count a null."""
    group = file.metadata.row_group(g)
    columns = [
        group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema in ("image", "image.bytes")
    ]
    if all(c.statistics is None or not c.statistics.has_null_count or c.statistics.null_count == 0 for c in columns):
        return np.ones(rows, bool)
    column = file.read_row_group(g, columns=["image"])["image"].combine_chunks()
    column = column.field("bytes") if column.type.num_fields else column
    return column.is_valid().to_numpy(zero_copy_only=False)


GOAL_POINT = re.compile(r"<point|<loc\d")


def choose_instructions(rows, column):
    """Fill rows.instruction -> the column used. An empty cell takes the other column's, then "navigate", both counted."""
    if column == "auto":
        goals = [s for s in rows.lang_goal if s and s.strip()]
        column = "lang_goal" if goals and sum(bool(GOAL_POINT.search(s)) for s in goals) <= len(goals) / 2 else "text"
    chosen, other = (rows.lang_goal, rows.text) if column == "lang_goal" else (rows.text, rows.lang_goal)
    rows.instruction, known = [], {}
    for first, second in zip(chosen, other):
        first, second = (first or "").strip(), (second or "").strip()
        rows.counts["other_column"] += bool(not first and second)
        rows.counts["no_instruction"] += not (first or second)
        text = first or second or "navigate"
        rows.instruction.append(known.setdefault(text, text))  # one object per text: millions of rows say the same
    return column


@dataclass
class Data:
    """Rows of a run, split and described."""

    root: Path
    train: Rows
    validation: Rows
    excluded: list  # messages of files left out by skip_bad_episodes
    spec: Spec
    stats: dict  # entry of dataset_statistics.json
    fingerprint: str  # changes when the training samples would

    def names(self, rows):
        """Names of the files of `rows`, relative to the root."""
        return [p.relative_to(self.root).as_posix() for p in rows.paths]


def load_data(cfg, rank=0):
    """Find, index, split and describe the data set."""
    train_paths, validation_paths = find_files(cfg.data_root_dir)
    (train, bad), (validation, bad_too) = read_rows(train_paths, cfg, rank == 0), read_rows(validation_paths, cfg)
    if not len(train.actions):
        raise ValueError(
            f"'{cfg.data_root_dir}' has no usable sample: {train.counts['rows']} rows in {len(train.paths)} train files, {train.counts['short']} with fewer than 2 points, "
            f"{train.counts['nonfinite']} steps not finite, {train.counts['unpictured']} rows without a picture"
        )
    spec = Spec(
        choose_instructions(train, cfg.instruction_column),
        "m/s" if cfg.trajectory_hz else "m/step",
        cfg.trajectory_hz,
        cfg.samples,
    )
    choose_instructions(validation, spec.instruction_column)
    entry = compute_stats({"action": [train.actions]})["action"]
    del entry["count"]
    for i, (low, high) in enumerate(zip(entry["q01"], entry["q99"])):
        if low == high:  # only a rare jump moves: min and max keep it alive, and a constant stays one
            entry["q01"][i], entry["q99"][i] = entry["min"][i], entry["max"][i]
    stats = dict(
        action=entry,
        num_transitions=len(train.actions),
        num_trajectories=len(train.row),
        unit=spec.unit,
        samples=spec.samples,
    )
    digest = hashlib.sha256(
        json.dumps([[p.name for p in train.paths], dataclasses.asdict(spec), train.instruction]).encode()
    )
    digest.update(train.actions.tobytes() + train.ends.tobytes())
    return Data(Path(cfg.data_root_dir), train, validation, bad + bad_too, spec, stats, digest.hexdigest()[:16])


class WindowOrder:
    """index(position) over endless epochs, each a permutation of all samples: row groups in random order, cut into windows of about `shuffle_rows` rows, the
    samples of a window in random order. A pure function of (seed, position), so readers hold one window and no more."""

    def __init__(self, rows, seed, shuffle_rows):
        (self.first, self.samples, sizes), self.seed, self.n = rows.groups(), seed, len(rows.actions)
        self.sizes, self.shuffle_rows, self._epoch, self._window = sizes, shuffle_rows, None, None

    def windows(self, epoch):
        """-> list of arrays of row groups"""
        groups = epoch_order(len(self.first), self.seed, epoch)
        return np.split(groups, np.flatnonzero(np.diff((np.cumsum(self.sizes[groups]) - 1) // self.shuffle_rows)) + 1)

    def index(self, position):
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._window, self._windows = epoch, None, self.windows(epoch)
            self._ends = np.cumsum([self.samples[w].sum() for w in self._windows])
        window = int(np.searchsorted(self._ends, offset, side="right"))
        if window != self._window:
            self._window = window
            there = np.concatenate(
                [np.arange(self.first[g], self.first[g] + self.samples[g]) for g in self._windows[window]]
            )
            self._order = generator_at(self.seed, f"{epoch}/{window}", "window").permutation(there)
        return int(self._order[offset - (self._ends[window - 1] if window else 0)])


class PictureReader:
    """Pictures of parquet files: whole row groups are read, the last ones kept, and each picture is decoded and resized once while its group is kept."""

    def __init__(self, resize, size, keep_rows):
        self.resize, self.size, self.keep_rows, self._groups, self._files = (
            resize,
            size,
            keep_rows,
            OrderedDict(),
            OrderedDict(),
        )

    def read(self, path, group, row):
        """-> (h, w, 3) uint8 RGB at the model's size"""
        import pyarrow as pa
        import pyarrow.parquet as pq

        key = (path, group)
        if key not in self._groups:
            while sum(len(column) for column, _ in self._groups.values()) >= self.keep_rows:
                self._groups.popitem(last=False)
            if path not in self._files:
                while len(self._files) >= 4:
                    self._files.popitem(last=False)[1].close()
                self._files[path] = pq.ParquetFile(path)
            try:
                column = self._files[path].read_row_group(group, columns=["image"])["image"].combine_chunks()
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{path}: the pictures of row group {group} cannot be read ({error}). Copy the file again"
                ) from error
            self._groups[key] = (column.field("bytes") if column.type.num_fields else column, {})
        self._groups.move_to_end(key)
        column, done = self._groups[key]
        if row not in done:
            try:
                image = Image.open(io.BytesIO(column[row].as_py()))
                image.draft(
                    "RGB", self.size[::-1]
                )  # a JPEG is decoded at the smallest scale that is not below the model's size
                done[row] = self.resize(image)
            except Exception as error:  # damaged bytes surface as anything: OSError, SyntaxError, struct.error, ...
                raise ValueError(
                    f"{path}: the picture of row {row} in row group {group} cannot be decoded ({type(error).__name__}: {error}). List all such rows with --check --check_images, "
                    "and write the file again without them"
                ) from error
        return done[row]

    def __getstate__(self):
        return self.__dict__ | {"_groups": OrderedDict(), "_files": OrderedDict()}


def augment_image(image, rng):
    """(h, w, 3) uint8 -> the same, with OpenVLA's colour augmentation: brightness, contrast, saturation, hue. Its crop is left out: it would move the goal."""
    x = image / 255.0 + rng.uniform(-0.2, 0.2)
    mean = x.mean((0, 1), keepdims=True)
    x = np.clip((np.clip(x, 0, 1) - mean) * rng.uniform(0.8, 1.2) + mean, 0, 1)
    hsv = np.asarray(Image.fromarray((x * 255).astype(np.uint8)).convert("HSV")).astype(np.float32)
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.8, 1.2), 0, 255)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-0.05, 0.05) * 256) % 256
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


class VamosDataset(Dataset):
    """One item per sample. Item (position, i), where `position` seeds the augmentation:

    image (h, w, 3) uint8 at the model's size | instruction str | action (2,) float32 in the data's units | name (file, "row group g row r step t")
    """

    def __init__(self, data, rows, processor, cfg, augment=False):
        self.rows, self.names, self.seed, self.augment = rows, data.names(rows), cfg.seed, augment
        largest = max(rows.groups()[2], default=0) if len(rows.row) else 0
        self.reader = PictureReader(processor.resize, processor.size, max(cfg.shuffle_rows, int(largest)))

    def __len__(self):
        return len(self.rows.actions)

    def __getitem__(self, key):
        position, i = key
        rows, r = self.rows, self.rows.locate(i)
        image = self.reader.read(rows.paths[rows.file[r]], int(rows.group[r]), int(rows.row[r]))
        if self.augment:
            image = augment_image(image, generator_at(self.seed, position, "augment"))
        name = (self.names[rows.file[r]], f"row group {rows.group[r]} row {rows.row[r]} step {rows.step[i]}")
        return dict(image=image, instruction=rows.instruction[r], action=rows.actions[i], name=name)


class Collate:
    """Dataset items -> model inputs. Prompt ids and pictures are made by the functions that predict uses."""

    def __init__(self, tokenizer, model_config, stats):
        self.tokenizer, self.normalizer, self._prompts = tokenizer, Normalizer(stats["action"]), {}
        self.end, self.bins, (height, width) = (
            model_config.text_config.vocab_size - model_config.pad_to_multiple_of,
            model_config.n_action_bins,
            model_config.image_sizes,
        )
        self.patches, self.pad = height * width // modeling_openvla.PATCH**2, model_config.pad_token_id
        if (piece := tokenizer.convert_ids_to_tokens(EMPTY_TOKEN)) != "▁":
            raise ValueError(
                f"the tokenizer's id {EMPTY_TOKEN} is {piece!r}, expected '▁': not the Llama tokenizer of an OpenVLA model"
            )

    def prompt_ids(self, instruction):
        """-> list of ids, from BOS to the empty token before the first action"""
        if instruction not in self._prompts:
            if len(self._prompts) > 100_000:
                self._prompts.clear()
            self._prompts[instruction] = [*self.tokenizer(prompt_of(instruction))["input_ids"], EMPTY_TOKEN]
        return self._prompts[instruction]

    def __call__(self, items):
        """images (B, h, w, 3) uint8 | input_ids (B, T) int64, padded on the right | rows (B * 3,) int64: where in the flattened (B, P + T) hidden states the tokens
        `targets` (B * 3,) (two actions, end of sequence) are predicted | names"""
        actions = self.normalizer.normalize(np.stack([item["action"] for item in items]))
        tokens = self.end - np.digitize(actions, np.linspace(-1, 1, self.bins))
        ids = [
            [*self.prompt_ids(item["instruction"]), *answer.tolist(), self.tokenizer.eos_token_id]
            for item, answer in zip(items, tokens)
        ]
        padded, _ = pad_right(ids, self.pad)
        answers = actions.shape[1] + 1
        # token j is predicted by the hidden state before it; the image stands behind BOS
        rows = [
            b * (self.patches + padded.shape[1]) + self.patches + j - 1
            for b, row in enumerate(ids)
            for j in range(len(row) - answers, len(row))
        ]
        return dict(
            images=torch.from_numpy(np.stack([item["image"] for item in items])),
            input_ids=padded,
            rows=torch.tensor(rows),
            targets=torch.tensor([t for row in ids for t in row[-answers:]]),
            names=[item["name"] for item in items],
        )


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# ---- loss and prediction -----------------------------------------------------------------------------------------------


class LossModel(nn.Module):
    """compute_loss as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, vla, image_processor):
        super().__init__()
        self.vla, self.image_processor = vla, image_processor

    def compute_loss(self, batch):
        """Cross-entropy of the two action tokens and the end of sequence; the head runs on these rows alone, not on all P + T positions.
        -> sums over the batch: loss, correct action tokens, |decoded - target| in [-1, 1] units; sample_loss (B,)"""
        vla, n = self.vla, len(batch["images"])
        hidden = vla.hidden(batch["input_ids"], self.image_processor.normalize(batch["images"]))
        logits = vla.language_model.lm_head(hidden.flatten(0, 1)[batch["rows"]]).float()  # (B * 3, V)
        losses = F.cross_entropy(logits, batch["targets"], reduction="none")
        logits, targets = (
            logits.detach().unflatten(0, (n, -1))[:, :-1],
            batch["targets"].view(n, -1)[:, :-1],
        )  # without the end of sequence
        chosen = vla.action_begin + logits[..., vla.action_begin : vla.action_end].argmax(-1)
        width = 2 / (vla.config.n_action_bins - 1)
        bins = lambda ids: (vla.action_end - ids - 1).clamp(0, vla.config.n_action_bins - 2)  # noqa: E731
        return dict(
            loss=losses.sum(),
            correct=(logits.argmax(-1) == targets).sum(),
            l1=(bins(chosen) - bins(targets)).abs().sum() * width,
            sample_loss=losses.detach().view(n, -1).mean(1),
        )

    def forward(self, batch):
        return self.compute_loss(batch)


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, vla, processor, stats, spec, autocast=None):
        self.vla, self.processor, self.stats, self.spec, self.autocast = vla, processor, stats, spec, autocast
        self.collate = Collate(processor.tokenizer, vla.config, stats)

    def predict(self, observations):
        """list of {images: {camera1: (h, w, 3) uint8 RGB or PIL image}, instruction: str} -> (B, 1, 2) float32, v_x forward and v_y left in the data's unit."""
        pictures = np.stack([self.processor.image_processor.resize(o["images"]["camera1"]) for o in observations])
        return self.decode(pictures, [o["instruction"] for o in observations])[:, None]

    def decode(self, pictures, instructions):
        """(B, h, w, 3) uint8 at the model's size, B instructions -> (B, 2) float32"""
        device = next(self.vla.parameters()).device
        ids, mask = pad_right([self.collate.prompt_ids(text) for text in instructions], self.collate.pad)
        training = self.vla.training
        self.vla.eval()
        with torch.no_grad(), torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            pixels = self.processor.image_processor.normalize(torch.from_numpy(pictures).to(device))
            answer = self.vla.generate_action_ids(
                ids.to(device), pixels, len(self.stats["action"]["q01"]), mask.to(device)
            )
        self.vla.train(training)
        return self.vla.unnormalize(self.vla.decode_tokens(answer.cpu().numpy()), self.stats["action"]).astype(
            np.float32
        )

    def open_episodes(self, root, names=None):
        """For evaluate.py: an episode is one parquet file (validation files by default), a frame is one of its rows, the target (M, 2) the first step of its path.
        Yields {name, sample: callable(t) -> observation, target, hold: standing still, phase None}."""
        train, validation = find_files(root)
        known = {p.relative_to(root).as_posix(): p for p in train + validation}
        if unknown := sorted(set(names or []) - set(known)):
            raise ValueError(f"'{root}' has no file '{unknown[0]}'; it has {', '.join(list(known)[:5])}, ...")
        for name in names or [p.relative_to(root).as_posix() for p in validation or train]:
            rows, _ = read_rows([known[name]], Config(samples="first", trajectory_hz=self.spec.trajectory_hz))
            choose_instructions(rows, self.spec.instruction_column)
            reader = PictureReader(self.processor.image_processor.resize, self.processor.image_processor.size, 1)

            def sample(t, rows=rows, reader=reader):
                return dict(
                    images={"camera1": reader.read(rows.paths[0], int(rows.group[t]), int(rows.row[t]))},
                    instruction=rows.instruction[t],
                )

            yield dict(name=name, sample=sample, target=rows.actions, hold=np.zeros_like(rows.actions), phase=None)

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return [("v_x", self.spec.unit), ("v_y", self.spec.unit)]


# ---- build, save, load -----------------------------------------------------------------------------------------------


def local_folder(source):
    """Directory or hub id -> local directory of an OpenVLA model."""
    if not Path(source).is_dir():
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "tokenizer.model"]))
        except Exception as error:  # the hub client raises a dozen types; all mean that the files cannot be had
            raise FileNotFoundError(
                f"'{source}' is neither a directory nor reachable on the hub ({type(error).__name__}). Give a local directory (--vla_path DIR); "
                "make_demo.py openvla writes a tiny one"
            ) from error
    return Path(source)


def read_config(folder):
    """config.json (and the tower sizes of a vision_sizes.json beside or above it) -> OpenVLAConfig"""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: expected a directory in OpenVLA's format (openvla/openvla-7b, or what this script exports)"
        )
    values = json.loads((folder / "config.json").read_text())
    if values.get("model_type") != "openvla":
        raise ValueError(f"{folder}/config.json: model_type is {values.get('model_type')!r}, expected 'openvla'")
    for file in (folder / "vision_sizes.json", folder.parent / "vision_sizes.json"):
        if not values.get("vision_sizes") and file.is_file():
            values["vision_sizes"] = json.loads(file.read_text())
    return OpenVLAConfig(**values)


def weight_files(folder):
    """Directory -> {file: [names of its tensors]}"""
    from safetensors import safe_open

    folder, out = Path(folder), {}
    if (folder / "model.safetensors.index.json").is_file():
        for name, file in json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].items():
            out.setdefault(folder / file, []).append(name)
    else:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                out[file] = list(f.keys())
    if lost := [str(f) for f in out if not f.is_file()] or ([] if out else [f"{folder}/model*.safetensors"]):
        raise FileNotFoundError(
            f"{lost[0]} is missing: the directory is not a complete model. Copy or download it again"
        )
    return out


def read_adapter(folder):
    """peft adapter directory -> ({layer: (A (r, in...), B (out, r...))} float32, scale = alpha / r)"""
    from safetensors.torch import load_file

    settings, layers = json.loads((Path(folder) / "adapter_config.json").read_text()), {}
    for name, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        layer, which = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name).groups()
        layers.setdefault(layer, [None, None])["AB".index(which)] = tensor.float()
    return {k: tuple(v) for k, v in layers.items()}, settings["lora_alpha"] / settings["r"]


def merged(name, tensor, adapter, scale):
    """One weight with its adapter folded in, computed in fp32 and rounded once to the weight's own dtype."""
    if not name.endswith(".weight") or (pair := adapter.get(name.removesuffix(".weight"))) is None:
        return tensor
    a, b = pair
    return (tensor.float() + scale * (b.flatten(1) @ a.flatten(1)).view(tensor.shape)).to(tensor.dtype)


def load_weights(config, folder, device, dtype, adapter=None, scale=1.0):
    """Build the model and fill it tensor by tensor from its files: no second copy in memory, neither here nor on the GPU. Every tensor must find its place and every
    place its tensor. With `adapter`, it is folded in on the way."""
    from safetensors import safe_open

    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(config)
    files, own = weight_files(folder), {k: v.shape for k, v in vla.state_dict().items()}
    shapes = {}
    for file in files:
        with safe_open(file, "pt") as f:
            shapes |= {name: torch.Size(f.get_slice(name).get_shape()) for name in files[file]}
    missing, unknown, wrong = (
        sorted(set(own) - set(shapes)),
        sorted(set(shapes) - set(own)),
        [k for k in own if k in shapes and own[k] != shapes[k]],
    )
    if missing or unknown or wrong:
        raise ValueError(
            f"{folder} covers {len(own) - len(missing)} of {len(own)} tensors; missing {missing[:2]}, unknown {unknown[:2]}, other shape "
            f"{[(k, tuple(shapes[k]), tuple(own[k])) for k in wrong[:2]]}. Nothing was loaded; sizes come from config.json (text_config, timm_model_ids or vision_sizes)"
        )
    for file, names in files.items():
        with safe_open(file, "pt") as f:
            for name in names:
                tensor = merged(name, f.get_tensor(name), adapter or {}, scale).to(device, dtype)
                module, leaf = name.rsplit(".", 1)
                setattr(vla.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
    llama = vla.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(config=config.text_config).to(device)  # computed, in no file
    return vla.eval()


def lora_layers(vla, targets):
    """Names of the layers that get an adapter. The last block of a tower and SigLIP's pooling head never run: "used" leaves them out."""
    dead = tuple(
        f"vision_backbone.{name}.blocks.{len(tower.blocks) - 1}."
        for name, tower in vla.vision_backbone.named_children()
    ) + ("vision_backbone.fused_featurizer.attn_pool.",)
    found = [
        n
        for n, m in vla.named_modules()
        if n.rsplit(".", 1)[-1] in LORA_LEAVES and isinstance(m, (nn.Linear, nn.Conv2d))
    ]
    return [n for n in found if targets == "all-linear" or not n.startswith(dead)]


def load_4bit(config, folder, device):
    """The same model with its linear layers (not the head) in nf4, through bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "use_quantization is True: 4-bit weights need the bitsandbytes package, which is not installed. pip install bitsandbytes, or save memory with "
            "--gradient_checkpointing and a smaller --batch_size"
        ) from error
    from transformers import BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars break ours
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    vla = OpenVLAForActionPrediction.from_pretrained(
        folder, config=config, quantization_config=how, dtype=torch.bfloat16, device_map={"": device}
    )
    return vla.requires_grad_(False)


def build_model(cfg, folder, device, dtype):
    """-> (OpenVLA with a new LoRA adapter, peft model). Frozen weights in `dtype`, the adapter in fp32."""
    from peft import LoraConfig, get_peft_model

    config = read_config(folder)
    vla = load_4bit(config, folder, device) if cfg.use_quantization else load_weights(config, folder, device, dtype)
    torch.manual_seed(cfg.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        peft_model = get_peft_model(
            vla,
            LoraConfig(
                r=cfg.lora_rank,
                lora_alpha=min(cfg.lora_rank, 16),
                lora_dropout=cfg.lora_dropout,
                target_modules=lora_layers(vla, cfg.lora_targets),
                init_lora_weights="gaussian",
            ),
        )
    peft_model.peft_config["default"].base_model_name_or_path = cfg.vla_path
    for p in vla.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    if dtype == torch.bfloat16 and not cfg.use_quantization:
        for module in (
            vla.modules()
        ):  # autocast runs the adapters in bf16; peft would first copy the input of each of them to fp32
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
    if cfg.gradient_checkpointing or cfg.use_quantization:
        vla.enable_checkpointing()
    return vla, peft_model


def trained_state(adapter):
    """read_adapter's layers -> {name of the parameter in the training model: tensor}"""
    return {
        f"{layer}.lora_{which}.default.weight": tensor
        for layer, pair in adapter.items()
        for which, tensor in zip("AB", pair)
    }


CLASSES = dict(
    AutoConfig="OpenVLAConfig",
    AutoModelForImageTextToText="OpenVLAForActionPrediction",
    AutoModelForVision2Seq="OpenVLAForActionPrediction",
)  # the last for transformers 4


def save_model(folder, base, stats, spec, adapter=None, scale=1.0):
    """Write the merged model in OpenVLA's directory format, shard by shard from the files of `base`: at no time is more than one shard in memory. Beside it our
    modeling file, which transformers finds through auto_map, and dataset_statistics.json."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder, base, index = Path(folder), Path(base), {}
    folder.mkdir(parents=True, exist_ok=True)
    write_json = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2))  # noqa: E731
    module = Path(modeling_openvla.__file__).stem
    files, total, layers = weight_files(base), 0, set(adapter or {})
    for i, (file, names) in enumerate(files.items()):
        shard = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, "pt") as f:
            tensors = {name: merged(name, f.get_tensor(name), adapter or {}, scale).contiguous() for name in names}
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(names, shard)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        layers -= {name.removesuffix(".weight") for name in names}
        del tensors
    if layers:
        raise ValueError(f"{base} has no layer '{sorted(layers)[0]}' of the adapter: it was trained on another model")
    write_json("model.safetensors.index.json", dict(metadata=dict(total_size=total), weight_map=index))
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "generation_config.json",
    ):
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    write_json(
        "tokenizer_config.json",
        {k: v for k, v in tokenizer.items() if k != "auto_map"}
        | dict(processor_class="PrismaticProcessor", tokenizer_class="LlamaTokenizer"),
    )
    processor = modeling_openvla.read_image_settings(base)
    auto = dict(AutoProcessor=f"{module}.PrismaticProcessor", AutoImageProcessor=f"{module}.PrismaticImageProcessor")
    write_json(
        "preprocessor_config.json",
        processor
        | dict(image_processor_type="PrismaticImageProcessor", processor_class="PrismaticProcessor", auto_map=auto),
    )
    write_json(
        "processor_config.json",
        dict(processor_class="PrismaticProcessor", auto_map=dict(AutoProcessor=auto["AutoProcessor"])),
    )
    shutil.copyfile(modeling_openvla.__file__, folder / f"{module}.py")
    write_json("dataset_statistics.json", {spec.key: stats})
    write_json("meta.json", dict(format_version=FORMAT, script=Path(__file__).stem, spec=dataclasses.asdict(spec)))
    config = json.loads((base / "config.json").read_text())
    config |= dict(
        norm_stats={spec.key: stats},
        auto_map={k: f"{module}.{v}" for k, v in CLASSES.items()},
        architectures=["OpenVLAForActionPrediction"],
    )
    if sizes := read_config(base).vision_sizes:
        config["vision_sizes"] = sizes
    write_json("config.json", config)


def merge_adapter(step_dir, target):
    """Write the merged model of steps_N to the directory `target`, which may hold other things (the log of a run): config.json comes last, so a directory without
    one is no complete model."""
    meta = json.loads((step_dir / "meta.json").read_text())
    base, (adapter, scale), target = local_folder(meta["config"]["vla_path"]), read_adapter(step_dir), Path(target)
    ckpt.require_space(target.parent, int(1.02 * sum(f.stat().st_size for f in weight_files(base))))
    target.mkdir(parents=True, exist_ok=True)
    with ckpt.atomic_path(target / "merging") as temporary:
        save_model(
            temporary,
            base,
            json.loads((step_dir / "dataset_statistics.json").read_text())[KEY],
            Spec(**meta["spec"]),
            adapter,
            scale,
        )
        (temporary / "meta.json").write_text(
            json.dumps(json.loads((temporary / "meta.json").read_text()) | {k: meta[k] for k in ("step", "validation")})
        )
    (target / "config.json").unlink(missing_ok=True)
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    for file in sorted((target / "merging").iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(file, target / file.name)
    (target / "merging").rmdir()
    return target


def checkpoint_folder(path):
    """What a user names -> steps_N or a model directory: an adapter_tmp_dir/EXP_ID means its newest steps_N."""
    path = Path(path)
    newest = list(ckpt.steps_in(path).values())
    path = newest[-1] if newest else path
    if not (path / "meta.json").is_file() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} has neither meta.json nor config.json: expected run_root_dir/EXP_ID after training, or adapter_tmp_dir/EXP_ID[/steps_N]"
        )
    return path


def load_policy(path, device=None):
    """Open a checkpoint for inference: a merged model (or any OpenVLA directory with the statistics of one data set), a steps_N, or an adapter_tmp_dir/EXP_ID (its newest)."""
    path = checkpoint_folder(path)
    meta = (
        json.loads((path / "meta.json").read_text())
        if (path / "meta.json").is_file()
        else dict(format_version=FORMAT, spec={})
    )
    if meta["format_version"] != FORMAT:
        raise ValueError(f"{path}: meta.json has format_version {meta['format_version']}, this code reads {FORMAT}")
    spec = Spec(**dict(instruction_column="lang_goal", unit="", trajectory_hz=None, samples="all") | meta["spec"])
    adapter, scale, base = None, 1.0, path
    if (path / "adapter_config.json").is_file():
        (adapter, scale), base = read_adapter(path), local_folder(meta["config"]["vla_path"])
    elif not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no complete model yet: the run has not finished, or its merge was interrupted. Merge a checkpoint: python train_openvla_vamos.py "
            "--merge adapter_tmp_dir/EXP_ID/steps_N"
        )
    config = read_config(base)
    if (path / "dataset_statistics.json").is_file():
        config.norm_stats = json.loads((path / "dataset_statistics.json").read_text())
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    vla = load_weights(config, base, device, torch.bfloat16 if device.type == "cuda" else torch.float32, adapter, scale)
    key, action = vla.stats_of(spec.key if spec.key in (config.norm_stats or {}) else None)
    return Policy(
        vla, PrismaticProcessor.from_pretrained(base), config.norm_stats[key] | dict(action=with_moments(action)), spec
    )


def with_moments(action):
    """Statistics of a foreign model may be q01 and q99 alone; reports also want a mean."""
    return dict(mean=((np.array(action["q01"]) + np.array(action["q99"])) / 2).tolist()) | action


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0): linear warm-up, then constant, or a cosine to 0 that stays there."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return cfg.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)) if cfg.lr_schedule == "cosine" else 1.0)


def describe(cfg, data, print0):
    """Say what was found: files, rows, what was left out, actions, instructions, how many targets share one input."""
    t, v, action = data.train, data.validation, data.stats["action"]
    print0(
        f"data      {len(t.paths)} train files, {len(t.row)} of {t.counts['rows']} rows usable, {len(t.actions)} samples ({cfg.samples} steps); {len(v.paths)} validation files, "
        f"{len(v.actions)} samples; {cfg.data_root_dir}"
    )
    for message in data.excluded:
        print0(f"excluded  {message}")
    kinds = dict(
        short="rows with fewer than 2 points",
        unpictured="rows without a picture",
        nonfinite="steps that are not finite",
    )
    if left_out := [f"{t.counts[kind]} {what}" for kind, what in kinds.items() if t.counts[kind]]:
        print0(f"left out  {', '.join(left_out)}")
    print0(f"action    v_x forward, v_y left, {data.spec.unit}; tokens cover q01 .. q99 of the training samples")
    for name in ("q01", "q99", "mean", "std", "min", "max"):
        print0(f"          {name:<5}" + " ".join(f"{value:11.4g}" for value in action[name]))
    outside = ((t.actions < np.float32(action["q01"])) | (t.actions > np.float32(action["q99"]))).any(1).mean()
    print0(f"          {outside:.1%} of the samples lie outside in one dimension at least and are clipped")
    examples = [text for text, _ in Counter(t.instruction).most_common(3)]
    print0(
        f"text      column {data.spec.instruction_column}, {len(set(t.instruction))} instructions, e.g. {'; '.join(map(repr, examples))}"
    )
    if t.counts["other_column"] or t.counts["no_instruction"]:
        print0(
            f"          {t.counts['other_column']} rows without one use the other column, {t.counts['no_instruction']} have none at all ('navigate')"
        )
    per_row = np.diff(t.ends, prepend=0)
    if per_row.max() > 1:
        center, square = (
            np.add.reduceat(x, t.ends - per_row) / per_row[:, None]
            for x in (t.actions.astype(np.float64), t.actions.astype(np.float64) ** 2)
        )
        apart = np.sqrt(np.maximum(square - center**2, 0)).mean(0)
        print0(
            f"targets   {per_row.mean():.1f} per picture and instruction (at most {per_row.max()}), std within one {apart[0]:.3g}, {apart[1]:.3g} {data.spec.unit}: "
            "token accuracy cannot reach 1; --samples first has one target per input"
        )
    if (largest := int(t.groups()[2].max())) > cfg.shuffle_rows:
        print0(
            f"note      a row group has {largest} rows, more than shuffle_rows ({cfg.shuffle_rows}), and every loader worker holds a whole one: files with row groups of about 100 rows "
            "need less memory"
        )
    if not len(v.actions):
        print0("note      no validation-*.parquet with usable rows: nothing tells when to stop")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer the text stays unbuilt, and says so."""
    data = load_data(cfg)
    describe(cfg, data, print)
    try:
        folder = local_folder(cfg.vla_path)
        processor, config = PrismaticProcessor.from_pretrained(folder), read_config(folder)
        image_processor = processor.image_processor
    except FileNotFoundError as error:
        processor, image_processor = None, modeling_openvla.PrismaticImageProcessor()
        print(f"note      prompt and action tokens are not shown: {error}")
    dataset, order = (
        VamosDataset(data, data.train, image_processor, cfg, cfg.image_aug),
        WindowOrder(data.train, cfg.seed, cfg.shuffle_rows),
    )
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(f"batch     {len(items)} samples, first: {' '.join(items[0]['name'])}, {items[0]['instruction']!r}")
    shown = {k: np.stack([item[k] for item in items]) for k in ("image", "action")}
    if processor:
        batch = Collate(processor.tokenizer, config, data.stats)(items)
        shown |= {k: v.numpy() for k, v in batch.items() if isinstance(v, torch.Tensor) and k != "images"}
    for key, value in shown.items():
        print(
            f"          {key:<10} {str(value.shape):<20} {str(value.dtype):<8} {value.min():.4g} .. {value.max():.4g}"
        )
    print(
        f"prompt    {prompt_of(items[0]['instruction'])!r}"
        + (f" -> {batch['targets'][:3].tolist()}" if processor else "")
    )
    if cfg.check_images:
        bad = []
        for rows in (data.train, data.validation):
            reader = PictureReader(image_processor.resize, image_processor.size, 1)
            for r in tqdm(range(len(rows.row)), desc="decoding every picture", unit="row", disable=None):
                try:
                    reader.read(rows.paths[rows.file[r]], int(rows.group[r]), int(rows.row[r]))
                except ValueError as error:
                    bad.append(str(error))
        if bad:
            raise ValueError(f"{len(bad)} pictures cannot be decoded:\n" + "\n".join(bad))
        print("images    every picture decodes")
    print("check passed")


def validate(core, policy, dataset, cfg, device, rank, world, reduce):
    """-> {val_loss: per token, val_action_accuracy, val_l1_loss: in [-1, 1], val_mae_vx, val_mae_vy: of predict, in the data's unit, val_mae_mean_action: of always
    answering the mean}, on samples spread evenly over the validation files; sums over all ranks."""
    mine = np.unique(np.linspace(0, len(dataset) - 1, min(cfg.val_samples, len(dataset))).astype(int))[
        rank::world
    ].tolist()
    sums, mean = (
        torch.zeros(7, dtype=torch.float64),
        np.array(policy.stats["action"]["mean"]),
    )  # loss, correct, l1, samples | error v_x, v_y | error of the mean
    core.eval()
    for i in range(0, len(mine), cfg.batch_size):
        items = [dataset[(k, k)] for k in mine[i : i + cfg.batch_size]]
        with torch.no_grad(), torch.autocast(device.type, policy.autocast, enabled=policy.autocast is not None):
            out = core(to_device(policy.collate(items), device))
        target = np.stack([item["action"] for item in items])
        error = np.abs(
            policy.decode(np.stack([item["image"] for item in items]), [item["instruction"] for item in items]) - target
        ).sum(0)
        sums += torch.tensor(
            [
                out["loss"].item(),
                out["correct"].item(),
                out["l1"].item(),
                len(items),
                *error,
                np.abs(mean - target).sum() / 2,
            ]
        )
    core.train()
    loss, correct, l1, n, vx, vy, baseline = reduce(sums).tolist()
    return dict(
        val_loss=loss / n / 3,
        val_action_accuracy=correct / n / 2,
        val_l1_loss=l1 / n / 2,
        val_mae_vx=vx / n,
        val_mae_vy=vy / n,
        val_mae_mean_action=baseline / n,
    )


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)
    if cfg.merge:
        step_dir = checkpoint_folder(cfg.merge)
        if not (step_dir / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"--merge {cfg.merge}: no adapter_config.json there; expected adapter_tmp_dir/EXP_ID/steps_N"
            )
        meta = json.loads((step_dir / "meta.json").read_text())
        then = Config(**meta["config"])
        target = Path(then.run_root_dir) / f"{exp_id(then)}--{meta['step']}_chkpt"
        return print(f"merged model: {merge_adapter(step_dir, target)}")

    # ---- inputs: everything that can be wrong is found before weights are loaded
    cuda = torch.cuda.is_available()
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if (
        world > 1 and not dist.is_initialized()
    ):  # counts and flags go over gloo; a merge of 15 GB on rank 0 may take its time
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=2))
    autocast = torch.bfloat16 if cuda else None
    print0 = print if rank == 0 else lambda *_: None
    name = exp_id(cfg)
    run_dir, adapter_dir = Path(cfg.run_root_dir) / name, Path(cfg.adapter_tmp_dir) / name
    resume = ckpt.find_resume(cfg.resume_from_checkpoint, adapter_dir)
    if resume is None and (
        ckpt.steps_in(adapter_dir)
        or (run_dir / "log" / "metrics.jsonl").exists()
        and cfg.resume_from_checkpoint != "auto"
    ):
        raise FileExistsError(
            f"'{run_dir}' or '{adapter_dir}' already holds a run of this name. Continue it with --resume auto, or name another: --run_id_note NOTE"
        )
    meta = json.loads((resume / "meta.json").read_text()) if resume else None
    if resume and meta["step"] >= cfg.max_steps:
        if rank == 0 and not (run_dir / "config.json").is_file():  # the training ended, its merge did not
            print(f"merged model: {merge_adapter(resume, run_dir)}")
        return print0(
            f"nothing to do: {resume} is at step {meta['step']}, max_steps is {cfg.max_steps}. Raise it to train on"
        )
    data = load_data(cfg, rank)
    if resume:
        fixed = ("seed", "vla_path", "lora_rank", "lora_targets", "shuffle_rows")
        changed = ckpt.check_resume(
            resume, meta, dict(format_version=FORMAT, fingerprint=data.fingerprint), dataclasses.asdict(cfg), fixed
        )
        print0(f"resume    {resume}, step {meta['step']}" + (f"; changed: {'; '.join(changed)}" if changed else ""))
    elif cfg.resume_from_checkpoint:
        print0(f"resume    auto: no checkpoint in {adapter_dir}, starting a new run")
    folder = local_folder(cfg.vla_path)
    describe(cfg, data, print0)
    if world > 1:
        dist.barrier()  # all ranks have looked before rank 0 writes
    if rank == 0:
        (run_dir / "log").mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(adapter_dir)
        ckpt.remove_temporaries(run_dir)

    def reduce(tensor):
        """Sum over the ranks, in float64."""
        if world > 1:
            dist.all_reduce(tensor := tensor.double())
        return tensor

    # ---- model, optimizer
    vla, peft_model = build_model(cfg, folder, device, autocast or torch.float32)
    processor = PrismaticProcessor.from_pretrained(folder)
    core, policy = LossModel(vla, processor.image_processor), Policy(vla, processor, data.stats, data.spec, autocast)
    trained = {n: p for n, p in vla.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=cuda or None
    )
    if source := resume or cfg.load_model_weights:
        moments = ckpt.load_state(resume / "state.pt")["moments"] if resume else {}
        ckpt.restore_training_state(
            vla, optimizer, dict(trained=trained_state(read_adapter(checkpoint_folder(source))[0]), moments=moments)
        )
    start, position, best, best_step = (
        (meta[k] for k in ("step", "position", "best_val_loss", "best_step")) if resume else (0, 0, None, None)
    )
    model = (
        nn.parallel.DistributedDataParallel(
            core,
            device_ids=[local] if cuda else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=cfg.lora_targets == "all-linear",
        )
        if world > 1
        else core
    )

    # ---- data
    dataset, held_out = (
        VamosDataset(data, data.train, processor.image_processor, cfg, cfg.image_aug),
        VamosDataset(data, data.validation, processor.image_processor, cfg),
    )
    accumulation, global_batch = cfg.grad_accumulation_steps, cfg.batch_size * world * cfg.grad_accumulation_steps
    batches = RankBatches(
        WindowOrder(data.train, cfg.seed, cfg.shuffle_rows),
        cfg.batch_size,
        accumulation,
        rank,
        world,
        position,
        cfg.max_steps - start,
    )
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=policy.collate,
        num_workers=cfg.num_workers,
        pin_memory=cuda,
        prefetch_factor=4 if cfg.num_workers else None,
        worker_init_fn=ckpt.ignore_stop_signals,
    )
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in vla.parameters())
    size, whole = (
        12 * count,
        sum(f.stat().st_size for f in weight_files(folder)),
    )  # fp32 adapter and two moments; the merged model
    print0(
        f"model     {cfg.vla_path}: LoRA r {cfg.lora_rank} on {len(trained) // 2} layers, {count:,} of {total:,} parameters trainable; {'bf16 autocast' if cuda else 'fp32'}"
        f"{', 4-bit base' if cfg.use_quantization else ''}; {world} x {device.type}"
    )
    print0(
        f"batch     {cfg.batch_size} x {world} ranks x {accumulation} accumulation = {global_batch} samples per step; {len(dataset)} samples = {len(dataset) / global_batch:.1f} steps per epoch"
    )
    print0(
        f"steps     {start} -> {cfg.max_steps}; lr {lr_at(start, cfg):.2e} -> {lr_at(cfg.max_steps - 1, cfg):.2e}; a checkpoint is about {size / 1e9:.2f} GB in {adapter_dir}, "
        f"the merged model {whole / 1e9:.2f} GB in {run_dir}"
    )
    about = dict(
        format_version=FORMAT,
        script=Path(__file__).stem,
        spec=dataclasses.asdict(data.spec),
        validation=data.names(data.validation),
    )
    if rank == 0:
        save_config(cfg, run_dir / "log" / "config.yaml")
        shutil.copy(__file__, run_dir / "log" / Path(__file__).name)
        (run_dir / "log" / "validation_episodes.txt").write_text("".join(f"{n}\n" for n in data.names(data.validation)))
        (run_dir / "dataset_statistics.json").write_text(json.dumps({KEY: data.stats}, indent=2))
        (run_dir / "meta.json").write_text(json.dumps(about))  # evaluate.py finds the script here
    wandb = runlog.WandbConfig(
        mode=cfg.wandb_mode if cfg.wandb_project else "disabled", entity=cfg.wandb_entity, name=f"ft+{name}"
    )
    log = runlog.RunLog(
        run_dir / "log", cfg.max_steps, start, rank, cfg.wandb_project or "", wandb, dataclasses.asdict(cfg)
    )
    stop = ckpt.StopSignal()

    def save(step, position):
        """Write steps_N on rank 0; True if it is in place. A full disk costs the new checkpoint, never an old one."""
        ok = True
        if rank == 0:
            try:
                adapter_dir.mkdir(parents=True, exist_ok=True)
                ckpt.require_space(adapter_dir, int(1.1 * size))
                final = adapter_dir / f"steps_{step}"
                with ckpt.atomic_path(final) as temporary:
                    peft_model.save_pretrained(
                        temporary, save_embedding_layers=False
                    )  # else peft adds the whole embedding, because lm_head is adapted
                    (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card
                    ckpt.save_state(
                        temporary / "state.pt",
                        dict(format_version=FORMAT, moments=ckpt.training_state(vla, optimizer)[1]),
                    )
                    (temporary / "dataset_statistics.json").write_text(json.dumps({KEY: data.stats}, indent=2))
                    (temporary / "meta.json").write_text(
                        json.dumps(
                            about
                            | dict(
                                step=step,
                                position=position,
                                fingerprint=data.fingerprint,
                                best_val_loss=best,
                                best_step=best_step,
                                world_size=world,
                                config=dataclasses.asdict(cfg),
                            ),
                            indent=2,
                        )
                    )
                for file in (
                    "adapter_config.json",
                    "adapter_model.safetensors",
                ):  # the newest adapter under the guide's path
                    with ckpt.atomic_path(adapter_dir / file) as temporary:
                        try:
                            os.link(final / file, temporary)  # the same bytes under a second name
                        except OSError:  # a file system without hard links
                            shutil.copyfile(final / file, temporary)
                ckpt.rotate(adapter_dir, cfg.keep_checkpoints, protect=best_step)
                if not cfg.save_latest_checkpoint_only and step < cfg.max_steps:
                    log.print(f"merged model: {merge_adapter(final, run_dir.parent / f'{name}--{step}_chkpt')}")
            except ckpt.DiskFull as error:
                log.print(f"CHECKPOINT NOT SAVED at step {step}: {error}")
                ok = False
        return bool(reduce(torch.tensor(float(ok))).item() == world)  # others are ok by default

    # ---- loop
    core.train()
    batch_iterator, saved_at, skipped, skipped_in_row, step = iter(loader), start, 0, 0, start
    window, wait, t_log, logged_at = (
        [],
        0.0,
        time.perf_counter(),
        start,
    )  # (loss, accuracy, l1, gradient norm) since the last log line
    while step < cfg.max_steps:
        lr = lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        t_wait = time.perf_counter()
        try:
            micro = [next(batch_iterator) for _ in range(accumulation)]
        except RuntimeError as error:  # torch's word for a worker that was killed, mostly for memory
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"DataLoader worker crashed (num_workers is {cfg.num_workers}): {error}. Lower it or shuffle_rows ({cfg.shuffle_rows}), or load in the main process: "
                "--num_workers 0"
            ) from error
        wait += time.perf_counter() - t_wait
        told_to_stop = reduce(torch.tensor([float(stop.received is not None)])).item()
        sums, sample_losses = torch.zeros(3, dtype=torch.float64, device=device), []
        for m, batch in enumerate(micro):
            torch.manual_seed(torch_seed_at(cfg.seed, position + (m * world + rank) * cfg.batch_size, "dropout"))
            with contextlib.nullcontext() if m == accumulation - 1 or world == 1 else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    result = model(to_device(batch, device))
                loss = result["loss"] / (
                    3 * global_batch
                )  # every sample has 3 tokens with loss, so this is the mean over all ranks and micro-batches
                (loss * world).backward()  # ranks are averaged, so times world
            sample_losses.append(result["sample_loss"])
            sums += torch.stack(
                [loss.detach(), result["correct"] / (2 * global_batch), result["l1"] / (2 * global_batch)]
            )
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.max_grad_norm or math.inf)
        values = torch.cat([reduce(sums), norm.detach().double()[None]]).tolist()  # the one wait for the GPU in a step
        if all(math.isfinite(value) for value in values):
            optimizer.step()
            window.append(values)
            skipped_in_row = 0
        else:  # the same on every rank: losses and gradients are averaged
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            runlog.report_nonfinite(log, step + 1, [b["names"] for b in micro], sample_losses, skipped_in_row)
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + global_batch

        if step % cfg.log_steps == 0 or step == cfg.max_steps:
            elapsed = time.perf_counter() - t_log
            values = dict(
                learning_rate=lr,
                samples_per_s=(step - logged_at) * global_batch / elapsed,
                data_wait=wait / elapsed,
                memory_gb=runlog.memory_gb(),
                skipped_steps=skipped,
            )
            line = f"lr {lr:.2e} | {values['samples_per_s']:.1f} samples/s | wait {values['data_wait']:.1%} | {values['memory_gb']:.1f} GB"
            if window:  # else every step since the last line was skipped
                values |= dict(
                    zip(("train_loss", "action_accuracy", "l1_loss", "grad_norm"), np.mean(window, axis=0).tolist())
                )
                line = (
                    f"loss {values['train_loss']:.4f} | acc {values['action_accuracy']:.3f} | l1 {values['l1_loss']:.4f} | grad {values['grad_norm']:.2f} | "
                    + line
                )
            log.log(step, values, f"step {step:>7}/{cfg.max_steps} | {line}")
            log.step(step, values.get("train_loss"), lr, values["samples_per_s"], values["data_wait"])
            window, wait, t_log, logged_at = [], 0.0, time.perf_counter(), step
        else:
            log.step(step)
        if len(held_out) and (step % cfg.val_steps == 0 or step == cfg.max_steps):
            t_val = time.perf_counter()
            values = validate(core, policy, held_out, cfg, device, rank, world, reduce)
            if best is None or values["val_loss"] < best:
                best, best_step = values["val_loss"], step
            log.log(
                step,
                values,
                f"validation {step} | loss {values['val_loss']:.4f} | acc {values['val_action_accuracy']:.3f} | l1 {values['val_l1_loss']:.4f} | error v_x {values['val_mae_vx']:.4g}, "
                f"v_y {values['val_mae_vy']:.4g} {data.spec.unit} (mean action: {values['val_mae_mean_action']:.4g})",
            )
            t_log += time.perf_counter() - t_val  # validation is not training time
        if step % cfg.save_steps == 0 or step == cfg.max_steps or told_to_stop:
            t_save = time.perf_counter()
            if save(step, position):
                saved_at = step
            elif step == cfg.max_steps or told_to_stop:
                raise ckpt.DiskFull(
                    28,
                    f"the last checkpoint could not be written; the newest complete one is steps_{saved_at}. Free space and run again with --resume auto",
                )
            t_log += time.perf_counter() - t_save
        if told_to_stop and step < cfg.max_steps:
            log.print(
                f"stopped by signal after step {step}; saved {adapter_dir / f'steps_{step}'}. Continue with the same command and --resume auto"
            )
            break

    # ---- end
    stop.restore()
    log.close()
    if rank == 0 and step == cfg.max_steps:
        print(f"loss plot: {runlog.plot_loss(run_dir / 'log', 'train_loss')}")
        try:
            print(f"merged model: {merge_adapter(adapter_dir / f'steps_{step}', run_dir)}")
        except ckpt.DiskFull as error:
            raise ckpt.DiskFull(
                28,
                f"the training is saved in {adapter_dir / f'steps_{step}'}, but not merged: {error}. Run again with --resume auto, which only merges",
            ) from error
        print(f"adapter: {adapter_dir}\nevaluate: python evaluate.py --checkpoint {run_dir} --data {cfg.data_root_dir}")
    if world > 1:
        del model  # DDP's reducer must not outlive the process group: the last to let go of it joins gloo's threads,
        gc.collect()  # and the reducer would do so with Python's lock in hand, for which those threads may be waiting
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    config = parse_config(Config, aliases=ALIASES)
    try:
        main(config)
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(
            f"CUDA out of memory ({str(error).splitlines()[0]}). Lower batch_size (now {config.batch_size}) and raise grad_accumulation_steps (now {config.grad_accumulation_steps}) in "
            f"proportion, or set --gradient_checkpointing True (now {config.gradient_checkpointing}) or --use_quantization True (now {config.use_quantization})"
        )
