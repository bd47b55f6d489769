"""SmolVLA: SmolVLM2 with a flow-matching action expert, on simulated (or real) HDF5 insertion episodes; what comes out is a LeRobot policy.

Model: Shukor et al. 2025, arXiv 2506.01844. Names, shapes and results are those of LeRobot's SmolVLAPolicy, written here in plain modules, so that
lerobot/smolvla_base loads here and checkpoints/final_hf/ loads there. One training sample is one frame: K images, text and robot state -> the next S actions.

    python train_smolvla_sim.py --config configs/smolvla_sim.yaml --check               # look at the data, no weights needed
    bash shells/compute_dataset_stats_sim.sh                                            # dataset_stats_sim.yaml
    bash shells/train_smolvla_sim.sh --multi-gpu --num-gpus 5                           # the same as: torchrun --nproc_per_node=5 train_smolvla_sim.py ...
    python train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --max_steps 20   # smoke run on a CPU, on make_demo.py's output

Output, in output_dir: checkpoints/checkpoint_step_N.pt (resumes, opens with load_policy), checkpoints/final_hf/ (LeRobot's format), validation_episodes.txt,
loss_spikes.txt and .csv, metrics.jsonl, loss.png.

Letters in shapes: B batch, K cameras, T tokens of an image, L text tokens, N prefix tokens (images, text, state), S action steps (the chunk), A padded
action dims, D width of the VLM, W width of the expert.
"""

import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
try:
    import torchvision  # noqa: F401  not used here, but transformers imports it where it is installed ...
except (ImportError, OSError, RuntimeError, AttributeError):
    sys.modules["torchvision"] = None  # ... and would break over one that does not fit this torch

import contextlib
import csv
import dataclasses
import gc
import hashlib
import json
import math
import re
import shutil
import tempfile
import time
from dataclasses import dataclass, field
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

from common import checkpoint as ckpt
from common import episodes as ep
from common import runlog
from common.config import parse_config, save_config
from common.sampler import GlobalOrder, RankBatches, generator_at, torch_seed_at
from common.stats import LISTS, load_stats, save_stats

FORMAT = 1  # of checkpoint_step_N.pt and final_hf/policy.json
STEP_FILE = r"checkpoint_step_(\d+)\.pt"
ROPE_BASE = 10_000.0  # SmolVLA's own; the VLM's config says 100,000 and is not asked


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with .h5 episodes, searched recursively
    horizon: int = 50  # S, future actions per sample, in frames; equals policy.chunk_size
    task_instruction: str = (
        "Insert needle into eye trocar in simulation"  # used where a file has no language_instruction
    )
    cameras: list[str] = field(
        default_factory=lambda: ["side_camera", "tool_camera", "top_camera"]
    )  # recorded names; the first is LeRobot's camera1, ...
    use_qpos: bool = False  # the state contains qpos, before ee_pose
    use_ee_pose: bool = True  # the state contains ee_pose
    use_ee_pose_delta_as_action: bool = False  # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if any value exceeds 2 pi
    weights: dict = field(
        default_factory=dict
    )  # {subfolder of root_dir: share of the samples}, e.g. {sim: 0.3, real: 0.7}; empty: every frame once per epoch
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    augment: bool = False  # colour augmentation of training images (the simulator's data is already randomised)
    augment_brightness: float = 0.2  # +- this share of full scale
    augment_contrast: float = 0.2  # factor 1 +- this
    augment_saturation: float = 0.2  # factor 1 +- this
    augment_hue: float = 0.05  # +- this share of the hue circle
    augment_noise: float = 0.02  # std of Gaussian noise, share of full scale


@dataclass
class NormalizationConfig:
    enable: bool = True  # false: states and actions enter as they are
    stats_file: str | None = None  # statistics file of compute_stats.py; null: computed from the training episodes
    mode: Literal["MEAN_STD", "MIN_MAX", "QUANTILES"] = (
        "MEAN_STD"  # LeRobot's names; QUANTILES maps q01..q99 to -1..1; nothing is clipped
    )


@dataclass
class PolicyConfig:
    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # backbone: hub id or directory
    pretrained_model_id: str | None = (
        None  # LeRobot policy to start from, e.g. lerobot/smolvla_base: hub id or directory; null: VLM weights and a new expert
    )
    load_vlm_weights: bool = True  # false: the VLM starts from random numbers, refused where it stays frozen ...
    allow_random_frozen_vlm: bool = False  # ... unless this asks for it
    num_vlm_layers: int = 16  # the first text layers of the VLM that are used
    num_expert_layers: int = -1  # 0 or less: as many as VLM layers
    expert_width_multiplier: float = 0.75  # W / D
    self_attn_every_n_layers: int = 2  # of the expert; the others attend to the prefix only
    attention_mode: Literal["cross_attn", "self_attn"] = (
        "cross_attn"  # self_attn: every layer is a joint self-attention
    )
    n_obs_steps: int = 1  # frames seen; SmolVLA knows 1 only
    chunk_size: int = 50  # S
    n_action_steps: int = 50  # actions that a robot executes of a chunk, written to final_hf for LeRobot's queue
    num_steps: int = 10  # Euler steps of sampling
    max_state_dim: int = 32  # states are padded with zeros to this
    max_action_dim: int = 32  # A
    resize_imgs_with_padding: list[int] = field(default_factory=lambda: [512, 512])  # width, height in pixels, a square
    tokenizer_max_length: int = 48  # L
    min_period: float = 0.004  # of the time embedding
    max_period: float = 4.0  # of the time embedding
    freeze_vision_encoder: bool = True  # the vision tower keeps its weights
    train_expert_only: bool = True  # the whole VLM keeps its weights
    train_state_proj: bool = True  # false: the state's projection keeps its weights


@dataclass
class TrainingConfig:
    steps: int = 30000  # optimizer steps
    batch_size: int = 16  # samples per GPU and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    pin_memory: bool = True  # page-locked batches (CUDA)
    log_freq: int = 100  # optimizer steps
    save_freq: int = 2000  # optimizer steps
    keep_checkpoints: int = 0  # newest checkpoint_step_N.pt kept beside the best; 0: all
    lambda_temporal: float = 0.1  # weight of the smoothness of the predicted clean actions; 0: plain SmolVLA
    loss_spike_threshold: float = 10.0  # a loss above this times the mean of the last 100 is recorded
    loss_dims: Literal["all", "real"] = (
        "all"  # all: flow loss over A dims, as LeRobot's sampler expects; real: padded dims untrained, pinned when sampling
    )
    use_bfloat16: bool = True  # bf16 autocast on CUDA, frozen weights bf16; trained weights are fp32 in any case
    use_amp: bool = False  # fp16 autocast: refused, use_bfloat16 does the same without loss scaling
    use_torch_compile: bool = False  # compile the model's forward
    feature_cache: str | None = (
        None  # folder for image features of a frozen VLM: computed once, then no image is decoded again
    )
    ema_decay: float = (
        0.0  # moving average of the trained weights, used by validation and export; 0: off, 0.999 is usual
    )


@dataclass
class ValidationConfig:
    enable: bool = True  # hold episodes out
    num_episodes: int = 20  # how many, drawn with the seed
    val_freq: int = 2000  # optimizer steps
    num_samples: int = 256  # their frames used, evenly spread


@dataclass
class OptimizerConfig:
    lr: float = 1e-4  # peak, AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 1e-10  # decoupled
    grad_clip_norm: float = 10.0  # largest gradient norm; 0: no clipping


@dataclass
class SchedulerConfig:
    num_warmup_steps: int = 1000  # optimizer steps of linear warm-up
    num_decay_steps: int = 30000  # optimizer step at which the cosine ends
    peak_lr: float = 1e-4  # with decay_lr: the cosine ends at optimizer.lr * decay_lr / peak_lr
    decay_lr: float = 2.5e-6


@dataclass
class WandbConfig:
    enable: bool = False  # log to Weights & Biases
    project: str = "smolvla-meca500-insertion-sim"
    entity: str | None = None  # W&B team or user
    name: str | None = None  # run name; null: smolvla_sim_DATE_TIME
    tags: list[str] = field(default_factory=list)
    notes: str = ""  # free text beside the run
    mode: Literal["online", "offline"] = "online"  # online falls back to offline when nobody is logged in


@dataclass
class Config:
    output_dir: str = "outputs/train/smolvla_needle_insertion_sim"  # checkpoints and logs
    seed: int = 1000  # of split, order, noise, augmentation and new weights
    train: Literal["full", "lora"] = (
        "full"  # what policy.freeze_* and train_* leave free: its weights, or LoRA on its projections (heads stay full)
    )
    lora_rank: int = 16  # with train: lora
    lora_alpha: int = 32  # with train: lora; scale = alpha / rank
    lora_dropout: float = 0.0  # with train: lora
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    resume: str | None = (
        None  # checkpoint_step_N.pt, or "auto" for the newest one in output_dir; of another data set: like init_from
    )
    reset_scheduler: bool = False  # with resume: keep weights and moments, start the schedule (warm-up) again
    init_from: str | None = (
        None  # new run from these weights: a .pt, a final_hf or other LeRobot policy directory, or a hub id
    )
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = {"max_steps": "training.steps", "resume_from_checkpoint": "resume"}


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    t, p, given = cfg.training, cfg.policy, flat(dataclasses.asdict(cfg))
    ones = (
        "training.steps",
        "training.batch_size",
        "training.gradient_accumulation_steps",
        "training.log_freq",
        "training.save_freq",
        "validation.val_freq",
        "validation.num_samples",
        "policy.num_steps",
    )
    for wrong, message in (
        *((given[key] < 1, f"{key} is {given[key]}: expected 1 or more") for key in ones),
        (
            t.use_amp,
            "training.use_amp is true: fp16 is not offered. Use training.use_bfloat16: true, the same speed without loss scaling",
        ),
        (p.n_obs_steps != 1, f"policy.n_obs_steps is {p.n_obs_steps}: SmolVLA sees 1 frame"),
        (
            cfg.dataset.horizon != p.chunk_size,
            f"dataset.horizon is {cfg.dataset.horizon}, policy.chunk_size is {p.chunk_size}: expected the same number",
        ),
        (
            not 1 <= p.n_action_steps <= p.chunk_size,
            f"policy.n_action_steps is {p.n_action_steps}: expected 1..{p.chunk_size} (policy.chunk_size)",
        ),
        (not 0 <= t.ema_decay < 1, f"training.ema_decay is {t.ema_decay}: expected 0 (off) to below 1"),
        (t.lambda_temporal < 0, f"training.lambda_temporal is {t.lambda_temporal}: expected 0 or more"),
        (
            t.feature_cache and (cfg.dataset.augment or not p.train_expert_only),
            "training.feature_cache needs policy.train_expert_only: true (a frozen VLM) and dataset.augment: false",
        ),
        (
            cfg.resume and cfg.init_from,
            f"--resume {cfg.resume} continues a run, --init_from {cfg.init_from} starts one: give one of them",
        ),
        (
            cfg.reset_scheduler and not cfg.resume,
            "--reset_scheduler restarts the schedule of a resumed run: add --resume CHECKPOINT",
        ),
    ):
        if wrong:
            raise ValueError(message)


