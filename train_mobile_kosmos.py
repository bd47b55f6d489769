"""Mobile VLA: Kosmos-2 + LoRA + an LSTM that turns the last frames and an instruction into the next velocities of a
mobile base.

Data: episode_*.h5 of the recorder, 18 frames of a camera and (linear_x, linear_y), one frame per key press. A training
sample is an episode with a window at each of its frames; every frame is encoded once. Names ("chunck") are guide 4's.

    python train_mobile_kosmos.py --config configs/mobile_kosmos.yaml --check      # look at the data, no weights needed
    bash shells/train_mobile_kosmos.sh --multi-gpu --num-gpus 4                    # torchrun --nproc_per_node=4 ...
    python train_mobile_kosmos.py --config configs/demo/mobile_kosmos.yaml         # on a CPU, make_demo.py's output

Output, in output_dir: checkpoints/epoch_E-val_loss=L.ckpt (the best three; E counts from 0) and last.ckpt (both resume,
and open with load_policy), config.yaml, metrics.jsonl, validation_episodes.txt, loss.png. A checkpoint holds only what
was trained; the backbone is read again from its own directory or hub id, and refused if its weights have changed.

Which action is which: a window observes W = 8 frames, and at each of them the LSTM predicts the next N = 10 velocities:

    step i   sees images   label_offset 1: supervised with actions   label_offset 0
    0        0             1 .. 10                                   0 .. 9
    7        0 .. 7        8 .. 17, action 0 unused                  7 .. 16, action 17 unused

So S = 8 label steps; the guide has 7, without a label for the newest frame, whose prediction is all that a robot uses.
The recorder sends action t and then takes image t, which already shows that motion. With label_offset 1 the first
velocity of a chunk is the next motion: send that row. With 0, as in the guide, it is over: send the second row.

Letters in shapes: B windows, W observed frames, S label steps (= W), N future steps, F = W + N frames of a window, n
images, Q image tokens of each, L text tokens, D width of the text model, T frames of an episode."""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import h5py
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from common import MissingFile, command, plan, require
from common import checkpoint as ckpt
from common import episodes as ep
from common.config import config_from
from common.frames import FrameStore
from common.hub import load_weights, local_folder, opening, read_tensors, stored_source, unfilled, weight_digest
from common.log import WandbConfig, progress
from common.policy import Contract, partners
from common.run import Run, launch
from common.sampler import GlobalOrder
from common.stats import Normalizer, compute_stats

SCRIPT, FORMAT = Path(__file__).stem, 3  # of a .ckpt
SWAPPED, LOOKS = 16, 1.05  # episodes measured for val_swap_ratio; below LOOKS the policy ignores its images
ACTIONS = [("linear_x", "m/s"), ("linear_y", "m/s")]
RATE_HZ = 2.5  # a key of the recorder moves the base for 0.4 s
FIRST_ROW = ("the motion that the newest image shows: send row 1", "the motion after the newest image: send row 0")
DEAD_BAND = 0.3  # of the action scale: a smaller velocity has no direction
SIDE_TEXT = "Navigate around obstacles and reach the front of the beverage bottle on the {}"
SIDE_TEXTS = {side: SIDE_TEXT.format(side) for side in ("left", "right")}


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    data_dir: str = ""  # folder with the episodes, searched recursively
    episode_pattern: str = "episode_2025111*.h5"  # file names that are used
    train_split: float = 0.8  # share of the episodes that is trained on
    split: Literal["group", "chronological"] = "group"  # hold out the newest of every scenario (see Episode), or of all
    instruction: str = "Navigate to the target location"  # where neither the file nor its name tells
    name_instructions: dict[str, str] = field(default_factory=dict)  # word of a file name -> text; default: SIDE_TEXTS
    max_text_len: int = 256  # text tokens
    colour_order: Literal["bgr", "rgb"] = "bgr"  # of the stored images; the recorder writes what OpenCV gives it
    action_scale: list[float] = field(default_factory=lambda: [1.15, 1.15])  # m/s that become 1; larger ones are cut
    windows: Literal["all", "one"] = "all"  # one at every frame, or one per episode at frame 0, as the guide's code
    windows_per_sample: int = 24  # at most; an episode with more is cut into several samples
    frame_dir: str = "frames"  # on a local disk: images decoded once, 0.15 MB each at 224 x 224
    skip_bad_episodes: bool = False  # leave unreadable files out, listed, instead of stopping


@dataclass
class TrainSetupConfig:
    precision: Literal["16-mixed", "bf16-mixed", "32-true"] = "16-mixed"  # of CUDA: both mixed ones are bf16
    lora_enable: bool = True  # false: only the action token and the head are trained
    lora_r: int = 32  # rank
    lora_alpha: int = 16  # scale = alpha / r
    lora_dropout: float = 0.1  # on the adapters' input
    lora_scope: Literal["text", "text_attention", "all"] = "text"  # linears: text model, its attention, tower too


@dataclass
class ActHeadConfig:
    hidden_size: int = 512  # of the LSTM
    num_layers: int = 4  # of the LSTM


@dataclass
class TrainerConfig:
    max_epochs: int = 10  # passes over the episodes
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
    label_offset: Literal[0, 1] = 1  # first label: 1 the action after the newest image, 0 (the guide's) the one in it
    batch_size: int = 1  # samples per GPU and micro-batch; one is an episode with all its windows
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
    wandb: WandbConfig = field(default_factory=WandbConfig)
    resume: str | None = None  # a .ckpt of the same run, or "auto" for the newest in output_dir
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = dict(resume_from_checkpoint="resume", lora_rank="train_setup.lora_r", epochs="trainer.max_epochs")
# keys of the guide's config that say what this script does anyway
ACCEPTED = {"trainer_type": ("MobileVLATrainer",), "optimizer": ("adamw",), "dataset.type": ("MobileVLAH5Dataset",)}
ACCEPTED |= {"train_setup.freeze_backbone": ("true",), "act_head.type": ("MobileVLALSTMDecoder",)}
ACCEPTED |= {"act_head.down_sample": ("none",), "trainer.monitor": ("val_loss",), "trainer.save_last": ("true",)}
# without these the order, the noise, the labels or the moments would belong to another run
FIXED = (
    *("seed", "window_size", "fwd_pred_next_n", "label_offset"),
    *("dataset.colour_order", "dataset.action_scale", "dataset.max_text_len"),
    *(f"train_setup.lora_{key}" for key in ("enable", "r", "alpha", "dropout", "scope")),
    *("act_head.hidden_size", "act_head.num_layers"),
)


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    d = cfg.dataset
    for group in (cfg, d, cfg.train_setup, cfg.act_head, cfg.trainer):
        for name, value in vars(group).items():
            least = 0 if name in ("seed", "label_offset", "num_workers", "max_steps", "save_top_k") else 1
            require(type(value) is not int or value >= least, f"{name} is {value}: expected {least} or more")
    share = f"dataset.train_split is {d.train_split}: expected a share above 0, up to 1 (no validation)"
    require(0 < d.train_split <= 1, share)
    require(cfg.min_lr_scale <= 1, f"min_lr_scale is {cfg.min_lr_scale}: expected a share of learning_rate, up to 1")
    speeds = f"dataset.action_scale is {d.action_scale}: expected two speeds above 0, of linear_x and linear_y"
    require(len(d.action_scale) == 2 and min(d.action_scale) > 0, speeds)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Episode:
    """One file, all but its images."""

    path: str
    name: str  # path relative to data_dir
    num_frames: int  # T
    actions: np.ndarray  # (T, 2) float32 m/s: linear_x forward, linear_y to the left
    instruction: str
    source: str  # of the instruction: "file", "name" or "config"
    size: tuple = ()  # (height, width) of its images

    @property
    def recorded(self):
        """(date and time, scenario) of the file name, e.g. 20251118_101206 and 1box_hori_left_core_medium."""
        match = re.fullmatch(r"episode_(\d{8}_\d{6})_?(.*)", Path(self.name).stem)
        return match.groups() if match else ("", "")

    @property
    def side(self):
        """1 left, -1 right, 0 neither: its first motion sideways, as at the end it is often back in the middle."""
        sideways = self.actions[np.abs(self.actions[:, 1]) > 0.1, 1]  # m/s
        return int(np.sign(sideways[0])) if len(sideways) else 0


