"""SmolVLA: SmolVLM2 with a flow-matching action expert, on simulated (or real) HDF5 insertion episodes; what comes out is a LeRobot policy.

Model: Shukor et al. 2025, arXiv 2506.01844. Names, shapes and results are those of LeRobot's SmolVLAPolicy, written here in plain modules, so that
lerobot/smolvla_base loads here and checkpoints/final_hf/ loads there. One training sample is one frame: K images, text and robot state -> the next S actions.

    python train_smolvla_sim.py --config configs/smolvla_sim.yaml --check               # look at the data, no weights needed
    bash shells/compute_dataset_stats_sim.sh                                            # dataset_stats_sim.yaml
    bash shells/train_smolvla_sim.sh --multi-gpu --num-gpus 5                           # the same as: torchrun --nproc_per_node=5 train_smolvla_sim.py ...
    python train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --max_steps 20   # smoke run on a CPU, on make_demo.py's output

Output, in output_dir: checkpoints/checkpoint_step_N.pt (resumes, opens with load_policy), checkpoints/final_hf/ (LeRobot's format), validation_episodes.txt,
loss_spikes.txt and .csv, metrics.jsonl, loss.png.

Letters in shapes: B batch, K cameras, T tokens of an image, N prefix tokens (images, text, state), S action steps (the chunk), A padded action dims,
D width of the VLM, W width of the expert.
"""
import os
import sys

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive the fork of loader workers
sys.modules.setdefault("torchvision", None)  # unused; a torchvision that does not fit this torch would break `import transformers`

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import random
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
from torch.utils.checkpoint import checkpoint as recompute
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import checkpoint as ckpt
from common import episodes as ep
from common import runlog
from common.config import parse_config, save_config
from common.sampler import GlobalOrder, RankBatches, generator_at, torch_seed_at
from common.stats import LISTS, Normalizer, load_stats, save_stats

FORMAT = 1                    # of checkpoint_step_N.pt and final_hf/policy.json
STEP_FILE = r"checkpoint_step_(\d+)\.pt"
ROPE_BASE = 10_000.0          # SmolVLA's own; the VLM's config says 100,000 and is not asked
LEROBOT_STATS = ("mean", "std", "min", "max", "q01", "q99")


# ---- config ----------------------------------------------------------------------------------------------------------

@dataclass
class DatasetConfig:
    root_dir: str = ""                             # folder with .h5 episodes, searched recursively
    horizon: int = 50                              # S, future actions per sample, in frames; equals policy.chunk_size
    task_instruction: str = "Insert needle into eye trocar in simulation"  # used where a file has no language_instruction
    cameras: list[str] = field(default_factory=lambda: ["side_camera", "tool_camera", "top_camera"])  # recorded names; the first is LeRobot's camera1, ...
    use_qpos: bool = False                         # the state contains qpos, before ee_pose
    use_ee_pose: bool = True                       # the state contains ee_pose
    use_ee_pose_delta_as_action: bool = False      # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if any value exceeds 2 pi
    weights: dict = field(default_factory=dict)    # {subfolder of root_dir: share of the samples}, e.g. {sim: 0.3, real: 0.7}; empty: every frame once per epoch
    skip_bad_episodes: bool = False                # leave unreadable files out, listed and counted, instead of stopping
    augment: bool = False                          # colour augmentation of training images (the simulator's data is already randomised)
    augment_brightness: float = 0.2                # +- this share of full scale
    augment_contrast: float = 0.2                  # factor 1 +- this
    augment_saturation: float = 0.2                # factor 1 +- this
    augment_hue: float = 0.05                      # +- this share of the hue circle's half
    augment_noise: float = 0.02                    # std of Gaussian noise, share of full scale


@dataclass
class NormalizationConfig:
    enable: bool = True                            # false: states and actions enter as they are
    stats_file: str | None = None                  # statistics file of compute_stats.py; null: computed from the training episodes
    mode: Literal["MEAN_STD", "MIN_MAX", "QUANTILES"] = "MEAN_STD"  # LeRobot's names; QUANTILES maps q01..q99 to -1..1; nothing is clipped


@dataclass
class PolicyConfig:
    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # backbone: hub id or directory
    pretrained_model_id: str | None = None         # LeRobot policy to start from, e.g. lerobot/smolvla_base: hub id or directory; null: VLM weights and a new expert
    load_vlm_weights: bool = True                  # false: the VLM starts from random numbers, refused where it stays frozen ...
    allow_random_frozen_vlm: bool = False          # ... unless this asks for it
    num_vlm_layers: int = 16                       # the first text layers of the VLM that are used
    num_expert_layers: int = -1                    # 0 or less: as many as VLM layers
    expert_width_multiplier: float = 0.75          # W / D
    self_attn_every_n_layers: int = 2              # of the expert; the others attend to the prefix only
    attention_mode: Literal["cross_attn", "self_attn"] = "cross_attn"  # self_attn: every layer is a joint self-attention
    n_obs_steps: int = 1                           # frames seen; SmolVLA knows 1 only
    chunk_size: int = 50                           # S
    n_action_steps: int = 50                       # actions that a robot executes of a chunk, written to final_hf for LeRobot's queue
    num_steps: int = 10                            # Euler steps of sampling
    max_state_dim: int = 32                        # states are padded with zeros to this
    max_action_dim: int = 32                       # A
    resize_imgs_with_padding: list[int] = field(default_factory=lambda: [512, 512])  # width, height in pixels, a square
    tokenizer_max_length: int = 48                 # text tokens
    min_period: float = 0.004                      # of the time embedding
    max_period: float = 4.0                        # of the time embedding
    freeze_vision_encoder: bool = True             # the vision tower keeps its weights
    train_expert_only: bool = True                 # the whole VLM keeps its weights
    train_state_proj: bool = True                  # false: the state's projection keeps its weights


@dataclass
class TrainingConfig:
    steps: int = 30000                             # optimizer steps
    batch_size: int = 16                           # samples per GPU and micro-batch
    gradient_accumulation_steps: int = 1           # micro-batches per optimizer step
    num_workers: int = 4                           # loader processes per rank; 0: in the main process
    pin_memory: bool = True                        # page-locked batches (CUDA)
    log_freq: int = 100                            # optimizer steps
    save_freq: int = 2000                          # optimizer steps
    keep_checkpoints: int = 0                      # newest checkpoint_step_N.pt kept beside the best; 0: all
    lambda_temporal: float = 0.1                   # weight of the smoothness of the predicted clean actions; 0: plain SmolVLA
    loss_spike_threshold: float = 10.0             # a loss above this times the mean of the last 100 is recorded
    loss_dims: Literal["all", "real"] = "all"      # all: flow loss over A dims, as LeRobot's sampler expects; real: padded dims untrained, pinned when sampling
    use_bfloat16: bool = True                      # bf16 autocast on CUDA, frozen weights bf16; trained weights are fp32 in any case
    use_amp: bool = False                          # fp16 autocast: refused, use_bfloat16 does the same without loss scaling
    use_torch_compile: bool = False                # compile the model's forward
    gradient_checkpointing: bool = False           # recompute the VLM's activations: less memory where the VLM is trained
    feature_cache: str | None = None               # folder for image features of a frozen VLM: computed once, then no image is decoded again
    ema_decay: float = 0.0                         # moving average of the trained weights, used by validation and export; 0: off, 0.999 is usual


@dataclass
class ValidationConfig:
    enable: bool = True                            # hold episodes out
    num_episodes: int = 20                         # how many, drawn with the seed
    val_freq: int = 2000                           # optimizer steps
    num_samples: int = 256                         # their frames used for the loss, evenly spread
    num_sampled_chunks: int = 64                   # of these, frames whose chunk is sampled for the error in the action's units


@dataclass
class OptimizerConfig:
    lr: float = 1e-4                               # peak, AdamW
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 1e-10                    # decoupled
    grad_clip_norm: float = 10.0                   # largest gradient norm; 0: no clipping


@dataclass
class SchedulerConfig:
    num_warmup_steps: int = 1000                   # optimizer steps of linear warm-up
    num_decay_steps: int = 30000                   # optimizer step at which the cosine ends
    peak_lr: float = 1e-4                          # with decay_lr: the cosine ends at optimizer.lr * decay_lr / peak_lr
    decay_lr: float = 2.5e-6


@dataclass
class WandbConfig:
    enable: bool = False                           # log to Weights & Biases
    project: str = "smolvla-meca500-insertion-sim"
    entity: str | None = None                      # W&B team or user
    name: str | None = None                        # run name; null: smolvla_sim_DATE_TIME
    tags: list[str] = field(default_factory=list)
    notes: str = ""                                # free text, kept with the run's config
    mode: Literal["online", "offline"] = "online"  # online falls back to offline when nobody is logged in


