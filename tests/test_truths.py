"""What every training script keeps (DESIGN's ten truths), once for all of them, on the tiny runs of recipes.py.

Left to the scripts' own test files, where the pieces would be longer than the test: causality (6) of sessions and their
features, and padding (8) inside a batch beyond what 1 and 8 compare here.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from common import UserError
from common.run import Run, Step
from recipes import RECIPES, same


class Watch:
    """Notes of a training in this process. steps: per update what Step says of it, the samples and dropout seeds of
    its micro-batches, and copies of gradients, weights and moments. `stop_at`: a step in whose first micro-batch this
    process gets SIGTERM. `spoil` {step: "loss" or "gradient"}: what is made NaN in its last micro-batch. `eyes`: of
    what inputs_of takes notes, in `seen`."""

    def __init__(self, stop_at=None, spoil=None, eyes=()):
        self.stop_at, self.spoil, self.eyes, self.steps, self.batches = stop_at, spoil or {}, eyes, [], []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.real = dict(prepare=Run.prepare, backward=Step.backward, update=Step.update)
        self.real["micro_batches"] = Step.micro_batches
        watch = self  # the patched methods get their own self
        self.patch.setattr(Run, "prepare", lambda *a, **k: watch.prepare(*a, **k))
        self.patch.setattr(Step, "micro_batches", lambda *a: watch.micro_batches(*a))
        self.patch.setattr(Step, "backward", lambda *a: watch.backward(*a))
        self.patch.setattr(Step, "update", lambda *a: watch.update(*a))
        self.patch.setattr(Run, "finish", lambda *a, **k: None)  # drawing takes longer than a tiny run
        return self

    def __exit__(self, *_):
        self.patch.undo()

    def trained(self):
        return {name: p for name, p in self.core.named_parameters() if p.requires_grad}

    def prepare(self, run, core, *args, **kwargs):
        self.run, self.core = run, core
        self.before, self.seen = copies(self.trained()), inputs_of(core, self.eyes)
        return self.real["prepare"](run, core, *args, **kwargs)

    def micro_batches(self, step, model):
        for batch in self.real["micro_batches"](step, model):
            self.batches.append(SimpleNamespace(names=batch["names"], seed=torch.initial_seed()))
            if step.number == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    def backward(self, step, loss, sample_loss):
        bad = self.spoil.get(step.number) if len(self.batches) == len(step.batches) else None
        if bad == "loss":
            loss, sample_loss = loss * torch.nan, sample_loss * torch.nan
        self.real["backward"](step, loss, sample_loss)
        if bad == "gradient":
            next(p for p in self.trained().values() if p.grad is not None).grad.view(-1)[0] = torch.inf

    def update(self, step, optimizer, *args):
        trained = self.trained()
        gradients = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
        self.real["update"](step, optimizer, *args)
        said = {key: getattr(step, key) for key in ("number", "loss", "lr", "grad_norm", "finite")}
        names = {id(p): name for name, p in trained.items()}
        moments = {names.get(id(p)): copies(state) for p, state in optimizer.state.items()}
        after = dict(weights=copies(trained), moments=moments, gradients=gradients, batches=self.batches)
        self.steps.append(SimpleNamespace(**said, **after))
        self.optimizer, self.batches = optimizer, []


def copies(tensors):
    return {name: t.detach().clone() for name, t in tensors.items() if isinstance(t, torch.Tensor)}


def train(recipe, out, watch=None, **changes):
    """Run main -> what the Watch saw."""
    with watch or Watch() as seen:
        recipe.script.main(recipe.config(out, **changes))
    return seen


@pytest.fixture(scope="session", params=RECIPES)
def recipe(request, recipe_of):
    return recipe_of(request.param)


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    """A run that was never stopped: (folder, what was seen; predicted: by its own policy in the last validation)."""
    out, validate, asked = tmp_path_factory.mktemp("whole"), recipe.script.validate, []

    def watched(*args):
        watch.core.eval()
        policy = next(arg for arg in args if hasattr(arg, "predict"))
        asked.append(ask(policy, looks(recipe, policy)))
        return validate(*args)

    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe.script, "validate", watched)
        seen = train(recipe, out, watch)
    seen.predicted = asked[-1]
    return out, seen


def ask(policy, *batches):
    """Predictions for lists of observations, one list after the other, from the policy's first noise on."""
    if hasattr(policy, "reset"):
        policy.reset()
    return np.concatenate([policy.predict(batch) for batch in batches])


