"""OpenVLA with LoRA on VAMOS: one image and an instruction -> velocity (v_x, v_y) of the next step, as two tokens.

Model: Kim et al. 2024, arXiv 2406.09246; modeling_openvla.py holds it, weight-compatible with openvla/openvla-7b.
Data: VAMOS (arXiv 2510.20818), parquet files. v = (p[t+1] - p[t])[:2] of a recorded path, x forward, y left, metres per
recorded step (there is no clock in the data; --trajectory_hz makes it m/s).

    python train_openvla_vamos.py --data_root_dir DATA --check                    # look at the data, no weights needed
    bash shells/train_openvla_vamos.sh --data_root_dir DATA                                                   # one GPU
    torchrun --standalone --nnodes 1 --nproc-per-node 4 train_openvla_vamos.py --data_root_dir DATA ...     # four GPUs
    python train_openvla_vamos.py --config configs/demo/openvla_vamos.yaml --max_steps 20     # on make_demo.py's output

Output: run_root_dir/EXP_ID/, the merged model (opens with transformers), and in it log/ (metrics.jsonl, loss.png, ...).
adapter_tmp_dir/EXP_ID/, the newest LoRA adapter (opens with peft), best/, and steps_N/, from which a run resumes.

Letters in shapes: B batch, P patches of the image, T text tokens, A action dims (2), N samples, R rows of the files.
"""

import functools
import hashlib
import io
import json
import math
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from common import UserError, command, hub, plan, require
from common import checkpoint as ckpt
from common.config import config_from
from common.episodes import split_or_keep, trained_in
from common.frames import FrameStore, rgb, write_json
from common.hub import load_weights, local_folder, opening, read_tensors, stored_source, unfilled, weight_digest
from common.log import WandbConfig, progress
from common.policy import Contract, partners
from common.run import Run, launch, to_device
from common.sampler import GlobalOrder, generator_at
from common.stats import Normalizer, compute_stats, is_table

FORMAT = 3  # of steps_N/ and meta.json
KEY = "vamos_dataset"  # of the statistics in the exported model
GOAL_POINT = r"<point|<loc\d"  # in instructions that are coordinates, not language
# the module names that "all-linear" meant when OpenVLA was released (peft 0.11), with patch convolutions and head
LORA_LEAVES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}  # of the Llama
LORA_LEAVES |= {"qkv", "proj", "fc1", "fc2", "fc3", "q", "kv", "lm_head"}
COPIED = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "generation_config.json")


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    vla_path: str = "openvla/openvla-7b"  # model to start from: hub id or directory in OpenVLA's format
    data_root_dir: str = ""  # folder with data/train-*.parquet and data/validation-*.parquet, or the files themselves
    dataset_name: str = "vamos"  # vamos
    run_root_dir: str = "runs"  # EXP_ID/ in it becomes the merged model
    adapter_tmp_dir: str = "adapter-tmp"  # EXP_ID/ in it holds the adapter, and what a run resumes from
    run_id_note: str | None = None  # appended to EXP_ID
    # data
    samples: Literal["all", "first"] = "all"  # all: every step of a path (of the one image); first: the first only
    targets_per_picture: int = 16  # steps of a path that share one forward; 1: every step is a sample of its own
    instruction_column: Literal["auto", "lang_goal", "text"] = "auto"  # auto: lang_goal, unless it is goal points
    trajectory_hz: float | None = None  # points per second of the paths: actions in m/s; null: metres per step
    image_aug: bool = False  # brightness, contrast, saturation, hue; never a crop, which would move the goal
    frame_dir: str = "frames"  # on a local disk: images decoded once, 0.15 MB each at 224 x 224
    skip_bad_episodes: bool = False  # leave out, listed and counted, files and images that cannot be read
    # LoRA
    lora_rank: int = 32  # r; scale = min(r, 16) / r
    lora_dropout: float = 0.0  # of what enters the adapters
    use_quantization: bool = False  # frozen weights in 4 bits (nf4, bitsandbytes); implies gradient_checkpointing
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, 1/3 more time
    # training
    batch_size: int = 16  # samples, images with their targets, per GPU and micro-batch
    grad_accumulation_steps: int = 1  # micro-batches per optimizer step
    learning_rate: float = 5e-4  # AdamW
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    lr_schedule: Literal["constant", "cosine"] = "constant"  # cosine: to 0 at max_steps
    weight_decay: float = 0.01  # decoupled
    max_grad_norm: float = 1.0  # largest gradient norm; 0: no clipping
    max_steps: int = 200000  # optimizer steps
    save_steps: int = 5000  # optimizer steps between checkpoints and their merges
    save_latest_checkpoint_only: bool = True  # false: a merge goes into run_root_dir/EXP_ID--N_chkpt, and stays
    keep_checkpoints: int = 2  # newest steps_N kept; 0: all
    val_steps: int = 1000  # optimizer steps between validations
    val_samples: int = 256  # samples of validation-*.parquet, evenly spread
    log_steps: int = 10  # optimizer steps
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 7  # of order, augmentation, dropout and new adapters
    wandb_project: str | None = None  # W&B project; null: no W&B
    wandb_entity: str | None = None  # W&B team or user
    wandb_mode: Literal["online", "offline", "disabled"] = "online"  # offline when nobody is logged in
    resume_from_checkpoint: str | None = None  # --resume: a steps_N directory, or "auto" for the newest of this EXP_ID
    merge: str | None = None  # merge this steps_N or best into run_root_dir/EXP_ID--N_chkpt (vla_path: moved), and stop
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = {"resume": "resume_from_checkpoint"}
FIXED = ("seed", "vla_path", "lora_rank", "targets_per_picture")  # what a resume must not change


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    positive = "batch_size grad_accumulation_steps max_steps save_steps val_steps val_samples log_steps lora_rank"
    for name in (positive + " targets_per_picture").split():
        require(getattr(cfg, name) >= 1, f"{name} is {getattr(cfg, name)}: expected 1 or more")
    require(cfg.dataset_name in ("vamos", KEY), f"dataset_name is '{cfg.dataset_name}': expected vamos")
    hz = cfg.trajectory_hz
    require(hz is None or hz > 0, f"trajectory_hz is {hz}: expected points per second, above 0")
    require("/" not in (cfg.run_id_note or ""), f"run_id_note is '{cfg.run_id_note}': a folder's name can have no /")
    available = cfg.check or not cfg.use_quantization or find_spec("bitsandbytes")
    require(available, "use_quantization needs bitsandbytes, which is not installed: pip install bitsandbytes")
    require(cfg.data_root_dir or cfg.merge, "data_root_dir is not set: the folder with data/train-*.parquet")


