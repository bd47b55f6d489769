"""Asynchronous VLA: a frozen Qwen2.5-VL looks three times a second, a small action expert acts ten times a second on
its newest feature and on the force sensor.

Data: robot sessions with a data.pkl (create_datapkl.py) and their cached features (build_vl_cache.py). One training
sample is one 100 ms step k: the feature of the newest VLM tick, the newest sensor rows (65: 0.1 s) -> the next 8
actions, deltas of the TCP pose in mm and degrees. No image is opened and no VLM is loaded.

    python train_async.py --config configs/async.yaml --check    # look at the data, no weights needed
    bash shells/train_async.sh --multi-gpu --num-gpus 4          # torchrun --nproc_per_node=4 ...
    python train_async.py --config configs/demo/async.yaml       # on a CPU, make_demo.py's output

Output, in checkpoint_dir: qwen_vla_async.pt (newest, resumes), qwen_vla_async_best.pt, qwen_vla_async_final.pt (all
open with load_policy), and in qwen_vla_async/ config.yaml, metrics.jsonl, validation_episodes.txt, loss.png.

Letters in shapes: B batch, N VL tokens of a tick (1), V their width, W sensor rows (the window), C sensor channels
(1026: force, A-scan), H actions (the chunk), A action dims (7), D width of the expert.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import checkpoint as ckpt
from common import plan, require
from common.config import config_from
from common.hub import load_weights
from common.log import WandbConfig
from common.run import Run, launch
from common.sampler import GlobalOrder
from common.session_data import ACTIONS, ChunkErrors, Collate, SessionDataset, SessionPolicy
from common.session_data import check_data, describe, held_out_batches, load_data
from common.sessions import CHANNELS
from common.two_rate import TwoRateLoop  # noqa: F401  what runs a policy on a robot
from common.vl_cache import command

FORMAT = 4  # of the checkpoints
NAME, PROJECT = "qwen_vla_async", "QwenVLA-Async"
LATEST, BEST, FINAL = f"{NAME}.pt", f"{NAME}_best.pt", f"{NAME}_final.pt"
SAVED = (BEST, FINAL, LATEST)  # of a folder, load_policy opens the first that is there
METRICS = {key: f"train/{key}" for key in ("samples_per_s", "data_wait", "memory_gb", "skipped_steps")}
WEIGHTS = {  # how often a sample of a data set is drawn (guide 5); others 1
    "New_dataset": 3.0,
    "White_silicone_white_circle": 2.0,
    "Needle_insertion_eye_trocar": 2.0,
    "OCT_insertion": 1.0,
    "part1": 1.0,
}


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    # data
    dataset_dir: list[str] = field(default_factory=list)  # folders with preprocessed sessions, searched recursively
    dataset_weight: list[str] = field(default_factory=list)  # NAME=W, over guide 5's table (3/2/2/1/1)
    val_split: float = 0.05  # share of the sessions held out; at least one of every data set that has two or more
    sensor_enabled: bool = True  # use the force sensor; false: features alone
    sensor_window_size: int = 65  # W, newest sensor rows at the step (650 per second)
    # VLM features
    cache_root: str | None = None  # folder that holds qwen_vl_features/; null: cache/ in the first dataset_dir
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # the VLM: hub id or directory; compared with the cache, not loaded
    views: list[str] = field(default_factory=list)  # camera views; empty: the cache's, or all in common
    image_resize_height: int = 360  # pixels, of the images that the VLM sees
    image_resize_width: int = 640  # pixels
    vlm_reuse_count: int = 3  # R, steps per feature: 3 is a VLM at 3.33 Hz; the cache's value or a multiple of it
    vlm_latency_ms: list[float] = field(default_factory=lambda: [0.0])  # from tick to feature; two numbers: a range
    check_pictures: bool = True  # compare the cache with the images; false: where only cache and data.pkl are
    max_image_age: float = 1.5  # seconds; a tick whose newest image of a view is older is not used
    # model
    hidden_dim: int = 1024  # D
    sensor_dim: int = 3072  # width of the sensor's feature
    num_layers: int = 4  # of the action expert
    num_heads: int = 8  # of sensor encoder and expert
    dropout: float = 0.1  # in the sensor encoder and the expert
    horizon: int = 8  # H, actions per prediction, 100 ms each
    # training
    epochs: int = 50  # passes over as many samples as there are
    max_steps: int | None = None  # optimizer steps instead of epochs
    batch_size: int = 4  # samples per GPU and micro-batch
    grad_accum_steps: int = 8  # micro-batches per optimizer step
    lr: float = 1e-4  # peak, AdamW
    sensor_lr: float = 5e-4  # peak, of the sensor encoder
    min_lr: float = 1e-6  # at the end of the cosine
    warmup_ratio: float = 0.03  # share of all steps: linear warm-up
    hold_ratio: float = 0.02  # share of all steps: at the peak, before the cosine
    weight_decay: float = 0.01  # AdamW's
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    sensor_loss_weight: float = 2.0  # weight in the loss of a sample that has sensor data; the others weigh 1
    use_bfloat16: bool = True  # bf16 autocast on CUDA; weights are fp32 in any case
    num_workers: int = 4  # loader processes per rank; 0: in the main process
    seed: int = 42  # of order, noise, dropout and new weights
    # output
    checkpoint_dir: str = "./checkpoints"  # the files named above
    eval_epochs: int = 1  # validate and save every so many epochs
    save_steps: int = 0  # save every so many optimizer steps within an epoch, too; 0: no
    log_steps: int = 10  # optimizer steps
    init_from: str | None = None  # start a new run, e.g. on more sessions, with a checkpoint's weights and statistics
    resume: str | None = None  # a checkpoint, or "auto": the newest in checkpoint_dir
    check: bool = False  # read the data, build and print one batch, stop
    wandb: WandbConfig = field(default_factory=WandbConfig)


ALIASES = dict(dataset_dirs="dataset_dir", grad_accum="grad_accum_steps", sensor="sensor_enabled", wandb="wandb.mode")
# keys that a resume must not change: moments, or the order of the samples, would be another run's
FIXED = (
    *("seed", "dataset_weight", "sensor_enabled", "sensor_window_size", "vlm_reuse_count", "vlm_latency_ms"),
    *("hidden_dim", "sensor_dim", "num_layers", "num_heads", "horizon"),
)


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    first = "python create_datapkl.py --dataset-dirs DATA"
    require(cfg.dataset_dir, f"dataset_dir is empty: --dataset_dir DATA, the folders with the sessions, after {first}")
    positive = "sensor_window_size vlm_reuse_count hidden_dim sensor_dim num_layers num_heads horizon epochs batch_size"
    for key in (positive + " grad_accum_steps eval_epochs log_steps").split():
        require(getattr(cfg, key) >= 1, f"{key} is {getattr(cfg, key)}: expected 1 or more")
    require(cfg.max_steps is None or cfg.max_steps > 0, f"max_steps is {cfg.max_steps}: expected 1 or more, or null")
    require(0 <= cfg.val_split < 1, f"val_split is {cfg.val_split}: expected a share from 0 to below 1")
    require(0 < cfg.lr >= cfg.min_lr, f"lr is {cfg.lr}, min_lr is {cfg.min_lr}: expected lr above 0, min_lr up to lr")
    width, heads = cfg.hidden_dim, 4 * cfg.num_heads
    require(width % heads == 0, f"hidden_dim is {width}: expected a multiple of 4 * num_heads ({heads})")
    latency = cfg.vlm_latency_ms
    require(len(latency) in (1, 2) and min(latency) >= 0, f"vlm_latency_ms is {latency}: expected a number, or a range")
    require(cfg.sensor_loss_weight > 0, f"sensor_loss_weight is {cfg.sensor_loss_weight}: expected more than 0")
    low, both = min(cfg.warmup_ratio, cfg.hold_ratio), cfg.warmup_ratio + cfg.hold_ratio
    require(low >= 0 and both < 1, f"warmup_ratio + hold_ratio is {both}: expected shares below 1")


# ---- model -----------------------------------------------------------------------------------------------------------


class SensorEncoder(nn.Module):
    """(B, W, channels) normalised sensor rows, newest last, of which the last `length` are real -> (B, out). Four
    convolutions of stride 2, two transformer layers, the mean over time. The padding has no influence: it is zeroed
    after every layer, and no norm mixes over time."""

    def __init__(self, channels, width, out, heads, dropout):
        super().__init__()
        sizes = [channels, width // 2, width, width, width]
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, 3, stride=2, padding=1) for a, b in zip(sizes, sizes[1:], strict=False)
        )
        self.norms, self.dropout = nn.ModuleList(nn.LayerNorm(b) for b in sizes[1:]), nn.Dropout(dropout)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(
            nn.Linear(width, out), nn.LayerNorm(out), nn.GELU(), nn.Dropout(dropout), nn.Linear(out, out)
        )

    def forward(self, x, length):
        real = torch.arange(x.shape[1], device=x.device) >= x.shape[1] - length[:, None]  # (B, W)
        real = real | (length == 0)[:, None]  # attention over nothing would be NaN; the caller drops this row
        x = x.masked_fill(~real[..., None], 0)
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = conv(x.transpose(1, 2)).transpose(1, 2)  # output i sees inputs 2i-1, 2i, 2i+1
            real = torch.cat([real, real[:, -1:]], dim=1)[:, 1::2] if real.shape[1] % 2 else real[:, 1::2]
            x = self.dropout(F.gelu(norm(x))).masked_fill(~real[..., None], 0)
        x = x + sinusoid(torch.arange(x.shape[1] - 1, -1, -1, device=x.device), x.shape[2])  # by age: the newest is 0
        x = self.transformer(x, src_key_padding_mask=~real)
        return self.head((x * real[..., None]).sum(1) / real.sum(1, keepdim=True))


def sinusoid(t, width):
    """(n,) numbers -> (n, width): sines, then cosines, of frequencies 1 to 1e-4."""
    frequency = torch.exp(torch.arange(width // 2, device=t.device) * (-math.log(1e4) / max(1, width // 2 - 1)))
    angle = t[:, None].float() * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Condition(nn.Module):
    """VL feature, age of its images and sensor -> one condition token (B, D). Without the age a network can only assume
    the mean one of training, and leads or lags when it chases what moves. The force has an encoder of its own: as one
    of 1,026 channels it drowns. A sample without sensor data gets a learned embedding instead."""

    def __init__(self, vl_shape, sensor_dim, width, heads, dropout, stats):
        super().__init__()
        tokens, vl_width = vl_shape
        for name, size in (("vl", vl_width), ("sensor", CHANNELS)):
            known = stats.get(name) or dict(mean=[0.0] * size, std=[1.0] * size)
            self.register_buffer(f"{name}_mean", torch.tensor(known["mean"]))
            self.register_buffer(f"{name}_std", torch.tensor(known["std"]))
        encoded = sensor_dim + sensor_dim // 4  # A-scan, force; 0: without the sensor
        ascan = SensorEncoder(CHANNELS - 1, width, sensor_dim, heads, dropout) if encoded else None
        force = SensorEncoder(1, width // 4, sensor_dim // 4, heads, dropout) if encoded else None
        self.sensor = nn.ModuleDict(dict(ascan=ascan, force=force)) if encoded else None
        self.no_sensor = nn.Parameter(torch.zeros(encoded)) if encoded else None
        self.fuse = nn.Linear(tokens * vl_width + 1 + encoded, width)

    def forward(self, batch):
        # z-scored: a few of the VLM's dimensions are a hundred times larger than the others and hardly vary
        parts = [((batch["vl_features"] - self.vl_mean) / self.vl_std).flatten(1), 10 * batch["age"][:, None]]
        if self.sensor is not None:  # for samples without rows, too: DDP waits for every parameter's gradient
            length, rows = batch["sensor_length"], (batch["sensor"] - self.sensor_mean) / self.sensor_std
            encoded = [self.sensor["ascan"](rows[..., 1:], length), self.sensor["force"](rows[..., :1], length)]
            parts.append(torch.where((length > 0)[:, None], torch.cat(encoded, dim=1).float(), self.no_sensor))
        return self.fuse(torch.cat(parts, dim=1))


class AsyncVLA(nn.Module):
    """Condition token -> actions by regression: learned queries, one per step of the chunk, in a transformer decoder.
    forward(batch) is the loss, sample(batch) the actions."""

    def __init__(self, vl_shape, sensor_dim, width, layers, heads, dropout, horizon, stats):
        super().__init__()
        self.condition = Condition(vl_shape, sensor_dim, width, heads, dropout, stats)
        self.queries = nn.Parameter(torch.randn(1, horizon, width) * 0.02)
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True)
        self.expert = nn.TransformerDecoder(layer, layers)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(ACTIONS)))
        # (7,) bool: dimensions that move in the training sessions; the others are 0 and in no loss or metric
        self.register_buffer("active", ~torch.tensor(stats["action"]["constant"]))

    def actions(self, batch):
        """-> (B, H, 7) normalised; a dimension that never moves is 0."""
        memory = self.condition(batch)[:, None]  # (B, 1, D)
        return self.out(self.expert(self.queries.expand(len(memory), -1, -1), memory)).float() * self.active

    def forward(self, batch):
        """-> loss_sum (): sum of weight * the sample's mean squared error over its unpadded steps and moving dims, to
        be divided by the sum of weights of the whole optimizer step | sample_loss (B,)."""
        error = (self.actions(batch) - batch["actions"]).square() * self.active
        mask = batch["action_mask"][..., None]  # a padded step teaches nothing
        loss = error.masked_fill(~mask, 0).sum((1, 2)) / (mask.sum((1, 2)) * self.active.sum())
        return dict(loss_sum=(loss * batch["weight"]).sum(), sample_loss=loss.detach())

    @torch.no_grad()
    def sample(self, batch):
        return self.actions(batch)


class Policy(SessionPolicy):
    """The model with everything that predict needs. Made by load_policy, and by the training for its validation."""

    dataset_class, collate_class = SessionDataset, Collate

    def predict(self, observations):
        """list of observations (see SessionPolicy.inputs) -> (B, H, 7) float32: pose deltas in mm and degrees, 100 ms
        each, and the constant gripper."""
        return self.decode(self.inputs(observations))

    def decode(self, batch):
        """A batch on the device -> (B, H, 7) float32 in mm and degrees."""
        with self.autocast():
            actions = self.model.sample(batch)
        return self.collate.action.unnormalize(actions.float().cpu().numpy())


def build_model(cfg, about, device):
    """-> the model on `device`, new weights in fp32; the statistics of features, sensor and actions are buffers."""
    torch.manual_seed(cfg.seed)
    sensor_dim = cfg.sensor_dim if cfg.sensor_enabled else 0
    shape = (cfg.hidden_dim, cfg.num_layers, cfg.num_heads, cfg.dropout, cfg.horizon)
    return AsyncVLA(about["vl_shape"], sensor_dim, *shape, about["stats"]).to(device)


# ---- save, load ------------------------------------------------------------------------------------------------------


def contents(about, core, optimizer=None):
    """What a checkpoint file holds: `about` and the model's tensors (weights and statistics), with `optimizer` also its
    moments, for a resume."""
    content = about | dict(model_state_dict=core.state_dict())
    if optimizer is not None:
        content |= dict(optimizer_state_dict=ckpt.training_state(core, optimizer)[1])
    return content


save_model = ckpt.save_state  # (path, contents)


def write_final(newest, final):
    """The newest checkpoint without what only a resume needs."""
    content = {k: v for k, v in ckpt.load_state(newest).items() if k != "optimizer_state_dict"}
    with ckpt.atomic_path(final) as path:
        ckpt.save_state(path, content)


def load_policy(path, device=None, vlm=None):
    """Open a checkpoint (a file, or checkpoint_dir: the best one in it) for inference. The VLM is loaded at the first
    image; `vlm`: where it is now, if it has moved."""
    saved = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT, SAVED)
    cfg = config_from(Config, saved["config"])
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = build_model(cfg, saved, device)
    load_weights(model, saved["model_state_dict"].items(), path)
    return Policy(model, cfg, saved, device, vlm=vlm).freeze()


# ---- training --------------------------------------------------------------------------------------------------------


def make_optimizer(core, cfg, fused=None):
    """AdamW with four groups: sensor encoder and the rest, with and without weight decay (none on biases, norms,
    embeddings)."""
    groups = {}
    for name, p in core.named_parameters():
        sensor, decay = name.startswith("condition.sensor."), p.ndim > 1 and name != "queries"
        scale = cfg.sensor_lr / cfg.lr if sensor else 1.0
        group = dict(params=[], lr_scale=scale, weight_decay=cfg.weight_decay if decay else 0.0)
        groups.setdefault((sensor, decay), group)["params"].append(p)
    return torch.optim.AdamW(list(groups.values()), lr=cfg.lr, betas=(0.9, 0.999), fused=fused)


def lr_at(step, total, cfg):
    """Learning rate of update number `step` (from 0) of `total`: linear warm-up, hold, cosine to min_lr; constant after
    that."""
    warmup, hold = int(cfg.warmup_ratio * total), int(cfg.hold_ratio * total)
    if step < warmup:
        return (step + 1) / warmup * cfg.lr
    progress = min(1.0, max(0, step - warmup - hold) / max(1, total - warmup - hold))
    end = cfg.min_lr / cfg.lr
    return (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress))) * cfg.lr


def validate(core, policy, dataset, run):
    """-> ChunkErrors' values: loss and errors of predicted chunks, every held-out step once."""
    errors = ChunkErrors(core.active)
    core.eval()
    for batch, swapped in held_out_batches(dataset, policy, run):
        with torch.no_grad(), policy.autocast():
            loss = core(batch)["sample_loss"]
        errors.add(batch, loss, policy.decode(batch), {name: policy.decode(b) for name, b in swapped.items()})
    core.train()
    return errors.values(run)