def looks(recipe, policy, names=None, count=3):
    """The first observations of an episode."""
    episode = next(iter(policy.open_episodes(recipe.data(), names)))
    return [episode["sample"](t) for t in range(count)]


def close(a, b, tolerance):
    """Equal up to `tolerance` of the length of all tensors together: rounding stays below on any machine, another
    divisor does not."""
    assert a.keys() == b.keys()
    length = norm(a)
    assert length > 0
    assert norm({name: a[name] - b[name] for name in a}) < tolerance * length


def norm(tensors):
    return torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt().item()


# ---- 1: accumulation -------------------------------------------------------------------------------------------------
def test_1_micro_batches_equal_one_big_batch(recipe, tmp_path):
    """4 samples as 1 x 4, 2 x 2, 4 x 1: the same loss and gradient, also where samples have unequal targets."""
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        sizes = dict(batch=batch, accumulation=accumulation, steps=2)
        runs.append(train(recipe, tmp_path / str(batch), **sizes, **recipe.still).steps)
    for other in runs[1:]:
        for step in (0, 1):
            assert other[step].loss == pytest.approx(runs[0][step].loss, rel=1e-3)
        close(runs[0][0].gradients, other[0].gradients, 1e-3)


# ---- 2: learning rate ------------------------------------------------------------------------------------------------
def test_2_the_learning_rate_is_a_function_of_the_step(recipe, whole, tmp_path, monkeypatch):
    """Whatever the micro-batches are; and beyond the end it stays where it was."""
    rates = [step.lr for step in whole[1].steps]
    lr_at, calls = recipe.script.lr_at, []
    monkeypatch.setattr(recipe.script, "lr_at", lambda *args: calls.append(args) or lr_at(*args))
    other = train(recipe, tmp_path, batch=4, accumulation=1)
    assert rates == [step.lr for step in other.steps] and len(set(rates)) > 2
    groups = other.optimizer.param_groups
    assert all(group["lr"] == pytest.approx(rates[-1] * group.get("lr_scale", 1)) for group in groups)
    end, later = (lr_at(step, *calls[-1][1:]) for step in (10**4, 10**6))
    assert 0 <= end == later <= min(rates)


# ---- 3: ranks --------------------------------------------------------------------------------------------------------
def one_of_two(name, written, out, rank, port):
    """The body of a process: the run of `whole`, a micro-batch per rank, stopped by a signal to rank 1 and resumed."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    recipe = RECIPES[name]
    recipe.written = written
    steps = train(recipe, out, Watch(stop_at=5 if rank else None), accumulation=1).steps
    assert len(steps) == 5
    steps += train(recipe, out, accumulation=1, resume="auto").steps
    torch.save([vars(step) for step in steps], out / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(recipe, tmp_path_factory):
    """What the two processes of a run saw: [steps of rank 0, of rank 1]."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("forkserver")  # which imports them once for all recipes
    context.set_forkserver_preload([r.name for r in RECIPES.values()])
    processes = []
    for rank in range(2):
        processes.append(context.Process(target=one_of_two, args=(recipe.key, recipe.written, out, rank, port)))
        processes[-1].start()
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0, 0]
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_3_two_processes_train_as_one(whole, ranks):
    """A rank gets one of the micro-batches of a process alone: its own samples, its own noise and dropout. A stop of
    both and a resume change nothing."""
    first, second = ranks
    assert len(first) == len(second) == len(whole[1].steps)
    for one, *both in zip(whole[1].steps, first, second, strict=True):
        for mine, theirs in zip(one.batches, both, strict=True):
            assert theirs["batches"] == [mine]
        assert one.batches[0].names != one.batches[1].names and one.batches[0].seed != one.batches[1].seed
        assert one.loss == pytest.approx(both[0]["loss"], rel=1e-3) and one.lr == both[0]["lr"]
        assert both[0]["loss"] == both[1]["loss"] and both[0]["grad_norm"] == both[1]["grad_norm"]
        same(both[0]["weights"], both[1]["weights"])
    close(whole[1].steps[0].gradients, first[0]["gradients"], 1e-3)
    moved = {n: whole[1].steps[-1].weights[n] - t for n, t in whole[1].before.items()}
    both = {n: first[-1]["weights"][n] - t for n, t in whole[1].before.items()}
    close(moved, both, 0.01)


def test_3_the_data_is_shuffled(whole):
    names = [tuple(name) for step in whole[1].steps for batch in step.batches for name in batch.names]
    assert names != sorted(names) and len(set(names)) > len(names) // 2


