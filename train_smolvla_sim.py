"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844): SmolVLM2 with a flow-matching action expert, on simulated or real
HDF5 insertion episodes. Names, shapes and results are those of LeRobot's SmolVLAPolicy: lerobot/smolvla_base loads
here, final_hf/ loads there. One sample is one frame: K images, text and robot state -> the next S actions.

    python train_smolvla_sim.py --config configs/smolvla_sim.yaml --check               # the data, no weights needed
    bash shells/compute_dataset_stats_sim.sh                                            # dataset_stats_sim.yaml
    bash shells/train_smolvla_sim.sh --multi-gpu --num-gpus 5                           # torchrun --nproc_per_node=5
    python train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --max_steps 20   # a CPU, make_demo.py's output

Output, in output_dir: checkpoints/checkpoint_step_N.pt (resumes), best_hf/ and final_hf/ (LeRobot's format) beside it,
validation_episodes.txt, loss_spikes.txt and .csv, metrics.jsonl, loss.png.

Letters in shapes: B batch, K cameras, T tokens of an image, L text tokens, N prefix tokens (images, text, state), S
action steps (the chunk), A padded action dims, D width of the VLM, W width of the expert.
"""

import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import operator
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from common import MissingFile, hub, log, require
from common import checkpoint as ckpt
from common import episodes as ep
from common.config import config_from
from common.ema import Ema
from common.run import Run, launch, to_device
from common.sampler import GlobalOrder, generator_at
from common.stats import LISTS, MODES, Normalizer, load_stats, save_stats

FORMAT = 2  # of checkpoint_step_N.pt and of meta.json in an exported folder
ROPE_BASE = 10_000.0  # SmolVLA's own; the VLM's config says 100,000 and is not asked
HEADS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
NORMALIZERS = dict(MEAN_STD="mean_std", MIN_MAX="min_max", QUANTILES="q01_q99", IDENTITY="identity")  # LeRobot's: ours


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with .h5 episodes, searched recursively
    horizon: int = 50  # S, future actions per sample, in frames; equals policy.chunk_size
    task_instruction: str = "Insert needle into eye trocar in simulation"  # for files without language_instruction
    cameras: tuple[str, ...] = ("side_camera", "tool_camera", "top_camera")  # recorded names: LeRobot's camera1, ...
    use_qpos: bool = False  # the state contains qpos, before ee_pose
    use_ee_pose: bool = True  # the state contains ee_pose
    use_ee_pose_delta_as_action: bool = False  # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if a value exceeds 2 pi
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    augment: bool = False  # colour augmentation of training images (simulated data is already randomised)
    augment_brightness: float = 0.2  # +- this share of full scale
    augment_contrast: float = 0.2  # factor 1 +- this
    augment_saturation: float = 0.2  # factor 1 +- this
    augment_hue: float = 0.05  # +- this share of the hue circle
    augment_noise: float = 0.02  # std of Gaussian noise, share of full scale


@dataclass
class NormalizationConfig:
    enable: bool = True  # false: states and actions enter as they are
    stats_file: str | None = None  # of compute_stats.py; null: computed from the training episodes
    mode: Literal["MEAN_STD", "MIN_MAX", "QUANTILES"] = "MEAN_STD"  # QUANTILES: q01..q99 become -1..1; never clipped


@dataclass
class PolicyConfig:
    vlm_model_name: str = "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"  # backbone: hub id or directory
    pretrained_model_id: str | None = None  # LeRobot policy to start from, as lerobot/smolvla_base; null: a new expert
    num_vlm_layers: int = 16  # the first text layers of the VLM that are used
    num_expert_layers: int = -1  # 0 or less: as many as VLM layers
    expert_width_multiplier: float = 0.75  # W / D
    self_attn_every_n_layers: int = 2  # of the expert; the others attend to the prefix only
    attention_mode: Literal["cross_attn", "self_attn"] = "cross_attn"  # self_attn: all expert layers are joint
    chunk_size: int = 50  # S
    n_action_steps: int = 50  # actions that a robot executes of a chunk, for LeRobot's queue
    num_steps: int = 10  # Euler steps of sampling
    max_state_dim: int = 32  # states are padded with zeros to this
    max_action_dim: int = 32  # A
    resize_imgs_with_padding: tuple[int, int] = (512, 512)  # width, height in pixels, a square
    tokenizer_max_length: int = 48  # L
    min_period: float = 0.004  # of the time embedding
    max_period: float = 4.0  # of the time embedding
    freeze_vision_encoder: bool = True  # the vision tower keeps its weights
    train_expert_only: bool = True  # the whole VLM keeps its weights


@dataclass
class TrainingConfig:
    steps: int = 30000  # optimizer steps
    batch_size: int = 16  # samples per GPU and micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches per optimizer step
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    log_freq: int = 100  # optimizer steps
    save_freq: int = 2000  # optimizer steps
    keep_checkpoints: int = 0  # newest checkpoint_step_N.pt that stay; 0: all
    lambda_temporal: float = 0.1  # weight of the smoothness of the predicted clean actions; 0: plain SmolVLA
    loss_spike_threshold: float = 10.0  # a loss above this times the mean of the last 100 is recorded
    use_bfloat16: bool = True  # bf16 autocast on CUDA, frozen weights bf16; trained weights are fp32 in any case
    ema_decay: float = 0.0  # average of the trained weights, for validation and export; 0: off, 0.999 is usual


@dataclass
class ValidationConfig:
    enable: bool = True  # hold episodes out
    num_episodes: int = 20  # how many, drawn with the seed
    val_freq: int = 2000  # optimizer steps
    num_samples: int = 256  # their frames used, evenly spread


@dataclass
class OptimizerConfig:
    lr: float = 1e-4  # peak, AdamW
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW: decay of the moments
    eps: float = 1e-8  # of AdamW
    weight_decay: float = 1e-10  # decoupled
    grad_clip_norm: float = 10.0  # largest gradient norm; 0: no clipping


@dataclass
class SchedulerConfig:
    num_warmup_steps: int = 1000  # optimizer steps of linear warm-up
    num_decay_steps: int = 30000  # where the cosine ends; a shorter training shrinks both to its own length
    peak_lr: float = 1e-4  # with decay_lr: the cosine ends at optimizer.lr * decay_lr / peak_lr
    decay_lr: float = 2.5e-6  # see peak_lr


@dataclass
class WandbConfig(log.WandbConfig):
    mode: Literal["online", "offline", "disabled"] = "online"  # online falls back to offline when not logged in
    enable: bool = False  # log to Weights & Biases
    project: str = "smolvla-meca500-insertion-sim"  # W&B project


@dataclass
class Config:
    output_dir: str = "outputs/train/smolvla_needle_insertion_sim"  # checkpoints and logs
    seed: int = 1000  # of split, order, noise, augmentation and new weights
    train: Literal["full", "lora"] = "full"  # lora: adapters on the expert (and a VLM that is not frozen), heads full
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
    resume: str | None = None  # checkpoint_step_N.pt, or "auto": the newest; of other data: as init_from
    reset_scheduler: bool = False  # with resume: keep weights and moments, start the schedule (warm-up) again
    init_from: str | None = None  # new run from these weights: a .pt, a LeRobot policy directory or hub id
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = {"max_steps": "training.steps", "resume_from_checkpoint": "resume"}
ACCEPTED = {"training.use_amp": (False,), "training.use_torch_compile": (False,), "policy.train_state_proj": (True,)}
ACCEPTED |= {"training.pin_memory": None, "policy.n_obs_steps": (1,)}  # in the guide's YAML, one meaning here
PATTERNS = ("checkpoint_step_*.pt", "checkpoint_latest.pt")  # what can be resumed
NAMES = dict(samples_per_s="train/samples_per_sec", data_wait="train/data_wait", skipped_steps="train/skipped_steps")
NAMES["memory_gb"] = "system/vram_allocated_gb"
# without these the moments, the noise or the order of the samples would belong to another run
FREE = ("vlm_model_name", "pretrained_model_id", "num_steps", "n_action_steps")
FIXED = (
    *("seed", "train", "lora_rank", "lora_alpha", "normalization.enable", "normalization.mode", "dataset.cameras"),
    *("dataset.use_qpos", "dataset.use_ee_pose", "dataset.use_ee_pose_delta_as_action", "dataset.rotation_unit"),
    *(f"policy.{f.name}" for f in dataclasses.fields(PolicyConfig) if f.name not in FREE),
)
POSITIVE = ("training.steps", "training.batch_size", "training.gradient_accumulation_steps", "training.log_freq")
POSITIVE += ("training.save_freq", "validation.val_freq", "validation.num_samples", "policy.num_steps")
# weights mean nothing with another value of these, though their shapes may fit
SAME_NETWORK = ("num_vlm_layers", "attention_mode", "self_attn_every_n_layers", "min_period", "max_period")


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    d, p, t = cfg.dataset, cfg.policy, cfg.training
    for key in POSITIVE:
        value = operator.attrgetter(key)(cfg)
        require(value > 0, f"{key} is {value}: expected 1 or more")
    differ = f"dataset.horizon is {d.horizon}, policy.chunk_size is {p.chunk_size}: expected the same number"
    require(d.horizon == p.chunk_size, differ)
    require(0 <= t.ema_decay < 1, f"training.ema_decay is {t.ema_decay}: expected 0 (off) to below 1")
    both = f"--resume {cfg.resume} continues a run, --init_from {cfg.init_from} starts one: give one of them"
    require(not (cfg.resume and cfg.init_from), both)
    alone = "--reset_scheduler restarts the schedule of a resumed run: add --resume CHECKPOINT"
    require(cfg.resume or not cfg.reset_scheduler, alone)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class DataSpec:
    """What one row of data means; in every checkpoint."""

    cameras: list  # recorded names in policy order: camera1, camera2, ...
    image_shapes: list  # [height, width] as recorded, per camera
    state_keys: list  # of ["qpos", "ee_pose"], in this order
    state_dim: int
    action_definition: dict  # common.episodes.ActionDefinition
    action_names: list  # [[name, unit]] per action dim, for reports: q1..: a target for qpos
    normalization: str  # MEAN_STD, MIN_MAX, QUANTILES or IDENTITY
    task_instruction: str
    stats: dict  # common.stats

    def __post_init__(self):
        self.definition = ep.ActionDefinition(**self.action_definition)
        mode = NORMALIZERS[self.normalization]
        self.state_scale = Normalizer(self.stats["observation.state"], mode, clip=False)
        self.action_scale = Normalizer(self.stats["action"], mode, clip=False)


@dataclass
class Data:
    """Episodes of a run, split and described."""

    episodes: list  # all usable ones, sorted by path: episode_index counts these
    train: list  # indices into episodes
    validation: list  # indices into episodes
    excluded: list  # messages: files left out by skip_bad_episodes, and since the checkpoint
    spec: DataSpec
    fingerprint: str  # changes when the training samples or their order would
    table: dict  # {name: [frames, "train" or "validation"]} of all episodes, for a checkpoint


def name_actions(found, definition):
    """-> [[name, unit]] per action dim. It is a joint target if qpos tells more about it than its own mean does."""
    if definition.source == "ee_pose_delta":
        position, turns = ep.detect_position_unit(found) or "", ("droll", "dpitch", "dyaw")
        return [[n, position] for n in ("dx", "dy", "dz")] + [[n, definition.rotation_unit] for n in turns]
    action, qpos = found[0].action, found[0].qpos
    comparable = qpos is not None and qpos.shape == action.shape
    if not comparable or np.abs(action - qpos).mean() > 0.5 * np.abs(action - action.mean(0)).mean():
        return [[f"action{i + 1}", ""] for i in range(definition.dim)]
    unit = "deg" if max(np.abs(e.qpos).max() for e in found) > 2 * np.pi + 1e-3 else "rad"
    return [[f"q{i + 1}", unit] for i in range(definition.dim)]


def load_data(cfg, run=None, saved=None):
    """Find, read, split and describe the episodes. `saved`: a checkpoint, whose statistics are kept where this is its
    data; with skip_bad_episodes also where files were left out since."""
    d, n = cfg.dataset, cfg.normalization
    found, notes = ep.load_episodes(d.root_dir, d.skip_bad_episodes, run)
    count = cfg.validation.num_episodes if cfg.validation.enable else 0
    draw, then = functools.partial(ep.hold_out_random, found, count, cfg.seed), saved and saved["episodes"]
    frames = {e.name: e.num_frames for e in found}
    train, validation, table, gone = ep.split_or_keep(frames, draw, then if d.skip_bad_episodes else None)
    trained, held_out = [found[i] for i in train], [found[i].name for i in validation]
    fingerprint = hashlib.sha256(json.dumps(ep.trained_in(table)).encode()).hexdigest()[:16]
    first, known = found[0], list(found[0].cameras)
    numbered = {f"camera{k}": name for k, name in enumerate(known, 1)}
    cameras = [c if c in known else numbered.get(c, c) for c in d.cameras]
    usable = cameras and len(set(cameras)) == len(cameras) and set(cameras) <= set(known)
    names = f"{', '.join(known)} (or camera1..camera{len(known)} in this order)"
    require(usable, f"dataset.cameras is {list(d.cameras)}; expected one or more of {names}, each once")
    state_keys = [k for k in ("qpos", "ee_pose") if getattr(d, f"use_{k}")]
    there = [k for k in ("qpos", "ee_pose") if getattr(first, k) is not None]
    made = f"the state is made of {state_keys or 'nothing'} (dataset.use_qpos, dataset.use_ee_pose)"
    require(state_keys and set(state_keys) <= set(there), f"{made}; {first.path} has {there or 'neither'}")
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    plain = dataclasses.asdict(definition)
    if saved and saved["fingerprint"] == fingerprint:
        stats = saved["normalization_stats"]
    elif n.enable and n.stats_file:
        about = plain, held_out, [e.name for e in trained], stats_command(cfg)
        stats = load_stats(n.stats_file, ("action", "observation.state"), *about)
    else:
        stats = ep.insertion_stats(trained, definition, held_out, state_keys)
    state_dim, has = ep.robot_state(first, state_keys).shape[1], len(stats["observation.state"]["mean"])
    wrong = f"the statistics have {has} dims for 'observation.state', the data has {state_dim}"
    require(has == state_dim, f"{wrong}. Make them with: {stats_command(cfg)}")
    p, reader, how = cfg.policy, ep.ImageReader(), "raise it (a pretrained policy does not fit then), or choose fewer"
    for what, dim, most in (("state", state_dim, p.max_state_dim), ("action", definition.dim, p.max_action_dim)):
        require(dim <= most, f"the {what} has {dim} dims, policy.max_{what}_dim is {most}: {how}")
    shapes = [list(reader.read(first, c, 0).shape[:2]) for c in cameras]
    mode, names = n.mode if n.enable else "IDENTITY", name_actions(found, definition)
    spec = DataSpec(cameras, shapes, state_keys, state_dim, plain, names, mode, d.task_instruction, stats)
    return Data(found, train, validation, notes + gone, spec, fingerprint, table)


def stats_command(cfg):
    """The command that makes normalization.stats_file for exactly this run: its data, its split, its state."""
    d, v = cfg.dataset, cfg.validation
    count = v.num_episodes if v.enable else 0
    words = [f"python compute_stats.py --dataset.root_dir '{d.root_dir}' --seed {cfg.seed} --num_episodes {count}"]
    keys = ("use_qpos", "use_ee_pose", "use_ee_pose_delta_as_action", "rotation_unit", "skip_bad_episodes")
    words += [f"--dataset.{k} {getattr(d, k)}" for k in keys]
    return " ".join([*words, f"--output '{cfg.normalization.stats_file}'"])


def resize_with_pad(images, side):
    """(n, 3, h, w) in [0, 1] -> (n, 3, side, side) in [-1, 1]: aspect kept, rounded as LeRobot does, bilinear, padding
    on the left and on top. The one image preprocessing of training and predict, on the model's device."""
    height, width = images.shape[-2:]
    ratio = max(width / side, height / side)
    h, w = int(height / ratio), int(width / ratio)
    if (height, width) != (side, side):
        images = F.interpolate(images, size=(h, w), mode="bilinear", align_corners=False)
        images = F.pad(images, (side - w, 0, side - h, 0))
    return images * 2 - 1


def augment_image(image, cfg, rng):
    """(h, w, 3) uint8 -> the same: contrast and brightness, hue and saturation, noise."""
    alpha = 1 + rng.uniform(-cfg.augment_contrast, cfg.augment_contrast)
    beta = rng.uniform(-cfg.augment_brightness, cfg.augment_brightness) * 255
    image = Image.fromarray(np.clip(image * alpha + beta, 0, 255).astype(np.uint8))
    hsv = np.asarray(image.convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-cfg.augment_hue, cfg.augment_hue) * 256) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + rng.uniform(-cfg.augment_saturation, cfg.augment_saturation)), 0, 255)
    image = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * (cfg.augment_noise * 255)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