def main(cfg):
    check_config(cfg)
    if cfg.check:
        return check_data(cfg, Policy, WEIGHTS, build_model)

    # ---- inputs: a wrong path, setting or file is found before weights are made
    folder = Path(cfg.checkpoint_dir)
    bf16 = cfg.use_bfloat16 and torch.cuda.is_available()
    run = Run(cfg, folder / NAME, cfg.batch_size, cfg.grad_accum_steps, bf16)
    path = run.find(cfg.resume, folder, [LATEST], exports=[BEST, FINAL])
    saved = ckpt.read_checkpoint(path, Path(__file__).stem, FORMAT, resume=True) if path else None
    start = saved
    if cfg.init_from and not saved:
        start = ckpt.read_checkpoint(cfg.init_from, Path(__file__).stem, FORMAT, SAVED)
    data = load_data(cfg, run, start)
    if saved:
        run.restore(path, saved, data.about["fingerprint"], fixed=FIXED)

    # ---- data
    dataset, held_out = (SessionDataset(part, data.features, cfg) for part in (data.train, data.validation))
    weights = dataset.sample_weights(WEIGHTS, cfg.dataset_weight)
    describe(cfg, data, dataset, held_out, weights, run.print)
    total = cfg.max_steps or math.ceil(cfg.epochs * len(dataset) / run.global_batch)
    if not run.plan(total, f"--epochs (now {cfg.epochs}) or --max-steps"):
        return run.once(write_final, path, folder / FINAL)

    # ---- model, optimizer
    plan.check(cfg, dataset, Collate(cfg, data.about["stats"]), lambda c, _: build_model(c, data.about, "cpu"), run)
    core = build_model(cfg, data.about, run.device)
    policy = Policy(core, cfg, data.about, run.device)
    optimizer = make_optimizer(core, cfg, fused=run.device.type == "cuda" or None)
    if start:
        load_weights(core, start["model_state_dict"].items(), path or cfg.init_from)
    if saved:
        ckpt.restore_moments(core, optimizer, saved["optimizer_state_dict"])
    saved = start = None  # closes the memory-mapped file
    model = run.prepare(core.train())
    size = 12 * sum(p.numel() for p in core.parameters())  # fp32 weights and two moments
    run.describe(core, len(dataset), size, folder, " (the VLM is not loaded)")
    loader = run.loader(dataset, GlobalOrder(len(dataset), cfg.seed, weights), policy.collate, cfg.num_workers)
    names = [s.name for s in data.validation]
    run.write("validation_episodes.txt", "".join(f"{name}\n" for name in names))
    about = data.about | dict(format_version=FORMAT, meta=dict(script=Path(__file__).stem, validation=names))

    def collect(optimizer=optimizer):
        return contents(about | run.progress(), core, optimizer)

    run.checkpoints(folder, LATEST, save_model, size, collect)

    # ---- loop
    for step in run.steps(loader, PROJECT, cfg.wandb, METRICS):
        # sum of weights of the whole optimizer step over all ranks: what the loss is divided by
        weight = run.sum(sum(b["weight"].sum() for b in step.batches))
        for batch in step.micro_batches(model):
            out = model(batch)
            step.backward(out["loss_sum"] / weight, out["sample_loss"])
            step.add(reuse=batch["reuse_step"].sum(), with_sensor=batch["has_sensor"].sum())
        step.update(optimizer, lr_at(step.index, run.total, cfg), cfg.grad_clip)

        if step.every(cfg.log_steps):
            mean = step.mean()
            values = {
                "train/loss_step": mean["loss"],
                "train/lr": step.lr,
                "train/grad_norm": mean["grad_norm"],
                "train/vl_reuse_counter": mean["reuse"] / run.global_batch,
                "train/sensor_samples": mean["with_sensor"],
                "train/nonsensor_samples": run.global_batch - mean["with_sensor"],
            }
            step.log(values, f"loss {mean['loss']:.4f} | grad {mean['grad_norm']:.2f}")
        epoch_end = step.passed(cfg.eval_epochs * len(dataset))
        if epoch_end and data.validation:
            values = validate(core, policy, held_out, run)
            if step.validated(values, values["val/loss_epoch"], ChunkErrors.text(values)):
                run.save_best(folder / BEST, save_model, size // 3, partial(collect, None))
        if epoch_end or step.every(cfg.save_steps):
            run.save()

    if run.step == run.total:
        run.once(write_final, folder / LATEST, folder / FINAL)
    best = folder / (BEST if data.validation else FINAL)
    at = f" (step {run.best_step}, validation loss {run.best_val_loss:.4f})" if run.best_step else ""
    evaluate = command("evaluate.py", checkpoint=best, data=cfg.dataset_dir)
    run.finish(f"model: {best}{at}", f"evaluate: {evaluate}", plot=("train/loss_step", "val/loss_epoch"))


if __name__ == "__main__":
    launch(main, Config, ALIASES)