@dataclass
class Config:
    output_dir: str = "outputs/train/smolvla_needle_insertion_sim"  # checkpoints and logs
    seed: int = 1000                               # of split, order, noise, augmentation and new weights
    train: Literal["full", "lora"] = "full"        # what policy.freeze_* and train_* leave free: its weights, or LoRA on its projections (heads stay full)
    lora_rank: int = 16                            # with train: lora
    lora_alpha: int = 32                           # with train: lora; scale = alpha / rank
    lora_dropout: float = 0.0                      # with train: lora
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    normalization: NormalizationConfig = field(default_factory=NormalizationConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    resume: str | None = None                      # checkpoint_step_N.pt, or "auto" for the newest one in output_dir; of another data set: like init_from
    reset_scheduler: bool = False                  # with resume: keep weights and moments, start the schedule (warm-up) again
    init_from: str | None = None                   # new run from these weights: a .pt, a final_hf or other LeRobot policy directory, or a hub id
    check: bool = False                            # read the data, build and print one batch, stop
    check_images: bool = False                     # with check: decode every image once


ALIASES = {"max_steps": "training.steps", "resume_from_checkpoint": "resume"}


# ---- data ------------------------------------------------------------------------------------------------------------

@dataclass
class PolicySpec:
    """What predict must know beside weights and statistics; in every checkpoint, compared when a run is resumed."""

    chunk_size: int
    cameras: list              # recorded names in policy order: camera1, camera2, ...
    image_shapes: list         # [height, width] as recorded, per camera, for LeRobot's config
    side: int                  # pixels of the square that the model sees
    state_keys: list           # of ["qpos", "ee_pose"], in this order
    state_dim: int
    action_definition: dict    # common.episodes.ActionDefinition
    joint_targets: bool        # the action is a target for qpos: standing still is the present qpos
    action_units: list         # [[name, unit]] per dimension
    normalization: str         # MEAN_STD, MIN_MAX, QUANTILES or IDENTITY
    task_instruction: str
    tokenizer_max_length: int
    num_steps: int
    n_action_steps: int
    pin_padding: bool          # padded action dims were not trained: keep them at t * noise, which is exact


class Affine(Normalizer):
    """common's Normalizer as LeRobot's processors compute it: no clipping; IDENTITY passes everything unchanged."""

    def __init__(self, entry, mode):
        needed = {"MEAN_STD": ("mean", "std"), "MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "IDENTITY": ("mean",)}[mode]
        if missing := [name for name in needed if name not in entry]:
            raise ValueError(f"the statistics lack '{missing[0]}', which normalization.mode {mode} needs; they have {sorted(entry)}")
        # a LeRobot policy may come with fewer lists than ours; those that this mode does not use may be anything
        super().__init__({name: entry[needed[0]] for name in LISTS} | entry, {"MIN_MAX": "min_max", "QUANTILES": "q01_q99"}.get(mode, "mean_std"))
        untouched = ~self.mask if mode != "IDENTITY" else np.ones(self.dim, bool)
        self.center, self.half, self.constant = np.where(untouched, 0.0, self.center), np.where(untouched, 1.0, self.half), self.constant & ~untouched
        self.mask = np.ones(self.dim, bool)

    def normalize(self, x):
        """(..., D) in data units -> float32 in training units."""
        return np.where(self.constant, 0.0, (x - self.center) / np.where(self.constant, 1.0, self.half)).astype(np.float32)


@dataclass
class Data:
    """Episodes of a run, split and described."""

    episodes: list             # all usable ones, sorted by path: episode_index counts these
    train: list                # indices into episodes
    validation: list           # indices into episodes
    excluded: list             # messages of files left out by skip_bad_episodes
    spec: PolicySpec
    stats: dict

    @property
    def definition(self):
        return ep.ActionDefinition(**self.spec.action_definition)

    def fingerprint(self):
        """{"episodes", "settings"}: the first changes with the training samples or their order, the second with what is made of them."""
        settings = {k: v for k, v in dataclasses.asdict(self.spec).items() if k not in ("num_steps", "n_action_steps")}
        parts = dict(episodes=[[self.episodes[i].name, self.episodes[i].num_frames] for i in self.train], settings=settings)
        return {k: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16] for k, v in parts.items()}


def load_data(cfg, rank=0, stats=None, recompute_stats=False):
    """Find, read, split and describe the episodes. `stats`: those of the checkpoint that is resumed, else from the file (unless `recompute_stats`) or the data."""
    d, p, n = cfg.dataset, cfg.policy, cfg.normalization
    if d.horizon < 1 or d.horizon != p.chunk_size:
        raise ValueError(f"dataset.horizon is {d.horizon}, policy.chunk_size is {p.chunk_size}: expected the same number, 1 or more")
    progress = None if rank else lambda paths: tqdm(paths, desc="reading episodes", unit="file", disable=None, leave=False)
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes, progress)
    count = cfg.validation.num_episodes if cfg.validation.enable else 0
    if not 0 <= count < len(found):
        raise ValueError(f"validation.num_episodes is {count}, but there are {len(found)} usable episodes: hold out fewer (--validation.num_episodes N, or --validation.enable false)")
    validation = sorted(random.Random(cfg.seed).sample(range(len(found)), count))
    train = sorted(set(range(len(found))) - set(validation))
    known = list(found[0].cameras)
    cameras = [known[int(c[6:]) - 1] if c not in known and re.fullmatch(r"camera\d+", c) and 0 < int(c[6:]) <= len(known) else c for c in d.cameras]
    if wrong := [c for c in cameras if c not in known]:
        raise ValueError(f"dataset.cameras has '{wrong[0]}'; these episodes have {', '.join(known)} (or by number: camera1..camera{len(known)})")
    if not cameras or len(set(cameras)) != len(cameras):
        raise ValueError(f"dataset.cameras is {d.cameras}: expected at least one camera, each once")
    state_keys = [k for k, use in (("qpos", d.use_qpos), ("ee_pose", d.use_ee_pose)) if use]
    if not state_keys or any(getattr(found[0], k) is None for k in state_keys):
        there = [k for k in ("qpos", "ee_pose") if getattr(found[0], k) is not None]
        raise ValueError(f"the state is made of {state_keys or 'nothing'} (dataset.use_qpos, dataset.use_ee_pose); {found[0].path} has {there or 'neither'}")
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    state_dim = sum(getattr(found[0], k).shape[1] for k in state_keys)
    for what, dim, most in (("state", state_dim, p.max_state_dim), ("action", definition.dim, p.max_action_dim)):
        if dim > most:
            raise ValueError(f"the {what} has {dim} dims, policy.max_{what}_dim is {most}: raise it (a pretrained policy cannot be used then), or choose fewer")
    joints = definition.source == "action" and tracks_joints(found[0])
    if definition.source == "ee_pose_delta":
        position = ep.detect_position_unit(found) or ""
        units = [[f"d{a}", position] for a in "xyz"] + [[f"d{a}", definition.rotation_unit] for a in ("roll", "pitch", "yaw")]
    else:
        unit = "" if not joints else "deg" if max(np.abs(e.qpos).max() for e in found) > 2 * np.pi + 1e-3 else "rad"
        units = [[f"{'q' if joints else 'action'}{i + 1}", unit] for i in range(definition.dim)]
    reader = ep.ImageReader()
    shapes = [list(reader.read(found[0], c, 0).shape[:2]) for c in cameras]
    spec = PolicySpec(p.chunk_size, cameras, shapes, p.resize_imgs_with_padding[0], state_keys, state_dim, dataclasses.asdict(definition), joints, units,
                      n.mode if n.enable else "IDENTITY", d.task_instruction, p.tokenizer_max_length, p.num_steps, p.n_action_steps, cfg.training.loss_dims == "real")
    held_out = [found[i].name for i in validation]
    if stats is None and n.enable and n.stats_file and not recompute_stats:
        stats = load_stats(n.stats_file, ("action", "observation.state"), spec.action_definition, held_out)
    if stats is None:
        stats = ep.insertion_stats([found[i] for i in train], definition, held_out, state_keys)
    for key, dim in (("action", definition.dim), ("observation.state", state_dim)):
        if len(stats[key]["mean"]) != dim:
            raise ValueError(f"the statistics have {len(stats[key]['mean'])} dims for '{key}', the data has {dim}. Make them again: bash shells/compute_dataset_stats_sim.sh")
    return Data(found, train, validation, excluded, spec, stats)


def tracks_joints(episode):
    """True if the recorded action is a joint target: qpos tells more about it than its own mean does."""
    a, q = episode.action, episode.qpos
    return q is not None and q.shape == a.shape and bool(np.abs(a - q).mean() < 0.5 * np.abs(a - a.mean(0)).mean())


def content_size(height, width, side):
    """(h, w) of a picture scaled into a square of `side` pixels, as LeRobot rounds it."""
    ratio = max(width / side, height / side)
    return int(height / ratio), int(width / ratio)


def resize_with_pad(images, side):
    """(n, 3, h, w) in [0, 1] -> (n, 3, side, side) in [-1, 1]: aspect kept, bilinear, padding on the left and on top. The one image preprocessing
    of training and predict, on the model's device."""
    h, w = content_size(*images.shape[-2:], side)
    if images.shape[-2:] != (side, side):
        images = F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
        images = F.pad(images, (side - w, 0, side - h, 0))
    return images * 2 - 1


def augment_image(image, cfg, rng):
    """(h, w, 3) uint8 -> the same: contrast and brightness, hue and saturation, noise."""
    alpha, beta = 1 + rng.uniform(-cfg.augment_contrast, cfg.augment_contrast), rng.uniform(-cfg.augment_brightness, cfg.augment_brightness) * 255
    image = np.clip(image * alpha + beta, 0, 255).astype(np.uint8)
    hue, saturation = rng.uniform(-cfg.augment_hue, cfg.augment_hue), 1 + rng.uniform(-cfg.augment_saturation, cfg.augment_saturation)
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue * 128) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    image = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    image += rng.standard_normal(image.shape, dtype=np.float32) * (cfg.augment_noise * 255)
    return np.clip(image, 0, 255).astype(np.uint8)


class SmolVLADataset(Dataset):
    """One item per frame that has a target. Item (position, i), where `position` seeds noise, flow time and augmentation:

    images list of K (h, w, 3) uint8, or features (K, T, D) of the cache | state (S,), action (S, dims) float32 in data units | is_pad (S,) bool: past
    the episode's end | noise (S, A) float32 ~ N(0, 1), time float ~ 0.001 + 0.999 Beta(1.5, 1) | instruction str | episode str, episode_index, frame
    """

    def __init__(self, data, which, max_action_dim, seed, augment=None, features=None):
        self.spec, self.seed, self.augment, self.features, self.noise_shape = data.spec, seed, augment, features, (data.spec.chunk_size, max_action_dim)
        self.which, self.episodes = list(which), [data.episodes[i] for i in which]
        self.targets = [data.definition.targets(e) for e in self.episodes]
        self.states = [ep.robot_state(e, data.spec.state_keys) for e in self.episodes]
        self.hold = "zero" if data.definition.source == "ee_pose_delta" else "repeat"
        self.ends = np.cumsum([len(t) for t in self.targets])
        self.reader = ep.ImageReader()

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i):
        """Sample -> (episode number within this part, frame)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def sample_weights(self, weights):
        """{subfolder: share} -> (len,) weight per sample, None without weights."""
        if not weights:
            return None
        folder = [next((k for k in weights if e.name.startswith(str(k).rstrip("/") + "/")), None) for e in self.episodes]
        frames = {k: sum(len(t) for f, t in zip(folder, self.targets) if f == k) for k in (*weights, None)}
        if frames[None] or not all(frames[k] and float(weights[k]) > 0 for k in weights):
            raise ValueError(f"dataset.weights is {weights}: every training episode must lie in one of these subfolders, every subfolder must have episodes, every share be above 0; "
                             f"frames found: { {str(k): v for k, v in frames.items()} }")
        return np.repeat([float(weights[f]) / frames[f] for f in folder], [len(t) for t in self.targets])

    def __getitem__(self, key):
        position, i = key
        e, t = self.locate(i)
        episode, rng = self.episodes[e], generator_at(self.seed, position, "noise")
        action, is_pad = ep.action_chunk(self.targets[e], t, self.spec.chunk_size, self.hold)
        item = dict(state=self.states[e][t], action=action, is_pad=is_pad, noise=rng.standard_normal(self.noise_shape, dtype=np.float32), time=0.001 + 0.999 * rng.beta(1.5, 1.0),
                    instruction=episode.instruction or self.spec.task_instruction, episode=episode.name, episode_index=self.which[e], frame=t)
        if self.features is not None:
            return item | dict(features=self.features.read(episode, t))
        images = read_images(self.reader, episode, self.spec, t)
        if self.augment is not None:
            rng = generator_at(self.seed, position, "augment")
            images = [augment_image(image, self.augment, rng) for image in images]
        return item | dict(images=images)


def read_images(reader, episode, spec, t):
    """-> list of K (h, w, 3) uint8; a JPEG is decoded no larger than needed."""
    return [reader.read(episode, c, t, at_least=content_size(*shape, spec.side)) for c, shape in zip(spec.cameras, spec.image_shapes)]


@dataclass
class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    tokenizer: object
    spec: PolicySpec
    stats: dict
    max_state_dim: int
    max_action_dim: int

    def __post_init__(self):
        self.state_normalizer, self.action_normalizer, self._tokens = Affine(self.stats["observation.state"], self.spec.normalization), Affine(self.stats["action"], self.spec.normalization), {}

    def tokens(self, text):
        """Instruction -> ids, mask of length tokenizer_max_length; the text ends with a newline, as in LeRobot's preprocessor."""
        if text not in self._tokens:
            out = self.tokenizer(text if text.endswith("\n") else text + "\n", padding="max_length", max_length=self.spec.tokenizer_max_length, truncation=True, padding_side="right")
            self._tokens[text] = (out["input_ids"], out["attention_mask"])
        return self._tokens[text]

    def inputs(self, observations):
        """images: groups (rows (n,), (n, h, w, 3)) of equal size, rows counting the B*K pictures; or features (B, K, T, D) | tokens, token_mask (B, L) |
        state (B, max_state_dim) normalised, zero-padded."""
        tokens = [self.tokens(o.get("instruction") or self.spec.task_instruction) for o in observations]
        state = self.state_normalizer.normalize(np.stack([np.asarray(o["state"]) for o in observations]))
        batch = dict(tokens=torch.tensor([t for t, _ in tokens]), token_mask=torch.tensor([m for _, m in tokens], dtype=torch.bool), state=pad_last(state, self.max_state_dim))
        if "features" in observations[0]:
            return batch | dict(features=torch.stack([o["features"] for o in observations]))
        flat = [image for o in observations for image in o["images"]]
        groups = {}
        for row, image in enumerate(flat):
            groups.setdefault((image.shape, image.dtype), []).append(row)
        return batch | dict(images=[(torch.tensor(rows), torch.from_numpy(np.stack([flat[r] for r in rows]))) for rows in groups.values()])

    def __call__(self, items):
        """List of dataset items -> inputs() plus action, noise (B, S, A), time (B,), is_pad (B, S), and the items' names."""
        batch = self.inputs(items)
        batch["action"] = pad_last(self.action_normalizer.normalize(np.stack([item["action"] for item in items])), self.max_action_dim)
        batch["noise"] = torch.from_numpy(np.stack([item["noise"] for item in items]))
        batch["time"] = torch.tensor([item["time"] for item in items], dtype=torch.float32)
        batch["is_pad"] = torch.from_numpy(np.stack([item["is_pad"] for item in items]))
        return batch | dict(names=[(item["episode_index"], item["episode"], item["frame"]) for item in items])


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

