"""Mobile VLA: Kosmos-2 + LoRA + an LSTM that turns the last frames and an instruction into the next velocities of a mobile base.

Data: episode_*.h5 of the recorder, 18 frames of a camera and (linear_x, linear_y), one frame per key press. Shapes and names ("chunck") are guide 4's.

    python train_mobile_kosmos.py --config configs/mobile_kosmos.yaml --check            # look at the data, no weights needed
    bash shells/train_mobile_kosmos.sh                                                   # one GPU; --multi-gpu --num-gpus 4 for more
    python train_mobile_kosmos.py --config configs/demo/mobile_kosmos.yaml               # on make_demo.py's output, on a CPU

Output, in output_dir: checkpoints/epoch_E-val_loss=L.ckpt (the best three; E counts from 0), checkpoints/last.ckpt (resumes), validation_episodes.txt, metrics.jsonl, loss.png.
A checkpoint holds what was trained, not the backbone: that one is opened again from its own directory or hub id, and refused if it is another.

Which action is which. W = 8 frames are observed, N = 10 velocities follow each; a sample has F = W + N = 18 frames. The LSTM answers at every observed step i:

    step i   sees images   label_offset 0: supervised with actions   label_offset 1
    0        0             0 .. 9                                     1 .. 10
    1        0 .. 1        1 .. 10                                    2 .. 11
    7        0 .. 7        7 .. 16, action 17 unused                  8 .. 17, action 0 unused

So S = F - N = 8 label steps, one per observed step. The guide writes 7: that appears when one frame more is dropped (17 frames loaded, or the last action and the first window
removed), and would leave the newest step, the only one a robot uses, without a label. The recorder sends action t and then takes image t, which shows that motion already: with
label_offset 0 the first velocity of a chunk is the present motion (and of frame 0 always "stop"), with 1 the next one. Steps and labels beyond an episode's end are masked.

Letters in shapes: B windows, W observed frames, S label steps (= W), N future steps, F = W + N, Q image tokens of a frame, L text tokens, D width of the text model.
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
import fnmatch
import gc
import hashlib
import json
import math
import re
import shutil
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import h5py
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
from common.sampler import GlobalOrder, RankBatches, torch_seed_at
from common.stats import compute_stats

FORMAT = 1  # of a .ckpt
EPOCH_FILE = r"epoch_(\d+)-val_loss=.*\.ckpt"
TAGS = (
    "</doc>",
    "<image>",
    "</image>",
    "</chunk>",
    "</line>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<grounding>",
)  # Kosmos-2's, in the order of their ids
REAL_VOCABULARY, REAL_IMAGE_IDS = 65037, [64003, 64004]  # of the published Kosmos-2: its ids of <image> and </image>
DEAD_BAND = 0.3  # of the action scale: a smaller velocity has no direction
IMAGE_SIZE = 224  # Kosmos-2's; only for --check without its config.json


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    data_dir: str = ""  # folder with the episodes, searched recursively
    episode_pattern: str = "episode_2025111*.h5"  # file names that are used
    train_split: float = 0.8  # share of the episodes that is trained on
    split: Literal["group", "chronological", "held_out_groups"] = (
        "group"  # validate on the newest of every group (scenario: name behind the date), of all, or on whole groups
    )
    instruction: str = "Navigate to the target location"  # where neither the file nor its name tells
    name_instructions: dict = field(
        default_factory=lambda: {  # word of the file name -> instruction, where the file has none
            side: f"Navigate around obstacles and reach the front of the beverage bottle on the {side}"
            for side in ("left", "right")
        }
    )
    max_text_len: int = 256  # text tokens
    colour_order: Literal["bgr", "rgb"] = "bgr"  # of the stored images; the recorder writes what OpenCV gives it
    action_scale: list[float] = field(
        default_factory=lambda: [1.15, 1.15]
    )  # m/s of linear_x, linear_y that become 1 in training; larger ones are cut
    windows: Literal["all", "one"] = (
        "all"  # a window at every frame, or one per episode at frame 0, as the guide counts
    )
    future_images: bool = False  # build fwd_rgb_chunck, fwd_hand_rgb_chunck; nothing here uses them
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    image_cache_gb: float = 1.0  # resized episodes kept in memory, per loader process
    feature_cache: str | None = (
        None  # folder for the frozen tower's image embeddings: computed once, then no image is read again
    )


@dataclass
class TrainSetupConfig:
    precision: Literal["16-mixed", "bf16-mixed", "32-true"] = "16-mixed"  # of CUDA; MPS and CPU always run 32-true
    lora_enable: bool = True  # false: only the action token and the head are trained
    lora_r: int = 32  # rank
    lora_alpha: int = 16  # scale = alpha / r
    lora_dropout: float = 0.1  # on the adapters' input
    lora_scope: Literal["text", "text_attention", "all"] = (
        "text"  # linears of the text model, its attention only, or of vision tower and projector as well
    )


@dataclass
class ActHeadConfig:
    hidden_size: int = 512  # of the LSTM
    num_layers: int = 4  # of the LSTM


@dataclass
class TrainerConfig:
    max_epochs: int = 10  # passes over the windows
    max_steps: int = 0  # stop at this optimizer step; 0: max_epochs decides
    accumulate_grad_batches: int = 8  # micro-batches per optimizer step
    gradient_clip_val: float = 1.0  # largest gradient norm; 0: no clipping
    every_n_epochs: int = 1  # validate and save
    save_top_k: int = 3  # best checkpoints by val_loss that are kept beside last.ckpt
    log_every_n_steps: int = 5  # optimizer steps


@dataclass
class Config:
    model: str = "microsoft/kosmos-2-patch14-224"  # backbone: hub id or directory
    output_dir: str = "outputs/mobile_kosmos"  # checkpoints and logs
    seed: int = 123  # of the sample order, dropout and new weights
    window_size: int = 8  # W, observed frames
    fwd_pred_next_n: int = 10  # N, predicted velocities
    label_offset: int = 0  # first label of a step: 0 the action recorded with its newest image, 1 the one after it
    batch_size: int = 1  # windows per GPU and micro-batch
    num_workers: int = 2  # loader processes per rank; 0: in the main process
    learning_rate: float = 1e-4  # AdamW
    weight_decay: float = 0.01  # decoupled
    scheduler: Literal["constant", "cosine"] = "constant"  # after the warm-up
    min_lr_scale: float = 1e-3  # share of learning_rate at which the cosine ends, with max_epochs
    warmup_epochs: float = 0.1  # linear warm-up
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    train_setup: TrainSetupConfig = field(default_factory=TrainSetupConfig)
    act_head: ActHeadConfig = field(default_factory=ActHeadConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb_project: str = "mobile_vla_finetune"  # W&B project
    wandb: runlog.WandbConfig = field(default_factory=runlog.WandbConfig)
    resume: str | None = None  # a .ckpt of the same run, or "auto" for output_dir's last.ckpt
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = {
    "resume_from_checkpoint": "resume",
    "lora_rank": "train_setup.lora_r",
    "epochs": "trainer.max_epochs",
    "lr": "learning_rate",
}


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    d, s, t = cfg.dataset, cfg.train_setup, cfg.trainer
    for key in (
        "window_size",
        "fwd_pred_next_n",
        "batch_size",
        "train_setup.lora_r",
        "act_head.hidden_size",
        "act_head.num_layers",
        "trainer.max_epochs",
        "trainer.accumulate_grad_batches",
        "trainer.every_n_epochs",
        "trainer.log_every_n_steps",
    ):
        value = cfg
        for part in key.split("."):
            value = getattr(value, part)
        if value < 1:
            raise ValueError(f"{key} is {value}: expected 1 or more")
    for wrong, message in (
        (
            not 0 < d.train_split <= 1,
            f"dataset.train_split is {d.train_split}: expected a share above 0, up to 1 (no validation)",
        ),
        (cfg.label_offset not in (0, 1), f"label_offset is {cfg.label_offset}: expected 0 or 1"),
        (
            len(d.action_scale) != 2 or min(d.action_scale) <= 0,
            f"dataset.action_scale is {d.action_scale}: expected two speeds above 0, of linear_x and linear_y",
        ),
        (
            d.feature_cache and s.lora_enable and s.lora_scope == "all",
            "dataset.feature_cache needs a frozen vision tower: train_setup.lora_scope text or text_attention, not all",
        ),
        (
            d.feature_cache and d.future_images,
            "dataset.future_images needs the images, dataset.feature_cache replaces them: leave one out",
        ),
        (not 0 <= s.lora_dropout < 1, f"train_setup.lora_dropout is {s.lora_dropout}: expected 0 to below 1"),
        (
            min(t.save_top_k, t.max_steps, cfg.num_workers) < 0,
            f"trainer.save_top_k {t.save_top_k}, trainer.max_steps {t.max_steps}, num_workers {cfg.num_workers}: expected 0 or more",
        ),
    ):
        if wrong:
            raise ValueError(message)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """Everything of one file but its images."""

    path: str
    name: str  # path relative to data_dir
    num_frames: int  # T
    actions: np.ndarray  # (T, 2) float32 m/s: linear_x forward, linear_y to the left
    instruction: str
    source: str  # of the instruction: "file", "name" or "config"
    group: str  # scenario: the file name behind the date, e.g. 1box_hori_left_core_medium
    turns: bool  # angular_z, which is not learned, is somewhere not 0

    @property
    def side(self):
        """left | right | other, from the instruction: how metrics are split."""
        words = set(re.findall(r"[a-z]+", self.instruction.lower()))
        return (
            "left"
            if "left" in words and "right" not in words
            else "right"
            if "right" in words and "left" not in words
            else "other"
        )


@dataclass
class DataSpec:
    """What a prediction means; in every checkpoint, compared when a run is resumed."""

    window_size: int
    fwd_pred_next_n: int
    label_offset: int
    image_size: int  # pixels of the square that the backbone sees
    colour_order: str  # of recordings; predict takes RGB
    action_scale: list  # m/s per unit of the network
    instruction: str  # the three below: how a recording without text gets one
    name_instructions: dict
    max_text_len: int


@dataclass
class Data:
    episodes: list  # all usable ones, sorted by path
    train: list  # indices into episodes
    validation: list  # indices into episodes
    excluded: list  # messages of files left out by skip_bad_episodes
    spec: DataSpec
    stats: dict  # of the training actions, m/s
    fingerprint: str  # changes when the training windows or their order would


def read_episode(path, root, instruction, name_instructions):
    """Read and check one file, without its images -> Episode. BadEpisode says what is missing or misshapen."""
    try:
        with h5py.File(path, "r", locking=False) as f:  # NFS often refuses locks, and nothing here writes
            if missing := [k for k in ("images", "actions") if k not in f]:
                raise ep.BadEpisode(
                    f"{path}: no dataset '{missing[0]}'; the file has {sorted(f)}, expected images (T, H, W, 3) and actions (T, 3)"
                )
            images, actions, text = f["images"], np.asarray(f["actions"][:], np.float32), ep.read_instruction(f, path)
            if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
                raise ep.BadEpisode(
                    f"{path}: dataset 'images' is {images.dtype} {images.shape}; expected uint8 (T, H, W, 3)"
                )
            if actions.ndim != 2 or actions.shape[1] < 2 or len(actions) != len(images) or not len(actions):
                raise ep.BadEpisode(
                    f"{path}: dataset 'actions' has shape {actions.shape}; expected ({len(images)}, 3): linear_x, linear_y, angular_z of every image"
                )
            if len(bad := np.flatnonzero(~np.isfinite(actions).all(1))):
                raise ep.BadEpisode(
                    f"{path}: dataset 'actions' frame {bad[0]} is not finite: {actions[bad[0]].tolist()} ({len(bad)} such frames)"
                )
    except ep.BadEpisode:
        raise
    except (
        OSError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
    ) as error:  # what h5py raises for damage, or a group where a dataset should be
        raise ep.BadEpisode(
            f"{path}: not a readable HDF5 file ({error}). It may be truncated: re-copy it, or pass --skip_bad_episodes to leave it out"
        ) from error
    stem = Path(path).stem
    group = re.fullmatch(r"episode_\d{8}_\d{6}_?(.*)", stem)
    by_name = next((t for word, t in name_instructions.items() if word in stem.split("_")), None)
    source = "file" if text else "name" if by_name else "config"
    return Episode(
        str(path),
        os.path.relpath(path, root),
        len(actions),
        actions[:, :2],
        text or by_name or instruction,
        source,
        group[1] if group else "",
        bool(actions[:, 2:].any()),
    )


def load_episodes(d, progress=iter):
    """Every file of dataset.episode_pattern below data_dir -> (episodes sorted by path, messages of excluded files)."""
    found, usable, excluded = ep.find_episodes(d.data_dir), [], []
    paths = [p for p in found if fnmatch.fnmatch(os.path.basename(p), d.episode_pattern)]
    if not paths:
        raise FileNotFoundError(
            f"No HDF5 files found: none of the {len(found)} files under '{d.data_dir}' matches dataset.episode_pattern '{d.episode_pattern}'; the first is "
            f"{os.path.basename(found[0])}. Try --episode_pattern 'episode_*.h5'"
        )
    for path in progress(paths):
        try:
            usable.append(read_episode(path, d.data_dir, d.instruction, d.name_instructions))
        except ep.BadEpisode as error:
            if not d.skip_bad_episodes:
                raise ep.BadEpisode(f"{error} (--skip_bad_episodes leaves such files out and lists them)") from error
            excluded.append(str(error))
    if not usable:
        raise ep.BadEpisode(
            f"none of the {len(excluded)} files under '{d.data_dir}' is usable; the first: {excluded[0]}"
        )
    return usable, excluded


def split_episodes(episodes, train_split, how):
    """-> (training, validation): sorted indices. n - int(n * train_split) episodes are held out (231 -> 184 and 47), their names and thereby their dates deciding which."""
    n = len(episodes)
    held, groups = n - int(n * train_split + 1e-9), {}
    for i, e in enumerate(episodes):
        groups.setdefault(e.group, []).append(i)
    validation = []
    if how == "chronological":
        validation = list(range(n - held, n))
    elif how == "group":  # every group in its share: the running total never drifts from it by one episode
        seen = 0
        for _, members in sorted(groups.items()):
            take = (seen + len(members)) * held // n - seen * held // n
            seen, validation = seen + len(members), validation + members[len(members) - take :]
    else:
        if len(groups) < 2 and held:
            raise ValueError(
                f"dataset.split is held_out_groups, but all {n} episodes are of one group ('{episodes[0].group}'): use --dataset.split group"
            )
        for _, members in sorted(groups.items(), reverse=True):
            if len(validation) < held and len(validation) + len(members) < n:
                validation += members
    if held and not validation or len(validation) == n:
        raise ValueError(
            f"dataset.train_split {train_split} of {n} episode(s) leaves {n - len(validation)} to train on and {len(validation)} to validate on: record more, or set it to 1.0"
        )
    return sorted(set(range(n)) - set(validation)), sorted(validation)


def load_data(cfg, image_size, rank=0):
    """Find, read, split and describe the episodes."""
    d = cfg.dataset
    episodes, excluded = load_episodes(
        d, iter if rank else lambda paths: tqdm(paths, desc="reading episodes", unit="file", disable=None, leave=False)
    )
    train, validation = split_episodes(episodes, d.train_split, d.split)
    spec = DataSpec(
        cfg.window_size,
        cfg.fwd_pred_next_n,
        cfg.label_offset,
        image_size,
        d.colour_order,
        [float(v) for v in d.action_scale],
        d.instruction,
        d.name_instructions,
        d.max_text_len,
    )
    about = [
        [
            episodes[i].name,
            episodes[i].num_frames,
            episodes[i].instruction,
            hashlib.sha256(episodes[i].actions.tobytes()).hexdigest(),
        ]
        for i in train
    ] + [d.windows]
    return Data(
        episodes,
        train,
        validation,
        excluded,
        spec,
        compute_stats(dict(action=[episodes[i].actions for i in train])),
        hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16],
    )


def resize(image, side):
    """(h, w, 3) uint8 RGB -> (side, side, 3): bicubic, the aspect is not kept. The one image preprocessing of training and predict; /255, mean and std follow on the device."""
    return (
        image
        if image.shape[:2] == (side, side)
        else np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.BICUBIC))
    )


def read_images(episode, spec):
    """All images of a file -> (T, 3, side, side) uint8 RGB."""
    with h5py.File(episode.path, "r", locking=False) as f:
        images = f["images"]
        try:
            stored = images[:]  # at once: a compressed chunk spans frames
        except (OSError, RuntimeError):
            stored = []
            for t in range(episode.num_frames):  # one by one, to name the frame
                try:
                    stored.append(images[t])
                except (OSError, RuntimeError) as error:
                    raise ep.BadEpisode(
                        f"{episode.path}: dataset 'images' frame {t} cannot be read ({error}). Re-copy the file, or move it away and start again"
                    ) from error
    order = slice(None, None, -1) if spec.colour_order == "bgr" else slice(None)
    return np.stack([resize(image[..., order], spec.image_size).transpose(2, 0, 1) for image in stored])


class Frames:
    """Resized episodes, the last used ones kept up to `gigabytes` per process."""

    def __init__(self, spec, gigabytes):
        self.spec, self.limit, self.kept = spec, gigabytes * 1e9, OrderedDict()

    def of(self, episode):
        """-> (T, 3, side, side) uint8 RGB"""
        if episode.path not in self.kept:
            self.kept[episode.path] = read_images(episode, self.spec)
            while len(self.kept) > 1 and sum(a.nbytes for a in self.kept.values()) > self.limit:
                self.kept.popitem(last=False)
        self.kept.move_to_end(episode.path)
        return self.kept[episode.path]

    def __getstate__(self):
        return self.__dict__ | {"kept": OrderedDict()}


def scale_actions(actions, spec):
    """m/s -> (..., 2) float32 in [-1, 1], the network's unit; unscale_actions is the way back."""
    return np.clip(actions / np.asarray(spec.action_scale, np.float32), -1, 1).astype(np.float32)


