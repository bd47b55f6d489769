"""NORA: Qwen2.5-VL fine-tuned to answer an image and an instruction with FAST action tokens, on your own HDF5 episodes.

Model and token layout: declare-lab/nora (Qwen2.5-VL-3B + 2048 <robot_action_i> tokens). FAST: Pertsch et al. 2025, arXiv 2501.09747,
re-implemented here from its published description. One training sample is one frame: image(s) of frame t -> the next H actions.

    python train_nora.py --config configs/nora.yaml --check                     # look at the data, no weights needed
    bash shells/train_nora.sh                                                   # one GPU
    bash shells/train_nora.sh --multi-gpu --num-gpus 4                          # four; the same as: torchrun --nproc_per_node=4 train_nora.py ...
    python train_nora.py --config configs/demo/nora.yaml --max_steps 20         # smoke run on a CPU, on make_demo.py's output

Output, in output_dir: steps_N/ (model/ opens with transformers' from_pretrained and with load_policy, state.pt resumes), metrics.jsonl, loss.png.

Letters in shapes: B batch, K cameras, H action horizon, A action dims, L tokens of a row, D width, V vocabulary, T image tokens of a camera.
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
import gc
import hashlib
import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import checkpoint as ckpt
from common import episodes as ep
from common.config import parse_config, save_config
from common.qwen_vl import batch_vision_attention, image_patches, pick_attention, rope_positions
from common.runlog import RunLog, WandbConfig, memory_gb, plot_loss, report_nonfinite
from common.sampler import GlobalOrder, RankBatches, generator_at, torch_seed_at
from common.stats import Normalizer, load_stats, save_stats

FORMAT = 1  # of steps_N/state.pt and model/policy.json
ACTION_TOKEN = "<robot_action_{}>"
NUM_ACTION_TOKENS = 2048  # nora's vocabulary: <robot_action_0> .. <robot_action_2047>


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with .h5 episodes, searched recursively
    horizon: int = 1  # H, future actions per sample, in frames
    use_ee_pose_delta_as_action: bool = False  # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if any value exceeds 2 pi
    cameras: list[str] = field(
        default_factory=lambda: ["camera1"]
    )  # views the model sees, in this order: camera1..K or recorded names
    resize_resolution: list[int] = field(default_factory=lambda: [224, 224])  # height, width in pixels, multiples of 28
    task_instruction: str = "Insert the needle into the target point"  # used where a file has no language_instruction
    state_in_prompt: bool = False  # append the robot state, in 256 bins, to the instruction
    use_ee_pose: bool = True  # the state (only with state_in_prompt) contains ee_pose
    use_qpos: bool = False  # the state (only with state_in_prompt) contains qpos, before ee_pose
    num_val_episodes: int = 0  # the last N files of the sorted list are held out
    normalization_stats_path: str | None = (
        None  # statistics file of compute_stats.py; null: computed from the training episodes
    )
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    augment: bool = False  # colour augmentation of training images
    augment_brightness: float = 0.2  # +- this share of full scale
    augment_contrast: float = 0.2  # factor 1 +- this
    augment_saturation: float = 0.2  # factor 1 +- this
    augment_hue: float = 0.05  # +- this share of the hue circle
    augment_noise: float = 0.02  # std of Gaussian noise, share of full scale
    camera_dropout_prob: float = 0.0  # with this probability only min_cameras..K views stay, the others go black
    min_cameras: int = 1  # views that always stay


@dataclass
class Config:
    model: str = "declare-lab/nora"  # backbone: hub id or directory (a Qwen2.5-VL without action tokens gets them)
    fast: str = (
        "physical-intelligence/fast"  # FAST tokenizer: hub id, directory, or "fit" to train one on these actions
    )
    fast_vocab_size: int = 1024  # with fast: fit, at most 2048
    fast_scale: float = 10.0  # with fast: fit, steps per unit of a DCT coefficient
    output_dir: str = "outputs/nora"  # checkpoints and logs
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    train: Literal["full", "lora", "head"] = (
        "full"  # all weights | LoRA on the language model + action rows | embedding table only
    )
    lora_rank: int = 32  # with train: lora
    lora_alpha: int = 32  # with train: lora; scale = alpha / rank
    lora_dropout: float = 0.0  # with train: lora
    per_device_batch_size: int = 8  # samples per GPU and micro-batch
    gradient_accumulation_steps: int = 2  # micro-batches per optimizer step
    learning_rate: float = 5e-5  # peak; AdamW betas 0.9 0.95, eps 1e-8
    weight_decay: float = 1e-8  # decoupled
    num_warmup_steps: int = 1000  # optimizer steps of linear warm-up
    max_train_steps: int = 100000  # optimizer steps; the cosine ends at 0 here
    gradient_clipping: float | None = 1.0  # largest gradient norm; null: no clipping
    gradient_checkpointing: bool = False  # recompute activations: less memory, about a third slower
    mixed_precision: Literal["auto", "no", "bf16"] = (
        "auto"  # auto: bf16 on CUDA, no elsewhere; trained weights are fp32 in any case
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = (
        "auto"  # auto: flash if installed (CUDA), else sdpa
    )
    fsdp: bool = False  # shard weights, gradients and moments over the ranks (FSDP2; train: full)
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 42  # of order, augmentation and dropout
    checkpoint_save_frequency: int = 5000  # optimizer steps
    keep_checkpoints: int = 3  # newest ones kept beside the best; 0: all
    logging_frequency: int = 100  # optimizer steps
    val_frequency: int = 1000  # optimizer steps
    val_samples: int = 256  # frames of the held-out episodes for the loss, evenly spread
    val_decode_samples: int = 64  # of these, frames whose actions are decoded for the MAE
    resume_from_checkpoint: str | None = None  # steps_N directory, or "auto" for the newest one in output_dir
    load_model_weights: str | None = None  # start from these weights: checkpoint directory, .safetensors or .pt file
    wandb_project_name: str = "NORA VLA Training"  # W&B project
    wandb: WandbConfig = field(default_factory=WandbConfig)
    check: bool = False  # read the data, build and print one batch, stop
    check_images: bool = False  # with check: decode every image once
    merge: str | None = None  # merge the LoRA adapter of this steps_N directory into steps_N/merged, stop


ALIASES = {
    "resume": "resume_from_checkpoint",
    "max_steps": "max_train_steps",
    "batch_size": "per_device_batch_size",
    "lr": "learning_rate",
}


# ---- FAST action tokenizer -------------------------------------------------------------------------------------------


class FastTokenizer:
    """(H, A) chunk in [-1, 1] <-> list of ids: DCT along time, rounding, characters, byte-level BPE (reference/nora.md section 3).

    Every id stands for a fixed byte string, one UTF-8 character per DCT coefficient, ordered (frequency, dim). `fits` uses this
    to keep generation on exactly H*A coefficients.
    """

    def __init__(self, bpe, scale, min_token):
        self.bpe, self.scale, self.min_token, self.vocab_size = bpe, float(scale), int(min_token), bpe.get_vocab_size()
        self.clipped = 0  # coefficients that had no symbol, since construction
        self.bytes = _token_bytes(bpe)
        shape = np.array([_utf8_shape(b) for b in self.bytes])  # (V, 4)
        self.lead, self.starts, self.tail = shape[:, 0], shape[:, 1], shape[:, 2]
        closable = bool(((self.lead == 1) & (self.starts == 0) & (self.tail == 0) & (shape[:, 3] == 1)).any())
        self.valid = (shape[:, 3] == 1) & (
            (self.tail == 0) | closable
        )  # an open character must be closable by some token
        # a coefficient can be coded only if its character survives the round trip: probe, as the file does not say
        codable = [v for v in range(2048) if bpe.decode(bpe.encode(chr(v)).ids, skip_special_tokens=False) == chr(v)]
        if not codable:
            raise ValueError("the FAST tokenizer.json cannot code a single coefficient; expected a byte-level BPE")
        nearest = np.searchsorted(codable, np.arange(2048)).clip(max=len(codable) - 1)
        codable = np.array(codable)
        lower = codable[(nearest - 1).clip(min=0)]
        self.nearest = np.where(
            np.abs(lower - np.arange(2048)) <= np.abs(codable[nearest] - np.arange(2048)), lower, codable[nearest]
        )

    @classmethod
    def load(cls, source):
        """From a directory in the public layout (processor_config.json + tokenizer.json) or a hub id. No remote code."""
        from tokenizers import Tokenizer

        try:
            files = {name: hub_file(source, name) for name in ("processor_config.json", "tokenizer.json")}
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"FAST tokenizer '{source}': {error}. Expected the public layout, processor_config.json + tokenizer.json: "
                "give a local directory (--fast DIR), or train one on your actions (--fast fit)"
            ) from error
        again = "expected the public layout; download it again, or train one on your actions (--fast fit)"
        try:
            meta = json.loads(files["processor_config.json"].read_text())
            scale, min_token = float(meta["scale"]), int(meta["min_token"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"FAST tokenizer '{source}': processor_config.json has no scale and min_token ({error!r}); {again}"
            ) from error
        try:
            bpe = Tokenizer.from_file(str(files["tokenizer.json"]))
        except Exception as error:  # tokenizers raises nothing more specific
            raise ValueError(f"FAST tokenizer '{source}': tokenizer.json cannot be read ({error}); {again}") from error
        return cls(bpe, scale, min_token)

    def save(self, folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.bpe.save(str(folder / "tokenizer.json"))
        (folder / "processor_config.json").write_text(
            json.dumps(
                dict(
                    action_dim=None,
                    min_token=self.min_token,
                    processor_class="UniversalActionProcessor",
                    scale=self.scale,
                    time_horizon=None,
                    vocab_size=self.vocab_size,
                ),
                indent=2,
            )
        )
        (folder / "tokenizer_config.json").write_text(
            json.dumps(dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False), indent=2)
        )

    @classmethod
    def fit(cls, chunks, scale=10.0, vocab_size=1024):
        """Train on a list of (H, A) chunks. All 256 byte symbols are in the alphabet, so no coefficient can vanish (the published fit
        leaves out bytes it did not see)."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        if not 256 <= vocab_size <= NUM_ACTION_TOKENS:
            raise ValueError(
                f"fast_vocab_size is {vocab_size}: expected 256 (one per byte) to {NUM_ACTION_TOKENS} (the model's action tokens)"
            )
        quantised = [np.rint(dct_matrix(len(c)) @ c * scale).astype(int).ravel() for c in chunks]
        low, high = min(q.min() for q in quantised), max(q.max() for q in quantised)
        # leave room below for actions that the fit did not see: |x| <= 1 bounds a coefficient by scale * sqrt(H)
        low = min(low, -math.ceil(scale * math.sqrt(max(len(c) for c in chunks))))
        if high - low >= 2048:
            raise ValueError(f"DCT coefficients span {low}..{high}: actions must be normalised to [-1, 1] before FAST")
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            max_token_length=10000,
            show_progress=False,
        )
        bpe.train_from_iterator(["".join(map(chr, q - low)) for q in quantised], trainer)
        return cls(bpe, scale, low)

    def encode(self, chunk):
        """(H, A) -> ids. A coefficient without a symbol becomes the nearest one that has, and is counted in `clipped`."""
        q = np.rint(dct_matrix(len(chunk)) @ np.asarray(chunk, np.float64) * self.scale).astype(np.int64).ravel()
        v = self.nearest[np.clip(q - self.min_token, 0, 2047)]
        self.clipped += int((v != q - self.min_token).sum())
        return self.bpe.encode("".join(map(chr, v))).ids

    def decode(self, ids, horizon, dim):
        """ids -> ((H, A) float32, status "ok" | "short" | "long" | "invalid").

        Short is filled with zero coefficients, long is cut, bytes that are no UTF-8 become zero coefficients ("invalid"); a coefficient is
        bounded by what |x| <= 1 allows, so a wrong token cannot become a huge motion.
        """
        raw = b"".join(self.bytes[i] for i in ids)
        text = raw.decode("utf-8", errors="replace")
        q = np.array([ord(c) for c in text], np.int64) + self.min_token
        broken = np.array([c == "\ufffd" for c in text], bool)
        status = (
            "invalid"
            if broken.any()
            else "ok"
            if len(q) == horizon * dim
            else "short"
            if len(q) < horizon * dim
            else "long"
        )
        q[broken] = 0
        q = np.pad(q[: horizon * dim], (0, max(0, horizon * dim - len(q))))
        bound = math.ceil(self.scale * math.sqrt(horizon))
        c = np.clip(q, -bound, bound).reshape(horizon, dim) / self.scale
        return (dct_matrix(horizon).T @ c).astype(np.float32), status