def exp_id(cfg):
    """Name of a run's folders, as OpenVLA's script forms it."""
    name = f"{Path(cfg.vla_path).name}+{cfg.dataset_name}+b{cfg.batch_size * cfg.grad_accumulation_steps}"
    name += f"+lr-{cfg.learning_rate}+lora-r{cfg.lora_rank}+dropout-{cfg.lora_dropout}"
    note = f"--{cfg.run_id_note}" if cfg.run_id_note else ""
    return name + "+q-4bit" * cfg.use_quantization + note + "--image_aug" * cfg.image_aug


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """The rows of some parquet files, and the samples that they give, in file order."""

    table: pd.DataFrame  # R rows: path (of the file), row (in the file), lang_goal, text; later instruction
    actions: np.ndarray  # (N, 2) float32
    step: np.ndarray  # (N,) int32, index of the sample in its path
    row_of: np.ndarray  # (N,) int32, the row of `table` that the sample comes from
    counts: Counter  # rows and steps seen and left out
    marks: dict  # {file name: hash of everything that is learned from it but its images}


def find_files(root):
    """-> (train files, validation files), sorted"""
    hint = "Set --data_root_dir (of evaluate.py --data); make_demo.py vamos writes a small set"
    for folder in (Path(root) / "data", Path(root)):
        if train := sorted(folder.glob("train-*.parquet")):
            return train, sorted(folder.glob("validation-*.parquet"))
    found = ", ".join(sorted(p.name for p in Path(root).iterdir())[:5]) if Path(root).is_dir() else "no such folder"
    raise UserError(f"no train-*.parquet in '{root}/data' or '{root}' (found: {found or 'nothing'}). {hint}")


def steps_of(column):
    """Arrow column of paths, list<list<number>> -> (lengths (R,), steps (M, 2) float64): p[t+1] - p[t] of successive
    points, path after path; NaN where a point is not finite or has fewer than 2 numbers. No Python loop over rows."""
    column = column.combine_chunks().cast(pa.list_(pa.list_(pa.float64())))
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    points = column.flatten()
    size = pc.fill_null(pc.list_value_length(points), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = np.append(points.flatten().to_numpy(zero_copy_only=False).astype(np.float64), np.nan)
    at = np.where(size >= 2, np.cumsum(size) - size, len(values) - 1)
    xy = np.stack([values[at], values[np.minimum(at + 1, len(values) - 1)]], axis=1)
    ends = np.cumsum(lengths)
    keep = np.ones(max(len(xy) - 1, 0), bool)
    keep[ends[(ends > 0) & (ends < len(xy))] - 1] = False  # not from the end of a path to the start of the next
    return lengths, np.diff(xy, axis=0)[keep]


def read_file(path, cfg):
    """One parquet file, all but its images -> Rows"""
    file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if missing := [c for c in ("image", "trajectory_3d") if names.count(c) != 1]:
        raise ValueError(f"no column '{missing[0]}', or several; it has {', '.join(names)}")
    texts = [c for c in ("lang_goal", "text") if c in names]
    read = file.read(columns=["trajectory_3d", *texts])
    lengths, steps = steps_of(read["trajectory_3d"])
    transitions = np.maximum(lengths - 1, 0)
    row_of = np.repeat(np.arange(len(lengths)), transitions)
    step = np.arange(len(row_of)) - np.repeat(np.cumsum(transitions) - transitions, transitions)
    selected = (step == 0) if cfg.samples == "first" else np.ones(len(step), bool)
    steps = (steps * (cfg.trajectory_hz or 1.0)).astype(np.float32)
    finite = np.isfinite(steps).all(1)
    counts = Counter(rows=len(lengths), short=int((lengths < 2).sum()), nonfinite=int((selected & ~finite).sum()))
    good = selected & finite
    table = pd.DataFrame(dict(path=path, row=np.arange(len(lengths)), lang_goal=None, text=None))
    for column in texts:
        table[column] = read[column].cast(pa.string()).to_pylist()
    actions, row_of = steps[good], row_of[good].astype(np.int32)
    content = json.dumps(table[["lang_goal", "text"]].to_numpy().tolist()).encode()
    marks = {path.name: hashlib.sha256(content + actions.tobytes() + row_of.tobytes()).hexdigest()[:16]}
    return Rows(table, actions, step[good].astype(np.int32), row_of, counts, marks)


def read_rows(paths, cfg):
    """-> (Rows of all files, messages of files left out by skip_bad_episodes)"""
    empty = pd.DataFrame(columns=["path", "row", "lang_goal", "text"], dtype=object)
    parts, bad = [Rows(empty, np.zeros((0, 2), np.float32), *np.zeros((2, 0), np.int32), Counter(), {})], []
    for path in paths:
        try:
            parts.append(read_file(path, cfg))
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            message = f"{path}: not a readable VAMOS file ({error})"
            hint = "Write or copy it again, or leave such files out: --skip_bad_episodes"
            require(cfg.skip_bad_episodes, f"{message}. {hint}")
            bad.append(message)
    before, marks = 0, {}
    for part in parts:
        part.row_of += np.int32(before)
        before += len(part.table)
        marks |= part.marks
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in ("actions", "step", "row_of")]
    table = pd.concat([part.table for part in parts], ignore_index=True)
    return Rows(table, *arrays, sum((part.counts for part in parts), Counter()), marks), bad


def choose_instructions(rows, column):
    """Fill table["instruction"] -> the column used. An empty cell takes the other column's text, else "navigate"."""
    goal, text = (rows.table[c].fillna("").astype(str).str.strip() for c in ("lang_goal", "text"))
    used = np.unique(rows.row_of)
    if column == "auto":
        goals = goal.iloc[used].loc[lambda texts: texts != ""]
        column = "lang_goal" if len(goals) and goals.str.contains(GOAL_POINT).mean() <= 0.5 else "text"
    first, second = (goal, text) if column == "lang_goal" else (text, goal)
    rows.counts["other_column"] = int(((first == "") & (second != "")).iloc[used].sum())
    rows.counts["no_instruction"] = int(((first == "") & (second == "")).iloc[used].sum())
    rows.table["instruction"] = first.where(first != "", second).replace("", "navigate")
    return column


