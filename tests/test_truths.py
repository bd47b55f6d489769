"""What every training script keeps (DESIGN's ten truths), once for all of them, on the tiny runs of recipes.py.

Left to a script's own test file, where the pieces would be longer than the test: causality (6) of sessions.
"""

import multiprocessing
import os
import socket
import sys

import pytest
import torch

from common import UserError
from recipes import RECIPES, Watch


@pytest.fixture(scope="session", params=RECIPES)
def recipe(request, tmp_path_factory):
    """A recipe with its data and backbone on disk."""
    recipe = RECIPES[request.param]
    recipe.written = recipe.write(data_folder(tmp_path_factory))
    return recipe


def data_folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "truths"


@pytest.fixture(scope="session")
def whole(recipe, tmp_path_factory):
    """A run that was never stopped: (folder, what was seen)."""
    out = tmp_path_factory.mktemp("whole")
    return out, recipe.train(out)


def same(a, b):
    """Bitwise equal tensors under equal names."""
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, f"{len(different)} of {len(a)} differ, e.g. {different[0]}"


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
        runs.append(recipe.train(tmp_path / str(batch), **sizes, **recipe.still).steps)
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
    other = recipe.train(tmp_path, batch=4, accumulation=1)
    assert rates == [step.lr for step in other.steps] and len(set(rates)) > 2
    groups = other.optimizer.param_groups
    assert all(group["lr"] == pytest.approx(rates[-1] * group.get("lr_scale", 1)) for group in groups)
    end, later = (lr_at(step, *calls[-1][1:]) for step in (10**4, 10**6))
    assert 0 <= end == later <= min(rates)


# ---- 3: ranks --------------------------------------------------------------------------------------------------------


def one_of_two(name, written, out, rank, port):
    """The body of a process: the run of `whole`, a micro-batch per rank."""
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    recipe = RECIPES[name]
    recipe.written = written
    seen = recipe.train(out, accumulation=1)
    torch.save([vars(step) for step in seen.steps], out / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ranks(recipe, tmp_path_factory):
    """What the two processes of a run saw: [steps of rank 0, of rank 1]."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    name = next(name for name, r in RECIPES.items() if r is recipe)
    processes = []
    for rank in range(2):
        processes.append(context.Process(target=one_of_two, args=(name, recipe.written, out, rank, port)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [torch.load(out / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_3_two_processes_train_as_one(whole, ranks):
    """A rank gets one of the micro-batches of a process alone: its own samples, its own noise and dropout."""
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
    one = recipe.train(tmp_path, watch=Watch(stop_at=5), workers=workers)
    assert [step.number for step in one.steps] == [1, 2, 3, 4, 5]
    two = recipe.train(tmp_path, workers=workers, resume="auto")
    assert [step.number for step in two.steps] == [6, 7, 8]
    for a, b in zip(whole[1].steps, one.steps + two.steps, strict=True):
        assert (a.loss, a.grad_norm, a.lr, a.batches) == (b.loss, b.grad_norm, b.lr, b.batches)
        same(a.weights, b.weights)
        assert a.moments.keys() == b.moments.keys()
        for name in a.moments:
            same(a.moments[name], b.moments[name])
    same(recipe.tensors(recipe.newest(tmp_path)), recipe.tensors(recipe.newest(whole[0])))


# ---- 9: precision and what is trained --------------------------------------------------------------------------------


def test_9_only_what_is_trained_is_kept_and_in_fp32(recipe, whole):
    out, seen = whole
    trained, last = seen.trained(), seen.steps[-1]
    assert all(p.dtype == torch.float32 for p in trained.values())
    assert {id(p) for group in seen.optimizer.param_groups for p in group["params"]} == {
        id(p) for p in trained.values()
    }
    assert last.moments.keys() == trained.keys()
    assert all(t.dtype == torch.float32 for moments in last.moments.values() for t in moments.values())
    kept = recipe.tensors(recipe.newest(out))
    assert set(trained) <= set(kept) <= set(trained) | {name for name, _ in seen.core.named_buffers()}


# ---- 10: what is not finite ------------------------------------------------------------------------------------------


def test_10_a_step_that_is_not_finite_is_skipped_counted_and_named(recipe, tmp_path, capfd):
    seen = recipe.train(tmp_path, watch=Watch(spoil={3: "loss", 5: "gradient"}))
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


def test_10_after_ten_in_a_row_it_ends(recipe, tmp_path):
    watch = Watch(spoil={step: "loss" for step in range(1, 13)})
    with pytest.raises(UserError, match="10 steps in a row"):
        recipe.train(tmp_path, watch=watch, steps=12)
    same(watch.before, watch.steps[-1].weights)