class SmolVLADataset(Dataset):
    """One item per frame that has a target. Item (position, i), where `position` seeds noise, flow time, augmentation:

    images list of K (h, w, 3) uint8 | state (state_dim,), action (S, action_dim) float32 in data units | is_pad (S,)
    bool: past the episode's end | noise (S, A) float32 ~ N(0, 1), time float ~ 0.001 + 0.999 Beta(1.5, 1) | instruction
    str | name (episode index, episode, frame)
    """

    def __init__(self, data, which, cfg, training=False):
        self.spec, self.cfg, self.augment = data.spec, cfg, training and cfg.dataset.augment
        self.which, self.episodes = list(which), [data.episodes[i] for i in which]
        self.targets = [data.spec.definition.targets(e) for e in self.episodes]
        self.states = [ep.robot_state(e, data.spec.state_keys) for e in self.episodes]
        self.hold = "zero" if data.spec.definition.source == "ee_pose_delta" else "repeat"
        self.reader, self.samples = ep.ImageReader(), []  # (episode number within this part, frame)
        for e, target in enumerate(self.targets):
            self.samples += [(e, t) for t in range(len(target))]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, key):
        position, i = key
        e, t = self.samples[i]
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
        images = [self.reader.read(episode, c, t) for c in self.spec.cameras]
        if self.augment:
            rng = generator_at(self.cfg.seed, position, "augment")
            images = [augment_image(image, self.cfg.dataset, rng) for image in images]
        return item | dict(images=images)


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    def __init__(self, tokenizer, policy, spec):
        self.tokenizer, self.policy, self.spec = tokenizer, policy, spec

    def inputs(self, observations):
        """images: list of the B*K pictures, (h, w, 3) | tokens, token_mask (B, L): the text ends with a newline, as in
        LeRobot's preprocessor | state (B, max_state_dim) normalised, zero-padded."""
        texts = [(o.get("instruction") or self.spec.task_instruction).rstrip("\n") + "\n" for o in observations]
        length = dict(padding="max_length", max_length=self.policy.tokenizer_max_length, truncation=True)
        tokens = self.tokenizer(texts, padding_side="right", return_tensors="pt", **length)
        state = self.spec.state_scale.normalize(np.stack([np.asarray(o["state"]) for o in observations]))
        images = itertools.chain(*(o["images"] for o in observations))
        return dict(
            images=[torch.from_numpy(np.array(image)) for image in images],
            tokens=tokens["input_ids"],
            token_mask=tokens["attention_mask"].bool(),
            state=F.pad(torch.from_numpy(state), (0, self.policy.max_state_dim - state.shape[-1])),
        )

    def __call__(self, items):
        """List of dataset items -> inputs() plus action, noise (B, S, A), time (B,), is_pad (B, S), names."""
        keys = ("action", "noise", "time", "is_pad")
        batch = {key: torch.from_numpy(np.stack([item[key] for item in items])) for key in keys}
        action = torch.from_numpy(self.spec.action_scale.normalize(batch["action"].numpy()))
        batch["action"] = F.pad(action, (0, self.policy.max_action_dim - action.shape[-1]))
        return self.inputs(items) | batch | dict(time=batch["time"].float(), names=[item["name"] for item in items])