# ---- 4: stop and go on -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_4_stopped_and_resumed_equals_never_stopped(recipe, whole, tmp_path, workers):
    """A signal between two micro-batches, in the middle of an epoch, of a log window, and of the saves."""
    one = train(recipe, tmp_path, watch=Watch(stop_at=5), workers=workers)
    assert [step.number for step in one.steps] == [1, 2, 3, 4, 5]
    two = train(recipe, tmp_path, workers=workers, resume="auto")
    assert [step.number for step in two.steps] == [6, 7, 8]
    for a, b in zip(whole[1].steps, one.steps + two.steps, strict=True):
        assert (a.loss, a.grad_norm, a.lr, a.batches) == (b.loss, b.grad_norm, b.lr, b.batches)
        same(a.weights, b.weights)
        assert a.moments.keys() == b.moments.keys()
        for name in a.moments:
            same(a.moments[name], b.moments[name])
    same(recipe.tensors(recipe.newest(tmp_path)), recipe.tensors(recipe.newest(whole[0])))


def test_4_a_resume_leaves_out_a_file_that_turned_out_bad(recipe, tmp_path):
    """A recorded event, not another run: with the split and the statistics that the run began with."""
    folder, out = shutil.copytree(recipe.data(), tmp_path / "data"), tmp_path / "run"
    files = sorted([*folder.rglob("*.h5"), *folder.rglob("train-*.parquet")])
    if not files:
        pytest.skip("recordings have their own session.yaml to leave them out")
    for i, file in enumerate(folder.rglob("*.h5")):
        with h5py.File(file, "r+") as f:  # no two files have the same clock
            f["timestamp"] = f.pop("timestamp", np.arange(9.0))[:] * (1 + i / 100)
    flags = dict(resume="auto", steps=4) | {recipe.root: str(folder)}
    first = train(recipe, out, **flags | dict(steps=2, resume=None))
    policies = [recipe.script.load_policy(recipe.newest(out))]
    held = (first.run.out / "validation_episodes.txt").read_text()
    bad = next(file for file in files if file.name not in held)
    bad.write_bytes(b"")
    with pytest.raises((UserError, ValueError), match=bad.name):
        train(recipe, out, **flags)
    switch = "skip_bad_episodes" if hasattr(recipe.config(out), "skip_bad_episodes") else "dataset__skip_bad_episodes"
    for steps in (4, 6):  # and it stays the same run
        second = train(recipe, out, **flags | {switch: True, "steps": steps})
        assert [step.number for step in second.steps] == [steps - 1, steps]
    seen = {Path(name[-2]).name for step in second.steps for batch in step.batches for name in batch.names}
    again = (second.run.out / "validation_episodes.txt").read_text()
    names = [[Path(word).name for word in text.split() if Path(word).suffix] for text in (held, again)]
    assert seen and bad.name not in seen and names[0] == names[1]
    policies.append(recipe.script.load_policy(recipe.newest(out)))
    assert recipe.name == "train_mobile_kosmos" or policies[0].stats == policies[1].stats
    other = next(file for file in files if file.name not in held and file != bad)
    other.rename(other.with_name(f"{other.stem}_again{other.suffix}"))  # a file more, and one less
    with pytest.raises(UserError, match="data or its settings changed"):
        train(recipe, out, **flags | {switch: True, "steps": 8})


ANOTHER_RUN = [  # recipe, what a resume may not change, what is said
    ("nora", dict(dataset__horizon=5), "data or its settings changed"),
    ("nora", dict(seed=1), "seed 42 -> 1"),
    ("nora", dict(train="head"), "train full -> head"),
    ("smolvla", dict(seed=1), "data or its settings changed"),  # the seed draws the split
    ("smolvla", dict(train="lora"), "train full -> lora"),
    ("smolvla", dict(normalization__mode="MIN_MAX"), "normalization.mode MEAN_STD -> MIN_MAX"),
    ("smolvla", dict(policy__max_period=5.0), "policy.max_period 4.0 -> 5.0"),
    ("openvla", dict(samples="first"), "data or its settings changed"),
    ("openvla", dict(targets_per_picture=1), "another targets_per_picture 16 -> 1. Set it back"),
    ("mobile", dict(label_offset=0), "label_offset 1 -> 0"),
    ("mobile", dict(dataset__colour_order="rgb"), "colour_order bgr -> rgb"),
]
for name in ("async", "diffusion"):
    ANOTHER_RUN.append((name, dict(seed=1), "seed 42 -> 1"))
    ANOTHER_RUN.append((name, dict(sensor_window_size=130), "sensor_window_size 65 -> 130"))
    ANOTHER_RUN.append((name, dict(val_split=0.0), "data or its settings changed"))