def hub_file(source, name):
    """Path of a file of a local directory or a hub repository; FileNotFoundError where there is none."""
    if Path(source).is_dir():
        if not (Path(source) / name).is_file():
            raise FileNotFoundError(f"the directory has no {name}")
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), name))
    except Exception as error:  # the hub client raises a dozen types; all mean that the file cannot be had
        raise FileNotFoundError(
            f"{name} is neither in a directory of that name nor on the hub ({type(error).__name__})"
        ) from error


def dct_matrix(n):
    """(n, n) float64 orthonormal DCT-II: coefficients = matrix @ x, x = matrix.T @ coefficients."""
    k, i = np.mgrid[:n, :n]
    return np.sqrt(np.where(k == 0, 1, 2) / n) * np.cos(np.pi * (i + 0.5) * k / n)


def _token_bytes(bpe):
    """The byte string of every id, by the GPT-2 byte <-> character table of ByteLevel; a token with other characters stands for itself."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokens = [bpe.id_to_token(i) for i in range(bpe.get_vocab_size())]
    return [bytes(table[c] for c in t) if all(c in table for c in t) else t.encode("utf-8") for t in tokens]


def _utf8_shape(b):
    """bytes -> (continuation bytes at the start, characters begun, continuation bytes missing at the end, 1 if usable).

    Usable: one- and two-byte characters only (coefficients 0..2047), and at most one continuation byte at the start.
    """
    lead = 0
    while lead < len(b) and 0x80 <= b[lead] < 0xC0:
        lead += 1
    begun, i = 0, lead
    while i < len(b):
        begun += 1
        if b[i] < 0x80:
            i += 1
        elif 0xC2 <= b[i] < 0xE0 and (i + 1 == len(b) or 0x80 <= b[i + 1] < 0xC0):
            i += 2
        else:
            return lead, begun, 0, 0
    return lead, begun, i - len(b), int(len(b) > 0 and lead <= 1)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class PolicySpec:
    """What predict must know beside the weights; saved as model/policy.json, compared when a run is resumed."""

    horizon: int
    cameras: list  # ["camera1", ...] in prompt order
    image_size: list  # [height, width]
    task_instruction: str
    state_keys: list  # [] or a subset of ["qpos", "ee_pose"]: the state in the prompt
    action_definition: dict  # common.episodes.ActionDefinition
    position_unit: str | None  # of ee_pose deltas, for reports


@dataclass
class Data:
    """Episodes of a run, split and described."""

    train: list
    validation: list
    excluded: list  # messages of files left out by skip_bad_episodes
    spec: PolicySpec
    stats: dict
    normalizer: Normalizer
    state_normalizer: Normalizer | None

    @property
    def definition(self):
        return ep.ActionDefinition(**self.spec.action_definition)

    def fingerprint(self):
        """Changes when the training samples or their order would."""
        text = json.dumps(
            [[e.name, e.num_frames] for e in self.train] + [dataclasses.asdict(self.spec)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_data(cfg, rank=0, stats=None):
    """Find, read, split and describe the episodes. `stats`: those of the checkpoint that is resumed, else from the file or the data."""
    d = cfg.dataset
    if d.horizon < 1:
        raise ValueError(f"dataset.horizon is {d.horizon}: expected 1 (one action) or more")
    if len(d.resize_resolution) != 2 or any(s < 28 or s % 28 for s in d.resize_resolution):
        raise ValueError(
            f"dataset.resize_resolution is {d.resize_resolution}: expected [height, width] in multiples of 28 (patch 14 x merge 2), e.g. [224, 224]"
        )
    progress = (
        None if rank else lambda paths: tqdm(paths, desc="reading episodes", unit="file", disable=None, leave=False)
    )
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes, progress)
    train, validation = ep.hold_out_last(found, d.num_val_episodes)
    known = list(found[0].cameras)
    cameras = [c if c not in known else f"camera{known.index(c) + 1}" for c in d.cameras]
    for c in cameras:
        if c not in [f"camera{i + 1}" for i in range(len(known))]:
            raise ValueError(
                f"dataset.cameras has '{c}'; these episodes have "
                + ", ".join(f"camera{i + 1} = {name}" for i, name in enumerate(known))
            )
    if not cameras or not 1 <= d.min_cameras <= len(cameras):
        raise ValueError(
            f"dataset.min_cameras is {d.min_cameras} with dataset.cameras {cameras}: expected 1..{len(cameras)} and at least one camera"
        )
    state_keys = (
        [k for k, use in (("qpos", d.use_qpos), ("ee_pose", d.use_ee_pose)) if use] if d.state_in_prompt else []
    )
    if d.state_in_prompt and (not state_keys or any(getattr(found[0], k) is None for k in state_keys)):
        raise ValueError(
            f"dataset.state_in_prompt needs use_ee_pose and/or use_qpos and those arrays in the files; chosen: {state_keys}, file: {found[0].path}"
        )
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    spec = PolicySpec(
        d.horizon,
        cameras,
        list(d.resize_resolution),
        d.task_instruction,
        state_keys,
        dataclasses.asdict(definition),
        ep.detect_position_unit(found),
    )
    keys = ["action"] + (["observation.state"] if state_keys else [])
    held_out = [e.name for e in validation]
    if stats is None and d.normalization_stats_path:
        stats = load_stats(d.normalization_stats_path, keys, spec.action_definition, held_out)
    if stats is None:
        stats = ep.insertion_stats(train, definition, held_out, state_keys)
    for key, dim in (("action", definition.dim),) + (
        (("observation.state", sum(getattr(found[0], k).shape[1] for k in state_keys)),) if state_keys else ()
    ):
        if len(stats[key]["mean"]) != dim:
            raise ValueError(
                f"the statistics have {len(stats[key]['mean'])} dims for '{key}', the data has {dim}. Make them again with compute_stats.py"
            )
    return Data(
        train,
        validation,
        excluded,
        spec,
        stats,
        Normalizer(stats["action"]),
        Normalizer(stats["observation.state"], "min_max") if state_keys else None,
    )


def resize_image(image, size):
    """(h, w, 3) uint8 -> (height, width, 3) uint8: squash to `size`, bicubic. The one image preprocessing of training and predict."""
    return (
        image
        if image.shape[:2] == tuple(size)
        else np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.BICUBIC))
    )


def augment_image(image, cfg, rng):
    """Contrast and brightness, hue and saturation, noise, on the resized (h, w, 3) uint8 image; every view draws its own."""
    alpha, beta = (
        1 + rng.uniform(-cfg.augment_contrast, cfg.augment_contrast),
        rng.uniform(-cfg.augment_brightness, cfg.augment_brightness) * 255,
    )
    image = np.clip(image * alpha + beta, 0, 255).astype(np.uint8)
    hue, saturation = (
        rng.uniform(-cfg.augment_hue, cfg.augment_hue),
        1 + rng.uniform(-cfg.augment_saturation, cfg.augment_saturation),
    )
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + hue * 256) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 255)
    image = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    if cfg.augment_noise:
        image += rng.standard_normal(image.shape, dtype=np.float32) * (cfg.augment_noise * 255)
    return np.clip(image, 0, 255).astype(np.uint8)


class NoraDataset(Dataset):
    """One item per frame that has a target. Item (position, i), where `position` seeds the augmentation:

    images (K, height, width, 3) uint8 | action (H, A) float32 in data units | is_pad (H,) bool: past the episode's end |
    state (S,) float32 in [-1, 1] or None | instruction str | episode str | frame int | phase int or -1
    """

    def __init__(self, episodes, data, augment=None, seed=0):
        self.episodes, self.spec, self.augment, self.seed = episodes, data.spec, augment, seed
        self.targets = [data.definition.targets(e) for e in episodes]
        self.hold = "zero" if data.definition.source == "ee_pose_delta" else "repeat"
        self.states = (
            [data.state_normalizer.normalize(ep.robot_state(e, data.spec.state_keys)) for e in episodes]
            if data.spec.state_keys
            else None
        )
        self.ends = np.cumsum([len(t) for t in self.targets])
        self.reader = ep.ImageReader()

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i):
        """Sample -> (episode number, frame)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def __getitem__(self, key):
        position, i = key
        e, t = self.locate(i)
        episode, names = self.episodes[e], list(self.episodes[e].cameras)
        images = np.stack(
            [
                resize_image(
                    self.reader.read(episode, names[int(c[6:]) - 1], t, at_least=self.spec.image_size),
                    self.spec.image_size,
                )
                for c in self.spec.cameras
            ]
        )
        if self.augment is not None:
            images = self._augment(images, generator_at(self.seed, position, "augment"))
        # a chunk that runs past the end is completed by standing still: FAST codes the chunk as a whole, so steps cannot be masked in the loss,
        # but is_pad keeps them out of every reported error
        action, is_pad = ep.action_chunk(self.targets[e], t, self.spec.horizon, self.hold)
        return dict(
            images=images,
            action=action,
            is_pad=is_pad,
            state=self.states[e][t] if self.states else None,
            instruction=episode.instruction or self.spec.task_instruction,
            episode=episode.name,
            frame=t,
            phase=-1 if episode.phase is None else int(episode.phase[t]),
        )

    def _augment(self, images, rng):
        cfg = self.augment
        if cfg.augment:
            images = np.stack([augment_image(image, cfg, rng) for image in images])
        if rng.random() < cfg.camera_dropout_prob:
            kept = rng.choice(len(images), rng.integers(cfg.min_cameras, len(images) + 1), replace=False)
            images = np.where(np.isin(np.arange(len(images)), kept)[:, None, None, None], images, 0).astype(np.uint8)
        return images


