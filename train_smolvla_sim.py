"""SmolVLA (Shukor et al. 2025, arXiv 2506.01844): SmolVLM2 with a flow-matching action expert, on simulated or real
HDF5 insertion episodes. Names, shapes and results are those of LeRobot's SmolVLAPolicy: lerobot/smolvla_base loads
here, final_hf/ loads there. One sample is one frame: K images, text and robot state -> the next S actions.

    python train_smolvla_sim.py --config configs/smolvla_sim.yaml --check               # the data, no weights needed
    bash shells/compute_dataset_stats_sim.sh                                            # dataset_stats_sim.yaml
    bash shells/train_smolvla_sim.sh --multi-gpu --num-gpus 5                           # torchrun --nproc_per_node=5
    python train_smolvla_sim.py --config configs/demo/smolvla_sim.yaml --max_steps 20   # a CPU, make_demo.py's output

Output, in output_dir: checkpoints/checkpoint_step_N.pt (resumes; what stays frozen is beside it, once), best_hf/ and
final_hf/ (LeRobot's format), validation_episodes.txt, loss_spikes.txt and .csv, metrics.jsonl, loss.png.

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
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import default_collate

from common import MissingFile, command, frozen, hub, lerobot, log, plan, require
from common import checkpoint as ckpt
from common import episodes as ep
from common.config import config_from
from common.ema import Ema
from common.policy import Contract, partners
from common.run import Run, launch, to_device
from common.sampler import GlobalOrder, generator_at
from common.spikes import Spikes
from common.stats import Normalizer, load_stats, save_stats

FORMAT = 3  # of checkpoint_step_N.pt and of meta.json in an exported folder
ROPE_BASE = 10_000.0  # SmolVLA's own, for VLM and expert; the 100,000 of the VLM's config is not used
HEADS = ("state_proj", "action_in_proj", "action_out_proj", "action_time_mlp_in", "action_time_mlp_out")
NORMALIZERS = dict(MEAN_STD="mean_std", MIN_MAX="min_max", QUANTILES="q01_q99", IDENTITY="identity")  # LeRobot's: ours


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class DatasetConfig:
    root_dir: str = ""  # folder with .h5 episodes, searched recursively; several: a folder of links to them
    horizon: int = 50  # S, future actions per sample, in frames; equals policy.chunk_size
    task_instruction: str = "Insert needle into eye trocar in simulation"  # for files without language_instruction
    cameras: tuple[str, ...] = ("side_camera", "tool_camera", "top_camera")  # recorded names: LeRobot's camera1, ...
    use_qpos: bool = False  # the state contains qpos, before ee_pose
    use_ee_pose: bool = True  # the state contains ee_pose; without both the model sees no state
    state_noise: float = 0.0  # std of noise on the state in training, in standard deviations of each dimension
    state_dropout: float = 0.0  # chance that a training sample has the mean state, so that its images must tell
    use_ee_pose_delta_as_action: bool = False  # target = ee_pose[t+1] - ee_pose[t] instead of the recorded action[t]
    rotation_unit: Literal["auto", "rad", "deg"] = "auto"  # of ee_pose[:, 3:6]; auto: deg if a value exceeds 2 pi
    skip_bad_episodes: bool = False  # leave unreadable files out, listed and counted, instead of stopping
    frame_dir: str | None = None  # folder on a local disk where all images are kept decoded; null: decode each time
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
    noise_draws: int = 1  # chunks that a prediction is the mean of; LeRobot draws one
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
    gradient_checkpointing: bool = False  # recompute activations: less memory, about a third slower
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
    reset_scheduler: bool = False  # with resume: keep weights and moments, start the schedule (warm-up) again, once
    init_from: str | None = None  # new run from these weights: a .pt, a LeRobot policy directory or hub id
    check: bool = False  # read the data, build and print one batch, stop


ALIASES = {"max_steps": "training.steps", "resume_from_checkpoint": "resume"}
ACCEPTED = {"training.use_amp": (False,), "training.use_torch_compile": (False,), "policy.train_state_proj": (True,)}
ACCEPTED |= {"training.pin_memory": None, "policy.n_obs_steps": (1,)}  # in the guide's YAML, one meaning here
PATTERNS = ("checkpoint_step_*.pt", "checkpoint_latest.pt")  # what can be resumed
NAMES = dict(samples_per_s="train/samples_per_sec", data_wait="train/data_wait", skipped_steps="train/skipped_steps")
NAMES["memory_gb"] = "system/vram_allocated_gb"
FREE = ("vlm_model_name", "pretrained_model_id", "num_steps", "noise_draws", "n_action_steps")  # of policy
FIXED = (  # what a resume must not change: moments, noise or sample order would belong to another run
    *("seed", "train", "lora_rank", "lora_alpha", "normalization.enable", "normalization.mode", "dataset.cameras"),
    *("dataset.use_qpos", "dataset.use_ee_pose", "dataset.use_ee_pose_delta_as_action", "dataset.rotation_unit"),
    *("dataset.state_noise", "dataset.state_dropout"),
    *(f"policy.{f.name}" for f in dataclasses.fields(PolicyConfig) if f.name not in FREE),
)
POSITIVE = "training.steps training.batch_size training.gradient_accumulation_steps training.log_freq"
POSITIVE += " training.save_freq validation.val_freq validation.num_samples policy.num_steps policy.noise_draws"
POSITIVE += " lora_rank lora_alpha scheduler.peak_lr optimizer.eps policy.min_period policy.max_period"
# weights are useless with other values of these, even where their shapes fit
SAME_NETWORK = ("num_vlm_layers", "attention_mode", "self_attn_every_n_layers", "min_period", "max_period")


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    d, p = cfg.dataset, cfg.policy
    values = {key: operator.attrgetter(key)(cfg) for key in POSITIVE.split()}
    wrong = ", ".join(f"{key} is {value}" for key, value in values.items() if value <= 0)
    require(not wrong, f"{wrong}: expected more than 0")
    differ = f"dataset.horizon is {d.horizon}, policy.chunk_size is {p.chunk_size}: expected the same number"
    require(d.horizon == p.chunk_size, differ)
    sent = f"policy.n_action_steps is {p.n_action_steps}: expected 1 to {p.chunk_size}, the actions of a chunk"
    require(1 <= p.n_action_steps <= p.chunk_size, sent)  # LeRobot opens no other
    shares = [cfg.training.ema_decay, *cfg.optimizer.betas]
    told = f"training.ema_decay is {shares[0]}, optimizer.betas are {shares[1:]}: expected 0 to below 1"
    require(0 <= min(shares) <= max(shares) < 1, told)
    both = f"--resume {cfg.resume} continues a run, --init_from {cfg.init_from} starts one: give one of them"
    require(cfg.resume in (None, "auto") or not cfg.init_from, both)
    alone = "--reset_scheduler restarts the schedule of a resumed run: add --resume CHECKPOINT"
    require(cfg.resume or not cfg.reset_scheduler, alone)


# ---- data ------------------------------------------------------------------------------------------------------------


@dataclass
class DataSpec:
    """What a row of data means: cameras, state, action, normalisation. Saved in every checkpoint."""

    cameras: list  # recorded names in policy order: camera1, camera2, ...
    image_shapes: list  # [height, width] as recorded, per camera; None: not known
    state_keys: list  # of ["qpos", "ee_pose"], in this order, or ["no_state"]
    state_names: list  # [[name, unit]] per state dim; empty with no_state
    action_definition: dict  # common.episodes.ActionDefinition
    action_names: list  # [[name, unit]] per action dim, for reports: q1..: a target for qpos
    absolute: bool  # an action is a target, not a motion
    rate_hz: float  # frames per second; 0: not known
    instructions: list  # of the training; empty: not known
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

    def part(self, indices):
        return [self.episodes[i] for i in indices]


def load_data(cfg, run=None, saved=None):
    """Find, read, split and describe the episodes. `saved`: a resumed checkpoint, whose statistics are kept if it was
    trained on this data; with skip_bad_episodes also if files were left out since."""
    d, n = cfg.dataset, cfg.normalization
    found, excluded = ep.load_episodes(d.root_dir, d.skip_bad_episodes, run)
    count = cfg.validation.num_episodes if cfg.validation.enable else 0
    split = functools.partial(ep.hold_out, len(found), count, cfg.seed)
    before = saved["episodes"] if saved and d.skip_bad_episodes else None
    train, validation, table, gone = ep.split_or_keep({e.name: e.num_frames for e in found}, split, before)
    trained, held_out = [found[i] for i in train], [found[i].name for i in validation]
    fingerprint = hashlib.sha256(json.dumps(ep.trained_in(table)).encode()).hexdigest()[:16]
    first, cameras = found[0], ep.choose_cameras(found, d.cameras)
    state_keys = [k for k in ("qpos", "ee_pose") if getattr(d, f"use_{k}")] or ["no_state"]
    present = ["no_state", *(k for k in ("qpos", "ee_pose") if getattr(first, k) is not None)]
    made = f"the state is made of {state_keys} (dataset.use_qpos, dataset.use_ee_pose); {first.path} has {present}"
    require(set(state_keys) <= set(present), made)
    definition = ep.define_action(found, d.use_ee_pose_delta_as_action, d.rotation_unit)
    plain = dataclasses.asdict(definition)
    if saved and saved["fingerprint"] == fingerprint:
        stats = saved["normalization_stats"]
    elif n.enable and n.stats_file:
        must_match = plain, held_out, [e.name for e in trained], stats_command(cfg)
        stats = load_stats(n.stats_file, ("action", "observation.state"), *must_match)
        ep.check_state_stats(stats, trained, state_keys, f"Make them with: {stats_command(cfg)}")
    else:
        stats = ep.insertion_stats(trained, definition, held_out, state_keys)
    state_dim = ep.robot_state(first, state_keys).shape[1]
    p, hint = cfg.policy, "raise it (a pretrained policy does not fit then), or choose fewer"
    for what, dim, most in (("state", state_dim, p.max_state_dim), ("action", definition.dim, p.max_action_dim)):
        require(dim <= most, f"the {what} has {dim} dims, policy.max_{what}_dim is {most}: {hint}")
    names, state_names = ep.name_columns(found, definition, state_keys)
    texts = sorted({e.instruction or d.task_instruction for e in trained})
    about = dict(cameras=cameras, image_shapes=[first.sizes[c] for c in cameras])
    about |= dict(state_keys=state_keys, state_names=state_names, action_definition=plain, action_names=names)
    about |= dict(absolute=bool(definition.still(first).any()), instructions=texts, stats=stats)
    about["rate_hz"] = float(np.median([e.rate_hz for e in found if e.rate_hz] or [0]))
    mode = n.mode if n.enable else "IDENTITY"
    spec = DataSpec(**about, normalization=mode, task_instruction=d.task_instruction)
    return Data(found, train, validation, excluded + gone, spec, fingerprint, table)


def stats_command(cfg):
    """The command that makes normalization.stats_file for exactly this run: its data, split and state."""
    v, keys = cfg.validation, ("root_dir", "use_qpos", "use_ee_pose", "use_ee_pose_delta_as_action", "rotation_unit")
    flags = {f"dataset.{k}": getattr(cfg.dataset, k) for k in (*keys, "skip_bad_episodes")}
    flags |= dict(seed=cfg.seed, num_episodes=v.num_episodes if v.enable else 0, output=cfg.normalization.stats_file)
    return command("compute_stats.py", **flags)


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


class SmolVLADataset(ep.Chunks):
    """One item per frame that has a target. Item (position, i), where `position` seeds noise, flow time, augmentation:

    images list of K (h, w, 3) uint8 | state (state_dim,), action (S, action_dim) float32 in data units | is_pad (S,)
    bool: past the episode's end | noise (S, A) float32 ~ N(0, 1), time float ~ 0.001 + 0.999 Beta(1.5, 1) | instruction
    str | name (episode index, episode, frame)
    """

    def __init__(self, data, indices, cfg, training=False, reader=None):
        self.spec, self.cfg, self.training = data.spec, cfg, training
        self.indices, self.reader = list(indices), reader or ep.ImageReader()
        super().__init__(data.part(indices), data.spec.definition, cfg.policy.chunk_size)
        self.states = [ep.robot_state(e, data.spec.state_keys) for e in self.episodes]

    def __getitem__(self, key):
        position, i = key
        e, t = self.locate(i)
        episode, p, d = self.episodes[e], self.cfg.policy, self.cfg.dataset
        rng = generator_at(self.cfg.seed, position, "noise")
        action, is_pad = self.chunk(i)
        item = dict(
            state=self.disturb(self.states[e][t], position) if self.training else self.states[e][t],
            action=action,
            is_pad=is_pad,
            noise=rng.standard_normal((p.chunk_size, p.max_action_dim), dtype=np.float32),
            time=0.001 + 0.999 * rng.beta(1.5, 1.0),
            instruction=episode.instruction or self.spec.task_instruction,
            name=(self.indices[e], episode.name, t),
        )
        images = [self.reader.read(episode, c, t) for c in self.spec.cameras]
        if self.training and d.augment:
            rng = generator_at(self.cfg.seed, position, "augment")
            images = [augment_image(image, d, rng) for image in images]
        return item | dict(images=images)

    def disturb(self, state, position):
        """State noise and state dropout: a policy that cannot rely on its state must look at its images."""
        d, stats = self.cfg.dataset, self.spec.stats["observation.state"]
        rng = generator_at(self.cfg.seed, position, "state")
        noise = d.state_noise * np.asarray(stats["std"]) * rng.standard_normal(len(state))
        return np.float32(stats["mean"] if rng.random() < d.state_dropout else state + noise)


class Collate:
    """Lists of raw observations -> model inputs, the same function in training and predict."""

    def __init__(self, tokenizer, policy, spec):
        self.tokenizer, self.policy, self.spec = tokenizer, policy, spec
        for text in spec.instructions:
            if len(tokenizer(text)["input_ids"]) >= policy.tokenizer_max_length:  # not >: a newline follows
                print(f"warning   policy.tokenizer_max_length {policy.tokenizer_max_length} cuts the end of {text!r}")

    def inputs(self, observations):
        """images: list of one tensor (B*K, h, w, 3), or of B*K tensors (1, h, w, 3) if sizes differ | tokens,
        token_mask (B, L): the text ends with a newline, as in LeRobot's preprocessor | state (B, max_state_dim)
        normalised, zero-padded."""
        texts = [(o.get("instruction") or self.spec.task_instruction).rstrip("\n") + "\n" for o in observations]
        length = dict(padding="max_length", max_length=self.policy.tokenizer_max_length, truncation=True)
        tokens = self.tokenizer(texts, padding_side="right", return_tensors="pt", **length)
        states = [np.asarray(o["state"]) if self.spec.state_names else np.zeros(1) for o in observations]
        state = self.spec.state_scale.normalize(np.stack(states))
        images = list(itertools.chain(*(o["images"] for o in observations)))
        same_size = len({(image.shape, image.dtype) for image in images}) == 1
        return dict(
            images=[default_collate(group) for group in ([images] if same_size else [[image] for image in images])],
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


def rotary(positions, width):
    """positions (B or 1, n) -> cosine, sine (B or 1, 1, n, width / 2) fp32: once for all layers and heads."""
    half = width // 2
    rate = ROPE_BASE ** -(torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angle = positions[:, None, :, None].float() * rate
    return angle.cos(), angle.sin()


def rope(x, table):
    """(B, heads, n, d) turned by rotary's table: half-split rotation, computed in fp32."""
    (x1, x2), (cos, sin) = x.float().chunk(2, dim=-1), table
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def attend(q, k, v, mask):
    """(B, heads, n, d) x (B, kv_heads, m, d) -> (B, n, heads * d); mask (B or 1, 1, n or 1, m), True may be seen."""
    repeat = q.shape[1] // k.shape[1]  # written out: the fast kernels with a mask know no grouped heads
    k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    mask = mask.expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), mask).transpose(1, 2).flatten(2)