# ---- model -----------------------------------------------------------------------------------------------------------


def rope(x, positions):
    """(B, heads, n, d) turned by positions (B or 1, n): half-split rotation, computed in fp32."""
    half = x.shape[-1] // 2
    rate = ROPE_BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * rate
    x1, x2 = x.float().split(half, dim=-1)
    return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x2 * angle.cos() + x1 * angle.sin()], dim=-1).to(x.dtype)


def attend(q, k, v, mask):
    """(B, heads, n, d) x (B, kv_heads, m, d) -> (B, n, heads * d); mask (B or 1, 1, n or 1, m), True may be seen."""
    repeat = q.shape[1] // k.shape[1]  # written out: the fast kernels with a mask know no grouped heads
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask).transpose(1, 2).flatten(2)


def heads(layer, name, x):
    """Projection `name` of a Llama layer: x (B, n, width) -> (B, heads, n, head_dim)."""
    return getattr(layer.self_attn, name)(x).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)


def finish(layer, x, attended):
    """What follows the attention in a Llama layer."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def expert_attention(vlm, p):
    """-> per expert layer: True for joint self-attention, False for cross-attention to the prefix. Checks the sizes."""
    most, side = vlm.text_config.num_hidden_layers, list(p.resize_imgs_with_padding)
    has = f"policy.num_vlm_layers is {p.num_vlm_layers}: '{p.vlm_model_name}' has {most}"
    require(1 <= p.num_vlm_layers <= most, has)
    unit, most = vlm.vision_config.patch_size * vlm.scale_factor, vlm.vision_config.image_size
    square = side[0] == side[1] and side[0] % unit == 0 and unit <= side[0] <= most
    wanted = f"a square in multiples of {unit} (patch x shuffle) up to {most}, e.g. {most} {most}"
    require(square, f"policy.resize_imgs_with_padding is {side}: expected {wanted}")
    count = p.num_expert_layers if p.num_expert_layers > 0 else p.num_vlm_layers
    every = 1 if p.attention_mode == "self_attn" else p.self_attn_every_n_layers
    joint = [every > 0 and layer % every == 0 for layer in range(p.num_vlm_layers)]
    # LeRobot shapes an expert layer by its own number and uses it by the number of its VLM layer: both must agree
    fits = p.num_vlm_layers % count == 0 and joint[:: p.num_vlm_layers // count] == joint[:count]
    places = f"divide them and leave self- and cross-attention (self_attn_every_n_layers {every}) in their places"
    layers = f"policy.num_expert_layers is {p.num_expert_layers} with {p.num_vlm_layers} VLM layers"
    require(fits, f"{layers}: it must {places}, e.g. {p.num_vlm_layers}")
    return joint[:count]


class FlowModel(nn.Module):
    """The network, with LeRobot's parameter names (its VLAFlowMatching), made of transformers' modules: SmolVLM, and a
    LlamaModel as the expert. Image and text tokens attend to each other but never to the state token, and neither
    attends to the noisy actions; so the prefix is run in two parts and then the actions, each on the keys and values of
    what came before. Where the VLM is frozen autograd therefore records nothing of images and text, and sampling runs
    the prefix once: both without a second code path."""

    def __init__(self, vlm_config, p):
        super().__init__()
        from transformers import LlamaModel, SmolVLMForConditionalGeneration

        self.policy, self.joint = p, expert_attention(vlm_config, p)
        self.stride = p.num_vlm_layers // len(self.joint)
        self.last_used = (len(self.joint) - 1) * self.stride  # of this VLM layer only keys and values are needed
        vlm_config = copy.deepcopy(vlm_config)
        vlm_config.text_config.num_hidden_layers = p.num_vlm_layers
        vlm_config.tie_word_embeddings = vlm_config.text_config.tie_word_embeddings = False
        text = copy.deepcopy(vlm_config.text_config)
        D, W, kv = text.hidden_size, int(text.hidden_size * p.expert_width_multiplier), text.num_key_value_heads
        text.hidden_size, text.num_hidden_layers, text.vocab_size, text.pad_token_id = W, len(self.joint), 1, None
        text.intermediate_size = -(-4 * int(2 * W / 3) // 256) * 256  # Llama's 8/3 of the width, up to 256s
        vlm, expert = SmolVLMForConditionalGeneration(vlm_config), LlamaModel(text)
        expert.embed_tokens = expert.rotary_emb = vlm.model.text_model.rotary_emb = None  # what is not used here
        for joint, layer in zip(self.joint, expert.layers, strict=True):
            if not joint:  # reads the VLM's keys and values
                layer.self_attn.k_proj = nn.Linear(kv * text.head_dim, kv * text.head_dim, bias=False)
                layer.self_attn.v_proj = nn.Linear(kv * text.head_dim, kv * text.head_dim, bias=False)
        self.vlm_with_expert = nn.ModuleDict(dict(vlm=vlm, lm_expert=expert))
        self.state_proj = nn.Linear(p.max_state_dim, D)
        self.action_in_proj, self.action_out_proj = nn.Linear(p.max_action_dim, W), nn.Linear(W, p.max_action_dim)
        self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * W, W), nn.Linear(W, W)
        self.float()  # the published VLM's config says bfloat16, and parts of it are made so

    @property
    def vlm(self):
        return self.vlm_with_expert.vlm.model

    def vlm_layers(self, x, positions, mask, past=None):
        """Tokens x (B, n, D) through the VLM's text layers, after `past` -> per layer keys (RoPE applied) and values
        (B, kv_heads, n + past, d)."""
        kv = []
        for i, layer in enumerate(self.vlm.text_model.layers[: self.last_used + 1]):
            y = layer.input_layernorm(x)
            k, v = rope(heads(layer, "k_proj", y), positions), heads(layer, "v_proj", y)
            if past is not None:
                k, v = torch.cat([past[i][0], k], dim=2), torch.cat([past[i][1], v], dim=2)
            if i < self.last_used:
                x = finish(layer, x, attend(rope(heads(layer, "q_proj", y), positions), k, v, mask))
            kv.append((k, v))
        return kv

    def prefix(self, features, tokens, token_mask, state):
        """features (B, K*T, D), tokens and token_mask (B, L), state (B, max_state_dim) -> (valid (B, N), per expert
        layer keys and values)."""
        text = self.vlm.text_model.embed_tokens(tokens)
        x = torch.cat([features.to(text.dtype), text], dim=1) * math.sqrt(text.shape[-1])  # the state is not scaled
        valid = torch.cat([token_mask.new_ones(features.shape[:2]), token_mask, token_mask.new_ones(len(x), 1)], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        # padded text is never seen; what it computes itself is never read
        kv = self.vlm_layers(x, positions[:, :-1], valid[:, None, None, :-1])
        with torch.autocast(state.device.type, enabled=False):  # in bf16 a millimetre of the state would be lost
            state = self.state_proj(state.float())[:, None]
        kv = self.vlm_layers(state, positions[:, -1:], valid[:, None, None], past=kv)[:: self.stride]
        for e, layer in enumerate(self.vlm_with_expert.lm_expert.layers):
            if not self.joint[e]:  # projected again by the expert, no further RoPE
                k, v = (z.transpose(1, 2).flatten(2) for z in kv[e])
                kv[e] = heads(layer, "k_proj", k), heads(layer, "v_proj", v)
        return valid, kv

    def embed_actions(self, x_t, t):
        """Noisy actions x_t (B, S, A) and flow time t (B,) -> (B, S, W), in fp32 whatever the autocast."""
        with torch.autocast(x_t.device.type, enabled=False):
            x, p = self.action_in_proj(x_t.float()), self.policy
            fraction = torch.linspace(0, 1, x.shape[-1] // 2, dtype=torch.float64, device=t.device)
            period = p.min_period * (p.max_period / p.min_period) ** fraction
            angle = 2 * math.pi / period * t.double()[:, None]
            tau = torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)[:, None].expand_as(x)
            return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([x, tau], dim=2))))

    def velocity(self, prefix, x_t, t):
        """Noisy actions x_t (B, S, A) at flow time t (B,) -> v (B, S, A) fp32."""
        (valid, kv), steps = prefix, torch.arange(x_t.shape[1], device=x_t.device)[None]
        x, expert = self.embed_actions(x_t, t), self.vlm_with_expert.lm_expert
        # an action sees the prefix, itself and the actions before it
        causal = (steps <= steps.T)[None, None].expand(len(x), -1, -1, -1)
        seen = valid[:, None, None]
        joint_mask = torch.cat([seen.expand(-1, -1, x.shape[1], -1), causal], dim=3)
        positions = valid.sum(1, keepdim=True) + steps
        for joint, layer, (k, v) in zip(self.joint, expert.layers, kv, strict=True):
            y = layer.input_layernorm(x)
            if joint:
                k = torch.cat([k, rope(heads(layer, "k_proj", y), positions).to(k.dtype)], dim=2)
                v = torch.cat([v, heads(layer, "v_proj", y).to(v.dtype)], dim=2)
            q = rope(heads(layer, "q_proj", y), positions if joint else steps)
            x = finish(layer, x, attend(q, k, v, joint_mask if joint else seen))
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(expert.norm(x).float())


class SmolVLA(nn.Module):
    """FlowModel seen from a batch of this script. forward(batch) is the loss, sample(batch, noise) the actions."""

    def __init__(self, vlm_config, policy, action_dim):
        super().__init__()
        self.model, self.policy, self.action_dim = FlowModel(vlm_config, policy), policy, action_dim

    def prefix(self, batch):
        """-> FlowModel.prefix of a batch"""
        device, side = batch["state"].device, self.policy.resize_imgs_with_padding[0]
        pictures = []
        for image in batch["images"]:  # of any size
            x = image.to(device, non_blocking=True).permute(2, 0, 1)[None]
            pictures.append(resize_with_pad(x.float() / (255 if x.dtype == torch.uint8 else 1), side))
        vlm, x = self.model.vlm, torch.cat(pictures)
        x = vlm.vision_model(x.to(vlm.vision_model.post_layernorm.weight.dtype)).last_hidden_state
        features = vlm.connector(x)  # (B*K, T, D)
        features = features.unflatten(0, (len(batch["tokens"]), -1)).flatten(1, 2)
        return self.model.prefix(features, batch["tokens"], batch["token_mask"], batch["state"])

    def forward(self, batch):
        """-> sums over the unpadded steps, to be divided by the caller's global counts: flow_sum () over A dims |
        real_sum () over the real dims | temporal_sum () of squared jumps of the clean-action estimate, over real dims
        and pairs of steps | sample_loss (B,) each sample's own flow loss, for reports.

        x_t = t eps + (1 - t) a, target u = eps - a. The clean-action estimate is x_t - t v, so the temporal loss has a
        gradient. LeRobot samples all A dims, so all are trained, the padded ones (a = 0) as well."""
        a, noise, t, real = batch["action"], batch["noise"], batch["time"][:, None, None], ~batch["is_pad"]
        x_t = t * noise + (1 - t) * a
        v = self.model.velocity(self.prefix(batch), x_t, batch["time"])
        error = (noise - a - v).square() * real[..., None]  # (B, S, A): a padded step teaches nothing
        clean = (x_t - t * v)[..., : self.action_dim]
        # padding is at the end: a real step has a real one before it
        jump = (clean[:, 1:] - clean[:, :-1]).square() * real[:, 1:, None]
        sums = dict(flow_sum=error.sum(), real_sum=error[..., : self.action_dim].sum(), temporal_sum=jump.sum())
        return sums | dict(sample_loss=(error.sum((1, 2)) / (real.sum(1) * error.shape[-1])).detach())

    @torch.no_grad()
    def sample(self, batch, noise):
        """Normalised actions (B, S, action_dim): Euler steps from noise (B, S, A) at t = 1 to t = 0."""
        prefix, x, n = self.prefix(batch), noise, self.policy.num_steps
        for step in range(n):
            x = x - self.model.velocity(prefix, x, torch.full((len(x),), 1 - step / n, device=x.device)) / n
        return x[..., : self.action_dim]


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, collate, bf16=False):
        self.model, self.collate, self.bf16 = model, collate, bf16
        self.spec, self.stats = collate.spec, collate.spec.stats

    def predict(self, observations, noise=None):
        """list of {images: {camera1: (h, w, 3) uint8 RGB or float in [0, 1], ...}, state: (state_dim,) in data units,
        instruction: str} -> (B, S, action_dim) float32 in data units (joint targets: rad, as recorded). `noise`
        (B, S, A): start of the sampling; default: the same draw for every observation and call, so that equal
        observations give equal actions."""
        wanted = [f"camera{k + 1}" for k in range(len(self.spec.cameras))]
        for o in observations:
            for camera, recorded in zip(wanted, self.spec.cameras, strict=True):
                has = f"the observation has images of {sorted(o['images'])}"
                require(camera in o["images"], f"{has}, the policy needs {camera} = {recorded}")
            shape = np.shape(o["state"])
            wrong = f"the observation's state has shape {shape}, the policy needs ({self.spec.state_dim},)"
            require(shape == (self.spec.state_dim,), wrong)
        inputs = [o | dict(images=[np.asarray(o["images"][c]) for c in wanted]) for o in observations]
        return self.decode(self.collate.inputs(inputs), noise)

    def decode(self, batch, noise=None):
        """Collate.inputs' batch -> (B, S, action_dim) float32 in data units."""
        device, p = next(self.model.parameters()).device, self.collate.policy
        if noise is None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(1, p.chunk_size, p.max_action_dim, generator=generator)
            noise = noise.expand(len(batch["tokens"]), -1, -1)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            actions = self.model.sample(to_device(batch, device), torch.as_tensor(noise).to(device))
        return self.spec.action_scale.unnormalize(actions.float().cpu().numpy())

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per episode {name, sample: callable(t) -> observation, target (M, A), hold (M, A):
        the action that stands still, phase (M,) or None}, in data units."""
        found, reader, definition = ep.open_episodes(root, names), ep.ImageReader(), self.spec.definition
        wrong = [c for c in self.spec.cameras if c not in found[0].cameras]
        require(not wrong, f"'{root}' has cameras {list(found[0].cameras)}, the policy needs {wrong}")

        def observe(episode, states, t):
            images = {f"camera{k + 1}": reader.read(episode, c, t) for k, c in enumerate(self.spec.cameras)}
            return dict(images=images, instruction=episode.instruction, state=states[t])

        for e in found:
            sample = functools.partial(observe, e, ep.robot_state(e, self.spec.state_keys))
            target, still = definition.targets(e), definition.still(e)
            yield dict(name=e.name, sample=sample, target=target, hold=still, phase=e.phase)

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return [tuple(pair) for pair in self.spec.action_names]


# ---- build, save, load -----------------------------------------------------------------------------------------------


def open_vlm(source, why=""):
    """The VLM's folder or hub id -> (transformers config, tokenizer); no weights. `why`: who names it."""
    from transformers import AutoConfig, AutoTokenizer

    folder = hub.local_folder(source, weights=False, why=why)
    config = AutoConfig.from_pretrained(hub.hub_file(folder, "config.json").parent)
    kind = config.model_type
    require(kind == "smolvlm", f"policy.vlm_model_name is a {kind}; SmolVLA needs a smolvlm (SmolVLM2)")
    return config, AutoTokenizer.from_pretrained(folder)