@dataclass
class Sizes:
    """Every number of the architecture."""

    vision_width: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    vision_eps: float
    image_size: int            # pixels that the position table was made for
    patch: int
    shuffle: int               # the connector folds shuffle x shuffle patches into one token
    width: int                 # D
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    eps: float
    vocab: int
    layers: int                # text layers of the VLM that are kept
    expert_width: int          # W
    expert_mlp: int
    expert_layers: int
    self_attn: list            # per expert layer: joint self-attention (True) or cross-attention to the prefix
    max_state_dim: int
    max_action_dim: int
    min_period: float
    max_period: float


def make_sizes(vlm, p):
    """transformers config of the VLM + PolicyConfig -> Sizes."""
    if vlm.model_type != "smolvlm":
        raise ValueError(f"policy.vlm_model_name '{p.vlm_model_name}' is a {vlm.model_type}; SmolVLA needs a smolvlm (SmolVLM2)")
    v, t = vlm.vision_config, vlm.text_config
    if v.hidden_act != "gelu_pytorch_tanh" or t.hidden_act != "silu" or getattr(t, "attention_bias", False) or getattr(t, "mlp_bias", False):
        raise ValueError(f"'{p.vlm_model_name}': activations {v.hidden_act}/{t.hidden_act} or biases that SmolVLM2 does not have; expected gelu_pytorch_tanh/silu without biases")
    if not 1 <= p.num_vlm_layers <= t.num_hidden_layers:
        raise ValueError(f"policy.num_vlm_layers is {p.num_vlm_layers}: '{p.vlm_model_name}' has {t.num_hidden_layers}")
    side, unit = p.resize_imgs_with_padding, v.patch_size * vlm.scale_factor
    if len(side) != 2 or side[0] != side[1] or side[0] % unit or not unit <= side[0] <= v.image_size:
        raise ValueError(f"policy.resize_imgs_with_padding is {side}: expected a square in multiples of {unit} (patch x shuffle) up to {v.image_size}, e.g. [{v.image_size}, {v.image_size}]")
    count = p.num_expert_layers if p.num_expert_layers > 0 else p.num_vlm_layers
    stride, every = p.num_vlm_layers // count, p.self_attn_every_n_layers
    joint = [p.attention_mode == "self_attn" or (every > 0 and e * stride % every == 0) for e in range(count)]
    if p.num_vlm_layers % count or joint != [p.attention_mode == "self_attn" or (every > 0 and e % every == 0) for e in range(count)]:
        raise ValueError(f"policy.num_expert_layers is {p.num_expert_layers} with {p.num_vlm_layers} VLM layers: it must divide them, and leave self- and cross-attention layers "
                         f"(self_attn_every_n_layers {every}) in their places, e.g. {p.num_vlm_layers}")
    expert_width = int(t.hidden_size * p.expert_width_multiplier)
    return Sizes(v.hidden_size, v.num_hidden_layers, v.num_attention_heads, v.intermediate_size, v.layer_norm_eps, v.image_size, v.patch_size, vlm.scale_factor,
                 t.hidden_size, t.num_attention_heads, t.num_key_value_heads, getattr(t, "head_dim", None) or t.hidden_size // t.num_attention_heads, t.intermediate_size,
                 t.rms_norm_eps, t.vocab_size, p.num_vlm_layers, expert_width, -(-4 * int(2 * expert_width / 3) // 256) * 256, count, joint,
                 p.max_state_dim, p.max_action_dim, p.min_period, p.max_period)


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope(x, positions):
    """(B, heads, L, d) turned by positions (B or 1, L): half-split rotation, computed in fp32."""
    half = x.shape[-1] // 2
    angle = positions[:, None, :, None].float() / ROPE_BASE ** (torch.arange(half, device=x.device, dtype=torch.float32) / half)
    x1, x2 = x.float().split(half, dim=-1)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1).to(x.dtype)


def attend(q, k, v, mask=None):
    """(B, heads, L, d) x (B, kv_heads, M, d) -> (B, L, heads * d); mask (B or 1, 1, L or 1, M), True may be seen."""
    repeat = q.shape[1] // k.shape[1]                                    # written out: the fast kernels with a mask know no grouped heads
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    out = F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), None if mask is None else mask.expand(-1, -1, q.shape[2], -1))
    return out.transpose(1, 2).flatten(2)


class Layer(nn.Module):
    """The parts of one Llama layer. VLM and expert wire them differently, see FlowModel."""

    def __init__(self, width, mlp, heads, kv_heads, head_dim, eps, kv_in=None):
        super().__init__()
        linear = lambda i, o: nn.Linear(i, o, bias=False)
        self.self_attn = nn.ModuleDict(dict(q_proj=linear(width, heads * head_dim), k_proj=linear(kv_in or width, kv_heads * head_dim),
                                            v_proj=linear(kv_in or width, kv_heads * head_dim), o_proj=linear(heads * head_dim, width)))
        self.mlp = nn.ModuleDict(dict(gate_proj=linear(width, mlp), up_proj=linear(width, mlp), down_proj=linear(mlp, width)))
        self.input_layernorm, self.post_attention_layernorm, self.head_dim = RMSNorm(width, eps), RMSNorm(width, eps), head_dim

    def split(self, name, x):
        """Projection `name` of x (B, L, width) -> (B, heads, L, head_dim)."""
        return self.self_attn[name](x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def finish(self, x, attended):
        x = x + self.self_attn.o_proj(attended)
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))


class VisionLayer(nn.Module):
    def __init__(self, width, mlp, heads, eps):
        super().__init__()
        self.layer_norm1, self.layer_norm2, self.heads = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps), heads
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, mlp), fc2=nn.Linear(mlp, width)))

    def forward(self, x):
        y = self.layer_norm1(x)
        q, k, v = (self.self_attn[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
        x = x + self.self_attn.out_proj(attend(q, k, v))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.layer_norm2(x)), approximate="tanh"))


