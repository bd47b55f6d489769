"""One tiny recipe per training script, for test_truths.py: data and backbone by make_demo.py, the config of a run of a
second, where its checkpoints are and how to read the weights from one."""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

import build_vl_cache
import create_datapkl
import make_demo
from common import checkpoint as ckpt


@dataclass
class Recipe:
    name: str  # of the script
    knobs: str  # the script's own names of out, batch, accumulation, steps, workers, resume
    values: dict  # what else a tiny run changes; a group's key is group__key
    still: dict  # without dropout and augmentation: one sample is always seen alike
    write: Callable  # folder -> the values that name data and backbone
    root: str  # the one of these that names the recordings
    newest: Callable  # folder of a run -> its newest checkpoint
    tensors: Callable  # checkpoint -> {name of a parameter: tensor}
    whole: bool = False  # the checkpoint holds frozen weights, too: it is the exported model
    eyes: tuple = ()  # modules that see inputs, beside embeddings and convolutions
    instructed: Callable = lambda policy, o, text: o | dict(instruction=text)  # observation -> with another instruction
    place: Callable = lambda name, frame, cfg: (name, frame)  # of a training sample -> of its observation
    written: dict = field(default_factory=dict)

    def __post_init__(self):
        self.script = importlib.import_module(self.name)

    @property
    def key(self):
        """Its name in RECIPES."""
        return next(key for key, recipe in RECIPES.items() if recipe is self)

    def data(self):
        """Folder of the recordings."""
        value = self.written[self.root]
        return value[0] if isinstance(value, list) else value

    def config(self, out, **changes):
        """`changes` by our names of the knobs or by the script's own."""
        ours = ("out", "batch", "accumulation", "steps", "workers", "resume")
        renamed = dict(zip(ours, self.knobs.split(), strict=True))
        values = self.values | self.written | dict(out=str(out), batch=2, accumulation=2, steps=8, workers=0) | changes
        cfg = self.script.Config()
        for key, value in values.items():
            for place in renamed.get(key, key).split("+"):
                *groups, name = place.split("__")
                group = functools.reduce(getattr, groups, cfg)
                assert hasattr(group, name), place
                setattr(group, name, value)
        return cfg