def unscale_actions(actions, spec):
    return np.asarray(actions, np.float32) * np.asarray(spec.action_scale, np.float32)


class MobileVLAH5Dataset(Dataset):
    """One item per window of F = W + N frames. Item (position, i); keys of the guide, F = 18:

    rgb, hand_rgb (F, 3, side, side) uint8, the second all 0 | actions (F, 2) float32 in [-1, 1] | action_mask, image_mask, attention_mask (F,) bool, False beyond the episode's end, where
    the last frame is repeated | text (256,) int64, text_mask (256,) bool | lang, raw_text str | data_source "mobile_vla_action" | name (episode, frame).
    With a feature cache rgb and hand_rgb are left out and features (W, Q, D) is there.
    """

    def __init__(self, data, which, cfg, prompt=None, cache=None):
        self.spec, self.episodes, self.prompt, self.cache = data.spec, [data.episodes[i] for i in which], prompt, cache
        self.frames, self.future_images = Frames(data.spec, cfg.dataset.image_cache_gb), cfg.dataset.future_images
        # a window needs a label at its first step, so with label_offset 1 the last frame starts none
        self.windows = [
            (e, s)
            for e, episode in enumerate(self.episodes)
            for s in range(episode.num_frames - data.spec.label_offset if cfg.dataset.windows == "all" else 1)
            if s + data.spec.label_offset < episode.num_frames
        ]

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, key):
        e, start = self.windows[key[1]]
        episode, W, total = self.episodes[e], self.spec.window_size, self.spec.window_size + self.spec.fwd_pred_next_n
        index = np.minimum(np.arange(start, start + total), episode.num_frames - 1)
        mask = torch.from_numpy(np.arange(start, start + total) < episode.num_frames)
        text, text_mask = self.prompt.tokens(episode.instruction) if self.prompt else (None, None)
        item = dict(
            actions=torch.from_numpy(scale_actions(episode.actions[index], self.spec)),
            action_mask=mask,
            image_mask=mask.clone(),
            attention_mask=mask.clone(),
            text=text,
            text_mask=text_mask,
            lang=episode.instruction,
            raw_text=episode.instruction,
            data_source="mobile_vla_action",
            name=(episode.name, start),
        )
        if self.cache is not None:
            return item | dict(features=self.cache.read(episode)[index[:W]])
        rgb = torch.from_numpy(self.frames.of(episode)[index])
        return item | dict(rgb=rgb, hand_rgb=torch.zeros(1, dtype=torch.uint8).expand(rgb.shape))

    def collater(self, samples):
        return collater(samples, self.spec, self.future_images)