def heads(layer, name, x):
    """q_proj, k_proj or v_proj of a Llama layer, split into heads: x (B, n, width) -> (B, heads, n, head_dim)."""
    return getattr(layer.self_attn, name)(x).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)


def finish(layer, x, attended):
    """The rest of a Llama layer, after its attention."""
    x = x + layer.self_attn.o_proj(attended)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def expert_attention(vlm, p):
    """-> per expert layer: True for joint self-attention, False for cross-attention to the prefix. Checks the sizes."""
    layers, side = vlm.text_config.num_hidden_layers, list(p.resize_imgs_with_padding)
    wrong = f"policy.num_vlm_layers is {p.num_vlm_layers}: '{p.vlm_model_name}' has {layers}"
    require(1 <= p.num_vlm_layers <= layers, wrong)
    unit, most = vlm.vision_config.patch_size * vlm.scale_factor, vlm.vision_config.image_size
    square = side[0] == side[1] and side[0] % unit == 0 and unit <= side[0] <= most
    expected = f"a square in multiples of {unit} (patch x shuffle) up to {most}, e.g. {most} {most}"
    require(square, f"policy.resize_imgs_with_padding is {side}: expected {expected}")
    count = p.num_expert_layers if p.num_expert_layers > 0 else p.num_vlm_layers
    every = 1 if p.attention_mode == "self_attn" else p.self_attn_every_n_layers
    joint = [every > 0 and layer % every == 0 for layer in range(p.num_vlm_layers)]
    # LeRobot builds an expert layer by its own index but runs it by the index of its VLM layer: both must agree
    agree = p.num_vlm_layers % count == 0 and joint[:: p.num_vlm_layers // count] == joint[:count]
    rule = f"it must divide the {p.num_vlm_layers} VLM layers and leave self- and cross-attention in their places"
    require(agree, f"policy.num_expert_layers is {count}: {rule} (self_attn_every_n_layers is {every})")
    return joint[:count]


class FlowModel(nn.Module):
    """The network, with LeRobot's parameter names (its VLAFlowMatching), made of transformers' modules: SmolVLM, and a
    LlamaModel as the expert. Image and text tokens attend to each other but never to the state token, and neither
    attends to the noisy actions. So images and text are run first, then the state, then the actions, each on the keys
    and values of what came before: with a frozen VLM autograd records nothing of images and text, and sampling runs
    the prefix once, all in one code path."""

    def __init__(self, vlm_config, p):
        super().__init__()
        from transformers import LlamaModel, SmolVLMForConditionalGeneration

        self.policy, self.joint, self.recompute = p, expert_attention(vlm_config, p), False
        self.stride = p.num_vlm_layers // len(self.joint)
        self.last_used = (len(self.joint) - 1) * self.stride  # of this VLM layer only keys and values are needed
        vlm_config = copy.deepcopy(vlm_config)
        vlm_config.text_config.num_hidden_layers = p.num_vlm_layers
        vlm_config.tie_word_embeddings = vlm_config.text_config.tie_word_embeddings = False
        expert_config = copy.deepcopy(vlm_config.text_config)  # the VLM's layers, but W wide
        D, W = expert_config.hidden_size, int(expert_config.hidden_size * p.expert_width_multiplier)
        require(W > 1 and W % 2 == 0, f"policy.expert_width_multiplier: the expert {W} wide, expected an even width")
        mlp_width = -(-4 * int(2 * W / 3) // 256) * 256  # 8/3 W as in Llama, rounded up to a multiple of 256
        sizes = dict(hidden_size=W, intermediate_size=mlp_width, num_hidden_layers=len(self.joint))
        expert_config.update(sizes | dict(vocab_size=1, pad_token_id=None))  # it gets no tokens
        vlm, expert = SmolVLMForConditionalGeneration(vlm_config), LlamaModel(expert_config)
        expert.embed_tokens = expert.rotary_emb = vlm.model.text_model.rotary_emb = None  # not used here
        kv = expert_config.num_key_value_heads * expert_config.head_dim
        for joint, layer in zip(self.joint, expert.layers, strict=True):
            if not joint:  # projects the VLM's keys and values
                layer.self_attn.k_proj = nn.Linear(kv, kv, bias=False)
                layer.self_attn.v_proj = nn.Linear(kv, kv, bias=False)
        self.vlm_with_expert = nn.ModuleDict(dict(vlm=vlm, lm_expert=expert))
        self.state_proj = nn.Linear(p.max_state_dim, D)
        self.action_in_proj, self.action_out_proj = nn.Linear(p.max_action_dim, W), nn.Linear(W, p.max_action_dim)
        self.action_time_mlp_in, self.action_time_mlp_out = nn.Linear(2 * W, W), nn.Linear(W, W)
        self.float()  # transformers makes parts of the VLM in the bfloat16 of the published config

    @property
    def vlm(self):
        return self.vlm_with_expert.vlm.model

    def run_layer(self, layer, *args):
        """layer(*args), under activation checkpointing if `recompute` is set."""
        recompute = self.recompute and torch.is_grad_enabled()
        return checkpoint(layer, *args, use_reentrant=False) if recompute else layer(*args)

    def vlm_layer(self, i, x, table, mask, past):
        """Layer i of the VLM's text: tokens x (B, n, D) after `past` (keys, values) -> (x, keys, values)"""
        layer = self.vlm.text_model.layers[i]
        y = layer.input_layernorm(x)
        k, v = rope(heads(layer, "k_proj", y), table), heads(layer, "v_proj", y)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        if i < self.last_used:
            x = finish(layer, x, attend(rope(heads(layer, "q_proj", y), table), k, v, mask))
        return x, k, v

    def vlm_layers(self, x, table, mask, past=None):
        """Tokens x (B, n, D) through the VLM's text layers, after `past` -> per layer keys (RoPE applied) and values
        (B, kv_heads, n + past, d)."""
        kv = []
        for i in range(self.last_used + 1):
            x, k, v = self.run_layer(self.vlm_layer, i, x, table, mask, past and past[i])
            kv.append((k, v))
        return kv

    def prefix(self, features, tokens, token_mask, state, draws=1):
        """features (B, K*T, D), tokens and token_mask (B, L), state (B, max_state_dim) -> (keys and values per expert
        layer, {joint: (RoPE table, mask) of the actions}), each row repeated for `draws` samples."""
        text = self.vlm.text_model.embed_tokens(tokens)
        x = torch.cat([features.to(text.dtype), text], dim=1) * math.sqrt(text.shape[-1])  # the state is not scaled
        valid = torch.cat([token_mask.new_ones(features.shape[:2]), token_mask, token_mask.new_ones(len(x), 1)], dim=1)
        positions, width = (valid.cumsum(1) - 1).clamp(min=0), self.vlm.text_model.layers[0].self_attn.head_dim
        # padded text is masked for everything else; its own outputs are never read
        kv = self.vlm_layers(x, rotary(positions[:, :-1], width), valid[:, None, None, :-1])
        with torch.autocast(state.device.type, enabled=False):  # bf16 would round a millimetre of the state away
            state = self.state_proj(state.float())[:, None]
        table = rotary(positions[:, -1:], width)
        kv = self.vlm_layers(state, table, valid[:, None, None], past=kv)[:: self.stride]
        for e, layer in enumerate(self.vlm_with_expert.lm_expert.layers):
            if not self.joint[e]:  # projected again by the expert, no further RoPE
                k, v = (z.transpose(1, 2).flatten(2) for z in kv[e])
                kv[e] = heads(layer, "k_proj", k), heads(layer, "v_proj", v)
        if draws > 1:
            valid = valid.repeat_interleave(draws, 0)
            kv = [(k.repeat_interleave(draws, 0), v.repeat_interleave(draws, 0)) for k, v in kv]
        steps = torch.arange(self.policy.chunk_size, device=x.device)[None]
        # an action sees the prefix, itself and the actions before it
        causal, seen = (steps <= steps.T).expand(len(valid), 1, -1, -1), valid[:, None, None]
        joint_mask = torch.cat([seen.expand(-1, -1, steps.shape[1], -1), causal], dim=3)
        joint = rotary(valid.sum(1, keepdim=True) + steps, width), joint_mask
        return kv, {True: joint, False: (rotary(steps, width), seen)}

    def embed_actions(self, x_t, t):
        """Noisy actions x_t (B, S, A) and flow time t (B,) -> (B, S, W), in fp32 whatever the autocast."""
        with torch.autocast(x_t.device.type, enabled=False):
            x, p = self.action_in_proj(x_t.float()), self.policy
            fraction = torch.linspace(0, 1, x.shape[-1] // 2, dtype=torch.float64, device=t.device)
            period = p.min_period * (p.max_period / p.min_period) ** fraction
            angle = 2 * math.pi / period * t.double()[:, None]
            tau = torch.cat([angle.sin(), angle.cos()], dim=1).to(x.dtype)[:, None].expand_as(x)
            return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(torch.cat([x, tau], dim=2))))

    def expert_layer(self, layer, x, k, v, joint, view):
        """A layer of the expert: actions x (B, S, W) on the prefix's keys k and values v; view: (table, mask) -> x"""
        y, (table, mask) = layer.input_layernorm(x), view
        if joint:
            k = torch.cat([k, rope(heads(layer, "k_proj", y), table).to(k.dtype)], dim=2)
            v = torch.cat([v, heads(layer, "v_proj", y).to(v.dtype)], dim=2)
        return finish(layer, x, attend(rope(heads(layer, "q_proj", y), table), k, v, mask))

    def velocity(self, prefix, x_t, t):
        """Noisy actions x_t (B, S, A) at flow time t (B,) -> v (B, S, A) fp32."""
        (kv, views), x, expert = prefix, self.embed_actions(x_t, t), self.vlm_with_expert.lm_expert
        for joint, layer, (k, v) in zip(self.joint, expert.layers, kv, strict=True):
            x = self.run_layer(self.expert_layer, layer, x, k, v, joint, views[joint])
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(expert.norm(x).float())


class SmolVLA(nn.Module):
    """FlowModel behind this script's batches. forward(batch) is the loss, sample(batch, noise) the actions."""

    def __init__(self, vlm_config, policy, action_dim):
        super().__init__()
        self.model, self.policy, self.action_dim = FlowModel(vlm_config, policy), policy, action_dim

    def prefix(self, batch, draws=1):
        """Images through resize, vision tower and connector -> FlowModel.prefix"""
        device, side, pictures = batch["state"].device, self.policy.resize_imgs_with_padding[0], []
        for images in batch["images"]:  # one tensor, or one per image: see Collate.inputs
            x = images.to(device, non_blocking=True).permute(0, 3, 1, 2)
            pictures.append(resize_with_pad(x.float() / (255 if x.dtype == torch.uint8 else 1), side))
        vlm, x = self.model.vlm, torch.cat(pictures)
        x = vlm.vision_model(x.to(vlm.vision_model.post_layernorm.weight.dtype)).last_hidden_state
        features = vlm.connector(x).unflatten(0, (len(batch["tokens"]), -1)).flatten(1, 2)  # (B, K*T, D)
        return self.model.prefix(features, batch["tokens"], batch["token_mask"], batch["state"], draws)

    def forward(self, batch):
        """-> sums over the unpadded steps, for the caller to divide by global counts: flow_sum () of squared errors in
        all A dims | real_sum () in the real dims | temporal_sum () of squared jumps of the clean-action estimate, over
        real dims and pairs of steps | sample_loss (B,): the flow loss of each sample, for reports.

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
        """Normalised actions (B, S, action_dim): Euler steps from noise (B * draws, S, A) at t = 1 to t = 0, then the
        mean of an observation's draws."""
        count, x, n = len(batch["tokens"]), noise, self.policy.num_steps
        prefix = self.prefix(batch, len(x) // count)
        for step in range(n):
            x = x - self.model.velocity(prefix, x, torch.full((len(x),), 1 - step / n, device=x.device)) / n
        return x.unflatten(0, (count, -1)).mean(1)[..., : self.action_dim]


class Policy:
    """A trained model with everything predict needs. Made by load_policy, and by the training for its validation."""

    def __init__(self, model, collate, bf16=False, needs=None):
        self.model, self.collate, self.bf16 = model, collate, bf16
        self.spec = spec = collate.spec
        self.stats, names = spec.stats, [f"camera{k + 1}" for k in range(len(spec.cameras))]
        state, action = (self.stats[key] for key in ("observation.state", "action"))
        first_row = "row 0 belongs to the observed frame (a pose delta: from it to the next), row k to k frames later. "
        first_row += "Send each row as it is" if spec.absolute else "Add each row to the last target, not to the pose"
        about = dict(images={name: size and tuple(size) for name, size in zip(names, spec.image_shapes, strict=True)})
        about |= dict(recorded=dict(zip(names, spec.cameras, strict=True)))
        about |= dict(actions=self.action_names(), action_low=action.get("min"), action_high=action.get("max"))
        if spec.state_names:
            about |= dict(state=[tuple(pair) for pair in spec.state_names], low=state.get("min"), high=state.get("max"))
        about |= dict(horizon=collate.policy.chunk_size, rate_hz=spec.rate_hz or None, first_row=first_row)
        about |= dict(instructions=spec.instructions, kind="absolute" if spec.absolute else "delta", needs=needs or {})
        self.contract = Contract(Path(__file__).stem, **about)

    def predict(self, observations, noise=None):
        """list of {images: {camera1: (h, w, 3) uint8 RGB, ...}, state: (state_dim,) in data units, instruction: str} ->
        (B, S, action_dim) float32 in data units (joint targets: rad, as recorded). `noise` (B * draws, S, A): start of
        the sampling; default: the same draws for every observation and call, so that equal observations give equal
        actions."""
        self.contract.check(observations)
        contiguous = functools.partial(np.array, order="C")  # PyTorch takes no image[..., ::-1]
        inputs = [o | dict(images=[contiguous(o["images"][c]) for c in self.contract.images]) for o in observations]
        return self.decode(self.collate.inputs(inputs), noise)

    def decode(self, batch, noise=None):
        """Collate.inputs' batch -> (B, S, action_dim) float32 in data units."""
        device, p = next(self.model.parameters()).device, self.collate.policy
        if noise is None:
            generator = torch.Generator().manual_seed(0)
            noise = torch.randn(p.noise_draws, p.chunk_size, p.max_action_dim, generator=generator)
            noise = noise.repeat(len(batch["tokens"]), 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            actions = self.model.sample(to_device(batch, device), torch.as_tensor(noise).to(device))
        return self.spec.action_scale.unnormalize(actions.float().cpu().numpy())

    def reset(self):
        """Nothing to forget: every prediction depends on its own observation alone."""

    def describe(self):
        return self.contract.describe(self)

    def open_episodes(self, root, names=None):
        """For evaluate.py: see common.episodes.play."""
        cameras = dict(zip(self.contract.images, self.spec.cameras, strict=True))
        return ep.play(root, names, cameras, self.spec.state_keys, self.spec.definition)

    def action_names(self):
        """[(name, unit)] per action dim, for reports."""
        return [tuple(pair) for pair in self.spec.action_names]


# ---- build, save, load -----------------------------------------------------------------------------------------------


def open_vlm(source, why=""):
    """The VLM's folder or hub id -> (transformers config, tokenizer); no weights. `why`: see hub.local_folder."""
    from transformers import AutoConfig, AutoTokenizer

    folder = hub.local_folder(source, weights=False, why=why)
    with hub.opening(folder):
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    require(config.model_type == "smolvlm", f"policy.vlm_model_name is a {config.model_type}, not a SmolVLM2 (smolvlm)")
    return config, tokenizer


class Unread:
    """Placeholder for the NumPy arrays (action_mean, ...) in checkpoints of the guide's code: loaded, never used."""

    def __init__(self, *_): ...

    def __setstate__(self, _): ...


NUMPY = ["numpy.ndarray", "numpy.dtype", "_codecs.encode"]
for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    NUMPY += [f"{module}._reconstruct", f"{module}.scalar"]


def policy_weights(path, state):
    """Checkpoint `path` of this script, with content `state` -> {LeRobot's name: tensor}, the EMA where it is on."""
    raw = frozen.read(path, state) | state["model_state_dict"] | state["ema_state_dict"]
    return export_weights(raw, state["config"])


def read_source(source):
    """A .pt (ours, the guide's), a LeRobot directory or hub id -> ({LeRobot's name: tensor}, network settings)"""
    if str(source).endswith(".pt"):
        with torch.serialization.safe_globals([(Unread, name) for name in NUMPY]):
            state = ckpt.load_state(source)
        about = state.get("config", {}).get("policy", {})
        if "frozen" in state:
            return policy_weights(source, state), about
        tensors = state.get("policy_state_dict") or state.get("model_state_dict") or state
    else:
        folder = hub.local_folder(source)
        about = ckpt.read_json(folder / "config.json")
        tensors = dict(hub.read_tensors(folder))
    # drop the prefixes of DDP and torch.compile, and the normalisers that LeRobot before 0.4 had inside the model
    tensors = {k.removeprefix("module.").replace("_orig_mod.", ""): v for k, v in tensors.items()}
    skip = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
    return {k: v for k, v in tensors.items() if not k.startswith(skip)}, about


def load_weights(core, cfg):
    """Load the weights that a new run starts from -> a line that names them."""
    p, source = cfg.policy, cfg.init_from or cfg.policy.pretrained_model_id
    if source:
        tensors, about = read_source(source)
        for key in SAME_NETWORK:
            now, then = getattr(p, key), about.get(key, getattr(p, key))
            require(then == now, f"{source} has policy.{key} {then}, this run {now}: set it to {then}")
        hub.load_weights(core, tensors.items(), source)
        return f"weights of {source}"
    vlm, tensors = core.model.vlm_with_expert.vlm, hub.read_tensors(hub.local_folder(p.vlm_model_name))
    allowed = dict(missing_ok=("lm_head",), unused_ok=("model.text_model.layers.",))  # tied; layers that are not used
    if hub.load_weights(vlm, tensors, p.vlm_model_name, **allowed):
        vlm.lm_head.weight.data.copy_(vlm.model.text_model.embed_tokens.weight)
    hint = "with little data lerobot/smolvla_base is a better start (--policy.pretrained_model_id)"
    return f"VLM of {p.vlm_model_name}; the expert and its heads are new, randomly initialised: {hint}"


def choose_trained(core, cfg):
    """Set requires_grad: on for what the config trains, off for what the loss does not reach (its gradient would stay
    None, and DDP would wait for it). -> the peft model around `core` with train: lora, else None."""
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
    text, last = vlm.model.text_model, vlm.model.text_model.layers[model.last_used]  # of it only keys and values
    after = (*text.layers[model.last_used + 1 :], last.self_attn.q_proj, last.self_attn.o_proj, last.mlp)
    for unused in (vlm.lm_head, text.norm, *after, last.post_attention_layernorm):
        unused.requires_grad_(False)
    return adapters


def build_model(cfg, vlm_config, action_dim, dtype=torch.float32, saved=None):
    """-> (SmolVLA on the CPU, its peft model or None, a line on where its weights come from). Trained weights and
    the small heads are fp32, frozen weights of VLM and expert in `dtype`. `saved`: a resumed run's full state dict."""
    torch.manual_seed(cfg.seed)
    core = SmolVLA(vlm_config, cfg.policy, action_dim)
    origin = "weights of the checkpoint" if saved else load_weights(core, cfg)
    adapters = choose_trained(core, cfg)
    if saved:
        core.load_state_dict(saved)
    if cfg.training.gradient_checkpointing:
        core.model.recompute = True
        core.model.vlm.vision_model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in core.model.vlm_with_expert.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return core, adapters, origin


def export_weights(tensors, config):
    """State dict of a model -> the tensors with LeRobot's names, LoRA folded in. `config`: the run's, as a dict."""
    out = {}
    for key, value in tensors.items():
        if ".lora_" in key or ".original_module." in key:
            continue
        if ".base_layer." in key:
            a, b = (tensors[key.replace("base_layer", f"lora_{x}.default")] for x in "AB")
            value = (value.float() + config["lora_alpha"] / config["lora_rank"] * b @ a).to(value.dtype)
        out[key.replace(".base_layer", "").replace(".modules_to_save.default", "")] = value
    return out


def save_model(folder, tensors, cfg, collate, about, example, device="cpu"):
    """Write LeRobot's saved-policy format: config.json, model.safetensors (`tensors`: of export_weights), pre- and
    post-processor with the statistics. Added are meta.json (what load_policy and evaluate.py need; `about`: step and
    validation episodes), vlm/ (the backbone's config and tokenizer files, for use without the hub), and the prediction
    for one item of the dataset, `example`, with which check_in_lerobot.py compares LeRobot's."""
    from safetensors.torch import save_file

    folder, spec, p = Path(folder), collate.spec, cfg.policy
    (folder / "vlm").mkdir(parents=True)
    for file in hub.local_folder(p.vlm_model_name, weights=False).iterdir():
        if file.suffix in (".json", ".txt", ".jinja"):
            shutil.copyfile(file, folder / "vlm" / file.name)
    network = {k: v for k, v in dataclasses.asdict(p).items() if k not in ("pretrained_model_id", "noise_draws")}
    network |= {f"optimizer_{k}": v for k, v in dataclasses.asdict(cfg.optimizer).items()}
    warmup, decay = schedule(cfg.training.steps, cfg)
    network |= dict(scheduler_warmup_steps=warmup, scheduler_decay_steps=decay)
    network["scheduler_decay_lr"] = cfg.scheduler.decay_lr
    cameras = {f"camera{k + 1}": shape for k, shape in enumerate(spec.image_shapes)}
    scales = spec.state_scale, spec.action_scale, spec.stats, spec.normalization
    lerobot.write(folder, network, cameras, *scales, device)
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    about = dict(format_version=FORMAT, spec=dataclasses.asdict(spec), noise_draws=p.noise_draws) | about
    about["bf16"] = cfg.training.use_bfloat16
    (folder / "meta.json").write_text(json.dumps(about, indent=2))
    observation = dict(example, images=dict(zip(cameras, example["images"], strict=True)))
    actions = load_policy(folder, "cpu").predict([observation], example["noise"][None])  # one draw, as LeRobot's
    arrays = {f"observation.images.{name}": image for name, image in observation["images"].items()}
    arrays |= {"observation.state": example["state"], "noise": example["noise"][None], "actions": actions}
    arrays = {name: torch.tensor(value) for name, value in arrays.items()}
    save_file(arrays, folder / "example.safetensors", metadata=dict(task=example["instruction"]))
    shutil.copyfile(Path(__file__).with_name("check_in_lerobot.py"), folder / "check_in_lerobot.py")


def read_lerobot(folder):
    """A LeRobot policy directory -> (PolicyConfig, DataSpec, bf16: the autocast of a GPU). Without our meta.json camera
    names and the meaning of the action are unknown: predict works then, open_episodes does not."""
    config = lerobot.read_config(folder)
    policy = config_from(PolicyConfig, config)
    if (folder / "meta.json").is_file():
        about = ckpt.read_json(folder / "meta.json")
        version = about["format_version"]
        require(version == FORMAT, f"{folder}: meta.json has format_version {version}, this code reads {FORMAT}")
        policy.noise_draws = about["noise_draws"]
        return policy, DataSpec(**about["spec"]), about.get("bf16", True)
    stats, mode = lerobot.read_statistics(folder, config)
    inputs, dim = config["input_features"], config["output_features"]["action"]["shape"][0]
    cameras = [k for k, v in inputs.items() if v["type"] == "VISUAL" and "empty_camera" not in k]
    action = dict(source="action", dim=dim, rotation_unit="rad")
    names = [[f"action{i + 1}", ""] for i in range(dim)]
    state = [[f"state{i + 1}", ""] for i in range(inputs["observation.state"]["shape"][0])]
    unknown = dict(image_shapes=[None] * len(cameras), state_keys=[], rate_hz=0.0, instructions=[], task_instruction="")
    known = dict(cameras=cameras, state_names=state, action_definition=action, action_names=names, absolute=True)
    return policy, DataSpec(**known, **unknown, normalization=mode, stats=stats), True


def load_policy(path, device=None):
    """Open a checkpoint for inference: a .pt of this script, final_hf, best_hf, any LeRobot SmolVLA directory, or an
    output_dir (its newest checkpoint)."""
    path = Path(path)
    if path.is_dir() and not (path / "config.json").is_file():
        found = ckpt.checkpoints_in(path, PATTERNS) or ckpt.checkpoints_in(path / "checkpoints", PATTERNS)
        require(found, f"{path} has neither config.json (a LeRobot policy) nor checkpoint_step_N.pt")
        path = found[-1]
    needs = {}
    if path.is_dir():
        policy, spec, bf16 = read_lerobot(path)
        name = policy.vlm_model_name
        vlm = next((folder for folder in (path / "vlm", path / name, path.parent / name) if folder.is_dir()), name)
        tensors = dict(hub.read_tensors(path))
    else:
        state = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT)
        policy, spec = config_from(PolicyConfig, state["config"]["policy"]), DataSpec(**state["spec"])
        tensors, vlm = policy_weights(path, state), policy.vlm_model_name
        bf16 = state["config"]["training"]["use_bfloat16"]
        needs["weights that were not trained"] = frozen.place(state)
    vlm_config, tokenizer = open_vlm(vlm, f" ({path} names it)")
    if path not in Path(vlm).parents:
        needs["config and tokenizer of the VLM"] = vlm
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with torch.device("meta"):
        model = SmolVLA(vlm_config, policy, spec.definition.dim)
    model = model.to_empty(device=device).requires_grad_(False)
    hub.load_weights(model, tensors.items(), path)
    return Policy(model.eval(), Collate(tokenizer, policy, spec), bf16 and device.type == "cuda", needs)


# ---- training --------------------------------------------------------------------------------------------------------


def schedule(total, cfg):
    """-> (warm-up steps, steps until the cosine ends) of `total` steps. As in LeRobot, both shrink if the run is
    shorter than the schedule."""
    warmup, decay = cfg.scheduler.num_warmup_steps, cfg.scheduler.num_decay_steps
    return (int(warmup * total / decay), total) if total < decay else (warmup, decay)


def lr_at(step, total, cfg):
    """Learning rate of update number `step` (from 0) of `total`: linear warm-up, cosine, its last value beyond."""
    (warmup, decay), peak = schedule(total, cfg), cfg.optimizer.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    end, progress = cfg.scheduler.decay_lr / cfg.scheduler.peak_lr, min(1.0, (step - warmup) / max(1, decay - warmup))
    return peak * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def describe(cfg, data, say):
    """Print what was found: episodes, cameras, meaning and ranges of state and action."""
    s, train = data.spec, data.part(data.train)
    counts = f"{len(train)} training episodes, {sum(e.num_frames for e in train)} frames"
    say(f"data      {counts}; {len(data.validation)} validation episodes; {cfg.dataset.root_dir}")
    for message in data.excluded:
        say(f"excluded  {message}")
    pairs = enumerate(zip(s.cameras, s.image_shapes, strict=True), 1)
    say(f"cameras   {', '.join(f'{name} -> camera{k} {h}x{w}' for k, (name, (h, w)) in pairs)}")
    state = f"{' + '.join(s.state_keys)}, {s.state_scale.dim} dims (padded to {cfg.policy.max_state_dim})"
    say(f"state     {state if s.state_names else 'none: the model sees images and text only'}")
    action = f"{s.action_names[0][0]} .. {s.action_names[-1][0]} ({s.definition.source}), {s.definition.dim} dims"
    say(f"action    {action} (padded to {cfg.policy.max_action_dim}), chunk {cfg.policy.chunk_size}; {s.normalization}")
    for doubt in ep.doubts(train, s.definition):
        say(f"warning   {doubt}")
    for key in ("observation.state", "action"):
        for name in ("mean", "std", "min", "max"):
            numbers = " ".join(f"{v:11.4g}" for v in data.spec.stats[key][name])
            say(f"          {key.rpartition('.')[2]:<7}{name:<5}{numbers}")
    say(f"text      {len(s.instructions)} instruction(s), e.g. {s.instructions[0]!r}")


def check_data(cfg):
    """--check: read the data, build one batch, print what the model would see. Needs no weights; without a tokenizer
    the tokens are left out, with a note."""
    data = load_data(cfg)
    describe(cfg, data, print)
    dataset = SmolVLADataset(data, data.train, cfg, True)
    order = GlobalOrder(len(dataset), cfg.seed)
    items = [dataset[(p, order.index(p))] for p in range(min(cfg.training.batch_size, len(dataset)))]
    _, episode, frame = items[0]["name"]
    print(f"samples   {len(dataset)} (frames with a target); batch of {len(items)}, first: {episode} frame {frame}")
    batch = {f"camera{k + 1}": torch.tensor(image) for k, image in enumerate(items[0]["images"])}
    try:
        vlm_config, tokenizer = open_vlm(cfg.policy.vlm_model_name)
        collate, dims = Collate(tokenizer, cfg.policy, data.spec), data.spec.definition.dim
        batch |= collate(items)
        print(f"text      {tokenizer.decode(batch['tokens'][0][batch['token_mask'][0]])!r}")
        plan.check(cfg, dataset, collate, lambda c, dtype: build_model(c, vlm_config, dims, dtype)[0])
    except MissingFile as error:
        print(f"note      tokens are not shown: {error}")
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            about = f"{str(tuple(value.shape)):<22} {str(value.dtype):<14}"
            print(f"          {key:<14} {about} {value.min().item():.4g} .. {value.max().item():.4g}")
    print("check passed")


def log_line(step, run):
    """-> arguments of Step.log, under the guide's names. Loss = Action + Temporal."""
    mean, (speed, wait, memory) = step.mean(), step.speed()
    vram = memory if run.device.type == "cuda" else 0.0
    ram = psutil.virtual_memory().used / 1e9
    values = {f"train/{k}": mean[k] for k in ("loss", "action_loss", "temporal_loss", "action_loss_real", "grad_norm")}
    values |= {"train/learning_rate": step.lr, "train/steps_per_sec": speed / run.global_batch}
    values |= {"system/ram_gb": ram, "system/vram_allocated_gb": vram}
    loss = "Loss: {loss:.4f} (Action: {action_loss:.4f}, Temporal: {temporal_loss:.4f})".format(**mean)
    line = f"[{100 * step.number / run.total:5.1f}%] Step {step.number}/{run.total} | {loss}"
    line += f" | Real dims: {mean['action_loss_real']:.4f} | GradNorm: {mean['grad_norm']:.3f} | LR: {step.lr:.2e}"
    line += f" | {speed / run.global_batch:.2f} steps/sec | {speed:.1f} samples/s | wait {wait:.1%}"
    return dict(values=values, line=f"{line} | VRAM: {vram:.1f}GB | RAM: {ram:.1f} GB")


def validate(core, policy, dataset, cfg, run):
    """-> {val/loss = val/action_loss + val/temporal_loss, val/action_loss_real, val/action_mae_<unit>: mean over the
    dims of a unit, val/mae_<dim>, val/swap_ratio_<camera>}. Noise and time are fixed per frame, so that validations
    differ by the weights alone."""
    size, names = cfg.training.batch_size, policy.action_names()
    chosen = dataset.spread(cfg.validation.num_samples).tolist()
    sums, errors = np.zeros(5), np.zeros(len(names))  # flow, real, temporal, steps, pairs | error per dim
    core.eval()
    mine = chosen[run.rank :: run.world]
    for i in log.progress(range(0, len(mine), size), "validation", "batch"):
        items = [dataset[(k, k)] for k in mine[i : i + size]]
        batch, real = policy.collate(items), ~np.stack([item["is_pad"] for item in items])
        with torch.no_grad(), run.autocast():
            out = core(to_device(batch, run.device))
        sums += [out[f"{k}_sum"].item() for k in ("flow", "real", "temporal")] + [real.sum(), real[:, 1:].sum()]
        errors += np.abs(policy.decode(batch) - np.stack([item["action"] for item in items]))[real].sum(0)
    swapped = swap_cameras(policy, dataset, chosen[:: max(1, len(chosen) // 32)], size, run)
    core.train()
    flow, over_real, temporal, steps, pairs, *errors = run.sum(*sums, *errors)
    action, dims = flow / (steps * cfg.policy.max_action_dim), len(names)
    temporal = cfg.training.lambda_temporal * temporal / max(pairs * dims, 1)
    values = {"val/loss": action + temporal, "val/action_loss": action, "val/temporal_loss": temporal}
    values["val/action_loss_real"] = over_real / (steps * dims)
    for unit in {unit for _, unit in names}:
        of_unit = [e for e, (_, other) in zip(errors, names, strict=True) if other == unit]
        values[f"val/action_mae_{unit}".rstrip("_")] = sum(of_unit) / len(of_unit) / steps
    values |= {f"val/mae_{n}": e / steps for (n, _), e in zip(names, errors, strict=True)}
    return values | swapped


def swap_cameras(policy, dataset, chosen, size, run):
    """-> {val/swap_ratio_<camera>: error with another episode's images, at the same progress, in this camera alone,
    over the error with its own; near 1 the policy ignores it}, in normalised units. {} if there is only one episode."""
    spec, places = policy.spec, [dataset.locate(k) for k in chosen]
    others = partners([e for e, _ in places], [t / dataset.episodes[e].num_frames for e, t in places])
    if others is None:
        return {}
    mine, sums = range(len(chosen))[run.rank :: run.world], np.zeros(len(spec.cameras) + 1)  # last: nothing swapped
    for i in range(0, len(mine), size):
        items = [dataset[(chosen[j], chosen[j])] for j in mine[i : i + size]]
        real = ~np.stack([item["is_pad"] for item in items])
        target = spec.action_scale.normalize(np.stack([item["action"] for item in items]))
        theirs = [dataset[(chosen[others[j]], chosen[others[j]])]["images"] for j in mine[i : i + size]]
        for c in range(-1, len(spec.cameras)):  # -1: nothing is swapped
            shown = []
            for item, images in zip(items, theirs, strict=True):
                own = item["images"]
                shown.append(item | dict(images=[*own[:c], images[c], *own[c + 1 :]] if c >= 0 else own))
            predicted = spec.action_scale.normalize(policy.decode(policy.collate.inputs(shown)))
            sums[c] += np.abs(predicted - target)[real].sum()
    *swapped, own = run.sum(*sums)
    return {f"val/swap_ratio_{name}": e / own for name, e in zip(spec.cameras, swapped, strict=True) if own > 0}


def validation_line(step, values, names):
    """The guide's line, and a warning for each camera that the policy ignores."""
    line = f"[VAL] Step {step.number} | Loss: {values['val/loss']:.4f} | Action Loss: {values['val/action_loss']:.4f}"
    for unit in dict.fromkeys(unit for _, unit in names):
        line += f" | Action MAE: {values[f'val/action_mae_{unit}'.rstrip('_')]:.4g} {unit}"
    for key, ratio in values.items():
        if "swap_ratio" in key and ratio < 1.05:
            camera = key.removeprefix("val/swap_ratio_")
            line += f"\nwarning   the policy hardly looks at {camera}: with another episode's images its error is "
            line += f"{ratio:.2f} x that with its own. See docs/train_smolvla_sim.md, 'A policy that looks'"
    return line


def open_run(cfg, run, folder):
    """-> (config, path and content of the checkpoint to resume, data); if its data differs it only gives its weights"""
    path = run.find(cfg.resume, folder, PATTERNS, exports=["best_hf", "final_hf"])
    saved = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT) if path else None
    data = load_data(cfg, run, saved)
    if saved and saved["fingerprint"] != data.fingerprint and path.parent.resolve() != folder.resolve():
        run.print(f"resume    {path} was trained on other data: a NEW RUN from its weights, as with --init_from")
        run.cfg = dataclasses.replace(cfg, resume=None, init_from=str(path))
        return run.cfg, path, None, data
    return cfg, path, saved, data


def validation_list(data):
    """-> the text of validation_episodes.txt, as the guide shows it"""
    listed = [f"Validation episodes\n{'=' * 80}\nTotal episodes: {len(data.episodes)}"]
    listed += [f"Validation episodes: {len(data.validation)}", f"Validation episode indices: {data.validation}\n"]
    listed += ["Validation episode paths:", *(f"  [{i}] {data.episodes[i].path}" for i in data.validation)]
    return "\n".join(listed) + "\n"


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg)

    # ---- inputs: everything that can be wrong is found before weights are loaded
    t, out = cfg.training, Path(cfg.output_dir)
    folder, bf16 = out / "checkpoints", t.use_bfloat16 and torch.cuda.is_available()
    cfg.policy.vlm_model_name = hub.stored_source(cfg.policy.vlm_model_name)
    run = Run(cfg, out, t.batch_size, t.gradient_accumulation_steps, bf16)
    cfg, path, saved, data = open_run(cfg, run, folder)
    describe(cfg, data, run.print)
    if saved:
        run.restore(path, saved, data.fingerprint, FIXED)
    stopped = saved and cfg.resume == "auto" and run.step < saved["config"]["training"]["steps"]
    reset = cfg.reset_scheduler and not (stopped and saved["config"]["reset_scheduler"])  # that was before the stop
    begin = saved["schedule_begin"] if saved and not reset else run.step  # where the schedule starts
    vlm_config, tokenizer = open_vlm(cfg.policy.vlm_model_name)
    collate, reader = Collate(tokenizer, cfg.policy, data.spec), ep.ImageReader()
    example = SmolVLADataset(data, data.train, cfg)[(0, 0)]
    meta = dict(script=Path(__file__).stem, validation=[data.episodes[i].name for i in data.validation])

    def export(path, tensors):
        save_model(path, tensors, cfg, collate, meta | dict(step=run.step), example, run.device.type)

    def export_final(tensors, size):
        written = run.save_as(folder / "final_hf", lambda path: export(path, tensors()), size)
        require(written, f"{folder}/final_hf could not be written. Free space; --resume auto writes it")

    if not run.plan(t.steps, "--steps"):
        return export_final(lambda: policy_weights(path, saved), 0)  # it may be missing, or from a shorter run
    if cfg.dataset.frame_dir:
        reader.keep(cfg.dataset.frame_dir, data.part(data.train + data.validation), data.spec.cameras, run=run)

    # ---- model, optimizer
    dims, A, o = data.spec.definition.dim, cfg.policy.max_action_dim, cfg.optimizer
    dataset = SmolVLADataset(data, data.train, cfg, True, reader)
    plan.check(cfg, dataset, collate, lambda c, dtype: build_model(c, vlm_config, dims, dtype)[0], run)
    state_dict = saved and frozen.read(path, saved) | saved["model_state_dict"]
    core, adapters, origin = build_model(cfg, vlm_config, dims, torch.bfloat16 if bf16 else torch.float32, state_dict)
    policy = Policy(core.to(run.device).train(), collate, bf16)
    trained = {n: p for n, p in core.named_parameters() if p.requires_grad}
    settings = dict(betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, fused=run.device.type == "cuda" or None)
    optimizer = torch.optim.AdamW(trained.values(), o.lr, **settings)
    if saved:
        ckpt.restore_moments(core, optimizer, saved["optimizer_state_dict"])
    ema = Ema(trained, t.ema_decay, saved=saved and saved["ema_state_dict"])
    spikes = Spikes(run, t.loss_spike_threshold, data.episodes, saved and saved["spikes"])
    kept = frozen.keep(run, folder, core, saved and saved["frozen"])
    model, saved, state_dict = run.prepare(core), None, None  # both are mapped from files that rotation may delete

    # ---- data
    held_out = SmolVLADataset(data, data.validation, cfg, reader=reader)
    loader = run.loader(dataset, GlobalOrder(len(dataset), cfg.seed), collate, t.num_workers)
    export_size = sum(p.numel() * p.element_size() for p in core.parameters())
    size = sum(p.numel() for p in trained.values()) * (16 if t.ema_decay else 12)  # fp32, two moments, an average
    run.describe(core, len(dataset), size, folder, f"; {origin}")
    warmup, decay = schedule(t.steps - begin, cfg)
    run.print(f"schedule  warm-up of {warmup} steps, cosine until step {begin + decay}")
    run.write("checkpoints/meta.json", json.dumps(meta))  # evaluate.py finds the script and the episodes here
    run.once(save_stats, out / "dataset_stats.yaml", data.spec.stats)
    run.write("validation_episodes.txt", validation_list(data))

    def weights():
        """The model as LeRobot names it, averaged where EMA is on, on the CPU."""
        tensors = core.state_dict() | ema.average
        return export_weights({k: v.detach().cpu() for k, v in tensors.items()}, dataclasses.asdict(cfg))

    def collect():
        about = dict(format_version=FORMAT, meta=meta, fingerprint=data.fingerprint, episodes=data.table, frozen=kept)
        about |= dict(spec=dataclasses.asdict(data.spec), normalization_stats=data.spec.stats, schedule_begin=begin)
        about |= dict(spikes=spikes.state, ema_state_dict=ema.average)
        about["model_state_dict"], about["optimizer_state_dict"] = ckpt.training_state(core, optimizer)
        return run.progress() | about

    def write(path, content):
        ckpt.save_state(path, content)
        ckpt.link(path, folder / "checkpoint_latest.pt")

    run.checkpoints(folder, "checkpoint_step_{step}.pt", write, size, collect, t.keep_checkpoints)

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
            if spike := spikes.check(run.window[-1], samples):
                run.log.log(step.number, *spike)

        if step.every(t.log_freq):
            step.log(**log_line(step, run))
        if data.validation and step.every(cfg.validation.val_freq):
            with ema.swapped():
                values = validate(core, policy, held_out, cfg, run)
            line = validation_line(step, values, policy.action_names())
            if step.validated(values, values["val/loss"], line=line):
                run.save_best(folder / "best_hf", lambda path: export(path, weights()), export_size)
        if step.every(t.save_freq):
            run.save()

    if run.step == t.steps:
        if adapters:  # opens with peft, on the weights that this run started from
            with ema.swapped():
                run.save_as(folder / "final_adapter", adapters.save_pretrained, size)
        export_final(weights, export_size)
    evaluate = command("evaluate.py", checkpoint=folder, data=cfg.dataset.root_dir)
    run.finish(f"model: {folder}/final_hf (LeRobot format)", f"evaluate: {evaluate}", plot=("train/loss", "val/loss"))


if __name__ == "__main__":
    launch(main, Config, ALIASES, ACCEPTED)
