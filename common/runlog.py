"""What a training says: one aligned line per log step, the same values in metrics.jsonl and (if wanted) in W&B, a bar, a loss plot."""

import dataclasses
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.checkpoint import atomic_path


@dataclasses.dataclass
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "disabled"  # online falls back to offline when nobody is logged in
    entity: str | None = None  # W&B team or user
    name: str | None = None  # run name; null: the name of output_dir
    tags: list[str] = dataclasses.field(default_factory=list)  # W&B tags
    notes: str = ""  # free text beside the run


class RunLog:
    """Log of one run. Only rank 0 writes; on other ranks every method does nothing.

    log(step, values, line) appends {"step", "time", **values} to metrics.jsonl, sends the values to W&B and prints `line`.
    W&B can never stop a training: its first failure is reported once and W&B is left out from then on.
    """

    def __init__(self, folder, total_steps, start_step=0, rank=0, project="", wandb=WandbConfig(), config=None):
        self.active, self.folder, self.start = rank == 0, Path(folder), start_step
        self._wandb = None
        if not self.active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open_metrics(start_step)
        self._bar = tqdm(
            total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None, smoothing=0.05
        )  # silent when not a terminal
        if wandb.mode != "disabled":
            self._wandb_call(lambda: self._start_wandb(project, wandb, config or {}))

    def _open_metrics(self, start_step):
        """Keep the rows up to the step that is resumed from: what came after it will be done again."""
        path = self.folder / "metrics.jsonl"
        rows = (
            [line for line in path.read_text().splitlines() if _step_of(line) <= start_step]
            if path.exists() and start_step
            else []
        )
        with atomic_path(path) as temporary:  # a kill here must not cost the history
            temporary.write_text("".join(row + "\n" for row in rows))
        return path.open("a", buffering=1)

    def _start_wandb(self, project, cfg, config):
        import wandb  # optional at run time, and slow to import

        mode = cfg.mode
        if mode == "online" and not self._logged_in(wandb):
            self.print(
                "W&B: not logged in, recording offline; upload later with: wandb sync " + str(self.folder / "wandb")
            )
            mode = "offline"
        known = self.folder / "wandb_run_id.txt"  # a resumed training continues its own run
        run_id = known.read_text().strip() if self.start and known.exists() else secrets.token_hex(4)
        known.write_text(run_id + "\n")
        self._wandb = wandb.init(
            project=project,
            entity=cfg.entity,
            name=cfg.name or self.folder.resolve().name,
            tags=cfg.tags,
            mode=mode,
            dir=str(self.folder),
            config=config,
            notes=cfg.notes or None,
            id=run_id,
            resume="allow" if self.start else None,
        )

    @staticmethod
    def _logged_in(wandb):
        try:
            return bool(os.environ.get("WANDB_API_KEY")) or wandb.login(prompt=False)
        except TypeError:  # an older wandb: its login has no `prompt` and would wait for a key
            return bool(wandb.api.api_key)

    def _wandb_call(self, call):
        try:
            call()
        except Exception as error:  # W&B raises many types; none of them may cost a training
            self._wandb = None
            self.print(
                f"W&B: {type(error).__name__}: {error}. Training goes on without W&B; the same values are in {self.folder / 'metrics.jsonl'}"
            )

    def print(self, text):
        if self.active:
            tqdm.write(text) if hasattr(self, "_bar") else print(text, flush=True)

    def step(self, step, loss=None, lr=None, samples_per_s=None, wait=None):
        """Advance the bar to `step` finished updates."""
        if self.active:
            self._bar.update(step - self._bar.n)
            shown = {
                "loss": loss and f"{loss:.4f}",
                "lr": lr and f"{lr:.1e}",
                "samples/s": samples_per_s and f"{samples_per_s:.1f}",
                "wait": None if wait is None else f"{wait:.0%}",
            }
            if any(value is not None for value in shown.values()):
                self._bar.set_postfix({k: v for k, v in shown.items() if v is not None}, refresh=False)

    def log(self, step, values, line=None):
        if not self.active:
            return
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        if line:
            self.print(line)
        if self._wandb is not None:
            self._wandb_call(lambda: self._wandb.log(values, step=step))

    def close(self):
        if self.active:
            self._bar.close()
            self._file.close()
            if self._wandb is not None:
                self._wandb_call(self._wandb.finish)


def report_nonfinite(log, step, names, sample_losses, in_row):
    """Log a skipped step with the samples behind it; FloatingPointError after ten in a row.

    `names`: per micro-batch of this rank its (episode, frame) pairs; `sample_losses`: per micro-batch a (B,) tensor. A collective call.
    """
    bad = [
        name
        for batch, losses in zip(names, sample_losses)
        for name, value in zip(batch, losses.tolist())
        if not math.isfinite(value)
    ]
    everything = [name for batch in names for name in batch]
    if dist.is_initialized():
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (bad, everything))
        bad, everything = [n for g in gathered for n in g[0]], [n for g in gathered for n in g[1]]
    shown = bad or everything
    listed = ", ".join(f"{episode} frame {frame}" for episode, frame in shown[:8]) + (
        f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    )
    what = f"loss of {listed}" if bad else f"gradient (every loss is finite); the batch was {listed}"
    log.log(
        step,
        dict(nonfinite=[list(name) for name in shown]),
        f"NON-FINITE step {step} skipped, weights unchanged: {what}",
    )
    if in_row >= 10:
        raise FloatingPointError(
            f"{in_row} steps in a row were not finite, the last one {step}: {what}. Look at these frames, or lower the learning rate"
        )


def memory_gb():
    """Peak GPU memory, or without a GPU the resident memory of this process, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def read_metrics(folder):
    """metrics.jsonl of a run -> list of dicts."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def plot_loss(folder, train="loss", validation="val_loss"):
    """Draw loss.png from metrics.jsonl; return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_metrics(folder)
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, style in ((train, "-"), (validation, "o-")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points), style, label=key, markersize=4)
    axis.set(xlabel="optimizer step", ylabel="loss")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _step_of(line):
    """Step of a metrics row; a half-written last row (the process was killed) counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
