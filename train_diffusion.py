"""Diffusion VLA: an action expert denoises a chunk of actions, given the newest feature of a frozen Qwen2.5-VL and a second of the force sensor.

Data: robot sessions with a data.pkl (create_datapkl.py) and their cached features (build_vl_cache.py), as for train_async.py. One training sample is one 100 ms step k: the
feature of the newest VLM tick, the last 650 sensor rows (1 s at 650 Hz) -> the next 8 actions, deltas of the TCP pose in mm and degrees. The expert learns the noise in them (DDPM,
Ho et al. 2020; actions as in Diffusion Policy, Chi et al. 2023). With a cache no image is opened and no VLM is loaded.

    python train_diffusion.py --config configs/diffusion.yaml --check                  # look at the data, no weights needed
    bash shells/train_diffusion.sh --multi-gpu --num-gpus 4                            # the same as: torchrun --nproc_per_node=4 train_diffusion.py ...
    python train_diffusion.py --config configs/demo/diffusion.yaml --max-steps 20      # smoke run on a CPU, on make_demo.py's output

Output, in checkpoint_dir: diffusion_stage1_latest.pt (newest, resumes), diffusion_stage1_best.pt (averaged weights only; both open with load_policy), and in
diffusion_stage1/ config.yaml, metrics.jsonl, validation_episodes.txt, loss.png.

Letters in shapes: B batch, N VL tokens of a tick (1), V their width, W sensor rows (the window), C sensor channels (1026: force, A-scan), H actions (the chunk),
A action dims (7), D width of the expert, T diffusion timesteps, K draws of noise.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common import checkpoint as ckpt
from common import runlog, vl_cache
from common import sessions as ss
from common.config import parse_config, save_config
from common.sampler import GlobalOrder, RankBatches, generator_at, torch_seed_at
from common.stats import Normalizer
from common.two_rate import TwoRateLoop  # noqa: F401  what runs a policy on a robot

FORMAT = 1  # of the checkpoints
LATEST, BEST = "diffusion_stage1_latest.pt", "diffusion_stage1_best.pt"
VALIDATION_TIMES = 10  # timesteps at which the validation loss looks, spread over 0..T-1
EMA_POWER = 0.75  # of the averaging of weights, as in Diffusion Policy
WEIGHTS = {
    "New_dataset": 3.0,
    "White_silicone_white_circle": 2.0,
    "Needle_insertion_eye_trocar": 2.0,
    "OCT_insertion": 1.0,
    "part1": 1.0,
}  # guide 5; others 1
ACTIONS = [("dx", "mm"), ("dy", "mm"), ("dz", "mm"), ("da", "deg"), ("db", "deg"), ("dr", "deg"), ("gripper", "")]


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    training_stage: str = "stage1"  # the VLM stays frozen; stage 2 (LoRA) is not offered
    # data
    dataset_dir: list[str] = field(
        default_factory=list
    )  # folders with sessions that have a data.pkl, searched recursively
    dataset_weight: list[str] = field(
        default_factory=list
    )  # NAME=W: how often a sample of this data set is drawn, over guide 5's table (3/2/2/1/1)
    val_split: float = (
        0.05  # share of the sessions held out, by a hash of the name; at least one per data set that has two
    )
    sensor_enabled: bool = True  # use the force sensor; false: features alone
    sensor_window_size: int = 650  # W, newest sensor rows at the step (650 per second)
    # VLM features
    cache_root: str | None = None  # folder that holds qwen_vl_features/; null: cache/ in the first dataset_dir
    cache: Literal["required", "online"] = (
        "required"  # required: features of build_vl_cache.py; online: the VLM runs in every step, slow
    )
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # the VLM: hub id or directory; with a cache it is compared (its files, or where they are not on this machine its name), not loaded
    views: list[str] = field(
        default_factory=list
    )  # camera views; empty: those of the cache, or all that every session has
    image_resize_height: int = 360  # pixels, of the images that the VLM sees
    image_resize_width: int = 640  # pixels
    vlm_reuse_count: int = 3  # R, steps that use one feature: 3 is a VLM at 3.33 Hz; a multiple of the cache's stride
    vlm_latency_ms: float = 0.0  # a feature can be used this long after its images; 0: as in the guide
    max_image_age: float = 1.5  # seconds; a tick whose newest image of a view is older is not used
    # model
    hidden_dim: int = 1024  # D
    sensor_dim: int = 3072  # width of the sensor's feature
    num_layers: int = 4  # of the action expert
    num_heads: int = 8  # of sensor encoder and expert
    dropout: float = 0.1  # in the sensor encoder and the expert
    horizon: int = 8  # H, actions per prediction, 100 ms each
    diffusion_timesteps: int = 100  # T, DDPM with a squared-cosine schedule
    ddim_steps: int = 10  # network calls per prediction
    noise_draws: int = (
        1  # K, noises and timesteps per sample and step; more cost little beside a wide sensor window and learn faster
    )
    # training
    epochs: int = 20  # passes over as many samples as there are
    max_steps: int | None = None  # optimizer steps instead of epochs
    batch_size: int = 4  # samples per GPU and micro-batch
    grad_accum_steps: int = 8  # micro-batches per optimizer step
    lr: float = 1e-4  # peak, AdamW
    min_lr: float = 1e-6  # at the end of the cosine
    warmup_ratio: float = 0.03  # share of all steps: linear warm-up
    hold_ratio: float = 0.02  # share of all steps: at the peak, before the cosine
    weight_decay: float = 0.01  # decoupled; on everything
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    ema_decay: float = (
        0.9999  # largest decay of the averaged weights that validation, best and load_policy use; 0: no average
    )
    sensor_loss_weight: float = 2.0  # weight in the loss of a sample that has sensor data; the others weigh 1
    use_bfloat16: bool = True  # bf16 autocast on CUDA; weights are fp32 in any case
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 42  # of order, noise, dropout and new weights
    # output
    checkpoint_dir: str = "./checkpoints"  # diffusion_stage1_*.pt and diffusion_stage1/
    eval_epochs: int = 1  # validate and save every so many epochs
    save_steps: int = 0  # save every so many optimizer steps within an epoch, too; 0: no
    log_steps: int = 10  # optimizer steps
    resume: str | None = None  # a checkpoint, or "auto" for diffusion_stage1_latest.pt in checkpoint_dir
    check: bool = False  # read the data, build and print one batch, stop
    wandb: runlog.WandbConfig = field(default_factory=runlog.WandbConfig)


ALIASES = {
    "dataset_dirs": "dataset_dir",
    "grad_accum": "grad_accum_steps",
    "sensor": "sensor_enabled",
    "wandb": "wandb.mode",
}


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    if not cfg.dataset_dir:
        raise ValueError(
            "dataset_dir is empty: name the folders with the sessions, --dataset_dir DATA (preprocessed by: python create_datapkl.py --dataset-dirs DATA)"
        )
    ones = (
        "sensor_window_size",
        "vlm_reuse_count",
        "hidden_dim",
        "sensor_dim",
        "num_layers",
        "num_heads",
        "horizon",
        "epochs",
        "batch_size",
        "grad_accum_steps",
        "eval_epochs",
        "log_steps",
        "ddim_steps",
        "noise_draws",
    )
    for wrong, message in (
        (
            cfg.training_stage != "stage1",
            f"training_stage is {cfg.training_stage}: not supported, only stage1 (VLM frozen) is; the guide advises against stage 2",
        ),
        (
            not 2 <= cfg.diffusion_timesteps,
            f"diffusion_timesteps is {cfg.diffusion_timesteps}: expected 2 or more (100)",
        ),
        (
            cfg.ddim_steps > cfg.diffusion_timesteps,
            f"ddim_steps is {cfg.ddim_steps}: expected 1..{cfg.diffusion_timesteps} (diffusion_timesteps)",
        ),
        (not 0 <= cfg.ema_decay < 1, f"ema_decay is {cfg.ema_decay}: expected 0 (off) to below 1"),
        *((getattr(cfg, key) < 1, f"{key} is {getattr(cfg, key)}: expected 1 or more") for key in ones),
        (
            cfg.max_steps is not None and cfg.max_steps < 1,
            f"max_steps is {cfg.max_steps}: expected 1 or more, or null for {cfg.epochs} epochs",
        ),
        (not 0 <= cfg.val_split < 1, f"val_split is {cfg.val_split}: expected a share from 0 to below 1"),
        (
            cfg.hidden_dim % (2 * cfg.num_heads),
            f"hidden_dim is {cfg.hidden_dim}: expected a multiple of 2 * num_heads ({2 * cfg.num_heads})",
        ),
        (
            cfg.vlm_latency_ms < 0 or cfg.save_steps < 0,
            f"vlm_latency_ms is {cfg.vlm_latency_ms}, save_steps is {cfg.save_steps}: expected 0 or more",
        ),
        (cfg.sensor_loss_weight <= 0, f"sensor_loss_weight is {cfg.sensor_loss_weight}: expected more than 0"),
        (
            min(cfg.warmup_ratio, cfg.hold_ratio) < 0 or cfg.warmup_ratio + cfg.hold_ratio >= 1,
            f"warmup_ratio + hold_ratio is {cfg.warmup_ratio} + {cfg.hold_ratio}: expected shares below 1",
        ),
    ):
        if wrong:
            raise ValueError(message)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Sessions of a run, split and described."""

    train: list  # common.sessions.Session, sorted by name
    validation: list
    stats: dict  # of the training sessions
    weights: dict  # {data set: weight per sample}
    features: object  # Features
    fingerprint: str  # changes when the training samples, their features or their order would