class Unread:
    """Stands for a numpy array in the guide's own checkpoints (action_mean, ...), which is not needed."""

    def __init__(self, *_): ...

    def __setstate__(self, _): ...


NUMPY = ("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
NUMPY += ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "_codecs.encode")


def read_source(source):
    """A .pt (ours, the guide's), a LeRobot directory or hub id -> ({LeRobot's name: tensor}, network settings)"""
    if str(source).endswith(".pt"):
        with torch.serialization.safe_globals([(Unread, name) for name in NUMPY]):
            state = ckpt.load_state(source)
        tensors = state.get("policy_state_dict") or state.get("model_state_dict") or state
        about = state.get("config", {}).get("policy", {})
    else:
        folder = hub.local_folder(source)
        about = json.loads((folder / "config.json").read_text())
        tensors = dict(hub.read_tensors(folder))
    # the prefixes of DDP and torch.compile; the normalisers inside the model are of LeRobot before 0.4
    tensors = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in tensors.items()}
    skip = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
    return {k: v for k, v in tensors.items() if not k.startswith(skip)}, about


def load_weights(core, cfg):
    """Fill a new model from what the config starts from -> a line that says so."""
    p, source = cfg.policy, cfg.init_from or cfg.policy.pretrained_model_id
    if source:
        tensors, about = read_source(source)
        for key in SAME_NETWORK:
            now, then = getattr(p, key), about.get(key, getattr(p, key))
            require(then == now, f"{source} has policy.{key} {then}, this run {now}: set it to {then}")
        hub.load_weights(core, tensors.items(), source)
        return f"weights of {source}"
    vlm, tensors = core.model.vlm_with_expert.vlm, hub.read_tensors(hub.local_folder(p.vlm_model_name))
    kinds = dict(missing_ok=("lm_head",), unused_ok=("model.text_model.layers.",))  # tied; layers that are not used
    if hub.load_weights(vlm, tensors, p.vlm_model_name, **kinds):
        vlm.lm_head.weight.data.copy_(vlm.model.text_model.embed_tokens.weight)
    better = "for little data lerobot/smolvla_base is a better start (--policy.pretrained_model_id)"
    return f"VLM of {p.vlm_model_name}; the expert and its heads are new, from random numbers: {better}"


