"""One tiny recipe per training script, for test_truths.py: data and backbone by make_demo.py, a config for a run of
seconds, where its checkpoints are and how to read the weights from one. Watch looks on while it trains."""

import functools
import importlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import build_vl_cache
import create_datapkl
import make_demo
from common import checkpoint as ckpt
from common.run import Run, Step


@dataclass
class Recipe:
    name: str  # of the script
    knobs: dict  # out, batch, accumulation, steps, workers: the script's own names
    values: dict  # what else a tiny run changes
    still: dict  # without dropout and augmentation: one sample is always seen alike
    write: Callable  # folder -> the values that name data and backbone; "root": the recordings, for open_episodes
    newest: Callable  # folder of checkpoints -> the one to resume
    tensors: Callable  # checkpoint -> {name of a parameter: tensor}

    def __post_init__(self):
        self.script = importlib.import_module(self.name)

    def config(self, out, batch=2, accumulation=2, steps=8, workers=0, **changes):
        out = {key: str(Path(out) / "run") for key in self.knobs["out"]}
        sizes = dict(batch=batch, accumulation=accumulation, steps=steps, workers=workers)
        sizes = {self.knobs[key]: value for key, value in sizes.items()}
        changes = {self.knobs.get(key, key): value for key, value in changes.items()}
        cfg = self.script.Config()
        for key, value in (self.values | self.written | out | sizes | changes).items():
            *groups, name = key.split("__")
            group = functools.reduce(getattr, groups, cfg)
            assert hasattr(group, name), key
            setattr(group, name, value)
        return cfg

    def train(self, out, watch=None, **changes):
        """Run main -> what the Watch saw."""
        with watch or Watch() as seen:
            self.script.main(self.config(out, **changes))
        return seen


class Watch:
    """Notes of a training in this process. steps: per update what Step says of it, the samples and dropout seeds of
    its micro-batches, and copies of gradients, weights and moments. `stop_at`: a step in whose first micro-batch this
    process gets SIGTERM. `spoil` {step: "loss" or "gradient"}: what is made NaN in its last micro-batch."""

    def __init__(self, stop_at=None, spoil=None):
        self.stop_at, self.spoil, self.steps, self.batches = stop_at, spoil or {}, [], []

    def __enter__(self):
        self.patch, watch = pytest.MonkeyPatch(), self
        prepare, micro_batches, backward, update = Run.prepare, Step.micro_batches, Step.backward, Step.update

        def watched_prepare(run, model, *args, **kwargs):
            watch.core, watch.run = model, run
            watch.before = copies(watch.trained())
            return prepare(run, model, *args, **kwargs)

        def watched_micro_batches(step, model):
            for batch in micro_batches(step, model):
                watch.batches.append(SimpleNamespace(names=batch["names"], seed=torch.initial_seed()))
                if step.number == watch.stop_at:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

        def watched_backward(step, loss, sample_loss):
            bad = watch.spoil.get(step.number) if len(watch.batches) == len(step.batches) else None
            if bad == "loss":
                loss, sample_loss = loss * torch.nan, sample_loss * torch.nan
            backward(step, loss, sample_loss)
            if bad == "gradient":
                next(p for p in watch.trained().values() if p.grad is not None).grad.view(-1)[0] = torch.inf

        def watched_update(step, optimizer, *args, **kwargs):
            trained = watch.trained()
            gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
            update(step, optimizer, *args, **kwargs)
            said = {key: getattr(step, key) for key in ("number", "loss", "lr", "grad_norm", "finite")}
            names = {id(p): name for name, p in trained.items()}
            moments = {names.get(id(p)): copies(state) for p, state in optimizer.state.items()}
            after = dict(weights=copies(trained), moments=moments, gradients=gradients, batches=watch.batches)
            watch.steps.append(SimpleNamespace(**said, **after))
            watch.optimizer, watch.batches = optimizer, []

        self.patch.setattr(Run, "prepare", watched_prepare)
        self.patch.setattr(Step, "micro_batches", watched_micro_batches)
        self.patch.setattr(Step, "backward", watched_backward)
        self.patch.setattr(Step, "update", watched_update)
        self.patch.setattr(Run, "finish", lambda *args, **kwargs: None)  # drawing takes longer than a tiny run
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def trained(self):
        return {name: p for name, p in self.core.named_parameters() if p.requires_grad}


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}


# ---- async, diffusion ------------------------------------------------------------------------------------------------


@functools.cache
def write_sessions(folder):
    """3 recordings with sensor and 2 without, of 1.2 s, and their features: 27 samples to train on."""
    root = make_demo.write_sessions(folder / "sessions", white=3, needle=0, new=0, oct=2, seconds=1.2, size=(36, 64))
    model = make_demo.write_qwen2_5_vl(folder / "qwen2_5_vl", text=(32, 1), vision=(16, 1), action_tokens=False)
    create_datapkl.main(create_datapkl.Config(dataset_dirs=[str(root)], workers=0))
    size = dict(image_resize_height=56, image_resize_width=56)
    build_vl_cache.main(build_vl_cache.Config(dataset_dirs=[str(root)], model=str(model), num_workers=1, **size))
    return dict(dataset_dir=[str(root)], model=str(model), **size)