def read_episode(path, d):
    """Read and check one file but its images -> Episode. BadEpisode says what is wrong."""
    check = functools.partial(require, kind=ep.BadEpisode)
    try:
        require(os.path.isfile(path), "no regular file", OSError)  # a named pipe would be waited for
        with h5py.File(path, "r", locking=False) as f:  # NFS often refuses locks, and nothing here writes
            for key in ("images", "actions"):
                problem = f"{path}: no dataset '{key}'; it has {sorted(f)}"
                there = isinstance(f.get(key), h5py.Dataset)
                check(there, f"{problem}, expected images (T, H, W, 3), actions (T, 3)")
            images, text, (n, *size) = f["images"], ep.read_instruction(f, path), f["images"].shape or (0,)
            kind = f"{path}: dataset 'images' is {images.dtype} {images.shape}; expected uint8 (T, H, W, 3)"
            check(images.dtype == np.uint8 and len(size) == 3 and size[-1] == 3 and all(size), kind)
            actions = ep.lowdim(f, path, "actions", n)
            kind = f"{path}: dataset 'actions' has shape {actions.shape}; expected ({n}, 3): linear_x, linear_y, _"
            check(actions.shape[1] >= 2, kind)
    except (OSError, RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:  # h5py's, for damage
        raise ep.BadEpisode(f"{path}: not a readable HDF5 file ({error}). It may be truncated: re-copy it") from error
    words, name = Path(path).stem.split("_"), os.path.relpath(path, d.data_dir)
    by_name = next((t for word, t in (d.name_instructions or SIDE_TEXTS).items() if word in words), None)
    texts = dict(file=text, name=by_name, config=d.instruction)
    source = next((key for key, text in texts.items() if text), "config")
    return Episode(str(path), name, n, actions[:, :2], texts[source], source, tuple(size[:2]))


def leave_out(d, error, say):
    """Exclude a recording that cannot be used, with a message; an error unless skip_bad_episodes is set."""
    hint = "a training with --skip_bad_episodes, and its evaluation, leave such files out"
    if not d.skip_bad_episodes:
        raise ep.BadEpisode(f"{error} ({hint})")
    say(f"excluded  {error}")


def load_episodes(d, names=None, say=print):
    """Every file of dataset.episode_pattern below data_dir, or those called `names` -> episodes, the oldest first."""
    require(Path(d.data_dir).is_dir(), f"dataset.data_dir '{d.data_dir}' is not a folder: give the one of the episodes")
    found = {os.path.relpath(path, d.data_dir): path for path in ep.find_episodes(d.data_dir)}
    for name in names or ():
        require(name in found, f"'{d.data_dir}' has no episode '{name}'; it has {', '.join([*found][:5])}, ...")
    paths = [path for path in found.values() if Path(path).match(d.episode_pattern)]
    none = f"none of the {len(found)} files under '{d.data_dir}' matches dataset.episode_pattern '{d.episode_pattern}'"
    require(paths, f"No HDF5 files found: {none}; the first is {[*found][0]}. Try --episode_pattern 'episode_*.h5'")
    episodes, paths = [], paths if names is None else [found[name] for name in names]
    for path in progress(paths, "reading episodes", "file"):
        try:
            episodes.append(read_episode(path, d))
        except ep.BadEpisode as error:
            leave_out(d, error, say)
    return sorted(episodes, key=lambda e: (e.recorded[0], e.name))


def split_episodes(episodes, train_split, how):
    """-> (training, validation): sorted indices. The newest n - int(n * train_split) episodes are held out (231 -> 184
    and 47): `how` "group" takes them from every scenario in proportion, "chronological" from all together."""
    n = len(episodes)
    held, groups = n - int(n * train_split + 1e-9), {}
    for i, e in enumerate(episodes):
        groups.setdefault(e.recorded[1] if how == "group" else "", []).append(i)
    seen, validation = 0, []
    for _, members in sorted(groups.items()):  # the running total never drifts from its share by one episode
        take = (seen + len(members)) * held // n - seen * held // n
        seen, validation = seen + len(members), validation + members[len(members) - take :]
    left = f"leaves {n - len(validation)} to train on and {len(validation)} to validate on"
    wrong = f"dataset.train_split {train_split} of {n} episode(s) {left}: record more, or set it to 1.0"
    require(len(validation) < n and bool(validation) == bool(held), wrong)
    return sorted(set(range(n)) - set(validation)), sorted(validation)


def opposite_instructions(train, episodes):
    """-> {instruction of `episodes`: the opposite one, to test whether the policy listens}: the most similar text among
    the `train` episodes that drove to the other side. Instructions without one are left out."""
    sides, opposites = Counter(), {}
    for e in episodes:
        sides[e.instruction] += e.side
    for text in sorted(sides):
        others = sorted({e.instruction for e in train if sides[e.instruction] * sides[text] < 0})
        if others:
            opposites[text] = difflib.get_close_matches(text, others, 1, cutoff=0)[0]
    return opposites


def load_data(cfg, store=None, say=print, first=0, table=None):
    """Find, read, split -> train, validation: Episodes | stats of the training actions, m/s | opposites, contract: of
    the functions below | fingerprint: changes when the samples or their order would | episodes: {name: [hash, "train"
    or "validation"]}. `store`: a FrameStore for all images, `first`: see its build. `table`: a resumed `episodes`."""
    d, offset, found = cfg.dataset, cfg.label_offset, load_episodes(cfg.dataset, say=say)
    if store:
        counts, side = {e.path: e.num_frames for e in found}, store.shape[0]
        store.build(counts, lambda path: picture_reader(path, d.colour_order, side), first)
    episodes = []
    for e in found:
        bad = store.about(e.path)["bad"] if store else {}
        if bad:
            why = f"frame {min(bad)} cannot be read ({bad[min(bad)]}), {len(bad)} of {e.num_frames}"
            leave_out(d, f"{e.path}: dataset 'images' {why}", say)
        elif e.num_frames <= offset:
            leave_out(d, f"{e.path}: {e.num_frames} frame(s) are too few for label_offset {offset}", say)
        else:
            episodes.append(e)
    require(episodes, f"none of the {len(found)} episodes of '{d.data_dir}' is usable")
    marks = {e.name: hashlib.sha256(e.instruction.encode() + e.actions.tobytes()).hexdigest() for e in episodes}
    split = functools.partial(split_episodes, episodes, d.train_split, d.split)
    *parts, table, gone = ep.split_or_keep(marks, split, table if d.skip_bad_episodes else None)
    train, validation = ([episodes[i] for i in part] for part in parts)
    for text in gone:
        say(f"excluded  {text}")
    digest = hashlib.sha256(json.dumps([d.windows, d.windows_per_sample, ep.trained_in(table)]).encode())
    stats = compute_stats(dict(action=[e.actions for e in train]))
    about = dict(opposites=opposite_instructions(train, episodes), contract=contract_of(cfg, train, stats["action"]))
    about |= dict(stats=stats, fingerprint=digest.hexdigest()[:16], episodes=table)
    return SimpleNamespace(train=train, validation=validation, **about)


def contract_of(cfg, train, action):
    """What a robot sends and gets: the fields of common.policy.Contract, as plain values."""
    sizes, texts = {e.size for e in train}, sorted({e.instruction for e in train})
    about = dict(images=dict(camera=sizes.pop() if len(sizes) == 1 else None), actions=ACTIONS, instructions=texts)
    about |= dict(horizon=cfg.fwd_pred_next_n, rate_hz=RATE_HZ, first_row=FIRST_ROW[cfg.label_offset], kind="velocity")
    about |= dict(action_low=action["min"], action_high=action["max"], needs=dict(backbone=cfg.model))
    return dataclasses.asdict(Contract(SCRIPT, **about, skip=1 - cfg.label_offset, must_be_told=True))


def action_normalizer(cfg):
    """m/s <-> [-1, 1], the network's unit; larger velocities than dataset.action_scale are clipped."""
    scale = cfg.dataset.action_scale
    return Normalizer(dict(min=[-v for v in scale], max=scale), "min_max")


def resize(image, side):
    """(h, w, 3) uint8 RGB -> (side, side, 3), bicubic, aspect not kept; the same in training and predict."""
    if side is None or image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.BICUBIC))