def collater(samples, spec, future_images=False):
    """List of items -> batch, keys of the guide, B samples:

    rgb, hand_rgb (B, W, 3, side, side) uint8 | action (B, F-1, 2) float32 in [-1, 1], the last one dropped | text (B, 256) int64, text_mask (B, 256) bool |
    fwd_rgb_chunck, fwd_hand_rgb_chunck (B, S, N, 3, side, side), [i, j] = image i+1+j, None unless asked for | fwd_mask (B, S, N) bool, of these images |
    action_chunck (B, S, N, 2), [i, j] = action i+j+label_offset | chunck_mask (B, S, N) bool, of these actions | raw_text list of str | data_source str |
    attention_mask (B, W) bool: which frames exist | names. S = W: one label step per observed step. With a feature cache rgb is (B, W, Q, D), hand_rgb None.
    """
    W, N, offset = spec.window_size, spec.fwd_pred_next_n, spec.label_offset
    stack = lambda key: torch.stack([s[key] for s in samples])
    chunks = lambda x: x.unfold(1, N, 1).movedim(-1, 2)  # (B, n, ...) -> (B, n-N+1, N, ...)
    actions, action_mask, image_mask = stack("actions"), stack("action_mask"), stack("image_mask")
    last = actions.shape[1] - 1 + offset  # offset 0 drops the last action, 1 the first
    action_chunck, chunck_mask, fwd_mask = (
        chunks(actions[:, offset:last]),
        chunks(action_mask[:, offset:last]),
        chunks(image_mask)[:, 1:],
    )
    assert action_chunck.shape[1:] == (W, N, 2) and fwd_mask.shape[1:] == (W, N), (
        f"{tuple(action_chunck.shape)} label steps for {W} observed ones"
    )
    batch = dict(
        action=actions[:, :-1],
        text=stack("text") if samples[0]["text"] is not None else None,
        text_mask=stack("text_mask") if samples[0]["text"] is not None else None,
        fwd_rgb_chunck=None,
        fwd_hand_rgb_chunck=None,
        fwd_mask=fwd_mask,
        action_chunck=action_chunck,
        chunck_mask=chunck_mask,
        raw_text=[s["raw_text"] for s in samples],
        data_source=samples[0]["data_source"],
        attention_mask=stack("attention_mask")[:, :W],
        names=[s["name"] for s in samples],
    )
    if "features" in samples[0]:
        return dict(rgb=stack("features"), hand_rgb=None) | batch
    rgb, empty = stack("rgb"), torch.zeros(1, dtype=torch.uint8)
    if future_images:
        batch["fwd_rgb_chunck"] = chunks(rgb)[:, 1:]
        batch["fwd_hand_rgb_chunck"] = empty.expand(batch["fwd_rgb_chunck"].shape)
    return dict(rgb=rgb[:, :W], hand_rgb=empty.expand(rgb[:, :W].shape)) | batch


def _process_batch(batch, device):
    """Batch -> the guide's 19-tuple on `device`. language and text_mask are cut to the longest text of the batch; velocity is action's first W rows."""
    to = lambda x: None if x is None else x.to(device, non_blocking=True)
    W, longest = batch["attention_mask"].shape[1], int(batch["text_mask"].sum(1).max())
    return (
        to(batch["rgb"]),
        to(batch["hand_rgb"]),
        to(batch["attention_mask"]),
        to(batch["text"][:, :longest]),
        to(batch["text_mask"][:, :longest]),
        to(batch["fwd_rgb_chunck"]),
        to(batch["fwd_hand_rgb_chunck"]),
        to(batch["action"][:, :W]),
        None,  # velocity (B, W, 2), gripper_action
        to(batch["action_chunck"]),
        None,  # velocity_chunck (B, S, N, 2), gripper_action_chunck
        to(batch["chunck_mask"]),
        to(batch["fwd_mask"]),
        None,
        None,
        None,  # instr_and_action_ids, _labels, _mask: no discrete actions
        batch["raw_text"],
        None,
        batch["data_source"],
    )  # rel_state: the base has none


class Prompt:
    """Instruction -> <s> <grounding> text </s>; the model puts the image in front of <grounding>, as Kosmos-2 was trained."""

    def __init__(self, tokenizer, max_text_len):
        from tokenizers import AddedToken

        tokenizer.add_tokens(
            [AddedToken(t, lstrip=True, rstrip=False, normalized=False) for t in TAGS]
        )  # nothing happens where it has them
        self.tokenizer, self.max_text_len, self._known = tokenizer, max_text_len, {}
        self.image_ids = tokenizer.convert_tokens_to_ids(["<image>", "</image>"])

    def tokens(self, instruction):
        """-> (ids (max_text_len,) int64, mask (max_text_len,) bool), padding at the end."""
        if instruction not in self._known:
            ids = self.tokenizer(f"<grounding>{instruction}")["input_ids"]
            assert ids[0] == self.tokenizer.bos_token_id, (
                f"the tokenizer starts '{instruction}' with id {ids[0]}, not with <s>"
            )
            if len(ids) > self.max_text_len:
                raise ValueError(
                    f"the instruction '{instruction[:60]}...' has {len(ids)} tokens, dataset.max_text_len is {self.max_text_len}: shorten it, or raise the key"
                )
            text = torch.full((self.max_text_len,), self.tokenizer.pad_token_id)
            text[: len(ids)] = torch.tensor(ids)
            self._known[instruction] = text, torch.arange(self.max_text_len) < len(ids)
        return self._known[instruction]


# ---- model -----------------------------------------------------------------------------------------------------------


class LoraLinear(nn.Linear):
    """Linear with a low-rank addition: y = W x + b + scale B A dropout(x)."""

    def __init__(self, base, rank, alpha, dropout):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias, self.scale, self.dropout = base.weight, base.bias, alpha / rank, dropout
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=math.sqrt(5)))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        added = (
            F.linear(
                F.linear(F.dropout(x, self.dropout, self.training).to(self.lora_A.dtype), self.lora_A), self.lora_B
            )
            * self.scale
        )
        return F.linear(x, self.weight, self.bias) + added


LORA_SCOPES = dict(
    text_attention=r"text_model\..*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    text=r"text_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    all=r"(text_model|vision_model|image_to_text_projection)\..*?(q_proj|k_proj|v_proj|out_proj|fc1|fc2|dense)",
)