class FlowModel(nn.Module):
    """The network, with LeRobot's parameter names (its VLAFlowMatching). Image and text tokens attend to each other but never to the state token, and
    neither attends to the noisy actions; so the prefix is run in two parts and then the actions, each on the keys and values of what came before.
    Where the VLM is frozen autograd therefore records nothing of images and text, and sampling runs the prefix once: both without a second code path."""

    def __init__(self, s):
        super().__init__()
        self.sizes, self.stride, self.checkpointing = s, s.layers // s.expert_layers, False
        self.last_used = (s.expert_layers - 1) * self.stride                # of this VLM layer only keys and values are needed
        vision = nn.Module()
        vision.embeddings = nn.ModuleDict(dict(patch_embedding=nn.Conv2d(3, s.vision_width, s.patch, s.patch), position_embedding=nn.Embedding((s.image_size // s.patch) ** 2, s.vision_width)))
        vision.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(VisionLayer(s.vision_width, s.vision_mlp, s.vision_heads, s.vision_eps) for _ in range(s.vision_layers))))
        vision.post_layernorm = nn.LayerNorm(s.vision_width, eps=s.vision_eps)
        text = nn.ModuleDict(dict(embed_tokens=nn.Embedding(s.vocab, s.width), norm=RMSNorm(s.width, s.eps),
                                  layers=nn.ModuleList(Layer(s.width, s.mlp, s.heads, s.kv_heads, s.head_dim, s.eps) for _ in range(s.layers))))
        connector = nn.ModuleDict(dict(modality_projection=nn.ModuleDict(dict(proj=nn.Linear(s.vision_width * s.shuffle ** 2, s.width, bias=False)))))
        vlm = nn.ModuleDict(dict(model=nn.ModuleDict(dict(vision_model=vision, connector=connector, text_model=text)), lm_head=nn.Linear(s.width, s.vocab, bias=False)))
        layers = (Layer(s.expert_width, s.expert_mlp, s.heads, s.kv_heads, s.head_dim, s.eps, None if joint else s.kv_heads * s.head_dim) for joint in s.self_attn)
        expert = nn.ModuleDict(dict(layers=nn.ModuleList(layers), norm=RMSNorm(s.expert_width, s.eps)))
        self.vlm_with_expert = nn.ModuleDict(dict(vlm=vlm, lm_expert=expert))
        self.state_proj, self.action_in_proj = nn.Linear(s.max_state_dim, s.width), nn.Linear(s.max_action_dim, s.expert_width)
        self.action_out_proj = nn.Linear(s.expert_width, s.max_action_dim)
        self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * s.expert_width, s.expert_width), nn.Linear(s.expert_width, s.expert_width)

    def embed_images(self, images):
        """(n, 3, side, side) in [-1, 1] -> (n, T, D)."""
        vlm, s = self.vlm_with_expert.vlm.model, self.sizes
        x = vlm.vision_model.embeddings.patch_embedding(images)              # (n, width, rows, rows)
        rows, table = x.shape[-1], s.image_size // s.patch
        # a smaller picture uses every table/rows-th position of each axis, as transformers does
        place = torch.arange(rows, device=x.device) * table // rows
        x = x.flatten(2).transpose(1, 2) + vlm.vision_model.embeddings.position_embedding((place[:, None] * table + place).flatten())
        for layer in vlm.vision_model.encoder.layers:
            x = self._maybe_recompute(layer, x)
        x = vlm.vision_model.post_layernorm(x)
        f = s.shuffle                                                        # token (i, j) <- f x f patches, row by row, channels fastest
        x = x.unflatten(1, (rows // f, f, rows // f, f)).transpose(2, 3).flatten(3).flatten(1, 2)
        return vlm.connector.modality_projection.proj(x)

    def _maybe_recompute(self, f, *args):
        return recompute(f, *args, use_reentrant=False) if self.checkpointing and torch.is_grad_enabled() else f(*args)

    def _vlm_layers(self, x, positions, mask, past=None):
        """Tokens x (B, L, D) through the VLM's text layers, after `past` -> keys (RoPE applied) and values per layer, [(B, kv_heads, L(+past), d)] * 2."""
        kv = []
        for i, layer in enumerate(self.vlm_with_expert.vlm.model.text_model.layers[:self.last_used + 1]):
            def run(x, i=i, layer=layer):
                y = layer.input_layernorm(x)
                k, v = rope(layer.split("k_proj", y), positions), layer.split("v_proj", y)
                if past is not None:
                    k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
                if i < self.last_used:
                    x = layer.finish(x, attend(rope(layer.split("q_proj", y), positions), k, v, mask))
                return x, k, v
            x, k, v = self._maybe_recompute(run, x)
            kv.append((k, v))
        return kv

    def prefix(self, features, tokens, token_mask, state):
        """features (B, K*T, D), tokens and token_mask (B, L), state (B, max_state_dim) -> (valid (B, N), per expert layer keys and values)."""
        scale = math.sqrt(self.sizes.width)
        text = self.vlm_with_expert.vlm.model.text_model.embed_tokens(tokens)
        x = torch.cat([features.to(text.dtype), text], dim=1) * scale        # the state below is not scaled
        valid = torch.cat([token_mask.new_ones(features.shape[:2]), token_mask, token_mask.new_ones(len(x), 1)], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        # padded text is never seen; what it computes itself is never read
        kv = self._vlm_layers(x, positions[:, :-1], valid[:, None, None, :-1])
        kv = self._vlm_layers(self.state_proj(state)[:, None].to(x.dtype), positions[:, -1:], valid[:, None, None], past=kv)
        ready = []
        for e, layer in enumerate(self.vlm_with_expert.lm_expert.layers):
            k, v = kv[e * self.stride]
            if not self.sizes.self_attn[e]:                                  # projected again by the expert, no further RoPE
                k, v = (layer.split(name, z.transpose(1, 2).flatten(2)) for name, z in (("k_proj", k), ("v_proj", v)))
            ready.append((k, v))
        return valid, ready

    def velocity(self, prefix, x_t, t):
        """Noisy actions x_t (B, S, A) at flow time t (B,) -> v (B, S, A) fp32."""
        (valid, kv), steps = prefix, torch.arange(x_t.shape[1], device=x_t.device)[None]
        fraction = torch.linspace(0, 1, self.sizes.expert_width // 2, dtype=torch.float64, device=t.device)
        period = self.sizes.min_period * (self.sizes.max_period / self.sizes.min_period) ** fraction
        angle = 2 * math.pi / period * t.double()[:, None]
        tau = torch.cat([angle.sin(), angle.cos()], dim=1).to(x_t.dtype)     # (B, W)
        x = self.action_in_proj(x_t)
        x = self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([x, tau[:, None].expand(-1, x.shape[1], -1).to(x.dtype)], dim=2)))).float()
        causal = (steps.T >= steps)[None, None].expand(len(x), -1, -1, -1)   # an action sees the prefix, itself and the actions before it
        joint_mask = torch.cat([valid[:, None, None].expand(-1, -1, x.shape[1], -1), causal], dim=3)
        positions = valid.sum(1, keepdim=True) + steps
        for joint, layer, (k, v) in zip(self.sizes.self_attn, self.vlm_with_expert.lm_expert.layers, kv):
            y = layer.input_layernorm(x)
            if joint:
                k, v = torch.cat([k, rope(layer.split("k_proj", y), positions).to(k.dtype)], dim=2), torch.cat([v, layer.split("v_proj", y).to(v.dtype)], dim=2)
                x = layer.finish(x, attend(rope(layer.split("q_proj", y), positions), k, v, joint_mask))
            else:
                x = layer.finish(x, attend(rope(layer.split("q_proj", y), steps), k, v, valid[:, None, None]))
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(self.vlm_with_expert.lm_expert.norm(x).float())


class SmolVLA(nn.Module):
    """FlowModel seen from a batch of this script. forward(batch) is the loss, sample(batch) the actions."""

    def __init__(self, sizes, side, action_dim, loss_dims="all", pin_padding=False, lambda_temporal=0.0, num_steps=10):
        super().__init__()
        self.model = FlowModel(sizes)
        self.side, self.action_dim, self.loss_dims, self.pin_padding, self.lambda_temporal, self.num_steps = side, action_dim, loss_dims, pin_padding, lambda_temporal, num_steps

    def features(self, batch):
        """-> (B, K*T, D) from the cache's features or the images."""
        if "features" in batch:
            return batch["features"].flatten(1, 2)
        rows = torch.cat([rows for rows, _ in batch["images"]])
        pictures = [p.permute(0, 3, 1, 2).float() / 255 if p.dtype == torch.uint8 else p.permute(0, 3, 1, 2).float() for _, p in batch["images"]]
        x = torch.cat([resize_with_pad(p, self.side) for p in pictures])[rows.argsort()]  # (B*K, 3, side, side) in order
        features = self.model.embed_images(x.to(self.model.vlm_with_expert.vlm.model.vision_model.embeddings.patch_embedding.weight.dtype))
        return features.unflatten(0, (len(batch["tokens"]), -1)).flatten(1, 2)

    def compute_loss(self, batch):
        """-> sums over the unpadded steps of the batch, to be divided by the caller's global counts: flow_sum, over the dims that are trained |
        real_sum (): over the real dims | temporal_sum (): squared steps of the clean-action estimate, over real dims and pairs of unpadded steps |
        sample_loss (B,): each sample's own loss | dims: how many dims flow_sum counts.

        x_t = t eps + (1 - t) a, target u = eps - a; a - t (v - u) = x_t - t v is the model's estimate of the clean actions, so it has a gradient.
        """
        a, noise, t, real = batch["action"], batch["noise"], batch["time"][:, None, None], ~batch["is_pad"]
        x_t = t * noise + (1 - t) * a
        v = self.model.velocity(self.model.prefix(self.features(batch), batch["tokens"], batch["token_mask"], batch["state"]), x_t, batch["time"])
        error = (noise - a - v).square() * real[..., None]                   # (B, S, A)
        clean = (x_t - t * v)[..., :self.action_dim]
        jump = (clean[:, 1:] - clean[:, :-1]).square() * real[:, 1:, None]   # padding is at the end: a real step has a real one before it
        dims = error.shape[-1] if self.loss_dims == "all" else self.action_dim
        flow, steps, pairs = error[..., :dims].sum((1, 2)), real.sum(1), real[:, 1:].sum(1)
        temporal = jump.sum((1, 2))
        sample = flow / (steps * dims) + self.lambda_temporal * temporal / (pairs * self.action_dim).clamp(min=1)
        return dict(flow_sum=flow.sum(), real_sum=error[..., :self.action_dim].sum(), temporal_sum=temporal.sum(), sample_loss=sample.detach(), dims=dims)

    @torch.no_grad()
    def sample(self, batch, noise):
        """Normalised actions (B, S, action_dim): Euler steps from noise (B, S, A) at t = 1 to t = 0."""
        prefix = self.model.prefix(self.features(batch), batch["tokens"], batch["token_mask"], batch["state"])
        x = noise
        for step in range(self.num_steps):
            t = 1 - step / self.num_steps
            if self.pin_padding:                                             # what training saw in the dims that it did not train
                x = torch.cat([x[..., :self.action_dim], t * noise[..., self.action_dim:]], dim=-1)
            x = x - self.model.velocity(prefix, x, torch.full((len(x),), t, device=x.device)) / self.num_steps
        return x[..., :self.action_dim]

    def forward(self, batch):
        return self.compute_loss(batch)


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, collate, autocast=None):
        self.model, self.collate, self.spec, self.stats, self.autocast = model, collate, collate.spec, collate.stats, autocast

    def predict(self, observations, noise=None):
        """list of {images: {camera1: (h, w, 3) uint8 RGB or float in [0, 1], ...}, state: (S,) in data units, instruction: str} -> (B, H, A) float32 in
        data units (joint targets: rad, as recorded). `noise` (B, H, max_action_dim): start of the sampling; default: the same draw for
        every observation and call, so that equal observations give equal actions."""
        for o in observations:
            wanted = [f"camera{k + 1}" for k in range(len(self.spec.cameras))]
            if missing := [c for c in wanted if c not in o["images"]]:
                raise ValueError(f"the observation has images of {sorted(o['images'])}, the policy needs {missing[0]} = {self.spec.cameras[int(missing[0][6:]) - 1]}")
            if len(np.asarray(o["state"])) != self.spec.state_dim:
                raise ValueError(f"the observation's state has {len(np.asarray(o['state']))} values, the policy needs {self.spec.state_dim}: {' and '.join(self.spec.state_keys)}")
        return self.decode(self.collate.inputs([o | dict(images=[np.asarray(o["images"][c]) for c in wanted]) for o in observations]), noise)

    def decode(self, batch, noise=None):
        """Collate.inputs' batch -> (B, H, A) float32 in data units."""
        device, rows = next(self.model.parameters()).device, len(batch["tokens"])
        if noise is None:
            noise = torch.randn(1, self.spec.chunk_size, self.collate.max_action_dim, generator=torch.Generator().manual_seed(0)).expand(rows, -1, -1)
        training = self.model.training
        self.model.eval()
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            actions = self.model.sample(to_device(batch, device), torch.as_tensor(noise).to(device))
        self.model.train(training)
        return self.collate.action_normalizer.unnormalize(actions.float().cpu().numpy())

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per episode {name, sample: callable(t) -> observation, target (M, A), hold (M, A): the action that stands still,
        phase (M,) or None}, in data units."""
        found, _ = ep.load_episodes(root)
        if unknown := sorted(set(names or []) - {e.name for e in found}):
            raise ValueError(f"'{root}' has no episode '{unknown[0]}'; it has {', '.join(e.name for e in found[:5])}, ...")
        if wrong := [c for c in self.spec.cameras if c not in found[0].cameras]:
            raise ValueError(f"'{root}' has cameras {list(found[0].cameras)}, the policy needs '{wrong[0]}'")
        definition, reader = ep.ActionDefinition(**self.spec.action_definition), ep.ImageReader()
        for e in found:
            if names is not None and e.name not in names:
                continue
            target, states = definition.targets(e), ep.robot_state(e, self.spec.state_keys)

            def sample(t, e=e, states=states):
                images = {f"camera{k + 1}": image for k, image in enumerate(read_images(reader, e, self.spec, t))}
                return dict(images=images, instruction=e.instruction, state=states[t])

            # standing still: no motion for deltas, the joints where they are for joint targets, else the previous command
            still = np.zeros_like(target) if definition.source == "ee_pose_delta" else e.qpos if self.spec.joint_targets else target[[0, *range(len(target) - 1)]]
            yield dict(name=e.name, sample=sample, target=target, hold=still, phase=None if e.phase is None else e.phase[:len(target)])

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return [tuple(pair) for pair in self.spec.action_units]


# ---- build, save, load -----------------------------------------------------------------------------------------------

LORA_TARGETS = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


class LoraLinear(nn.Linear):
    """Linear with a low-rank addition: y = (W + scale B A) x. W keeps its name, so a merged state dict has the names of the plain model."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.scale, self.dropout = base.weight, alpha / rank, dropout
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return F.linear(x, self.weight) + F.linear(F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A), self.lora_B) * self.scale

    def merged(self):
        return (self.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.weight.dtype)


def vlm_folder(source, weights):
    """Directory or hub id -> local directory with config and tokenizer files, and with `weights` the safetensors."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", "*.jinja"] + (["model*.safetensors"] if weights else [])))
    except Exception as error:  # the hub client raises a dozen types; all mean that the files cannot be had
        raise FileNotFoundError(f"'{source}' is neither a directory nor reachable on the hub ({type(error).__name__}). Give a local directory "
                                "(--policy.vlm_model_name DIR, --init_from DIR); make_demo.py writes a tiny backbone") from error


def read_vlm_files(folder):
    """{name: text} of the VLM's config, tokenizer and processor files: a checkpoint keeps them, so that it opens without the hub."""
    files = {p.name: p.read_text() for p in sorted(Path(folder).iterdir()) if p.suffix in (".json", ".txt", ".jinja") and not p.name.endswith(".index.json")}
    if "config.json" not in files or "tokenizer_config.json" not in files:
        raise FileNotFoundError(f"policy.vlm_model_name '{folder}' has {sorted(files) or 'no files'}: expected config.json and tokenizer files of a SmolVLM2")
    return files


def open_vlm_files(files):
    """-> (transformers config, tokenizer)"""
    from transformers import AutoConfig, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def read_safetensors(folder):
    from safetensors.torch import load_file

    if not (files := sorted(Path(folder).glob("model*.safetensors"))):
        raise FileNotFoundError(f"{folder} has no model.safetensors")
    return {k: v for f in files for k, v in load_file(f).items()}


def load_exact(model, tensors, source):
    """Fill `model` (or a part of it) from {name: tensor}; every tensor must find its place and every place its tensor."""
    own = model.state_dict()
    missing, unknown = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    wrong = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    if missing or unknown or wrong:
        raise ValueError(f"{source} covers {len(own) - len(missing)} of {len(own)} tensors; missing {missing[:2]}, unknown {unknown[:2]}, other shape "
                         f"{[(k, tuple(tensors[k].shape), tuple(own[k].shape)) for k in wrong[:2]]}. Nothing was loaded; compare the policy.* keys (layers, widths, dims) with that model's config")
    model.load_state_dict(tensors, assign=True)                            # keeps the file's dtypes
    return len(own)


def load_vlm(vlm, folder, num_layers):
    """SmolVLM2's own file into FlowModel's VLM: the text layers that are not used are left out, everything else must match."""
    tensors = {k: v for k, v in read_safetensors(folder).items() if not ((m := re.match(r"model\.text_model\.layers\.(\d+)\.", k)) and int(m[1]) >= num_layers)}
    if "lm_head.weight" not in tensors and "model.text_model.embed_tokens.weight" in tensors:  # tied
        tensors["lm_head.weight"] = tensors["model.text_model.embed_tokens.weight"].clone()
    return load_exact(vlm, tensors, folder)


def read_policy_weights(source):
    """A .pt of this script, a LeRobot policy directory (final_hf) or a hub id -> {name: tensor} with LeRobot's names. A .pt with EMA gives its EMA weights."""
    if str(source).endswith(".pt"):
        state = ckpt.load_state(source)
        tensors = state.get("policy_state_dict") or state.get("model_state_dict") or state
        tensors = dict(tensors) | exported_ema(state)
    else:
        tensors = read_safetensors(vlm_folder(source, weights=True))
    tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    return {k: v for k, v in tensors.items() if not k.startswith(("normalize_inputs.", "normalize_targets.", "unnormalize_outputs."))}  # of LeRobot before 0.4


def exported_ema(state):
    """{name: tensor} of a checkpoint's averaged weights with LeRobot's names, {} without EMA."""
    ema = dict(state.get("ema_state_dict") or {})
    for a in [k for k in ema if k.endswith(".lora_A")]:
        name = a.removesuffix("lora_A") + "weight"
        base, scale = state["unmerged_state_dict"][name], state["config"]["lora_alpha"] / state["config"]["lora_rank"]
        ema[name] = (base.float() + scale * ema.pop(a.removesuffix("A") + "B") @ ema.pop(a)).to(base.dtype)
    return ema