class Features:
    """The VL features of the sessions: those of the cache's files, without opening an image; or, with --cache online, the images that the VLM is to see.

    `expected`: keys of the features' recipe that must be so; None: those of the config. `optional`: errors of the cache after which images are read instead,
    `missing` then says why.
    """

    def __init__(self, cfg, part, expected=None, optional=()):
        self.cfg, self.files, self.recipe, self.missing, self.stride, self._ticks = (
            cfg,
            None,
            None,
            None,
            cfg.vlm_reuse_count,
            {},
        )
        expected = expected or dict(
            model=cfg.model, views=cfg.views or None, height=cfg.image_resize_height, width=cfg.image_resize_width
        )
        root = Path(cfg.cache_root or Path(cfg.dataset_dir[0]) / "cache")
        if cfg.cache == "required":
            try:
                self.files, self.recipe = vl_cache.read_features(
                    root, part, expected, cfg.vlm_reuse_count, cfg.max_image_age
                )
            except optional as error:
                self.missing = str(error)
        self.views = self.recipe["views"] if self.files else list(expected["views"] or ss.common_views(part)[0])
        if not self.views:
            raise ValueError(
                f"no view is in all of the {len(part)} sessions: choose some with --views, or leave sessions out; missing: {ss.common_views(part)[1]}"
            )
        self.about = f"{cfg.model}, views {', '.join(self.views)} at {expected['height']}x{expected['width']}, computed in every step"
        if self.files:
            first = next(iter(self.files.values()))
            self.stride, self.shape = first.meta["stride"], first.shape[1:]
            self.about = (
                f"{self.recipe['model']}, views {', '.join(self.views)} at {self.recipe['pixels'][0]}x{self.recipe['pixels'][1]}: "
                f"{self.shape[0]} x {self.shape[1]} numbers every {self.stride} steps, {root}"
            )

    def key(self, session):
        """What changes when the features of this session would."""
        return self.files[session.name].path.stem[-24:] if self.files else [self.about, session.instruction]

    def usable(self, session):
        """-> (m,) steps whose tick has a fresh image of every view, (m,) their tick, (m,) steps since that tick."""
        c = self.cfg
        ticks = self._ticks[session.name] = session.ticks(self.stride, self.views, c.max_image_age)
        steps, at = session.usable_steps(
            self.stride, c.vlm_reuse_count, self.views, c.max_image_age, c.vlm_latency_ms / 1000
        )
        return steps, at, steps - ticks.start[at]

    def read(self, session, tick):
        """-> dict(vl_features (N, V) float32), or dict(images {view: (h, w, 3) uint8}, instruction)."""
        if self.files:
            return dict(vl_features=self.files[session.name].features[tick].float())
        index = {view: int(self._ticks[session.name].frame_index[view][tick]) for view in self.views}
        return dict(
            images={view: vl_cache.read_image(session.frame_path(view, i)) for view, i in index.items()},
            instruction=session.instruction,
        )


def load_data(cfg, rank=0, saved=None, optional=()):
    """Find, split and describe the sessions. `saved`: a checkpoint, whose statistics are kept where it was trained on these very sessions; `optional`: see Features."""
    found = ss.find_sessions(cfg.dataset_dir)
    if other := [s for s in found if s.metadata["action_hz"] != ss.ACTION_HZ]:
        raise ValueError(
            f"{other[0].name} has actions at {other[0].metadata['action_hz']:g} Hz, expected {ss.ACTION_HZ}: python create_datapkl.py --dataset-dirs {other[0].path} --force"
        )
    train, validation = ss.split_sessions(found, cfg.val_split)
    present, weights = sorted({s.dataset for s in found}), dict(WEIGHTS)
    for text in cfg.dataset_weight:
        name, _, value = text.rpartition("=")
        try:
            weights[name] = float(value)
        except ValueError:
            raise ValueError(f"dataset_weight '{text}': expected NAME=W, e.g. {present[0]}=2") from None
        if name not in present or not 0 < weights[name] < math.inf:
            raise ValueError(f"dataset_weight '{text}': expected one of {', '.join(present)}, and a weight above 0")
    features = Features(cfg, found, optional=optional)
    if not any(len(features.usable(s)[0]) for s in train):
        raise ValueError(
            f"no step of the {len(train)} training sessions has an image of {', '.join(features.views)} that is at most {cfg.max_image_age:g} s old: "
            "choose other --views, or raise --max-image-age"
        )
    content = lambda s: hashlib.sha256(
        s.action.tobytes() + s.starts.tobytes() + (s.sensor_stamps.tobytes() if s.has_sensor else b"")
    ).hexdigest()
    fingerprint = hashlib.sha256(
        json.dumps([[s.name, content(s), features.key(s)] for s in train]).encode()
    ).hexdigest()[:16]
    stats = [None]
    if saved and saved["fingerprint"] == fingerprint:
        stats = [saved["stats"]]
    elif rank == 0:  # reads a tenth of all sensor rows: once is enough
        stats = [ss.session_stats(train)]
    if dist.is_initialized():
        dist.broadcast_object_list(stats)
    return Data(train, validation, stats[0], {name: weights.get(name, 1.0) for name in present}, features, fingerprint)


