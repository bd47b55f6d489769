"""NORA: Qwen2.5-VL fine-tuned to answer an image and an instruction with FAST action tokens, on your HDF5 episodes.

Model and token layout: declare-lab/nora (Qwen2.5-VL-3B + 2048 <robot_action_i> tokens). One training sample is one
frame: image(s) of frame t -> the next H actions, normalised, as FAST tokens. The loss is their cross entropy.

    python train_nora.py --config configs/nora.yaml --check               # look at the data, no weights needed
    bash shells/train_nora.sh                                             # one GPU
    bash shells/train_nora.sh --multi-gpu --num-gpus 4                    # = torchrun --nproc_per_node=4 train_nora.py
    python train_nora.py --config configs/demo/nora.yaml --max_steps 20   # a CPU, on make_demo.py's output

Output, in output_dir: steps_N/ (model/ opens with transformers' from_pretrained and with load_policy, state.pt
resumes), best/model (of the lowest validation loss), metrics.jsonl, loss.png.

Shapes: B batch, K cameras, H action horizon, A action dims, L tokens of a row, M supervised tokens, V vocabulary.
"""

import dataclasses
import hashlib
import json
import math
import os
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import default_collate

from common import UserError, command, fsdp, plan, require
from common import checkpoint as ckpt
from common import episodes as ep
from common import qwen_vl as qwen
from common.fast import ActionsOnly, FastTokenizer
from common.hub import load_weights, local_folder, opening, read_adapter, read_tensors, stored_source, weight_digest
from common.log import WandbConfig, progress
from common.policy import Contract, partners
from common.run import Run, launch, to_device
from common.sampler import GlobalOrder, generator_at
from common.stats import Normalizer, load_stats, save_stats

FORMAT = 3  # of steps_N/state.pt and model/policy.json
ACTION_TOKEN = "<robot_action_{}>"
NUM_ACTION_TOKENS = 2048  # nora's vocabulary: <robot_action_0> .. <robot_action_2047>
BLIND = 1.05  # if swapping the images raises the error by less than this factor, the policy ignores them


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with .h5 episodes, searched recursively; several: a folder of links to them
    horizon: int = 1  # H, future actions per sample, in frames
    use_ee_pose_delta_as_action: bool = False  # target: ee_pose[t+1] - ee_pose[t], not the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if a value exceeds 2 pi
    cameras: list[str] = field(default_factory=lambda: ["camera1"])  # in this order: camera1..K or recorded names
    resize_resolution: list[int] = field(default_factory=lambda: [224, 224])  # height, width; multiples of 28
    task_instruction: str = "Insert the needle into the target point"  # where a file has no language_instruction
    state_in_prompt: bool = False  # append the robot state, in 256 bins, to the instruction
    use_ee_pose: bool = True  # with state_in_prompt: the state contains ee_pose
    use_qpos: bool = False  # with state_in_prompt: the state contains qpos, before ee_pose
    state_noise: float = 0.0  # with state_in_prompt: std of noise on the training's state, of half its range
    state_dropout: float = 0.0  # with state_in_prompt: chance that a training prompt has no state
    num_val_episodes: int = 0  # the last N files by name are held out
    normalization_stats_path: str | None = None  # file of compute_stats.py; null: from the training episodes
    frame_store: str | None = None  # folder on a local disk: decode and resize every image once, read it from there
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    augment: bool = False  # colour augmentation of training images
    augment_brightness: float = 0.2  # +- this share of full scale
    augment_contrast: float = 0.2  # factor 1 +- this
    augment_saturation: float = 0.2  # factor 1 +- this
    augment_hue: float = 0.05  # +- this share of the hue circle
    augment_noise: float = 0.02  # std of Gaussian noise, share of full scale
    camera_dropout_prob: float = 0.0  # chance that only min_cameras..K views stay and the others go black
    min_cameras: int = 1  # views that always stay


@dataclass
class Config:
    model: str = "declare-lab/nora"  # backbone with NORA's action tokens: hub id or directory
    fast: str = "physical-intelligence/fast"  # FAST tokenizer: hub id, directory, or "fit": train one on these actions
    fast_vocab_size: int = 1024  # with fast: fit, at most 2048
    fast_scale: float = 10.0  # with fast: fit, steps per unit of a DCT coefficient
    output_dir: str = "outputs/nora"  # checkpoints and logs
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    train: Literal["full", "language", "lora", "head"] = "full"  # all | no vision | LoRA + action rows | embeddings
    lora_rank: int = 32  # with train: lora
    lora_alpha: int = 32  # with train: lora; scale = alpha / rank
    lora_dropout: float = 0.0  # with train: lora
    per_device_batch_size: int = 8  # samples per GPU and micro-batch
    gradient_accumulation_steps: int = 2  # micro-batches per optimizer step
    learning_rate: float = 5e-5  # peak; AdamW betas 0.9 0.95, eps 1e-8
    weight_decay: float = 1e-8  # decoupled
    adamw_8bit: bool = False  # a quarter of the moments' memory; needs pip install bitsandbytes
    num_warmup_steps: int = 1000  # optimizer steps of linear warm-up
    max_train_steps: int = 100000  # optimizer steps; the cosine ends at 0 here
    gradient_clipping: float | None = 1.0  # largest gradient norm; null: no clipping
    gradient_checkpointing: bool = False  # recompute activations: less memory, about a third slower
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"  # auto: bf16 on CUDA; trained weights are always fp32
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"  # auto: flash if it runs
    fsdp: bool = False  # shard weights, gradients and moments over the ranks (FSDP2; train: full)
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 42  # of order, augmentation and dropout
    checkpoint_save_frequency: int = 5000  # optimizer steps
    keep_checkpoints: int = 3  # newest ones kept; 0: all
    logging_frequency: int = 100  # optimizer steps
    val_frequency: int = 1000  # optimizer steps
    val_samples: int = 256  # frames of the held-out episodes for the loss, evenly spread
    val_decode_samples: int = 64  # of these, frames whose actions are decoded for the MAE
    resume_from_checkpoint: str | None = None  # steps_N directory, or "auto" for the newest one in output_dir
    load_model_weights: str | None = None  # start from this checkpoint or model directory, in place of model
    wandb_project_name: str = "NORA VLA Training"  # W&B project
    wandb: WandbConfig = field(default_factory=WandbConfig)
    check: bool = False  # read the data, build and print one batch, stop
    merge: str | None = None  # merge the LoRA adapter of this steps_N directory into steps_N/merged, stop