def add_lora(vlm, scope, rank, alpha, dropout):
    """Replace the linears of `scope` (a key of LORA_SCOPES) in place -> their names."""
    names = [n for n, m in vlm.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(LORA_SCOPES[scope], n)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(vlm.get_submodule(parent), leaf, LoraLinear(vlm.get_submodule(name), rank, alpha, dropout))
    return names


class MobileVLALSTMDecoder(nn.Module):
    """Action-token states over time -> velocities in (-1, 1). One direction only: step i knows frames 0..i."""

    def __init__(self, in_features, hidden_size, num_layers, window_size, fwd_pred_next_n, action_dim=2):
        super().__init__()
        self.window_size, self.fwd_pred_next_n, self.action_dim = window_size, fwd_pred_next_n, action_dim
        self.rnn = nn.LSTM(in_features, hidden_size, num_layers, batch_first=True)
        sizes = (hidden_size, 1024, 512, 256, fwd_pred_next_n * action_dim)
        layers = [nn.Linear(i, o) for i, o in zip(sizes, sizes[1:])]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.mlp = nn.Sequential(*[m for layer in layers for m in (layer, nn.ReLU())][:-1], nn.Tanh())
        self.reset()

    def reset(self):
        """Forget the frames that were streamed."""
        self.history_memory, self.hidden_state = [], None

    def forward(self, tok_seq, h_0=None, stream=False):
        """tok_seq (B, S, latent, D) or (B, S, latent * D) -> (velocities (B, S, N, 2), None: no gripper). `stream`: one new step, S = 1, of the frames since reset(). Up to W frames
        the LSTM's state is carried on; from then on it sees the last W of them from a fresh state, as every training window does."""
        x = tok_seq.flatten(2)
        if not stream:
            x, _ = self.rnn(x, h_0)
        else:
            assert x.shape[1] == 1, f"streaming takes one step at a time, got {x.shape[1]}"
            self.history_memory = [*self.history_memory, x][-self.window_size - 1 :]
            if len(self.history_memory) <= self.window_size:
                x, self.hidden_state = self.rnn(x, self.hidden_state)
            else:
                x = self.rnn(torch.cat(self.history_memory[1:], dim=1))[0][:, -1:]
        return self.mlp(x).unflatten(-1, (self.fwd_pred_next_n, self.action_dim)), None

    def loss(self, pred_action, labels, attention_mask, count=None):
        """Huber (delta 1) of (velocities, None) against (velocity_chunck, None) where attention_mask (B, S, N) is True. Mean over these elements, or their sum / `count`: an optimizer step
        of several micro-batches and ranks divides by its own total. 0 where nothing is left."""
        error = F.huber_loss(pred_action[0].float(), labels[0], reduction="none") * attention_mask[..., None]
        return dict(
            loss_velocity=error.sum() / (count or (attention_mask.sum() * self.action_dim).clamp(min=1)),
            loss_gripper=None,
            acc_gripper=None,
        )


class MobileVLA(nn.Module):
    """Kosmos-2 per frame, the LSTM head over frames. Names and order of arguments are those of the guide's BaseRoboVLM.forward_continuous."""

    def __init__(self, vlm, image_ids, mean, std, act_head, window_size, fwd_pred_next_n):
        super().__init__()
        width = vlm.config.text_config.embed_dim
        self.backbone, self.queries = vlm, vlm.config.latent_query_num
        self.action_token = nn.Parameter(torch.randn(width) * 0.02)
        self.act_head = MobileVLALSTMDecoder(
            width, act_head.hidden_size, act_head.num_layers, window_size, fwd_pred_next_n
        )
        for name, value in (
            ("image_ids", torch.tensor(image_ids)),
            ("mean", torch.tensor(mean)),
            ("std", torch.tensor(std)),
        ):
            self.register_buffer(name, value, persistent=False)
        self.vision_trains = any(
            isinstance(m, LoraLinear)
            for part in (vlm.vision_model, vlm.image_to_text_projection)
            for m in part.modules()
        )

    def train(self, mode=True):
        """The backbone is frozen: its own dropout stays off, the adapters' follows `mode`."""
        super().train(mode)
        self.backbone.eval()
        for module in self.backbone.modules():
            if isinstance(module, LoraLinear):
                module.training = mode
        return self

    def image_embeds(self, rgb):
        """(n, 3, side, side) uint8 RGB -> (n, Q, D), once per frame."""
        with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
            pixels = (rgb.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
            return self.backbone.get_image_features(
                pixels.to(self.backbone.vision_model.model.embeddings.patch_embedding.weight.dtype), return_dict=True
            ).pooler_output

    def encode(self, image_embeds, lang_x, text_mask):
        """Frames (n, Q, D) with their text (n, L), text_mask (n, L) -> state of the action token (n, D).

        <s> <image> Q image tokens </image> <grounding> text </s> ACT: Kosmos-2's own layout, and the action token directly behind the last valid one. Behind the padding
        its position, and with it the answer, would depend on the other texts of the batch.
        """
        n, L = lang_x.shape
        begin, end = (self.image_ids[k].expand(n, 1) for k in (0, 1))
        words = self.backbone.text_model.model.embed_tokens(
            torch.cat([lang_x[:, :1], begin, end, lang_x[:, 1:], lang_x[:, -1:]], dim=1)
        ).float()  # the last one makes room for ACT
        x = torch.cat([words[:, :2], image_embeds.float(), words[:, 2:]], dim=1)  # (n, Q + L + 3, D)
        at, place = self.queries + 2 + text_mask.sum(1, keepdim=True), torch.arange(x.shape[1], device=x.device)
        x = torch.where((place == at)[..., None], self.action_token, x)
        hidden = self.backbone.text_model(
            inputs_embeds=x, attention_mask=(place <= at).long(), use_cache=False, return_dict=True
        ).last_hidden_state
        return hidden.gather(1, at[..., None].expand(-1, 1, x.shape[-1]))[:, 0]

    def forward_continuous(self, vision_x, lang_x, text_mask, attention_mask=None):
        """vision_x (B, W, 3, side, side) uint8, or image embeddings (B, W, Q, D) | lang_x, text_mask (B, L) | attention_mask (B, W), frames that exist (the others are not even encoded)
        -> (velocities (B, W, N, 2) in (-1, 1), None)."""
        (B, W), exists = (
            vision_x.shape[:2],
            vision_x.new_ones(vision_x.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask,
        )
        frames = vision_x[exists]  # (n, ...)
        row = torch.arange(B, device=exists.device)[:, None].expand(B, W)[exists]
        embeds = self.image_embeds(frames) if vision_x.ndim == 5 else frames
        action_hs = self.encode(embeds, lang_x[row], text_mask[row]).float()
        tok_seq = action_hs.new_zeros(B, W, action_hs.shape[-1]).masked_scatter(exists[..., None], action_hs)
        with torch.autocast(
            vision_x.device.type, enabled=False
        ):  # the head is small: fp32, whatever the backbone runs in
            return self.act_head(
                tok_seq[:, :, None]
            )  # padding is at the end: the LSTM never carries it into a real step

    forward = forward_continuous


def compute_loss(model, inputs, count=None):
    """19-tuple -> (dict(loss, loss_velocity_act, loss_arm_act), sample_loss (B,)). loss_arm_act is the guide's compatible name of the same number. `count`: see MobileVLALSTMDecoder.loss."""
    core = model.module if hasattr(model, "module") else model
    rgb, _, attention_mask, language, text_mask, *_ = inputs
    labels, mask = (inputs[9], None), inputs[11]
    prediction = model(rgb, language, text_mask, attention_mask)
    velocity = core.act_head.loss(prediction, labels, mask, count)["loss_velocity"]
    sample = (F.huber_loss(prediction[0].detach().float(), labels[0], reduction="none") * mask[..., None]).sum(
        (1, 2, 3)
    ) / (2 * mask.sum((1, 2))).clamp(min=1)
    return dict(loss=velocity, loss_velocity_act=velocity, loss_arm_act=velocity), sample


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, prompt, spec, stats, autocast=None):
        self.model, self.prompt, self.spec, self.stats, self.autocast, self._instruction = (
            model,
            prompt,
            spec,
            stats,
            autocast,
            None,
        )

    def reset(self):
        """Forget the frames seen so far: call it at the start of every episode."""
        self.model.act_head.reset()
        self._instruction = None

    @property
    def device(self):
        return self.model.action_token.device

    def pixels(self, images):
        """list of (h, w, 3) uint8 RGB of any size -> (n, 3, side, side) uint8"""
        for image in images:
            if np.ndim(image) != 3 or np.shape(image)[-1] != 3 or np.asarray(image).dtype != np.uint8:
                raise ValueError(
                    f"an image is {np.asarray(image).dtype} {np.shape(image)}; expected uint8 (height, width, 3), RGB"
                )
        return torch.from_numpy(
            np.stack([resize(np.asarray(image), self.spec.image_size).transpose(2, 0, 1) for image in images])
        )

    @torch.no_grad()
    def action_states(self, vision_x, instruction):
        """n frames, uint8 (n, 3, side, side) or image embeddings (n, Q, D), under one instruction -> (n, D)"""
        ids, valid = self.prompt.tokens(instruction)
        text, mask, vision_x = (
            ids[valid][None].to(self.device),
            valid[valid][None].to(self.device),
            vision_x.to(self.device),
        )
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            embeds = self.model.image_embeds(vision_x) if vision_x.ndim == 4 else vision_x
            return self.model.encode(embeds, text.expand(len(embeds), -1), mask.expand(len(embeds), -1)).float()

    @torch.no_grad()
    def head(self, tok_seq, stream=False):
        """(B, S, D) -> (B, S, N, 2) float32 in [-1, 1]"""
        return self.model.act_head(tok_seq[:, :, None], stream=stream)[0].cpu().numpy()

    def predict(self, images, instruction=None):
        """On the robot: predict(images, instruction) with the newest image (h, w, 3) uint8 RGB, or several, oldest first -> (N, 2) float32 m/s, linear_x and linear_y of the next steps.
        It remembers the frames since reset(); a changed instruction starts anew, because no training window ever mixed two.

        Without an instruction: predict([{images: 1 to W frames, oldest first, instruction: str}, ...]) -> (B, N, 2), no memory.
        """
        if instruction is not None:
            frames = [images] if np.ndim(images[0]) == 2 else list(images)
            if instruction != self._instruction:
                self.reset()
                self._instruction = instruction
            for state in self.action_states(self.pixels(frames), instruction):
                answer = self.head(state[None, None], stream=True)
            return unscale_actions(answer[0, 0], self.spec)
        W, rows = self.spec.window_size, []
        for o in images:
            if not 1 <= len(o["images"]) <= W:
                raise ValueError(
                    f"an observation has {len(o['images'])} images; expected 1 to {W} frames, oldest first"
                )
            rows.append(self.action_states(self.pixels(o["images"]), o["instruction"]))
        tok_seq = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        newest = [len(row) - 1 for row in rows]
        return unscale_actions(self.head(tok_seq)[np.arange(len(rows)), newest], self.spec)

    def rollout(self, vision_x, instruction):
        """A whole episode as the robot would have driven it: frames as in action_states -> (T, N, 2) float32 in [-1, 1], row t from the last W frames up to t."""
        W = self.spec.window_size
        states = torch.cat(
            [self.action_states(vision_x[i : i + 2 * W], instruction) for i in range(0, len(vision_x), 2 * W)]
        )
        first = [max(0, t - W + 1) for t in range(len(states))]
        windows = nn.utils.rnn.pad_sequence([states[a : t + 1] for t, a in enumerate(first)], batch_first=True)
        return self.head(windows)[np.arange(len(states)), [t - a for t, a in enumerate(first)]]

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per episode {name, sample: callable(t) -> observation, target (M, 2) m/s, hold (M, 2): standing still, phase: None}."""
        s = self.spec
        d = DatasetConfig(
            data_dir=str(root), episode_pattern="*", instruction=s.instruction, name_instructions=s.name_instructions
        )
        found, _ = load_episodes(d)
        if unknown := sorted(set(names or []) - {e.name for e in found}):
            raise ValueError(
                f"'{root}' has no episode '{unknown[0]}'; it has {', '.join(e.name for e in found[:5])}, ..."
            )
        for e in found:
            if (names is not None and e.name not in names) or e.num_frames <= s.label_offset:
                continue
            images, target = read_images(e, s).transpose(0, 2, 3, 1), e.actions[s.label_offset :]
            sample = lambda t, images=images, e=e: dict(
                images=list(images[max(0, t - s.window_size + 1) : t + 1]), instruction=e.instruction
            )
            yield dict(name=e.name, sample=sample, target=target, hold=np.zeros_like(target), phase=None)

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return [("linear_x", "m/s"), ("linear_y", "m/s")]


# ---- build, save, load -----------------------------------------------------------------------------------------------


def local_folder(source, weights):
    """Directory or hub id -> local directory with config and tokenizer files, and with `weights` the safetensors."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=["*.json"] + (["model*.safetensors"] if weights else [])))
    except Exception as error:  # the hub client raises a dozen types; all mean that the files cannot be had
        raise FileNotFoundError(
            f"'{source}' is neither a directory nor reachable on the hub ({type(error).__name__}). Give a local directory (--model DIR); "
            "python make_demo.py kosmos2 writes a tiny one"
        ) from error


@dataclass
class Backbone:
    """What is known of a Kosmos-2 without its weights."""

    folder: Path
    config: object  # transformers' Kosmos2Config
    tokenizer: object
    mean: list
    std: list

    @classmethod
    def open(cls, source, weights=True):
        from transformers import AutoConfig, AutoTokenizer

        folder = local_folder(source, weights)
        if missing := [
            f
            for f in ("config.json", "preprocessor_config.json", "tokenizer_config.json")
            if not (folder / f).is_file()
        ]:
            raise FileNotFoundError(
                f"model '{source}' has no {missing[0]}; expected a Kosmos-2 directory with config.json, preprocessor_config.json, tokenizer files and model.safetensors"
            )
        config, about = (
            AutoConfig.from_pretrained(folder),
            json.loads((folder / "preprocessor_config.json").read_text()),
        )
        if config.model_type != "kosmos-2":
            raise ValueError(
                f"model '{source}' is a {config.model_type}; expected a kosmos-2, e.g. microsoft/kosmos-2-patch14-224"
            )
        return cls(folder, config, AutoTokenizer.from_pretrained(folder), about["image_mean"], about["image_std"])

    @property
    def image_size(self):
        return self.config.vision_config.image_size

    def digest(self):
        """16 hex digits that another set of weights would change: names, shapes, and the values of all vectors (norms and biases), read without the rest."""
        from safetensors import safe_open

        if not (files := sorted(self.folder.glob("model*.safetensors"))):
            raise FileNotFoundError(f"{self.folder} has no model.safetensors")
        parts = {}
        for file in files:
            with safe_open(file, "pt") as f:
                for name in f.keys():
                    shape = f.get_slice(name).get_shape()
                    parts[name] = f"{name}{shape}".encode() + (
                        f.get_tensor(name).float().numpy().tobytes() if len(shape) == 1 else b""
                    )
        return hashlib.sha256(b"".join(parts[name] for name in sorted(parts))).hexdigest()[:16]


def build_model(cfg, backbone, prompt, device, dtype, vlm=None):
    """-> MobileVLA on `device`: adapters, action token and head in fp32, the frozen backbone in `dtype`. `vlm`: a Kosmos2Model instead of the one in backbone.folder."""
    from transformers import Kosmos2Model

    if vlm is None:
        vlm, report = Kosmos2Model.from_pretrained(backbone.folder, dtype=dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]) + sorted(str(k) for k in report["mismatched_keys"]):
            raise ValueError(
                f"{backbone.folder} lacks {len(missing)} tensors of a Kosmos-2 or has them in another shape, e.g. {missing[0]}: they would stay random"
            )
    known = vlm.config.text_config.vocab_size
    if (
        max(prompt.image_ids) >= known
        or backbone.config.text_config.vocab_size == REAL_VOCABULARY
        and prompt.image_ids != REAL_IMAGE_IDS
    ):
        raise ValueError(
            f"the tokenizer of '{cfg.model}' gives <image> and </image> the ids {prompt.image_ids}; its model has {known} ids, the published one means "
            f"{REAL_IMAGE_IDS}: tokenizer and weights do not belong together"
        )
    vlm.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        s = cfg.train_setup
        if s.lora_enable:
            add_lora(vlm, s.lora_scope, s.lora_r, s.lora_alpha, s.lora_dropout)
        model = MobileVLA(
            vlm, prompt.image_ids, backbone.mean, backbone.std, cfg.act_head, cfg.window_size, cfg.fwd_pred_next_n
        )
    return model.to(device)


def save_model(path, model, optimizer, cfg, data, digest, **progress):
    """Write a .ckpt: trained weights, the optimizer's moments, and all that load_policy and a resume need. Plain types and tensors, complete or not there at all."""
    trained, moments = ckpt.training_state(model, optimizer)
    meta = dict(script=Path(__file__).stem, validation=[data.episodes[i].name for i in data.validation])
    with ckpt.atomic_path(path) as temporary:
        ckpt.save_state(
            temporary,
            dict(
                format_version=FORMAT,
                meta=meta,
                trained=trained,
                moments=moments,
                config=dataclasses.asdict(cfg),
                spec=dataclasses.asdict(data.spec),
                stats=data.stats,
                fingerprint=data.fingerprint,
                backbone=digest,
                **progress,
            ),
        )


def read_checkpoint(path):
    state = ckpt.load_state(path)
    if not isinstance(state, dict) or state.get("format_version") != FORMAT or "trained" not in state:
        found = state.get("format_version") if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"{path} is no checkpoint of train_mobile_kosmos.py with format_version {FORMAT} (it has {found})"
        )
    return state