def picture_size(rows):
    """[height, width] as recorded, by the first image of up to 8 files; None if their aspect ratios differ"""
    first = rows.table.loc[np.unique(rows.row_of)].groupby("path")["row"].first()
    some = first.iloc[np.unique(np.linspace(0, len(first) - 1, 8).astype(int))]
    sizes = [picture_reader(path, lambda image: image.size[::-1], row + 1)(row) for path, row in some.items()]
    return list(sizes[0]) if len({round(width / height, 2) for height, width in sizes}) == 1 else None


def picture_reader(path, resize, rows=None):
    """-> function: row (of the first `rows`) -> its image in full, through `resize`: (h, w, 3) uint8 RGB"""
    try:
        file = pq.ParquetFile(path)  # in parts, as pyarrow reads no struct of more than 2 GB at once
        most = range(rows or file.metadata.num_rows)  # batches: each has at least a row
        parts = [part["image"] for _, part in zip(most, file.iter_batches(64, columns=["image"]), strict=False)]
        column = pa.chunked_array(parts, file.schema_arrow.field("image").type)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: its images cannot be read ({error}). Copy the file again") from error

    def read(row):
        cell = column[row].as_py()
        try:
            return resize(rgb(Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell))))
        except Exception as error:  # damaged bytes surface as anything: OSError, SyntaxError, struct.error, ...
            raise UserError(f"{Path(path).name}: the image of row {row} cannot be decoded ({error!r})") from error

    return read


def drop_bad_pictures(rows, store, skip):
    """Drop the samples whose images could not be decoded -> messages; without `skip` that is an error."""
    bad = {}
    for path, part in rows.table.groupby("path"):
        bad |= {part.index[i]: why for i, why in store.about(path)["bad"].items()}
    used = np.intersect1d(list(bad), rows.row_of).tolist()
    hint = "Write the files again without these rows, or leave them out: --skip_bad_episodes"
    messages = [bad[row] for row in used]
    require(skip or not used, "\n".join([f"{len(used)} images cannot be decoded, e.g.", *messages[:20], hint]))
    keep = ~np.isin(rows.row_of, used)
    rows.actions, rows.step, rows.row_of = rows.actions[keep], rows.step[keep], rows.row_of[keep]
    return messages


@dataclass
class Data:
    """Rows of a run, split and described."""

    train: Rows
    validation: Rows
    excluded: list  # messages of files and images left out
    spec: dict  # meaning of actions and instructions; in every checkpoint and exported model
    stats: dict  # entry of dataset_statistics.json
    validation_files: list  # their names, relative to data_root_dir
    fingerprint: str  # changes when the training samples would, but for images that are left out
    table: dict  # of the training files, none of them held out, for a checkpoint: see split_or_keep


def load_data(cfg, store=None, resize=None, run=None, table=None):
    """Find, index, split and describe the data set. With a FrameStore, which then holds all images, rows whose
    image cannot be decoded are an error or left out; without one no image is read. `table`: of a resumed run."""
    train_paths, validation_paths = find_files(cfg.data_root_dir)
    (train, bad), (validation, bad_too) = read_rows(train_paths, cfg), read_rows(validation_paths, cfg)
    excluded = bad + bad_too
    if store:
        sources = pd.concat([train.table, validation.table]).groupby("path").size().to_dict()
        reader = functools.partial(picture_reader, resize=resize)
        store.build(sources, reader, run.rank / run.world, max(1, cfg.num_workers))
        run.sum(0)  # every rank has decoded its share
        for rows in (train, validation):
            excluded += drop_bad_pictures(rows, store, cfg.skip_bad_episodes)
    require(len(train.actions), f"'{cfg.data_root_dir}' has no usable sample: {dict(train.counts)}")
    column = choose_instructions(train, cfg.instruction_column)
    choose_instructions(validation, column)
    spec = dict(instruction_column=column, unit="m/s" if cfg.trajectory_hz else "m/step")
    spec |= dict(trajectory_hz=cfg.trajectory_hz, samples=cfg.samples)
    entry = compute_stats({"action": [train.actions]})["action"]
    del entry["count"]
    for i, (low, high) in enumerate(zip(entry["q01"], entry["q99"], strict=True)):
        if low == high:  # only a rare jump moves: min and max keep it alive, and a constant stays one
            entry["q01"][i], entry["q99"][i] = entry["min"][i], entry["max"][i]
    stats = dict(action=entry, num_transitions=len(train.actions), num_trajectories=len(np.unique(train.row_of)))
    names = [p.relative_to(cfg.data_root_dir).as_posix() for p in validation.table["path"].unique()]
    *_, table, gone = split_or_keep(train.marks, lambda: (train.marks, []), table if cfg.skip_bad_episodes else None)
    digest = hashlib.sha256(json.dumps([spec, trained_in(table)]).encode()).hexdigest()[:16]
    texts = sorted(train.table["instruction"][np.unique(train.row_of)].unique())
    spec |= dict(instructions=texts if len(texts) <= 20 else [], picture_size=picture_size(train) if store else None)
    return Data(train, validation, excluded + gone, spec, stats | dict(unit=spec["unit"]), names, digest, table)


def augment_image(image, rng):
    """(h, w, 3) uint8 -> with OpenVLA's colour augmentation, but for its crop, which would move the goal."""
    x = image / 255.0 + rng.uniform(-0.2, 0.2)
    mean = x.mean((0, 1), keepdims=True)
    x = np.clip((np.clip(x, 0, 1) - mean) * rng.uniform(0.8, 1.2) + mean, 0, 1)
    hsv = np.asarray(Image.fromarray((x * 255).astype(np.uint8)).convert("HSV")).astype(np.float32)
    hsv[..., 1] = np.clip(hsv[..., 1] * rng.uniform(0.8, 1.2), 0, 255)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-0.05, 0.05) * 256) % 256
    return np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB"))


class VamosDataset(Dataset):
    """One item per image and instruction, with up to `targets` steps drawn from its path; with targets = 1 one item
    per step. Item (position, i), where `position` seeds the draw and the augmentation:

    image (h, w, 3) uint8 at the model's size | instruction str | actions (k, 2) float32 in the data's units |
    name (file, "row r step t ..."). picture(path, row) -> image
    """

    def __init__(self, rows, picture, targets=1, seed=0, augment=False):
        self.rows, self.picture, self.targets, self.seed, self.augment = rows, picture, targets, seed, augment
        self.table = rows.table[["path", "row", "instruction"]].to_numpy()
        every = np.arange(len(rows.actions))
        self.first = np.unique(rows.row_of, return_index=True)[1] if targets > 1 else every
        self.after = np.append(self.first[1:], len(every))

    def __len__(self):
        return len(self.first)

    def __getitem__(self, key):
        position, i = key
        first, steps = self.first[i], self.after[i] - self.first[i]
        path, row, instruction = self.table[self.rows.row_of[first]]
        image = self.picture(path, row)
        if self.augment:
            image = augment_image(image, generator_at(self.seed, position, "augment"))
        rng = generator_at(self.seed, position, "targets")
        chosen = first + np.sort(rng.choice(steps, min(self.targets, steps), replace=False))
        name = (path.name, f"row {row} step {' '.join(map(str, self.rows.step[chosen]))}")
        return dict(image=image, instruction=instruction, actions=self.rows.actions[chosen], name=name)