def choose_trained(core, cfg):
    """Set requires_grad: what the config leaves free, minus what cannot reach the loss (its gradient would stay None
    and DDP would wait for it). -> the peft model around `core` with train: lora, else None."""
    p, model, adapters = cfg.policy, core.model, None
    vlm = model.vlm_with_expert.vlm
    core.requires_grad_(True)
    vlm.requires_grad_(not p.train_expert_only)
    if p.freeze_vision_encoder:
        vlm.model.vision_model.requires_grad_(False)
    if cfg.train == "lora":
        from peft import LoraConfig, get_peft_model

        layers = "lm_expert" if p.train_expert_only else "(lm_expert|vlm.model.text_model)"
        sizes = dict(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout)
        where = rf"model.vlm_with_expert.{layers}.layers.\d+.(self_attn|mlp).\w+_proj"
        lora = LoraConfig(target_modules=where, modules_to_save=[f"model.{name}" for name in HEADS], **sizes)
        torch.manual_seed(cfg.seed)
        adapters = get_peft_model(core, lora)
    text, last = vlm.model.text_model, vlm.model.text_model.layers[model.last_used]
    behind = (*text.layers[model.last_used + 1 :], last.self_attn.q_proj, last.self_attn.o_proj, last.mlp)
    for unused in (vlm.lm_head, text.norm, *behind, last.post_attention_layernorm):
        unused.requires_grad_(False)
    return adapters


def build_model(cfg, vlm_config, action_dim, dtype=torch.float32, saved=None):
    """-> (SmolVLA on the CPU, its peft model or None, a line on where its weights come from). Trained weights and
    the small heads are fp32, what is frozen of VLM and expert in `dtype`. `saved`: the checkpoint of a resumed run."""
    torch.manual_seed(cfg.seed)
    core, said = SmolVLA(vlm_config, cfg.policy, action_dim), "weights of the checkpoint"
    if saved:
        hub.load_weights(core, saved["policy_state_dict"].items(), cfg.resume)
    else:
        said = load_weights(core, cfg)
    adapters = choose_trained(core, cfg)
    if saved:  # instead of what was exported: not averaged, LoRA not folded in
        core.load_state_dict(saved["model_state_dict"], strict=False)
    for parameter in core.model.vlm_with_expert.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return core, adapters, said