def test_4_a_resume_that_would_be_another_run_is_refused(recipe, whole):
    for name, changes, said in ANOTHER_RUN:
        if name == recipe.key:
            with pytest.raises(UserError, match=said):
                train(recipe, whole[0], resume="auto", steps=20, **changes)


WRONG = [  # recipe, setting, what is said before anything is trained
    ("nora", dict(dataset__horizon=0), "dataset.horizon is 0"),
    ("nora", dict(dataset__cameras=["camera9"]), r"dataset.cameras is \['camera9'\].*side_camera"),
    ("nora", dict(dataset__min_cameras=3), "min_cameras is 3"),
    ("nora", dict(lora_rank=0), "lora_rank is 0"),
    ("nora", dict(fast_scale=0.0), "fast_scale is 0"),
    ("nora", dict(dataset__resize_resolution=[224, 225]), "multiples of 28"),
    ("nora", dict(model="/no/model"), "'/no/model' is neither"),
    ("nora", dict(fast="/no/fast"), "'/no/fast', processor_config.json: '/no/fast' is.*--fast fit"),
    ("nora", dict(fsdp=True), "fsdp needs several processes"),
    ("nora", dict(fsdp=True, train="head"), "fsdp shards a full training"),
    ("nora", dict(dataset__normalization_stats_path="missing.yaml"), "missing.yaml not found.*compute_stats.py"),
    ("nora", dict(merge="/no/step"), "--merge /no/step"),
    ("nora", dict(load_model_weights="/no/weights"), "load_model_weights: /no/weights"),
    ("smolvla", dict(dataset__horizon=5), "policy.chunk_size is 4"),
    ("smolvla", dict(policy__n_action_steps=5), "policy.n_action_steps is 5: expected 1 to 4"),
    ("smolvla", dict(reset_scheduler=True), "--resume CHECKPOINT"),
    ("smolvla", dict(init_from="x", resume="y"), "give one of them"),
    ("smolvla", dict(policy__max_action_dim=5), "policy.max_action_dim is 5"),
    ("smolvla", dict(dataset__state_dropout=2.0), "dataset.state_dropout is 2.0: expected a share below 1"),
    ("smolvla", dict(policy__num_vlm_layers=9), "has 3"),
    ("smolvla", dict(policy__resize_imgs_with_padding=(48, 40)), "a square in multiples of 16 .* up to 64"),
    ("smolvla", dict(policy__num_vlm_layers=3, policy__num_expert_layers=2), "must divide"),
    ("smolvla", dict(policy__expert_width_multiplier=0.33), "the expert 15 wide"),
    ("smolvla", dict(lora_alpha=0, scheduler__peak_lr=0.0, optimizer__eps=0.0), "lora_alpha is 0, .*eps is 0.0: exp"),
    ("smolvla", dict(optimizer__betas=(0.9, 1.0)), r"optimizer.betas are \[0.9, 1.0\]"),
    ("openvla", dict(data_root_dir=""), "data_root_dir is not set"),
    ("openvla", dict(dataset_name="bridge"), "dataset_name is 'bridge'.*vamos"),
    ("openvla", dict(trajectory_hz=0), "trajectory_hz is 0"),
    ("openvla", dict(run_id_note="a/b"), "run_id_note is 'a/b'"),
    ("openvla", dict(max_grad_norm=-1.0, keep_checkpoints=-1), "grad_norm is -1.0, keep_checkpoints is -1: expected"),
    ("openvla", dict(learning_rate=float("nan")), "learning_rate is nan"),
    ("openvla", dict(use_quantization=True, data_root_dir="no"), "pip install bitsandbytes"),  # before data is read
    ("mobile", dict(window_size=0), "window_size is 0"),
    ("mobile", dict(dataset__train_split=0.0), "train_split"),
    ("mobile", dict(dataset__action_scale=[1.0]), "two speeds"),
    ("mobile", dict(dataset__train_split=0.01), "leaves 0 to train"),
    ("mobile", dict(dataset__max_text_len=5), "max_text_len is 5"),
    ("mobile", dict(train_setup__lora_dropout=1.0), "lora_dropout is 1.0: expected a share below 1"),
    ("mobile", dict(min_lr_scale=10.0), "min_lr_scale is 10"),
    ("async", dict(min_lr=0.1), "min_lr is 0.1: expected lr above 0, min_lr up to lr"),
    ("async", dict(dropout=1.0), "dropout is 1.0"),
    ("async", dict(dataset_weight=["OCT_insertion=1e-9", "OCT_insertion=0"]), "dataset_weight 'OCT_insertion=0'"),
    ("async", dict(dataset_weight=["OCT_insertion"]), "dataset_weight 'OCT_insertion'"),
    ("diffusion", dict(training_stage="stage2"), "training_stage is stage2"),
    ("diffusion", dict(ddim_steps=200), "ddim_steps is 200"),
    ("diffusion", dict(min_lr=0.1), "min_lr is 0.1"),
    ("diffusion", dict(ema_decay=1), "ema_decay is 1"),
    ("diffusion", dict(predict_draws=9), "predict_draws is 9"),
]