class Collate:
    """Dataset items -> model inputs. Prompt ids and images are made by the functions that predict uses."""

    def __init__(self, processor, config, stats):
        self.processor, self.config, self.normalizer = processor, config, Normalizer(stats["action"])

    def __call__(self, items):
        """B items with N targets -> images (B, h, w, 3) uint8 | input_ids (B, T) int64, padded on the right: a prompt,
        then an answer per target: two action tokens, end of sequence | answer (B, T): which answer a token belongs to,
        if any item has several | targets (N, 3): tokens of the answers | rows (M,): positions in the flattened
        (B, P + T) hidden states that predict them, at (N, 3): which of `rows` | counts: targets of each item | names"""
        from modeling_openvla import side_by_side

        counts = [len(item["actions"]) for item in items]
        actions = self.normalizer.normalize(np.concatenate([item["actions"] for item in items]))
        end = self.processor.tokenizer.eos_token_id
        targets = torch.tensor([[*answer, end] for answer in self.config.encode_actions(actions).tolist()])
        prompts = [self.processor.prompt_ids(item["instruction"]) for item in items]
        ids, answer, before = side_by_side(prompts, targets.split(counts), self.config)
        rows, at = before.unique(return_inverse=True)  # the first tokens of a prompt's answers share one position
        images = torch.from_numpy(np.stack([item["image"] for item in items]))
        batch = dict(images=images, input_ids=ids, targets=targets, rows=rows, at=at, counts=counts)
        batch |= dict(answer=answer) if max(counts) > 1 else {}
        return batch | dict(names=[item["name"] for item in items])


# ---- model -----------------------------------------------------------------------------------------------------------


def read_folder(folder):
    """A directory in OpenVLA's format -> (OpenVLAConfig, PrismaticProcessor), both checked"""
    from modeling_openvla import EMPTY_TOKEN, OpenVLAConfig, PrismaticProcessor

    expected = "expected a directory in OpenVLA's format (openvla/openvla-7b, or what this script exports)"
    for name in ("config.json", "tokenizer.json"):
        require((Path(folder) / name).is_file(), f"{folder} has no {name}: {expected}")
    values = ckpt.read_json(Path(folder) / "config.json")
    kind = values.get("model_type")
    require(kind == "openvla", f"{folder}/config.json: model_type is {kind!r}, not 'openvla': {expected}")
    with opening(folder):
        config, processor = OpenVLAConfig(**values), PrismaticProcessor.from_pretrained(folder)
        config.towers()
    tokenizer = processor.tokenizer
    piece, begin = tokenizer.convert_ids_to_tokens(EMPTY_TOKEN), tokenizer("In")["input_ids"][0]
    found = f"id {EMPTY_TOKEN} is {piece!r}, a text begins with id {begin}"
    llama = piece == "▁" and begin == tokenizer.bos_token_id
    require(llama, f"{folder}/tokenizer.json: {found}; expected '▁' and BOS, as in the Llama tokenizer of OpenVLA")
    return config, processor


def load_vla(folder, device, dtype, tensors=None):
    """OpenVLA with the weights of a directory, or `tensors`, one by one: no second copy in memory, here or on a GPU."""
    from modeling_openvla import OpenVLAForActionPrediction

    vla = unfilled(OpenVLAForActionPrediction._from_config, read_folder(folder)[0], dtype=dtype).requires_grad_(False)
    load_weights(vla, tensors or read_tensors(folder), folder, device=device)
    return vla.eval()


def load_4bit(folder, device):
    """The same model with its linear layers (not the head) in nf4, through bitsandbytes."""
    from transformers import BitsAndBytesConfig

    from modeling_openvla import OpenVLAForActionPrediction

    nf4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options = dict(config=read_folder(folder)[0], dtype=torch.bfloat16, device_map={"": device})
    options["quantization_config"] = BitsAndBytesConfig(**nf4, llm_int8_skip_modules=["lm_head"])
    return OpenVLAForActionPrediction.from_pretrained(folder, **options).requires_grad_(False)