def policy_state_dict(model):
    """The 500 tensors with LeRobot's names; LoRA merged."""
    lora = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {k: lora[k].merged().detach() if k in lora else v.detach() for k, v in model.state_dict().items() if not k.endswith((".lora_A", ".lora_B"))}


def init_weights(model, seed):
    """New weights as in the originals: N(0, 0.02) in the transformers, torch's default in the projections of state, action and time and where the expert's
    cross-attention got its own layers; norms 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, nn.LayerNorm)):
                module.reset_parameters()
                if "vlm_with_expert" in name and not isinstance(module, nn.LayerNorm):
                    nn.init.normal_(module.weight, std=0.02)
                    if getattr(module, "bias", None) is not None:
                        nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for joint, layer in zip(model.model.sizes.self_attn, model.model.vlm_with_expert.lm_expert.layers):
            for name in () if joint else ("k_proj", "v_proj"):
                layer.self_attn[name].reset_parameters()


def choose_trained(model, cfg):
    """Set requires_grad: what the config leaves free, minus what cannot reach the loss (its gradient would stay None and DDP would wait for it)."""
    p, vlm = cfg.policy, model.model.vlm_with_expert.vlm
    model.requires_grad_(True)
    vlm.requires_grad_(not p.train_expert_only)
    if p.freeze_vision_encoder:
        vlm.model.vision_model.requires_grad_(False)
    model.model.state_proj.requires_grad_(p.train_state_proj)
    if cfg.train == "lora":
        parts = [model.model.vlm_with_expert.lm_expert] + ([] if p.train_expert_only else [vlm.model.text_model])
        model.model.vlm_with_expert.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            for part in parts:
                for name, module in list(part.named_modules()):
                    if isinstance(module, nn.Linear) and re.search(LORA_TARGETS + "$", name):
                        parent, leaf = name.rsplit(".", 1)
                        part.get_submodule(parent)[leaf] = LoraLinear(module, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout)
    text, last = vlm.model.text_model, model.model.last_used
    for unused in (vlm.lm_head, text.norm, *text.layers[last + 1:], text.layers[last].self_attn.q_proj, text.layers[last].self_attn.o_proj, text.layers[last].mlp,
                   text.layers[last].post_attention_layernorm):
        unused.requires_grad_(False)


def build_model(cfg, vlm_config, spec, device, dtype, tensors=None):
    """-> (SmolVLA on `device`, lines that say where its weights come from). Trained weights fp32, frozen ones in `dtype`. `tensors`: those of a
    resumed checkpoint, else of cfg.init_from or policy.pretrained_model_id, else the VLM's own and a new expert."""
    p, t = cfg.policy, cfg.training
    sizes = make_sizes(vlm_config, p)
    frozen = p.train_expert_only or p.freeze_vision_encoder or cfg.train == "lora"
    source = cfg.init_from or p.pretrained_model_id
    if tensors is None and not source and not p.load_vlm_weights and frozen and not p.allow_random_frozen_vlm:
        raise ValueError("policy.load_vlm_weights is false and parts of the VLM stay frozen (policy.train_expert_only, policy.freeze_vision_encoder or train: lora): the expert would learn on random "
                         "features. Load the weights, train everything (--policy.train_expert_only false --policy.freeze_vision_encoder false), or ask for it by name: --policy.allow_random_frozen_vlm")
    with torch.device("meta"):
        model = SmolVLA(sizes, spec.side, len(spec.action_units), t.loss_dims, spec.pin_padding, t.lambda_temporal, spec.num_steps)
    if tensors is not None:
        said = [f"{load_exact(model, tensors, cfg.resume)} tensors of {cfg.resume}"]
    elif source:
        said = [f"{load_exact(model, read_policy_weights(source), source)} tensors of {source}"]
    else:
        model = model.to_empty(device="cpu")
        init_weights(model, cfg.seed)
        said = ["expert and projections: new, from random numbers; lerobot/smolvla_base is a better start for little data (--policy.pretrained_model_id lerobot/smolvla_base)"]
        if p.load_vlm_weights:
            said.append(f"VLM: {load_vlm(model.model.vlm_with_expert.vlm, vlm_folder(p.vlm_model_name, weights=True), sizes.layers)} tensors of {p.vlm_model_name}")
        else:
            said.append("VLM: RANDOM weights, as asked for")
    choose_trained(model, cfg)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    model.model.checkpointing = t.gradient_checkpointing
    return model.to(device), said


def save_model(folder, tensors, cfg, collate, vlm_files, device="cpu"):
    """Write LeRobot's saved-policy format: config.json, model.safetensors (`tensors`: policy_state_dict), pre- and post-processor with the statistics. Beside
    it policy.json (what load_policy needs) and vlm/ (the backbone's config and tokenizer files, for use without the hub)."""
    from safetensors.torch import save_file

    folder, spec, p = Path(folder), collate.spec, cfg.policy
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    feature = lambda kind, shape: dict(type=kind, shape=list(shape))
    inputs = {f"observation.images.camera{k + 1}": feature("VISUAL", [3, *shape]) for k, shape in enumerate(spec.image_shapes)} | {"observation.state": feature("STATE", [spec.state_dim])}
    output = dict(action=feature("ACTION", [len(spec.action_units)]))
    norm_map = dict(VISUAL="IDENTITY", STATE=spec.normalization, ACTION=spec.normalization)
    # an unknown field is an error in LeRobot, a missing one takes its default: exactly the fields that 0.3.4 to 0.6.2 know
    config = dict(
        type="smolvla", n_obs_steps=1, input_features=inputs, output_features=output, device=device, use_amp=False, push_to_hub=False, repo_id=None, private=None, tags=None, license=None,
        pretrained_path=None, chunk_size=spec.chunk_size, n_action_steps=spec.n_action_steps, normalization_mapping=norm_map, max_state_dim=p.max_state_dim, max_action_dim=p.max_action_dim,
        resize_imgs_with_padding=[spec.side, spec.side], empty_cameras=0, adapt_to_pi_aloha=False, use_delta_joint_actions_aloha=False, tokenizer_max_length=spec.tokenizer_max_length,
        num_steps=spec.num_steps, use_cache=True, freeze_vision_encoder=p.freeze_vision_encoder, train_expert_only=p.train_expert_only, train_state_proj=p.train_state_proj,
        optimizer_lr=cfg.optimizer.lr, optimizer_betas=list(cfg.optimizer.betas), optimizer_eps=cfg.optimizer.eps, optimizer_weight_decay=cfg.optimizer.weight_decay,
        optimizer_grad_clip_norm=cfg.optimizer.grad_clip_norm, scheduler_warmup_steps=cfg.scheduler.num_warmup_steps, scheduler_decay_steps=cfg.scheduler.num_decay_steps,
        scheduler_decay_lr=cfg.scheduler.decay_lr, vlm_model_name=p.vlm_model_name, load_vlm_weights=False, add_image_special_tokens=False, attention_mode=p.attention_mode, prefix_length=-1,
        pad_language_to="max_length", num_expert_layers=p.num_expert_layers, num_vlm_layers=p.num_vlm_layers, self_attn_every_n_layers=p.self_attn_every_n_layers,
        expert_width_multiplier=p.expert_width_multiplier, min_period=p.min_period, max_period=p.max_period)
    write_json(folder / "config.json", config)
    step = lambda name, state=None, **settings: dict(registry_name=name, config=settings) | (dict(state_file=state) if state else {})
    before, after = "policy_preprocessor_step_5_normalizer_processor.safetensors", "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    write_json(folder / "policy_preprocessor.json", dict(name="policy_preprocessor", steps=[
        step("rename_observations_processor", rename_map={}), step("to_batch_processor"), step("smolvla_new_line_processor"),
        step("tokenizer_processor", max_length=spec.tokenizer_max_length, task_key="task", padding_side="right", padding="max_length", truncation=True, tokenizer_name=p.vlm_model_name),
        step("device_processor", device=device, float_dtype=None), step("normalizer_processor", before, eps=1e-8, features=inputs | output, norm_map=norm_map)]))
    write_json(folder / "policy_postprocessor.json", dict(name="policy_postprocessor", steps=[
        step("unnormalizer_processor", after, eps=1e-8, features=output, norm_map=norm_map), step("device_processor", device="cpu", float_dtype=None)]))
    stats = lerobot_stats(collate)
    for name in (before, after):
        save_file(stats, folder / name)
    if all(name in entry for entry in (collate.stats["action"], collate.stats["observation.state"]) for name in LISTS):  # not of a policy that LeRobot made
        write_json(folder / "policy.json", dict(format_version=FORMAT, script=Path(__file__).stem, spec=dataclasses.asdict(spec)))
        save_stats(folder / "dataset_stats.json", collate.stats)
    (folder / "vlm").mkdir()
    for name, text in vlm_files.items():
        (folder / "vlm" / name).write_text(text)


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2))


def lerobot_stats(collate):
    """{"action.mean": (D,) f4, ...}: the statistics with which LeRobot's normaliser computes what ours does, also in a dimension that never moves
    (LeRobot would divide its noise by 1e-8)."""
    out = {}
    for key, n in (("action", collate.action_normalizer), ("observation.state", collate.state_normalizer)):
        values = {name: np.asarray(collate.stats[key][name], np.float64) for name in LEROBOT_STATS if name in collate.stats[key]}
        # a constant state must become 0 whatever its noise; a constant action must come back as the constant whatever was sampled
        half = np.where(n.constant, 0.0 if key == "action" else 1.0, n.half)
        if n.mode == "mean_std":
            used = dict(mean=n.center, std=half)
        else:
            used = dict(zip(("min", "max") if n.mode == "min_max" else ("q01", "q99"), (n.center - half, n.center + half)))
        if collate.spec.normalization != "IDENTITY":
            values |= used
        out |= {f"{key}.{name}": torch.from_numpy(v.astype(np.float32)) for name, v in values.items()}
    return out