def flat(tree, prefix=""):
    """Nested config dict -> {"optimizer.lr": ...}"""
    return {
        k2: v2
        for k, v in tree.items()
        for k2, v2 in (
            flat(v, f"{prefix}{k}.") if isinstance(v, dict) and k != "weights" else {f"{prefix}{k}": v}
        ).items()
    }


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class DataSpec:
    """What one row of data means; in every checkpoint, compared when a run is resumed."""

    cameras: list  # recorded names in policy order: camera1, camera2, ...
    image_shapes: list  # [height, width] as recorded, per camera
    state_keys: list  # of ["qpos", "ee_pose"], in this order
    state_dim: int
    action_definition: dict  # common.episodes.ActionDefinition
    joint_unit: (
        str | None
    )  # "rad" or "deg" if the action is a target for qpos, so that standing still is the present qpos
    position_unit: str | None  # of ee_pose deltas, for reports
    normalization: str  # MEAN_STD, MIN_MAX, QUANTILES or IDENTITY
    task_instruction: str
    loss_dims: str  # real: padded action dims were not trained, sampling keeps them at t * noise, which is exact

    @property
    def action_dim(self):
        return self.action_definition["dim"]

    @property
    def definition(self):
        return ep.ActionDefinition(**self.action_definition)


@dataclass
class Data:
    """Episodes of a run, split and described."""

    episodes: list  # all usable ones, sorted by path: episode_index counts these
    train: list  # indices into episodes
    validation: list  # indices into episodes
    excluded: list  # messages of files left out by skip_bad_episodes
    spec: DataSpec
    stats: dict
    fingerprint: str  # changes when the training samples or their order would


def load_data(cfg, rank=0, saved=None):
    """Find, read, split and describe the episodes. `saved`: a checkpoint, whose statistics are kept where it was trained on these very episodes; else
    they come from normalization.stats_file or the training episodes."""
    d, p, n = cfg.dataset, cfg.policy, cfg.normalization
    progress = (
        None if rank else lambda paths: tqdm(paths, desc="reading episodes", unit="file", disable=None, leave=False)
    )
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes, progress)
    train, validation = ep.hold_out_random(found, cfg.validation.num_episodes if cfg.validation.enable else 0, cfg.seed)
    known, first = list(found[0].cameras), found[0]
    cameras = [
        known[int(c[6:]) - 1]
        if c not in known and re.fullmatch(r"camera[1-9]\d*", c) and int(c[6:]) <= len(known)
        else c
        for c in d.cameras
    ]
    if not cameras or len(set(cameras)) != len(cameras) or set(cameras) - set(known):
        raise ValueError(
            f"dataset.cameras is {d.cameras}; expected one or more of {', '.join(known)} (or camera1..camera{len(known)} in this order), each once"
        )
    state_keys = [k for k, use in (("qpos", d.use_qpos), ("ee_pose", d.use_ee_pose)) if use]
    if not state_keys or any(getattr(first, k) is None for k in state_keys):
        there = [k for k in ("qpos", "ee_pose") if getattr(first, k) is not None]
        raise ValueError(
            f"the state is made of {state_keys or 'nothing'} (dataset.use_qpos, dataset.use_ee_pose); {first.path} has {there or 'neither'}"
        )
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    state_dim = sum(getattr(first, k).shape[1] for k in state_keys)
    for what, dim, most in (("state", state_dim, p.max_state_dim), ("action", definition.dim, p.max_action_dim)):
        if dim > most:
            raise ValueError(
                f"the {what} has {dim} dims, policy.max_{what}_dim is {most}: raise it (a pretrained policy cannot be used then), or choose fewer"
            )
    # a joint target: qpos tells more about it than its own mean does
    joints = (
        definition.source == "action"
        and first.qpos is not None
        and first.qpos.shape == first.action.shape
        and np.abs(first.action - first.qpos).mean() < 0.5 * np.abs(first.action - first.action.mean(0)).mean()
    )
    joint_unit = None if not joints else "deg" if max(np.abs(e.qpos).max() for e in found) > 2 * np.pi + 1e-3 else "rad"
    reader = ep.ImageReader()
    spec = DataSpec(
        cameras,
        [list(reader.read(first, c, 0).shape[:2]) for c in cameras],
        state_keys,
        state_dim,
        dataclasses.asdict(definition),
        joint_unit,
        ep.detect_position_unit(found),
        n.mode if n.enable else "IDENTITY",
        d.task_instruction,
        cfg.training.loss_dims,
    )
    held_out = [found[i].name for i in validation]
    fingerprint = hashlib.sha256(
        json.dumps([[found[i].name, found[i].num_frames] for i in train]).encode()
    ).hexdigest()[:16]
    if saved and saved.get("fingerprint") == fingerprint:
        stats = saved["normalization_stats"]
    elif n.enable and n.stats_file:
        stats = load_stats(n.stats_file, ("action", "observation.state"), spec.action_definition, held_out)
    else:
        stats = ep.insertion_stats([found[i] for i in train], definition, held_out, state_keys)
    for key, dim in (("action", definition.dim), ("observation.state", state_dim)):
        if len(stats[key]["mean"]) != dim:
            raise ValueError(
                f"the statistics have {len(stats[key]['mean'])} dims for '{key}', the data has {dim}. Make them again: bash shells/compute_dataset_stats_sim.sh"
            )
    return Data(found, train, validation, excluded, spec, stats, fingerprint)


class Normalizer:
    """(..., D) in data units <-> float32 in training units, by one of LeRobot's modes; nothing is clipped. A dimension that never moves becomes 0 and comes
    back as its constant."""

    USED = dict(MEAN_STD=("mean", "std"), MIN_MAX=("min", "max"), QUANTILES=("q01", "q99"), IDENTITY=("mean", "mean"))

    def __init__(self, entry, mode):
        if missing := [name for name in self.USED[mode] if name not in entry]:
            raise ValueError(
                f"the statistics lack '{missing[0]}', which normalization.mode {mode} needs; they have {sorted(entry)}"
            )
        a, b = (np.asarray(entry[name], np.float64) for name in self.USED[mode])
        if mode == "QUANTILES" and "min" in entry:  # where only a rare jump moves, min and max keep it alive
            a, b = np.where(a == b, entry["min"], a), np.where(a == b, entry["max"], b)
        self.mode, self.center, self.half = (
            mode,
            a if mode == "MEAN_STD" else (a + b) / 2,
            b if mode == "MEAN_STD" else (b - a) / 2,
        )
        untouched = ~np.asarray(entry.get("mask", np.ones(len(a))), bool) | (mode == "IDENTITY")
        self.center, self.half = np.where(untouched, 0.0, self.center), np.where(untouched, 1.0, self.half)
        self.constant = self.half <= 1e-7 * np.abs(self.center)  # float32 noise around a constant is no motion

    def normalize(self, x):
        return np.where(self.constant, 0.0, (x - self.center) / np.where(self.constant, 1.0, self.half)).astype(
            np.float32
        )

    def unnormalize(self, y):
        return np.where(self.constant, self.center, np.asarray(y, np.float64) * self.half + self.center).astype(
            np.float32
        )


def content_size(height, width, side):
    """(h, w) of a picture scaled into a square of `side` pixels, as LeRobot rounds it."""
    ratio = max(width / side, height / side)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(images, side):
    """(n, 3, h, w) in [0, 1] -> (n, 3, side, side) in [-1, 1]: aspect kept, bilinear, padding on the left and on top. The one image preprocessing
    of training and predict, on the model's device."""
    h, w = content_size(*images.shape[-2:], side)
    if images.shape[-2:] != (side, side):
        images = F.pad(
            F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False), (side - w, 0, side - h, 0)
        )
    return images * 2 - 1


def read_images(reader, episode, spec, t, side):
    """-> list of K (h, w, 3) uint8; a JPEG is decoded no larger than needed."""
    return [
        reader.read(episode, c, t, at_least=content_size(*shape, side))
        for c, shape in zip(spec.cameras, spec.image_shapes)
    ]


def augment_image(image, cfg, rng):
    """(h, w, 3) uint8 -> the same: contrast and brightness, hue and saturation, noise."""
    alpha, beta = (
        1 + rng.uniform(-cfg.augment_contrast, cfg.augment_contrast),
        rng.uniform(-cfg.augment_brightness, cfg.augment_brightness) * 255,
    )
    hsv = np.asarray(Image.fromarray(np.clip(image * alpha + beta, 0, 255).astype(np.uint8)).convert("HSV")).astype(
        np.float32
    )
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-cfg.augment_hue, cfg.augment_hue) * 256) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + rng.uniform(-cfg.augment_saturation, cfg.augment_saturation)), 0, 255)
    image = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    return np.clip(
        image + rng.standard_normal(image.shape, dtype=np.float32) * (cfg.augment_noise * 255), 0, 255
    ).astype(np.uint8)


class SmolVLADataset(Dataset):
    """One item per frame that has a target. Item (position, i), where `position` seeds noise, flow time and augmentation:

    images list of K (h, w, 3) uint8, or features (K, T, D) of the cache | state (state_dim,), action (S, action_dim) float32 in data units | is_pad (S,) bool:
    past the episode's end | noise (S, A) float32 ~ N(0, 1), time float ~ 0.001 + 0.999 Beta(1.5, 1) | instruction str | name (episode_index, episode, frame)
    """

    def __init__(self, data, which, cfg, augment=False, cache=None):
        self.spec, self.cfg, self.augment, self.cache = data.spec, cfg, augment, cache
        self.which, self.episodes = list(which), [data.episodes[i] for i in which]
        self.targets = [data.spec.definition.targets(e) for e in self.episodes]
        self.states = [ep.robot_state(e, data.spec.state_keys) for e in self.episodes]
        self.hold = "zero" if data.spec.definition.source == "ee_pose_delta" else "repeat"
        self.ends = np.cumsum([len(t) for t in self.targets])
        self.reader = ep.ImageReader()

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i):
        """Sample -> (episode number within this part, frame)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def sample_weights(self):
        """dataset.weights {subfolder: share} -> (len,) weight per sample, None without weights."""
        weights = self.cfg.dataset.weights
        if not weights:
            return None
        folder = [
            next((k for k in weights if e.name.startswith(str(k).rstrip("/") + "/")), None) for e in self.episodes
        ]
        frames = {k: sum(len(t) for f, t in zip(folder, self.targets) if f == k) for k in (*weights, None)}
        if frames[None] or not all(frames[k] and float(weights[k]) > 0 for k in weights):
            raise ValueError(
                f"dataset.weights is {weights}: every training episode must lie in one of these subfolders, every subfolder must have episodes, every share be "
                f"above 0; frames found: { {str(k): v for k, v in frames.items()} }"
            )
        return np.repeat([float(weights[f]) / frames[f] for f in folder], [len(t) for t in self.targets])

    def __getitem__(self, key):
        position, i = key
        e, t = self.locate(i)
        episode, p, rng = self.episodes[e], self.cfg.policy, generator_at(self.cfg.seed, position, "noise")
        action, is_pad = ep.action_chunk(self.targets[e], t, p.chunk_size, self.hold)
        item = dict(
            state=self.states[e][t],
            action=action,
            is_pad=is_pad,
            noise=rng.standard_normal((p.chunk_size, p.max_action_dim), dtype=np.float32),
            time=0.001 + 0.999 * rng.beta(1.5, 1.0),
            instruction=episode.instruction or self.spec.task_instruction,
            name=(self.which[e], episode.name, t),
        )
        if self.cache is not None:
            return item | dict(features=self.cache.read(episode, t))
        images = read_images(self.reader, episode, self.spec, t, p.resize_imgs_with_padding[0])
        if self.augment:
            rng = generator_at(self.cfg.seed, position, "augment")
            images = [augment_image(image, self.cfg.dataset, rng) for image in images]
        return item | dict(images=images)


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    def __init__(self, tokenizer, policy, spec, stats):
        self.tokenizer, self.policy, self.spec, self.stats, self._tokens = tokenizer, policy, spec, stats, {}
        self.state, self.action = (
            Normalizer(stats["observation.state"], spec.normalization),
            Normalizer(stats["action"], spec.normalization),
        )

    def tokens(self, text):
        """Instruction -> (ids, mask) of length L; the text ends with a newline, as in LeRobot's preprocessor."""
        if text not in self._tokens:
            out = self.tokenizer(
                text if text.endswith("\n") else text + "\n",
                padding="max_length",
                max_length=self.policy.tokenizer_max_length,
                truncation=True,
                padding_side="right",
            )
            self._tokens[text] = (out["input_ids"], out["attention_mask"])
        return self._tokens[text]

    def inputs(self, observations):
        """images, see stack_images, of the B*K pictures; or features (B, K, T, D) | tokens, token_mask (B, L) |
        state (B, max_state_dim) normalised, zero-padded."""
        tokens = [self.tokens(o.get("instruction") or self.spec.task_instruction) for o in observations]
        batch = dict(
            tokens=torch.tensor([ids for ids, _ in tokens]),
            token_mask=torch.tensor([mask for _, mask in tokens], dtype=torch.bool),
            state=pad_last(
                self.state.normalize(np.stack([np.asarray(o["state"]) for o in observations])),
                self.policy.max_state_dim,
            ),
        )
        if "features" in observations[0]:
            return batch | dict(features=torch.stack([o["features"] for o in observations]))
        return batch | dict(images=stack_images([image for o in observations for image in o["images"]]))

    def __call__(self, items):
        """List of dataset items -> inputs() plus action, noise (B, S, A), time (B,), is_pad (B, S), and the items' names."""
        stack = lambda key: np.stack([item[key] for item in items])
        return self.inputs(items) | dict(
            action=pad_last(self.action.normalize(stack("action")), self.policy.max_action_dim),
            noise=torch.from_numpy(stack("noise")),
            time=torch.from_numpy(stack("time")).float(),
            is_pad=torch.from_numpy(stack("is_pad")),
            names=[item["name"] for item in items],
        )