@pytest.mark.parametrize("name, settings, said", WRONG)
def test_wrong_settings_are_named(recipe_of, name, settings, said, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises((UserError, FileNotFoundError), match=said):
        train(recipe_of(name), tmp_path, **settings)


# ---- 5: checkpoints --------------------------------------------------------------------------------------------------
def test_5_a_checkpoint_holds_the_weights_after_its_step(recipe, whole, tmp_path):
    out, seen = whole
    kept = recipe.tensors(recipe.newest(out))
    same({name: kept[name] for name in seen.steps[-1].weights}, seen.steps[-1].weights)
    stopped = train(recipe, tmp_path, Watch(stop_at=3))
    kept = recipe.tensors(recipe.newest(tmp_path))
    same({name: kept[name] for name in stopped.before}, seen.steps[2].weights)


def test_5_load_policy_predicts_what_was_trained(recipe, whole):
    policy = recipe.script.load_policy(recipe.newest(whole[0]))
    predicted = ask(policy, looks(recipe, policy))
    np.testing.assert_allclose(predicted, whole[1].predicted, atol=1e-4 * np.abs(predicted).max())
    assert np.isfinite(predicted).all()


# ---- 6: causality ----------------------------------------------------------------------------------------------------
def change_after(path, t):
    """What an HDF5 episode has after frame t becomes what it has at frame 0."""
    with h5py.File(path, "r+") as f:
        arrays = []
        f.visititems(lambda _, item: arrays.append(item) if isinstance(item, h5py.Dataset) and item.ndim else None)
        length = max(map(len, arrays))
        for array in arrays:
            if len(array) == length and not h5py.check_string_dtype(array.dtype):
                for i in range(t + 1, length):
                    array[i] = array[0]


@pytest.fixture
def copy(recipe, tmp_path):
    """copy(name) -> a copy of the HDF5 episodes, to be changed."""
    if not any(Path(recipe.data()).glob("*.h5")):
        pytest.skip("not HDF5")
    return lambda name: shutil.copytree(recipe.data(), tmp_path / name)


def test_6_what_comes_later_is_not_seen(recipe, whole, copy):
    policy, answers, targets = recipe.script.load_policy(recipe.newest(whole[0])), [], []
    for t in (99, 3, 1):  # nothing is changed, what comes after the observed frame, that frame itself
        folder = copy(str(t))
        change_after(min(folder.glob("*.h5")), t)
        episode = next(iter(policy.open_episodes(folder, [min(folder.glob("*.h5")).name])))
        observation = episode["sample"](3)
        answers.append(np.concatenate([np.ravel(image) for image in pictures(observation)]))
        targets.append(episode["target"])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert (answers[0] != answers[2]).any() and (targets[0] != targets[1]).any()


def pictures(observation):
    images = observation["images"]
    return list(images.values() if isinstance(images, dict) else images)


def test_6_validation_episodes_are_not_trained_on(whole):
    held = (whole[1].run.out / "validation_episodes.txt").read_text().split()
    seen = {Path(name[-2]).name for step in whole[1].steps for batch in step.batches for name in batch.names}
    assert held and not seen & {Path(name).name for name in held}


def test_6_validation_episodes_teach_nothing(recipe, whole, copy, tmp_path):
    """With other numbers in them no statistic and no gradient is different."""
    folder = copy("other")
    held = (whole[1].run.out / "validation_episodes.txt").read_text().split()
    paths = [folder / Path(name).name for name in held if name.endswith(".h5")]
    for path in paths:
        change_after(path, 0)
    assert paths
    same(train(recipe, tmp_path, **{recipe.root: str(folder)}).steps[-1].weights, whole[1].steps[-1].weights)


# ---- 7: one preprocessing --------------------------------------------------------------------------------------------
def note(seen, name, module, args):
    seen.setdefault(name, args[0].detach().clone())


def inputs_of(network, named):
    """-> {module: its first input}, to be filled while the network runs: embeddings, convolutions, those `named`."""
    kinds, seen = (torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d), {}
    for name, module in network.named_modules():
        name = name.removeprefix("vla.").replace(".base_layer", "")
        if "lora_" not in name and (isinstance(module, kinds) or name in named):
            module.register_forward_pre_hook(partial(note, seen, name))
    return seen


def test_7_training_and_prediction_see_the_same(recipe, tmp_path):
    """The sample of step 2, and its observation as evaluate.py reads it, both with the weights of step 1."""
    alone, watch = dict(batch=1, accumulation=1, **recipe.still), Watch(eyes=recipe.eyes)
    train(recipe, tmp_path, **alone, steps=1)
    policy = recipe.script.load_policy(recipe.newest(tmp_path))
    train(recipe, tmp_path, watch, **alone, steps=2, resume="auto")
    name, frame = recipe.place(*watch.steps[0].batches[0].names[0][-2:], watch.run.cfg)
    episode = next(iter(policy.open_episodes(recipe.data(), [name])))
    observations = [episode["sample"](t) for t in range(len(episode["target"]))]
    chosen = next(o for t, o in enumerate(observations) if o.get("name", (name, t))[-1] == frame)
    seen = inputs_of(policy.vla if hasattr(policy, "vla") else policy.model, recipe.eyes)
    policy.predict([chosen])
    assert seen and set(seen) <= set(watch.seen)
    for where, theirs in seen.items():
        ours = watch.seen[where]
        if not theirs.is_floating_point():  # in training the answer follows
            ours = ours[..., : theirs.shape[-1]]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6, msg=lambda m, where=where: f"{where}: {m}")