ALIASES = dict(resume="resume_from_checkpoint", max_steps="max_train_steps", lr="learning_rate")
ALIASES["batch_size"] = "per_device_batch_size"
FIXED = ("seed", "train", "lora_rank", "lora_alpha", "adamw_8bit")  # what a resume must not change


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    ones = "per_device_batch_size gradient_accumulation_steps max_train_steps checkpoint_save_frequency"
    for key in (ones + " logging_frequency val_frequency val_samples val_decode_samples lora_rank lora_alpha").split():
        require(getattr(cfg, key) >= 1, f"{key} is {getattr(cfg, key)}: expected 1 or more")
    if cfg.fsdp:
        large, ranks = cfg.train in ("full", "language"), int(os.environ.get("WORLD_SIZE", 1))
        require(large, f"fsdp shards a full training; train is {cfg.train}: drop --fsdp or use --train full")
        require(not cfg.adamw_8bit, "adamw_8bit cannot be sharded: drop --fsdp or --adamw_8bit")
        require(ranks > 1, "fsdp needs several processes: bash shells/train_nora.sh --multi-gpu --fsdp")
    found = not cfg.adamw_8bit or find_spec("bitsandbytes")
    require(found, "adamw_8bit needs bitsandbytes, which is not installed: pip install bitsandbytes, or drop the key")
    require(cfg.dataset.horizon >= 1, f"dataset.horizon is {cfg.dataset.horizon}: expected 1 (one action) or more")
    size = cfg.dataset.resize_resolution
    fits = len(size) == 2 and all(s >= 28 and s % 28 == 0 for s in size)
    require(fits, f"dataset.resize_resolution is {size}: expected [height, width] in multiples of 28 (14 x merge 2)")


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class Spec:
    """What predict needs beside the weights; saved as model/policy.json and model/dataset_stats.json."""

    image_size: list  # [height, width] that the model sees
    task_instruction: str  # where an observation has none
    state_keys: list  # [] or a subset of ["qpos", "ee_pose"]: the state in the prompt
    action_definition: dict  # common.episodes.ActionDefinition
    contract: dict  # common.policy.Contract: cameras in prompt order, horizon, names and units, rate, ...
    stats: dict

    def __post_init__(self):
        self.definition, self.contract = ep.ActionDefinition(**self.action_definition), Contract(**self.contract)
        self.cameras = self.contract.recorded  # {camera1: its name in the recordings, ...}
        self.horizon, self.normalizer = self.contract.horizon, Normalizer(self.stats["action"])
        self.state_normalizer = Normalizer(self.stats["observation.state"], "min_max") if self.state_keys else None

    def plain(self):
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "stats"}


@dataclass
class Data:
    """Episodes of a run, split and described."""

    train: list
    validation: list
    excluded: list  # messages of files left out by skip_bad_episodes
    spec: Spec
    table: dict  # {name: [frames, "train" or "validation"]} of all episodes, for a checkpoint

    def fingerprint(self):
        """Changes when the training samples or their order would."""
        parts = [*ep.trained_in(self.table), self.spec.plain()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def load_data(cfg, run=None, stats=None, table=None, contract=None):
    """Find, read, split and describe the episodes. `stats`, `table`, `contract`: of a resumed checkpoint; the contract
    is kept if bad files were left out since, as it may come from one of them."""
    d = cfg.dataset
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes, run)
    frames = {e.name: e.num_frames for e in found}
    split = partial(ep.hold_out, len(found), d.num_val_episodes)
    *parts, table, gone = ep.split_or_keep(frames, split, table if d.skip_bad_episodes else None)
    train, validation = ([found[i] for i in part] for part in parts)
    known = list(found[0].cameras)
    cameras = {f"camera{known.index(name) + 1}": name for name in ep.choose_cameras(found, d.cameras)}
    expected = f"expected 1 to {len(cameras)}, as dataset.cameras is {list(cameras)}"
    require(1 <= d.min_cameras <= len(cameras), f"dataset.min_cameras is {d.min_cameras}: {expected}")
    state_keys = [k for k, use in (("qpos", d.use_qpos), ("ee_pose", d.use_ee_pose)) if use and d.state_in_prompt]
    missing = [k for k in state_keys if getattr(found[0], k) is None]
    chosen = f"chosen: {state_keys}, not in the files: {missing}; {found[0].path}"
    valid = bool(state_keys) == d.state_in_prompt and not missing
    require(valid, f"dataset.state_in_prompt needs use_ee_pose and/or use_qpos, and those arrays; {chosen}")
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    keys = ["action", "observation.state"] if state_keys else ["action"]
    held_out, plain = [e.name for e in validation], dataclasses.asdict(definition)
    if stats is None and d.normalization_stats_path:
        stats = load_stats(d.normalization_stats_path, keys, plain, held_out, [e.name for e in train])
        if state_keys:
            ep.check_state_stats(stats, train, state_keys, "Make the file with the same use_qpos and use_ee_pose")
    if stats is None or not set(keys) <= set(stats):
        stats = ep.insertion_stats(train, definition, held_out, state_keys)
    contract = dataclasses.asdict(contract) if gone else make_contract(d, train, cameras, state_keys, definition, stats)
    spec = Spec(list(d.resize_resolution), d.task_instruction, state_keys, plain, contract, stats)
    return Data(train, validation, excluded + gone, spec, table)


def make_contract(d, train, cameras, state_keys, definition, stats):
    """What a robot must send, and what the answer means: the fields of common.policy.Contract."""
    e, meaning = train[0], "was recorded with the frame that is seen"
    actions, states = ep.name_columns(train, definition, state_keys)
    if definition.source == "ee_pose_delta":
        meaning = "is the motion to the next frame, to be added to the last target"
    about = dict(script=Path(__file__).stem, actions=actions, horizon=d.horizon, rate_hz=e.rate_hz or None)
    about |= dict(images={c: e.sizes[name] for c, name in cameras.items()}, recorded=cameras)
    about |= dict(kind="absolute" if definition.still(e).any() else "delta")
    about |= dict(first_row=f"row 0 {meaning}. Send row k k frames after the picture was taken")
    about |= dict(instructions=sorted({e.instruction or d.task_instruction for e in train}))
    state = stats["observation.state"] if state_keys else {}
    about |= dict(state=states, low=state.get("min"), high=state.get("max"))
    return about | dict(action_low=stats["action"]["min"], action_high=stats["action"]["max"])