def stack_images(pictures):
    """list of (h, w, 3) arrays -> [(rows (n,), (n, h, w, 3))], one group per size."""
    groups = {}
    for row, image in enumerate(pictures):
        groups.setdefault((image.shape, image.dtype), []).append(row)
    return [(torch.tensor(rows), torch.from_numpy(np.stack([pictures[r] for r in rows]))) for rows in groups.values()]


def pad_last(array, dim):
    """(..., d) float32 array -> (..., dim) tensor, zeros at the end."""
    return F.pad(torch.from_numpy(np.ascontiguousarray(array, np.float32)), (0, dim - array.shape[-1]))


def to_device(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items() if k != "names"}
    return [tuple(to_device(v, device) for v in group) for group in value]  # the groups of images


# ---- model -----------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope(x, positions):
    """(B, heads, n, d) turned by positions (B or 1, n): half-split rotation, computed in fp32."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None].float() / ROPE_BASE ** (
        torch.arange(half, device=x.device, dtype=torch.float32) / half
    )
    x1, x2 = x.float().split(half, dim=-1)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1).to(x.dtype)


def attend(q, k, v, mask=None):
    """(B, heads, n, d) x (B, kv_heads, m, d) -> (B, n, heads * d); mask (B or 1, 1, n or 1, m), True may be seen."""
    repeat = q.shape[1] // k.shape[1]  # written out: the fast kernels with a mask know no grouped heads
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    out = F.scaled_dot_product_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), None if mask is None else mask.expand(-1, -1, q.shape[2], -1)
    )
    return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """The parts of one Llama layer. VLM and expert wire them differently, see FlowModel."""

    def __init__(self, width, mlp, text, kv_in=None):
        super().__init__()
        linear, self.head_dim = lambda i, o: nn.Linear(i, o, bias=False), text.head_dim
        q_out, kv_out = text.num_attention_heads * self.head_dim, text.num_key_value_heads * self.head_dim
        self.self_attn = nn.ModuleDict(
            dict(
                q_proj=linear(width, q_out),
                k_proj=linear(kv_in or width, kv_out),
                v_proj=linear(kv_in or width, kv_out),
                o_proj=linear(q_out, width),
            )
        )
        self.mlp = nn.ModuleDict(
            dict(gate_proj=linear(width, mlp), up_proj=linear(width, mlp), down_proj=linear(mlp, width))
        )
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(width, text.rms_norm_eps),
            RMSNorm(width, text.rms_norm_eps),
        )

    def split(self, name, x):
        """Projection `name` of x (B, n, width) -> (B, heads, n, head_dim)."""
        return self.self_attn[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def finish(self, x, attended):
        x = x + self.self_attn.o_proj(attended)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class VisionLayer(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps),
            nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps),
        )
        self.self_attn = nn.ModuleDict(
            {name: nn.Linear(v.hidden_size, v.hidden_size) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        self.mlp, self.heads = (
            nn.ModuleDict(
                dict(
                    fc1=nn.Linear(v.hidden_size, v.intermediate_size), fc2=nn.Linear(v.intermediate_size, v.hidden_size)
                )
            ),
            v.num_attention_heads,
        )

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (
            self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        x = x + self.self_attn.out_proj(attend(q, k, v))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


def expert_attention(vlm, p):
    """-> per expert layer: True for joint self-attention, False for cross-attention to the prefix. Refuses sizes that SmolVLA does not have."""
    v, t, side = vlm.vision_config, vlm.text_config, p.resize_imgs_with_padding
    if (
        v.hidden_act != "gelu_pytorch_tanh"
        or t.hidden_act != "silu"
        or getattr(t, "attention_bias", False)
        or getattr(t, "mlp_bias", False)
    ):
        raise ValueError(
            f"'{p.vlm_model_name}' has activations {v.hidden_act}/{t.hidden_act} or biases that SmolVLM2 does not have; expected gelu_pytorch_tanh/silu without biases"
        )
    if not 1 <= p.num_vlm_layers <= t.num_hidden_layers:
        raise ValueError(f"policy.num_vlm_layers is {p.num_vlm_layers}: '{p.vlm_model_name}' has {t.num_hidden_layers}")
    unit = v.patch_size * vlm.scale_factor
    if len(side) != 2 or side[0] != side[1] or side[0] % unit or not unit <= side[0] <= v.image_size:
        raise ValueError(
            f"policy.resize_imgs_with_padding is {side}: expected a square in multiples of {unit} (patch x shuffle) up to {v.image_size}, e.g. [{v.image_size}, {v.image_size}]"
        )
    count = p.num_expert_layers if p.num_expert_layers > 0 else p.num_vlm_layers
    joint = lambda layer: (
        p.attention_mode == "self_attn" or (p.self_attn_every_n_layers > 0 and layer % p.self_attn_every_n_layers == 0)
    )
    # LeRobot shapes an expert layer by its own number and uses it by the number of its VLM layer: both must say the same
    if p.num_vlm_layers % count or any(joint(e) != joint(e * p.num_vlm_layers // count) for e in range(count)):
        raise ValueError(
            f"policy.num_expert_layers is {p.num_expert_layers} with {p.num_vlm_layers} VLM layers: it must divide them, and leave self- and cross-attention layers "
            f"(self_attn_every_n_layers {p.self_attn_every_n_layers}) in their places, e.g. {p.num_vlm_layers}"
        )
    return [joint(e) for e in range(count)]


class FlowModel(nn.Module):
    """The network, with LeRobot's parameter names (its VLAFlowMatching). Image and text tokens attend to each other but never to the state token, and
    neither attends to the noisy actions; so the prefix is run in two parts and then the actions, each on the keys and values of what came before.
    Where the VLM is frozen autograd therefore records nothing of images and text, and sampling runs the prefix once: both without a second code path."""

    def __init__(self, vlm_config, p):
        super().__init__()
        v, t, self.config, self.policy = vlm_config.vision_config, vlm_config.text_config, vlm_config, p
        self.joint = expert_attention(vlm_config, p)
        self.stride = p.num_vlm_layers // len(self.joint)
        self.last_used = (len(self.joint) - 1) * self.stride  # of this VLM layer only keys and values are needed
        D, W = t.hidden_size, int(t.hidden_size * p.expert_width_multiplier)
        vision = nn.Module()
        positions = nn.Embedding((v.image_size // v.patch_size) ** 2, v.hidden_size)
        vision.embeddings = nn.ModuleDict(
            dict(patch_embedding=nn.Conv2d(3, v.hidden_size, v.patch_size, v.patch_size), position_embedding=positions)
        )
        vision.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(VisionLayer(v) for _ in range(v.num_hidden_layers))))
        vision.post_layernorm = nn.LayerNorm(v.hidden_size, eps=v.layer_norm_eps)
        connector = nn.ModuleDict(
            dict(
                modality_projection=nn.ModuleDict(
                    dict(proj=nn.Linear(v.hidden_size * vlm_config.scale_factor**2, D, bias=False))
                )
            )
        )
        layers = nn.ModuleList(Layer(D, t.intermediate_size, t) for _ in range(p.num_vlm_layers))
        text = nn.ModuleDict(
            dict(embed_tokens=nn.Embedding(t.vocab_size, D), norm=RMSNorm(D, t.rms_norm_eps), layers=layers)
        )
        vlm = nn.ModuleDict(
            dict(
                model=nn.ModuleDict(dict(vision_model=vision, connector=connector, text_model=text)),
                lm_head=nn.Linear(D, t.vocab_size, bias=False),
            )
        )
        mlp, kv = (
            -(-4 * int(2 * W / 3) // 256) * 256,
            t.num_key_value_heads * t.head_dim,
        )  # Llama's rule: 8/3 of the width, rounded up to 256
        expert = nn.ModuleDict(
            dict(
                layers=nn.ModuleList(Layer(W, mlp, t, None if joint else kv) for joint in self.joint),
                norm=RMSNorm(W, t.rms_norm_eps),
            )
        )
        self.vlm_with_expert = nn.ModuleDict(dict(vlm=vlm, lm_expert=expert))
        self.state_proj, self.action_in_proj, self.action_out_proj = (
            nn.Linear(p.max_state_dim, D),
            nn.Linear(p.max_action_dim, W),
            nn.Linear(W, p.max_action_dim),
        )
        self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * W, W), nn.Linear(W, W)

    def embed_images(self, images):
        """(n, 3, side, side) in [-1, 1] -> (n, T, D)."""
        vlm, f = self.vlm_with_expert.vlm.model, self.config.scale_factor
        x = vlm.vision_model.embeddings.patch_embedding(images)  # (n, width, rows, rows)
        rows, table = x.shape[-1], self.config.vision_config.image_size // self.config.vision_config.patch_size
        place = (
            torch.arange(rows, device=x.device) * table // rows
        )  # a smaller picture uses every table/rows-th position of each axis, as transformers does
        x = x.flatten(2).transpose(1, 2) + vlm.vision_model.embeddings.position_embedding(
            (place[:, None] * table + place).flatten()
        )
        for layer in vlm.vision_model.encoder.layers:
            x = layer(x)
        x = vlm.vision_model.post_layernorm(x)  # token (i, j) <- f x f patches, row by row, channels fastest
        return vlm.connector.modality_projection.proj(
            x.unflatten(1, (rows // f, f, rows // f, f)).transpose(2, 3).flatten(3).flatten(1, 2)
        )

    def vlm_layers(self, x, positions, mask, past=None):
        """Tokens x (B, n, D) through the VLM's text layers, after `past` -> per layer keys (RoPE applied) and values (B, kv_heads, n + past, d)."""
        kv = []
        for i, layer in enumerate(self.vlm_with_expert.vlm.model.text_model.layers[: self.last_used + 1]):
            y = layer.input_layernorm(x)
            k, v = rope(layer.split("k_proj", y), positions), layer.split("v_proj", y)
            if past is not None:
                k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
            if i < self.last_used:
                x = layer.finish(x, attend(rope(layer.split("q_proj", y), positions), k, v, mask))
            kv.append((k, v))
        return kv

    def prefix(self, features, tokens, token_mask, state):
        """features (B, K*T, D), tokens and token_mask (B, L), state (B, max_state_dim) -> (valid (B, N), per expert layer keys and values)."""
        text = self.vlm_with_expert.vlm.model.text_model.embed_tokens(tokens)
        x = torch.cat([features.to(text.dtype), text], dim=1) * math.sqrt(
            text.shape[-1]
        )  # the state below is not scaled
        valid = torch.cat([token_mask.new_ones(features.shape[:2]), token_mask, token_mask.new_ones(len(x), 1)], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        kv = self.vlm_layers(
            x, positions[:, :-1], valid[:, None, None, :-1]
        )  # padded text is never seen; what it computes itself is never read
        kv = self.vlm_layers(
            self.state_proj(state)[:, None].to(x.dtype), positions[:, -1:], valid[:, None, None], past=kv
        )[:: self.stride]
        for e, layer in enumerate(self.vlm_with_expert.lm_expert.layers):
            if not self.joint[e]:  # projected again by the expert, no further RoPE
                kv[e] = tuple(
                    layer.split(name, z.transpose(1, 2).flatten(2)) for name, z in zip(("k_proj", "v_proj"), kv[e])
                )
        return valid, kv

    def velocity(self, prefix, x_t, t):
        """Noisy actions x_t (B, S, A) at flow time t (B,) -> v (B, S, A) fp32."""
        (valid, kv), steps = prefix, torch.arange(x_t.shape[1], device=x_t.device)[None]
        x = self.action_in_proj(x_t)  # (B, S, W)
        period = self.policy.min_period * (self.policy.max_period / self.policy.min_period) ** torch.linspace(
            0, 1, x.shape[-1] // 2, dtype=torch.float64, device=t.device
        )
        angle = 2 * math.pi / period * t.double()[:, None]
        tau = torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)[:, None].expand_as(x)
        x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([x, tau], dim=2)))).float()
        causal = (steps.T >= steps)[None, None].expand(
            len(x), -1, -1, -1
        )  # an action sees the prefix, itself and the actions before it
        joint_mask = torch.cat([valid[:, None, None].expand(-1, -1, x.shape[1], -1), causal], dim=3)
        positions = valid.sum(1, keepdim=True) + steps
        for joint, layer, (k, v) in zip(self.joint, self.vlm_with_expert.lm_expert.layers, kv):
            y = layer.input_layernorm(x)
            if joint:
                k, v = (
                    torch.cat([k, rope(layer.split("k_proj", y), positions).to(k.dtype)], dim=2),
                    torch.cat([v, layer.split("v_proj", y).to(v.dtype)], dim=2),
                )
            x = layer.finish(
                x,
                attend(
                    rope(layer.split("q_proj", y), positions if joint else steps),
                    k,
                    v,
                    joint_mask if joint else valid[:, None, None],
                ),
            )
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(self.vlm_with_expert.lm_expert.norm(x).float())