# ---- prompt and batch ------------------------------------------------------------------------------------------------

QWEN_PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{images}{text}<|im_end|>\n<|im_start|>assistant\n"


class Prompt:
    """Text side of a sample, the same in training and predict: chat template, image places, action ids, positions."""

    def __init__(self, tokenizer, image_token_id, spec, merged_grid):
        self.tokenizer, self.image_token_id, self.spec = tokenizer, image_token_id, spec
        self.grid = merged_grid  # (rows, columns) of image tokens per camera
        self.image_token = tokenizer.convert_ids_to_tokens(image_token_id)
        self.first_action, self.end = (
            tokenizer.convert_tokens_to_ids(ACTION_TOKEN.format(0)),
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
        self.pad = tokenizer.pad_token_id
        last = tokenizer.convert_tokens_to_ids(ACTION_TOKEN.format(NUM_ACTION_TOKENS - 1))
        if self.first_action is None or last != self.first_action + NUM_ACTION_TOKENS - 1:
            raise ValueError(
                f"the tokenizer's action tokens are {self.first_action}..{last}, expected {NUM_ACTION_TOKENS} consecutive ids"
            )
        self._cache = {}

    def text(self, instruction, state=None):
        """The prompt up to the answer, one <|image_pad|> per camera."""
        if state is not None:  # as pi0-FAST: 256 bins over [-1, 1]
            instruction += " State: " + " ".join(str(int(b)) for b in np.clip((np.asarray(state) + 1) * 128, 0, 255))
        if self.tokenizer.chat_template is None:  # an older snapshot keeps it in the processor's files
            return QWEN_PROMPT.format(
                images=f"<|vision_start|>{self.image_token}<|vision_end|>" * len(self.spec.cameras), text=instruction
            )
        content = [{"type": "image"} for _ in self.spec.cameras] + [{"type": "text", "text": instruction}]
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def ids(self, instruction, state=None):
        """Token ids of the prompt, every image place expanded to its T tokens."""
        text = self.text(instruction, state)
        if text not in self._cache:
            if text.count(self.image_token) != len(self.spec.cameras):
                raise ValueError(
                    f"the chat template has {text.count(self.image_token)} image places for {len(self.spec.cameras)} cameras: {text!r}"
                )
            expanded = text.replace(self.image_token, self.image_token * (self.grid[0] * self.grid[1]))
            if len(self._cache) > 4096:  # with the state in the prompt every text is new
                self._cache.clear()
            self._cache[text] = self.tokenizer(expanded, add_special_tokens=False)["input_ids"]
        return self._cache[text]

    def batch(self, prompts, answers=None):
        """Lists of ids -> tensors. With `answers` rows are padded on the right (causal attention never looks there, so no mask is
        needed and the fast kernels stay usable) and the supervised places are listed; without, on the left, for generation.

        input_ids (B, L), position_ids (3, B, L), image_rows (B*K*T,) places of image tokens in the flattened (B*L),
        attention_mask (B, L) [generation] or targets, target_rows, target_sample (M,): label, flattened place that predicts it, row.
        """
        rows = [p + a for p, a in zip(prompts, answers)] if answers else prompts
        length = max(map(len, rows))
        ids, positions = np.full((len(rows), length), self.pad), np.zeros((3, len(rows), length), np.int64)
        for b, row in enumerate(rows):
            at = slice(0, len(row)) if answers else slice(length - len(row), length)
            ids[b, at], positions[:, b, at] = row, rope_positions(row, self.image_token_id, self.grid)
        out = dict(input_ids=ids, position_ids=positions, image_rows=np.flatnonzero(ids.ravel() == self.image_token_id))
        if answers:
            out["targets"] = np.concatenate(answers)
            out["target_rows"] = np.concatenate(
                [b * length + len(p) - 1 + np.arange(len(a)) for b, (p, a) in enumerate(zip(prompts, answers))]
            )
            out["target_sample"] = np.repeat(np.arange(len(rows)), [len(a) for a in answers])
        else:
            out["attention_mask"] = (np.arange(length)[None] >= length - np.array([[len(r)] for r in rows])).astype(
                np.int64
            )
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in out.items()}