def config_of(tree, cls=Config):
    """Nested dict of a checkpoint -> Config."""
    return cls(
        **{
            f.name: config_of(tree[f.name], type(f.default_factory()))
            if dataclasses.is_dataclass(f.default_factory)
            else tree[f.name]
            for f in dataclasses.fields(cls)
        }
    )


def load_policy(path, device=None, model=None):
    """Open a .ckpt, or the best one of an output_dir, for inference. `model`: where the backbone is, if no longer where the training found it."""
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        best = sorted((loss, p) for p, (_, loss) in top_files(folder).items())
        path = best[0][1] if best else folder / "last.ckpt"
    state = read_checkpoint(path)
    cfg, spec = config_of(state["config"]), DataSpec(**state["spec"])
    backbone = Backbone.open(model or cfg.model)
    if (found := backbone.digest()) != state["backbone"]:
        raise ValueError(
            f"{path} was trained on a backbone with digest {state['backbone']}; '{backbone.folder}' has {found}. Give the right one: load_policy(path, model=DIR)"
        )
    device = torch.device(device or pick_device(0))
    autocast = pick_precision(cfg.train_setup.precision, device.type)
    prompt = Prompt(backbone.tokenizer, spec.max_text_len)
    core = build_model(cfg, backbone, prompt, device, autocast or torch.float32)
    names = {n: p for n, p in core.named_parameters() if p.requires_grad}
    if set(names) != set(state["trained"]):
        raise ValueError(
            f"{path} has {len(state['trained'])} trained tensors, this code trains {len(names)}: another version wrote it"
        )
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(state["trained"][name])
    return Policy(core.requires_grad_(False).eval(), prompt, spec, state["stats"], autocast)


def pick_device(local_rank):
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_precision(wanted, device_type):
    """-> autocast dtype, None for full fp32: mixed precision is for CUDA only."""
    return (
        {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16, "32-true": None}[wanted]
        if device_type == "cuda"
        else None
    )


class FeatureCache:
    """Image embeddings of the frozen tower on disk: one (T, Q, D) tensor per episode, valid for one set of weights, image size and colour order."""

    def __init__(self, folder, digest, spec, dtype):
        key = hashlib.sha256(json.dumps([digest, spec.image_size, spec.colour_order, str(dtype)]).encode()).hexdigest()[
            :16
        ]
        self.folder, self.spec, self.dtype, self._open = Path(folder) / key, spec, dtype, {}

    def path(self, episode):
        """A file that was recorded again (size or time changed) gets embeddings of its own."""
        about = os.stat(episode.path)
        return (
            self.folder
            / f"{hashlib.sha256(f'{episode.name}{about.st_size}{about.st_mtime_ns}'.encode()).hexdigest()[:24]}.pt"
        )

    @torch.no_grad()
    def build(self, episodes, model, device, autocast, batch_size=16):
        """Compute what is missing -> number of episodes computed."""
        todo = [e for e in episodes if not self.path(e).is_file()]
        for e in tqdm(todo, desc="image embeddings", unit="episode", disable=None):
            frames = torch.from_numpy(read_images(e, self.spec))
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                rows = [
                    model.image_embeds(frames[i : i + batch_size].to(device)).to(self.dtype).cpu()
                    for i in range(0, len(frames), batch_size)
                ]
            with ckpt.atomic_path(self.path(e)) as temporary:
                ckpt.save_state(temporary, dict(features=torch.cat(rows)))
        return len(todo)

    def read(self, episode):
        """-> (T, Q, D), mapped from the file."""
        if episode.path not in self._open:
            self._open[episode.path] = torch.load(self.path(episode), mmap=True, weights_only=True)["features"]
        return self._open[episode.path]

    def __getstate__(self):
        return self.__dict__ | {"_open": {}}