def picture_reader(path, colour_order, side=None):
    """-> function: frame number -> its image (h, w, 3) uint8 RGB, resized to `side` if there is one."""
    file = h5py.File(path, "r", locking=False, rdcc_nbytes=2**28, rdcc_nslots=10007)  # a chunk may span all frames
    order = slice(None, None, -1 if colour_order == "bgr" else 1)
    return lambda i: resize(file["images"][i][..., order], side)


class MobileVLAH5Dataset(Dataset):
    """One item per episode, or per stretch of a long one, with its K windows of F = W + N frames, one at every frame.
    Item (position, i) has the guide's keys with a leading K, except rgb and hand_rgb (n, 3, side, side) uint8: the n <=
    K+W-1 observed frames, once each; frames (K, W) int64 says which of them a window sees. actions (K, F, 2) float32 in
    [-1, 1] and the masks (K, F) bool, False beyond the episode's end, where the last frame is repeated."""

    def __init__(self, episodes, cfg, read, prompt=None):
        """`read`(path, frames (n,)) -> (n, side, side, 3) uint8 RGB"""
        self.cfg, self.episodes, self.read = cfg, episodes, read
        self.unknown = prompt.tokenizer.unk_token_id if prompt else -1
        self.tokens = prompt.tokens if prompt else lambda _: (torch.zeros(0, dtype=torch.int64),) * 2
        self.normalizer, self.samples = action_normalizer(cfg), []  # (episode, first frames of its windows)
        for e, episode in enumerate(episodes):
            starts = np.arange(episode.num_frames - cfg.label_offset)  # a window needs a label at its first step
            starts = starts if cfg.dataset.windows == "all" else starts[:1]
            parts = math.ceil(len(starts) / cfg.dataset.windows_per_sample)
            self.samples += [(e, part) for part in np.array_split(starts, parts)]

    def __len__(self):
        return len(self.samples)

    def pictures(self, episode, frames):
        """-> (n, 3, side, side) uint8 RGB"""
        return torch.from_numpy(self.read(episode.path, frames)).permute(0, 3, 1, 2)

    def __getitem__(self, key):
        e, starts = self.samples[key[1]]
        episode, W, K = self.episodes[e], self.cfg.window_size, len(starts)
        places = starts[:, None] + np.arange(W + self.cfg.fwd_pred_next_n)  # (K, F)
        index = np.minimum(places, episode.num_frames - 1)
        mask = torch.from_numpy(places < episode.num_frames)
        rgb = self.pictures(episode, np.arange(starts[0], index[-1, W - 1] + 1))
        text, text_mask = (x.expand(K, -1) for x in self.tokens(episode.instruction))
        masks = dict.fromkeys(("action_mask", "image_mask", "attention_mask"), mask)
        return masks | dict(
            rgb=rgb,
            hand_rgb=torch.zeros(1, dtype=torch.uint8).expand(rgb.shape),
            frames=torch.from_numpy(index[:, :W] - starts[0]),
            actions=torch.from_numpy(self.normalizer.normalize(episode.actions[index])),
            text=text,
            text_mask=text_mask,
            lang=episode.instruction,
            raw_text=[episode.instruction] * K,
            data_source="mobile_vla_action",
            names=[(episode.name, int(start)) for start in starts],
        )

    def collater(self, samples):
        """List of items -> batch, keys of the guide, B windows:

        rgb, hand_rgb (n, 3, side, side) uint8, each frame once | frames (B, W) int64: rgb[frames] is the guide's (B, W,
        3, side, side) | action (B, F-1, 2) float32 in [-1, 1], the last one dropped | text (B, 256) int64, text_mask
        (B, 256) bool | fwd_mask (B, S, N) bool: does image i+1+j exist | action_chunck (B, S, N, 2), [i, j] = action
        i+j+label_offset | chunck_mask (B, S, N) bool: do these exist | raw_text list of str | data_source str |
        attention_mask (B, W) bool: which frames exist | names | text_len: tokens of the longest text
        """
        W, N, offset = self.cfg.window_size, self.cfg.fwd_pred_next_n, self.cfg.label_offset

        def join(key):
            return torch.cat([s[key] for s in samples])

        def chunks(x):  # (B, n, ...) -> (B, n-N+1, N, ...)
            return x.unfold(1, N, 1).movedim(-1, 2)

        actions, mask, text_mask = join("actions"), join("action_mask"), join("text_mask")
        labels = slice(offset, W + N - 1 + offset)  # offset 0 drops the last action, 1 the first
        before = np.cumsum([0] + [len(s["rgb"]) for s in samples])
        batch = dict(
            rgb=join("rgb"),
            hand_rgb=join("hand_rgb"),
            frames=torch.cat([s["frames"] + n for s, n in zip(samples, before, strict=False)]),
            action=actions[:, :-1],
            text=join("text"),
            text_mask=text_mask,
            fwd_mask=chunks(mask)[:, 1:],
            action_chunck=chunks(actions[:, labels]),
            chunck_mask=chunks(mask[:, labels]),
            raw_text=sum((s["raw_text"] for s in samples), []),
            data_source=samples[0]["data_source"],
            attention_mask=mask[:, :W],
            names=sum((s["names"] for s in samples), []),
            text_len=int(text_mask.sum(1).max()),
        )
        assert batch["action_chunck"].shape[1:] == (W, N, 2), "a label step for every observed one"
        return batch