def same(a, b):
    """Bitwise equal tensors under equal names."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ, e.g. {different[0]}"


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


def see(policy, observation, text):
    """The same look under an instruction: its feature is not cached."""
    picture = np.arange(36 * 64 * 3, dtype=np.uint8).reshape(36, 64, 3)  # as recorded
    return dict(images=dict.fromkeys(policy.recipe["views"], picture), instruction=text, sensor=observation["sensor"])


def session_recipe(name, latest, weights, **values):
    values |= dict(hidden_dim=16, sensor_dim=12, num_layers=1, num_heads=2, sensor_window_size=65, horizon=4)
    return Recipe(
        name,
        knobs="checkpoint_dir batch_size grad_accum_steps max_steps num_workers resume",
        values=values | dict(val_split=0.3, lr=1e-3, save_steps=2, log_steps=2, warmup_ratio=0.3),
        still=dict(dropout=0.0),
        write=write_sessions,
        root="dataset_dir",
        newest=lambda out: out / latest,
        tensors=lambda path: ckpt.load_state(path)[weights],
        eyes=("condition.fuse",),
        instructed=see,
    )


# ---- nora, smolvla, openvla, mobile ----------------------------------------------------------------------------------
def write_nora(folder):
    root, model = folder / "insertion", make_demo.write_qwen2_5_vl(folder / "qwen", text=(64, 2), vision=(32, 2))
    make_demo.write_insertion(root, episodes=4, size=(60, 80), max_frames=9)
    return dict(dataset__root_dir=str(root), model=str(model))


def write_smolvla(folder):
    sizes = dict(text=(48, 3), vision=(32, 2), image_size=64, patch=8, shuffle=2)
    root, model = folder / "insertion_sim", make_demo.write_smolvlm2(folder / "smolvlm2", **sizes)
    make_demo.write_insertion_sim(root, episodes=5, size=(60, 80), max_frames=7)
    return dict(dataset__root_dir=str(root), policy__vlm_model_name=str(model))


def write_openvla(folder):
    sizes = dict(text=(16, 2), dino=(16, 2), siglip=(24, 2), image_size=42)
    root, model = folder / "vamos", make_demo.write_openvla(folder / "openvla", **sizes)
    make_demo.write_vamos(root, images=10, validation_images=2, size=(48, 64), files=2, rows_per_group=4)
    return dict(data_root_dir=str(root), vla_path=str(model), frame_dir=str(folder / "frames"))


def write_mobile(folder):
    sizes = dict(text=(32, 2), vision=(24, 1), image_size=28, queries=5)
    root, model = folder / "mobile", make_demo.write_kosmos2(folder / "kosmos2", **sizes)
    make_demo.write_mobile(root, episodes=12, size=(24, 40), frames=6)
    return dict(dataset__data_dir=str(root), model=str(model), dataset__frame_dir=str(folder / "frames"))


def newest(pattern):
    return lambda out: max(out.glob(pattern), key=lambda path: int("".join(filter(str.isdigit, path.name))))


NORA = dict(fast="fit", fast_vocab_size=300, learning_rate=1e-3, num_warmup_steps=2, logging_frequency=2)
NORA |= dict(val_frequency=4, checkpoint_save_frequency=2, keep_checkpoints=1, val_samples=8, val_decode_samples=2)
NORA |= dict(dataset__horizon=3, dataset__use_ee_pose_delta_as_action=True, dataset__num_val_episodes=1)
NORA |= dict(dataset__cameras=["camera1", "camera3"], dataset__resize_resolution=[56, 56], dataset__augment=True)

SMOLVLA = dict(dataset__horizon=4, dataset__augment=True, policy__chunk_size=4, policy__n_action_steps=4)
SMOLVLA |= dict(policy__num_vlm_layers=2, policy__resize_imgs_with_padding=(32, 32), policy__max_state_dim=8)
SMOLVLA |= dict(policy__max_action_dim=8, policy__tokenizer_max_length=20, policy__num_steps=3)
SMOLVLA |= dict(training__log_freq=2, training__save_freq=2, training__keep_checkpoints=1)
SMOLVLA |= dict(validation__num_episodes=1, validation__val_freq=4)
SMOLVLA |= dict(optimizer__lr=1e-3, scheduler__num_warmup_steps=2, scheduler__num_decay_steps=8)

OPENVLA = dict(lora_rank=4, lora_dropout=0.2, image_aug=True, learning_rate=1e-2, lr_schedule="cosine")
OPENVLA |= dict(warmup_steps=2, log_steps=2, save_steps=2, keep_checkpoints=1, val_steps=4, val_samples=4)

MOBILE = dict(dataset__episode_pattern="*.h5", dataset__train_split=0.67, window_size=3, fwd_pred_next_n=4)
MOBILE |= dict(learning_rate=1e-3, scheduler="cosine", act_head__hidden_size=16, act_head__num_layers=1)
MOBILE |= dict(train_setup__lora_r=2, trainer__max_epochs=2, trainer__log_every_n_steps=2)
MOBILE |= dict(dataset__windows_per_sample=2)

RECIPES = {
    "async": session_recipe("train_async", "qwen_vla_async.pt", "model_state_dict"),
    "diffusion": session_recipe(
        "train_diffusion", "diffusion_stage1_latest.pt", "raw_state_dict", diffusion_timesteps=10, ddim_steps=3
    ),
    "nora": Recipe(
        "train_nora",
        knobs="output_dir per_device_batch_size gradient_accumulation_steps max_train_steps num_workers "
        "resume_from_checkpoint",
        values=NORA,
        still=dict(dataset__augment=False),
        write=write_nora,
        root="dataset__root_dir",
        newest=newest("steps_*"),
        tensors=lambda path: ckpt.load_state(path / "state.pt")["trained"],
    ),
    "smolvla": Recipe(
        "train_smolvla_sim",
        knobs="output_dir training__batch_size training__gradient_accumulation_steps training__steps "
        "training__num_workers resume",
        values=SMOLVLA,
        still=dict(dataset__augment=False),
        write=write_smolvla,
        root="dataset__root_dir",
        newest=newest("checkpoints/checkpoint_step_*.pt"),
        tensors=lambda path: ckpt.load_state(path)["model_state_dict"],
        whole=True,
        eyes=("model.state_proj",),
    ),
    "openvla": Recipe(
        "train_openvla_vamos",
        knobs="run_root_dir+adapter_tmp_dir batch_size grad_accumulation_steps max_steps num_workers "
        "resume_from_checkpoint",
        values=OPENVLA,
        still=dict(lora_dropout=0.0, image_aug=False),
        write=write_openvla,
        root="data_root_dir",
        newest=newest("*/steps_*"),
        tensors=lambda path: {f"vla.{n}": t for n, t in RECIPES["openvla"].script.read_adapter(path).items()},
        place=lambda name, row, cfg: (f"data/{name}", int(row.split()[1])),
    ),
    "mobile": Recipe(
        "train_mobile_kosmos",
        knobs="output_dir batch_size trainer__accumulate_grad_batches trainer__max_steps num_workers resume",
        values=MOBILE,
        still=dict(train_setup__lora_dropout=0.0, dataset__windows_per_sample=1),  # as a policy sees them
        write=write_mobile,
        root="dataset__data_dir",
        newest=lambda out: out / "checkpoints/last.ckpt",
        tensors=lambda path: ckpt.load_state(path)["trained"],
        place=lambda name, start, cfg: (name, start + cfg.window_size - 1),
    ),
}