def export_weights(tensors, cfg):
    """State dict of a model -> the tensors with LeRobot's names, LoRA folded in."""
    out = {}
    for key, value in tensors.items():
        if ".lora_" in key or ".original_module." in key:
            continue
        if ".base_layer." in key:
            a, b = (tensors[key.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            value = (value.float() + cfg.lora_alpha / cfg.lora_rank * b @ a).to(value.dtype)
        out[key.replace(".base_layer", "").replace(".modules_to_save.default", "")] = value
    return out


NORMALIZER = "policy_preprocessor_step_5_normalizer_processor.safetensors"
UNNORMALIZER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
# of LeRobot's config: an unknown field is an error there, a missing one takes its default: what 0.3.4 to 0.6.2 know
LEROBOT = dict(type="smolvla", use_amp=False, push_to_hub=False, repo_id=None, private=None, tags=None, license=None)
LEROBOT |= dict(pretrained_path=None, empty_cameras=0, adapt_to_pi_aloha=False, use_delta_joint_actions_aloha=False)
LEROBOT |= dict(n_obs_steps=1, train_state_proj=True, use_cache=True, add_image_special_tokens=False)
LEROBOT |= dict(prefix_length=-1, pad_language_to="max_length")


def save_model(folder, tensors, cfg, collate, about, example, device="cpu"):
    """Write LeRobot's saved-policy format: config.json, model.safetensors (`tensors`: export_weights), pre- and
    post-processor with the statistics. Beside it meta.json (what load_policy and evaluate.py need; `about`: step and
    validation episodes), vlm/ (the backbone's config and tokenizer files, for use without the hub), and what these
    weights answer to one item of the dataset, `example`, which check_in_lerobot.py compares with LeRobot's answer."""
    from safetensors.torch import save_file

    folder, spec, p = Path(folder), collate.spec, cfg.policy
    (folder / "vlm").mkdir(parents=True)
    for file in hub.local_folder(p.vlm_model_name, weights=False).iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(file, folder / "vlm" / file.name)

    def write(name, value):
        (folder / name).write_text(json.dumps(value, indent=2))

    cameras = {f"observation.images.camera{k + 1}": [3, *shape] for k, shape in enumerate(spec.image_shapes)}
    inputs = {name: dict(type="VISUAL", shape=shape) for name, shape in cameras.items()}
    inputs["observation.state"] = dict(type="STATE", shape=[spec.state_dim])
    output = dict(action=dict(type="ACTION", shape=[spec.definition.dim]))
    modes = dict(VISUAL="IDENTITY", STATE=spec.normalization, ACTION=spec.normalization)
    # as smolvla_base: LeRobot then makes the VLM in bf16; from the config alone, in fp32, 0.4.4 misplaces its patches
    network = dataclasses.asdict(p) | dict(load_vlm_weights=True)
    network.pop("pretrained_model_id")
    network |= {f"optimizer_{k}": v for k, v in dataclasses.asdict(cfg.optimizer).items()}
    scheduler = dict(zip(("warmup_steps", "decay_steps"), schedule(cfg.training.steps, cfg), strict=True))
    network |= {f"scheduler_{k}": v for k, v in (scheduler | dict(decay_lr=cfg.scheduler.decay_lr)).items()}
    features = dict(input_features=inputs, output_features=output, normalization_mapping=modes)
    write("config.json", LEROBOT | features | network | dict(device=device))

    def step(name, state=None, **settings):
        return dict(registry_name=name, config=settings) | (dict(state_file=state) if state else {})

    text = dict(task_key="task", padding_side="right", padding="max_length", truncation=True)
    scaling = dict(eps=1e-8, norm_map=modes)
    before = [
        step("rename_observations_processor", rename_map={}),
        step("to_batch_processor"),
        step("smolvla_new_line_processor"),
        step("tokenizer_processor", max_length=p.tokenizer_max_length, tokenizer_name=p.vlm_model_name, **text),
        step("device_processor", device=device, float_dtype=None),
        step("normalizer_processor", NORMALIZER, features=inputs | output, **scaling),
    ]
    after = [step("unnormalizer_processor", UNNORMALIZER, features=output, **scaling)]
    after.append(step("device_processor", device="cpu", float_dtype=None))
    write("policy_preprocessor.json", dict(name="policy_preprocessor", steps=before))
    write("policy_postprocessor.json", dict(name="policy_postprocessor", steps=after))
    for name in (NORMALIZER, UNNORMALIZER):
        save_file(lerobot_stats(spec), folder / name)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write("meta.json", dict(format_version=FORMAT, spec=dataclasses.asdict(spec)) | about)
    observation = dict(example, images={f"camera{k + 1}": image for k, image in enumerate(example["images"])})
    answer = load_policy(folder, "cpu").predict([observation], example["noise"][None])
    shown = {f"observation.images.{name}": image for name, image in observation["images"].items()}
    shown |= {"observation.state": example["state"], "noise": example["noise"][None], "actions": answer}
    shown = {name: torch.tensor(value) for name, value in shown.items()}
    save_file(shown, folder / "example.safetensors", metadata=dict(task=example["instruction"]))
    shutil.copyfile(Path(__file__).with_name("check_in_lerobot.py"), folder / "check_in_lerobot.py")


def lerobot_stats(spec):
    """{"action.mean": tensor, ...} with which LeRobot computes what ours does, also in a dimension that never moves:
    the constant comes back whatever was sampled, the state's noise is not divided by 1e-8."""
    out = {}
    for key, n, spread in (("action", spec.action_scale, 0.0), ("observation.state", spec.state_scale, 1.0)):
        half, values = np.where(n.constant, spread, n.half), dict(spec.stats[key])
        if n.mode == "mean_std":
            values |= dict(mean=n.center, std=half)
        elif n.mode != "identity":
            low, high = MODES[n.mode]
            values |= {low: n.center - half, high: n.center + half}
        out |= {f"{key}.{k}": torch.tensor(np.asarray(values[k]), dtype=torch.float32) for k in LISTS if k in values}
    return out


def read_lerobot(folder):
    """A LeRobot policy directory -> (PolicyConfig, DataSpec). What LeRobot does not write down (the recorder's
    camera names, what the action is) is unknown without our meta.json: predict works then, open_episodes does not."""
    config = json.loads((folder / "config.json").read_text())
    found = (config.get("type"), config.get("add_image_special_tokens", False))
    wrong = f"{folder}/config.json has type, add_image_special_tokens = {found}; expected ('smolvla', False)"
    require(found == ("smolvla", False), wrong)
    policy = config_from(PolicyConfig, config)
    if (folder / "meta.json").is_file():
        about = json.loads((folder / "meta.json").read_text())
        version = about["format_version"]
        require(version == FORMAT, f"{folder}: meta.json has format_version {version}, this code reads {FORMAT}")
        return policy, DataSpec(**about["spec"])
    mapping, stats = config["normalization_mapping"], {}
    one_way = (folder / NORMALIZER).is_file() and mapping["STATE"] == mapping["ACTION"]
    for key, value in hub.read_tensors(folder / NORMALIZER) if one_way else ():
        stats.setdefault(key.rpartition(".")[0], {})[key.rpartition(".")[2]] = value.tolist()
    unknown = "so the units of its actions are unknown. Fine-tune from it instead: --init_from"
    has = f"{folder} has statistics of {sorted(stats) or 'nothing'}, not one of action and observation.state"
    require({"action", "observation.state"} <= set(stats), f"{has}, {unknown} {folder}")
    inputs = config["input_features"]
    cameras = {k: v["shape"] for k, v in inputs.items() if v["type"] == "VISUAL" and "empty_camera" not in k}
    action = dict(source="action", dim=config["output_features"]["action"]["shape"][0], rotation_unit="rad")
    names = [[f"action{i + 1}", ""] for i in range(action["dim"])]
    shapes, state_dim = [shape[1:] for shape in cameras.values()], inputs["observation.state"]["shape"][0]
    return policy, DataSpec(list(cameras), shapes, [], state_dim, action, names, mapping["STATE"], "", stats)


def load_policy(path, device=None):
    """Open a checkpoint for inference: a .pt of this script, final_hf, best_hf, any LeRobot SmolVLA directory, or an
    output_dir (its newest checkpoint)."""
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        there = ckpt.checkpoints_in(path, PATTERNS) or ckpt.checkpoints_in(path / "checkpoints", PATTERNS)
        require(there, f"{path} has neither config.json (a LeRobot policy) nor checkpoint_step_N.pt")
        path = there[-1]
    if path.is_dir():
        policy, spec = read_lerobot(path)
        name = policy.vlm_model_name
        beside = [folder for folder in (path / "vlm", path / name, path.parent / name) if folder.is_dir()]
        vlm_config, tokenizer = open_vlm(beside[0] if beside else name, f" ({path} names it)")
        tensors = dict(hub.read_tensors(path))
    else:
        state = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT)
        policy, spec = config_from(PolicyConfig, state["config"]["policy"]), DataSpec(**state["spec"])
        vlm_config, tokenizer = open_vlm(policy.vlm_model_name, f" ({path} names it)")
        tensors = state["policy_state_dict"]
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = SmolVLA(vlm_config, policy, spec.definition.dim)
    model = model.to_empty(device=device).requires_grad_(False)
    hub.load_weights(model, tensors.items(), path)
    return Policy(model.eval(), Collate(tokenizer, policy, spec), bf16=device.type == "cuda")


# ---- training --------------------------------------------------------------------------------------------------------


def schedule(total, cfg):
    """-> (warm-up steps, steps until the cosine ends) of `total` steps. As in LeRobot, both shrink where the training
    is shorter than the schedule."""
    warmup, decay = cfg.scheduler.num_warmup_steps, cfg.scheduler.num_decay_steps
    return (int(warmup * total / decay), total) if total < decay else (warmup, decay)


def lr_at(step, total, cfg):
    """Learning rate of update number `step` (from 0) of `total`: linear warm-up, cosine, its last value beyond."""
    (warmup, decay), peak = schedule(total, cfg), cfg.optimizer.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    end, progress = cfg.scheduler.decay_lr / cfg.scheduler.peak_lr, min(1.0, (step - warmup) / max(1, decay - warmup))
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Spikes:
    """Loss spikes: loss_spikes.txt to read, loss_spikes.csv to filter. The samples of a step are listed worst first."""

    COLUMNS = ("step", "loss", "action_loss", "temporal_loss", "moving_avg", "ratio", "episode_indices")
    COLUMNS += ("frame_indices", "episode_paths", "sample_losses")

    def __init__(self, run, threshold, episodes, saved):
        self.run, self.threshold, self.episodes = run, threshold, episodes
        self.history, self.rows = list(saved["history"]), list(saved["rows"])  # the newest losses; the spikes
        self.write()

    def check(self, loss):
        """Take the loss of a step -> moving average if it is a spike, else None."""
        self.history = (self.history + [loss])[-100:]
        average = sum(self.history) / len(self.history)
        return average if len(self.history) >= 50 and loss > self.threshold * average else None

    def record(self, losses, average, samples):
        """Write the newest step down -> (metrics, line). `losses` of the step by name; samples: this rank's [(losses,
        names)]. A collective call."""
        step, loss, own = self.run.step, losses["loss"], []
        for values, names in samples:
            own += zip(values.tolist(), names, strict=True)
        worst = sorted(sum(self.run.gather(own), []), key=lambda sample: -sample[0])
        episodes = list(dict.fromkeys(name[0] for _, name in worst))
        row = {k: f"{losses[k]:.6f}" for k in ("loss", "action_loss", "temporal_loss")}
        row |= dict(step=step, moving_avg=f"{average:.6f}", ratio=f"{loss / average:.2f}")
        row |= dict(episode_indices=[name[0] for _, name in worst], frame_indices=[name[2] for _, name in worst])
        row["episode_paths"] = "; ".join(f"[{i}] {self.episodes[i].path}" for i in episodes)
        self.rows.append(row | dict(sample_losses=[round(value, 6) for value, _ in worst]))
        self.write()
        values = {"spike/loss": loss, "spike/moving_avg": average, "spike/ratio": loss / average, "spike/step": step}
        ratio = f"(avg: {average:.4f}, {loss / average:.1f}x)"
        return values, f"⚠️  LOSS SPIKE at step {step}: {loss:.4f} {ratio} | Episodes: {episodes}"

    def write(self):
        self.run.write("loss_spikes.csv", pd.DataFrame(self.rows, columns=self.COLUMNS).to_csv(index=False))
        text = f"Loss spikes\n{'=' * 80}\nThreshold: {self.threshold}x moving average\n"
        for row in self.rows:
            text += f"\nLOSS SPIKE at Step {row['step']} (samples: worst first)\n"
            text += "".join(f"  {key.replace('_', ' ').title()}: {row[key]}\n" for key in self.COLUMNS[1:])
        self.run.write("loss_spikes.txt", text)


def describe(cfg, data, say):
    """Say what was found: episodes, cameras, state and action meaning and ranges."""
    s, train = data.spec, [data.episodes[i] for i in data.train]
    counts = f"{len(train)} training episodes, {sum(e.num_frames for e in train)} frames"
    say(f"data      {counts}; {len(data.validation)} validation episodes; {cfg.dataset.root_dir}")
    for message in data.excluded:
        say(f"excluded  {message}")
    pairs = enumerate(zip(s.cameras, s.image_shapes, strict=True), 1)
    say(f"cameras   {', '.join(f'{name} -> camera{k} {h}x{w}' for k, (name, (h, w)) in pairs)}")
    say(f"state     {' + '.join(s.state_keys)}, {s.state_dim} dims (padded to {cfg.policy.max_state_dim})")
    names, most = f"{s.action_names[0][0]} .. {s.action_names[-1][0]}", cfg.policy.max_action_dim
    what = f"{names} ({s.definition.source}), {s.definition.dim} dims (padded to {most})"
    say(f"action    {what}, chunk {cfg.policy.chunk_size}; {s.normalization}")
    if s.definition.source == "action" and ep.records_past_motion(train):
        say("warning   the recorded 'action' is the motion already made, so this trains on yesterday's action; set")
        say("          dataset.use_ee_pose_delta_as_action: true for the motion that follows")
    for key in ("observation.state", "action"):
        for name in ("mean", "std", "min", "max"):
            numbers = " ".join(f"{v:11.4g}" for v in data.spec.stats[key][name])
            say(f"          {key.rpartition('.')[2]:<7}{name:<5}{numbers}")
    texts = sorted({e.instruction or s.task_instruction for e in train})
    say(f"text      {len(texts)} instruction(s), e.g. {texts[0]!r}")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer
    the text stays unbuilt, and says so."""
    data = load_data(cfg)
    describe(cfg, data, print)
    dataset = SmolVLADataset(data, data.train, cfg, True)
    order = GlobalOrder(len(dataset), cfg.seed)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.training.batch_size, len(dataset)))]
    _, episode, frame = items[0]["name"]
    print(f"samples   {len(dataset)} (frames with a target); batch of {len(items)}, first: {episode} frame {frame}")
    batch = {f"camera{k + 1}": torch.tensor(image) for k, image in enumerate(items[0]["images"])}
    try:
        _, tokenizer = open_vlm(cfg.policy.vlm_model_name)
        batch |= Collate(tokenizer, cfg.policy, data.spec)(items)
        print(f"text      {tokenizer.decode(batch['tokens'][0][batch['token_mask'][0]])!r}")
    except MissingFile as error:
        print(f"note      tokens are not shown: {error}")
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            about = f"{str(tuple(value.shape)):<22} {str(value.dtype):<14}"
            print(f"          {key:<14} {about} {value.min().item():.4g} .. {value.max().item():.4g}")
    print("check passed")


def log_line(step, run):
    """-> what Step.log takes, by the guide's names. Loss = Action + Temporal."""
    mean, (speed, wait, memory) = step.mean(), step.speed()
    vram = memory if run.device.type == "cuda" else 0.0
    free = int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1]) / 1e6
    ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9 - free
    values = {f"train/{k}": mean[k] for k in ("loss", "action_loss", "temporal_loss", "action_loss_real", "grad_norm")}
    values |= {"train/learning_rate": step.lr, "train/steps_per_sec": speed / run.global_batch}
    values |= {"system/ram_gb": ram, "system/vram_allocated_gb": vram}
    loss = "Loss: {loss:.4f} (Action: {action_loss:.4f}, Temporal: {temporal_loss:.4f})".format(**mean)
    line = f"[{100 * step.number / run.total:5.1f}%] Step {step.number}/{run.total} | {loss}"
    line += f" | Real dims: {mean['action_loss_real']:.4f} | GradNorm: {mean['grad_norm']:.3f} | LR: {step.lr:.2e}"
    line += f" | {speed / run.global_batch:.2f} steps/sec | {speed:.1f} samples/s | wait {wait:.1%}"
    return dict(values=values, line=f"{line} | VRAM: {vram:.1f}GB | RAM: {ram:.1f} GB")