def session_recipe(name, latest, weights, **values):
    sizes = dict(hidden_dim=16, sensor_dim=12, num_layers=1, num_heads=2, sensor_window_size=65, horizon=4)
    return Recipe(
        name,
        knobs=dict(out=["checkpoint_dir"], batch="batch_size", accumulation="grad_accum_steps", steps="max_steps")
        | dict(workers="num_workers"),
        values=sizes | dict(val_split=0.3, lr=1e-3, save_steps=2, log_steps=2, warmup_ratio=0.3) | values,
        still=dict(dropout=0.0),
        write=write_sessions,
        newest=lambda out: out / "run" / latest,
        tensors=lambda path: ckpt.load_state(path)[weights],
    )


# ---- openvla ---------------------------------------------------------------------------------------------------------


def write_openvla(folder):
    """A tiny OpenVLA, and 300 samples of 16 pictures."""
    base = make_demo.write_openvla(folder / "openvla", text=(16, 2), dino=(16, 2), siglip=(24, 2), image_size=42)
    make_demo.write_vamos(folder / "vamos", images=10, validation_images=2, size=(48, 64), files=2, rows_per_group=4)
    return dict(vla_path=str(base), data_root_dir=str(folder / "vamos"), frame_dir=str(folder / "frames"))


OPENVLA = Recipe(
    "train_openvla_vamos",
    knobs=dict(out=["run_root_dir", "adapter_tmp_dir"], batch="batch_size", accumulation="grad_accumulation_steps")
    | dict(steps="max_steps", workers="num_workers", resume="resume_from_checkpoint"),
    values=dict(lora_rank=4, lora_dropout=0.2, image_aug=True, learning_rate=1e-2, lr_schedule="cosine")
    | dict(warmup_steps=2, log_steps=2, save_steps=2, val_steps=4, val_samples=4),
    still=dict(lora_dropout=0.0, image_aug=False),
    write=write_openvla,
    newest=lambda out: ckpt.checkpoints_in(next((out / "run").glob("*+vamos+*/steps_*")).parent)[-1],
    tensors=lambda path: {
        f"vla.{name}": t for name, t in importlib.import_module("train_openvla_vamos").read_adapter(path).items()
    },
)


# ---- nora ------------------------------------------------------------------------------------------------------------


def write_nora(folder):
    """A tiny Qwen2.5-VL with action tokens, and 3 episodes of 14 frames."""
    model = make_demo.write_qwen2_5_vl(folder / "nora", text=(32, 2), vision=(16, 2))
    make_demo.write_insertion(folder / "insertion", episodes=3, size=(60, 80), max_frames=14)
    return dict(model=str(model), dataset__root_dir=str(folder / "insertion"))


NORA = Recipe(
    "train_nora",
    knobs=dict(out=["output_dir"], batch="per_device_batch_size", accumulation="gradient_accumulation_steps")
    | dict(steps="max_train_steps", workers="num_workers", resume="resume_from_checkpoint"),
    values=dict(fast="fit", fast_vocab_size=256, train="lora", lora_rank=4, lora_dropout=0.2, learning_rate=1e-2)
    | dict(num_warmup_steps=2, logging_frequency=2, checkpoint_save_frequency=2, val_frequency=4, val_samples=4)
    | dict(val_decode_samples=2, dataset__horizon=2, dataset__use_ee_pose_delta_as_action=True)
    | dict(dataset__resize_resolution=[28, 28], dataset__num_val_episodes=1, dataset__augment=True),
    still=dict(lora_dropout=0.0, dataset__augment=False),
    write=write_nora,
    newest=lambda out: ckpt.checkpoints_in(out / "run")[-1],
    tensors=lambda path: ckpt.load_state(path / "state.pt")["trained"],
)


# ---- mobile ----------------------------------------------------------------------------------------------------------


def write_mobile(folder):
    """A tiny Kosmos-2, and 6 drives of 6 frames: 24 windows to train on, of which some reach over the end."""
    make_demo.write_mobile(folder / "mobile", episodes=6, size=(24, 40), frames=6)
    model = make_demo.write_kosmos2(folder / "kosmos2", text=(32, 2), vision=(24, 1), image_size=28, queries=5)
    data = dict(data_dir=str(folder / "mobile"), frame_dir=str(folder / "frames"), episode_pattern="*.h5")
    return dict(model=str(model)) | {f"dataset__{key}": value for key, value in data.items()}


MOBILE = Recipe(
    "train_mobile_kosmos",
    knobs=dict(out=["output_dir"], batch="batch_size", accumulation="trainer__accumulate_grad_batches")
    | dict(steps="trainer__max_steps", workers="num_workers"),
    values=dict(window_size=3, fwd_pred_next_n=4, dataset__train_split=0.67, learning_rate=1e-3, scheduler="cosine")
    | dict(warmup_epochs=3, act_head__hidden_size=16, act_head__num_layers=1, train_setup__lora_r=2),
    still=dict(train_setup__lora_dropout=0.0),
    write=write_mobile,
    newest=lambda out: out / "run/checkpoints/last.ckpt",
    tensors=lambda path: ckpt.load_state(path)["trained"],
)


RECIPES = {
    "async": session_recipe("train_async", "qwen_vla_async.pt", "model_state_dict"),
    "diffusion": session_recipe(
        "train_diffusion", "diffusion_stage1_latest.pt", "raw_state_dict", diffusion_timesteps=10, ddim_steps=3
    ),
    "openvla": OPENVLA,
    "nora": NORA,
    "mobile": MOBILE,
}
