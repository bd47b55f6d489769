"""The smallest training script there can be: what the tests of common/run.py train."""

import json
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from common import UserError
from common import checkpoint as ckpt
from common import fsdp
from common.log import WandbConfig
from common.run import Run, launch
from common.sampler import GlobalOrder


@dataclass
class Config:
    output_dir: str = "toy"  # checkpoints and logs
    steps: int = 6  # optimizer steps
    batch_size: int = 2  # samples per process and micro-batch
    accumulation: int = 2  # micro-batches per step
    num_workers: int = 0  # loader processes
    log_steps: int = 1  # optimizer steps
    save_steps: int = 2  # optimizer steps
    val_steps: int = 3  # optimizer steps
    keep: int = 0  # checkpoints; 0: all
    fsdp: bool = False  # shard over the processes
    seed: int = 1  # of everything
    bad_sample: int = -1  # reading it fails
    kill_sample: int = -1  # reading it kills the worker
    nan_samples: list[int] = field(default_factory=list)  # their loss is NaN
    error_step: int = -1  # the loop's body fails there
    error_rank: int = 0  # on this rank
    error: str = ""  # "memory", or the text of a defect
    signal_step: int = -1  # the process signals itself there
    signal_rank: int = 0  # on this rank
    full_step: int = -1  # the disk is full there
    full_rank: int = 0  # of this rank
    resume: str | None = None  # a checkpoint, or auto
    wandb: WandbConfig = field(default_factory=WandbConfig)


class Data(torch.utils.data.Dataset):
    def __init__(self, cfg):
        self.cfg = cfg

    def __len__(self):
        return 20

    def __getitem__(self, key):
        _, i = key
        if i == self.cfg.bad_sample:
            raise UserError(f"sample {i}: cannot be read")
        if i == self.cfg.kill_sample:
            os.kill(os.getpid(), signal.SIGKILL)
        x = torch.linspace(0, 1, 4) * i
        return dict(x=x, y=x.sum() * (torch.nan if i in self.cfg.nan_samples else 1), name=("episode", i))


def collate(items):
    x, y = (torch.stack([item[key] for item in items]) for key in "xy")
    return dict(x=x, y=y, names=[item["name"] for item in items])


def main(cfg):
    out = Path(cfg.output_dir)
    run = Run(cfg, out, cfg.batch_size, cfg.accumulation)
    path = run.find(cfg.resume, out, ["steps_*"], exports=["best"])
    saved = json.loads((path / "meta.json").read_text()) if path else None
    if saved:
        run.restore(path, saved, "data", fixed=("seed",))
    if not run.plan(cfg.steps, "--steps"):
        return run
    torch.manual_seed(cfg.seed)
    core = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 1))
    model = run.prepare(core.train(), shards=[core[0], core[2]] if cfg.fsdp else ())
    optimizer = torch.optim.AdamW(core.parameters(), lr=0.01)
    if path:
        fsdp.restore_state(core, optimizer, path, run.group)
    loader = run.loader(Data(cfg), GlobalOrder(20, cfg.seed), collate, cfg.num_workers)
    run.describe(core, 20, 1000, out)

    def collect():
        return dict(weights=core.state_dict(), meta=run.progress() | dict(fingerprint="data"))

    def collect_all():
        return collect() | dict(state=fsdp.state_of(core, optimizer))

    def write(folder, content):
        if content["meta"]["step"] == cfg.full_step and run.rank == cfg.full_rank:
            raise OSError(28, "No space left on device")
        folder.mkdir(exist_ok=True)
        if "state" in content:
            fsdp.write_state(folder, content["state"], run.rank)
        if run.main:
            ckpt.save_state(folder / "model.pt", content["weights"])
            (folder / "meta.json").write_text(json.dumps(content["meta"]))

    run.checkpoints(out, "steps_{step}", write, 1000, collect_all, keep=cfg.keep)
    for step in run.steps(loader, "toy", cfg.wandb):
        count = run.sum(sum(len(b["y"]) for b in step.batches))
        for batch in step.micro_batches(model):
            if step.number == cfg.error_step and run.rank == cfg.error_rank:
                raise torch.OutOfMemoryError("tried") if cfg.error == "memory" else RuntimeError(cfg.error)
            loss = (model(batch["x"])[:, 0] - batch["y"]).square()
            step.backward(loss.sum() / count, loss)
            step.add(samples=len(batch["y"]))
        if step.number == cfg.signal_step and run.rank == cfg.signal_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        step.update(optimizer, 0.01, 1.0)
        if step.every(cfg.log_steps):
            mean = step.mean()
            step.log(dict(loss=mean["loss"], grad_norm=mean["grad_norm"]), f"loss {mean['loss']:.4f}")
        if step.every(cfg.val_steps):
            with torch.no_grad(), fsdp.gathered(core):
                value = core.eval()(torch.ones(1, 4)).square().item()
            core.train()
            if step.validated(dict(val_loss=value), value, f"loss {value:.4f}"):
                run.save_best(out / "best", write, 1000, collect)
        if step.every(cfg.save_steps):
            run.save()
    run.finish(f"model: {run.saved}")
    return run


if __name__ == "__main__":
    launch(main, Config)