class SmolVLA(nn.Module):
    """FlowModel seen from a batch of this script. forward(batch) is the loss, sample(batch, noise) the actions."""

    def __init__(self, vlm_config, policy, action_dim, loss_dims="all", lambda_temporal=0.0):
        super().__init__()
        self.model, self.policy, self.action_dim, self.loss_dims, self.lambda_temporal = (
            FlowModel(vlm_config, policy),
            policy,
            action_dim,
            loss_dims,
            lambda_temporal,
        )

    def features(self, images, rows_per_sample):
        """Collate's groups of images -> (B, K*T, D)."""
        pictures = [p.permute(0, 3, 1, 2).float() / (255 if p.dtype == torch.uint8 else 1) for _, p in images]
        x = torch.cat([resize_with_pad(p, self.policy.resize_imgs_with_padding[0]) for p in pictures])[
            torch.cat([rows for rows, _ in images]).argsort()
        ]
        weight = self.model.vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding.weight
        return self.model.embed_images(x.to(weight.dtype)).unflatten(0, (-1, rows_per_sample)).flatten(1, 2)

    def prefix(self, batch):
        cached = batch.get("features")
        features = (
            cached.flatten(1, 2)
            if cached is not None
            else self.features(batch["images"], sum(len(rows) for rows, _ in batch["images"]) // len(batch["tokens"]))
        )
        return self.model.prefix(features, batch["tokens"], batch["token_mask"], batch["state"])

    def forward(self, batch):
        """-> sums over the unpadded steps of the batch, to be divided by the caller's global counts: flow_sum () over the dims that are trained |
        real_sum () over the real dims | temporal_sum () of squared jumps of the clean-action estimate, over real dims and pairs of unpadded steps |
        sample_loss (B,) each sample's own loss | dims, how many flow_sum counts.

        x_t = t eps + (1 - t) a, target u = eps - a. The clean-action estimate is x_t - t v, so the temporal loss has a gradient.
        """
        a, noise, t, real = batch["action"], batch["noise"], batch["time"][:, None, None], ~batch["is_pad"]
        x_t = t * noise + (1 - t) * a
        v = self.model.velocity(self.prefix(batch), x_t, batch["time"])
        error = (noise - a - v).square() * real[..., None]  # (B, S, A): a padded step teaches nothing
        clean = (x_t - t * v)[..., : self.action_dim]
        jump = (clean[:, 1:] - clean[:, :-1]).square() * real[
            :, 1:, None
        ]  # padding is at the end: a real step has a real one before it
        dims = error.shape[-1] if self.loss_dims == "all" else self.action_dim
        flow, temporal, steps, pairs = error[..., :dims].sum((1, 2)), jump.sum((1, 2)), real.sum(1), real[:, 1:].sum(1)
        sample = flow / (steps * dims) + self.lambda_temporal * temporal / (pairs * self.action_dim).clamp(min=1)
        return dict(
            flow_sum=flow.sum(),
            real_sum=error[..., : self.action_dim].sum(),
            temporal_sum=temporal.sum(),
            sample_loss=sample.detach(),
            dims=dims,
        )

    @torch.no_grad()
    def sample(self, batch, noise):
        """Normalised actions (B, S, action_dim): Euler steps from noise (B, S, A) at t = 1 to t = 0."""
        prefix, x, n = self.prefix(batch), noise, self.policy.num_steps
        for step in range(n):
            t = 1 - step / n
            if self.loss_dims == "real":  # what training saw in the dims that it did not train
                x = torch.cat([x[..., : self.action_dim], t * noise[..., self.action_dim :]], dim=-1)
            x = x - self.model.velocity(prefix, x, torch.full((len(x),), t, device=x.device)) / n
        return x[..., : self.action_dim]


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, collate, autocast=None):
        self.model, self.collate, self.spec, self.stats, self.autocast = (
            model,
            collate,
            collate.spec,
            collate.stats,
            autocast,
        )

    def predict(self, observations, noise=None):
        """list of {images: {camera1: (h, w, 3) uint8 RGB or float in [0, 1], ...}, state: (state_dim,) in data units, instruction: str} -> (B, S, action_dim)
        float32 in data units (joint targets: rad, as recorded). `noise` (B, S, A): start of the sampling; default: the same draw for every
        observation and call, so that equal observations give equal actions."""
        wanted = [f"camera{k + 1}" for k in range(len(self.spec.cameras))]
        for o in observations:
            if missing := [c for c in wanted if c not in o["images"]]:
                raise ValueError(
                    f"the observation has images of {sorted(o['images'])}, the policy needs {missing[0]} = {self.spec.cameras[wanted.index(missing[0])]}"
                )
            if np.shape(o["state"]) != (self.spec.state_dim,):
                raise ValueError(
                    f"the observation's state has shape {np.shape(o['state'])}, the policy needs ({self.spec.state_dim},): {' and '.join(self.spec.state_keys)}"
                )
        return self.decode(
            self.collate.inputs([o | dict(images=[np.asarray(o["images"][c]) for c in wanted]) for o in observations]),
            noise,
        )

    def decode(self, batch, noise=None):
        """Collate.inputs' batch -> (B, S, action_dim) float32 in data units."""
        device, p = next(self.model.parameters()).device, self.collate.policy
        if noise is None:
            noise = torch.randn(1, p.chunk_size, p.max_action_dim, generator=torch.Generator().manual_seed(0)).expand(
                len(batch["tokens"]), -1, -1
            )
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            actions = self.model.sample(to_device(batch, device), torch.as_tensor(noise).to(device))
        return self.collate.action.unnormalize(actions.float().cpu().numpy())

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per episode {name, sample: callable(t) -> observation, target (M, A), hold (M, A): the action that stands still,
        phase (M,) or None}, in data units."""
        found, _ = ep.load_episodes(root)
        if unknown := sorted(set(names or []) - {e.name for e in found}):
            raise ValueError(
                f"'{root}' has no episode '{unknown[0]}'; it has {', '.join(e.name for e in found[:5])}, ..."
            )
        if wrong := [c for c in self.spec.cameras if c not in found[0].cameras]:
            raise ValueError(f"'{root}' has cameras {list(found[0].cameras)}, the policy needs '{wrong[0]}'")
        definition, reader = self.spec.definition, ep.ImageReader()
        for e in found:
            if names is not None and e.name not in names:
                continue
            target, states = definition.targets(e), ep.robot_state(e, self.spec.state_keys)

            def sample(t, e=e, states=states):
                images = read_images(reader, e, self.spec, t, self.collate.policy.resize_imgs_with_padding[0])
                return dict(
                    images={f"camera{k + 1}": image for k, image in enumerate(images)},
                    instruction=e.instruction,
                    state=states[t],
                )

            # standing still: the joints or the pose where they are, if the recorded action is a target near them, else no motion
            still = np.zeros_like(target)
            for where in (e.qpos, e.ee_pose) if definition.source == "action" else ():
                if (
                    where is not None
                    and where.shape == target.shape
                    and np.abs(target - where).mean() < np.abs(target).mean()
                ):
                    still = where
                    break
            yield dict(
                name=e.name,
                sample=sample,
                target=target,
                hold=still,
                phase=None if e.phase is None else e.phase[: len(target)],
            )

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        s = self.spec
        if s.definition.source == "ee_pose_delta":
            return [(f"d{n}", s.position_unit or "") for n in "xyz"] + [
                (f"d{n}", s.definition.rotation_unit) for n in ("roll", "pitch", "yaw")
            ]
        return [(f"{'q' if s.joint_unit else 'action'}{i + 1}", s.joint_unit or "") for i in range(s.action_dim)]


# ---- build, save, load -----------------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """Linear with a low-rank addition: y = (W + scale B A) x. W keeps its name, see export_weights."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.scale, self.dropout = base.weight, alpha / rank, dropout
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return (
            F.linear(x, self.weight)
            + F.linear(
                F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A), self.lora_B
            )
            * self.scale
        )


def export_weights(tensors, cfg):
    """Model state dict -> the tensors with LeRobot's names, LoRA folded in."""
    out = {k: v for k, v in tensors.items() if not k.endswith((".lora_A", ".lora_B"))}
    for k in [k.removesuffix("lora_A") for k in tensors if k.endswith(".lora_A")]:
        out[k + "weight"] = (
            out[k + "weight"].float() + cfg.lora_alpha / cfg.lora_rank * tensors[k + "lora_B"] @ tensors[k + "lora_A"]
        ).to(out[k + "weight"].dtype)
    return out