def read_lerobot(folder):
    """A LeRobot policy directory -> (PolicyConfig, PolicySpec, stats, config.json). What LeRobot does not write down (camera names of the recorder, what the
    action is) is unknown without our policy.json: predict works, open_episodes does not."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    if config.get("type") != "smolvla":
        raise ValueError(f"{folder}/config.json is of type '{config.get('type')}', expected smolvla")
    if config.get("add_image_special_tokens"):
        raise ValueError(f"{folder}: add_image_special_tokens is true; this script implements SmolVLA without them, as lerobot/smolvla_base is")
    policy = PolicyConfig(**{f.name: config[f.name] for f in dataclasses.fields(PolicyConfig) if f.name in config and f.name != "load_vlm_weights"})
    if (folder / "policy.json").is_file():
        about = json.loads((folder / "policy.json").read_text())
        if about["format_version"] != FORMAT:
            raise ValueError(f"{folder}: policy.json has format_version {about['format_version']}, this code reads {FORMAT}")
        spec = PolicySpec(**about["spec"])
        return policy, spec, load_stats(folder / "dataset_stats.json", ("action", "observation.state"), spec.action_definition), config
    from safetensors.torch import load_file

    file = folder / "policy_preprocessor_step_5_normalizer_processor.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no {file.name}: a policy without statistics gives actions in unknown units. Fine-tune from it instead: --init_from {folder}")
    stats = {}
    for key, value in load_file(file).items():
        name, kind = key.rsplit(".", 1)
        stats.setdefault(name, {})[kind] = value.tolist()
    cameras = [k for k, v in config["input_features"].items() if v["type"] == "VISUAL"]
    mapping, dims = config["normalization_mapping"], config["output_features"]["action"]["shape"][0]
    if mapping["STATE"] != mapping["ACTION"]:
        raise ValueError(f"{folder}: state is normalised by {mapping['STATE']}, action by {mapping['ACTION']}; expected the same")
    spec = PolicySpec(config["chunk_size"], cameras, [config["input_features"][c]["shape"][1:] for c in cameras], config["resize_imgs_with_padding"][0], [],
                      config["input_features"]["observation.state"]["shape"][0], dict(source="action", dim=dims, rotation_unit="rad"), False, [[f"action{i + 1}", ""] for i in range(dims)],
                      mapping["STATE"], "", config["tokenizer_max_length"], config["num_steps"], config["n_action_steps"], False)
    return policy, spec, stats, config


def load_policy(path, device=None):
    """Open a checkpoint for inference: a .pt of this script, final_hf, any LeRobot SmolVLA directory, or an output_dir (its newest checkpoint)."""
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        steps = ckpt.steps_in(path / "checkpoints", STEP_FILE) or ckpt.steps_in(path, STEP_FILE)
        if not steps:
            raise FileNotFoundError(f"{path} has neither config.json (a LeRobot policy) nor checkpoint_step_N.pt; expected a checkpoint of train_smolvla_sim.py")
        path = list(steps.values())[-1]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if path.is_dir():
        policy, spec, stats, _ = read_lerobot(path)
        name = policy.vlm_model_name
        files = read_vlm_files(path / "vlm" if (path / "vlm").is_dir() else path / name if (path / name).is_dir() else path.parent / name if (path.parent / name).is_dir() else vlm_folder(name, weights=False))
        tensors = read_policy_weights(path)
    else:
        state = ckpt.load_state(path)
        if state.get("format_version") != FORMAT or "spec" not in state:
            raise ValueError(f"{path} has format_version {state.get('format_version')}, this code reads {FORMAT}. Use its weights for a new run: --init_from {path}")
        policy, spec, stats, files = PolicyConfig(**state["config"]["policy"]), PolicySpec(**state["spec"]), state["normalization_stats"], state["vlm_files"]
        tensors = dict(state["policy_state_dict"]) | exported_ema(state)
    vlm_config, tokenizer = open_vlm_files(files)
    with torch.device("meta"):
        model = SmolVLA(make_sizes(vlm_config, policy), spec.side, len(spec.action_units), pin_padding=spec.pin_padding, num_steps=spec.num_steps)
    load_exact(model, tensors, path)
    # on a GPU the weights keep the dtypes of the training: trained ones fp32, frozen ones bf16
    model = model.requires_grad_(False).to(device, None if device.type == "cuda" else torch.float32)
    return Policy(model.eval(), Collate(tokenizer, spec, stats, policy.max_state_dim, policy.max_action_dim), torch.bfloat16 if device.type == "cuda" else None)


class FeatureCache:
    """Image features of a frozen VLM on disk: one (frames, K, T, D) array per episode file, valid for one set of weights and one preprocessing."""

    def __init__(self, folder, model, spec):
        digest = hashlib.sha256(json.dumps([spec.cameras, spec.image_shapes, spec.side]).encode())
        vlm = model.model.vlm_with_expert.vlm.model
        for part in (vlm.vision_model, vlm.connector):
            for name, tensor in part.state_dict().items():
                digest.update(f"{name}{tensor.dtype}".encode() + tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        self.folder, self.spec, self._open = Path(folder) / digest.hexdigest()[:16], spec, {}

    def path(self, episode):
        """A file that was recorded again (size or time changed) gets features of its own."""
        about = os.stat(episode.path)
        return self.folder / f"{hashlib.sha256(f'{episode.name}{about.st_size}{about.st_mtime_ns}'.encode()).hexdigest()[:24]}.npy"

    def build(self, episodes, model, device, autocast, rank, world, batch_size):
        """Compute what is missing, every rank its share."""
        reader, todo = ep.ImageReader(), [e for e in episodes if not self.path(e).is_file()]
        for e in tqdm(todo[rank::world], desc="image features", unit="episode", disable=None if rank == 0 else True):
            rows = []
            for t in range(0, e.num_frames, batch_size):
                frames = [read_images(reader, e, self.spec, f) for f in range(t, min(t + batch_size, e.num_frames))]
                flat = torch.from_numpy(np.stack([image for images in frames for image in images])).to(device)
                with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
                    features = model.features(dict(images=[(torch.arange(len(flat), device=device), flat)], tokens=frames))
                rows.append(features.unflatten(1, (len(self.spec.cameras), -1)).to(autocast or torch.float32).cpu())
            bits = torch.cat(rows)
            with ckpt.atomic_path(self.path(e)) as temporary, open(temporary, "wb") as f:
                np.save(f, (bits.view(torch.int16) if bits.dtype == torch.bfloat16 else bits).numpy())
        return len(todo)

    def read(self, episode, frame):
        """-> (K, T, D) tensor, bf16 where it was computed so."""
        if episode.path not in self._open:
            self._open[episode.path] = np.load(self.path(episode), mmap_mode="r")
        row = torch.from_numpy(np.array(self._open[episode.path][frame]))
        return row.view(torch.bfloat16) if row.dtype == torch.int16 else row

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}


# ---- training --------------------------------------------------------------------------------------------------------

def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0, counted from the start of the schedule): linear warm-up, cosine, and its last value beyond the end."""
    s, peak = cfg.scheduler, cfg.optimizer.lr
    if step < s.num_warmup_steps:
        return peak * (step + 1) / s.num_warmup_steps
    end = s.decay_lr / s.peak_lr
    progress = min(1.0, (step - s.num_warmup_steps) / max(1, s.num_decay_steps - s.num_warmup_steps))
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Spikes:
    """Loss spikes and non-finite steps: loss_spikes.txt to read, loss_spikes.csv to filter. The samples of a step are listed worst first."""

    COLUMNS = ("step", "loss", "action_loss", "temporal_loss", "moving_avg", "ratio", "episode_indices", "frame_indices", "episode_paths", "sample_losses")

    def __init__(self, folder, threshold, history=(), start=0, rank=0):
        self.folder, self.threshold, self.history, self.rank = Path(folder), threshold, list(history), rank
        if rank == 0:
            rows = []
            if start and (self.folder / "loss_spikes.csv").is_file():
                with open(self.folder / "loss_spikes.csv", newline="") as f:
                    rows = [row for row in csv.DictReader(f) if int(row["step"]) <= start]   # what came after will be done again
            (self.folder / "loss_spikes.txt").write_text(f"Loss spikes\n{'=' * 80}\nThreshold: {threshold}x moving average\n")
            with open(self.folder / "loss_spikes.csv", "w", newline="") as f:
                csv.writer(f).writerow(self.COLUMNS)
            for row in rows:
                self._append(row)

    def check(self, loss):
        """Take the loss of a step -> moving average if it is a spike, else None."""
        self.history = (self.history + [loss])[-100:]
        average = sum(self.history) / len(self.history)
        return average if len(self.history) >= 50 and loss > self.threshold * average else None

    def record(self, step, losses, average, names, sample_losses, paths):
        """Write one step down -> episode indices, worst sample first. names: (episode_index, episode, frame) of this rank's samples, sample_losses: theirs.
        Every rank must call it."""
        rows = list(zip(sample_losses, names))
        if dist.is_initialized():
            gathered = [None] * dist.get_world_size()
            dist.all_gather_object(gathered, rows)
            rows = [row for part in gathered for row in part]
        rows.sort(key=lambda row: -row[0] if math.isfinite(row[0]) else -math.inf)
        indices = list(dict.fromkeys(name[0] for _, name in rows))
        if self.rank == 0:
            number = lambda v: "N/A" if v is None else f"{v:.6f}"
            self._append(dict(zip(self.COLUMNS, (
                step, *map(number, losses), number(average), "N/A" if average is None else f"{losses[0] / average:.2f}", [n[0] for _, n in rows], [n[2] for _, n in rows],
                "; ".join(f"[{i}] {paths[i]}" for i in indices), [round(v, 6) for v, _ in rows]))))
        return indices

    def _append(self, row):
        with open(self.folder / "loss_spikes.csv", "a", newline="") as f:
            csv.DictWriter(f, self.COLUMNS).writerow(row)
        samples = len(json.loads(str(row["frame_indices"])))
        with open(self.folder / "loss_spikes.txt", "a") as f:
            f.write(f"\nLOSS SPIKE at Step {row['step']}\n  Loss: {row['loss']} (moving avg: {row['moving_avg']}, ratio: {row['ratio']}x)\n  Action Loss: {row['action_loss']}\n"
                    f"  Temporal Loss: {row['temporal_loss']}\n  Batch Information (worst sample first):\n    Size: {samples}\n    Episode indices: {row['episode_indices']}\n"
                    f"    Frame indices: {row['frame_indices']}\n    Sample losses: {row['sample_losses']}\n  Episode Paths:\n"
                    + "".join(f"    {path}\n" for path in row["episode_paths"].split("; ")))


class Ema:
    """Moving average of the trained weights; `swapped` puts it into the model for a while."""

    def __init__(self, parameters, decay, saved=None):
        self.parameters, self.decay = parameters, decay                      # parameters {name: Parameter}
        self.average = {k: p.detach().clone() if saved is None else saved[k].to(p.device) for k, p in parameters.items()} if decay else {}

    @torch.no_grad()
    def update(self, step):
        if self.decay:
            decay = min(self.decay, (1 + step) / (10 + step))                # the first weights are no part of an average worth keeping
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextlib.contextmanager
    def swapped(self):
        raw = {k: p.data for k, p in self.parameters.items()}
        for k, average in self.average.items():
            self.parameters[k].data = average
        try:
            yield
        finally:
            for k, p in self.parameters.items():
                p.data = raw[k]