def process_batch(batch):
    """Batch -> the guide's 19-tuple (its _process_batch), in the order of TUPLE; None for what this robot lacks."""
    W, L = batch["attention_mask"].shape[1], batch["text_len"]
    renamed = dict(language=batch["text"][:, :L], text_mask=batch["text_mask"][:, :L])  # cut to the longest text
    renamed |= dict(velocity=batch["action"][:, :W], velocity_chunck=batch["action_chunck"])
    return tuple((batch | renamed).get(name) for name in TUPLE)


class Prompt:
    """Instruction -> <s> <grounding> text </s>; the model puts the image in front of <grounding>, as in Kosmos-2."""

    def __init__(self, tokenizer, max_text_len):
        self.tokenizer, self.max_text_len, self._known = tokenizer, max_text_len, {}
        self.image_ids = tokenizer.convert_tokens_to_ids(["<image>", "</image>"])

    def tokens(self, instruction):
        """-> (ids (max_text_len,) int64, mask (max_text_len,) bool), padding at the end."""
        if instruction not in self._known:
            ids = self.tokenizer(f"<grounding>{instruction}")["input_ids"]
            begin = f"the tokenizer starts a text with id {ids[0]}, not with <s>: expected that of a Kosmos-2"
            require(ids[0] == self.tokenizer.bos_token_id, begin)
            long = f"the instruction '{instruction[:60]}...' has {len(ids)} tokens, dataset.max_text_len"
            require(len(ids) <= self.max_text_len, f"{long} is {self.max_text_len}: shorten it, or raise the key")
            text = torch.full((self.max_text_len,), self.tokenizer.pad_token_id)
            text[: len(ids)] = torch.tensor(ids)
            self._known[instruction] = text, torch.arange(self.max_text_len) < len(ids)
        return self._known[instruction]


# ---- model -----------------------------------------------------------------------------------------------------------

TUPLE = (
    *("rgb", "hand_rgb", "attention_mask", "language", "text_mask", "fwd_rgb_chunck", "fwd_hand_rgb_chunck"),
    *("velocity", "gripper_action", "velocity_chunck", "gripper_action_chunck", "chunck_mask", "fwd_mask"),
    *("instr_and_action_ids", "instr_and_action_labels", "instr_and_action_mask", "raw_text", "rel_state"),
    "data_source",
)
LORA_SCOPES = dict(
    text_attention=r"text_model\..*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    text=r"text_model\..*\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)",
    all=r"(text_model|vision_model|image_to_text_projection)\..*?(q_proj|k_proj|v_proj|out_proj|fc1|fc2|dense)",
)


class MobileVLALSTMDecoder(nn.Module):
    """Action-token states over time -> velocities in (-1, 1). One direction only: step i knows frames 0..i."""

    def __init__(self, in_features, hidden_size, num_layers, fwd_pred_next_n, action_dim=2):
        super().__init__()
        self.fwd_pred_next_n, self.action_dim = fwd_pred_next_n, action_dim
        self.rnn = nn.LSTM(in_features, hidden_size, num_layers, batch_first=True)
        sizes, layers = (hidden_size, 1024, 512, 256, fwd_pred_next_n * action_dim), []
        for wide, narrow in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
            nn.init.xavier_uniform_(layers[-2].weight)
            nn.init.zeros_(layers[-2].bias)
        self.mlp = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, tok_seq, h_0=None):
        """tok_seq (B, S, latent, D) or (B, S, latent * D) -> (velocities (B, S, N, 2), None: no gripper)."""
        x, _ = self.rnn(tok_seq.flatten(2), h_0)
        return self.mlp(x).unflatten(-1, (self.fwd_pred_next_n, self.action_dim)), None

    def loss(self, pred_action, labels, attention_mask, count=None):
        """Huber loss (delta 1) of (velocities, None) against (velocity_chunck, None) where attention_mask (B, S, N) is
        True: its mean (0 if it is nowhere), or its sum / `count`. window_loss (B,): the mean in each window."""
        error = F.huber_loss(pred_action[0].float(), labels[0], reduction="none") * attention_mask[..., None]
        counts = attention_mask.sum((1, 2)) * self.action_dim
        loss = error.sum() / (counts.sum().clamp(min=1) if count is None else count)
        window_loss = error.detach().sum((1, 2, 3)) / counts.clamp(min=1)
        return dict(loss_velocity=loss, loss_gripper=None, acc_gripper=None, window_loss=window_loss)