def local_folder(source, weights):
    """Directory or hub id -> local directory with config and tokenizer files, and with `weights` the safetensors."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                source, allow_patterns=["*.json", "*.txt", "*.jinja"] + (["model*.safetensors"] if weights else [])
            )
        )
    except Exception as error:  # the hub client raises a dozen types; all mean that the files cannot be had
        raise FileNotFoundError(
            f"'{source}' is neither a directory nor reachable on the hub ({type(error).__name__}). Give a local directory "
            "(--policy.vlm_model_name DIR, --init_from DIR); make_demo.py writes a tiny backbone"
        ) from error


def read_vlm_files(folder):
    """{name: text} of the VLM's config, tokenizer and processor files: a checkpoint keeps them, so that it opens without the hub."""
    files = {
        f.name: f.read_text()
        for f in sorted(Path(folder).iterdir())
        if f.suffix in (".json", ".txt", ".jinja") and not f.name.endswith(".index.json")
    }
    if "config.json" not in files or "tokenizer_config.json" not in files:
        raise FileNotFoundError(
            f"policy.vlm_model_name '{folder}' has {sorted(files) or 'no files'}: expected config.json and tokenizer files of a SmolVLM2"
        )
    return files


def open_vlm_files(files):
    """-> (transformers config, tokenizer)"""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "smolvlm":
            raise ValueError(f"policy.vlm_model_name is a {config.model_type}; SmolVLA needs a smolvlm (SmolVLM2)")
        return config, AutoTokenizer.from_pretrained(folder)


def read_safetensors(folder):
    from safetensors.torch import load_file

    if not (files := sorted(Path(folder).glob("model*.safetensors"))):
        raise FileNotFoundError(f"{folder} has no model.safetensors")
    return {k: v for f in files for k, v in load_file(f).items()}


def read_policy_weights(source):
    """A .pt of this script (its EMA weights, where it has some), a LeRobot policy directory (final_hf) or a hub id -> {name: tensor} with LeRobot's names."""
    tensors = (
        ckpt.load_state(source) if str(source).endswith(".pt") else read_safetensors(local_folder(source, weights=True))
    )
    tensors = tensors.get("policy_state_dict") or tensors.get("model_state_dict") or tensors
    # the normalisers inside the model are of LeRobot before 0.4
    return {
        k.removeprefix("module."): v
        for k, v in tensors.items()
        if not k.startswith(("normalize_inputs.", "normalize_targets.", "unnormalize_outputs."))
    }