# ---- 8: padding, instruction -----------------------------------------------------------------------------------------
def test_8_a_prediction_depends_on_its_instruction_alone_not_on_its_batch(recipe, whole):
    policy = recipe.script.load_policy(recipe.newest(whole[0]))
    first = looks(recipe, policy)[0]
    texts = ("Go left", "Insert the needle into the red point on the right and hold it there")
    observations = [recipe.instructed(policy, first, text) for text in texts]
    together, alone = ask(policy, observations), ask(policy, *([o] for o in observations))
    np.testing.assert_allclose(together, alone, atol=1e-4 * np.abs(alone).max())
    other = [recipe.instructed(policy, first, texts[1])]
    assert np.abs(ask(policy, other) - alone[:1]).max() > 1e-4 * np.abs(alone).max()


# ---- 9: precision and what is trained --------------------------------------------------------------------------------
def test_9_only_what_is_trained_is_kept_and_in_fp32(recipe, whole):
    out, seen = whole
    trained, last = seen.trained(), seen.steps[-1]
    assert all(p.dtype == torch.float32 for p in trained.values())
    stepped = sum((group["params"] for group in seen.optimizer.param_groups), [])
    assert set(map(id, stepped)) == set(map(id, trained.values()))
    assert last.moments.keys() == trained.keys()
    assert all(t.dtype == torch.float32 for moments in last.moments.values() for t in moments.values())
    kept = recipe.tensors(recipe.newest(out))
    assert set(trained) <= set(kept)
    assert recipe.whole or set(kept) <= set(trained) | {name for name, _ in seen.core.named_buffers()}


# ---- 10: what is not finite ------------------------------------------------------------------------------------------
def test_10_a_step_that_is_not_finite_is_skipped_counted_and_named(recipe, tmp_path, capfd):
    seen = train(recipe, tmp_path, watch=Watch(spoil={3: "loss", 5: "gradient"}))
    steps = seen.steps
    assert [step.finite for step in steps] == [True, True, False, True, False, True, True, True]
    for bad in (2, 4):
        same(steps[bad].weights, steps[bad - 1].weights)
        for name in steps[bad].moments:
            same(steps[bad].moments[name], steps[bad - 1].moments[name])
    assert all(torch.isfinite(t).all() for t in steps[-1].weights.values())
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("NON-FINITE")]
    assert len(lines) == 2 and "every loss is finite" in lines[1]
    for name in steps[2].batches[1].names:
        assert f"{name[-2]} frame {name[-1]}" in lines[0]
    assert not any(f"{name[-2]} frame {name[-1]}" in lines[0] for name in steps[2].batches[0].names)
    assert seen.run.skipped == 2