def resize_image(image, size):
    """(h, w, 3) uint8 or PIL -> (height, width, 3) uint8, squashed to `size`, in training and in predict. torch's
    antialiased bicubic: within two grey levels of Pillow's, in a seventh of its time."""
    pixels = torch.from_numpy(np.array(image, order="C"))[None].permute(0, 3, 1, 2)  # (1, 3, h, w), channels last
    return F.interpolate(pixels, tuple(size), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def augment_image(image, cfg, rng):
    """Contrast and brightness, hue and saturation, noise, on the resized (h, w, 3) uint8 image."""
    alpha = 1 + rng.uniform(-cfg.augment_contrast, cfg.augment_contrast)
    beta = rng.uniform(-cfg.augment_brightness, cfg.augment_brightness) * 255
    image = Image.fromarray(np.clip(image * alpha + beta, 0, 255).astype(np.uint8))
    hsv = np.asarray(image.convert("HSV")).astype(np.float32)
    hsv[..., 0] = (hsv[..., 0] + rng.uniform(-cfg.augment_hue, cfg.augment_hue) * 256) % 256
    hsv[..., 1] = np.clip(hsv[..., 1] * (1 + rng.uniform(-cfg.augment_saturation, cfg.augment_saturation)), 0, 255)
    image = np.asarray(Image.fromarray(hsv.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    noise = rng.standard_normal(image.shape, dtype=np.float32) * (cfg.augment_noise * 255)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


class NoraDataset(ep.Chunks):
    """One item per frame that has a target. Item (position, i), where `position` seeds the augmentation:

    images (K, height, width, 3) uint8 | action (H, A) float32 in data units | is_pad (H,) bool: past the episode's end
    state (S,) float32 in [-1, 1] or None | instruction str | episode str | frame int

    FAST codes a chunk as a whole, so padded steps are in the loss; is_pad keeps them out of every reported error.
    """

    def __init__(self, episodes, spec, augment=None, seed=0):
        super().__init__(episodes, spec.definition, spec.horizon)
        self.spec, self.augment, self.seed = spec, augment, seed
        self.states = [ep.robot_state(e, spec.state_keys) for e in episodes] if spec.state_keys else None
        self.reader = ep.ImageReader(partial(resize_image, size=spec.image_size))

    def __getitem__(self, key):
        position, i = key
        e, t = self.locate(i)
        episode, spec, (action, is_pad) = self.episodes[e], self.spec, self.chunk(i)
        images = np.stack([self.reader.read(episode, name, t) for name in spec.cameras.values()])
        if self.augment is not None:
            images = self._augment(images, generator_at(self.seed, position, "augment"))
        state = spec.state_normalizer.normalize(self.states[e][t]) if spec.state_keys else None
        if self.augment is not None and state is not None:
            rng = generator_at(self.seed, position, "state")
            noise = self.augment.state_noise * rng.standard_normal(state.shape, dtype=np.float32)
            state = None if rng.random() < self.augment.state_dropout else state + noise
        instruction = episode.instruction or spec.task_instruction
        item = dict(images=images, action=action, is_pad=is_pad, state=state, instruction=instruction)
        return item | dict(episode=episode.name, frame=t)

    def _augment(self, images, rng):
        cfg = self.augment
        if cfg.augment:
            images = np.stack([augment_image(image, cfg, rng) for image in images])
        if rng.random() < cfg.camera_dropout_prob:
            kept = rng.choice(len(images), rng.integers(cfg.min_cameras, len(images) + 1), replace=False)
            images = np.where(np.isin(np.arange(len(images)), kept)[:, None, None, None], images, 0).astype(np.uint8)
        return images


# ---- prompt and batch ------------------------------------------------------------------------------------------------


class Processor:
    """The backbone in `folder` without its weights: tokenizer, image statistics, token grid; makes the prompts."""

    def __init__(self, folder, spec):
        self.folder, self.spec = Path(folder), spec
        small = [p for p in self.folder.iterdir() if p.suffix in (".json", ".txt", ".jinja")]  # later it may be gone
        self.files = {p.name: p.read_bytes() for p in small if not p.name.endswith(".index.json")}
        config, self.tokenizer, self.mean, self.std = qwen.open_backbone(folder)
        ends = [ACTION_TOKEN.format(0), ACTION_TOKEN.format(NUM_ACTION_TOKENS - 1)]
        vocabulary = self.tokenizer.get_vocab()
        self.first_action, last = (vocabulary.get(token, -1) for token in ends)
        whole = self.first_action >= 0 and last - self.first_action + 1 == NUM_ACTION_TOKENS
        lacks = f"the tokenizer of '{folder}' has no {NUM_ACTION_TOKENS} tokens {ends[0]} .. {ends[1]} in a row"
        require(whole, f"{lacks}: NORA starts from declare-lab/nora or a model fine-tuned from it")
        self.end, self.pad = vocabulary["<|im_end|>"], self.tokenizer.pad_token_id
        self.image_token_id = config.image_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        self.patch = config.vision_config.patch_size
        side = self.patch * config.vision_config.spatial_merge_size
        self.grid = (spec.image_size[0] // side, spec.image_size[1] // side)  # rows, columns of tokens per camera

    def text(self, instruction, state=None):
        """The prompt up to the answer, one <|image_pad|> per camera."""
        if state is not None:  # as pi0-FAST: 256 bins over [-1, 1]
            instruction += " State: " + " ".join(str(int(b)) for b in np.clip((np.asarray(state) + 1) * 128, 0, 255))
        return qwen.chat_text(self.tokenizer, self.image_token, len(self.spec.cameras), instruction, answer=True)

    def ids(self, instruction, state=None):
        """Token ids of the prompt, each <|image_pad|> expanded to all tokens of its image."""
        tokens, text = self.grid[0] * self.grid[1], self.text(instruction, state)
        return qwen.prompt_ids(self.tokenizer, text, self.image_token, tokens)


@dataclass
class Collate:
    """List of dataset items -> batch on the CPU. Rows are padded on the right: causal attention never looks there, so
    no mask is needed and the fast kernels stay usable.

    input_ids (B, L), position_ids (3, B, L) | images (B, K, height, width, 3) uint8 | names [(episode, frame)] * B |
    targets (M,): labels | target_rows (M,): the position, in the flattened (B * L), whose output predicts each of them
    | target_sample (M,): which of the B rows it belongs to"""

    processor: Processor
    fast: FastTokenizer
    normalizer: Normalizer

    def answer(self, action):
        """(H, A) in data units -> token ids: FAST ids as <robot_action_i>, then <|im_end|>."""
        ids = self.fast.encode(self.normalizer.normalize(action))
        return [self.processor.first_action + i for i in ids] + [self.processor.end]

    def __call__(self, items):
        p = self.processor
        prompts = [p.ids(item["instruction"], item["state"]) for item in items]
        answers = [self.answer(item["action"]) for item in items]
        length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids, positions = np.full((len(items), length), p.pad), np.zeros((3, len(items), length), np.int64)
        rows = []
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = prompt + answer
            ids[b, : len(row)], positions[:, b, : len(row)] = row, qwen.rope_positions(row, p.image_token_id, p.grid)
            rows.append(b * length + len(prompt) - 1 + np.arange(len(answer)))
        batch = dict(input_ids=ids, position_ids=positions, targets=np.concatenate(answers))
        batch |= dict(target_rows=np.concatenate(rows))
        batch |= dict(target_sample=np.repeat(np.arange(len(items)), [len(a) for a in answers]))
        names = [(item["episode"], item["frame"]) for item in items]
        batch = {k: torch.from_numpy(v) for k, v in batch.items()}
        return batch | dict(images=default_collate([item["images"] for item in items]), names=names)


# ---- model -----------------------------------------------------------------------------------------------------------


class Nora(nn.Module):
    """Qwen2.5-VL behind this script's batches. forward(batch) is the loss, forward(batch, fast, count) decodes."""

    def __init__(self, vlm, processor):
        from transformers import GenerationConfig

        super().__init__()
        self.vlm, self.processor = vlm, processor
        # greedy decoding, not the checkpoint's own settings: Qwen's have a repetition penalty
        vlm.generation_config = GenerationConfig(eos_token_id=processor.end, pad_token_id=processor.pad)
        self.register_buffer("mean", torch.tensor(processor.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(processor.std).view(3, 1, 1) * 255, persistent=False)

    def pictures(self, images):
        """(B, K, height, width, 3) uint8 -> inputs of the vision tower."""
        patch, images = self.processor.patch, images.flatten(0, 1)
        grid = torch.tensor([[1, images.shape[1] // patch, images.shape[2] // patch]])  # on the CPU, where it is read
        patches = qwen.image_patches(images, self.mean, self.std, patch)
        return dict(pixel_values=patches, image_grid_thw=grid.repeat(len(images), 1))

    def compute_loss(self, batch):
        """-> loss_sum (): cross entropy summed over the M supervised tokens | sample_loss (B,): the same per sample |
        correct (): number of right tokens. The head runs on the supervised positions only."""
        inputs = {k: batch[k] for k in ("input_ids", "position_ids")} | self.pictures(batch["images"])
        hidden = self.vlm.model(**inputs, use_cache=False).last_hidden_state  # (B, L, D)
        logits = self.vlm.lm_head(hidden.flatten(0, 1)[batch["target_rows"]]).float()  # (M, V)
        loss = F.cross_entropy(logits, batch["targets"], reduction="none")  # (M,)
        sample_loss = loss.new_zeros(len(batch["input_ids"])).index_add(0, batch["target_sample"], loss.detach())
        return dict(loss_sum=loss.sum(), sample_loss=sample_loss, correct=(logits.argmax(-1) == batch["targets"]).sum())

    @torch.no_grad()
    def generate(self, batch, fast, count):
        """Greedy decoding of exactly `count` DCT coefficients -> (FAST ids per row, malformed (B,) bool: free decoding
        would have left the format)."""
        p = self.processor
        rule = ActionsOnly(fast, p.first_action, p.end, batch["input_ids"], count)
        inputs = {k: v for k, v in batch.items() if k != "images"} | self.pictures(batch["images"])
        most = 2 * count + 1  # a coefficient takes at most two tokens, then the end
        with self.vlm.lm_head.register_forward_hook(self.sharpen):  # not synced: see fsdp.gathered
            out = self.vlm.generate(**inputs, max_new_tokens=most, logits_processor=[rule], synced_gpus=False)
        answers = (out[:, batch["input_ids"].shape[1] :] - p.first_action).tolist()
        return [[i for i in row if 0 <= i < fast.vocab_size] for row in answers], rule.malformed

    def sharpen(self, head, hidden, logits):
        """Forward hook of the head: recompute the action logits in fp32. In bf16 neighbouring coefficients tie, and
        argmax, which takes the first, would always answer the smaller one."""
        logits, first = logits.float(), self.processor.first_action
        rows = slice(first, first + NUM_ACTION_TOKENS)
        with torch.autocast(logits.device.type, enabled=False):
            logits[..., rows] = F.linear(hidden[0].float(), head.weight[rows].float())
        return logits

    def forward(self, batch, *decode):
        return self.generate(batch, *decode) if decode else self.compute_loss(batch)


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, fast, spec, needs=None):
        self.model, self.fast, self.spec, self.stats = model, fast, spec, spec.stats
        self.contract = dataclasses.replace(spec.contract, needs=needs or {})

    def action_names(self):
        return self.contract.actions

    def reset(self):
        """Call it before a new drive. A chunk depends on its observation alone, so there is nothing to forget."""

    def describe(self):
        """Its inputs and outputs, rate, units, ranges and latency, as plain values."""
        return self.contract.describe(self)

    def predict(self, observations):
        """list of {images: {camera1: (h, w, 3) uint8 RGB, ...}, instruction: str, state: (S,) in data units [only with
        the state in the prompt]} -> (B, H, A) float32 in data units (of ee_pose deltas: per frame)."""
        spec, images, prompts = self.spec, [], []
        self.contract.check(observations)
        for o in observations:
            images.append(np.stack([resize_image(o["images"][c], spec.image_size) for c in spec.cameras]))
            state = spec.state_normalizer.normalize(o["state"]) if spec.state_keys else None
            prompts.append(self.model.processor.ids(o.get("instruction") or spec.task_instruction, state))
        return self.decode(np.stack(images), prompts)[0]

    def decode(self, images, prompts):
        """images (B, K, h, w, 3) uint8 at the model's size, prompt ids -> ((B, H, A) in data units, malformed (B,))."""
        length, p = max(map(len, prompts)), self.model.processor
        ids, mask = np.full((len(prompts), length), p.pad), np.zeros((len(prompts), length), np.int64)
        for b, prompt in enumerate(prompts):  # padded on the left: the answer is appended on the right
            ids[b, length - len(prompt) :], mask[b, length - len(prompt) :] = prompt, 1
        batch = dict(images=images, input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == p.image_token_id) * 1)
        batch = to_device({k: torch.from_numpy(v) for k, v in batch.items()}, self.model.mean.device)
        horizon, dim = self.spec.horizon, self.spec.normalizer.dim
        answers, malformed = self.model(batch, self.fast, horizon * dim)
        chunks = np.stack([self.fast.decode(row, horizon, dim) for row in answers])
        return self.spec.normalizer.unnormalize(chunks), malformed.cpu().numpy()

    def nearest(self, chunks):
        """(n, H, A) in data units -> the nearest actions that predict can return: clipped, to tokens and back."""
        unit = self.spec.normalizer.normalize(chunks)
        coded = [self.fast.decode(self.fast.encode(chunk), *chunk.shape) for chunk in unit]
        return self.spec.normalizer.unnormalize(np.stack(coded))

    def open_episodes(self, root, names=None):
        """For evaluate.py, see common.episodes.play."""
        return ep.play(root, names, self.spec.cameras, self.spec.state_keys, self.spec.definition)


# ---- build, save, load -----------------------------------------------------------------------------------------------

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def weights_source(cfg):
    """-> folder that the backbone is read from: model, or load_model_weights (a checkpoint's model/ or merged/)."""
    if not cfg.load_model_weights:
        return local_folder(cfg.model, weights=not cfg.check)
    path = Path(cfg.load_model_weights)
    path = next((path / name for name in ("merged", "model") if (path / name).is_dir()), path)
    whole = any(path.glob("*.safetensors")) and not (path / "adapter_config.json").exists()
    hint = f"Merge a LoRA adapter first: {command('train_nora.py', merge=path.parent)}"
    require(whole, f"load_model_weights: {path} is no directory with the *.safetensors of a whole model. {hint}")
    return path


def build_model(cfg, processor, device, dtype, attention):
    """-> (Nora, peft model or None). Trained weights fp32, frozen ones in `dtype`; no `device`: no values yet."""
    mostly_trained = cfg.train in ("full", "language")
    vlm = qwen.load_backbone(processor.folder, torch.float32 if mostly_trained else dtype, attention, device=device)
    peft_model = choose_trained(cfg, vlm, processor.first_action, dtype)
    return Nora(vlm, processor).to(device), peft_model


def choose_trained(cfg, vlm, first_action, dtype):
    """Set requires_grad for cfg.train, add the LoRA adapter, cast trained weights to fp32 -> peft model or None."""
    peft_model = None
    vlm.requires_grad_(cfg.train in ("full", "language"))
    if cfg.train == "language":
        vlm.model.visual.requires_grad_(False)
    if cfg.train == "head":
        vlm.get_input_embeddings().weight.requires_grad_(True)
        vlm.lm_head.weight.requires_grad_(True)  # the same where they are tied
    if cfg.train == "lora":
        from peft import LoraConfig, get_peft_model

        rows = {"embed_tokens": list(range(first_action, first_action + NUM_ACTION_TOKENS))}
        lora = dict(r=cfg.lora_rank, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout)
        lora = LoraConfig(**lora, target_modules=LORA_TARGETS, trainable_token_indices=rows)
        peft_model = get_peft_model(vlm, lora)
    for p in vlm.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    if cfg.gradient_checkpointing:
        vlm.gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model


def save_model(folder, policy, peft_model, backbone, dtype, weights=None):
    """Write the export: `weights` (or the policy's) in upstream's layout or as an adapter, the backbone's own tokenizer
    and image files, statistics, FAST, policy.json. `backbone`: {backbone, digest} of the model it was trained from."""
    folder, vlm = Path(folder), policy.model.vlm
    folder.mkdir(parents=True, exist_ok=True)
    if peft_model is not None:
        peft_model.active_peft_config.base_model_name_or_path = backbone["backbone"]
        peft_model.save_pretrained(folder, state_dict=weights)
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    else:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in (weights or vlm.state_dict()).items()}
        if vlm.config.tie_word_embeddings:
            tensors.pop("lm_head.weight", None)
        vlm.save_pretrained(folder, state_dict=tensors)
    for name, content in policy.model.processor.files.items():  # as they are: every release of transformers reads them
        (folder / name).write_bytes(content)
    config = ckpt.read_json(folder / "config.json")
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    policy.fast.save(folder / "fast")
    save_stats(folder / "dataset_stats.json", policy.stats)
    about = dict(format_version=FORMAT, script=Path(__file__).stem) | backbone | policy.spec.plain()
    (folder / "policy.json").write_text(json.dumps(about, indent=2))


def read_exported(folder):
    """model/ directory -> (spec, fast, policy.json as a dict with the dtype of the weights added)."""
    path = Path(folder) / "policy.json"
    require(path.is_file(), f"{folder} has no policy.json: expected a steps_N directory of train_nora.py or its model/")
    about = ckpt.read_json(path)
    found = about.get("format_version")
    require(found == FORMAT, f"{path} has format_version {found}, this code reads {FORMAT}")
    stats = load_stats(path.with_name("dataset_stats.json"), definition=about["action_definition"])
    same = [stats["action"][k] for k in ("min", "max")] == [about["contract"][f"action_{k}"] for k in ("low", "high")]
    require(same, f"{path.with_name('dataset_stats.json')} belongs to another model: policy.json has other ranges")
    values = {f.name: about[f.name] for f in dataclasses.fields(Spec) if f.name != "stats"}
    fast, config = FastTokenizer.load(path.with_name("fast")), ckpt.read_json(path.with_name("config.json"))
    about["dtype"] = getattr(torch, config.get("dtype") or config["torch_dtype"])
    return Spec(**values, stats=stats), fast, about


def load_policy(path, device=None, dtype=None):
    """Open a checkpoint for inference: steps_N, its model/ or merged/, best, or an output_dir (its newest steps_N).
    `dtype` None: on a GPU that of its training, else fp32."""
    path = [Path(path), *ckpt.checkpoints_in(path)][-1]
    folder = path / "model" if (path / "model").is_dir() else path
    spec, fast, about = read_exported(folder)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (about["dtype"] if device.type == "cuda" else torch.float32)
    attention = qwen.pick_attention("auto", device, dtype)
    adapter = (folder / "adapter_config.json").is_file() and read_adapter(folder)  # which peft reads unchecked
    processor = Processor(open_base(folder, about) if adapter else folder, spec)
    vlm = qwen.load_backbone(processor.folder, dtype, attention, device=device)
    if adapter:
        from peft import PeftModel

        with opening(folder):
            vlm = PeftModel.from_pretrained(vlm, folder)
        vlm = vlm.merge_and_unload()
    return Policy(Nora(vlm, processor).to(device).eval(), fast, spec, {"backbone": processor.folder} if adapter else {})


def open_base(folder, about):
    """-> folder of the weights that the adapter in `folder` was trained on; any others are refused."""
    where = f"{folder / 'policy.json'} names it as the adapter's base model"
    found = local_folder(about["backbone"], why=f"; {where}: put it back there, or change the path in that file")
    same = weight_digest(found) == about["digest"]
    require(same, f"'{found}' holds other weights than those that the adapter was trained on; {where}")
    return found


def merge_adapter(folder):
    """Write steps_N/merged: the adapter folded into a full model that needs neither peft nor the base model. Merged in
    the dtype of the base: NORA's 7.5 GB in bf16 would take 15 GB of host memory in fp32."""
    folder = Path(folder)
    is_adapter = (folder / "model" / "adapter_config.json").is_file()
    require(is_adapter, f"--merge {folder}: it has no model/adapter_config.json; expected a steps_N of --train lora")
    about = read_exported(folder / "model")[2]
    dtype = next(tensor.dtype for _, tensor in read_tensors(open_base(folder / "model", about)))
    policy = load_policy(folder, "cpu", dtype)
    with ckpt.atomic_path(folder / "merged") as temporary:
        save_model(temporary, policy, None, {k: about[k] for k in ("backbone", "digest")}, dtype)
    return folder / "merged"


@dataclass
class Saver:
    """Writes steps_N (model/, state.pt or shards/, meta.json) and best (model/, meta.json) of a run."""

    run: Run
    policy: Policy
    optimizer: torch.optim.Optimizer
    peft_model: nn.Module | None
    backbone: dict
    dtype: torch.dtype
    meta: dict  # what is the same in every meta.json of the run

    def collect(self, resume=True):
        """-> what write() gets; `resume`: with the training state."""
        model = self.peft_model or self.policy.model.vlm
        weights = {k: v for k, v in model.state_dict(keep_vars=True).items() if v.requires_grad or not self.peft_model}
        state = dict(state=fsdp.state_of(self.policy.model, self.optimizer)) if resume else {}
        return dict(weights=weights, meta=self.meta | self.run.progress()) | state

    def write(self, folder, content):
        if "state" in content:
            fsdp.write_state(folder, content["state"], self.run.rank)
        if self.run.main:
            save_model(folder / "model", self.policy, self.peft_model, self.backbone, self.dtype, content["weights"])
            (folder / "meta.json").write_text(json.dumps(content["meta"], indent=2))


# ---- training --------------------------------------------------------------------------------------------------------


def lr_at(step, cfg):
    """Learning rate of update number `step` (from 0): linear warm-up, cosine to 0, and 0 beyond the end."""
    if step < cfg.num_warmup_steps:
        return cfg.learning_rate * (step + 1) / cfg.num_warmup_steps
    progress = min(1.0, (step - cfg.num_warmup_steps) / max(1, cfg.max_train_steps - cfg.num_warmup_steps))
    return cfg.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(cfg, parameters, fused):
    settings = dict(lr=cfg.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=cfg.weight_decay)
    if cfg.adamw_8bit:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **settings)
    return torch.optim.AdamW(parameters, **settings, fused=fused)


def fit_fast(cfg, data, folder=None, most=100_000):
    """Train FAST on at most `most` normalised training chunks -> it; with `folder` it is saved there, for all ranks."""
    dataset, normalize = NoraDataset(data.train, data.spec), data.spec.normalizer.normalize
    chunks = [normalize(dataset.chunk(i)[0]) for i in dataset.spread(most)]
    fast = FastTokenizer.fit(chunks, cfg.fast_scale, cfg.fast_vocab_size)
    return fast.save(folder) if folder else fast


def describe(cfg, data, show):
    """Print what was found: episodes, meaning and ranges of the actions, instructions, settings without effect."""
    d, spec, action, frames = cfg.dataset, data.spec, data.spec.definition, sum(e.num_frames for e in data.train)
    counts = f"{len(data.train)} training episodes, {frames} frames; {len(data.validation)} validation episodes"
    show(f"data      {counts}; {d.root_dir}")
    for message in data.excluded:
        show(f"excluded  {message}")
    show(f"action    {action.source}, {action.dim} dims, horizon {spec.horizon}, {spec.contract.kind}")
    show(f"          {'':<5}" + " ".join(f"{f'{name} {unit}'.strip():>11}" for name, unit in spec.contract.actions))
    for name in ("q01", "q99", "mean", "std"):
        show(f"          {name:<5}" + " ".join(f"{v:11.4g}" for v in spec.stats["action"][name]))
    own, texts = sum(e.instruction is not None for e in data.train), spec.contract.instructions
    show(f"text      {len(texts)} instruction(s), {own} episodes bring their own; e.g. {texts[0]!r}")
    unseen = "not seen by the model; dataset.state_in_prompt: true appends use_qpos and use_ee_pose"
    show(f"state     {' and '.join(spec.state_keys) + ', in the prompt' if spec.state_keys else unseen}")
    if d.camera_dropout_prob and d.min_cameras == len(spec.cameras):
        show(f"note      camera_dropout_prob has no effect: min_cameras keeps all of {list(spec.cameras)}")
    if (warmup := cfg.num_warmup_steps) >= cfg.max_train_steps:
        show(f"note      the warm-up takes {warmup} steps, the training {cfg.max_train_steps}: set --num_warmup_steps")
    for doubt in ep.doubts(data.train, action):
        show(f"warning   {doubt}")


def describe_fast(data, fast, show):
    """Print what FAST costs: per dimension the error of a perfect policy, beside that of holding still."""
    dataset, chunks = NoraDataset(data.train, data.spec), []
    stills = [data.spec.definition.still(e) for e in data.train]
    for i in dataset.spread(512):
        e, t = dataset.locate(i)
        chunks.append((*dataset.chunk(i), stills[e][t]))
    fast.describe(chunks, data.spec.normalizer, data.spec.contract.actions, show)


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer
    prompt and action tokens are left out, with a note."""
    data, collate = load_data(cfg), None
    describe(cfg, data, print)
    try:
        fast = fit_fast(cfg, data, most=4096) if cfg.fast == "fit" else FastTokenizer.load(cfg.fast)
        describe_fast(data, fast, print)
        collate = Collate(Processor(weights_source(cfg), data.spec), fast, data.spec.normalizer)
    except UserError as error:
        print(f"note      prompt and action tokens are not shown: {error}")
    dataset = NoraDataset(data.train, data.spec, cfg.dataset, cfg.seed)
    order = GlobalOrder(len(dataset), cfg.seed)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.per_device_batch_size, len(dataset)))]
    print(f"samples   {len(dataset)}; batch of {len(items)}, first: {items[0]['episode']} frame {items[0]['frame']}")
    shown = {k: np.stack([item[k] for item in items]) for k in ("images", "action", "is_pad")}
    if collate:
        shown |= {k: v.numpy() for k, v in collate(items).items() if k not in ("images", "names")}
    for key, value in shown.items():
        low, high = value.min(), value.max()
        print(f"          {key:<14} {str(value.shape):<24} {str(value.dtype):<8} {low:.4g} .. {high:.4g}")
    if collate:
        processor = collate.processor
        print(f"prompt    {processor.text(items[0]['instruction'], items[0]['state'])!r}")
        print(f"answer    {processor.tokenizer.decode(collate.answer(items[0]['action']))}")
        plan.check(cfg, dataset, collate, lambda c, dtype: build_model(c, processor, "cpu", dtype, "sdpa")[0])
    print("check passed")


def validate(policy, dataset, collate, cfg, run):
    """On frames spread evenly over the held-out episodes, summed over all ranks; padded steps do not count.
    -> {val_loss: per supervised token, val_token_accuracy, val_malformed_rate, val_mae_<dim>: in data units,
    val_action_mae: their mean, each in units of half the q01..q99 range, as mm and rad cannot be averaged,
    val_swap_ratio_<camera>: error of the normalised actions with another episode's image / with its own}"""
    spec, model, size = policy.spec, policy.model, cfg.per_device_batch_size
    pick = dataset.spread(cfg.val_samples)
    to_decode = np.linspace(0, len(pick) - 1, min(cfg.val_decode_samples, len(pick))).astype(int)  # places in pick
    to_decode, to_swap = set(to_decode.tolist()), set(to_decode[::4].tolist())  # the latter also with swapped images
    places = [(e, t / len(dataset.targets[e])) for e, t in map(dataset.locate, pick)]
    others = partners(*zip(*places, strict=True))  # None: there is only one episode
    counts, errors, steps = np.zeros(5), np.zeros(spec.normalizer.dim), 0  # loss, correct, tokens, malformed, decoded
    swaps, unit = np.zeros(1 + len(spec.cameras)), spec.normalizer.normalize  # errors: own images, camera k swapped
    model.eval()
    with fsdp.gathered(model):
        for first in progress(range(run.rank * size, len(pick), run.world * size), "validation", "batch"):
            mine, jobs = range(first, min(first + size, len(pick))), []  # jobs: (item, images, index into swaps)
            items = [dataset[(0, pick[i])] for i in mine]
            batch = collate(items)
            with torch.no_grad():
                out = model(to_device(batch, run.device))
            counts[:3] += out["loss_sum"].item(), out["correct"].item(), len(batch["targets"])
            for i, item in zip(mine, items, strict=True):
                swap = i in to_swap and others is not None
                if i in to_decode:
                    jobs.append((item, item["images"], 0 if swap else None))
                for k in range(len(spec.cameras) if swap else 0):
                    pictures = item["images"].copy()
                    pictures[k] = dataset[(0, pick[others[i]])]["images"][k]
                    jobs.append((item, pictures, 1 + k))
            if jobs:
                prompts = [model.processor.ids(item["instruction"], item["state"]) for item, _, _ in jobs]
                predicted, malformed = policy.decode(np.stack([pictures for _, pictures, _ in jobs]), prompts)
                for (item, _, slot), chunk, bad in zip(jobs, predicted, malformed, strict=True):
                    real = ~item["is_pad"]
                    if slot is not None:
                        swaps[slot] += np.abs(unit(chunk) - unit(item["action"]))[real].sum()
                    if slot in (None, 0):  # its own images
                        counts[3:] += bad, 1
                        errors += np.abs(chunk - item["action"])[real].sum(0)
                        steps += int(real.sum())
    model.train()
    loss, correct, tokens, malformed, decoded, steps, *sums = run.sum(*counts, steps, *errors, *swaps)
    own, *swapped = sums[len(errors) :]
    mae, moves = np.array(sums[: len(errors)]) / max(steps, 1), ~spec.normalizer.constant
    values = dict(val_loss=loss / tokens, val_token_accuracy=correct / tokens)
    values |= dict(val_malformed_rate=malformed / max(decoded, 1))
    values |= dict(val_action_mae=float(np.mean(mae[moves] / spec.normalizer.half[moves])) if moves.any() else 0.0)
    for camera, error in zip(spec.cameras if own > 0 else (), swapped, strict=False):
        values[f"val_swap_ratio_{camera}"] = error / own
    return values | {f"val_mae_{name}": v for (name, _), v in zip(spec.contract.actions, mae.tolist(), strict=True)}


def tell(values, show):
    """What validate returned -> a line for the log; shows a warning for every camera that the policy ignores."""
    text = f"loss {values['val_loss']:.4f} | acc {values['val_token_accuracy']:.3f} | malformed "
    text += f"{values['val_malformed_rate']:.1%} | action MAE {values['val_action_mae']:.4f} of half the range"
    for key in filter(lambda key: "swap" in key, values):
        text += f" | {key.removeprefix('val_')} {values[key]:.2f}"
        if values[key] < BLIND:
            show(f"warning   {key} {values[key]:.2f}: no worse with another episode's image, the policy ignores it")
    return text


def finish(run, cfg):
    """After the last step: merge a LoRA run if that was not done yet, and print the next command."""
    final = Path(cfg.output_dir) / f"steps_{run.step}"
    if run.main and run.step == run.total and cfg.train == "lora" and not (final / "merged").exists():
        print(f"merged model: {merge_adapter(final)}")
    evaluate = command("evaluate.py", checkpoint=cfg.output_dir, data=cfg.dataset.root_dir)
    run.finish(f"model: {final / 'model'}", f"evaluate: {evaluate}", plot=("train_loss", "val_loss"))


def main(cfg):
    if cfg.merge:
        return print(f"merged model: {merge_adapter(cfg.merge)}")
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    out, cuda = Path(cfg.output_dir), torch.cuda.is_available()
    bf16 = cfg.mixed_precision == "bf16" or (cfg.mixed_precision == "auto" and cuda)
    dtype = torch.bfloat16 if bf16 else torch.float32
    run = Run(cfg, out, cfg.per_device_batch_size, cfg.gradient_accumulation_steps, bf16)
    attention = qwen.pick_attention(cfg.attn_implementation, run.device, dtype)
    path = run.find(cfg.resume_from_checkpoint, out, ["steps_*"], exports=["best"])
    spec, fast, about = read_exported(path / "model") if path else (None, None, {})
    saved = ckpt.read_json(path / "meta.json") if path else {}
    data = load_data(cfg, run, spec and spec.stats, saved.get("episodes"), spec and spec.contract)
    if path:
        run.restore(path, saved, data.fingerprint(), FIXED)
    if not run.plan(cfg.max_train_steps, "--max_train_steps"):
        return finish(run, cfg)

    # ---- data
    if cfg.fast == "fit" and not path:
        run.once(fit_fast, cfg, data, out / "fast")
    fast = fast or FastTokenizer.load(out / "fast" if cfg.fast == "fit" else cfg.fast)
    sizes = f"FAST tokenizer '{cfg.fast}' has {fast.vocab_size} ids, the model has {NUM_ACTION_TOKENS} action tokens"
    require(fast.vocab_size <= NUM_ACTION_TOKENS, f"{sizes}: fit a smaller one (--fast fit --fast_vocab_size 1024)")
    lora = cfg.train == "lora"
    if path and not lora:  # the checkpoint holds the whole model
        source, backbone = path / "model", {k: about[k] for k in ("backbone", "digest")}
    else:
        source = weights_source(cfg)
        backbone = dict(backbone=stored_source(source if cfg.load_model_weights else cfg.model))
        backbone["digest"] = run.once(weight_digest, source) if lora else None
    if path:
        base = f"--resume {path}: its adapter was trained on the weights of {about['backbone']}"
        require(backbone["digest"] == about["digest"], f"{base}, {source} has others. Give the same model again")
    processor = Processor(source, data.spec)
    describe(cfg, data, run.print)
    describe_fast(data, fast, run.print)
    collate = Collate(processor, fast, data.spec.normalizer)
    dataset = NoraDataset(data.train, data.spec, cfg.dataset, cfg.seed)
    held_out = NoraDataset(data.validation, data.spec)
    if cfg.dataset.frame_store:
        names, recipe = list(data.spec.cameras.values()), ["squash", torch.__version__, *data.spec.image_size]
        dataset.reader.keep(cfg.dataset.frame_store, data.train, names, recipe, run)
    loader = run.loader(dataset, GlobalOrder(len(dataset), cfg.seed), collate, cfg.num_workers)

    # ---- model, optimizer
    plan.check(cfg, dataset, collate, lambda c, dtype: build_model(c, processor, "cpu", dtype, "sdpa")[0], run)
    torch.manual_seed(cfg.seed)
    core, peft_model = build_model(cfg, processor, None if cfg.fsdp else run.device, dtype, attention)
    layers = [*core.vlm.model.language_model.layers, *core.vlm.model.visual.blocks]
    model = run.prepare(core.train(), shards=layers if cfg.fsdp else ())
    if cfg.fsdp:  # only now, so that each rank keeps its shard alone
        load_weights(core, read_tensors(source), source, lambda n: f"vlm.{qwen.module_name(n)}", device=run.device)
    trained = [p for p in core.parameters() if p.requires_grad]
    optimizer = build_optimizer(cfg, trained, fused=cuda or None)
    if path:
        fsdp.restore_state(core, optimizer, path, run.group)
    policy = Policy(core, fast, data.spec)
    export = dtype.itemsize * sum(p.numel() for p in (trained if lora else core.parameters()))
    size = 12 * sum(p.numel() for p in trained) + export  # fp32 weights and two moments, the export
    run.describe(core, len(dataset), size, out, f", train {cfg.train}; attention {attention}")
    run.write("dataset_stats.json", json.dumps(data.spec.stats, indent=2))
    run.write("validation_episodes.txt", "".join(f"{e.name}\n" for e in data.validation))
    meta = dict(format_version=FORMAT, script=Path(__file__).stem, fingerprint=data.fingerprint())
    meta |= dict(validation=[e.name for e in data.validation], episodes=data.table)
    saver = Saver(run, policy, optimizer, peft_model, backbone, dtype, meta)
    run.checkpoints(out, "steps_{step}", saver.write, size, saver.collect, cfg.keep_checkpoints)

    # ---- loop
    for step in run.steps(loader, cfg.wandb_project_name, cfg.wandb):
        tokens = run.sum(sum(len(b["targets"]) for b in step.batches))  # of the whole step, over all ranks
        for batch in step.micro_batches(model):
            result = model(batch)
            step.backward(result["loss_sum"] / tokens, result["sample_loss"])
            step.add(loss_sum=result["loss_sum"], correct=result["correct"], tokens=len(batch["targets"]))
        step.update(optimizer, lr_at(step.index, cfg), cfg.gradient_clipping)

        if step.every(cfg.logging_frequency):
            mean = step.mean()
            loss, accuracy = mean["loss_sum"] / mean["tokens"], mean["correct"] / mean["tokens"]
            values = dict(train_loss=loss, token_accuracy=accuracy, grad_norm=mean["grad_norm"], learning_rate=step.lr)
            step.log(values, f"loss {loss:.4f} | acc {accuracy:.3f} | grad {mean['grad_norm']:.2f}")
        if data.validation and step.every(cfg.val_frequency):
            v = validate(policy, held_out, collate, cfg, run)
            if step.validated(v, v["val_loss"], tell(v, run.log.print)):
                run.save_best(out / "best", saver.write, export, partial(saver.collect, resume=False))
        if step.every(cfg.checkpoint_save_frequency):
            run.save()

    finish(run, cfg)


if __name__ == "__main__":
    launch(main, Config, ALIASES)