def load_exact(model, tensors, source):
    """Fill `model` (or a part of it) from {name: tensor}, keeping the file's dtypes; every tensor must find its place and every place its tensor."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise ValueError(
            f"{source} covers {len(own) - len(missing)} of {len(own)} tensors; missing {missing[:2]}, unknown {unknown[:2]}, other shape "
            f"{[(k, tuple(tensors[k].shape), tuple(own[k].shape)) for k in wrong[:2]]}. Nothing was loaded; compare the policy.* keys (layers, widths, dims) with that model's config"
        )
    model.load_state_dict(
        {k: v.clone() for k, v in tensors.items()}, assign=True
    )  # a checkpoint is mapped from its file, which may be rotated away
    return f"{len(own)} of {len(own)} tensors of {source}"


def load_vlm(vlm, source, num_layers):
    """SmolVLM2's own file into FlowModel's VLM: the text layers that are not used are left out, everything else must match."""
    unused = lambda key: (m := re.match(r"model\.text_model\.layers\.(\d+)\.", key)) and int(m[1]) >= num_layers
    tensors = {k: v for k, v in read_safetensors(local_folder(source, weights=True)).items() if not unused(k)}
    if "lm_head.weight" not in tensors and "model.text_model.embed_tokens.weight" in tensors:  # tied
        tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"].clone()
    return load_exact(vlm, tensors, source)


def init_weights(model, seed):
    """New weights as in the originals: N(0, 0.02) in the transformers, torch's default in the projections of state, action and time and where the expert's
    cross-attention got its own layers; norms 1."""
    torch.manual_seed(seed)
    for name, module in model.named_modules():
        own_layers = [
            layer.self_attn[k]
            for joint, layer in zip(model.model.joint, model.model.vlm_with_expert.lm_expert.layers)
            for k in ("k_proj", "v_proj")
            if not joint
        ]
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
            if (
                "vlm_with_expert" in name
                and not isinstance(module, nn.LayerNorm)
                and not any(module is m for m in own_layers)
            ):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)


def choose_trained(model, cfg):
    """Set requires_grad: what the config leaves free, minus what cannot reach the loss (its gradient would stay None and DDP would wait for it)."""
    p, vlm, expert = cfg.policy, model.model.vlm_with_expert.vlm, model.model.vlm_with_expert.lm_expert
    model.requires_grad_(True)
    vlm.requires_grad_(not p.train_expert_only)
    if p.freeze_vision_encoder:
        vlm.model.vision_model.requires_grad_(False)
    model.model.state_proj.requires_grad_(p.train_state_proj)
    text, last = vlm.model.text_model, model.model.last_used
    if cfg.train == "lora":
        model.model.vlm_with_expert.requires_grad_(False)
        torch.manual_seed(cfg.seed)
        for layer in [*expert.layers, *(() if p.train_expert_only else text.layers)]:
            for group in (layer.self_attn, layer.mlp):
                for name, linear in list(group.items()):
                    group[name] = LoraLinear(linear, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    end = text.layers[last]
    for unused in (
        vlm.lm_head,
        text.norm,
        *text.layers[last + 1 :],
        end.self_attn.q_proj,
        end.self_attn.o_proj,
        end.mlp,
        end.post_attention_layernorm,
    ):
        unused.requires_grad_(False)


def build_model(cfg, vlm_config, spec, device, dtype, tensors=None):
    """-> (SmolVLA on `device`, lines that say where its weights come from). Trained weights fp32, frozen ones in `dtype`. `tensors`: those of a
    resumed checkpoint, else of cfg.init_from or policy.pretrained_model_id, else the VLM's own and a new expert."""
    p, source = cfg.policy, cfg.init_from or cfg.policy.pretrained_model_id
    frozen = p.train_expert_only or p.freeze_vision_encoder or cfg.train == "lora"
    if tensors is None and not source and not p.load_vlm_weights and frozen and not p.allow_random_frozen_vlm:
        raise ValueError(
            "policy.load_vlm_weights is false and parts of the VLM stay frozen (policy.train_expert_only, policy.freeze_vision_encoder or train: lora): the expert would "
            "learn on random features. Load the weights, train everything (--policy.train_expert_only false --policy.freeze_vision_encoder false), or ask for it by name: "
            "--policy.allow_random_frozen_vlm"
        )
    with torch.device("meta"):
        model = SmolVLA(vlm_config, p, spec.action_dim, spec.loss_dims, cfg.training.lambda_temporal)
    if tensors is not None or source:
        said = [
            load_exact(model, tensors if tensors is not None else read_policy_weights(source), cfg.resume or source)
        ]
    else:
        model = model.to_empty(device="cpu")
        init_weights(model, cfg.seed)
        said = [
            "expert and projections: new, from random numbers; for little data lerobot/smolvla_base is a better start (--policy.pretrained_model_id lerobot/smolvla_base)",
            "VLM: "
            + (
                load_vlm(model.model.vlm_with_expert.vlm, p.vlm_model_name, p.num_vlm_layers)
                if p.load_vlm_weights
                else "RANDOM weights, as asked for"
            ),
        ]
    choose_trained(model, cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return model.to(device), said


NORMALIZER, UNNORMALIZER = (
    "policy_preprocessor_step_5_normalizer_processor.safetensors",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
)


def save_model(folder, tensors, cfg, collate, vlm_files, device="cpu"):
    """Write LeRobot's saved-policy format: config.json, model.safetensors (`tensors`: export_weights), pre- and post-processor with the statistics. Beside
    it policy.json (what load_policy needs) and vlm/ (the backbone's config and tokenizer files, for use without the hub)."""
    from safetensors.torch import save_file

    folder, spec, p, o, s = Path(folder), collate.spec, cfg.policy, cfg.optimizer, cfg.scheduler
    (folder / "vlm").mkdir(parents=True)
    for name, text in vlm_files.items():
        (folder / "vlm" / name).write_text(text)
    write_json = lambda name, value: (folder / name).write_text(json.dumps(value, indent=2))
    feature = lambda kind, shape: dict(type=kind, shape=list(shape))
    inputs = {
        f"observation.images.camera{k + 1}": feature("VISUAL", [3, *shape]) for k, shape in enumerate(spec.image_shapes)
    }
    inputs["observation.state"] = feature("STATE", [spec.state_dim])
    output, norm_map = (
        dict(action=feature("ACTION", [spec.action_dim])),
        dict(VISUAL="IDENTITY", STATE=spec.normalization, ACTION=spec.normalization),
    )
    # an unknown field is an error in LeRobot, a missing one takes its default: exactly the fields that 0.3.4 to 0.6.2 know
    shared = {
        k: v for k, v in dataclasses.asdict(p).items() if k not in ("pretrained_model_id", "allow_random_frozen_vlm")
    } | dict(load_vlm_weights=False)  # all are in our file
    write_json(
        "config.json",
        dict(
            type="smolvla",
            input_features=inputs,
            output_features=output,
            normalization_mapping=norm_map,
            device=device,
            use_amp=False,
            push_to_hub=False,
            repo_id=None,
            private=None,
            tags=None,
            license=None,
            pretrained_path=None,
            empty_cameras=0,
            adapt_to_pi_aloha=False,
            use_delta_joint_actions_aloha=False,
            use_cache=True,
            add_image_special_tokens=False,
            prefix_length=-1,
            pad_language_to="max_length",
            optimizer_lr=o.lr,
            optimizer_betas=o.betas,
            optimizer_eps=o.eps,
            optimizer_weight_decay=o.weight_decay,
            optimizer_grad_clip_norm=o.grad_clip_norm,
            scheduler_warmup_steps=s.num_warmup_steps,
            scheduler_decay_steps=s.num_decay_steps,
            scheduler_decay_lr=s.decay_lr,
            **shared,
        ),
    )
    step = lambda name, state=None, **settings: (
        dict(registry_name=name, config=settings) | (dict(state_file=state) if state else {})
    )
    write_json(
        "policy_preprocessor.json",
        dict(
            name="policy_preprocessor",
            steps=[
                step("rename_observations_processor", rename_map={}),
                step("to_batch_processor"),
                step("smolvla_new_line_processor"),
                step(
                    "tokenizer_processor",
                    max_length=p.tokenizer_max_length,
                    task_key="task",
                    padding_side="right",
                    padding="max_length",
                    truncation=True,
                    tokenizer_name=p.vlm_model_name,
                ),
                step("device_processor", device=device, float_dtype=None),
                step("normalizer_processor", NORMALIZER, eps=1e-8, features=inputs | output, norm_map=norm_map),
            ],
        ),
    )
    write_json(
        "policy_postprocessor.json",
        dict(
            name="policy_postprocessor",
            steps=[
                step("unnormalizer_processor", UNNORMALIZER, eps=1e-8, features=output, norm_map=norm_map),
                step("device_processor", device="cpu", float_dtype=None),
            ],
        ),
    )
    # what makes LeRobot compute what ours does, also in a dimension that never moves: the constant comes back whatever was sampled, the state's noise is not divided by 1e-8
    stats = {}
    for key, n, spread in (("action", collate.action, 0.0), ("observation.state", collate.state, 1.0)):
        half, (first, second) = np.where(n.constant, spread, n.half), n.USED[n.mode]
        used = (
            {}
            if n.mode == "IDENTITY"
            else {first: n.center, second: half}
            if n.mode == "MEAN_STD"
            else {first: n.center - half, second: n.center + half}
        )
        stats |= {
            f"{key}.{k}": torch.tensor(np.asarray(v), dtype=torch.float32)
            for k, v in ({k: collate.stats[key][k] for k in LISTS if k in collate.stats[key]} | used).items()
        }
    for name in (NORMALIZER, UNNORMALIZER):
        save_file(stats, folder / name)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    write_json(
        "policy.json",
        dict(format_version=FORMAT, script=Path(__file__).stem, spec=dataclasses.asdict(spec), stats=collate.stats),
    )


def read_lerobot(folder):
    """A LeRobot policy directory -> (PolicyConfig, DataSpec, stats). What LeRobot does not write down (the recorder's camera names, what the action is) is
    unknown without our policy.json: predict works then, open_episodes does not."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    if (found := (config.get("type"), config.get("add_image_special_tokens", False))) != ("smolvla", False):
        raise ValueError(
            f"{folder}/config.json has type, add_image_special_tokens = {found}; expected ('smolvla', False), as in lerobot/smolvla_base"
        )
    policy = PolicyConfig(**{f.name: config[f.name] for f in dataclasses.fields(PolicyConfig) if f.name in config})
    if (folder / "policy.json").is_file():
        about = json.loads((folder / "policy.json").read_text())
        if about["format_version"] != FORMAT:
            raise ValueError(
                f"{folder}: policy.json has format_version {about['format_version']}, this code reads {FORMAT}"
            )
        return policy, DataSpec(**about["spec"]), about["stats"]
    mapping, stats = config["normalization_mapping"], {}
    if not (folder / NORMALIZER).is_file() or mapping["STATE"] != mapping["ACTION"]:
        raise ValueError(
            f"{folder} has no {NORMALIZER}, or normalises state ({mapping['STATE']}) and action ({mapping['ACTION']}) in two ways: the units of its actions are unknown. "
            f"Fine-tune from it instead: --init_from {folder}"
        )
    for key, value in load_file(folder / NORMALIZER).items():
        stats.setdefault(key.rsplit(".", 1)[0], {})[key.rsplit(".", 1)[1]] = value.tolist()
    cameras = {
        k: v["shape"][1:]
        for k, v in config["input_features"].items()
        if v["type"] == "VISUAL" and "empty_camera" not in k
    }
    action = dict(source="action", dim=config["output_features"]["action"]["shape"][0], rotation_unit="rad")
    return (
        policy,
        DataSpec(
            list(cameras),
            list(cameras.values()),
            [],
            config["input_features"]["observation.state"]["shape"][0],
            action,
            None,
            None,
            mapping["STATE"],
            "",
            "all",
        ),
        stats,
    )


def load_policy(path, device=None):
    """Open a checkpoint for inference: a .pt of this script, final_hf, any LeRobot SmolVLA directory, or an output_dir (its newest checkpoint)."""
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        if not (steps := ckpt.steps_in(path / "checkpoints", STEP_FILE) or ckpt.steps_in(path, STEP_FILE)):
            raise FileNotFoundError(
                f"{path} has neither config.json (a LeRobot policy) nor checkpoint_step_N.pt; expected a checkpoint of train_smolvla_sim.py"
            )
        path = list(steps.values())[-1]
    if path.is_dir():
        policy, spec, stats = read_lerobot(path)
        beside = (path / "vlm", path / policy.vlm_model_name, path.parent / policy.vlm_model_name)
        files, tensors = (
            read_vlm_files(
                next((f for f in beside if f.is_dir()), None) or local_folder(policy.vlm_model_name, weights=False)
            ),
            read_policy_weights(path),
        )
    else:
        state = ckpt.load_state(path)
        if state.get("format_version") != FORMAT:
            raise ValueError(
                f"{path} has format_version {state.get('format_version')}, this code reads {FORMAT}. Use its weights for a new run: --init_from {path}"
            )
        policy, spec, stats = (
            PolicyConfig(**state["config"]["policy"]),
            DataSpec(**state["spec"]),
            state["normalization_stats"],
        )
        files, tensors = state["vlm_files"], state["policy_state_dict"]
    vlm_config, tokenizer = open_vlm_files(files)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = SmolVLA(vlm_config, policy, spec.action_dim, spec.loss_dims)
    load_exact(model, tensors, path)
    # on a GPU the weights keep the dtypes of the training: trained ones fp32, frozen ones bf16
    model = model.requires_grad_(False).to(device, None if device.type == "cuda" else torch.float32).eval()
    return Policy(model, Collate(tokenizer, policy, spec, stats), torch.bfloat16 if device.type == "cuda" else None)


class FeatureCache:
    """Image features of a frozen VLM on disk: one (frames, K, T, D) tensor per episode file, valid for one set of weights and one preprocessing."""

    def __init__(self, folder, model, spec):
        digest, vlm = (
            hashlib.sha256(
                json.dumps([spec.cameras, spec.image_shapes, model.policy.resize_imgs_with_padding]).encode()
            ),
            model.model.vlm_with_expert.vlm.model,
        )
        for name, tensor in [*vlm.vision_model.state_dict().items(), *vlm.connector.state_dict().items()]:
            digest.update(
                f"{name}{tensor.dtype}".encode()
                + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
        self.folder, self.spec, self.side, self._open = (
            Path(folder) / digest.hexdigest()[:16],
            spec,
            model.policy.resize_imgs_with_padding[0],
            {},
        )

    def path(self, episode):
        """A file that was recorded again (size or time changed) gets features of its own."""
        about = os.stat(episode.path)
        return (
            self.folder
            / f"{hashlib.sha256(f'{episode.name}{about.st_size}{about.st_mtime_ns}'.encode()).hexdigest()[:24]}.pt"
        )

    @torch.no_grad()
    def build(self, episodes, model, device, autocast, batch_size):
        """Compute what is missing -> number of episodes computed."""
        reader, todo, cameras = (
            ep.ImageReader(),
            [e for e in episodes if not self.path(e).is_file()],
            len(self.spec.cameras),
        )
        for e in tqdm(todo, desc="image features", unit="episode", disable=None):
            rows = []
            for t in range(0, e.num_frames, batch_size):
                groups = stack_images(
                    [
                        image
                        for f in range(t, min(t + batch_size, e.num_frames))
                        for image in read_images(reader, e, self.spec, f, self.side)
                    ]
                )
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    rows.append(
                        model.features(to_device(groups, device), cameras)
                        .unflatten(1, (cameras, -1))
                        .to(autocast or torch.float32)
                        .cpu()
                    )
            with ckpt.atomic_path(self.path(e)) as temporary:
                ckpt.save_state(temporary, dict(features=torch.cat(rows)))
        return len(todo)

    def read(self, episode, frame):
        """-> (K, T, D) tensor, bf16 where it was computed so."""
        if episode.path not in self._open:
            self._open[episode.path] = torch.load(self.path(episode), mmap=True, weights_only=True)["features"]
        return self._open[episode.path][frame].clone()

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0, counted from the start of the schedule): linear warm-up, cosine, and its last value beyond the end."""
    s, peak = cfg.scheduler, cfg.optimizer.lr
    if step < s.num_warmup_steps:
        return peak * (step + 1) / s.num_warmup_steps
    end, progress = (
        s.decay_lr / s.peak_lr,
        min(1.0, (step - s.num_warmup_steps) / max(1, s.num_decay_steps - s.num_warmup_steps)),
    )
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Spikes:
    """Loss spikes and non-finite steps: loss_spikes.txt to read, loss_spikes.csv to filter. The samples of a step are listed worst first."""

    COLUMNS = (
        "step",
        "loss",
        "action_loss",
        "temporal_loss",
        "moving_avg",
        "ratio",
        "episode_indices",
        "frame_indices",
        "episode_paths",
        "sample_losses",
    )

    def __init__(self, folder, threshold, episodes, history=(), start=0, rank=0):
        self.folder, self.threshold, self.episodes, self.history, self.rank, self.rows = (
            folder,
            threshold,
            episodes,
            list(history),
            rank,
            [],
        )
        if rank == 0:
            if start and (folder / "loss_spikes.csv").is_file():
                with open(folder / "loss_spikes.csv", newline="") as f:
                    self.rows = [
                        row for row in csv.DictReader(f) if int(row["step"]) <= start
                    ]  # what came after will be done again
            self.write()

    def check(self, loss):
        """Take the loss of a step -> moving average if it is a spike, else None."""
        self.history = (self.history + [loss])[-100:]
        average = sum(self.history) / len(self.history)
        return average if len(self.history) >= 50 and loss > self.threshold * average else None

    def record(self, step, losses, average, names, sample_losses):
        """Write one step down -> episode indices, worst sample first. losses (total, action, temporal); names and sample_losses of this rank's samples. A collective call."""
        gathered = [list(zip(sample_losses, names))]
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, list(zip(sample_losses, names)))
        worst = sorted(
            (row for part in gathered for row in part), key=lambda row: -row[0] if math.isfinite(row[0]) else -math.inf
        )
        indices = list(dict.fromkeys(name[0] for _, name in worst))
        text = [f"{v:.6f}" for v in losses] + (
            [f"{average:.6f}", f"{losses[0] / average:.2f}"] if average else ["N/A", "N/A"]
        )
        paths = "; ".join(f"[{i}] {self.episodes[i].path}" for i in indices)
        self.rows.append(
            dict(
                zip(
                    self.COLUMNS,
                    (
                        step,
                        *text,
                        [n[0] for _, n in worst],
                        [n[2] for _, n in worst],
                        paths,
                        [round(v, 6) for v, _ in worst],
                    ),
                )
            )
        )
        if self.rank == 0:
            self.write()
        return indices

    def write(self):
        with open(self.folder / "loss_spikes.csv", "w", newline="") as f:
            table = csv.DictWriter(f, self.COLUMNS)
            table.writeheader()
            table.writerows(self.rows)
        (self.folder / "loss_spikes.txt").write_text(
            f"Loss spikes\n{'=' * 80}\nThreshold: {self.threshold}x moving average\n"
            + "".join(
                f"\nLOSS SPIKE at Step {r['step']}\n  Loss: {r['loss']} (moving avg: {r['moving_avg']}, ratio: {r['ratio']}x)\n"
                f"  Action Loss: {r['action_loss']}\n  Temporal Loss: {r['temporal_loss']}\n"
                f"  Batch Information (worst sample first):\n    Episode indices: {r['episode_indices']}\n    Frame indices: {r['frame_indices']}\n    Sample losses: {r['sample_losses']}\n"
                "  Episode Paths:\n" + "".join(f"    {path}\n" for path in r["episode_paths"].split("; "))
                for r in self.rows
            )
        )


class Ema:
    """Moving average of the trained weights; `swapped` puts it into the model for a while."""

    def __init__(self, parameters, decay, saved=None):
        self.parameters, self.decay = parameters, decay  # parameters {name: Parameter}
        self.average = (
            {k: (saved[k] if saved else p).detach().to(p.device, copy=True) for k, p in parameters.items()}
            if decay
            else {}
        )

    @torch.no_grad()
    def update(self, step):
        if self.decay:
            decay = min(
                self.decay, (1 + step) / (10 + step)
            )  # the first weights are no part of an average worth keeping
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def swapped(self):
        raw = {k: self.parameters[k].data for k in self.average}
        for k, average in self.average.items():
            self.parameters[k].data = average
        try:
            yield
        finally:
            for k, data in raw.items():
                self.parameters[k].data = data