def lora_layers(vla):
    """Names of the layers that get an adapter: those of OpenVLA's code but the 13 that never run (the last block of
    each tower and SigLIP's pooling head)."""
    unused = ["vision_backbone.fused_featurizer.attn_pool."]
    unused += [f"vision_backbone.{n}.blocks.{len(t.blocks) - 1}." for n, t in vla.vision_backbone.named_children()]
    linear = [n for n, m in vla.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    return [n for n in linear if n.rsplit(".", 1)[-1] in LORA_LEAVES and not n.startswith(tuple(unused))]


def build_model(cfg, folder, device, dtype):
    """-> peft model of OpenVLA with a new LoRA adapter. Frozen weights in `dtype`, the adapter in fp32."""
    from peft import LoraConfig, get_peft_model

    vla = load_4bit(folder, device) if cfg.use_quantization else load_vla(folder, device, dtype)
    torch.manual_seed(cfg.seed)
    rank = dict(r=cfg.lora_rank, lora_alpha=min(cfg.lora_rank, 16), lora_dropout=cfg.lora_dropout)
    peft_model = get_peft_model(vla, LoraConfig(**rank, target_modules=lora_layers(vla), init_lora_weights="gaussian"))
    peft_model.peft_config["default"].base_model_name_or_path = cfg.vla_path
    if dtype == torch.bfloat16 and not cfg.use_quantization:  # autocast runs the adapters in bf16: do not let peft
        for module in vla.modules():  # copy the input of each of them to fp32 first
            module.cast_input_dtype_enabled = False
    if cfg.gradient_checkpointing or cfg.use_quantization:
        vla.enable_checkpointing()
    return peft_model


class LossModel(nn.Module):
    """The loss as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, vla, image_processor):
        super().__init__()
        self.vla, self.image_processor = vla, image_processor

    def forward(self, batch):
        """Cross-entropy of the two action tokens and the end of sequence; the head runs on the rows that predict them,
        not on all P + T positions. -> sums over the targets: loss, correct action tokens, |decoded - target| in [-1, 1]
        units; sample_loss (B,)"""
        vla, config, at, targets = self.vla, self.vla.config, batch["at"], batch["targets"]
        pixels = self.image_processor.normalize(batch["images"])
        hidden = vla.hidden(batch["input_ids"], pixels, answer=batch.get("answer"))
        logits = vla.language_model.lm_head(hidden.flatten(0, 1)[batch["rows"]]).float()  # (M, V)
        losses = -F.log_softmax(logits, dim=1)[at, targets]  # (N, 3)
        logits, at, target = logits.detach(), at[:, :-1], targets[:, :-1]  # without the end of sequence
        answer = config.action_begin + logits[:, config.action_begin : config.action_end].argmax(1)
        last = config.n_action_bins - 2  # bin centres are 2 / (n - 1) apart; +1 falls into the last bin, too
        bins = [(config.action_end - 1 - ids).clamp(0, last) for ids in (answer[at], target)]
        sums = dict(loss_sum=losses.sum(), correct=(logits.argmax(1)[at] == target).sum())
        sums |= dict(l1_sum=(bins[0] - bins[1]).abs().sum() * 2 / (last + 1))
        return sums | dict(sample_loss=torch.stack([part.mean() for part in losses.detach().split(batch["counts"])]))


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation.
    `needs`: see Contract."""

    def __init__(self, vla, processor, stats, spec, needs=None):
        self.vla, self.processor, self.stats, self.spec = vla, processor, stats, spec
        self.collate, action = Collate(processor, vla.config, stats), stats["action"]
        to_unit, c = self.collate.normalizer.normalize, vla.config  # nearest: the closest that predict can return
        self.nearest = lambda a: vla.unnormalize(c.decode_actions(c.encode_actions(to_unit(a))), action)
        about = dict(script=Path(__file__).stem, images={"camera1": spec["picture_size"]}, actions=self.action_names())
        about |= dict(horizon=1, rate_hz=spec["trajectory_hz"], kind="velocity", instructions=spec["instructions"])
        about |= dict(action_low=action["q01"], action_high=action["q99"])  # what lies beyond is never answered
        first_row = "row 0: the motion from the image's moment to the next step of the path; send it at once"
        self.contract = Contract(**about, first_row=first_row, needs=needs or {}, must_be_told=True)

    def reset(self):
        """Nothing to forget: every prediction depends on its own observation alone."""

    def describe(self):
        return self.contract.describe(self)

    def predict(self, observations):
        """list of {images: {camera1: (h, w, 3) uint8 RGB or PIL image}, instruction: str} -> (B, 1, 2) float32, v_x
        forward and v_y left in the data's unit."""
        self.contract.check(observations)
        resize = self.processor.image_processor.resize
        items = [dict(image=resize(o["images"]["camera1"]), instruction=o["instruction"]) for o in observations]
        return self.answer(items)[:, None]

    @torch.no_grad()
    def answer(self, items):
        """B items of a VamosDataset, actions not needed -> (B, 2) float32 in the data's unit; in eval mode"""
        vla, action = self.vla, self.stats["action"]
        device = next(vla.parameters()).device
        prompts = [self.processor.prompt_ids(item["instruction"]) for item in items]
        pictures = torch.from_numpy(np.stack([item["image"] for item in items]))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            pixels = self.processor.image_processor.normalize(pictures.to(device))
            answer = vla.generate_action_ids(prompts, pixels, len(action["q01"]))
        return vla.unnormalize(vla.config.decode_actions(answer.cpu().numpy()), action).astype(np.float32)

    def open_episodes(self, root, names=None):
        """For evaluate.py: an episode is one parquet file (by default the validation files), a frame one of its rows,
        the target (M, 2) the first step of its path. Rows and files that cannot be read are listed and left out."""
        train, validation = find_files(root)
        known = {p.relative_to(root).as_posix(): p for p in train + validation}
        unknown = sorted(set(names or []) - set(known))
        require(not unknown, f"'{root}' has no file '{''.join(unknown[:1])}'; it has {', '.join(list(known)[:5])}, ...")
        cfg = Config(samples="first", trajectory_hz=self.spec["trajectory_hz"], skip_bad_episodes=True)
        for name in names or [p.relative_to(root).as_posix() for p in validation or train]:
            rows, bad = read_rows([known[name]], cfg)
            if bad:
                print(f"left out  {bad[0]}")
                continue
            choose_instructions(rows, self.spec["instruction_column"])
            picture, good = picture_reader(known[name], np.array), []

            def sample(i, rows=rows, picture=picture, file=name):
                row, texts = int(rows.row_of[i]), rows.table["instruction"]
                return dict(images=dict(camera1=picture(row)), instruction=texts[row], name=(file, row))

            for i in range(len(rows.row_of)):
                try:
                    sample(i)
                    good.append(i)
                except UserError as error:
                    print(f"left out  {error}")
            rows.row_of, target = rows.row_of[good], rows.actions[good]
            yield dict(name=name, sample=sample, target=target, hold=np.zeros_like(target), phase=None)

    def action_names(self):
        return [("v_x", self.spec["unit"]), ("v_y", self.spec["unit"])]


# ---- save, load ------------------------------------------------------------------------------------------------------


def save_adapter(folder, content, peft_model, stats):
    """Write what load_policy and peft read: adapter (content["trained"]), meta.json (content["meta"]), statistics."""
    tensors = {f"base_model.model.{name}": tensor for name, tensor in content["trained"].items()}
    peft_model.save_pretrained(folder, state_dict=tensors, save_embedding_layers=False)  # else the whole embedding
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    write_json(folder / "meta.json", content["meta"])
    write_json(folder / "dataset_statistics.json", {KEY: stats})


def read_adapter(folder):
    """-> {name of the parameter in the training model: tensor}"""
    tensors = hub.read_adapter(folder).items()
    return {name.removeprefix("base_model.model.").replace(".weight", ".default.weight"): t for name, t in tensors}


def check_base(base, meta):
    """-> digest of the weights in `base`; it must be the one in `meta`, if there is one (older adapters have none)."""
    digest = weight_digest(base)
    wrong = f"{base} holds other weights than those that this adapter was trained on. Put those back; if they are"
    require(meta.get("digest", digest) == digest, f"{wrong} elsewhere now: --merge steps_N --vla_path DIR")
    return digest


def open_adapter(folder, meta, base=None):
    """-> directory of the base model of the adapter in `folder`, its tensors {name: tensor}, mapped from the files, and
    fold(name): such a tensor with the adapter folded in. `base`: where the base model is now, if it has moved."""
    why = f"; {folder} was trained on it. If it has moved: --merge {folder} --vla_path DIR"
    base = local_folder(base or meta["config"]["vla_path"], why=why)
    check_base(base, meta)
    rank, adapter = ckpt.read_json(folder / "adapter_config.json"), read_adapter(folder)
    tensors, scale = dict(read_tensors(base)), rank["lora_alpha"] / rank["r"]
    ends = tuple(f".{layer}.weight" for layer in rank["target_modules"])  # peft keeps the ends of names
    halves = Counter(name.partition(".lora_")[0] + ".weight" for name in adapter)
    require(halves == {n: 2 for n in tensors if f".{n}".endswith(ends)}, f"{folder}: its adapter lacks a tensor")

    def fold(name):  # in fp32, rounded once
        tensor, layer = tensors[name], name.removesuffix(".weight")
        a, b = (adapter.get(f"{layer}.lora_{part}.default.weight") for part in "AB")
        if a is None:
            return tensor
        return (b.flatten(1) @ (scale * a.flatten(1))).view_as(tensor).add_(tensor).to(tensor.dtype)

    return base, tensors, fold


def save_model(folder, tensors, fold, base, meta, stats):
    """Write OpenVLA's directory format: fold(name) of all `tensors`, no more than 2 GB of which are held, config and
    processor of the directory `base`, statistics, and our modeling file, which transformers finds through auto_map."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    import modeling_openvla as openvla

    folder.mkdir(parents=True, exist_ok=True)
    cut = split_torch_state_dict_into_shards(tensors, max_shard_size="2GB")
    for file, names in cut.filename_to_tensors.items():
        save_file({name: fold(name) for name in names}, folder / file, {"format": "pt"})
    write_json(folder / "model.safetensors.index.json", dict(metadata=cut.metadata, weight_map=cut.tensor_to_filename))
    for file in filter(Path.is_file, [Path(openvla.__file__), *(base / name for name in COPIED)]):
        shutil.copy(file, folder)
    tokenizer = ckpt.read_json(base / "tokenizer_config.json")
    tokenizer.pop("auto_map", None)  # would lead to the hub
    config = ckpt.read_json(base / "config.json")
    config |= dict(norm_stats={KEY: stats}, auto_map=openvla.AUTO_MAP, architectures=["OpenVLAForActionPrediction"])
    classes = dict(processor_class="PrismaticProcessor", auto_map=openvla.AUTO_MAP)
    images = openvla.read_image_settings(base) | dict(image_processor_type="PrismaticImageProcessor")
    files = dict(tokenizer_config=tokenizer | dict(tokenizer_class="LlamaTokenizer"), processor_config=classes)
    files |= dict(preprocessor_config=images | classes, dataset_statistics={KEY: stats}, meta=meta, config=config)
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)


def merge_adapter(source, target, base=None):
    """Write the merged model of a steps_N or best into the directory `target`, which may hold other things (a run's
    log): config.json is moved there last, so without one the model is not complete. `base`: see open_adapter."""
    meta = read_meta(source)
    base, tensors, fold = open_adapter(source, meta, base)
    ckpt.remove_temporaries(target)
    about = {key: meta[key] for key in ("format_version", "script", "spec", "validation", "step")}
    with ckpt.atomic_path(target / "merging") as temporary:
        ckpt.require_space(target, int(1.02 * sum(tensor.nbytes for tensor in tensors.values())))
        save_model(temporary, tensors, fold, base, about, meta["stats"])
    (target / "config.json").unlink(missing_ok=True)
    for stale in target.glob("model*.safetensors*"):
        stale.unlink()
    for file in sorted((target / "merging").iterdir(), key=lambda p: p.name == "config.json"):
        os.replace(file, target / file.name)
    (target / "merging").rmdir()
    return target


def checkpoint_folder(path):
    """A path given by the user -> steps_N, best or a merged model; adapter_tmp_dir/EXP_ID means its newest steps_N."""
    path = next(reversed(ckpt.checkpoints_in(path)), Path(path))
    expected = "expected run_root_dir/EXP_ID after a merge, or adapter_tmp_dir/EXP_ID[/steps_N or /best]"
    require((path / "meta.json").is_file(), f"{path} has no meta.json: {expected}")
    return path


def read_meta(path):
    meta, stats = ckpt.read_json(path / "meta.json"), ckpt.read_json(path / "dataset_statistics.json").get(KEY)
    version, known = meta.get("format_version"), stats and is_table(stats.get("action"))
    require(version == FORMAT, f"{path}: meta.json has format_version {version}, this code reads {FORMAT}")
    require(known, f"{path}/dataset_statistics.json has no complete '{KEY}': copy it again, with all beside it")
    return meta | dict(stats=stats)


def load_policy(path, device=None):
    """Open a merged model, a steps_N or best, or an adapter_tmp_dir/EXP_ID (its newest) for inference."""
    path = checkpoint_folder(path)
    meta, adapted = read_meta(path), (path / "adapter_config.json").is_file()
    hint = "the run has not merged yet, or was interrupted; merge a checkpoint: --merge adapter_tmp_dir/EXP_ID/steps_N"
    require(adapted or (path / "config.json").is_file(), f"{path} holds no complete model: {hint}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base, tensors, fold = open_adapter(path, meta) if adapted else (path, (), None)
    vla = load_vla(base, device, dtype, ((name, fold(name)) for name in tensors) if adapted else None)
    return Policy(vla, read_folder(base)[1], meta["stats"], meta["spec"], {"base_model": str(base)} if adapted else {})


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of update `step` (from 0): linear warm-up, then constant, or a cosine to 0 that stays there."""
    if step < cfg.warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps))
    return cfg.learning_rate * (0.5 * (1 + math.cos(math.pi * progress)) if cfg.lr_schedule == "cosine" else 1.0)