def validate(core, policy, dataset, cfg, run):
    """-> {val/loss = val/action_loss + val/temporal_loss, val/action_loss_real, val/action_mae: mean over dims in data
    units, val/mae_<dim>}. Noise and time belong to the frame, so that two validations differ by the weights alone."""
    size, names = cfg.training.batch_size, [n for n, _ in policy.action_names()]
    chosen = np.linspace(0, len(dataset) - 1, min(cfg.validation.num_samples, len(dataset))).astype(int)
    mine = np.unique(chosen)[run.rank :: run.world].tolist()
    sums, errors = np.zeros(5), np.zeros(len(names))  # flow, real, temporal, steps, pairs | error per dim
    core.eval()
    for i in range(0, len(mine), size):
        items = [dataset[(k, k)] for k in mine[i : i + size]]
        batch, real = policy.collate(items), ~np.stack([item["is_pad"] for item in items])
        with torch.no_grad(), run.autocast():
            out = core(to_device(batch, run.device))
        sums += [out[f"{k}_sum"].item() for k in ("flow", "real", "temporal")] + [real.sum(), real[:, 1:].sum()]
        errors += np.abs(policy.decode(batch) - np.stack([item["action"] for item in items]))[real].sum(0)
    core.train()
    flow, over_real, temporal, steps, pairs, *errors = run.sum(*sums, *errors)
    action, dims = flow / (steps * cfg.policy.max_action_dim), len(names)
    temporal = cfg.training.lambda_temporal * temporal / max(pairs * dims, 1)
    values = {"val/loss": action + temporal, "val/action_loss": action, "val/temporal_loss": temporal}
    values |= {"val/action_loss_real": over_real / (steps * dims), "val/action_mae": sum(errors) / steps / dims}
    return values | {f"val/mae_{n}": e / steps for n, e in zip(names, errors, strict=True)}


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    t, out = cfg.training, Path(cfg.output_dir)
    folder, bf16 = out / "checkpoints", t.use_bfloat16 and torch.cuda.is_available()
    cfg.policy.vlm_model_name = hub.stored_source(cfg.policy.vlm_model_name)
    run = Run(cfg, out, t.batch_size, t.gradient_accumulation_steps, bf16)
    path = run.find(cfg.resume, folder, PATTERNS, beside=["best_hf", "final_hf"])
    saved = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT) if path else None
    data = load_data(cfg, run, saved)
    if saved and saved["fingerprint"] != data.fingerprint and path.parent.resolve() != folder.resolve():
        run.print(f"resume    {path} was trained on other data: a NEW RUN from its weights, as with --init_from")
        cfg = run.cfg = dataclasses.replace(cfg, resume=None, init_from=str(path))
        saved = None
    describe(cfg, data, run.print)
    if saved:
        run.restore(path, saved, data.fingerprint, FIXED)
    begin = saved["schedule_begin"] if saved and not cfg.reset_scheduler else run.step  # of the schedule
    vlm_config, tokenizer = open_vlm(cfg.policy.vlm_model_name)
    collate = Collate(tokenizer, cfg.policy, data.spec)
    example = SmolVLADataset(data, data.train[:1], cfg)[(0, 0)]
    meta = dict(script=Path(__file__).stem, validation=[data.episodes[i].name for i in data.validation])

    def export(path, tensors):
        save_model(path, tensors, cfg, collate, meta | dict(step=run.step), example, run.device.type)

    def export_final(tensors, size):
        ok = run.save_as(folder / "final_hf", lambda path: export(path, tensors()), size)
        require(ok, f"{folder}/final_hf could not be written. Free space; --resume auto writes it")

    if not run.plan(t.steps, "--steps"):
        return export_final(lambda: saved["policy_state_dict"], 0)  # it may be missing, or of a shorter run

    # ---- model, optimizer
    dims, A, o = data.spec.definition.dim, cfg.policy.max_action_dim, cfg.optimizer
    core, adapters, said = build_model(cfg, vlm_config, dims, torch.bfloat16 if bf16 else torch.float32, saved)
    policy = Policy(core.to(run.device).train(), collate, bf16)
    trained = {n: p for n, p in core.named_parameters() if p.requires_grad}
    kinds = dict(betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=run.device.type == "cuda" or None)
    optimizer = torch.optim.AdamW(trained.values(), o.lr, **kinds)
    if saved:
        ckpt.restore_moments(core, optimizer, saved["optimizer_state_dict"])
    ema = Ema(trained, t.ema_decay, saved=saved and saved["ema_state_dict"])
    spikes = Spikes(run, t.loss_spike_threshold, data.episodes, saved["spikes"] if saved else dict(history=[], rows=[]))
    model, saved = run.prepare(core), None  # the mapped file may be rotated away

    # ---- data
    dataset, held_out = SmolVLADataset(data, data.train, cfg, True), SmolVLADataset(data, data.validation, cfg)
    loader = run.loader(dataset, GlobalOrder(len(dataset), cfg.seed), collate, t.num_workers)
    size = sum(p.numel() * p.element_size() for p in core.parameters())
    size += sum(p.numel() for p in trained.values()) * (16 if t.ema_decay else 8)  # two moments; an average, its export
    run.describe(core, len(dataset), size, folder, f"; {said}")
    warmup, decay = schedule(t.steps - begin, cfg)
    run.print(f"schedule  warm-up of {warmup} steps, cosine until step {begin + decay}")
    run.write("checkpoints/meta.json", json.dumps(meta))  # evaluate.py finds the script and the episodes here
    run.once(save_stats, out / "dataset_stats.yaml", data.spec.stats)
    run.once(ep.write_validation_list, out / "validation_episodes.txt", data.episodes, data.validation)

    def weights():
        """-> (the model's state dict, the same as LeRobot names it, averaged where EMA is on), on the CPU."""
        raw = {k: v.detach().cpu() for k, v in core.state_dict().items()}
        return raw, export_weights(raw | {k: v.cpu() for k, v in ema.average.items()}, cfg)

    def write(path):
        raw, exported = weights()  # tensors that are the same in both are stored once
        about = dict(format_version=FORMAT, meta=meta, fingerprint=data.fingerprint, episodes=data.table)
        about |= dict(spec=dataclasses.asdict(data.spec), normalization_stats=data.spec.stats, schedule_begin=begin)
        about["spikes"] = dict(history=spikes.history, rows=spikes.rows)
        own = {k: v for k, v in raw.items() if k in trained or ".base_layer." in k}
        state = dict(policy_state_dict=exported, model_state_dict=own)
        state["ema_state_dict"] = {k: v.cpu() for k, v in ema.average.items()}
        state["optimizer_state_dict"] = ckpt.training_state(core, optimizer)[1]
        ckpt.save_state(path, run.progress() | about | state)
        ckpt.link(path, folder / "checkpoint_latest.pt")

    run.checkpoints(folder, "checkpoint_step_{step}.pt", write, size, keep=t.keep_checkpoints)

    # ---- loop
    mode = cfg.wandb.mode if cfg.wandb.enable else "disabled"
    wandb = dataclasses.replace(cfg.wandb, mode=mode, name=cfg.wandb.name or time.strftime("smolvla_sim_%Y%m%d_%H%M%S"))
    for step in run.steps(loader, cfg.wandb.project, wandb, NAMES):
        # unpadded steps, and pairs of them, of the whole optimizer step: what the two losses are divided by
        real = [~b["is_pad"] for b in step.batches]
        steps, pairs = run.sum(sum(r.sum() for r in real), sum(r[:, 1:].sum() for r in real))
        samples = []
        for batch in step.micro_batches(model):
            out = model(batch)
            action = out["flow_sum"] / (steps * A)
            temporal = t.lambda_temporal * out["temporal_sum"] / max(pairs * dims, 1)
            step.backward(action + temporal, out["sample_loss"])
            step.add(action_loss=action, temporal_loss=temporal, action_loss_real=out["real_sum"] / (steps * dims))
            samples.append((out["sample_loss"], batch["names"]))
        step.update(optimizer, lr_at(step.index - begin, t.steps - begin, cfg), o.grad_clip_norm)
        if step.finite:
            ema.update(step.index)
            if average := spikes.check(step.loss):
                run.log.log(step.number, *spikes.record(run.window[-1], average, samples))

        if step.every(t.log_freq):
            step.log(**log_line(step, run))
        if data.validation and step.every(cfg.validation.val_freq):
            with ema.swapped():
                values = validate(core, policy, held_out, cfg, run)
            losses = f"Loss: {values['val/loss']:.4f} | Action Loss: {values['val/action_loss']:.4f}"
            line = f"[VAL] Step {step.number} | {losses} | Action MAE: {values['val/action_mae']:.4g}"
            if step.validated(values, values["val/loss"], line=f"{line} {policy.action_names()[0][1]}"):
                run.save_best(folder / "best_hf", lambda path: export(path, weights()[1]), size)
        if step.should_save(t.save_freq):
            run.save()

    if run.step == t.steps:
        if adapters:  # opens with peft, on the weights that this run began with
            with ema.swapped():
                run.save_as(folder / "final_adapter", adapters.save_pretrained, size)
        export_final(lambda: weights()[1], size)
    evaluate = f"evaluate: python evaluate.py --checkpoint {folder} --data {cfg.dataset.root_dir}"
    run.finish(f"model: {folder}/final_hf (LeRobot format)", evaluate, plot=("train/loss", "val/loss"))


if __name__ == "__main__":
    memory = "Lower training.batch_size (now {training.batch_size}) and raise training.gradient_accumulation_steps"
    launch(main, Config, ALIASES, memory, ACCEPTED)