class SessionDataset(Dataset):
    """One item per usable step k of the sessions (its VLM tick has a fresh image of every view). Item (position, i), where `position` seeds noise and timestep:

    vl_features (N, V) float32, or with --cache online images {view: (h, w, 3) uint8} and instruction | sensor (n <= W, 1026) float32 raw rows, newest last, or None |
    actions (H, 7) float32 in mm and degrees, action_mask (H,) bool: False past the end of the segment | previous (7,) the action before, zeros at a
    segment's start | noise (K, H, 7) float32 ~ N(0, 1), t (K,) int, diffusion timesteps |
    weight float, in the loss | reuse_step, steps since the feature's images: 0..R-1 without latency | name (session, k)
    """

    def __init__(self, part, features, cfg):
        self.sessions, self.features, self.cfg = list(part), features, cfg
        self.datasets = sorted({s.dataset for s in self.sessions})
        self.steps, self.ticks, self.age = (
            zip(*[features.usable(s) for s in self.sessions]) if self.sessions else ((), (), ())
        )
        self.ends = np.cumsum([len(k) for k in self.steps])

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def sample_weights(self, weights):
        """{data set: weight} -> (len,) weight of each sample."""
        return np.repeat([weights[s.dataset] for s in self.sessions], [len(k) for k in self.steps]).astype(np.float64)

    def locate(self, i):
        """Sample -> (session number, row of its steps)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def tick_at(self, i):
        """Sample -> (session, its VLM tick)."""
        e, row = self.locate(i)
        return self.sessions[e], int(self.ticks[e][row])

    def __getitem__(self, key):
        position, i = key
        rng, cfg = generator_at(self.cfg.seed, position, "noise"), self.cfg
        return self.read(*self.locate(i)) | dict(
            noise=rng.standard_normal((cfg.noise_draws, cfg.horizon, len(ACTIONS)), dtype=np.float32),
            t=rng.integers(cfg.diffusion_timesteps, size=cfg.noise_draws),
        )

    def read(self, e, row):
        """Step number `row` of session number `e`."""
        s, k, tick, cfg = self.sessions[e], int(self.steps[e][row]), int(self.ticks[e][row]), self.cfg
        actions, mask = s.targets(k, cfg.horizon)
        first = k == 0 or s.segment[k - 1] != s.segment[k]
        sensor = None
        if cfg.sensor_enabled and s.has_sensor:
            window, length = s.sensor_window(k, cfg.sensor_window_size)
            sensor = window[len(window) - length :] if length else None
        return self.features.read(s, tick) | dict(
            sensor=sensor,
            actions=actions,
            action_mask=mask,
            previous=np.zeros_like(s.action[0]) if first else s.action[k - 1],
            weight=cfg.sensor_loss_weight if sensor is not None else 1.0,
            reuse_step=int(self.age[e][row]),
            name=(s.name, k),
        )


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    def __init__(self, cfg, stats):
        self.window, self.sensor_enabled, self.action = (
            cfg.sensor_window_size,
            cfg.sensor_enabled,
            Normalizer(stats["action"]),
        )

    def inputs(self, observations):
        """vl_features (B, N, V) float32, or pictures: list of (images, instruction), see online_features | sensor (B, W, 1026) float32 raw, zeros on the left
        where rows are missing | sensor_length (B,), 0 without sensor."""
        batch = {}
        if self.sensor_enabled:
            sensor, length = np.zeros((len(observations), self.window, ss.CHANNELS), np.float32), []
            for b, o in enumerate(observations):
                rows = (
                    np.zeros((0, ss.CHANNELS), np.float32)
                    if o.get("sensor") is None
                    else np.asarray(o["sensor"])[-self.window :]
                )
                sensor[b, self.window - len(rows) :] = rows
                length.append(len(rows))
            batch = dict(sensor=torch.from_numpy(sensor), sensor_length=torch.tensor(length))
        if "vl_features" in observations[0]:
            return batch | dict(
                vl_features=torch.stack([torch.as_tensor(o["vl_features"]).float() for o in observations])
            )
        return batch | dict(pictures=[(o["images"], o["instruction"]) for o in observations])

    def __call__(self, items):
        """List of dataset items -> inputs() plus actions (B, H, 7) normalised, action_mask (B, H), noise (B, K, H, 7), t (B, K), weight, reuse_step, has_sensor (B,), and the items' names."""
        stack = lambda key: torch.from_numpy(np.stack([item[key] for item in items]))
        return self.inputs(items) | dict(
            actions=torch.from_numpy(self.action.normalize(np.stack([item["actions"] for item in items]))),
            action_mask=stack("action_mask"),
            weight=stack("weight").float(),
            reuse_step=stack("reuse_step"),
            noise=stack("noise"),
            t=stack("t"),
            has_sensor=torch.tensor([item["sensor"] is not None for item in items]),
            names=[item["name"] for item in items],
        )


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


# ---- model -----------------------------------------------------------------------------------------------------------


