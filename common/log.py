"""Logging: one aligned line per log step, the same values in metrics.jsonl and (optional) W&B, a bar, a loss plot."""

import contextlib
import dataclasses
import io
import json
import math
import os
import secrets
import time
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common.checkpoint import atomic_path


@dataclasses.dataclass
class WandbConfig:
    mode: Literal["online", "offline", "disabled"] = "disabled"  # online falls back to offline when not logged in
    entity: str | None = None  # W&B team or user
    name: str | None = None  # run name; null: the name of the output folder
    tags: list[str] = dataclasses.field(default_factory=list)  # W&B tags
    notes: str = ""  # free text beside the run


class RunLog:
    """Log of one run. Only rank 0 writes; on other ranks (not `active`) every method does nothing.

    log(step, values, line) appends {"step", "time", **values} to metrics.jsonl, sends the values to W&B and prints
    `line`. W&B can never stop a training: its first failure is reported, and W&B is not used from then on."""

    def __init__(self, folder, total_steps, start_step=0, active=True, project="", wandb=None, config=None):
        self.active, self.folder, self.start, self._wandb = active, Path(folder), start_step, None
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = self._open_metrics(start_step)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, disable=None)
        if wandb and wandb.mode != "disabled":
            self._wandb_call(lambda: self._start_wandb(project, wandb, config or {}))

    def _open_metrics(self, start_step):
        """Keep the rows up to the step that is resumed from: the later steps will be made again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text(errors="replace").splitlines() if path.exists() and start_step else []
        with atomic_path(path) as temporary:  # a kill here must not cost the history
            temporary.write_text("".join(line + "\n" for line in lines if _step_of(line) <= start_step))
        return io.TextIOWrapper(path.open("ab", 2**20), line_buffering=True)  # buffers rows while the disk is full

    def _start_wandb(self, project, cfg, config):
        import wandb  # optional at run time, and slow to import

        mode = cfg.mode
        if mode == "online" and not os.environ.get("WANDB_API_KEY") and not wandb.login(prompt=False):
            self.print(f"W&B: not logged in, recording offline; upload later with: wandb sync {self.folder / 'wandb'}")
            mode = "offline"
        id_file = self.folder / "wandb_run_id.txt"  # a resumed training continues its own run
        run_id = id_file.read_text().strip() if self.start and id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id + "\n")
        name, notes = cfg.name or self.folder.resolve().name, cfg.notes or None
        about = dict(project=project, entity=cfg.entity, name=name, tags=cfg.tags, notes=notes, config=config)
        resume = "allow" if self.start else None
        self._wandb = wandb.init(mode=mode, dir=str(self.folder), id=run_id, resume=resume, **about)

    def _wandb_call(self, call):
        try:
            call()
        except Exception as error:  # W&B raises many types; none of them may cost a training
            self._wandb, where = None, self.folder / "metrics.jsonl"
            self.print(f"W&B: {type(error).__name__}: {error}. Training goes on without W&B; the values are in {where}")

    def print(self, text):
        if self.active:
            with contextlib.suppress(OSError):  # a closed terminal or pipe must not end the training
                tqdm.write(text)

    def advance(self, step, shown=None):
        """Move the bar to `step` finished updates and show `shown` {name: text} after it."""
        if self.active:
            self._bar.update(step - self._bar.n)
            if shown:
                self._bar.set_postfix(shown, refresh=False)

    def log(self, step, values, line=None):
        if not self.active:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **finite}) + "\n")
        except OSError as error:  # a full disk must not end a training; the row is written once there is space
            self.print(f"metrics.jsonl: {error}. Training goes on")
        if line:
            self.print(line)
        if self._wandb is not None:
            self._wandb_call(lambda: self._wandb.log(values, step=step))

    def close(self):
        if self.active:
            self._bar.close()
            with contextlib.suppress(OSError):
                self._file.close()
            if self._wandb is not None:
                self._wandb_call(self._wandb.finish)


def progress(items, what, unit):
    """Iterate over `items` with a bar, on rank 0 and at a terminal only."""
    return tqdm(items, what, unit=unit, disable=os.environ.get("RANK", "0") != "0" or None, leave=False)


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
    """Draw loss.png from metrics.jsonl -> its path."""
    from matplotlib.figure import Figure  # slow to import

    rows, figure = read_metrics(folder), Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for key, style in ((train, "-"), (validation, "o-")):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=key, markersize=4)
    axis.set(xlabel="optimizer step", ylabel="loss")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend()
    path = Path(folder) / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def _step_of(line):
    """Step of a metrics row; a half-written last row (the process was killed) counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