class MobileVLA(nn.Module):
    """Kosmos-2 on every frame, then the LSTM head over frames. Names and order of arguments are those of the guide's
    BaseRoboVLM.forward_continuous. `vlm`: transformers' Kosmos2Model, or peft's wrapper of it."""

    def __init__(self, vlm, backbone, image_ids, cfg):
        super().__init__()
        width, head = backbone.config.text_config.embed_dim, cfg.act_head
        self.backbone, self.queries = vlm, backbone.config.latent_query_num
        self.action_token = nn.Parameter(torch.randn(width) * 0.02)
        self.act_head = MobileVLALSTMDecoder(width, head.hidden_size, head.num_layers, cfg.fwd_pred_next_n)
        for name, value in dict(image_ids=image_ids, mean=backbone.mean, std=backbone.std).items():
            self.register_buffer(name, torch.tensor(value), persistent=False)
        adapters = [name for name, _ in vlm.named_parameters() if "lora_" in name]
        self.vision_trains = any("text_model" not in name for name in adapters)

    def train(self, mode=True):
        """The frozen backbone stays in eval mode, without dropout; only the adapters' dropout follows `mode`."""
        super().train(mode)
        self.backbone.eval()
        for name, module in self.backbone.named_modules():
            if "lora_dropout" in name:
                module.train(mode)
        return self

    def image_embeds(self, rgb):
        """(n, 3, side, side) uint8 RGB -> (n, Q, D), once per frame."""
        with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
            pixels = (rgb.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]
            pixels = pixels.to(self.backbone.vision_model.model.embeddings.patch_embedding.weight.dtype)
            return self.backbone.get_image_features(pixels, return_dict=True).pooler_output

    def encode(self, image_embeds, lang_x, text_mask):
        """Frames (n, Q, D) with their text (n, L), text_mask (n, L) -> hidden state of the action token ACT (n, D).

        <s> <image> Q image tokens </image> <grounding> text </s> ACT: Kosmos-2's own layout, and ACT right behind the
        last valid token, since behind the padding its position would depend on the other texts of the batch."""
        n = len(lang_x)
        begin, end = (self.image_ids[k].expand(n, 1) for k in (0, 1))
        ids = torch.cat([lang_x[:, :1], begin, end, lang_x[:, 1:], lang_x[:, -1:]], dim=1)  # the last: room for ACT
        words = self.backbone.text_model.model.embed_tokens(ids).float()
        x = torch.cat([words[:, :2], image_embeds.float(), words[:, 2:]], dim=1)  # (n, Q + L + 3, D)
        at = self.queries + 2 + text_mask.sum(1, keepdim=True)  # (n, 1), where ACT goes
        positions = torch.arange(x.shape[1], device=x.device)
        x = torch.where((positions == at)[..., None], self.action_token, x)
        mask = (positions <= at).long()
        out = self.backbone.text_model(inputs_embeds=x, attention_mask=mask, use_cache=False, return_dict=True)
        return out.last_hidden_state.gather(1, at[..., None].expand(-1, 1, x.shape[-1]))[:, 0]

    def forward_continuous(self, vision_x, lang_x, text_mask, frames):
        """vision_x (n, 3, side, side) uint8, each encoded once | lang_x, text_mask (B, L) | frames (B, W): which of
        them a window observes, oldest first -> (velocities (B, W, N, 2) in (-1, 1), None)."""
        windows = torch.arange(len(frames), device=frames.device)[:, None].expand_as(frames)
        window = frames.new_zeros(len(vision_x)).index_put((frames,), windows)  # any that sees the frame has its text
        action_hs = self.encode(self.image_embeds(vision_x), lang_x[window], text_mask[window]).float()  # (n, D)
        with torch.autocast(vision_x.device.type, enabled=False):  # the head is small: always fp32
            return self.act_head(action_hs[frames][:, :, None])  # padding is at the end: no real step sees it

    def forward(self, batch):
        """Batch on the device -> loss_sum (): Huber errors summed over all velocities that exist, for the caller to
        divide by their number in the whole optimizer step | sample_loss (B,): their mean in each window."""
        rgb, _, _, language, text_mask, *rest = process_batch(batch)
        velocity_chunck, chunck_mask = rest[4], rest[6]
        prediction = self.forward_continuous(rgb, language, text_mask, batch["frames"])
        out = self.act_head.loss(prediction, (velocity_chunck, None), chunck_mask, count=1)
        return dict(loss_sum=out["loss_velocity"], sample_loss=out["window_loss"])


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, prompt, cfg, image_size, about, bf16=False):
        """`about`: stats, opposites and contract, from load_data or from a checkpoint."""
        self.model, self.prompt, self.cfg, self.image_size, self.bf16 = model, prompt, cfg, image_size, bf16
        self.stats, self.opposites, self.contract = about["stats"], about["opposites"], Contract(**about["contract"])
        self.normalizer = n = action_normalizer(cfg)
        self.nearest = lambda actions: n.unnormalize(n.normalize(actions))  # the closest that predict can return
        self.reset()

    def reset(self):
        """Forget the images of the drive so far: call it at the start of every episode."""
        self._instruction, self._states = None, None

    @torch.no_grad()
    def action_states(self, vision_x, instructions):
        """Frames (n, 3, side, side) uint8, each with its instruction -> (n, D), 16 at a time."""
        device, states = self.model.action_token.device, []
        ids, masks = (torch.stack(part).to(device) for part in zip(*map(self.prompt.tokens, instructions), strict=True))
        words = slice(int(masks.sum(1).max()))  # of the longest text
        for i in range(0, len(vision_x), 16):
            part = slice(i, i + 16)
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                images = self.model.image_embeds(vision_x[part].to(device))
                states.append(self.model.encode(images, ids[part, words], masks[part, words]).float())
        return torch.cat(states)

    @torch.no_grad()
    def velocities(self, rows):
        """list of (t, D) states of 1 to W frames, oldest first -> (B, N, 2) float32 in [-1, 1], from the newest on."""
        answers = self.model.act_head(nn.utils.rnn.pad_sequence(rows, batch_first=True))[0]
        return answers[range(len(rows)), [len(row) - 1 for row in rows]].cpu().numpy()

    def predict(self, observations):
        """list of {images, instruction} -> (B, N, 2) float32 m/s, linear_x and linear_y of the next steps: see
        label_offset. images: the frames of a drive, (h, w, 3) uint8 RGB, oldest first, of which the last W are used. Or
        {"camera": the newest}, for a single drive: the last W since reset() are remembered, and forgotten when the
        instruction changes, because no training window ever mixed two."""
        self.contract.check(observations, frames=True)
        W, frames, rows = self.cfg.window_size, {}, []  # frames: one that several observations show is encoded once
        for o in observations:
            streamed, text = isinstance(o["images"], dict), o["instruction"]
            require(not streamed or len(observations) == 1, "several drives at once: give each a list of its images")
            images = [o["images"]["camera"]] if streamed else o["images"][-W:]
            rows.append([frames.setdefault((id(image), text), (len(frames), image))[0] for image in images])
        squares = np.stack([resize(np.asarray(image), self.image_size) for _, image in frames.values()])
        states = self.action_states(torch.from_numpy(squares).permute(0, 3, 1, 2), [text for _, text in frames])
        rows = [states[row] for row in rows]
        if streamed:
            known = [self._states] if text == self._instruction else []
            self._instruction, self._states = text, torch.cat([*known, *rows])[-W:]
            rows = [self._states]
        return self.normalizer.unnormalize(self.velocities(rows))

    def rollout(self, vision_x, instruction):
        """As on the robot: (T, 3, side, side) -> (T, N, 2) float32 in [-1, 1], row t from the W frames up to t."""
        W, states = self.cfg.window_size, self.action_states(vision_x, [instruction] * len(vision_x))
        return self.velocities([states[max(0, t - W + 1) : t + 1] for t in range(len(states))])

    def open_episodes(self, root, names=None):
        """For evaluate.py, target (M, 2) in m/s. Files that cannot be read are listed and left out."""
        W, offset = self.cfg.window_size, self.cfg.label_offset
        d = dataclasses.replace(self.cfg.dataset, data_dir=str(root), episode_pattern="*", skip_bad_episodes=True)
        for e in load_episodes(d, names):
            read = picture_reader(e.path, d.colour_order)
            try:
                images, target = [read(i) for i in range(e.num_frames)], e.actions[offset:]
            except (OSError, RuntimeError) as error:
                leave_out(d, f"{e.path}: its images cannot be read ({error})", print)
                continue

            def sample(t, images=images, text=e.instruction):
                return dict(images=images[max(0, t - W + 1) : t + 1], instruction=text)

            yield dict(name=e.name, sample=sample, target=target, hold=np.zeros_like(target), phase=None)

    def action_names(self):
        return self.contract.actions

    def describe(self):
        return self.contract.describe(self)


# ---- build, save, load -----------------------------------------------------------------------------------------------