@dataclass
class Collate:
    """List of dataset items -> batch on the CPU: Prompt.batch's tensors, images (B, K, height, width, 3) uint8, and the items' names."""

    prompt: Prompt
    fast: FastTokenizer
    normalizer: Normalizer

    def answer(self, action):
        """(H, A) in data units -> token ids: FAST ids as <robot_action_i>, then <|im_end|>."""
        return [self.prompt.first_action + i for i in self.fast.encode(self.normalizer.normalize(action))] + [
            self.prompt.end
        ]

    def __call__(self, items):
        prompts = [self.prompt.ids(item["instruction"], item["state"]) for item in items]
        batch = self.prompt.batch(prompts, [self.answer(item["action"]) for item in items])
        batch["images"] = torch.from_numpy(np.stack([item["images"] for item in items]))
        return batch | dict(names=[(item["episode"], item["frame"]) for item in items])


# ---- model -----------------------------------------------------------------------------------------------------------


class Nora(nn.Module):
    """Qwen2.5-VL seen from a batch of this script. forward(batch) is the loss, forward(batch, generate=(fast, count)) decodes."""

    def __init__(self, vlm, prompt, preprocessor, train_vision=True):
        super().__init__()
        self.vlm, self.prompt, self.preprocessor, self.train_vision = vlm, prompt, preprocessor, train_vision
        self.patch = vlm.config.vision_config.patch_size
        self.register_buffer("mean", torch.tensor(preprocessor["image_mean"]).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocessor["image_std"]).view(3, 1, 1) * 255, persistent=False)

    def embed(self, batch):
        """-> (B, L, D) input embeddings with the image features in their places."""
        images = batch["images"]
        grid = torch.tensor([[1, images.shape[2] // self.patch, images.shape[3] // self.patch]]).repeat(
            images.shape[0] * images.shape[1], 1
        )
        with contextlib.nullcontext() if self.train_vision else torch.no_grad():
            patches = image_patches(images.flatten(0, 1), self.mean, self.std, self.patch)
            features = torch.cat(
                self.vlm.model.get_image_features(patches, grid.to(images.device)).pooler_output
            )  # (B*K*T, D)
        embeds = self.vlm.get_input_embeddings()(batch["input_ids"])
        dtype = (
            torch.get_autocast_dtype(images.device.type)
            if torch.is_autocast_enabled(images.device.type)
            else embeds.dtype
        )
        return embeds.to(dtype).flatten(0, 1).index_copy(0, batch["image_rows"], features.to(dtype)).view(*embeds.shape)

    def compute_loss(self, batch):
        """-> loss_sum (): cross entropy summed over the M supervised tokens | sample_loss (B,): its share per sample | correct (): tokens right.

        The caller divides by the number of supervised tokens of the whole optimizer step. Logits exist only where a label is.
        """
        hidden = self.vlm.model.language_model(
            inputs_embeds=self.embed(batch), position_ids=batch["position_ids"], attention_mask=None, use_cache=False
        ).last_hidden_state
        logits = self.vlm.lm_head(hidden.flatten(0, 1)[batch["target_rows"]]).float()  # (M, V)
        loss = F.cross_entropy(logits, batch["targets"], reduction="none")  # (M,)
        sample_loss = torch.zeros(len(batch["input_ids"]), device=loss.device).index_add(
            0, batch["target_sample"], loss.detach()
        )
        return dict(loss_sum=loss.sum(), sample_loss=sample_loss, correct=(logits.argmax(-1) == batch["targets"]).sum())

    @torch.no_grad()
    def generate(self, batch, fast, count, fixed_steps=False):
        """Greedy decoding limited to action ids and exactly `count` DCT coefficients -> (list of FAST ids per row, malformed (B,) bool).

        malformed: free greedy decoding would have left the format here. `fixed_steps` runs the longest possible number of steps (FSDP ranks must agree).
        """
        device, first, end = batch["input_ids"].device, self.prompt.first_action, self.prompt.end
        table = {k: torch.as_tensor(getattr(fast, k), device=device) for k in ("valid", "lead", "starts", "tail")}
        rows = len(batch["input_ids"])
        remaining, open_, done = (
            torch.full((rows,), count, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )
        malformed, chosen = done.clone(), []
        text = self.vlm.model.language_model
        out = text(
            inputs_embeds=self.embed(batch),
            position_ids=batch["position_ids"],
            attention_mask=batch["attention_mask"],
            use_cache=True,
        )
        mask, position = batch["attention_mask"], batch["position_ids"].amax((0, 2)) + 1
        for _ in range(2 * count + 1):  # a coefficient takes at most two tokens
            logits = self.vlm.lm_head(out.last_hidden_state[:, -1]).float()  # (B, V)
            allowed = (
                table["valid"]
                & (table["lead"] == open_[:, None])
                & (table["starts"] <= remaining[:, None])
                & ~done[:, None]
            )
            finished = (remaining == 0) & (open_ == 0)
            answers = torch.cat(
                [
                    logits[:, first : first + fast.vocab_size].masked_fill(~allowed, -torch.inf),
                    logits[:, end : end + 1].masked_fill(~finished[:, None], -torch.inf),
                ],
                dim=1,
            )
            pick = answers.argmax(-1)  # fast.vocab_size stands for <|im_end|>
            token = torch.where(pick == fast.vocab_size, end, first + pick)
            malformed |= ~done & (logits.argmax(-1) != token)
            step = pick.clamp(max=fast.vocab_size - 1)
            moved = ~done & ~finished
            chosen.append(torch.where(moved, step, -1))
            remaining = torch.where(moved, remaining - table["starts"][step], remaining)
            open_ = torch.where(moved, table["tail"][step], open_)
            done = done | finished
            if not fixed_steps and bool(done.all()):
                break
            mask = torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
            embeds = self.vlm.get_input_embeddings()(token[:, None])
            out = text(
                inputs_embeds=embeds,
                position_ids=position.expand(3, -1)[..., None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            position = position + 1
        ids = torch.stack(chosen, dim=1).tolist()
        return [[i for i in row if i >= 0] for row in ids], malformed

    def forward(self, batch, generate=None, fixed_steps=False):
        return (
            self.compute_loss(batch) if generate is None else self.generate(batch, *generate, fixed_steps=fixed_steps)
        )


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, fast, spec, stats):
        self.model, self.fast, self.spec, self.stats = model, fast, spec, stats
        self.normalizer = Normalizer(stats["action"])
        self.state_normalizer = Normalizer(stats["observation.state"], "min_max") if spec.state_keys else None

    def predict(self, observations):
        """list of {images: {camera1: (h, w, 3) uint8 RGB, ...}, instruction: str, state: (S,) in data units [only with the state in the
        prompt]} -> (B, H, A) float32 in data units (for ee_pose deltas: the recording's mm or m, rad or deg, per frame)."""
        for o in observations:
            missing = [c for c in self.spec.cameras if c not in o["images"]]
            if missing:
                raise ValueError(
                    f"the observation has images of {sorted(o['images'])}, the policy needs {self.spec.cameras}"
                )
        images = np.stack(
            [
                np.stack([resize_image(np.asarray(o["images"][c]), self.spec.image_size) for c in self.spec.cameras])
                for o in observations
            ]
        )
        states = [self.state_normalizer.normalize(o["state"]) if self.state_normalizer else None for o in observations]
        prompts = [
            self.model.prompt.ids(o.get("instruction") or self.spec.task_instruction, s)
            for o, s in zip(observations, states)
        ]
        return self.decode(images, prompts)[0]

    def decode(self, images, prompts, fixed_steps=False):
        """images (B, K, h, w, 3) uint8 at the model's size, prompt ids -> ((B, H, A) in data units, malformed (B,) bool)."""
        device = next(self.model.parameters()).device
        batch = {
            k: v.to(device)
            for k, v in (self.model.prompt.batch(prompts) | {"images": torch.from_numpy(images)}).items()
        }
        horizon, dim = self.spec.horizon, self.normalizer.dim
        training = self.model.training
        self.model.eval()
        ids, malformed = self.model(batch, generate=(self.fast, horizon * dim), fixed_steps=fixed_steps)
        self.model.train(training)
        return self.normalizer.unnormalize(
            np.stack([self.fast.decode(row, horizon, dim)[0] for row in ids])
        ), malformed.cpu().numpy()

    def open_episodes(self, root, names=None):
        """For evaluate.py: yields per episode {name, samples: callable(t) -> observation, target (M, A), hold (M, A): the action that stands still,
        phase (M,) or None}, in data units."""
        found, _ = ep.load_episodes(root)
        definition = ep.ActionDefinition(**self.spec.action_definition)
        unknown = sorted(set(names or []) - {e.name for e in found})
        if unknown:
            raise ValueError(
                f"'{root}' has no episode '{unknown[0]}'; it has {', '.join(e.name for e in found[:5])}, ..."
            )
        reader = ep.ImageReader()
        for e in found:
            if names is not None and e.name not in names:
                continue
            recorded, target = list(e.cameras), definition.targets(e)

            def sample(t, e=e, recorded=recorded):
                images = {
                    c: reader.read(e, recorded[int(c[6:]) - 1], t, at_least=self.spec.image_size)
                    for c in self.spec.cameras
                }
                return dict(
                    images=images,
                    instruction=e.instruction,
                    state=ep.robot_state(e, self.spec.state_keys)[t] if self.spec.state_keys else None,
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
        d = self.spec.action_definition
        if d["source"] == "ee_pose_delta":
            return [(f"d{n}", self.spec.position_unit or "") for n in "xyz"] + [
                (f"d{n}", d["rotation_unit"]) for n in ("roll", "pitch", "yaw")
            ]
        return [(f"action{i + 1}", "") for i in range(d["dim"])]


# ---- build, save, load -----------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def load_tokenizer(source):
    """-> (tokenizer with the action tokens, image token id, merged patch side in pixels, number of tokens that had to be added)."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        config, tokenizer = AutoConfig.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"model '{source}' is neither a directory with config.json and tokenizer files nor reachable on the hub. "
            f"Set model: to a local directory (--model DIR); make_demo.py writes a tiny one ({str(error).splitlines()[0]})"
        ) from error
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"model '{source}' is a {config.model_type}; NORA needs a qwen2_5_vl")
    missing = [t for i in range(NUM_ACTION_TOKENS) if (t := ACTION_TOKEN.format(i)) not in tokenizer.get_vocab()]
    if missing and len(missing) < NUM_ACTION_TOKENS:
        raise ValueError(
            f"the tokenizer of '{source}' has only {NUM_ACTION_TOKENS - len(missing)} of {NUM_ACTION_TOKENS} action tokens"
        )
    if missing:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in missing])
    return (
        tokenizer,
        config.image_token_id,
        config.vision_config.patch_size * config.vision_config.spatial_merge_size,
        len(missing),
    )


def read_preprocessor(source):
    """The checkpoint's preprocessor_config.json (image mean and std) as a dict. Read as a file: the image processor classes of some transformers
    releases cannot be imported without torchvision."""
    try:
        about = json.loads(hub_file(source, "preprocessor_config.json").read_text())
    except FileNotFoundError:  # transformers 5 writes one file for the whole processor
        about = json.loads(hub_file(source, "processor_config.json").read_text())["image_processor"]
    if "image_mean" not in about or "image_std" not in about:
        raise ValueError(
            f"preprocessor_config.json of '{source}' has no image_mean and image_std; it has {sorted(about)}"
        )
    return about


def make_prompt(source, spec):
    tokenizer, image_token_id, side, added = load_tokenizer(source)
    return Prompt(tokenizer, image_token_id, spec, (spec.image_size[0] // side, spec.image_size[1] // side)), added


def build_model(cfg, source, prompt, device, dtype, attention):
    """Load the backbone from `source`, choose what is trained -> (Nora, peft model or None). Trained weights fp32, frozen ones in `dtype`."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # its bars break ours; what is loaded is said below
    batch_vision_attention()
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32 if cfg.train == "full" else dtype, attn_implementation=attention
    )
    if len(prompt.tokenizer) > vlm.config.text_config.vocab_size:
        vlm.resize_token_embeddings(len(prompt.tokenizer), pad_to_multiple_of=64)
    if cfg.load_model_weights:
        load_weights(vlm, cfg.load_model_weights)
    peft_model = choose_trained(cfg, vlm, prompt.first_action)
    return Nora(vlm, prompt, read_preprocessor(source), train_vision=cfg.train == "full").to(device), peft_model


def choose_trained(cfg, vlm, first_action):
    """Set requires_grad for cfg.train, add the LoRA adapter, make what is trained fp32 -> peft model or None."""
    peft_model = None
    if cfg.train == "full":
        vlm.requires_grad_(True)
    elif cfg.train == "head":
        vlm.requires_grad_(False)
        vlm.lm_head.weight.requires_grad_(True)  # tied: this is the input embedding as well
        vlm.get_input_embeddings().weight.requires_grad_(True)
    else:
        from peft import LoraConfig, get_peft_model

        rows = {"embed_tokens": list(range(first_action, first_action + NUM_ACTION_TOKENS))}
        peft_model = get_peft_model(
            vlm,
            LoraConfig(
                r=cfg.lora_rank,
                lora_alpha=cfg.lora_alpha,
                lora_dropout=cfg.lora_dropout,
                target_modules=LORA_TARGETS,
                trainable_token_indices=rows,
            ),
        )
    for p in vlm.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    if cfg.gradient_checkpointing:
        enable = (
            getattr(vlm, "activation_checkpointing_enable", None) or vlm.gradient_checkpointing_enable
        )  # the old name warns
        enable({"use_reentrant": False})
    return peft_model


def load_weights(vlm, path):
    """Replace all weights by those of a checkpoint directory, .safetensors or .pt file; every tensor must find its place."""
    from safetensors.torch import load_file

    path = Path(path)
    if path.is_dir():
        path = path / "model" if (path / "model").is_dir() else path
        files = sorted(path.glob("*.safetensors"))
        if not files or (path / "adapter_config.json").exists():
            raise ValueError(
                f"load_model_weights: {path} has no full model (*.safetensors without adapter_config.json). Merge an adapter first: python train_nora.py --merge {path.parent}"
            )
        tensors = {k: v for f in files for k, v in load_file(f).items()}
    elif path.suffix == ".safetensors":
        tensors = load_file(path)
    else:
        tensors = ckpt.load_state(path)
        tensors = tensors.get("model_state_dict", tensors)
    renamed = {}
    for key, value in tensors.items():
        key = key.removeprefix("module.")
        if key.startswith("visual."):  # hub layout -> the names in memory
            key = "model." + key
        elif key.startswith("model.") and not key.startswith(("model.visual.", "model.language_model.")):
            key = "model.language_model." + key.removeprefix("model.")
        renamed[key] = value
    own = vlm.state_dict()
    tied = {"lm_head.weight"} if vlm.config.tie_word_embeddings else set()
    missing, unexpected = sorted(set(own) - set(renamed) - tied), sorted(set(renamed) - set(own))
    wrong = [k for k in renamed if k in own and renamed[k].shape != own[k].shape]
    if missing or unexpected or wrong:
        raise ValueError(
            f"load_model_weights: {path} covers {len(own) - len(missing)} of {len(own)} tensors; missing {missing[:2]}, unknown {unexpected[:2]}, "
            f"other shape {[(k, tuple(renamed[k].shape), tuple(own[k].shape)) for k in wrong[:2]]}. Nothing was loaded"
        )
    vlm.load_state_dict(renamed, strict=False)


def save_model(folder, model, peft_model, fast, spec, stats, backbone, state_dict=None, dtype=torch.float32):
    """Write the exported model: transformers layout (or the peft adapter), tokenizer, image processor, statistics, FAST files, policy.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if peft_model is not None:
        peft_model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        tensors = {k.removeprefix("vlm."): v for k, v in (state_dict or model.state_dict()).items()}
        if model.vlm.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        model.vlm.save_pretrained(
            folder, state_dict={k: v.to(dtype).contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
        )
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2))
    model.prompt.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(model.preprocessor, indent=2))
    fast.save(folder / "fast")
    save_stats(folder / "dataset_stats.json", stats)
    (folder / "policy.json").write_text(
        json.dumps(
            dict(format_version=FORMAT, script=Path(__file__).stem, backbone=str(backbone), **dataclasses.asdict(spec)),
            indent=2,
        )
    )


def read_exported(folder):
    """model/ directory -> (spec, stats, fast, policy.json as dict)."""
    folder = Path(folder)
    if not (folder / "policy.json").is_file():
        raise FileNotFoundError(
            f"{folder} has no policy.json: expected a steps_N directory of train_nora.py, or its model/ folder"
        )
    about = json.loads((folder / "policy.json").read_text())
    if about["format_version"] != FORMAT:
        raise ValueError(
            f"{folder}: policy.json has format_version {about['format_version']}, this code reads {FORMAT}"
        )
    spec = PolicySpec(**{f.name: about[f.name] for f in dataclasses.fields(PolicySpec)})
    return (
        spec,
        load_stats(folder / "dataset_stats.json", definition=spec.action_definition),
        FastTokenizer.load(folder / "fast"),
        about,
    )


def load_policy(path, device=None):
    """Open a checkpoint for inference: a steps_N directory, its model/ or merged/ folder, or an output_dir (its newest checkpoint)."""
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    path = Path(path)
    if newest := list(ckpt.steps_in(path).values()):
        path = newest[-1]
    folder = path / "model" if (path / "model").is_dir() else path
    spec, stats, fast, about = read_exported(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    attention = pick_attention("auto", device)
    adapter = (folder / "adapter_config.json").is_file()
    prompt, _ = make_prompt(folder if not adapter else about["backbone"], spec)
    batch_vision_attention()
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        about["backbone"] if adapter else folder, dtype=dtype, attn_implementation=attention
    )
    if adapter:
        from peft import PeftModel

        if len(prompt.tokenizer) > vlm.config.text_config.vocab_size:
            vlm.resize_token_embeddings(len(prompt.tokenizer), pad_to_multiple_of=64)
        vlm = PeftModel.from_pretrained(vlm, folder).merge_and_unload()
    return Policy(Nora(vlm, prompt, read_preprocessor(folder), train_vision=False).to(device).eval(), fast, spec, stats)


def merge_adapter(step_dir):
    """Write steps_N/merged: the adapter folded into a full model that needs neither peft nor the base."""
    step_dir = Path(step_dir)
    if not (step_dir / "model" / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"--merge {step_dir}: no model/adapter_config.json there; expected a steps_N directory of a --train lora run"
        )
    policy = load_policy(step_dir, "cpu")
    backbone = read_exported(step_dir / "model")[3]["backbone"]
    with ckpt.atomic_path(step_dir / "merged") as temporary:
        save_model(
            temporary,
            policy.model,
            None,
            policy.fast,
            policy.spec,
            policy.stats,
            backbone,
            dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
        )
    return step_dir / "merged"


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0): linear warm-up, cosine to 0, and 0 beyond the end."""
    if step < cfg.num_warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.num_warmup_steps
    progress = min(1.0, (step - cfg.num_warmup_steps) / max(1, cfg.max_train_steps - cfg.num_warmup_steps))
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def describe(cfg, data, prompt, fast, print0):
    """Say what was found: episodes, action meaning and ranges, sequence lengths, FAST quality."""
    frames = sum(e.num_frames for e in data.train)
    print0(
        f"data      {len(data.train)} training episodes, {frames} frames; {len(data.validation)} validation episodes; {cfg.dataset.root_dir}"
    )
    for message in data.excluded:
        print0(f"excluded  {message}")
    d = data.spec.action_definition
    print0(
        f"action    {d['source']}, {d['dim']} dims, horizon {data.spec.horizon}, rotation in {d['rotation_unit']}, position in {data.spec.position_unit or 'unknown unit'}"
    )
    if d["source"] == "action" and ep.records_past_motion(data.train):
        print0(
            "warning   the recorded 'action' is the motion already made (pose[t] - pose[t-1]), so this trains on yesterday's action; "
            "set dataset.use_ee_pose_delta_as_action: true for the motion that follows"
        )
    for name in ("q01", "q99", "mean", "std"):
        print0(f"          {name:<5}" + " ".join(f"{v:11.4g}" for v in data.stats["action"][name]))
    texts = {e.instruction or data.spec.task_instruction for e in data.train}
    print0(
        f"text      {len(texts)} instruction(s), {sum(e.instruction is not None for e in data.train)} episodes bring their own; e.g. {sorted(texts)[0]!r}"
    )
    if fast is not None:
        chunks = sample_chunks(data, 512)
        before = fast.clipped
        ids = [fast.encode(c) for c in chunks]
        error = np.mean([np.abs(fast.decode(i, *c.shape)[0] - c).mean() for i, c in zip(ids, chunks)])
        print0(
            f"FAST      {fast.vocab_size} ids; {np.mean([len(i) for i in ids]):.1f} tokens per chunk (max {max(len(i) for i in ids)}), "
            f"round trip {error:.4f} in [-1, 1] units, {fast.clipped - before} of {sum(c.size for c in chunks)} coefficients clipped"
            + (" (this tokenizer has no symbol for them; --fast fit has)" if fast.clipped > before else "")
        )


def sample_chunks(data, most):
    """At most `most` normalised (H, A) training chunks, evenly spread."""
    dataset = NoraDataset(data.train, data)
    pick = np.unique(np.linspace(0, len(dataset) - 1, min(most, len(dataset))).astype(int))
    return [
        data.normalizer.normalize(ep.action_chunk(dataset.targets[e], t, data.spec.horizon, dataset.hold)[0])
        for e, t in map(dataset.locate, pick)
    ]


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer the text stays unbuilt, and says so."""
    data = load_data(cfg)
    try:
        prompt, added = make_prompt(cfg.model, data.spec)
        fast = (
            FastTokenizer.fit(sample_chunks(data, 4096), cfg.fast_scale, cfg.fast_vocab_size)
            if cfg.fast == "fit"
            else FastTokenizer.load(cfg.fast)
        )
    except FileNotFoundError as error:
        prompt, fast = None, None
        print(f"note      prompt and action tokens are not shown: {error}")
    describe(cfg, data, prompt, fast, print)
    dataset = NoraDataset(
        data.train, data, cfg.dataset if cfg.dataset.augment or cfg.dataset.camera_dropout_prob else None, cfg.seed
    )
    order = GlobalOrder(len(dataset), cfg.seed)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.per_device_batch_size, len(dataset)))]
    print(
        f"samples   {len(dataset)} (frames with a target); batch of {len(items)}, first: {items[0]['episode']} frame {items[0]['frame']}"
    )
    for key in ("images", "action", "is_pad", "state"):
        if items[0][key] is not None:
            stack = np.stack([item[key] for item in items])
            print(
                f"          {key:<14} {str(stack.shape):<24} {str(stack.dtype):<8} {stack.min():.4g} .. {stack.max():.4g}"
            )
    if prompt is not None:
        batch = Collate(prompt, fast, data.normalizer)(items)
        for key, value in batch.items():
            if isinstance(value, torch.Tensor) and key != "images":
                print(
                    f"          {key:<14} {str(tuple(value.shape)):<24} {str(value.dtype).removeprefix('torch.'):<8} {value.min().item():.4g} .. {value.max().item():.4g}"
                )
        print(f"prompt    {prompt.text(items[0]['instruction'], items[0]['state'])!r}")
        print(f"answer    {prompt.tokenizer.decode(Collate(prompt, fast, data.normalizer).answer(items[0]['action']))}")
    if cfg.check_images:
        reader = ep.ImageReader()
        for e in tqdm(data.train + data.validation, desc="decoding every image", unit="episode", disable=None):
            for camera in e.cameras:
                for t in range(e.num_frames):
                    reader.read(e, camera, t)
        print("images    every image of every camera decodes")
    print("check passed")


def validate(policy, data, collate, cfg, accelerator):
    """-> {val_loss: per supervised token, val_token_accuracy, val_action_mae: mean over dims in data units, val_mae_<dim>, val_malformed_rate},
    sums over all ranks, on frames spread evenly over the held-out episodes; padded steps do not count."""
    dataset = NoraDataset(data.validation, data)
    pick = np.unique(np.linspace(0, len(dataset) - 1, min(cfg.val_samples, len(dataset))).astype(int))
    decode = set(
        pick[np.unique(np.linspace(0, len(pick) - 1, min(cfg.val_decode_samples, len(pick))).astype(int))].tolist()
    )
    rank, world, size = accelerator.process_index, accelerator.num_processes, cfg.per_device_batch_size
    rounds = math.ceil(len(pick) / (size * world))  # the same number on every rank: FSDP gathers weights in step
    dims, names = data.normalizer.dim, policy.action_names()
    sums = torch.zeros(
        3 + 2 + 2 * dims, dtype=torch.float64
    )  # loss, correct, tokens | malformed, decoded | error per dim, count per dim
    model = policy.model  # without DDP around it: ranks decode different numbers of rows
    model.eval()
    for k in range(rounds):
        mine = pick[(k * world + rank) * size : (k * world + rank + 1) * size]
        items = [dataset[(0, int(i))] for i in mine] or [
            dataset[(0, int(pick[0]))]
        ]  # an idle rank computes along and counts nothing
        batch = collate(items)
        with torch.no_grad():
            out = model(to_device(batch, accelerator.device))
        wanted = [j for j, i in enumerate(mine) if int(i) in decode]
        if len(mine):
            sums[:3] += torch.tensor([out["loss_sum"].item(), out["correct"].item(), len(batch["targets"])])
        if wanted or cfg.fsdp:
            chosen = wanted or [0]
            prompts = [policy.model.prompt.ids(items[j]["instruction"], items[j]["state"]) for j in chosen]
            predicted, malformed = policy.decode(
                np.stack([items[j]["images"] for j in chosen]), prompts, fixed_steps=cfg.fsdp
            )
            for row, j in enumerate(wanted):
                real = ~items[j]["is_pad"]
                error = np.abs(predicted[row] - items[j]["action"])[real]
                sums[3:5] += torch.tensor([float(malformed[row]), 1.0])
                sums[5 : 5 + dims] += torch.from_numpy(error.sum(0))
                sums[5 + dims :] += int(real.sum())
    model.train()
    sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").tolist()
    mae = [e / max(n, 1) for e, n in zip(sums[5 : 5 + dims], sums[5 + dims :])]
    return dict(
        val_loss=sums[0] / sums[2],
        val_token_accuracy=sums[1] / sums[2],
        val_action_mae=float(np.mean(mae)),
        val_malformed_rate=sums[3] / max(sums[4], 1),
        **{f"val_mae_{name}": value for (name, _), value in zip(names, mae)},
    )


def to_device(batch, device):
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def main(cfg):
    if cfg.merge:
        print(f"merged model: {merge_adapter(cfg.merge)}")
        return
    if cfg.check:
        check_data(cfg)
        return

    # ---- inputs: everything that can be wrong is found before weights are loaded
    for key in (
        "per_device_batch_size",
        "gradient_accumulation_steps",
        "max_train_steps",
        "checkpoint_save_frequency",
        "logging_frequency",
        "val_frequency",
        "val_samples",
        "val_decode_samples",
    ):
        if getattr(cfg, key) < 1:
            raise ValueError(f"{key} is {getattr(cfg, key)}: expected 1 or more")
    if cfg.fsdp and cfg.train != "full":
        raise ValueError(
            f"fsdp shards a full training; train: {cfg.train} keeps the backbone frozen and fits without it. Drop --fsdp, or use --train full"
        )
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    cuda = torch.cuda.is_available()
    bf16 = cfg.mixed_precision == "bf16" or (cfg.mixed_precision == "auto" and cuda)
    accelerator = Accelerator(
        mixed_precision="bf16" if bf16 else "no",
        cpu=not cuda,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    device, rank, world, main_process = (
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.is_main_process,
    )
    if cfg.fsdp and world == 1:
        raise ValueError("fsdp needs several processes: bash shells/train_nora.sh --multi-gpu --num-gpus 4 --fsdp")
    print0 = print if main_process else lambda *_: None
    attention = pick_attention(cfg.attn_implementation, device)
    out = Path(cfg.output_dir)
    resume = ckpt.find_resume(cfg.resume_from_checkpoint, out)
    if cfg.resume_from_checkpoint is None and out.is_dir() and (ckpt.steps_in(out) or (out / "metrics.jsonl").exists()):
        raise FileExistsError(
            f"output_dir '{out}' already holds a run. Continue it with --resume auto, or choose another --output_dir"
        )
    accelerator.wait_for_everyone()  # all ranks have looked before rank 0 writes
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(out)
    torch.manual_seed(cfg.seed)

    # ---- data
    meta = json.loads((resume / "meta.json").read_text()) if resume else None
    if resume and meta["step"] >= cfg.max_train_steps:
        print0(
            f"nothing to do: {resume} is at step {meta['step']}, max_train_steps is {cfg.max_train_steps}. Raise it to train on"
        )
        return
    exported = read_exported(resume / "model") if resume else None
    data = load_data(cfg, rank, stats=exported[1] if resume else None)
    if resume:
        changed = ckpt.check_resume(
            resume,
            meta,
            dict(format_version=FORMAT, fingerprint=data.fingerprint()),
            dataclasses.asdict(cfg),
            fixed=("seed", "train", "lora_rank", "lora_alpha"),
        )
        print0(f"resume    {resume}, step {meta['step']}" + (f"; changed: {'; '.join(changed)}" if changed else ""))
        fast = exported[2]
    elif cfg.fast == "fit":
        if main_process:
            FastTokenizer.fit(sample_chunks(data, 100_000), cfg.fast_scale, cfg.fast_vocab_size).save(out / "fast")
        accelerator.wait_for_everyone()
        fast = FastTokenizer.load(out / "fast")
    else:
        fast = FastTokenizer.load(cfg.fast)
    if fast.vocab_size > NUM_ACTION_TOKENS:
        raise ValueError(
            f"FAST tokenizer '{cfg.fast}' has {fast.vocab_size} ids, the model has {NUM_ACTION_TOKENS} action tokens: fit a smaller one (--fast fit --fast_vocab_size 1024)"
        )
    source = str(resume / "model") if resume and cfg.train != "lora" else cfg.model
    prompt, added = make_prompt(source, data.spec)
    describe(cfg, data, prompt, fast, print0)
    if added:
        print0(
            f"note      '{source}' had no action tokens: {added} were added, their embeddings start from the average of the others"
        )
    collate = Collate(prompt, fast, data.normalizer)
    d = cfg.dataset
    dataset = NoraDataset(data.train, data, d if d.augment or d.camera_dropout_prob else None, cfg.seed)
    global_batch = cfg.per_device_batch_size * world * cfg.gradient_accumulation_steps
    start, position = (meta["step"], meta["position"]) if resume else (0, 0)
    order = GlobalOrder(len(dataset), cfg.seed)
    batches = RankBatches(
        order,
        cfg.per_device_batch_size,
        cfg.gradient_accumulation_steps,
        rank,
        world,
        position,
        max(0, cfg.max_train_steps - start),
    )
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
    core, peft_model = build_model(
        cfg if not resume else dataclasses.replace(cfg, load_model_weights=None),
        source,
        prompt,
        device,
        torch.bfloat16 if bf16 else torch.float32,
        attention,
    )
    if cfg.fsdp:
        shard(core, bf16)
    parameters = [p for p in core.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.weight_decay, fused=cuda or None
    )
    if resume:
        ckpt.restore_training_state(core, optimizer, ckpt.load_state(resume / "state.pt"), cfg.fsdp)
    model = core if cfg.fsdp else accelerator.prepare(core)
    policy = Policy(core, fast, data.spec, data.stats)
    trainable, total = sum(p.numel() for p in parameters), sum(p.numel() for p in core.parameters())
    size = 12 * trainable + (2 if bf16 else 4) * (
        total if peft_model is None else trainable
    )  # fp32 weights and two moments, then the export
    print0(
        f"model     {cfg.model}, train {cfg.train}: {trainable:,} of {total:,} parameters trainable; attention {attention}; {'bf16 autocast' if bf16 else 'fp32'}; {world} x {device.type}"
    )
    print0(
        f"batch     {cfg.per_device_batch_size} x {world} ranks x {cfg.gradient_accumulation_steps} accumulation = {global_batch} samples per step; "
        f"{len(dataset)} samples = {len(dataset) / global_batch:.1f} steps per epoch"
    )
    print0(f"steps     {start} -> {cfg.max_train_steps}; a checkpoint is about {size / 1e9:.2f} GB, in {out}")
    if main_process:
        save_config(cfg, out / "config.yaml")
        shutil.copy(__file__, out / Path(__file__).name)
        save_stats(out / "dataset_stats.json", data.stats)
        ep.write_validation_list(
            out / "validation_episodes.txt",
            data.train + data.validation,
            range(len(data.train), len(data.train) + len(data.validation)),
        )
    log = RunLog(out, cfg.max_train_steps, start, rank, cfg.wandb_project_name, cfg.wandb, dataclasses.asdict(cfg))
    stop = ckpt.StopSignal()
    best = meta["best_val_loss"] if resume else None
    best_step = meta["best_step"] if resume else None

    def save(step, position):
        """Write steps_N on rank 0; True if it is in place. A full disk costs the new checkpoint, never an old one."""
        trained, moments = ckpt.training_state(core, optimizer, cfg.fsdp)
        ok = True
        if main_process:
            try:
                ckpt.require_space(out, int(1.1 * size))
                with ckpt.atomic_path(out / f"steps_{step}") as folder:
                    save_model(
                        folder / "model",
                        core,
                        peft_model,
                        fast,
                        data.spec,
                        data.stats,
                        cfg.model,
                        trained if cfg.fsdp else None,
                        torch.bfloat16 if bf16 else torch.float32,
                    )
                    ckpt.save_state(folder / "state.pt", dict(format_version=FORMAT, trained=trained, moments=moments))
                    about = dict(
                        format_version=FORMAT,
                        script=Path(__file__).stem,
                        step=step,
                        position=position,
                        seed=cfg.seed,
                        fingerprint=data.fingerprint(),
                        best_val_loss=best,
                        best_step=best_step,
                        validation=[e.name for e in data.validation],
                        world_size=world,
                        config=dataclasses.asdict(cfg),
                    )
                    (folder / "meta.json").write_text(json.dumps(about, indent=2))
                ckpt.rotate(out, cfg.keep_checkpoints, protect=best_step)
            except ckpt.DiskFull as error:
                log.print(f"CHECKPOINT NOT SAVED at step {step}: {error}")
                ok = False
        return bool(
            accelerator.reduce(torch.tensor(int(ok), device=device), "sum").item() == world
        )  # others are ok by default

    # ---- loop
    model.train()
    batch_iterator, saved_at, skipped_in_row, skipped = iter(loader), start, 0, 0
    totals = torch.zeros(3, device=device)  # loss sum, correct, tokens since the last log line
    grad_norms, wait, t_log, logged_at, step = [], 0.0, time.perf_counter(), start, start
    while step < cfg.max_train_steps:
        lr = lr_at(step, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        t_wait = time.perf_counter()
        try:
            micro = [next(batch_iterator) for _ in range(cfg.gradient_accumulation_steps)]
        except RuntimeError as error:  # torch's word for a worker that was killed, mostly for memory
            if "DataLoader worker" not in str(error):
                raise
            raise RuntimeError(
                f"DataLoader worker crashed (num_workers is {cfg.num_workers}): {error}. Lower it, or load in the main process: --num_workers 0"
            ) from error
        wait += time.perf_counter() - t_wait
        # tokens of the whole step over all ranks: what the loss is divided by; and whether any rank was told to stop
        counts = accelerator.reduce(
            torch.tensor(
                [float(sum(len(b["targets"]) for b in micro)), float(stop.received is not None)], device=device
            ),
            "sum",
        )
        sample_losses, step_totals = [], torch.zeros_like(totals)
        for m, batch in enumerate(micro):
            torch.manual_seed(
                torch_seed_at(cfg.seed, position + (m * world + rank) * cfg.per_device_batch_size, "dropout")
            )
            last = m == cfg.gradient_accumulation_steps - 1
            if cfg.fsdp:
                core.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or cfg.fsdp else accelerator.no_sync(model):
                try:
                    result = model(to_device(batch, device))
                    accelerator.backward(result["loss_sum"] * (world / counts[0]))  # ranks are averaged, so times world
                except torch.OutOfMemoryError as error:
                    raise torch.OutOfMemoryError(
                        f"CUDA out of memory with per_device_batch_size {cfg.per_device_batch_size}: lower it and raise gradient_accumulation_steps "
                        f"({cfg.gradient_accumulation_steps}) by the same factor, or set --gradient_checkpointing, --train lora, or --fsdp. {error}"
                    ) from error
            sample_losses.append(result["sample_loss"])
            step_totals += torch.stack(
                [
                    result["loss_sum"].detach().float(),
                    result["correct"].float(),
                    torch.tensor(float(len(batch["targets"])), device=device),
                ]
            )
        norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.gradient_clipping or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        told_to_stop, norm = torch.stack([counts[1], norm.float()]).tolist()  # the one synchronisation of a step
        if math.isfinite(norm):
            optimizer.step()
            totals += step_totals
            grad_norms.append(norm)
            skipped_in_row = 0
        else:  # the same on every rank: gradients are averaged
            skipped, skipped_in_row = skipped + 1, skipped_in_row + 1
            report_nonfinite(log, step + 1, [b["names"] for b in micro], sample_losses, skipped_in_row)
        optimizer.zero_grad(set_to_none=True)
        step, position = step + 1, position + global_batch

        if step % cfg.logging_frequency == 0 or step == cfg.max_train_steps:
            loss_sum, correct, tokens = accelerator.reduce(totals.clone(), "sum").tolist()
            elapsed = time.perf_counter() - t_log
            values = dict(
                learning_rate=lr,
                samples_per_s=(step - logged_at) * global_batch / elapsed,
                data_wait=wait / elapsed,
                memory_gb=memory_gb(),
                skipped_steps=skipped,
            )
            line = f"lr {lr:.2e} | {values['samples_per_s']:.1f} samples/s | wait {values['data_wait']:.1%} | {values['memory_gb']:.1f} GB"
            if tokens:  # else every step since the last line was skipped
                values |= dict(
                    train_loss=loss_sum / tokens, token_accuracy=correct / tokens, grad_norm=float(np.mean(grad_norms))
                )
                line = (
                    f"loss {values['train_loss']:.4f} | acc {values['token_accuracy']:.3f} | grad {values['grad_norm']:.2f} | "
                    + line
                )
            log.log(step, values, f"step {step:>7}/{cfg.max_train_steps} | {line}")
            log.step(step, values.get("train_loss"), lr, values["samples_per_s"], values["data_wait"])
            totals.zero_()
            grad_norms, wait, t_log, logged_at = [], 0.0, time.perf_counter(), step
        else:
            log.step(step)
        if data.validation and (step % cfg.val_frequency == 0 or step == cfg.max_train_steps):
            t_val = time.perf_counter()
            values = validate(policy, data, collate, cfg, accelerator)
            if best is None or values["val_loss"] < best:
                best, best_step = values["val_loss"], step
            log.log(
                step,
                values,
                f"validation {step} | loss {values['val_loss']:.4f} | acc {values['val_token_accuracy']:.3f} | action MAE {values['val_action_mae']:.4g} "
                f"({data.spec.position_unit or 'units'}, {data.spec.action_definition['rotation_unit']}) | malformed {values['val_malformed_rate']:.1%}",
            )
            t_log += time.perf_counter() - t_val  # validation is not training time
        told_to_stop = told_to_stop > 0
        if step % cfg.checkpoint_save_frequency == 0 or step == cfg.max_train_steps or told_to_stop:
            t_save = time.perf_counter()
            if save(step, position):
                saved_at = step
            elif step == cfg.max_train_steps or told_to_stop:
                raise ckpt.DiskFull(
                    28,
                    f"the last checkpoint could not be written; the newest complete one is steps_{saved_at}. Free space and run again with --resume auto",
                )
            t_log += time.perf_counter() - t_save
        if told_to_stop and step < cfg.max_train_steps:
            log.print(
                f"stopped by signal after step {step}; saved {out / f'steps_{step}'}. Continue with the same command and --resume auto"
            )
            log.close()
            stop.restore()
            accelerator.end_training()
            return

    # ---- end
    stop.restore()
    final = out / f"steps_{cfg.max_train_steps}"
    if main_process:
        if peft_model is not None:
            print(f"merged model: {merge_adapter(final)}")
        log.close()
        print(f"loss plot: {plot_loss(out, 'train_loss')}")
        print(
            f"model: {final / 'model'}\nevaluate: python evaluate.py --checkpoint {final} --data {cfg.dataset.root_dir}"
        )
    accelerator.free_memory()  # DDP's reducer must not outlive the process group: the last to let go of it joins gloo's threads,
    del model  # and the reducer would do so with Python's lock in hand, for which those threads may be waiting
    gc.collect()
    accelerator.wait_for_everyone()
    accelerator.end_training()


def shard(core, bf16):
    """FSDP2: one unit per transformer layer, one for the rest (the tied embedding and head stay together in it)."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    )
    for layer in [*core.vlm.model.language_model.layers, *core.vlm.model.visual.blocks]:
        fully_shard(layer, mp_policy=policy)
    fully_shard(core, mp_policy=policy)


if __name__ == "__main__":
    main(parse_config(Config, aliases=ALIASES))