def describe(cfg, data, print0):
    """Say what was found: episodes, shares, state and action meaning and ranges."""
    frames = sum(data.episodes[i].num_frames for i in data.train)
    print0(f"data      {len(data.train)} training episodes, {frames} frames; {len(data.validation)} validation episodes; {cfg.dataset.root_dir}")
    for message in data.excluded:
        print0(f"excluded  {message}")
    print0("cameras   " + ", ".join(f"{c} -> camera{k + 1} {h}x{w}" for k, (c, (h, w)) in enumerate(zip(data.spec.cameras, data.spec.image_shapes))))
    d = data.spec.action_definition
    print0(f"state     {' + '.join(data.spec.state_keys)}, {data.spec.state_dim} dims (padded to {cfg.policy.max_state_dim})")
    print0(f"action    {'joint targets' if data.spec.joint_targets else d['source']}, {d['dim']} dims (padded to {cfg.policy.max_action_dim}), chunk {data.spec.chunk_size}; "
           f"normalisation {data.spec.normalization}")
    if d["source"] == "action" and ep.records_past_motion(data.episodes):
        print0("warning   the recorded 'action' is the motion already made (pose[t] - pose[t-1]), so this trains on yesterday's action; "
               "set dataset.use_ee_pose_delta_as_action: true for the motion that follows")
    for key in ("observation.state", "action"):
        for name in ("mean", "std", "min", "max"):
            print0(f"          {key.rsplit('.', 1)[-1]:<7}{name:<5}" + " ".join(f"{v:11.4g}" for v in data.stats[key][name]))
    texts = {data.episodes[i].instruction or data.spec.task_instruction for i in data.train}
    print0(f"text      {len(texts)} instruction(s), {sum(data.episodes[i].instruction is not None for i in data.train)} episodes bring their own; e.g. {sorted(texts)[0]!r}")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer the text stays unbuilt, and says so."""
    data = load_data(cfg)
    describe(cfg, data, print)
    dataset = SmolVLADataset(data, data.train, cfg.policy.max_action_dim, cfg.seed, cfg.dataset if cfg.dataset.augment else None)
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights(cfg.dataset.weights))
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.training.batch_size, len(dataset)))]
    print(f"samples   {len(dataset)} (frames with a target); batch of {len(items)}, first: {items[0]['episode']} frame {items[0]['frame']}")
    for k, camera in enumerate(data.spec.cameras):
        shapes = sorted({item["images"][k].shape for item in items})
        print(f"          camera{k + 1:<13} {str(shapes[0]):<24} uint8    {min(i['images'][k].min() for i in items)} .. {max(i['images'][k].max() for i in items)}; the model sees "
              f"{content_size(*shapes[0][:2], data.spec.side)} in {data.spec.side}x{data.spec.side}" + (f"; other sizes {shapes[1:]}" if shapes[1:] else ""))
    try:
        _, tokenizer = open_vlm_files(read_vlm_files(vlm_folder(cfg.policy.vlm_model_name, weights=False)))
        batch = Collate(tokenizer, data.spec, data.stats, cfg.policy.max_state_dim, cfg.policy.max_action_dim)(items)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor):
                print(f"          {key:<19} {str(tuple(value.shape)):<24} {str(value.dtype).removeprefix('torch.'):<8} {value.min().item():.4g} .. {value.max().item():.4g}")
        print(f"text      {tokenizer.decode(batch['tokens'][0][batch['token_mask'][0]])!r}")
    except FileNotFoundError as error:
        print(f"note      tokens are not shown: {error}")
    if cfg.check_images:
        reader = ep.ImageReader()
        for e in tqdm(data.episodes, desc="decoding every image", unit="episode", disable=None):
            for camera in e.cameras:
                for t in range(e.num_frames):
                    reader.read(e, camera, t)
        print("images    every image of every camera decodes")
    print("check passed")


def validate(core, policy, dataset, cfg, device, rank, world, reduce):
    """-> {val/loss, val/action_loss, val/temporal_loss, val/action_mae: mean over dims in data units, val/mae_<dim>}: the loss with noise and time that belong to
    the frame, so that two validations differ by the weights alone; sums over all ranks, padded steps do not count."""
    v, size, names = cfg.validation, cfg.training.batch_size, [n for n, _ in policy.action_names()]
    pick = np.unique(np.linspace(0, len(dataset) - 1, min(v.num_samples, len(dataset))).astype(int))
    sampled = set(pick[np.unique(np.linspace(0, len(pick) - 1, min(v.num_sampled_chunks, len(pick))).astype(int))].tolist()) if v.num_sampled_chunks else set()
    sums = torch.zeros(5 + 1 + len(names), dtype=torch.float64)              # flow, real, temporal, steps, pairs | sampled steps, error per dim
    core.eval()
    mine = pick[rank::world]
    for i in range(0, len(mine), size):
        chosen = [int(k) for k in mine[i:i + size]]
        items = [dataset[(k, k)] for k in chosen]
        batch = policy.collate(items)
        with torch.no_grad(), torch.autocast(device.type, policy.autocast, enabled=policy.autocast is not None):
            out = core(to_device(batch, device))
        real = ~batch["is_pad"]
        sums[:5] += torch.stack([out["flow_sum"] / out["dims"], out["real_sum"] / len(names), out["temporal_sum"] / len(names), real.sum().to(device), real[:, 1:].sum().to(device)]).cpu()
        if wanted := [item for k, item in zip(chosen, items) if k in sampled]:
            predicted = policy.decode(policy.collate.inputs(wanted))
            for chunk, item in zip(predicted, wanted):
                keep = ~item["is_pad"]
                sums[5] += int(keep.sum())
                sums[6:] += torch.from_numpy(np.abs(chunk - item["action"])[keep].sum(0))
    core.train()
    flow, real, temporal, steps, pairs, count, *errors = reduce(sums).tolist()
    temporal = cfg.training.lambda_temporal * temporal / max(pairs, 1)
    mae = {} if not count else {"val/action_mae": sum(errors) / count / len(names)} | {f"val/mae_{n}": e / count for n, e in zip(names, errors)}
    return {"val/loss": flow / steps + temporal, "val/action_loss": real / steps, "val/temporal_loss": temporal} | mae


def ram():
    """(GB in use on this machine, share in %)"""
    fields = {line.split(":")[0]: int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines()}
    used = fields["MemTotal"] - fields["MemAvailable"]
    return used / 1e6, 100 * used / fields["MemTotal"]


def flat(tree, prefix=""):
    """Nested config dict -> {"optimizer.lr": ...}"""
    return {k2: v2 for k, v in tree.items() for k2, v2 in (flat(v, f"{prefix}{k}.") if isinstance(v, dict) and k != "weights" else {f"{prefix}{k}": v}).items()}


# without these the moments, the noise or the order of the samples would belong to another run
FIXED = ("seed", "train", "lora_rank", "lora_alpha", "training.loss_dims", "policy.num_vlm_layers", "policy.num_expert_layers", "policy.expert_width_multiplier", "policy.self_attn_every_n_layers",
         "policy.attention_mode", "policy.max_state_dim", "policy.max_action_dim", "policy.freeze_vision_encoder", "policy.train_expert_only", "policy.train_state_proj", "dataset.weights")


def plan_resume(cfg, state, path, data, out):
    """What --resume means here -> ("resume", list of changed settings) or ("new run", None): another data set's config is guide 2's stage 3. Anything
    in between is refused."""
    if state.get("format_version") != FORMAT or "optimizer_state_dict" not in state or "fingerprint" not in state:
        raise ValueError(f"--resume {path}: not a checkpoint of this version (format_version {state.get('format_version')}, expected {FORMAT}). Start a new run from its weights: --init_from {path}")
    then, now = state["fingerprint"], data.fingerprint()
    new_run = f"start a new run from its weights: --init_from {path} --output_dir ANOTHER_FOLDER"
    if then["episodes"] != now["episodes"]:
        if out.resolve() in path.resolve().parents:
            raise ValueError(f"--resume {path}: the episodes changed since then ({state['num_episodes']} training episodes then, {len(data.train)} now, or other names, lengths or split), "
                             f"so this would not be the same run. Put the data back, or {new_run}")
        if cfg.reset_scheduler:
            raise ValueError(f"--reset_scheduler keeps the optimizer of the same run, but {path} was trained on other data. Drop it (a new run starts a new schedule anyway)")
        return "new run", None
    if then["settings"] != now["settings"]:
        now_spec = dataclasses.asdict(data.spec)
        changed = [f"{k} {state['spec'].get(k)} -> {v}" for k, v in now_spec.items() if state["spec"].get(k) != v]
        raise ValueError(f"--resume {path}: same episodes, other settings ({'; '.join(changed)}). Set them back, or {new_run}")
    old, new = flat(state["config"]), flat(dataclasses.asdict(cfg))
    if wrong := [k for k in FIXED if old.get(k) != new[k]]:
        raise ValueError(f"--resume {path} was trained with {wrong[0]} {old.get(wrong[0])}, now it is {new[wrong[0]]}. Set it back, or {new_run}")
    if state["step"] >= cfg.training.steps:
        raise ValueError(f"--resume {path} is at step {state['step']} of the same data, training.steps is {cfg.training.steps}: nothing is left to do. "
                         f"For {cfg.training.steps} more steps of the same run: --steps {state['step'] + cfg.training.steps}; for {cfg.training.steps} new steps, {new_run}")
    ignored = ("resume", "reset_scheduler", "init_from", "output_dir", "check", "check_images")
    return "resume", [f"{k} {old.get(k)} -> {v}" for k, v in new.items() if old.get(k) != v and k not in ignored]


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    t, v = cfg.training, cfg.validation
    for key, value in (("training.batch_size", t.batch_size), ("training.gradient_accumulation_steps", t.gradient_accumulation_steps), ("training.steps", t.steps), ("training.save_freq", t.save_freq),
                       ("training.log_freq", t.log_freq), ("validation.val_freq", v.val_freq), ("validation.num_samples", v.num_samples), ("policy.num_steps", cfg.policy.num_steps)):
        if value < 1:
            raise ValueError(f"{key} is {value}: expected 1 or more")
    if t.use_amp:
        raise ValueError("training.use_amp is true: fp16 is not offered. Use training.use_bfloat16: true, the same speed without loss scaling")
    if cfg.policy.n_obs_steps != 1:
        raise ValueError(f"policy.n_obs_steps is {cfg.policy.n_obs_steps}: SmolVLA sees 1 frame")
    if not 1 <= cfg.policy.n_action_steps <= cfg.policy.chunk_size:
        raise ValueError(f"policy.n_action_steps is {cfg.policy.n_action_steps}: expected 1..{cfg.policy.chunk_size} (policy.chunk_size)")
    if not 0 <= t.ema_decay < 1 or t.lambda_temporal < 0 or t.loss_spike_threshold <= 0:
        raise ValueError(f"training.ema_decay {t.ema_decay}, lambda_temporal {t.lambda_temporal}, loss_spike_threshold {t.loss_spike_threshold}: expected 0 <= ema_decay < 1, lambda_temporal >= 0, threshold > 0")
    if len(cfg.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas is {cfg.optimizer.betas}: expected two numbers")
    if t.feature_cache and (cfg.dataset.augment or not cfg.policy.train_expert_only):
        raise ValueError("training.feature_cache keeps the image features of a frozen VLM: it needs policy.train_expert_only: true and dataset.augment: false")
    if cfg.resume and cfg.init_from:
        raise ValueError(f"--resume {cfg.resume} and --init_from {cfg.init_from}: the first continues a run, the second starts one; give one of them")
    if cfg.reset_scheduler and not cfg.resume:
        raise ValueError("--reset_scheduler restarts the schedule of a resumed run: add --resume CHECKPOINT")


def main(cfg):
    check_config(cfg)
    if cfg.check:
        check_data(cfg)
        return

    # ---- inputs: everything that can be wrong is found before weights are loaded
    cuda, t = torch.cuda.is_available(), cfg.training
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    autocast = torch.bfloat16 if cuda and t.use_bfloat16 else None
    print0 = print if rank == 0 else lambda *_: None
    out = Path(cfg.output_dir)
    folder = out / "checkpoints"
    there = ckpt.steps_in(folder, STEP_FILE)
    path = next(reversed(there.values()), None) if cfg.resume == "auto" else Path(cfg.resume) if cfg.resume else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint; '{folder}' has {', '.join(p.name for p in there.values()) or 'none'}")
    if cfg.resume == "auto":
        cfg = dataclasses.replace(cfg, resume=str(path) if path else None)
        print0(f"resume    auto: {path or f'no checkpoint in {folder}, starting a new run'}")
    state = ckpt.load_state(path) if path else None
    same_data_stats = None
    data = load_data(cfg, rank)
    if state is not None:
        kind, changed = plan_resume(cfg, state, path, data, out)
        if kind == "new run":
            print0(f"resume    {path} was trained on other data: this is a NEW RUN from its weights (as --init_from): {t.steps} steps from 0, peak lr {cfg.optimizer.lr:g}, statistics of the new data")
            cfg, state = dataclasses.replace(cfg, resume=None, init_from=str(path)), None
        else:
            print0(f"resume    {path}, step {state['step']} of {t.steps}" + ("; the schedule starts again" if cfg.reset_scheduler else "") + (f"; changed: {'; '.join(changed)}" if changed else ""))
            data.stats = state["normalization_stats"]
    if state is None and out.is_dir() and (there or (out / "metrics.jsonl").exists()):
        raise FileExistsError(f"output_dir '{out}' already holds a run. Continue it with --resume auto, or choose another --output_dir")
    if world > 1:
        dist.barrier()                                                       # all ranks have looked before rank 0 writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(folder)

    def reduce(tensor):
        """Sum over the ranks; float64 stays on the CPU where the backend allows."""
        if world > 1:
            tensor = tensor.to(device, torch.float64)
            dist.all_reduce(tensor)
        return tensor

    # ---- model
    describe(cfg, data, print0)
    files = state["vlm_files"] if state else read_vlm_files(vlm_folder(cfg.policy.vlm_model_name, weights=False))
    vlm_config, tokenizer = open_vlm_files(files)
    tensors = None if state is None else dict(state["policy_state_dict"]) | {k: v for k, v in state["unmerged_state_dict"].items() if not k.endswith((".lora_A", ".lora_B"))}
    core, said = build_model(cfg, vlm_config, data.spec, device, autocast or torch.float32, tensors)
    collate = Collate(tokenizer, data.spec, data.stats, cfg.policy.max_state_dim, cfg.policy.max_action_dim)
    policy = Policy(core, collate, autocast)
    trained = {n: p for n, p in core.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("nothing is left to train: every part is frozen")
    optimizer = torch.optim.AdamW(trained.values(), lr=cfg.optimizer.lr, betas=tuple(cfg.optimizer.betas), eps=cfg.optimizer.eps, weight_decay=cfg.optimizer.weight_decay, fused=cuda or None)
    start, position, schedule_start = (state["step"], state["position"], state["scheduler_state_dict"]["start"]) if state else (0, 0, 0)
    best, best_step = (state["best_val_loss"], state["best_step"]) if state else (None, None)
    if cfg.reset_scheduler and state:
        schedule_start = start
    if state:
        ckpt.restore_training_state(core, optimizer, dict(trained=dict(state["policy_state_dict"]) | state["unmerged_state_dict"], moments=state["optimizer_state_dict"]))
    ema = Ema(trained, t.ema_decay, state["ema_state_dict"] if state and state["ema_state_dict"] else None)
    history = state["spike_history"] if state else []
    state = tensors = None
    if t.use_torch_compile:
        core.compile()

    # ---- data
    cache = None
    if t.feature_cache:
        cache = FeatureCache(t.feature_cache, core, data.spec)
        built = cache.build(data.episodes, core, device, autocast, rank, world, t.batch_size)
        print0(f"features  of {len(data.episodes)} episodes in {cache.folder}, {built} of them computed now")
        if world > 1:
            dist.barrier()
    dataset = SmolVLADataset(data, data.train, cfg.policy.max_action_dim, cfg.seed, cfg.dataset if cfg.dataset.augment else None, cache)
    held_out = SmolVLADataset(data, data.validation, cfg.policy.max_action_dim, cfg.seed, features=cache)
    accumulation, global_batch = t.gradient_accumulation_steps, t.batch_size * world * t.gradient_accumulation_steps
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights(cfg.dataset.weights))
    batches = RankBatches(order, t.batch_size, accumulation, rank, world, position, t.steps - start)
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate, num_workers=t.num_workers, pin_memory=cuda and t.pin_memory, prefetch_factor=4 if t.num_workers else None)
    model = nn.parallel.DistributedDataParallel(core, device_ids=[local] if cuda else None, gradient_as_bucket_view=True) if world > 1 else core
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in core.parameters())
    size = sum(p.numel() * p.element_size() for p in core.parameters()) + count * (8 + 4 * bool(t.ema_decay))
    for line in said:
        print0(f"weights   {line}")
    print0(f"model     {cfg.policy.vlm_model_name}, train {cfg.train}: {count:,} of {total:,} parameters trainable; {'bf16 autocast' if autocast else 'fp32'}; {world} x {device.type}")
    print0(f"batch     {t.batch_size} x {world} ranks x {accumulation} accumulation = {global_batch} samples per step; {len(dataset)} samples = {len(dataset) / global_batch:.1f} steps per epoch")
    print0(f"steps     {start} -> {t.steps}; lr {lr_at(start - schedule_start, cfg):.2e} -> {lr_at(t.steps - 1 - schedule_start, cfg):.2e}; a checkpoint is about {size / 1e9:.2f} GB, "
           f"{'all are' if not t.keep_checkpoints else f'the newest {t.keep_checkpoints} are'} kept in {folder}")
    validation_names = [data.episodes[i].name for i in data.validation]
    if rank == 0:
        save_config(cfg, out / "config.yaml")
        shutil.copy(__file__, out / Path(__file__).name)
        save_stats(out / "dataset_stats.yaml", data.stats)
        ep.write_validation_list(out / "validation_episodes.txt", data.episodes, data.validation)
        write_json(folder / "meta.json", dict(script=Path(__file__).stem, validation=validation_names))   # evaluate.py finds the script and the held-out episodes here
    w = cfg.wandb
    wandb = runlog.WandbConfig(mode=w.mode if w.enable else "disabled", entity=w.entity, name=w.name or time.strftime("smolvla_sim_%Y%m%d_%H%M%S"), tags=w.tags)
    log = runlog.RunLog(out, t.steps, start, rank, w.project, wandb, dataclasses.asdict(cfg))
    spikes = Spikes(out, t.loss_spike_threshold, history, start, rank)
    stop = ckpt.StopSignal()

    def save(step, position):
        """Write checkpoint_step_N.pt and checkpoint_latest.pt on rank 0; True if they are in place. A full disk costs the new checkpoint, never an old one."""
        ok = True
        if rank == 0:
            _, moments = ckpt.training_state(core, optimizer)
            lora = [n.removesuffix("lora_A") for n in trained if n.endswith(".lora_A")]
            unmerged = {f"{n}{k}": core.get_parameter(f"{n}{k}").detach().cpu() for n in lora for k in ("weight", "lora_A", "lora_B")}
            content = dict(
                format_version=FORMAT, script=Path(__file__).stem, step=step, epoch=position // len(dataset), position=position, world_size=world, policy_state_dict={k: v.cpu() for k, v in policy_state_dict(core).items()},
                unmerged_state_dict=unmerged, ema_state_dict={k: v.cpu() for k, v in ema.average.items()}, optimizer_state_dict=moments, scheduler_state_dict=dict(start=schedule_start),
                config=dataclasses.asdict(cfg), spec=dataclasses.asdict(data.spec), normalization_stats=data.stats, fingerprint=data.fingerprint(), num_episodes=len(data.train),
                validation=validation_names, vlm_files=files, spike_history=spikes.history, best_val_loss=best, best_step=best_step,
                **{f"action_{k}": torch.tensor(data.stats["action"][k]) for k in ("min", "max", "mean", "std")})
            try:
                ckpt.require_space(folder, int(1.1 * size))
                with ckpt.atomic_path(folder / f"checkpoint_step_{step}.pt") as temporary:
                    ckpt.save_state(temporary, content)
                with ckpt.atomic_path(folder / "checkpoint_latest.pt") as temporary:
                    try:
                        os.link(folder / f"checkpoint_step_{step}.pt", temporary)   # the same bytes under a second name
                    except OSError:                                          # a file system without hard links
                        shutil.copyfile(folder / f"checkpoint_step_{step}.pt", temporary)
                ckpt.rotate(folder, t.keep_checkpoints, protect=best_step, pattern=STEP_FILE)
            except ckpt.DiskFull as error:
                log.print(f"CHECKPOINT NOT SAVED at step {step}: {error}")
                ok = False
        return bool(reduce(torch.tensor(float(ok))).item() == world)         # others are ok by default

    # ---- loop
    core.train()
    batch_iterator, saved_at, skipped, skipped_in_row, step = iter(loader), start, 0, 0, start
    window, wait, t_log = [], 0.0, time.perf_counter()                       # (loss, action, temporal, gradient norm) since the last log line
    paths = [e.path for e in data.episodes]
    while step < t.steps:
        lr = lr_at(step - schedule_start, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        t_wait = time.perf_counter()
        micro = [next(batch_iterator) for _ in range(accumulation)]
        wait += time.perf_counter() - t_wait
        # unpadded steps and pairs of the whole optimizer step over all ranks: what the losses are divided by; and whether any rank was told to stop
        real = [~b["is_pad"] for b in micro]
        steps, pairs, told_to_stop = reduce(torch.tensor([float(sum(r.sum() for r in real)), float(sum(r[:, 1:].sum() for r in real)), float(stop.received is not None)])).tolist()
        sums, sample_losses = torch.zeros(3, dtype=torch.float64, device=device), []
        for m, batch in enumerate(micro):
            torch.manual_seed(torch_seed_at(cfg.seed, position + (m * world + rank) * t.batch_size, "dropout"))
            with contextlib.nullcontext() if m == accumulation - 1 or world == 1 else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    result = model(to_device(batch, device))
                loss = result["flow_sum"] / (steps * result["dims"]) + t.lambda_temporal * result["temporal_sum"] / max(pairs * core.action_dim, 1)
                (loss * world).backward()                                    # ranks are averaged, so times world
            sample_losses.append(result["sample_loss"])
            sums += torch.stack([loss.detach(), result["real_sum"].detach() / (steps * core.action_dim), t.lambda_temporal * result["temporal_sum"].detach() / max(pairs * core.action_dim, 1)])
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), cfg.optimizer.grad_clip_norm or math.inf)
        *losses, _ = values = torch.cat([reduce(sums), norm.detach().double()[None]]).tolist()   # the one synchronisation of a step
        names = [name for b in micro for name in b["names"]]
        if all(math.isfinite(value) for value in values):
            optimizer.step()
            ema.update(step)
            window.append(values)
            skipped_in_row = 0
            if average := spikes.check(losses[0]):
                indices = spikes.record(step + 1, losses, average, names, torch.cat(sample_losses).tolist(), paths)
                log.log(step + 1, {"spike/loss": losses[0], "spike/moving_avg": average, "spike/ratio": losses[0] / average, "spike/step": step + 1},
                        f"⚠️  LOSS SPIKE at step {step + 1}: {losses[0]:.4f} (avg: {average:.4f}, {losses[0] / average:.1f}x) | Episodes: {indices}")
        else:                                                                # the same on every rank: losses and gradients are averaged
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            spikes.record(step + 1, losses, None, names, torch.cat(sample_losses).tolist(), paths)
            runlog.report_nonfinite(log, step + 1, [[name[1:] for name in b["names"]] for b in micro], sample_losses, skipped_in_row)
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + global_batch

        if step % t.log_freq == 0 or step == t.steps:
            elapsed, done = time.perf_counter() - t_log, (step - start) % t.log_freq or t.log_freq
            mean = np.mean(window, axis=0).tolist() if window else [float("nan")] * 4
            vram, peak = (torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9) if cuda else (0.0, 0.0)
            used, percent = ram()
            values = {"train/loss": mean[0], "train/action_loss": mean[1], "train/temporal_loss": mean[2], "train/grad_norm": mean[3], "train/learning_rate": lr, "train/steps_per_sec": done / elapsed,
                      "train/samples_per_sec": done * global_batch / elapsed, "train/data_wait": wait / elapsed, "train/skipped_steps": skipped, "system/ram_gb": used, "system/ram_percent": percent,
                      "system/vram_allocated_gb": vram, "system/vram_peak_gb": peak, "system/vram_reserved_gb": torch.cuda.memory_reserved() / 1e9 if cuda else 0.0}
            log.log(step, {k: v for k, v in values.items() if math.isfinite(v)},
                    f"[{100 * step / t.steps:5.1f}%] Step {step}/{t.steps} | Loss: {mean[0]:.4f} (Action: {mean[1]:.4f}, Temporal: {mean[2]:.4f}) | GradNorm: {mean[3]:.3f} | LR: {lr:.2e} | "
                    f"{done / elapsed:.2f} steps/sec | {done * global_batch / elapsed:.1f} samples/s | wait {wait / elapsed:.1%} | VRAM: {peak:.1f}GB | RAM: {used:.1f} GB ({percent:.0f}%)")
            log.step(step, mean[0], lr, done * global_batch / elapsed, wait / elapsed)
            window, wait, t_log = [], 0.0, time.perf_counter()
        else:
            log.step(step)
        if data.validation and (step % cfg.validation.val_freq == 0 or step == t.steps):
            t_val = time.perf_counter()
            with ema.swapped():
                values = validate(core, policy, held_out, cfg, device, rank, world, reduce)
            if best is None or values["val/loss"] < best:
                best, best_step = values["val/loss"], step
            mae = f" | Action MAE: {values['val/action_mae']:.4g} {data.spec.action_units[0][1]}" if "val/action_mae" in values else ""
            log.log(step, values, f"[VAL] Step {step} | Loss: {values['val/loss']:.4f} | Action Loss: {values['val/action_loss']:.4f}{mae}")
            t_log += time.perf_counter() - t_val                             # validation is not training time
        told_to_stop = told_to_stop > 0
        if step % t.save_freq == 0 or step == t.steps or told_to_stop:
            t_save = time.perf_counter()
            if save(step, position):
                saved_at = step
            elif step == t.steps or told_to_stop:
                raise ckpt.DiskFull(28, f"the last checkpoint could not be written; the newest complete one is checkpoint_step_{saved_at}.pt. Free space and run again with --resume auto")
            t_log += time.perf_counter() - t_save
        if told_to_stop and step < t.steps:
            log.print(f"stopped by signal after step {step}; saved {folder / f'checkpoint_step_{step}.pt'}. Continue with the same command and --resume auto")
            break

    # ---- end
    stop.restore()
    log.close()
    if rank == 0 and step == t.steps:
        with ema.swapped(), ckpt.atomic_path(folder / "final_hf") as temporary:
            save_model(temporary, policy_state_dict(core), cfg, collate, files, device.type)
        print(f"loss plot: {runlog.plot_loss(out, 'train/loss', 'val/loss')}")
        print(f"model: {folder / 'final_hf'} (LeRobot format)\nevaluate: python evaluate.py --checkpoint {folder / f'checkpoint_step_{step}.pt'} --data {cfg.dataset.root_dir}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    config = parse_config(Config, aliases=ALIASES)
    try:
        main(config)
    except torch.cuda.OutOfMemoryError as error:
        sys.exit(f"CUDA out of memory ({str(error).splitlines()[0]}). Lower training.batch_size (now {config.training.batch_size}) and raise training.gradient_accumulation_steps "
                 f"(now {config.training.gradient_accumulation_steps}) in proportion" + ("" if config.policy.train_expert_only else ", or set training.gradient_checkpointing: true"))