def open_backbone(source, weights=True, why=""):
    """-> a Kosmos-2 without its weights: folder, config, tokenizer, mean and std (3,) of pixels in 0..1, image_size.
    `why`: see local_folder."""
    from transformers import AutoConfig, AutoProcessor

    folder = local_folder(source, weights, why)
    with opening(folder):
        config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        tokenizer, pixels = processor.tokenizer, processor.image_processor
    another = f"model '{source}' is a {config.model_type}; expected a kosmos-2, e.g. {Config.model}"
    require(config.model_type == "kosmos-2", another)
    about = dict(mean=list(pixels.image_mean), std=list(pixels.image_std), image_size=config.vision_config.image_size)
    return SimpleNamespace(folder=folder, config=config, tokenizer=tokenizer, **about)


def read_backbone(backbone):
    """Yield (name in Kosmos2Model, tensor). No head; a file may hold the tied embedding under the head's name."""
    tied = backbone.config.text_config.tie_word_embeddings
    for name, tensor in read_tensors(backbone.folder):
        name = name.replace("lm_head.", "model.embed_tokens.") if tied else name
        if "lm_head." not in name and not name.endswith("position_ids"):
            yield name, tensor


def build_model(cfg, backbone, prompt, device, dtype=torch.float32):
    """-> MobileVLA on `device`: adapters, action token and head in fp32, the frozen backbone in `dtype`."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    s, ids, known = cfg.train_setup, prompt.image_ids, backbone.config.text_config.vocab_size
    strange = f"the tokenizer of '{cfg.model}' gives <image> and </image> the ids {ids}; its model has {known} ids"
    require(max(ids) < known, f"{strange}: tokenizer and weights do not belong together")
    with torch.random.fork_rng(devices=[]):
        vlm = unfilled(AutoModel.from_config, backbone.config, dtype=dtype).requires_grad_(False)
        vlm.image_to_text_projection.x_attn.is_causal = False  # transformers 5.17 has it causal: wrong numbers
        load_weights(vlm, read_backbone(backbone), backbone.folder, device=device)
        torch.manual_seed(cfg.seed)
        if s.lora_enable:
            shape = dict(r=s.lora_r, lora_alpha=s.lora_alpha, lora_dropout=s.lora_dropout, bias="none")
            vlm = get_peft_model(vlm, LoraConfig(target_modules=LORA_SCOPES[s.lora_scope], **shape))
        return MobileVLA(vlm, backbone, ids, cfg).to(device)


save_model = ckpt.save_state  # a .ckpt: trained weights, the optimizer's moments, plain values


def best_files(folder, new=None):
    """-> {path: val_loss} of the epoch checkpoints in `folder`, and those in `new`, the best first."""
    paths = Path(folder).glob("epoch_*.ckpt")
    found = {path: ckpt.load_state(path, check=False)["val_loss"] for path in paths} | (new or {})
    return {path: found[path] for path in sorted(found, key=lambda p: (math.isnan(found[p]), found[p]))}


def keep_best(run, folder, about, k, write, size):
    """Write a checkpoint of the epoch just validated if it is among the best `k`, then delete those that are not."""
    own = folder / f"epoch_{about['epoch']:02d}-val_loss={about['val_loss']:.3f}.ckpt"
    ranked = list(run.once(best_files, folder, {own: about["val_loss"]}))
    if own not in ranked[:k] or run.save_as(own, write, size):
        for path in ranked[k:] if run.main else ():
            path.unlink(missing_ok=True)


def load_policy(path, device=None, model=None):
    """Open a .ckpt, or the best one of an output_dir. `model`: where the backbone is now, if it has moved."""
    path = Path(path)
    if path.is_dir():
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        path = next(iter(best_files(folder)), folder / "last.ckpt")
    saved = ckpt.read_checkpoint(path, SCRIPT, FORMAT)
    cfg = config_from(Config, saved["config"])
    why = "" if model else f", where the training of {path} found it: link it there, or load_policy(path, model=DIR)"
    backbone = open_backbone(model or cfg.model, why=why)
    check_backbone(path, saved, weight_digest(backbone.folder))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bf16 = device.type == "cuda" and cfg.train_setup.precision != "32-true"
    prompt = Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    core = build_model(cfg, backbone, prompt, device, torch.bfloat16 if bf16 else torch.float32)
    frozen = tuple(name for name, p in core.named_parameters() if not p.requires_grad)
    load_weights(core, saved["trained"].items(), path, missing_ok=frozen)
    core.eval()  # no requires_grad_(False): without gradients an LSTM on a CPU rounds differently
    return Policy(core, prompt, cfg, backbone.image_size, saved, bf16)


def check_backbone(path, saved, digest):
    another = f"{path} was trained on a backbone with digest {saved['backbone'][:8]}, this one has {digest[:8]}"
    require(digest == saved["backbone"], f"{another}. Give the right one")


# ---- validation ------------------------------------------------------------------------------------------------------


def measure(predicted, target, mask, scale):
    """predicted, target (n, N, 2) in [-1, 1], mask (n, N): the steps that count -> {loss (Huber), mae_linear_x,
    rmse_linear_x, ... (m/s), direction_accuracy: of the steps whose linear_y leaves the dead band, the share whose
    sign is right}; a metric without steps is left out."""
    a, b = (v[mask].astype(np.float64) for v in (predicted, target))  # (k, 2)
    error, turns, out = np.abs(a - b), np.abs(b[:, 1]) > DEAD_BAND, {}
    if len(a):
        out = dict(loss=np.where(error <= 1, error**2 / 2, error - 0.5).mean())
        for axis, e, unit in zip("xy", error.T, scale, strict=True):
            out |= {f"mae_linear_{axis}": unit * e.mean(), f"rmse_linear_{axis}": unit * math.sqrt((e**2).mean())}
    if turns.any():
        out["direction_accuracy"] = (np.sign(a[:, 1]) == np.sign(b[:, 1]))[turns].mean()
    return out


def blind_table(episodes, cfg):
    """Predictions of baselines that see nothing: the mean action in [-1, 1] at every time of an episode, and as the
    last row the mean over all times -> (n + 1, 2)."""
    actions, rows = [action_normalizer(cfg).normalize(e.actions) for e in episodes], []
    for t in range(max(e.num_frames for e in episodes)):
        rows.append(np.mean([a[t] for a in actions if t < len(a)], axis=0))
    return np.stack([*rows, np.concatenate(actions).mean(0)])


def validate(policy, dataset, blind, run):
    """Run every validation episode once, each frame with the last W up to it -> {val_loss, val_mae_linear_y, ...}.

    swap_change: mean |velocity(text) - velocity(opposite text)| in m/s on the same frames; swap_flip: of the steps that
    turn, how many turn the other way (linear_y changes its sign). A policy that ignores the text has 0 and 0.
    val_swap_ratio: error with another episode's images / with its own. A policy that ignores them has 1."""
    cfg, scale, rows = policy.cfg, np.array(policy.cfg.dataset.action_scale), []
    texts = sorted({e.instruction for e in dataset.episodes})
    others = partners([e.name for e in dataset.episodes], [texts.index(e.instruction) for e in dataset.episodes])
    policy.model.eval()
    for k, e in progress([*enumerate(dataset.episodes)][run.rank :: run.world], "validation", "episode"):
        rgb = dataset.pictures(e, np.arange(e.num_frames))
        after = np.arange(e.num_frames)[:, None] + np.arange(cfg.fwd_pred_next_n) + cfg.label_offset  # (T, N)
        actions = policy.normalizer.normalize(e.actions)
        answer, opposite = policy.rollout(rgb, e.instruction), policy.opposites.get(e.instruction)
        row = dict(answer=answer, target=actions[np.minimum(after, len(actions) - 1)], exists=after < len(actions))
        row["other_text"] = policy.rollout(rgb, opposite) if opposite else np.full_like(answer, np.nan)
        row["other_rgb"] = np.full_like(answer, np.nan)
        if others is not None and k < SWAPPED:  # of the same instruction where there is one, at the same progress
            other = dataset.episodes[others[k]]
            rgb = dataset.pictures(other, np.arange(e.num_frames) * other.num_frames // e.num_frames)
            row["other_rgb"] = policy.rollout(rgb, e.instruction)
        timed = blind[np.minimum(after, len(blind) - 1)]
        row |= dict(zeros=np.zeros_like(timed), mean=np.broadcast_to(blind[-1], timed.shape), per_time=timed)
        rows.append(row | dict(side=np.full(after.shape, e.side)))
    policy.model.train()
    rows = sum(run.gather(rows), [])
    v = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    answer, flipped, target, exists, side = (v[key] for key in ("answer", "other_text", "target", "exists", "side"))
    out = {f"val_{name}": value for name, value in measure(answer, target, exists, scale).items()}
    out |= dict(val_loss_velocity_act=out["val_loss"], val_loss_arm_act=out["val_loss"])  # the guide's names
    parts = dict(val_left=(answer, exists & (side > 0)), val_right=(answer, exists & (side < 0)))
    parts |= {f"blind_{name}": (v[name], exists) for name in ("zeros", "mean", "per_time")}
    for prefix, (predicted, mask) in parts.items():
        values = measure(predicted, target, mask, scale)
        out |= {f"{prefix}_{name}": value for name, value in values.items() if "rmse" not in name}
    error, change = np.abs(answer - target) * scale, np.abs(flipped - answer) * scale  # m/s; NaN: not measured
    swapped = np.abs(v["other_rgb"] - target) * scale
    for j in range(cfg.fwd_pred_next_n):
        out |= {f"val_mae_step_{j + 1}": error[exists[:, j], j].mean()} if exists[:, j].any() else {}
    heard, seen = (exists & np.isfinite(x[..., 0]) for x in (change, swapped))
    turns = heard & (np.abs(target[..., 1]) > DEAD_BAND)
    out |= dict(swap_change=change[heard].mean()) if heard.any() else {}
    out |= dict(swap_flip=(np.sign(flipped[turns, 1]) == -np.sign(answer[turns, 1])).mean()) if turns.any() else {}
    out |= dict(val_swap_ratio=swapped[seen].mean() / max(error[seen].mean(), 1e-9)) if seen.any() else {}
    return {name: float(value) for name, value in out.items()}


def validation_text(v):
    share = {key: f"{v.get(key, math.nan):.1%}" for key in ("val_direction_accuracy", "swap_flip")}
    swap = "no instruction of the opposite direction: no swap test"
    if "swap_change" in v:
        swap = f"opposite text: {v['swap_change']:.3f} m/s, {share['swap_flip']} of turns flip"
        swap += " (it does not listen to the text)" if v["swap_change"] < 0.01 else ""
    mae = f"MAE x {v['val_mae_linear_x']:.3f} y {v['val_mae_linear_y']:.3f} m/s"
    blind = ", ".join(f"{n} {v[f'blind_{n}_loss']:.4f}" for n in ("zeros", "mean", "per_time"))
    start = f"val_loss {v['val_loss']:.4f} | {mae} | direction {share['val_direction_accuracy']}"
    ratio = v.get("val_swap_ratio", math.nan)
    look = "it does not look at its images: " if ratio < LOOKS else ""
    return f"{start} | {swap} | {look}with another episode's {ratio:.2f} x the error | blind loss: {blind}"


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, total, cfg):
    """Learning rate of update `step` (from 0) of `total` (max_epochs, or max_steps): warm-up, then the scheduler."""
    warmup, scale = cfg.warmup_epochs / cfg.trainer.max_epochs * total, 1.0
    if cfg.scheduler == "cosine":
        progress = min(1.0, max(0.0, (step - warmup) / max(1.0, total - warmup)))
        scale = cfg.min_lr_scale + (1 - cfg.min_lr_scale) * 0.5 * (1 + math.cos(math.pi * progress))
    return cfg.learning_rate * scale * min(1.0, (step + 1) / warmup if warmup > 0 else 1.0)