# ---- validation ------------------------------------------------------------------------------------------------------

SIDES = ("left", "right", "other")
SUMS = ("huber", "abs_x", "abs_y", "sq_x", "sq_y", "steps", "turns", "turned", "class9")


def labels_of(actions, spec):
    """(T, 2) actions in [-1, 1] -> (chunk (T, N, 2), exists (T, N)): what each frame is followed by."""
    index = np.arange(len(actions))[:, None] + np.arange(spec.fwd_pred_next_n) + spec.label_offset
    return actions[np.minimum(index, len(actions) - 1)], index < len(actions)


def measure(predicted, target, exists, scale):
    """(T, N, 2) in [-1, 1] twice, exists (T, N) -> SUMS: Huber, absolute and squared error (m/s) per axis, steps; of the steps whose linear_y leaves the dead band (turns) those
    with the right sign (turned); steps whose (x, y) falls into the right one of 3 x 3 directions."""
    e, huge = predicted - target, lambda v: np.sign(v) * (np.abs(v) > DEAD_BAND)
    huber = np.where(np.abs(e) <= 1, e**2 / 2, np.abs(e) - 0.5)
    metres = e[exists] * np.asarray(scale)
    turns = exists & (np.abs(target[..., 1]) > DEAD_BAND)
    return np.array(
        [
            huber[exists].sum(),
            *np.abs(metres).sum(0),
            *(metres**2).sum(0),
            exists.sum(),
            turns.sum(),
            (np.sign(predicted[..., 1]) == np.sign(target[..., 1]))[turns].sum(),
            (huge(predicted) == huge(target)).all(-1)[exists].sum(),
        ],
        np.float64,
    )


def named(sums):
    """SUMS -> {loss, mae_x, mae_y, rmse_x, rmse_y (m/s), direction, class9 (shares)}; what has no steps is left out."""
    s = dict(zip(SUMS, sums.tolist()))
    n = s["steps"]
    out = (
        dict(
            loss=s["huber"] / (2 * n),
            mae_x=s["abs_x"] / n,
            mae_y=s["abs_y"] / n,
            rmse_x=math.sqrt(s["sq_x"] / n),
            rmse_y=math.sqrt(s["sq_y"] / n),
            class9=s["class9"] / n,
        )
        if n
        else {}
    )
    return out | (dict(direction=s["turned"] / s["turns"]) if s["turns"] else {})


class Blind:
    """Predictors that see nothing: standing still, the training actions' mean, and their mean at the same time of an episode."""

    def __init__(self, episodes, spec):
        longest, actions = max(e.num_frames for e in episodes), [scale_actions(e.actions, spec) for e in episodes]
        self.spec, self.mean = spec, np.concatenate(actions).mean(0)
        at = [np.stack([a[t] for a in actions if t < len(a)]).mean(0) for t in range(longest)]
        self.at = np.stack(at)

    def predictions(self, frames):
        """-> {name: (T, N, 2) in [-1, 1]}"""
        n = self.spec.fwd_pred_next_n
        index = np.arange(frames)[:, None] + np.arange(n) + self.spec.label_offset
        timed = np.where((index < len(self.at))[..., None], self.at[np.minimum(index, len(self.at) - 1)], self.mean)
        return dict(
            zeros=np.zeros((frames, n, 2), np.float32), mean=np.broadcast_to(self.mean, (frames, n, 2)), per_time=timed
        )


def other_instruction(text, known):
    """The instruction for the swap test: the same with left and right exchanged, else another one that was trained on; None where there is only one."""
    swapped = re.sub(r"\b(left|right)\b", lambda m: {"left": "right", "right": "left"}[m[0]], text)
    return swapped if swapped != text else next((t for t in known if t != text), None)


def validate(policy, dataset, blind, known, rank, world, reduce):
    """Drive every validation episode once, as the robot would (each frame with the last W up to it) -> {val_loss, val_mae_linear_y, ...}; sums over all ranks.

    swap_change: mean |velocity(text) - velocity(other text)| in m/s on the same frames; swap_flip: of the steps that turn, how many turn the other way (linear_y changes its sign). A policy
    that does not read has 0 and 0.
    """
    spec, who = policy.spec, ("policy", "zeros", "mean", "per_time")
    sums, swap, per_step = np.zeros((len(who), len(SIDES), len(SUMS))), np.zeros(4), np.zeros((spec.fwd_pred_next_n, 2))
    policy.model.eval()
    for e in dataset.episodes[rank::world]:
        target, exists = labels_of(scale_actions(e.actions, spec), spec)
        vision_x = dataset.cache.read(e) if dataset.cache else torch.from_numpy(dataset.frames.of(e))
        predictions = dict(policy=policy.rollout(vision_x, e.instruction)) | blind.predictions(e.num_frames)
        for k, name in enumerate(who):
            sums[k, SIDES.index(e.side)] += measure(predictions[name], target, exists, spec.action_scale)
        error = np.abs(predictions["policy"] - target).mean(-1)
        per_step += np.stack([(error * exists).sum(0) * np.mean(spec.action_scale), exists.sum(0)], axis=1)
        if other := other_instruction(e.instruction, known):
            answer = policy.rollout(vision_x, other)
            turns = exists & (np.abs(target[..., 1]) > DEAD_BAND)
            change = (np.abs(answer - predictions["policy"]) * np.asarray(spec.action_scale))[exists]
            swap += [
                change.sum(),
                change.size,
                (np.sign(answer[..., 1]) == -np.sign(predictions["policy"][..., 1]))[turns].sum(),
                turns.sum(),
            ]
    policy.model.train()
    total = reduce(torch.from_numpy(np.concatenate([sums.ravel(), swap, per_step.ravel()]))).numpy()
    sums, swap, per_step = (
        total[: sums.size].reshape(sums.shape),
        total[sums.size : sums.size + 4],
        total[sums.size + 4 :].reshape(per_step.shape),
    )
    full = {
        "mae_x": "mae_linear_x",
        "mae_y": "mae_linear_y",
        "rmse_x": "rmse_linear_x",
        "rmse_y": "rmse_linear_y",
        "direction": "direction_accuracy",
        "class9": "class9_accuracy",
    }
    out = {f"val_{full.get(k, k)}": v for k, v in named(sums[0].sum(0)).items()}
    out |= dict(val_loss_velocity_act=out["val_loss"], val_loss_arm_act=out["val_loss"])
    out |= {
        f"val_{side}_{full.get(k, k)}": v
        for s, side in enumerate(SIDES[:2])
        for k, v in named(sums[0, s]).items()
        if k in ("loss", "mae_x", "mae_y", "direction")
    }
    out |= {
        f"blind_{name}_{full.get(k, k)}": v
        for w, name in enumerate(who[1:], 1)
        for k, v in named(sums[w].sum(0)).items()
        if k in ("loss", "mae_x", "mae_y", "direction")
    }
    out |= {f"val_mae_step_{j + 1}": a / n for j, (a, n) in enumerate(per_step) if n}
    if swap[1]:
        out |= dict(swap_change=swap[0] / swap[1]) | (dict(swap_flip=swap[2] / swap[3]) if swap[3] else {})
    return {k: float(v) for k, v in out.items()}