def describe(cfg, data, say):
    """Print what was found: files, rows, what was left out, actions, instructions, targets that share one input."""
    t, v, action = data.train, data.validation, data.stats["action"]
    usable = f"{data.stats['num_trajectories']} of {t.counts['rows']} rows usable"
    say(f"data      {t.table['path'].nunique()} train files, {usable}, {len(t.actions)} samples ({cfg.samples} steps)")
    say(f"          {len(data.validation_files)} validation files, {len(v.actions)} samples; {cfg.data_root_dir}")
    for message in data.excluded:
        say(f"excluded  {message}")
    kinds = dict(short="rows with fewer than 2 points", nonfinite="steps that are not finite")
    kinds |= dict(other_column="rows use the other text column", no_instruction="rows have no text ('navigate')")
    if counted := [f"{t.counts[kind]} {what}" for kind, what in kinds.items() if t.counts[kind]]:
        say(f"counted   {', '.join(counted)}")
    say(f"action    v_x forward, v_y left, {data.spec['unit']}; tokens cover q01 .. q99 of the training samples")
    for name in ("q01", "q99", "mean", "std", "min", "max"):
        say(f"          {name:<5}" + " ".join(f"{value:11.4g}" for value in action[name]))
    size = np.abs(t.actions).sum(0)
    lost = np.abs(t.actions - np.clip(t.actions, action["q01"], action["q99"])).sum(0) / np.where(size > 0, size, 1)
    say(f"          clipping to them removes {lost[0]:.1%} of the motion in v_x, {lost[1]:.1%} in v_y")
    texts = t.table["instruction"][np.unique(t.row_of)].value_counts()
    say(f"text      column {data.spec['instruction_column']}, {len(texts)} instructions, e.g. {list(texts.index[:3])}")
    shared = pd.DataFrame(t.actions.astype(np.float64)).groupby(t.row_of)
    (x, y), most = shared.std(ddof=0).mean(), shared.size().max()
    say(f"targets   at most {most} per image and instruction, {cfg.targets_per_picture} of them in one forward; std")
    say(f"          within one {x:.3g}, {y:.3g}: where that is above 0, token accuracy cannot reach 1")
    if not len(v.actions):
        say("note      no validation-*.parquet with usable rows: nothing tells when to stop, there is no best/")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights."""
    data = load_data(cfg)
    describe(cfg, data, print)
    config, processor = read_folder(folder := local_folder(cfg.vla_path, weights=False))
    images = processor.image_processor
    read = lambda path, row: picture_reader(path, images.resize, row + 1)(row)  # noqa: E731
    dataset = VamosDataset(data.train, read, cfg.targets_per_picture, cfg.seed, cfg.image_aug)
    order = GlobalOrder(len(dataset), cfg.seed)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(f"batch     {len(items)} samples, first: {' '.join(items[0]['name'])}, {items[0]['instruction']!r}")
    collate = Collate(processor, config, data.stats)
    batch = collate(items) | dict(actions=torch.from_numpy(np.concatenate([item["actions"] for item in items])))
    for key in ("images", "actions", "input_ids", "targets"):
        value = batch[key]
        values = f"{str(value.dtype).removeprefix('torch.'):<8} {value.min():.4g} .. {value.max():.4g}"
        print(f"          {key:<10} {str(tuple(value.shape)):<20} {values}")
    print(f"prompt    {processor.tokenizer.decode(processor.prompt_ids(items[0]['instruction']))!r}")
    plan.check(cfg, dataset, collate, lambda c, dtype: LossModel(build_model(c, folder, "cpu", dtype), images))
    print("check passed")


def validate(core, policy, dataset, cfg, run):
    """On samples spread evenly over the validation files -> {val_loss: per token, val_action_accuracy, val_l1_loss: in
    [-1, 1] units, val_mae_vx, val_mae_vy: of predict, in the data's unit, val_mae_mean_action: of always answering the
    mean, val_swap_ratio: error with another row's image / with its own, on a quarter of the samples}"""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(cfg.val_samples, len(dataset))).astype(int)).tolist()
    items, n, size = [dataset[(k, k)] for k in chosen], len(chosen), cfg.batch_size
    target, mean = np.concatenate([item["actions"] for item in items]), np.array(policy.stats["action"]["mean"])
    # one image may have rows with several instructions: partners must differ in the image
    others = partners([hashlib.sha256(item["image"]).hexdigest() for item in items], dataset.rows.step[chosen])
    mine, sums, error, swapped = list(range(run.rank, n, run.world)), np.zeros(3), np.zeros((n, 2)), 0.0
    to_swap = [k for k in mine if k // 8 % 4 == 0 and others is not None]  # the same ones for any number of ranks
    core.eval()
    for i in progress(range(0, len(mine), size), "validation", "batch"):
        part, swaps = mine[i : i + size], to_swap[i : i + size]
        batch = [items[k] for k in part]
        with torch.no_grad(), run.autocast():
            out = core(to_device(policy.collate(batch), run.device))
        sums += [out[name].item() for name in ("loss_sum", "correct", "l1_sum")]
        error[part] = np.abs(policy.answer(batch) - target[part])
        if swaps:
            batch = [items[k] | dict(image=items[others[k]]["image"]) for k in swaps]
            swapped += np.abs(policy.answer(batch) - target[swaps]).sum()
    core.train()
    loss, correct, l1, vx, vy, own, swapped = run.sum(*sums, *error.sum(0), error[to_swap].sum(), swapped)
    values = dict(val_loss=loss / n / 3, val_action_accuracy=correct / n / 2, val_l1_loss=l1 / n / 2)
    values |= dict(val_mae_vx=vx / n, val_mae_vy=vy / n, val_mae_mean_action=np.abs(mean - target).mean().item())
    if others is None:
        return values
    ratio = swapped / max(own, 1e-9)
    if ratio < 1.05:
        (run.log or run).print(f"warning: the model does not look at its images: others give {ratio:.2f} x the error")
    return values | dict(val_swap_ratio=ratio)


def merge(run, source, target, last=False):
    """Merge on rank 0, while the others wait. A failed merge does not end the training, unless it is the `last`."""
    if last and run.once(lambda: (target / "config.json").is_file() and read_meta(target)["step"] == run.step):
        return
    try:
        run.print(f"merged model: {run.once(merge_adapter, source, target)}")
    except UserError as error:
        saved = f"the training is saved in {source}, but not merged: {error}"
        require(not last, f"{saved}. Run again with --resume auto, which only merges")
        run.print(saved)


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)
    if cfg.merge:  # one checkpoint, into a folder of its own
        meta = read_meta(source := checkpoint_folder(cfg.merge))
        expected = f"--merge {cfg.merge} has no adapter_config.json; expected adapter_tmp_dir/EXP_ID/steps_N or best"
        require((source / "adapter_config.json").is_file(), expected)
        saved = config_from(Config, meta["config"])
        given = {key: value for key, value in vars(cfg).items() if value != getattr(Config, key)}
        target = Path(given.get("run_root_dir", saved.run_root_dir)) / f"{exp_id(saved)}--{meta['step']}_chkpt"
        return print(f"merged model: {merge_adapter(source, target, given.get('vla_path'))}")

    # ---- inputs: everything that can be wrong is found before weights are loaded
    cfg.vla_path, name = stored_source(cfg.vla_path), exp_id(cfg)
    run_dir, adapter_dir = Path(cfg.run_root_dir) / name, Path(cfg.adapter_tmp_dir) / name
    cuda = torch.cuda.is_available()
    run = Run(cfg, run_dir / "log", cfg.batch_size, cfg.grad_accumulation_steps, bf16=cuda)
    path = run.find(cfg.resume_from_checkpoint, adapter_dir, ["steps_*"], exports=["best"])
    kept = f"{run_dir} holds a trained model, {adapter_dir} nothing to go on from: name the new run, --run_id_note NAME"
    require(path or not (run_dir / "config.json").is_file(), kept)
    config, processor = read_folder(folder := local_folder(cfg.vla_path, weights=False))
    images = processor.image_processor
    store = FrameStore(cfg.frame_dir, (*images.size, 3), [images.image_resize_strategy, "bicubic"])
    saved = read_meta(path) if path else {}
    data = load_data(cfg, store, images.resize, run, saved.get("files"))
    if path:
        run.restore(path, saved, data.fingerprint, FIXED)
        data.stats = saved["stats"]  # also where files or images were left out since
    describe(cfg, data, run.print)
    if not run.plan(cfg.max_steps, "--max_steps"):
        return merge(run, path, run_dir, last=True)

    # ---- model, optimizer, data
    dataset = VamosDataset(data.train, store.read, cfg.targets_per_picture, cfg.seed, cfg.image_aug)
    collate = Collate(processor, config, data.stats)
    plan.check(cfg, dataset, collate, lambda c, dtype: LossModel(build_model(c, folder, "cpu", dtype), images), run)
    digest = run.once(check_base, base := local_folder(cfg.vla_path), saved)
    peft_model = build_model(cfg, base, run.device, torch.bfloat16 if cuda else torch.float32)
    vla = peft_model.get_base_model()
    policy, core = Policy(vla, processor, data.stats, data.spec), LossModel(vla, images)
    model = run.prepare(core.train())
    trained = [p for p in vla.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, cfg.learning_rate, weight_decay=cfg.weight_decay, fused=cuda or None)
    if path:  # no variable for what is loaded: it is mapped from files, which could not be freed after rotation
        ckpt.restore_training_state(vla, optimizer, read_adapter(path), ckpt.load_state(path / "state.pt")["moments"])
    held_out = VamosDataset(data.validation, store.read)
    loader = run.loader(dataset, GlobalOrder(len(dataset), cfg.seed), policy.collate, cfg.num_workers)
    size = 12 * sum(p.numel() for p in trained)  # fp32 adapter and two moments
    run.describe(vla, len(dataset), size, adapter_dir, f" (LoRA r {cfg.lora_rank} on {len(trained) // 2} layers)")
    about = dict(format_version=FORMAT, script=Path(__file__).stem, spec=data.spec, validation=data.validation_files)
    about |= dict(fingerprint=data.fingerprint, files=data.table, digest=digest)
    run.write("validation_episodes.txt", "".join(f"{n}\n" for n in data.validation_files))

    def collect():
        trained, moments = ckpt.training_state(vla, optimizer)
        return dict(trained=trained, moments=moments, meta=about | run.progress())

    write_best = functools.partial(save_adapter, peft_model=peft_model, stats=data.stats)

    def write(folder, content):
        write_best(folder, content)
        ckpt.save_state(folder / "state.pt", dict(moments=content["moments"]))
        for file in ("adapter_config.json", "adapter_model.safetensors"):  # the newest adapter under the guide's path
            ckpt.link(folder / file, adapter_dir / file)

    run.checkpoints(adapter_dir, "steps_{step}", write, size, collect, cfg.keep_checkpoints)

    # ---- loop
    wandb = WandbConfig(cfg.wandb_mode if cfg.wandb_project else "disabled", cfg.wandb_entity, f"ft+{name}")
    for step in run.steps(loader, cfg.wandb_project or "", wandb):
        targets = run.sum(sum(len(batch["targets"]) for batch in step.batches))  # a short path has fewer
        for batch in step.micro_batches(model):
            out = model(batch)
            step.backward(out["loss_sum"] / (3 * targets), out["sample_loss"])  # 3 tokens each: v_x, v_y, the end
            step.add(accuracy=out["correct"] / (2 * targets), l1=out["l1_sum"] / (2 * targets))
        step.update(optimizer, lr_at(step.index, cfg), cfg.max_grad_norm)

        if step.every(cfg.log_steps):
            mean = step.mean()
            loss, accuracy, l1, norm = (mean[name] for name in ("loss", "accuracy", "l1", "grad_norm"))
            values = dict(train_loss=loss, action_accuracy=accuracy, l1_loss=l1, learning_rate=step.lr, grad_norm=norm)
            step.log(values, f"loss {loss:.4f} | acc {accuracy:.3f} | l1 {l1:.4f} | grad {norm:.2f}")
        if len(held_out) and step.every(cfg.val_steps):
            v = validate(core, policy, held_out, cfg, run)
            text = f"loss {v['val_loss']:.4f} | acc {v['val_action_accuracy']:.3f} | l1 {v['val_l1_loss']:.4f}"
            text += f" | error v_x {v['val_mae_vx']:.4g}, v_y {v['val_mae_vy']:.4g} {data.spec['unit']}"
            if step.validated(v, v["val_loss"], f"{text} (mean action: {v['val_mae_mean_action']:.4g})"):
                run.save_best(adapter_dir / "best", write_best, size / 3, collect)
        if step.every(cfg.save_steps):
            run.save()
            if run.join() and step.number < run.total and not run.stopping():
                apart = run_dir.parent / f"{name}--{step.number}_chkpt"
                merge(run, run.saved, run_dir if cfg.save_latest_checkpoint_only else apart)

    # ---- end
    if run.step == run.total:
        merge(run, run.saved, run_dir, last=True)
    evaluate = command("evaluate.py", checkpoint=run_dir, data=cfg.data_root_dir)
    run.finish(f"adapter: {adapter_dir}", f"evaluate: {evaluate}", plot=("train_loss", "val_loss"))


if __name__ == "__main__":
    launch(main, Config, ALIASES)