def describe(cfg, data, dataset, say):
    """Print what was found: episodes, scenarios, instructions and their sources, action ranges; warn of what is odd."""
    d, train, held, texts = cfg.dataset, data.train, data.validation, {e.instruction for e in data.train}
    frames, windows = sum(e.num_frames for e in train), [len(starts) for _, starts in dataset.samples]
    say(f"data      {len(train)} training episodes, {frames} frames; {len(held)} validation episodes; {d.data_dir}")
    most = cfg.batch_size * (max(windows) + cfg.window_size - 1)
    say(f"samples   {len(windows)} with {sum(windows)} windows; a micro-batch encodes up to {most} images, each once")
    groups = Counter(e.recorded[1] or "(no scenario in the name)" for e in held)
    say(f"held out  {', '.join(f'{count} {group}' for group, count in sorted(groups.items())[:12])}")
    sources = Counter(e.source for e in [*train, *held])
    where = f"from the file {sources['file']}, from its name {sources['name']}, from the config {sources['config']}"
    say(f"text      {where}; {len(texts)} instruction(s), e.g. {train[0].instruction!r}")
    for text, other in sorted(data.opposites.items())[:4]:
        say(f"opposite  {text!r} -> {other!r}: to test whether the policy listens")
    s = data.stats["action"]
    numbers = "; ".join(f"{k} {s[k][0]:.3g} {s[k][1]:.3g}" for k in ("mean", "std", "min", "max"))
    say(f"action    linear_x, linear_y in m/s: {numbers}; {d.action_scale} becomes 1")
    moved = np.abs(np.concatenate([e.actions for e in train]))
    cut = np.maximum(moved - d.action_scale, 0).sum(0) / np.maximum(moved.sum(0), 1e-9)
    if len(texts) == 1:
        say("warning   every training episode has the same instruction: the policy cannot learn to listen to it")
    unknown = [text for text in sorted(texts) if dataset.unknown in dataset.tokens(text)[0]]
    if unknown:
        say(f"warning   the tokenizer does not know all words of {len(unknown)} instruction(s), e.g. {unknown[0]!r}")
    if cut.max() > 5e-4:
        say(f"warning   action_scale {d.action_scale} cuts off {cut[0]:.1%} of the motion in x, {cut[1]:.1%} in y")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights, nor a tokenizer."""
    size, prompt = 224, None
    try:
        backbone = open_backbone(cfg.model, weights=False)
        size, prompt = backbone.image_size, Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    except MissingFile as error:
        print(f"note      text tokens are not shown: {error}")
    data = load_data(cfg)

    def read(path, frames):
        return np.stack([picture_reader(path, cfg.dataset.colour_order, size)(i) for i in frames])

    dataset = MobileVLAH5Dataset(data.train, cfg, read, prompt)
    describe(cfg, data, dataset, print)
    order = GlobalOrder(len(dataset), cfg.seed)
    samples = [dataset[(p, order.index(p))] for p in range(min(cfg.batch_size, len(dataset)))]
    first = samples[0]
    for key, v in dataset.collater(samples).items():
        if isinstance(v, torch.Tensor) and v.numel():
            span = f"{v.min().item():.4g} .. {v.max().item():.4g}"
            print(f"          {key:<20} {str(tuple(v.shape)):<28} {str(v.dtype).removeprefix('torch.'):<8} {span}")
    means = "red {:.0f}, green {:.0f}, blue {:.0f}".format(*first["rgb"].float().mean((0, 2, 3)).tolist())
    print(f"colours   the mean is {means}; if red and blue look exchanged, dataset.colour_order is wrong")
    if prompt:
        decoded = prompt.tokenizer.decode(first["text"][0][first["text_mask"][0]])
        print(f"lang      {first['lang']!r} -> {decoded!r}")
        plan.check(cfg, dataset, dataset.collater, lambda c, dtype: build_model(c, backbone, prompt, "cpu", dtype))
    print("check passed")


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    t, precision, folder = cfg.trainer, cfg.train_setup.precision, Path(cfg.output_dir) / "checkpoints"
    cfg.model = stored_source(cfg.model)
    bf16 = torch.cuda.is_available() and precision != "32-true"
    run = Run(cfg, cfg.output_dir, cfg.batch_size, t.accumulate_grad_batches, bf16)
    if run.bf16 and precision == "16-mixed":
        run.print("precision 16-mixed is run as bf16-mixed: as fast, and it needs no loss scale")
    path = run.find(cfg.resume, folder, ["last.ckpt", "epoch_*.ckpt"])
    saved = ckpt.read_checkpoint(path, SCRIPT, FORMAT) if path else None
    backbone = open_backbone(cfg.model)
    side, prompt = backbone.image_size, Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    store = FrameStore(cfg.dataset.frame_dir, (side, side, 3), ["bicubic", cfg.dataset.colour_order])
    data = load_data(cfg, store, run.print, run.rank / run.world, saved and saved.get("episodes"))
    digest = run.once(weight_digest, backbone.folder)
    for e in [*data.train, *data.validation]:
        prompt.tokens(e.instruction)  # a text that is too long is an error now, not in the middle of the run
    if saved:
        check_backbone(path, saved, digest)
        run.restore(path, saved, data.fingerprint, FIXED)

    # ---- data
    dataset, held_out = (MobileVLAH5Dataset(part, cfg, store.read, prompt) for part in (data.train, data.validation))
    describe(cfg, data, dataset, run.print)
    n = len(dataset)
    # an optimizer step may span two epochs: no sample is dropped
    total = run.step + math.ceil((t.max_epochs * n - run.position) / run.global_batch)
    if not run.plan(min(total, t.max_steps or total), f"trainer.max_epochs (now {t.max_epochs}) or max_steps"):
        return

    # ---- model, optimizer
    plan.check(cfg, dataset, dataset.collater, lambda c, dtype: build_model(c, backbone, prompt, "cpu", dtype), run)
    core = build_model(cfg, backbone, prompt, run.device, torch.bfloat16 if bf16 else torch.float32)
    policy = Policy(core, prompt, cfg, side, vars(data), bf16)
    model = run.prepare(core.train())
    trained = [p for p in core.parameters() if p.requires_grad]
    fused = run.device.type == "cuda" or None
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=fused)
    about = dict(epoch=0, val_loss=math.nan)  # of the last validation
    if saved:
        ckpt.restore_training_state(core, optimizer, saved["trained"], saved["moments"])
        about = {key: saved[key] for key in about}
        saved = None  # frees what is mapped from the file
    meta = dict(script=SCRIPT, validation=[e.name for e in data.validation])
    about |= {key: value for key, value in vars(data).items() if key not in ("train", "validation")}
    about |= dict(format_version=FORMAT, meta=meta, backbone=digest)
    size = 12 * sum(p.numel() for p in trained)  # fp32 weights and two moments
    run.describe(core, n, size, folder, " (LoRA r {lora_r} on {lora_scope})".format_map(vars(cfg.train_setup)))
    loader = run.loader(dataset, GlobalOrder(n, cfg.seed), dataset.collater, cfg.num_workers)
    run.write("meta.json", json.dumps(meta))  # for evaluate.py
    run.write("validation_episodes.txt", "".join(f"{e.name}\n" for e in data.validation))
    blind = blind_table(data.train, cfg)

    def collect():
        trained, moments = ckpt.training_state(core, optimizer)
        return about | run.progress() | dict(trained=trained, moments=moments)

    # ---- loop
    run.checkpoints(folder, "last.ckpt", save_model, size, collect)
    for step in run.steps(loader, cfg.wandb_project, cfg.wandb):
        # velocities that exist, of the whole optimizer step over all ranks: what the loss is divided by
        elements = run.sum(2 * sum(int(b["chunck_mask"].sum()) for b in step.batches))
        for batch in step.micro_batches(model):
            out = model(batch)
            step.backward(out["loss_sum"] / elements, out["sample_loss"])
        step.update(optimizer, lr_at(step.index, run.total, cfg), t.gradient_clip_val)

        if step.every(t.log_every_n_steps):
            loss, norm = step.mean()["loss"], step.mean()["grad_norm"]
            values = dict(train_loss=loss, train_loss_velocity_act=loss, train_loss_arm_act=loss)  # the guide's names
            values |= dict(train_grad_norm=norm, lr=step.lr, epoch=run.position / n)
            step.log(values, f"epoch {run.position / n:5.2f} | loss {loss:.4f} | grad {norm:.3f}")
        epoch_end = step.passed(n * t.every_n_epochs)
        if epoch_end and data.validation:
            values = validate(policy, held_out, blind, run)
            # counted from 0: the epoch that this step completed, else the current one
            epoch = min(run.position // n - (run.position // n > step.first // n), t.max_epochs - 1)
            step.validated(values, values["val_loss"], f"epoch {epoch} | {validation_text(values)}")
            about |= dict(epoch=epoch, val_loss=values["val_loss"])
            keep_best(run, folder, about, t.save_top_k, lambda path: save_model(path, collect()), size)
        if epoch_end:
            run.save()

    best = next(iter(run.once(best_files, folder)), folder / "last.ckpt")
    evaluate = command("evaluate.py", checkpoint=best, data=cfg.dataset.data_dir)
    run.finish(f"model: {best}", f"evaluate: {evaluate}", plot=("train_loss", "val_loss"))


if __name__ == "__main__":
    launch(main, Config, ALIASES, ACCEPTED)