class SensorEncoder(nn.Module):
    """(B, W, 1026) normalised sensor rows, newest last, of which the last `length` are real -> (B, out). Four convolutions of stride 2, two transformer
    layers, the mean over time. What stands in the padding changes nothing: it is zeroed after every layer, and no norm looks along time."""

    def __init__(self, width, out, heads, dropout):
        super().__init__()
        sizes = [ss.CHANNELS, width // 2, width, width, width]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:]))
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(b) for b in sizes[1:]), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.Linear(width, out), nn.LayerNorm(out), nn.GELU(), nn.Dropout(dropout), nn.Linear(out, out)
        )

    def forward(self, x, length):
        real = torch.arange(x.shape[1], device=x.device) >= x.shape[1] - length[:, None]  # (B, W)
        real = real | (length == 0)[:, None]  # attention over nothing is NaN; the caller drops this row
        x = x.masked_fill(~real[..., None], 0)
        for conv, norm in zip(self.convs, self.norms):
            x = conv(x.transpose(1, 2)).transpose(1, 2)  # output i sees inputs 2i-1, 2i, 2i+1
            real = torch.cat([real, real[:, -1:]], dim=1)[:, 1::2] if real.shape[1] % 2 else real[:, 1::2]
            x = self.dropout(F.gelu(norm(x))).masked_fill(~real[..., None], 0)
        x = x + sinusoid(torch.arange(x.shape[1] - 1, -1, -1, device=x.device), x.shape[2])  # age: the newest is 0
        x = self.transformer(x, src_key_padding_mask=~real)
        return self.head((x * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def sinusoid(t, width):
    """(n,) numbers -> (n, width): sines, then cosines, of frequencies 1 to 1e-4."""
    angle = t[:, None].float() * torch.exp(
        torch.arange(width // 2, device=t.device) * (-math.log(1e4) / (width // 2 - 1))
    )
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Condition(nn.Module):
    """VL feature and sensor -> one condition token (B, D). A sample without sensor data gets a learned embedding in its place."""

    def __init__(self, vl_shape, sensor_dim, width, heads, dropout):
        super().__init__()
        tokens, vl_width = vl_shape
        for name, size in (
            ("vl_mean", vl_width),
            ("vl_std", vl_width),
            ("sensor_mean", ss.CHANNELS),
            ("sensor_std", ss.CHANNELS),
        ):
            self.register_buffer(name, torch.ones(size) if name.endswith("std") else torch.zeros(size))
        self.sensor = SensorEncoder(width, sensor_dim, heads, dropout) if sensor_dim else None
        self.no_sensor = nn.Parameter(torch.zeros(sensor_dim)) if sensor_dim else None
        self.fuse = nn.Linear(tokens * vl_width + sensor_dim, width)

    def forward(self, batch):
        # z-scored: a few of the VLM's dimensions are a hundred times larger than the others and hardly vary
        parts = [((batch["vl_features"] - self.vl_mean) / self.vl_std).flatten(1)]
        if self.sensor is not None:  # run for every row, so that all ranks have the same gradients to average
            length = batch["sensor_length"]
            encoded = self.sensor((batch["sensor"] - self.sensor_mean) / self.sensor_std, length)
            parts.append(torch.where((length > 0)[:, None], encoded.float(), self.no_sensor))
        return self.fuse(torch.cat(parts, dim=1))


class NoiseSchedule(nn.Module):
    """DDPM over T timesteps with a squared-cosine schedule (Nichol and Dhariwal 2021): x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps. Tables in float32,
    whatever the autocast: 1 / sqrt(abar) of the last timestep is 2000."""

    def __init__(self, timesteps, s=0.008, cap=0.999):
        super().__init__()
        f = torch.cos(
            (torch.arange(timesteps + 1, dtype=torch.float64) / timesteps + s) / (1 + s) * math.pi / 2
        ).square()
        beta = (1 - f[1:] / f[:-1]).clamp(max=cap)
        self.register_buffer("abar", torch.cumprod(1 - beta, 0).float())  # (T,)

    def add_noise(self, x0, eps, t):
        """x0, eps (B, H, A), t (B,) int64 -> x_t."""
        abar = self.abar[t][:, None, None]
        return abar.sqrt() * x0 + (1 - abar).sqrt() * eps

    def ddim(self, predict_eps, x, steps):
        """Denoise x (B, H, A) ~ N(0, 1) in `steps` deterministic DDIM steps (Song et al. 2021, eta 0) from timestep T-1; predict_eps(x_t, t) -> eps.
        The estimate of x_0 is clipped to the range of normalised actions, -1 to 1, and eps made to agree with it."""
        times = [round(v) for v in np.linspace(len(self.abar) - 1, 0, steps).tolist()]
        for t, following in zip(times, [*times[1:], None]):
            abar, then = self.abar[t], self.abar[following] if following is not None else torch.ones_like(self.abar[0])
            eps = predict_eps(x, torch.full((len(x),), t, device=x.device))
            x0 = ((x - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(-1, 1)
            eps = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
            x = then.sqrt() * x0 + (1 - then).sqrt() * eps
        return x


class DiffusionVLA(nn.Module):
    """Condition token and noisy actions -> the noise: a transformer encoder over the chunk, which gets position, diffusion time and condition added to every
    step. forward(batch) is the loss, sample(batch, noise, steps) the actions."""

    def __init__(self, vl_shape, sensor_dim, width, layers, heads, dropout, horizon, active, timesteps):
        super().__init__()
        self.condition = Condition(vl_shape, sensor_dim, width, heads, dropout)
        self.schedule = NoiseSchedule(timesteps)
        self.action_in = nn.Linear(len(ACTIONS), width)
        self.position = nn.Parameter(
            torch.randn(1, horizon, width) * 0.02
        )  # without it the expert could not tell the steps of the chunk apart
        self.time = nn.Sequential(nn.Linear(128, width), nn.SiLU(), nn.Linear(width, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.expert = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, len(ACTIONS))
        )
        self.register_buffer(
            "active", torch.as_tensor(active)
        )  # (7,) bool: dimensions that move; the others are 0 and get no noise

    def predict_noise(self, condition, x_t, t, mask=None):
        """condition (B, D), x_t (B, H, 7), t (B,) -> eps (B, H, 7) fp32; steps outside mask (B, H) are seen by no other."""
        x = self.action_in(x_t) + (self.time(sinusoid(t, 128)) + condition)[:, None] + self.position
        x = self.expert(x, src_key_padding_mask=None if mask is None else ~mask)
        return self.out(x).float() * self.active

    def forward(self, batch):
        """-> loss_sum (): sum of weight * the sample's mean squared error of the noise over its unpadded steps and moving dims, to be divided by the caller's
        global sum of weights | sample_loss (B,)."""
        return self.noise_loss(batch, batch["noise"], batch["t"])

    def noise_loss(self, batch, noise, t):
        """noise (B, K, H, 7), t (B, K): K draws of each sample, which share what is costly, the condition; a sample's loss is their mean."""
        B, K = t.shape
        each = lambda x: x.repeat_interleave(K, 0)
        noise, t, mask = noise.flatten(0, 1) * self.active, t.flatten(), each(batch["action_mask"])
        x_t = self.schedule.add_noise(each(batch["actions"]).masked_fill(~mask[..., None], 0), noise, t)
        error = (self.predict_noise(each(self.condition(batch)), x_t, t, mask) - noise).square() * self.active
        mask = mask[..., None]  # a padded step teaches nothing
        loss = error.masked_fill(~mask, 0).sum((1, 2)) / (mask.sum((1, 2)) * self.active.sum())
        loss = loss.view(B, K).mean(1)
        return dict(loss_sum=(loss * batch["weight"]).sum(), sample_loss=loss.detach())

    @torch.no_grad()
    def sample(self, batch, noise, steps):
        """noise (B, H, 7) -> normalised actions (B, H, 7); a dimension that never moves is 0."""
        condition = self.condition(batch)
        return (
            self.schedule.ddim(lambda x, t: self.predict_noise(condition, x, t), noise * self.active, steps)
            * self.active
        )


def online_features(batch, policy):
    """Collate's batch with its pictures, where it has some, turned into vl_features (B, N, V)."""
    return (
        batch
        if "vl_features" in batch
        else {k: v for k, v in batch.items() if k != "pictures"} | dict(vl_features=policy.encode(batch["pictures"]))
    )


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, cfg, stats, recipe, instructions, device, autocast=None, encoder=None, vlm=None):
        self.model, self.cfg, self.stats, self.recipe, self.instructions, self.device, self.autocast = (
            model,
            cfg,
            stats,
            recipe,
            instructions,
            device,
            autocast,
        )
        self.collate, self._encoder, self.vlm = Collate(cfg, stats), encoder, vlm

    def encode(self, pictures):
        """list of ({view: (h, w, 3) uint8 RGB}, instruction) -> (B, N, V) float32 features. Loads the VLM at the first call."""
        if self._encoder is None:
            self._encoder = vl_cache.VLEncoder.from_recipe(self.recipe, self.device, self.vlm)
        return self._encoder.encode(pictures)  # rounded as in the cache

    def predict(self, observations, noise=None):
        """list of {vl_features (N, V), or images {view: (h, w, 3) uint8 RGB} and instruction; sensor: (n, 1026) raw rows (force, A-scan) up to now, newest last,
        or None} -> (B, H, 7) float32: pose deltas in mm and degrees, 100 ms each, and the constant gripper. `noise` (B, H, 7): start of the
        sampling; default: the same draw for every observation and call, so that equal observations give equal actions."""
        observations = [dict(o) for o in observations]
        for o in observations:
            if o.get("sensor") is not None and (np.ndim(o["sensor"]) != 2 or np.shape(o["sensor"])[1] != ss.CHANNELS):
                raise ValueError(
                    f"the observation's sensor has shape {np.shape(o['sensor'])}, the policy needs (n, {ss.CHANNELS}): force, then the A-scan"
                )
            if "vl_features" not in o:
                if missing := [v for v in self.recipe["views"] if v not in o["images"]]:
                    raise ValueError(
                        f"the observation has images of {sorted(o['images'])}, the policy needs {', '.join(self.recipe['views'])}: {missing[0]} is missing"
                    )
        if images := [o for o in observations if "vl_features" not in o]:
            for o, feature in zip(images, self.encode([(o["images"], o["instruction"]) for o in images])):
                o["vl_features"] = feature
        return self.decode(self.collate.inputs(observations), noise)

    def decode(self, batch, noise=None):
        """Collate.inputs' batch -> (B, H, 7) float32 in mm and degrees."""
        if noise is None:
            noise = torch.randn(1, self.cfg.horizon, len(ACTIONS), generator=torch.Generator().manual_seed(0)).expand(
                len(batch["vl_features"]), -1, -1
            )
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            actions = self.model.sample(
                to_device(batch, self.device), torch.as_tensor(noise).to(self.device), self.cfg.ddim_steps
            )
        return self.collate.action.unnormalize(actions.float().cpu().numpy())

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per session, and per stretch of it without a gap, {name, sample: callable(t) -> observation, target (M, 7), hold (M, 7): the
        action that stands still, phase None}."""
        found = ss.find_sessions([root])
        if unknown := sorted(set(names or []) - {s.name for s in found}):
            raise ValueError(
                f"'{root}' has no session '{unknown[0]}'; it has {', '.join(s.name for s in found[:5])}, ..."
            )
        chosen = [s for s in found if names is None or s.name in names]
        cfg = dataclasses.replace(self.cfg, dataset_dir=[str(root)])
        expected = {k: v for k, v in self.recipe.items() if k not in ("model", "format_version")}
        features = Features(cfg, chosen, expected, optional=(FileNotFoundError, vl_cache.CacheMismatch))
        if not features.files:
            print(
                f"features  computed now by {self.vlm or self.recipe['model']}"
                + (f", for in the cache {features.missing.splitlines()[0]}" if features.missing else "")
            )
        dataset = SessionDataset(chosen, features, cfg)
        still = np.where(self.model.active.cpu().numpy(), 0.0, self.stats["action"]["mean"]).astype(np.float32)
        for e, (s, steps) in enumerate(zip(dataset.sessions, dataset.steps)):
            breaks = np.flatnonzero((np.diff(steps) != 1) | (np.diff(s.segment[steps]) != 0)) + 1
            parts = [p for p in np.split(np.arange(len(steps)), breaks) if len(p)]
            for n, rows in enumerate(parts):
                target = s.action[steps[rows]]
                yield dict(
                    name=s.name if len(parts) == 1 else f"{s.name}#{n + 1}",
                    sample=lambda t, e=e, rows=rows: dataset.read(e, int(rows[t])),
                    target=target,
                    hold=np.repeat(still[None], len(target), 0),
                    phase=None,
                )

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return ACTIONS


# ---- build, save, load -----------------------------------------------------------------------------------------------


def build_model(cfg, vl_shape, stats, device):
    """-> DiffusionVLA on `device`, new weights in fp32; the statistics of sensor and actions go into its buffers."""
    torch.manual_seed(cfg.seed)
    sensor_dim = cfg.sensor_dim if cfg.sensor_enabled else 0
    model = DiffusionVLA(
        vl_shape,
        sensor_dim,
        cfg.hidden_dim,
        cfg.num_layers,
        cfg.num_heads,
        cfg.dropout,
        cfg.horizon,
        moving_dims(stats),
        cfg.diffusion_timesteps,
    )
    return model.to(device)


def moving_dims(stats):
    """-> (7,) bool: what moves in the training sessions; the rest (the gripper) is left out of loss and metrics."""
    moving = [not constant for constant in stats["action"]["constant"]]
    if not any(moving):
        raise ValueError("no action dimension moves in the training sessions: there is nothing to learn")
    return moving


@torch.no_grad()
def fill_statistics(core, dataset, stats, policy, samples=512):
    """Put the mean and std of sensor rows and of VL features (over `samples` training steps, evenly spread) into the model."""
    c = core.condition
    if c.sensor is not None and stats["sensor"]:
        c.sensor_mean.copy_(torch.tensor(stats["sensor"]["mean"]))
        c.sensor_std.copy_(torch.tensor(stats["sensor"]["std"]))
    chosen = np.unique(np.linspace(0, len(dataset) - 1, samples).astype(int)).tolist()
    features = []
    for i in range(0, len(chosen), 16):
        reads = [dataset.features.read(*dataset.tick_at(k)) for k in chosen[i : i + 16]]
        features.append(
            torch.stack([r["vl_features"] for r in reads])
            if "vl_features" in reads[0]
            else policy.encode([(r["images"], r["instruction"]) for r in reads])
        )
    features = torch.cat(features).flatten(0, 1).double()  # (n, V)
    mean, std = features.mean(0), features.std(0, correction=0)
    c.vl_mean.copy_(mean)
    c.vl_std.copy_(std.clamp(min=1e-3 * (1 + mean.abs())))  # not below the rounding of fp16


def save_model(path, content, core, ema, optimizer=None):
    """Write one checkpoint file: `content` and the model's tensors (averaged weights, statistics), with `optimizer` also the weights themselves and the moments, for a resume."""
    raw = {k: v.detach().cpu() for k, v in core.state_dict().items()}
    content = content | dict(model_state_dict=raw | {k: v.cpu() for k, v in ema.average.items()})
    if optimizer is not None:
        content |= dict(
            raw_state_dict=raw, optimizer_state_dict=ckpt.training_state(core, optimizer)[1]
        )  # tensors that are the same in both are stored once
    with ckpt.atomic_path(path) as temporary:
        ckpt.save_state(temporary, content)


def read_checkpoint(path):
    """-> content of a checkpoint of this script; `path` may be the folder that holds it."""
    path = Path(path)
    if path.is_dir():
        if not (there := [path / name for name in (BEST, LATEST) if (path / name).is_file()]):
            raise FileNotFoundError(
                f"{path} has neither {BEST} nor {LATEST}; expected a checkpoint of {Path(__file__).name}"
            )
        path = there[0]
    state = ckpt.load_state(path)
    if state.get("format_version") != FORMAT or state.get("meta", {}).get("script") != Path(__file__).stem:
        raise ValueError(
            f"{path} is format {state.get('format_version')} of '{state.get('meta', {}).get('script')}', this code reads format {FORMAT} of {Path(__file__).stem}"
        )
    return state


def config_of(state):
    """The Config inside a checkpoint."""
    return Config(**state["config"] | dict(wandb=runlog.WandbConfig(**state["config"]["wandb"])))


def load_policy(path, device=None, vlm=None):
    """Open a checkpoint (a file, or checkpoint_dir: the best one in it) for inference. The VLM (`vlm`: where it is now, if not where it was) is loaded when
    the first image is seen."""
    state = read_checkpoint(path)
    cfg, device = config_of(state), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(cfg, state["vl_shape"], state["stats"], device)
    model.load_state_dict(state["model_state_dict"])
    autocast = torch.bfloat16 if device.type == "cuda" and cfg.use_bfloat16 else None
    return Policy(
        model.requires_grad_(False).eval(),
        cfg,
        state["stats"],
        state["recipe"],
        state["instructions"],
        device,
        autocast,
        vlm=vlm,
    )


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, total, cfg):
    """Factor on the learning rates at update number `step` (from 0) of `total`: linear warm-up, hold, cosine to min_lr / lr, and that beyond the end."""
    warmup, hold = int(cfg.warmup_ratio * total), int(cfg.hold_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    end, progress = cfg.min_lr / cfg.lr, min(1.0, max(0, step - warmup - hold) / max(1, total - warmup - hold))
    return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(core, cfg, fused=None):
    return torch.optim.AdamW(
        [dict(params=list(core.parameters()), base_lr=cfg.lr)],
        lr=cfg.lr,
        betas=(0.9, 0.95),
        weight_decay=cfg.weight_decay,
        fused=fused,
    )


class Ema:
    """Moving average of the trained weights, with a decay that grows as 1 - (1 + step)^-0.75 up to `decay`; `swapped` puts it into the model for a while."""

    def __init__(self, parameters, decay=0.9999, saved=None):
        self.parameters, self.decay = parameters, decay  # parameters {name: Parameter}
        self.average = (
            {k: (saved[k] if saved else p).detach().to(p.device, copy=True) for k, p in parameters.items()}
            if decay
            else {}
        )

    @torch.no_grad()
    def update(self, step):
        if self.decay:
            torch._foreach_lerp_(
                list(self.average.values()),
                [p.detach() for p in self.parameters.values()],
                1 - min(self.decay, 1 - (1 + step) ** -EMA_POWER),
            )

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


def describe(cfg, data, dataset, held_out, print0):
    """Say what was found: sessions, steps and shares per data set, features, sensor, actions and ranges."""
    weights = dataset.sample_weights(data.weights)
    print0(
        f"data      {len(data.train)} training sessions, {len(dataset)} of {sum(map(len, data.train))} steps (the others have no fresh image); "
        f"{len(data.validation)} validation sessions, {len(held_out)} steps; {', '.join(cfg.dataset_dir)}"
    )
    for name in dataset.datasets:
        mine = np.repeat([s.dataset == name for s in dataset.sessions], [len(k) for k in dataset.steps])
        print0(
            f"          {name:<30} weight {data.weights[name]:g}, {mine.sum():7d} steps, share {weights[mine].sum() / weights.sum():6.1%}, "
            f"sensor in {sum(s.has_sensor for s in dataset.sessions if s.dataset == name)} of {sum(s.dataset == name for s in dataset.sessions)} sessions"
        )
    print0(
        f"features  {data.features.about}; {cfg.vlm_reuse_count} steps share one: a VLM at {ss.ACTION_HZ / cfg.vlm_reuse_count:.2f} Hz"
    )
    if cfg.vlm_latency_ms > 1000 / ss.ACTION_HZ * cfg.vlm_reuse_count:
        print0(
            f"warning   vlm_latency_ms is {cfg.vlm_latency_ms:g}: a VLM that slow cannot look every {cfg.vlm_reuse_count} steps ({100 * cfg.vlm_reuse_count} ms). "
            f"Use --vlm-reuse-count {math.ceil(cfg.vlm_latency_ms * ss.ACTION_HZ / 1000)}, fewer than {len(data.features.views)} views, or smaller images"
        )
    print0(
        "sensor    "
        + (
            f"the newest {cfg.sensor_window_size} rows, {cfg.sensor_window_size / ss.SENSOR_HZ:.2f} s at {ss.SENSOR_HZ} Hz; "
            f"loss weight {cfg.sensor_loss_weight:g} with sensor, 1 without"
            if cfg.sensor_enabled
            else "not used"
        )
    )
    print0(
        f"action    {cfg.horizon} steps of {1000 // ss.ACTION_HZ} ms; per step:"
        + "".join(f"{f'{n} {u}'.strip():>11}" for n, u in ACTIONS)
    )
    for name in ("q01", "q99", "mean", "std"):
        print0(f"          {name:<30}" + "".join(f"{v:11.4g}" for v in data.stats["action"][name]))
    texts = instructions_of(data.train)
    print0(f"text      {len(texts)} instruction(s), e.g. {texts[0]!r}")


def instructions_of(part):
    return sorted({s.instruction for s in part})


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a cache the features stay unread, and it says so."""
    data = load_data(cfg, optional=FileNotFoundError)
    dataset, held_out = (
        SessionDataset(data.train, data.features, cfg),
        SessionDataset(data.validation, data.features, cfg),
    )
    describe(cfg, data, dataset, held_out, print)
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights(data.weights))
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(f"samples   {len(dataset)}; batch of {len(items)}, first: {items[0]['name'][0]} step {items[0]['name'][1]}")
    for key, value in Collate(cfg, data.stats)(items).items():
        if isinstance(value, torch.Tensor):
            print(
                f"          {key:<14} {str(tuple(value.shape)):<18} {str(value.dtype).removeprefix('torch.'):<8} {value.min().item():.4g} .. {value.max().item():.4g}"
            )
    if data.features.missing:
        print(f"note      the features are not there yet: {data.features.missing}")
    for view, image in items[0].get("images", {}).items():
        print(f"          {view:<14} {image.shape} {image.dtype}")
    print("check passed")


def validate(core, policy, dataset, cfg, device, rank, world, reduce):
    """-> {val/loss_epoch, val/mae_mm, val/mae_deg, the same of two baselines (no motion; the last action again), val/mae_<dim>}: the noise loss at fixed
    timesteps with noise that belongs to the step, and the error of a sampled chunk; every
    held-out step once, sums over all ranks; padded steps and dims that never move do not count."""
    active = core.active.cpu().numpy()
    sums = torch.zeros(
        2 + 3 * len(ACTIONS) + 1, dtype=torch.float64
    )  # weighted loss, weights | absolute errors of policy, zero, last | steps
    times = (
        torch.linspace(0, cfg.diffusion_timesteps - 1, min(VALIDATION_TIMES, cfg.diffusion_timesteps))
        .round()
        .long()
        .to(device)
    )
    core.eval()
    mine = range(rank, len(dataset), world)
    for i in range(0, len(mine), cfg.batch_size):
        items = [dataset[(k, k)] for k in mine[i : i + cfg.batch_size]]
        batch = online_features(policy.collate(items), policy)
        with torch.no_grad(), torch.autocast(device.type, policy.autocast, enabled=policy.autocast is not None):
            there = to_device(batch, device)
            out = core.noise_loss(
                there, there["noise"][:, :1].expand(-1, len(times), -1, -1), times.expand(len(items), -1)
            )
        target, real = np.stack([item["actions"] for item in items]), np.stack([item["action_mask"] for item in items])
        still = np.where(active, 0.0, target)
        last = np.stack([item["previous"] for item in items])[:, None]
        errors = [np.abs(guess - target)[real].sum(0) for guess in (policy.decode(batch), still, last)]
        sums += torch.tensor(
            [out["loss_sum"].item(), batch["weight"].sum().item(), *np.concatenate(errors).tolist(), float(real.sum())],
            dtype=torch.float64,
        )
    core.train()
    loss, weight, *errors, steps = reduce(sums).tolist()
    errors, values = np.reshape(errors, (3, -1)) / steps, {"val/loss_epoch": loss / weight}
    for unit in ("mm", "deg"):
        dims = [d for d, (_, u) in enumerate(ACTIONS) if u == unit and active[d]]
        values |= {
            f"val/mae_{unit}{who}": float(errors[row, dims].mean())
            for row, who in enumerate(("", "_zero", "_last"))
            if dims
        }
    return values | {f"val/mae_{name}": float(errors[0, d]) for d, (name, _) in enumerate(ACTIONS) if active[d]}


# without these the moments or the order of the samples would belong to another run
FIXED = (
    "seed",
    "dataset_weight",
    "sensor_enabled",
    "sensor_window_size",
    "vlm_reuse_count",
    "vlm_latency_ms",
    "hidden_dim",
    "sensor_dim",
    "num_layers",
    "num_heads",
    "horizon",
    "diffusion_timesteps",
    "noise_draws",
    "ema_decay",
)


def check_resume(cfg, state, path, data):
    """Refuse a resume that would silently be another run -> list of "key then -> now" of the other changed keys."""
    if state["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"--resume {path}: the training sessions or their features changed since then (added, removed, preprocessed again, another split or cache), so this would not "
            "be the same run. Put them back, or start a new run in another --checkpoint-dir"
        )
    if "optimizer_state_dict" not in state:
        raise ValueError(f"--resume {path} holds weights only, no optimizer: continue from {LATEST} beside it")
    old, new = state["config"], dataclasses.asdict(cfg)
    if wrong := [f"{k} {old.get(k)}, now {new[k]}" for k in FIXED if old.get(k) != new[k]]:
        raise ValueError(
            f"--resume {path} was trained with {'; '.join(wrong)}. Set it back, or start a new run in another --checkpoint-dir"
        )
    return [
        f"{k} {old.get(k)} -> {v}"
        for k, v in new.items()
        if old.get(k) != v and k not in ("resume", "checkpoint_dir", "check")
    ]


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are made
    cuda = torch.cuda.is_available()
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo"
        )  # counts and flags go over gloo: the GPU need not be waited for
    autocast = torch.bfloat16 if cuda and cfg.use_bfloat16 else None
    print0 = print if rank == 0 else lambda *_: None
    folder = Path(cfg.checkpoint_dir)
    out = folder / "diffusion_stage1"  # logs
    path = folder / LATEST if cfg.resume == "auto" else Path(cfg.resume) if cfg.resume else None
    if cfg.resume == "auto" and not path.is_file():
        print0(f"resume    auto: no {path}, starting a new run")
        path = None
    state = read_checkpoint(path) if path else None
    if state is None and (there := [folder / name for name in (LATEST, BEST) if (folder / name).exists()]):
        raise FileExistsError(
            f"{there[0]} already exists. Continue it with --resume auto, or choose another --checkpoint-dir"
        )
    data = load_data(cfg, rank, saved=state)
    changed = check_resume(cfg, state, path, data) if state else []
    if world > 1:
        dist.barrier()  # all ranks have looked before rank 0 writes
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(folder)

    def reduce(tensor):
        """Sum over the ranks, in float64."""
        if world > 1:
            dist.all_reduce(tensor := tensor.double())
        return tensor

    # ---- data
    dataset, held_out = (
        SessionDataset(data.train, data.features, cfg),
        SessionDataset(data.validation, data.features, cfg),
    )
    describe(cfg, data, dataset, held_out, print0)
    accumulation, global_batch = cfg.grad_accum_steps, cfg.batch_size * world * cfg.grad_accum_steps
    per_epoch = -(-len(dataset) // global_batch)
    total = cfg.max_steps or cfg.epochs * per_epoch
    begin = dict(step=0, position=0, best_val_loss=None, best_step=None, epoch_sums=[0.0, 0.0])
    start, position, best, best_step, epoch_sums = ((state or begin)[k] for k in begin)
    if start >= total:
        print0(
            f"nothing to do: {path} is at step {start} of {total}. Raise --epochs (now {cfg.epochs}) or --max-steps to train on"
        )
        return
    order = GlobalOrder(len(dataset), cfg.seed, dataset.sample_weights(data.weights))
    batches = RankBatches(order, cfg.batch_size, accumulation, rank, world, position, total - start)
    collate = Collate(cfg, data.stats)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=cfg.num_workers,
        pin_memory=cuda,
        prefetch_factor=4 if cfg.num_workers else None,
        worker_init_fn=ckpt.ignore_stop_signals,
    )

    # ---- model, optimizer
    encoder = (
        None
        if data.features.files
        else vl_cache.VLEncoder(
            cfg.model, data.features.views, cfg.image_resize_height, cfg.image_resize_width, device=device
        )
    )
    vl_shape, recipe = (
        (data.features.shape, data.features.recipe)
        if encoder is None
        else ((encoder.tokens, encoder.width), encoder.recipe())
    )
    core = build_model(cfg, vl_shape, data.stats, device)
    policy = Policy(core, cfg, data.stats, recipe, instructions_of(data.train), device, autocast, encoder)
    optimizer = make_optimizer(core, cfg, cuda or None)
    if state:
        core.load_state_dict(state["raw_state_dict"])
        names = {n for n, _ in core.named_parameters()}
        ckpt.restore_training_state(
            core,
            optimizer,
            dict(
                trained={k: v for k, v in state["raw_state_dict"].items() if k in names},
                moments=state["optimizer_state_dict"],
            ),
        )
        print0("; ".join([f"resume    {path}, step {start} of {total}", *changed]))
        ema = Ema(dict(core.named_parameters()), cfg.ema_decay, state["model_state_dict"])
        state = None
    else:
        fill_statistics(core, dataset, data.stats, policy)
        ema = Ema(dict(core.named_parameters()), cfg.ema_decay)
    model = (
        nn.parallel.DistributedDataParallel(core, device_ids=[local] if cuda else None, gradient_as_bucket_view=True)
        if world > 1
        else core
    )
    count = sum(p.numel() for p in core.parameters())
    size = 4 * (4 if cfg.ema_decay else 3) * count  # fp32 weights, their average, and two moments
    print0(
        f"model     {count:,} parameters, all trainable (the VLM is {'frozen' if cfg.cache == 'online' else 'not loaded'}); "
        f"{'bf16 autocast' if autocast else 'fp32'}; {world} x {device.type}"
    )
    print0(
        f"batch     {cfg.batch_size} x {world} ranks x {accumulation} accumulation = {global_batch} samples per step; {len(dataset)} samples = {per_epoch} steps per epoch"
    )
    print0(
        f"steps     {start} -> {total} ({total / per_epoch:.1f} epochs); lr {cfg.lr:.2e}; {LATEST} is about {size / 1e9:.2g} GB, "
        f"{BEST} {4 * count / 1e9:.2g} GB, in {folder}"
    )
    if rank == 0:
        save_config(cfg, out / "config.yaml")
        shutil.copy(__file__, out / Path(__file__).name)
        (out / "validation_episodes.txt").write_text("".join(s.name + "\n" for s in data.validation))
    log = runlog.RunLog(out, total, start, rank, "QwenVLA-Diffusion", cfg.wandb, dataclasses.asdict(cfg))
    stop = ckpt.StopSignal()

    def save(name, step, resumable=False):
        """Write one of the two files on rank 0; True if it is in place. A full disk costs the new file, never an old one."""
        ok = True
        if rank == 0:
            content = dict(
                format_version=FORMAT,
                meta=dict(script=Path(__file__).stem, validation=[s.name for s in data.validation]),
                step=step,
                epoch=step // per_epoch,
                position=position,
                best_val_loss=best,
                best_step=best_step,
                epoch_sums=epoch_sums,
                config=dataclasses.asdict(cfg),
                stats=data.stats,
                recipe=recipe,
                vl_shape=list(vl_shape),
                instructions=policy.instructions,
                fingerprint=data.fingerprint,
            )
            try:
                ckpt.require_space(folder, int(1.1 * size) if resumable else int(4.4 * count))
                save_model(folder / name, content, core, ema, optimizer if resumable else None)
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
    )  # per step (loss, gradient norm, reuse counter, samples with sensor, timestep) since the last log line
    while step < total:
        factor = lr_at(step, total, cfg)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["base_lr"]
        t_wait = time.perf_counter()
        try:
            micro = [next(batch_iterator) for _ in range(accumulation)]
        except RuntimeError as error:  # torch's word for a worker that was killed, mostly for memory
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"DataLoader worker crashed (num_workers is {cfg.num_workers}): {error}. Lower it, or load in the main process: --num_workers 0"
            ) from error
        wait += time.perf_counter() - t_wait
        # sum of weights of the whole optimizer step over all ranks: what the loss is divided by; what is logged; and whether any rank was told to stop
        weights, reuse, with_sensor, times, told_to_stop = reduce(
            torch.tensor(
                [
                    *(float(sum(b[k].sum() for b in micro)) for k in ("weight", "reuse_step", "has_sensor", "t")),
                    float(stop.received is not None),
                ],
                dtype=torch.float64,
            )
        ).tolist()
        total_loss, sample_losses = torch.zeros((), dtype=torch.float64, device=device), []
        for m, batch in enumerate(micro):
            torch.manual_seed(torch_seed_at(cfg.seed, position + (m * world + rank) * cfg.batch_size, "dropout"))
            batch = to_device(online_features(batch, policy), device)
            with contextlib.nullcontext() if m == accumulation - 1 or world == 1 else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    result = model(batch)
                loss = result["loss_sum"] / weights
                (loss * world).backward()  # ranks are averaged, so times world
            sample_losses.append(result["sample_loss"])
            total_loss += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(core.parameters(), cfg.grad_clip or math.inf)
        loss, norm = torch.stack(
            [reduce(total_loss), norm.detach().double()]
        ).tolist()  # the one wait for the GPU in a step
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            ema.update(step)
            window.append((loss, norm, reuse / global_batch, with_sensor, times / global_batch / cfg.noise_draws))
            epoch_sums = [epoch_sums[0] + loss, epoch_sums[1] + 1]
            skipped_in_row = 0
        else:  # the same on every rank: losses and gradients are averaged
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            runlog.report_nonfinite(log, step + 1, [b["names"] for b in micro], sample_losses, skipped_in_row)
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + global_batch

        if step % cfg.log_steps == 0 or step == total:
            elapsed = time.perf_counter() - t_log
            mean = np.mean(window, axis=0).tolist() if window else [math.nan] * 5
            speed, waited = (step - logged_at) * global_batch / elapsed, wait / elapsed
            values = {
                "train/loss_step": mean[0],
                "train/noise_loss": mean[0],
                "train/diffusion_t": mean[4],
                "train/lr": factor * cfg.lr,
                "train/grad_norm": mean[1],
                "train/vl_reuse_counter": mean[2],
                "train/sensor_samples": mean[3],
                "train/nonsensor_samples": global_batch - mean[3],
                "train/samples_per_s": speed,
                "train/data_wait": waited,
                "train/memory_gb": runlog.memory_gb(),
                "train/skipped_steps": skipped,
            }
            log.log(
                step,
                {k: v for k, v in values.items() if math.isfinite(v)},
                f"step {step:>7}/{total} | loss {mean[0]:.4f} | grad {mean[1]:.2f} | lr {factor * cfg.lr:.2e} | {speed:.1f} samples/s | "
                f"wait {waited:.1%} | {values['train/memory_gb']:.1f} GB",
            )
            log.step(step, mean[0], factor * cfg.lr, speed, waited)
            window, wait, t_log, logged_at = [], 0.0, time.perf_counter(), step
        else:
            log.step(step)
        t_pause, saved = time.perf_counter(), True  # validation and saving are not training time
        if epoch_end := step == total or step % (per_epoch * cfg.eval_epochs) == 0:
            if epoch_sums[1]:
                log.log(step, {"train/loss_epoch": epoch_sums[0] / epoch_sums[1]})
            epoch_sums = [0.0, 0.0]
            if data.validation:
                with ema.swapped():
                    values = validate(core, policy, held_out, cfg, device, rank, world, reduce)
                if math.isfinite(values["val/loss_epoch"]) and (best is None or values["val/loss_epoch"] < best):
                    best, best_step = values["val/loss_epoch"], step
                    save(BEST, step)
                text = " | ".join(
                    f"{unit} {values[f'val/mae_{unit}']:.4g} (no motion {values[f'val/mae_{unit}_zero']:.4g}, last action {values[f'val/mae_{unit}_last']:.4g})"
                    for unit in ("mm", "deg")
                    if f"val/mae_{unit}" in values
                )
                log.log(
                    step,
                    values,
                    f"validation {step}, epoch {step / per_epoch:.1f} | loss {values['val/loss_epoch']:.4f} | MAE {text}",
                )
        if epoch_end or told_to_stop or (cfg.save_steps and step % cfg.save_steps == 0):
            saved = save(LATEST, step, resumable=True)
            saved_at = step if saved else saved_at
        if not saved and (step == total or told_to_stop):
            raise ckpt.DiskFull(
                28,
                f"the last checkpoint could not be written; {LATEST} is of step {saved_at}. Free space and run again with --resume auto",
            )
        t_log += time.perf_counter() - t_pause
        if told_to_stop and step < total:
            log.print(
                f"stopped by signal after step {step}; saved {folder / LATEST}. Continue with the same command and --resume auto"
            )
            break

    # ---- end
    stop.restore()
    log.close()
    if rank == 0 and step == total:
        model_file = folder / (BEST if data.validation else LATEST)
        print(f"loss plot: {runlog.plot_loss(out, 'train/loss_step', 'val/loss_epoch')}")
        print(
            f"model: {model_file}"
            + (f" (step {best_step}, validation loss {best:.4f})" if best_step else "")
            + f"\nevaluate: python evaluate.py --checkpoint {model_file} --data {cfg.dataset_dir[0]}"
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
            f"CUDA out of memory ({str(error).splitlines()[0]}). Lower batch_size (now {config.batch_size}) and raise grad_accum_steps (now {config.grad_accum_steps}) in proportion"
        )