def describe(cfg, data, print0):
    """Say what was found: episodes, cameras, state and action meaning and ranges."""
    s, train = data.spec, [data.episodes[i] for i in data.train]
    print0(
        f"data      {len(train)} training episodes, {sum(e.num_frames for e in train)} frames; {len(data.validation)} validation episodes; {cfg.dataset.root_dir}"
    )
    for message in data.excluded:
        print0(f"excluded  {message}")
    print0(
        "cameras   "
        + ", ".join(f"{c} -> camera{k + 1} {h}x{w}" for k, (c, (h, w)) in enumerate(zip(s.cameras, s.image_shapes)))
    )
    print0(f"state     {' + '.join(s.state_keys)}, {s.state_dim} dims (padded to {cfg.policy.max_state_dim})")
    print0(
        f"action    {'joint targets' if s.joint_unit else s.definition.source}, {s.action_dim} dims (padded to {cfg.policy.max_action_dim}), chunk {cfg.policy.chunk_size}; "
        f"normalisation {s.normalization}"
    )
    if s.definition.source == "action" and ep.records_past_motion(train):
        print0(
            "warning   the recorded 'action' is the motion already made (pose[t] - pose[t-1]), so this trains on yesterday's action; "
            "set dataset.use_ee_pose_delta_as_action: true for the motion that follows"
        )
    for key in ("observation.state", "action"):
        for name in ("mean", "std", "min", "max"):
            print0(
                f"          {key.rsplit('.', 1)[-1]:<7}{name:<5}"
                + " ".join(f"{v:11.4g}" for v in data.stats[key][name])
            )
    texts = sorted({e.instruction or s.task_instruction for e in train})
    print0(
        f"text      {len(texts)} instruction(s), {sum(e.instruction is not None for e in train)} episodes bring their own; e.g. {texts[0]!r}"
    )


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer the text stays unbuilt, and says so."""
    data = load_data(cfg)
    describe(cfg, data, print)
    dataset = SmolVLADataset(data, data.train, cfg, cfg.dataset.augment)
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights())
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.training.batch_size, len(dataset)))]
    print(
        f"samples   {len(dataset)} (frames with a target); batch of {len(items)}, first: {items[0]['name'][1]} frame {items[0]['name'][2]}"
    )
    show = lambda key, v: print(
        f"          {key:<14} {str(tuple(v.shape)):<22} {str(v.dtype).removeprefix('torch.'):<8} {v.min().item():.4g} .. {v.max().item():.4g}"
    )
    for k, image in enumerate(items[0]["images"]):
        show(f"camera{k + 1}", image)
    try:
        tokenizer = open_vlm_files(read_vlm_files(local_folder(cfg.policy.vlm_model_name, weights=False)))[1]
        batch = Collate(tokenizer, cfg.policy, data.spec, data.stats)(items)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                show(key, value)
        print(f"text      {tokenizer.decode(batch['tokens'][0][batch['token_mask'][0]])!r}")
    except FileNotFoundError as error:
        print(f"note      tokens are not shown: {error}")
    print("check passed")


def validate(core, policy, dataset, cfg, device, rank, world, reduce):
    """-> {val/loss, val/action_loss, val/temporal_loss, val/action_mae: mean over dims in data units, val/mae_<dim>}: the loss with noise and time that belong to
    the frame, so that two validations differ by the weights alone, and the error of a sampled chunk; sums over all ranks, padded steps do not count."""
    size, names = cfg.training.batch_size, [n for n, _ in policy.action_names()]
    mine = np.unique(np.linspace(0, len(dataset) - 1, min(cfg.validation.num_samples, len(dataset))).astype(int))[
        rank::world
    ].tolist()
    sums = torch.zeros(5 + len(names), dtype=torch.float64)  # flow, real, temporal, steps, pairs | error per dim
    core.eval()
    for i in range(0, len(mine), size):
        items = [dataset[(k, k)] for k in mine[i : i + size]]
        batch, real = policy.collate(items), ~np.stack([item["is_pad"] for item in items])
        with torch.no_grad(), torch.autocast(device.type, policy.autocast, enabled=policy.autocast is not None):
            out = core(to_device(batch, device))
        sums[:5] += torch.tensor(
            [
                out["flow_sum"].item() / out["dims"],
                out["real_sum"].item() / len(names),
                out["temporal_sum"].item() / len(names),
                real.sum(),
                real[:, 1:].sum(),
            ]
        )
        sums[5:] += torch.from_numpy(
            np.abs(policy.decode(batch) - np.stack([item["action"] for item in items]))[real].sum(0)
        )
    core.train()
    flow, action, temporal, steps, pairs, *errors = reduce(sums).tolist()
    temporal = cfg.training.lambda_temporal * temporal / max(pairs, 1)
    return {
        "val/loss": flow / steps + temporal,
        "val/action_loss": action / steps,
        "val/temporal_loss": temporal,
        "val/action_mae": sum(errors) / steps / len(names),
        **{f"val/mae_{n}": e / steps for n, e in zip(names, errors)},
    }


# without these the moments, the noise or the order of the samples would belong to another run; num_steps and n_action_steps are for inference
FIXED = (
    "seed",
    "train",
    "lora_rank",
    "lora_alpha",
    "dataset.weights",
    *(
        f"policy.{f.name}"
        for f in dataclasses.fields(PolicyConfig)
        if f.name
        not in (
            "vlm_model_name",
            "pretrained_model_id",
            "load_vlm_weights",
            "allow_random_frozen_vlm",
            "num_steps",
            "n_action_steps",
        )
    ),
)


def plan_resume(cfg, state, path, data):
    """What --resume means here -> list of changed settings, or None for a new run from these weights (another data set's config: guide 2's stage 3). Anything
    in between is refused."""
    new_run = f"start a new run from its weights: --init_from {path} --output_dir ANOTHER_FOLDER"
    if state.get("format_version") != FORMAT or "fingerprint" not in state:
        raise ValueError(
            f"--resume {path}: not a checkpoint of this version (format_version {state.get('format_version')}, expected {FORMAT}). To use its weights, {new_run}"
        )
    if state["fingerprint"] != data.fingerprint:
        if Path(cfg.output_dir).resolve() in path.resolve().parents:
            raise ValueError(
                f"--resume {path}: the training episodes changed since then ({state['normalization_stats']['num_episodes']} then, {len(data.train)} now, or other "
                f"names, lengths or split), so this would not be the same run. Put the data back, or {new_run}"
            )
        if cfg.reset_scheduler:
            raise ValueError(
                f"--reset_scheduler keeps the optimizer of the same run, but {path} was trained on other data. Drop it (a new run starts a new schedule anyway)"
            )
        return None
    old, new = flat(state["config"]) | state["spec"], flat(dataclasses.asdict(cfg)) | dataclasses.asdict(data.spec)
    if wrong := [f"{k} {old.get(k)}, now {new[k]}" for k in (*FIXED, *state["spec"]) if old.get(k) != new[k]]:
        raise ValueError(
            f"--resume {path} was trained on the same episodes with {'; '.join(wrong)}. Set it back, or {new_run}"
        )
    if state["step"] >= cfg.training.steps:
        raise ValueError(
            f"--resume {path} is at step {state['step']} of the same data, training.steps is {cfg.training.steps}: nothing is left to do. "
            f"For {cfg.training.steps} more steps of the same run: --steps {state['step'] + cfg.training.steps}; for {cfg.training.steps} new steps, {new_run}"
        )
    return [
        f"{k} {old.get(k)} -> {v}"
        for k, v in new.items()
        if old.get(k) != v
        and k not in ("normalization.stats_file", "resume", "reset_scheduler", "init_from", "output_dir", "check")
    ]


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    cuda, t = torch.cuda.is_available(), cfg.training
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo"
        )  # counts and flags go over gloo: the GPU need not be waited for
    autocast = torch.bfloat16 if cuda and t.use_bfloat16 else None
    print0 = print if rank == 0 else lambda *_: None
    out = Path(cfg.output_dir)
    folder = out / "checkpoints"
    there = ckpt.steps_in(folder, STEP_FILE)
    path = next(reversed(there.values()), None) if cfg.resume == "auto" else Path(cfg.resume) if cfg.resume else None
    if path and not path.is_file():
        raise FileNotFoundError(
            f"--resume {path}: no such checkpoint; '{folder}' has {', '.join(p.name for p in there.values()) or 'none'}"
        )
    state = ckpt.load_state(path) if path else None
    data = load_data(cfg, rank, saved=state)
    if state:
        changed = plan_resume(cfg, state, path, data)
        if changed is None:
            print0(
                f"resume    {path} was trained on other data: this is a NEW RUN from its weights (as --init_from): {t.steps} steps from 0, peak lr {cfg.optimizer.lr:g}, "
                "statistics of the new data"
            )
            cfg, state = dataclasses.replace(cfg, resume=None, init_from=str(path)), None
        else:
            cfg = dataclasses.replace(cfg, resume=str(path))
            print0(
                "; ".join(
                    [
                        f"resume    {path}, step {state['step']} of {t.steps}, its statistics",
                        *(["the schedule starts again"] if cfg.reset_scheduler else []),
                        *changed,
                    ]
                )
            )
    elif cfg.resume == "auto":
        print0(f"resume    auto: no checkpoint in {folder}, starting a new run")
    if state is None and (there or (out / "metrics.jsonl").exists() and cfg.resume != "auto"):
        raise FileExistsError(
            f"output_dir '{out}' already holds a run. Continue it with --resume auto, or choose another --output_dir"
        )
    if world > 1:
        dist.barrier()  # all ranks have looked before rank 0 writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(folder)

    def reduce(tensor):
        """Sum over the ranks, in float64."""
        if world > 1:
            dist.all_reduce(tensor := tensor.double())
        return tensor

    # ---- model, optimizer
    describe(cfg, data, print0)
    files = state["vlm_files"] if state else read_vlm_files(local_folder(cfg.policy.vlm_model_name, weights=False))
    vlm_config, tokenizer = open_vlm_files(files)
    tensors = {k: v for k, v in state["model_state_dict"].items() if ".lora_" not in k} if state else None
    core, said = build_model(cfg, vlm_config, data.spec, device, autocast or torch.float32, tensors)
    policy = Policy(core, Collate(tokenizer, cfg.policy, data.spec, data.stats), autocast)
    trained = {n: p for n, p in core.named_parameters() if p.requires_grad}
    o = cfg.optimizer
    optimizer = torch.optim.AdamW(
        trained.values(), lr=o.lr, betas=tuple(o.betas), eps=o.eps, weight_decay=o.weight_decay, fused=cuda or None
    )
    begin = dict(
        step=0, position=0, schedule_start=0, best_val_loss=None, best_step=None, spike_history=[], ema_state_dict=None
    )
    start, position, schedule_start, best, best_step, history, saved_ema = ((state or begin)[k] for k in begin)
    if state:
        ckpt.restore_training_state(
            core, optimizer, dict(trained=state["model_state_dict"], moments=state["optimizer_state_dict"])
        )
        schedule_start, state, tensors = start if cfg.reset_scheduler else schedule_start, None, None
    ema = Ema(trained, t.ema_decay, saved_ema)
    if t.use_torch_compile:
        core.compile()

    # ---- data
    cache = FeatureCache(t.feature_cache, core, data.spec) if t.feature_cache else None
    if cache:
        built = cache.build(data.episodes[rank::world], core, device, autocast, t.batch_size)
        print0(f"features  of {len(data.episodes)} episodes in {cache.folder}; rank 0 computed {built} of them now")
        if world > 1:
            dist.barrier()
    dataset, held_out = (
        SmolVLADataset(data, data.train, cfg, cfg.dataset.augment, cache),
        SmolVLADataset(data, data.validation, cfg, cache=cache),
    )
    accumulation, global_batch = t.gradient_accumulation_steps, t.batch_size * world * t.gradient_accumulation_steps
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights())
    batches = RankBatches(order, t.batch_size, accumulation, rank, world, position, t.steps - start)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=policy.collate,
        num_workers=t.num_workers,
        pin_memory=cuda and t.pin_memory,
        prefetch_factor=4 if t.num_workers else None,
        worker_init_fn=ckpt.ignore_stop_signals,
    )
    model = (
        nn.parallel.DistributedDataParallel(core, device_ids=[local] if cuda else None, gradient_as_bucket_view=True)
        if world > 1
        else core
    )
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in core.parameters())
    size = sum(p.numel() * p.element_size() for p in core.parameters()) + count * (
        8 + 8 * bool(t.ema_decay)
    )  # weights, two moments; with EMA the average, and its export
    for line in said:
        print0(f"weights   {line}")
    print0(
        f"model     {cfg.policy.vlm_model_name}, train {cfg.train}: {count:,} of {total:,} parameters trainable; {'bf16 autocast' if autocast else 'fp32'}; {world} x {device.type}"
    )
    print0(
        f"batch     {t.batch_size} x {world} ranks x {accumulation} accumulation = {global_batch} samples per step; {len(dataset)} samples = {len(dataset) / global_batch:.1f} "
        "steps per epoch"
    )
    print0(
        f"steps     {start} -> {t.steps}; lr {lr_at(start - schedule_start, cfg):.2e} -> {lr_at(t.steps - 1 - schedule_start, cfg):.2e}; "
        f"a checkpoint is about {size / 1e9:.2f} GB, {'all are' if not t.keep_checkpoints else f'the newest {t.keep_checkpoints} are'} kept in {folder}"
    )
    if rank == 0:
        save_config(cfg, out / "config.yaml")
        shutil.copy(__file__, out / Path(__file__).name)
        save_stats(out / "dataset_stats.yaml", data.stats)
        ep.write_validation_list(out / "validation_episodes.txt", data.episodes, data.validation)
        # evaluate.py finds the script and the held-out episodes here
        (folder / "meta.json").write_text(
            json.dumps(dict(script=Path(__file__).stem, validation=[data.episodes[i].name for i in data.validation]))
        )
    w = cfg.wandb
    wandb = runlog.WandbConfig(
        mode=w.mode if w.enable else "disabled",
        entity=w.entity,
        name=w.name or time.strftime("smolvla_sim_%Y%m%d_%H%M%S"),
        tags=w.tags,
        notes=w.notes,
    )
    log = runlog.RunLog(out, t.steps, start, rank, w.project, wandb, dataclasses.asdict(cfg))
    spikes = Spikes(out, t.loss_spike_threshold, data.episodes, history, start, rank)
    stop = ckpt.StopSignal()

    def weights():
        """-> (state dict of the model on the CPU, the same as LeRobot names it, averaged where EMA is on)"""
        raw = {k: v.detach().cpu() for k, v in core.state_dict().items()}
        return raw, export_weights(raw | {k: v.cpu() for k, v in ema.average.items()}, cfg)

    def save(step, position):
        """Write checkpoint_step_N.pt and checkpoint_latest.pt on rank 0; True if they are in place. A full disk costs the new checkpoint, never an old one."""
        ok = True
        if rank == 0:
            raw, exported = weights()  # tensors that are the same in both are stored once
            content = dict(
                format_version=FORMAT,
                step=step,
                epoch=position // len(dataset),
                position=position,
                policy_state_dict=exported,
                model_state_dict=raw,
                ema_state_dict={k: v.cpu() for k, v in ema.average.items()},
                optimizer_state_dict=ckpt.training_state(core, optimizer)[1],
                schedule_start=schedule_start,
                config=dataclasses.asdict(cfg),
                spec=dataclasses.asdict(data.spec),
                normalization_stats=data.stats,
                fingerprint=data.fingerprint,
                vlm_files=files,
                spike_history=spikes.history,
                best_val_loss=best,
                best_step=best_step,
                **{f"action_{k}": torch.tensor(data.stats["action"][k]) for k in ("min", "max", "mean", "std")},
            )
            try:
                ckpt.require_space(folder, int(1.1 * size))
                with ckpt.atomic_path(folder / f"checkpoint_step_{step}.pt") as temporary:
                    ckpt.save_state(temporary, content)
                with ckpt.atomic_path(folder / "checkpoint_latest.pt") as temporary:
                    try:
                        os.link(folder / f"checkpoint_step_{step}.pt", temporary)  # the same bytes under a second name
                    except OSError:  # a file system without hard links
                        shutil.copyfile(folder / f"checkpoint_step_{step}.pt", temporary)
                ckpt.rotate(folder, t.keep_checkpoints, protect=best_step, pattern=STEP_FILE)
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
    )  # (loss, action, temporal, gradient norm) since the last log line
    while step < t.steps:
        lr = lr_at(step - schedule_start, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        t_wait = time.perf_counter()
        try:
            micro = [next(batch_iterator) for _ in range(accumulation)]
        except RuntimeError as error:  # torch's word for a worker that was killed, mostly for memory
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"DataLoader worker crashed (training.num_workers is {t.num_workers}): {error}. Lower it, or load in the main process: --num_workers 0"
            ) from error
        wait += time.perf_counter() - t_wait
        # unpadded steps and pairs of the whole optimizer step over all ranks: what the losses are divided by; and whether any rank was told to stop
        real = [~b["is_pad"] for b in micro]
        steps, pairs, told_to_stop = reduce(
            torch.tensor(
                [
                    float(sum(r.sum() for r in real)),
                    float(sum(r[:, 1:].sum() for r in real)),
                    float(stop.received is not None),
                ]
            )
        ).tolist()
        sums, sample_losses = torch.zeros(3, dtype=torch.float64, device=device), []
        for m, batch in enumerate(micro):
            torch.manual_seed(torch_seed_at(cfg.seed, position + (m * world + rank) * t.batch_size, "dropout"))
            with contextlib.nullcontext() if m == accumulation - 1 or world == 1 else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    result = model(to_device(batch, device))
                temporal = t.lambda_temporal * result["temporal_sum"] / max(pairs * core.action_dim, 1)
                loss = result["flow_sum"] / (steps * result["dims"]) + temporal
                (loss * world).backward()  # ranks are averaged, so times world
            sample_losses.append(result["sample_loss"])
            sums += torch.stack([loss, result["real_sum"] / (steps * core.action_dim), temporal]).detach()
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.optimizer.grad_clip_norm or math.inf)
        values = torch.cat(
            [reduce(sums), norm.detach().double()[None]]
        ).tolist()  # loss, action, temporal, norm: the one wait for the GPU in a step
        names = [name for b in micro for name in b["names"]]
        if all(math.isfinite(value) for value in values):
            optimizer.step()
            ema.update(step)
            window.append(values)
            skipped_in_row = 0
            if average := spikes.check(loss := values[0]):
                indices = spikes.record(step + 1, values[:3], average, names, torch.cat(sample_losses).tolist())
                log.log(
                    step + 1,
                    {
                        "spike/loss": loss,
                        "spike/moving_avg": average,
                        "spike/ratio": loss / average,
                        "spike/step": step + 1,
                    },
                    f"⚠️  LOSS SPIKE at step {step + 1}: {loss:.4f} (avg: {average:.4f}, {loss / average:.1f}x) | Episodes: {indices}",
                )
        else:  # the same on every rank: losses and gradients are averaged
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            spikes.record(step + 1, values[:3], None, names, torch.cat(sample_losses).tolist())
            runlog.report_nonfinite(
                log, step + 1, [[name[1:] for name in b["names"]] for b in micro], sample_losses, skipped_in_row
            )
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + global_batch

        if step % t.log_freq == 0 or step == t.steps:
            elapsed = time.perf_counter() - t_log
            loss, action, temporal, norm = np.mean(window, axis=0).tolist() if window else [math.nan] * 4
            vram, reserved = (
                (torch.cuda.max_memory_allocated() / 1e9, torch.cuda.memory_reserved() / 1e9) if cuda else (0.0, 0.0)
            )
            ram = {
                line.split(":")[0]: int(line.split()[1]) / 1e6
                for line in Path("/proc/meminfo").read_text().splitlines()
            }  # GB
            used = ram["MemTotal"] - ram["MemAvailable"]
            speed, waited, percent = (step - logged_at) / elapsed, wait / elapsed, 100 * used / ram["MemTotal"]
            values = {
                "train/loss": loss,
                "train/action_loss": action,
                "train/temporal_loss": temporal,
                "train/grad_norm": norm,
                "train/learning_rate": lr,
                "train/steps_per_sec": speed,
                "train/samples_per_sec": speed * global_batch,
                "train/data_wait": waited,
                "train/skipped_steps": skipped,
                "system/ram_gb": used,
                "system/ram_percent": percent,
                "system/vram_allocated_gb": vram,
                "system/vram_reserved_gb": reserved,
            }
            log.log(
                step,
                {k: v for k, v in values.items() if math.isfinite(v)},
                f"[{100 * step / t.steps:5.1f}%] Step {step}/{t.steps} | Loss: {loss:.4f} (Action: {action:.4f}, Temporal: {temporal:.4f}) | GradNorm: {norm:.3f} | LR: {lr:.2e} | "
                f"{speed:.2f} steps/sec | {speed * global_batch:.1f} samples/s | wait {waited:.1%} | VRAM: {vram:.1f}GB | RAM: {used:.1f} GB ({percent:.0f}%)",
            )
            log.step(step, loss, lr, speed * global_batch, waited)
            window, wait, t_log, logged_at = [], 0.0, time.perf_counter(), step
        else:
            log.step(step)
        if data.validation and (step % cfg.validation.val_freq == 0 or step == t.steps):
            t_val = time.perf_counter()
            with ema.swapped():
                values = validate(core, policy, held_out, cfg, device, rank, world, reduce)
            if best is None or values["val/loss"] < best:
                best, best_step = values["val/loss"], step
            log.log(
                step,
                values,
                f"[VAL] Step {step} | Loss: {values['val/loss']:.4f} | Action Loss: {values['val/action_loss']:.4f} | Action MAE: {values['val/action_mae']:.4g} "
                + policy.action_names()[0][1],
            )
            t_log += time.perf_counter() - t_val  # validation is not training time
        if step % t.save_freq == 0 or step == t.steps or told_to_stop:
            t_save = time.perf_counter()
            if save(step, position):
                saved_at = step
            elif step == t.steps or told_to_stop:
                raise ckpt.DiskFull(
                    28,
                    f"the last checkpoint could not be written; the newest complete one is checkpoint_step_{saved_at}.pt. "
                    "Free space and run again with --resume auto",
                )
            t_log += time.perf_counter() - t_save
        if told_to_stop and step < t.steps:
            log.print(
                f"stopped by signal after step {step}; saved {folder / f'checkpoint_step_{step}.pt'}. Continue with the same command and --resume auto"
            )
            break

    # ---- end
    stop.restore()
    log.close()
    if rank == 0 and step == t.steps:
        with ckpt.atomic_path(folder / "final_hf") as temporary:
            save_model(temporary, weights()[1], cfg, policy.collate, files, device.type)
        print(f"loss plot: {runlog.plot_loss(out, 'train/loss', 'val/loss')}")
        print(
            f"model: {folder / 'final_hf'} (LeRobot format)\nevaluate: python evaluate.py --checkpoint {folder} --data {cfg.dataset.root_dir}"
        )
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
            f"CUDA out of memory ({str(error).splitlines()[0]}). Lower training.batch_size (now {config.training.batch_size}) and raise training.gradient_accumulation_steps "
            f"(now {config.training.gradient_accumulation_steps}) in proportion"
        )