def say_validation(epoch, step, v):
    percent = lambda key: f"{v[key]:.1%}" if key in v else "-"
    swap = (
        f"swapped text: {v['swap_change']:.3f} m/s, {percent('swap_flip')} of turns flip"
        if "swap_change" in v
        else "one instruction only: no swap test"
    )
    swap += " (it does not listen to the text)" if v.get("swap_change", 1) < 0.01 else ""
    return (
        f"[VAL] epoch {epoch} step {step} | val_loss {v['val_loss']:.4f} | MAE x {v['val_mae_linear_x']:.3f} y {v['val_mae_linear_y']:.3f} m/s | "
        f"direction {percent('val_direction_accuracy')} | {swap} | "
        f"blind loss: zeros {v['blind_zeros_loss']:.4f}, mean {v['blind_mean_loss']:.4f}, per time {v['blind_per_time_loss']:.4f} ({percent('blind_per_time_direction_accuracy')})"
    )


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg, steps_per_epoch):
    """Learning rate of update number `step` (from 0): linear warm-up, then constant or a cosine over max_epochs that stays at its end."""
    warmup, total = cfg.warmup_epochs * steps_per_epoch, cfg.trainer.max_epochs * steps_per_epoch
    scale = 1.0
    if cfg.scheduler == "cosine":
        progress = min(1.0, max(0.0, (step - warmup) / max(1.0, total - warmup)))
        scale = cfg.min_lr_scale + (1 - cfg.min_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * scale * min(1.0, (step + 1) / warmup if warmup > 0 else 1.0)


def epoch_after(before, position, n):
    """Number, from 0, of the epoch that a step from position `before` to `position` finished, else of the one it is in. Steps may cross the end of an epoch."""
    return position // n - 1 if position // n > before // n else position // n


def top_files(folder):
    """{path: (epoch, val_loss)} of the epoch checkpoints in `folder`, from the files themselves: a resumed run, or one that was killed while saving, knows all of them."""
    out = {}
    for path in sorted(Path(folder).glob("epoch_*.ckpt")):
        if m := re.fullmatch(EPOCH_FILE, path.name):
            loss = read_checkpoint(path)["val_loss"]
            out[path] = int(m[1]), loss if math.isfinite(loss) else math.inf
    return out


def describe(cfg, data, print0):
    """Say what was found: episodes, groups, instructions and their sources, action ranges."""
    d, train, held = cfg.dataset, [data.episodes[i] for i in data.train], [data.episodes[i] for i in data.validation]
    print0(
        f"data      {len(train)} training episodes, {sum(e.num_frames for e in train)} frames; {len(held)} validation episodes; {d.data_dir}, {d.episode_pattern}"
    )
    for message in data.excluded:
        print0(f"excluded  {message}")
    groups = Counter(e.group for e in data.episodes)
    for group, count in sorted(groups.items())[:12]:
        print0(
            f"group     {group or '(no scenario in the name)'}: {sum(e.group == group for e in train)} to train on, {count - sum(e.group == group for e in train)} held out"
        )
    print0(
        f"text      from the file {sum(e.source == 'file' for e in data.episodes)}, from its name {sum(e.source == 'name' for e in data.episodes)}, from the config "
        f"{sum(e.source == 'config' for e in data.episodes)}; {len({e.instruction for e in train})} instruction(s), e.g. {train[0].instruction!r}"
    )
    if len({e.instruction for e in train}) == 1:
        print0("warning   every training episode has the same instruction: the policy cannot learn to listen to it")
    if conflict := [
        e.name
        for e in data.episodes
        for side in ("left", "right")
        if e.source == "file" and side in Path(e.name).stem.split("_") and e.side not in (side, "other")
    ]:
        print0(f"warning   {len(conflict)} file(s) are named after one side and instruct the other, e.g. {conflict[0]}")
    s = data.stats["action"]
    print0(
        "action    linear_x, linear_y in m/s: "
        + "; ".join(f"{k} " + " ".join(f"{v:.3g}" for v in s[k]) for k in ("mean", "std", "min", "max"))
        + f"; {' '.join(f'{v:g}' for v in d.action_scale)} becomes 1"
    )
    actions = np.concatenate([e.actions for e in train])
    if cut := int((np.abs(actions) > np.asarray(d.action_scale) * 1.001).any(1).sum()):
        print0(
            f"warning   {cut} of {len(actions)} actions exceed dataset.action_scale {d.action_scale} and are cut; the largest are {np.abs(actions).max(0).tolist()}"
        )
    if turning := sum(e.turns for e in data.episodes):
        print0(
            f"warning   {turning} episode(s) turn (angular_z is not 0); the policy learns linear_x and linear_y only"
        )
    replays = sum(any(np.array_equal(e.actions, t.actions) for t in train) for e in held)
    if replays:
        print0(
            f"note      {replays} of {len(held)} validation episodes repeat the actions of a training episode exactly: a replay by text and time would score well on them"
        )


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a backbone's tokenizer the text stays unbuilt, and says so."""
    try:
        backbone = Backbone.open(cfg.model, weights=False)
        size, prompt = backbone.image_size, Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    except FileNotFoundError as error:
        size, prompt = IMAGE_SIZE, None
        print(f"note      text tokens are not shown: {error}")
    data = load_data(cfg, size)
    describe(cfg, data, print)
    dataset = MobileVLAH5Dataset(data, data.train, cfg, prompt)
    order = GlobalOrder(len(dataset), cfg.seed)
    samples = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    print(
        f"samples   {len(dataset)} windows ({cfg.dataset.windows}); batch of {len(samples)}, first: {samples[0]['name'][0]} frame {samples[0]['name'][1]}"
    )
    for key, v in collater(samples, data.spec, cfg.dataset.future_images).items():
        if isinstance(v, torch.Tensor):
            print(
                f"          {key:<20} {str(tuple(v.shape)):<28} {str(v.dtype).removeprefix('torch.'):<8} {v.min().item():.4g} .. {v.max().item():.4g}"
            )
    red, green, blue = samples[0]["rgb"].float().mean((0, 2, 3)).tolist()
    print(
        f"colours   stored as {cfg.dataset.colour_order}: the mean is red {red:.0f}, green {green:.0f}, blue {blue:.0f}; if red and blue look exchanged, set dataset.colour_order"
    )
    print(
        f"lang      {samples[0]['lang']!r}"
        + (f" -> {prompt.tokenizer.decode(samples[0]['text'][samples[0]['text_mask']])!r}" if prompt else "")
    )
    print("check passed")


# without these the order, the noise, the labels or the moments would belong to another run
FIXED = (
    "seed",
    "train_setup.lora_enable",
    "train_setup.lora_r",
    "train_setup.lora_alpha",
    "train_setup.lora_dropout",
    "train_setup.lora_scope",
    "act_head.hidden_size",
    "act_head.num_layers",
)


def flat(tree, prefix=""):
    """Nested config dict -> {"trainer.max_epochs": ...}"""
    return {
        k2: v2
        for k, v in tree.items()
        for k2, v2 in (
            flat(v, f"{prefix}{k}.") if isinstance(v, dict) and k != "name_instructions" else {f"{prefix}{k}": v}
        ).items()
    }


def check_resume(cfg, state, path, data, digest):
    """Refuse a resume that would silently mean something else -> list of other settings that changed."""
    again = "Set it back, or start a new run in another --output_dir"
    if state["fingerprint"] != data.fingerprint:
        raise ValueError(
            f"--resume {path}: the training windows changed since then (episodes, their split, texts or actions, or dataset.windows). {again}"
        )
    if state["backbone"] != digest:
        raise ValueError(
            f"--resume {path} was trained on a backbone with digest {state['backbone']}, model '{cfg.model}' has {digest}. {again}"
        )
    old, new = flat(state["config"]) | state["spec"], flat(dataclasses.asdict(cfg)) | dataclasses.asdict(data.spec)
    if wrong := [f"{k} {old.get(k)}, now {new[k]}" for k in (*FIXED, *state["spec"]) if old.get(k) != new[k]]:
        raise ValueError(f"--resume {path} was trained with {'; '.join(wrong)}. {again}")
    return [
        f"{k} {old.get(k)} -> {v}"
        for k, v in new.items()
        if old.get(k) != v and k not in ("resume", "output_dir", "check")
    ]


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    t = cfg.trainer
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(local)
    cuda = device.type == "cuda"
    if device.type == "mps" and world > 1:
        raise ValueError(
            f"{world} processes on MPS: Apple's GPU has no process group. Run python train_mobile_kosmos.py without torchrun"
        )
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo"
        )  # counts and flags go over gloo: the GPU need not be waited for
    autocast = pick_precision(cfg.train_setup.precision, device.type)
    print0 = print if rank == 0 else lambda *_: None
    out = Path(cfg.output_dir)
    folder = out / "checkpoints"
    there = [p for p in (folder / "last.ckpt", *sorted(folder.glob("epoch_*.ckpt"), reverse=True)) if p.is_file()]
    path = next(iter(there), None) if cfg.resume == "auto" else Path(cfg.resume) if cfg.resume else None
    if path and not path.is_file():
        raise FileNotFoundError(
            f"--resume {path}: no such checkpoint; '{folder}' has {', '.join(p.name for p in there) or 'none'}"
        )
    if cfg.resume == "auto" and not path:
        print0(f"resume    auto: no checkpoint in {folder}, starting a new run")
    if path is None and (there or (out / "metrics.jsonl").exists() and cfg.resume != "auto"):
        raise FileExistsError(
            f"output_dir '{out}' already holds a run. Continue it with --resume auto, or choose another --output_dir"
        )
    backbone = Backbone.open(cfg.model)
    digest, prompt = backbone.digest(), Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    data = load_data(cfg, backbone.image_size, rank)
    for e in data.episodes:
        prompt.tokens(e.instruction)  # too long a text is found now
    state = read_checkpoint(path) if path else None
    if state:
        changed = check_resume(cfg, state, path, data, digest)
        print0("; ".join([f"resume    {path}, step {state['step']}", *changed]))
    if world > 1:
        dist.barrier()  # all ranks have looked before rank 0 writes
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(folder)

    def reduce(tensor):
        """Sum over the ranks, in float64, on the CPU."""
        tensor = tensor.detach().cpu().double()
        if world > 1:
            dist.all_reduce(tensor)
        return tensor

    # ---- model, optimizer
    describe(cfg, data, print0)
    core = build_model(cfg, backbone, prompt, device, autocast or torch.float32)
    policy = Policy(core, prompt, data.spec, data.stats, autocast)
    trained = {n: p for n, p in core.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=cuda or None
    )
    scaler = torch.amp.GradScaler("cuda" if cuda else "cpu", enabled=autocast == torch.float16)
    start = position = skipped = rescaled = 0
    if state:
        ckpt.restore_training_state(core, optimizer, state)
        start, position, skipped, rescaled = (state[k] for k in ("step", "position", "skipped", "rescaled"))
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        state = None

    # ---- data
    cache = None
    if cfg.dataset.feature_cache:
        cache = FeatureCache(cfg.dataset.feature_cache, digest, data.spec, autocast or torch.float32)
        built = cache.build(data.episodes[rank::world], core, device, autocast)
        print0(f"features  of {len(data.episodes)} episodes in {cache.folder}; rank 0 computed {built} of them now")
        if world > 1:
            dist.barrier()
    dataset, held_out = (MobileVLAH5Dataset(data, which, cfg, prompt, cache) for which in (data.train, data.validation))
    blind, known = Blind(dataset.episodes, data.spec), sorted({e.instruction for e in dataset.episodes})
    n, accumulation, global_batch = (
        len(dataset),
        t.accumulate_grad_batches,
        cfg.batch_size * world * t.accumulate_grad_batches,
    )
    steps_per_epoch = n / global_batch
    steps = start + max(
        0, math.ceil((t.max_epochs * n - position) / global_batch)
    )  # positions go on over the end of an epoch: no window is dropped
    steps = min(steps, t.max_steps) if t.max_steps else steps
    if start >= steps:
        raise ValueError(
            f"--resume {path} is at step {start}, epoch {position / n:.2f}; trainer.max_epochs {t.max_epochs} (max_steps {t.max_steps or 'off'}) leaves nothing to do: raise it"
        )
    batches = RankBatches(GlobalOrder(n, cfg.seed), cfg.batch_size, accumulation, rank, world, position, steps - start)
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=dataset.collater,
        num_workers=cfg.num_workers,
        pin_memory=cuda,
        prefetch_factor=4 if cfg.num_workers else None,
        worker_init_fn=ckpt.ignore_stop_signals,
    )
    model = (
        nn.parallel.DistributedDataParallel(
            core, device_ids=[local] if cuda else None, gradient_as_bucket_view=True, broadcast_buffers=False
        )
        if world > 1
        else core
    )
    count, total = sum(p.numel() for p in trained.values()), sum(p.numel() for p in core.parameters())
    size = 12 * count  # fp32 weights and two moments
    lora = (
        f"LoRA r {cfg.train_setup.lora_r} on {cfg.train_setup.lora_scope}" if cfg.train_setup.lora_enable else "no LoRA"
    )
    precision = {torch.float16: "16-mixed", torch.bfloat16: "bf16-mixed", None: "32-true"}[autocast]
    print0(
        f"model     {cfg.model}, {lora}: {count:,} of {total:,} parameters trainable; {world} x {device.type}, {precision}"
        + (f" ({cfg.train_setup.precision} is for CUDA)" if precision != cfg.train_setup.precision else "")
    )
    print0(
        f"labels    {data.spec.window_size} observed steps x {data.spec.fwd_pred_next_n} velocities each, label_offset {data.spec.label_offset}; {n} windows ({cfg.dataset.windows})"
    )
    print0(
        f"batch     {cfg.batch_size} x {world} ranks x {accumulation} accumulation = {global_batch} windows per step; {steps_per_epoch:.1f} steps per epoch"
    )
    print0(
        f"steps     {start} -> {steps}; lr {cfg.learning_rate:g}; a checkpoint is about {size / 1e9:.3g} GB, at most {t.save_top_k + 1 if held_out.episodes else 1} are kept in {folder}: "
        + (
            f"the best {t.save_top_k} by val_loss, and last.ckpt"
            if held_out.episodes
            else "without validation episodes last.ckpt only"
        )
    )
    if rank == 0:
        save_config(cfg, out / "config.yaml")
        shutil.copy(__file__, out / Path(__file__).name)
        ep.write_validation_list(out / "validation_episodes.txt", data.episodes, data.validation)
        (folder / "meta.json").write_text(
            json.dumps(dict(script=Path(__file__).stem, validation=[data.episodes[i].name for i in data.validation]))
        )  # for evaluate.py
    log = runlog.RunLog(out, steps, start, rank, cfg.wandb_project, cfg.wandb, dataclasses.asdict(cfg))
    stop = ckpt.StopSignal()

    def save(step, position, epoch, val_loss=None):
        """Write last.ckpt, and the epoch's own file if it is among the best, on rank 0; True if they are in place. A full disk costs the new checkpoint, never an old one."""
        ok = True
        if rank == 0:
            name = folder / f"epoch_{epoch:02d}-val_loss={math.nan if val_loss is None else val_loss:.3f}.ckpt"
            about = dict(
                epoch=epoch,
                step=step,
                position=position,
                val_loss=val_loss,
                skipped=skipped,
                rescaled=rescaled,
                scaler=scaler.state_dict(),
            )
            try:
                ckpt.require_space(folder, int(1.1 * size))
                better = []  # (val_loss, epoch, path) of those to keep
                if val_loss is not None:
                    others = [
                        (loss, e, p) for p, (e, loss) in top_files(folder).items() if e != epoch
                    ]  # an epoch that is done again replaces its file
                    better = sorted([*others, (val_loss if math.isfinite(val_loss) else math.inf, epoch, name)])[
                        : t.save_top_k
                    ]
                last = folder / "last.ckpt"
                if any(p == name for *_, p in better):
                    save_model(name, core, optimizer, cfg, data, digest, **about)
                    with ckpt.atomic_path(last) as temporary:
                        try:
                            os.link(name, temporary)  # the same bytes under a second name
                        except OSError:  # a file system without hard links
                            shutil.copyfile(name, temporary)
                else:
                    save_model(last, core, optimizer, cfg, data, digest, **about)
                if val_loss is not None:
                    for p in set(top_files(folder)) - {p for *_, p in better}:
                        p.unlink()
            except ckpt.DiskFull as error:
                log.print(f"CHECKPOINT NOT SAVED at step {step}: {error}")
                ok = False
        return bool(reduce(torch.tensor(float(ok))).item() == world)  # others are ok by default

    # ---- loop
    core.train()
    batch_iterator, saved_at, skipped_in_row, step = iter(loader), start, 0, start
    window, wait, t_log, logged_at = (
        [],
        0.0,
        time.perf_counter(),
        start,
    )  # (loss, gradient norm) since the last log line
    while step < steps:
        lr = lr_at(step, cfg, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
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
        # supervised elements of the whole optimizer step over all ranks, what the loss is divided by; and whether any rank was told to stop
        elements, told_to_stop = reduce(
            torch.tensor([2.0 * sum(int(b["chunck_mask"].sum()) for b in micro), float(stop.received is not None)])
        ).tolist()
        loss_sum, sample_losses = 0.0, []
        for m, batch in enumerate(micro):
            torch.manual_seed(torch_seed_at(cfg.seed, position + (m * world + rank) * cfg.batch_size, "dropout"))
            with contextlib.nullcontext() if m == accumulation - 1 or world == 1 else model.no_sync():
                with torch.autocast(device.type, autocast, enabled=autocast is not None):
                    losses, sample = compute_loss(model, _process_batch(batch, device), elements)
                scaler.scale(losses["loss"] * world).backward()  # ranks are averaged, so times world
            sample_losses.append(sample)
            loss_sum = loss_sum + losses["loss"].detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trained.values(), t.gradient_clip_val or math.inf).item()
        loss = reduce(loss_sum).item()
        if math.isfinite(loss) and math.isfinite(norm):
            scaler.step(optimizer)
            scaler.update()
            window.append((loss, norm))
            skipped_in_row = 0
        elif (
            math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1
        ):  # fp16 gradients overflowed: the same on every rank, nobody's fault
            scaler.update()
            rescaled += 1
            log.print(
                f"step {step + 1}: fp16 gradients overflowed, loss scale lowered to {scaler.get_scale():g}; weights unchanged"
            )
        else:
            if scaler.is_enabled():
                scaler.update(scaler.get_scale())  # not the scale's fault
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            runlog.report_nonfinite(log, step + 1, [b["names"] for b in micro], sample_losses, skipped_in_row)
        optimizer.zero_grad(set_to_none=True)
        before, step, position = position, step + 1, position + global_batch

        if step % t.log_every_n_steps == 0 or step == steps:
            elapsed = time.perf_counter() - t_log
            loss, norm = np.mean(window, axis=0).tolist() if window else [math.nan] * 2
            speed, waited = (step - logged_at) * global_batch / elapsed, wait / elapsed
            values = dict(
                train_loss=loss,
                train_loss_velocity_act=loss,
                train_loss_arm_act=loss,
                train_grad_norm=norm,
                lr=lr,
                epoch=position / n,
                windows_per_s=speed,
                data_wait=waited,
                skipped_steps=skipped,
                rescaled_steps=rescaled,
                memory_gb=runlog.memory_gb() if device.type != "mps" else torch.mps.current_allocated_memory() / 1e9,
            )
            if scaler.is_enabled():
                values["loss_scale"] = scaler.get_scale()
            log.log(
                step,
                {k: v for k, v in values.items() if math.isfinite(v)},
                f"step {step:>5}/{steps} | epoch {position / n:5.2f} | loss {loss:.4f} | grad {norm:.3f} | lr {lr:.2e} | {speed:.1f} windows/s | wait {waited:.0%} | {values['memory_gb']:.2f} GB",
            )
            log.step(step, loss, lr, speed, waited)
            window, wait, t_log, logged_at = [], 0.0, time.perf_counter(), step
        else:
            log.step(step)
        t_pause, val_loss, epoch = time.perf_counter(), None, epoch_after(before, position, n)
        due = position // (n * t.every_n_epochs) > before // (n * t.every_n_epochs) or step == steps
        if due and held_out.episodes:
            values = validate(policy, held_out, blind, known, rank, world, reduce)
            val_loss = values["val_loss"]
            log.log(step, values, say_validation(epoch, step, values))
        if due or told_to_stop:
            if save(step, position, epoch, val_loss):
                saved_at = step
            elif step == steps or told_to_stop:
                raise ckpt.DiskFull(
                    28,
                    f"the last checkpoint could not be written; the newest complete one is of step {saved_at}. Free space and run again with --resume auto",
                )
            t_log += time.perf_counter() - t_pause  # validation and saving are not training time
        if told_to_stop and step < steps:
            log.print(
                f"stopped by signal after step {step}; saved {folder / 'last.ckpt'}. Continue with the same command and --resume auto"
            )
            break

    # ---- end
    stop.restore()
    log.close()
    if rank == 0 and step == steps:
        print(f"loss plot: {runlog.plot_loss(out, 'train_loss', 'val_loss')}")
        best = sorted((loss, p) for p, (_, loss) in top_files(folder).items())
        chosen = best[0][1] if best else folder / "last.ckpt"
        print(f"model: {chosen}\nevaluate: python evaluate.py --checkpoint {chosen} --data {cfg.dataset.data_dir}")
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
            f"CUDA out of memory ({str(error).splitlines()[0]}). Lower batch_size (now {config.batch_size}) and raise trainer.accumulate_grad_batches (now "
            f"{config.trainer.accumulate_grad_batches}) in proportion; or train fewer adapters: --lora_scope text_attention, --window_size (now {config.window_size}) smaller"
        )
