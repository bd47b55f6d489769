"""Checkpoints under attack: exceptions, full disks, kill -9 at every system call and at random times, pickles."""

import errno
import os
import pickle
import random
import shutil
import signal
import socket
import time
import types
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common import checkpoint as ckpt
from common import UserError, qwen_vl
from common.checkpoint import DiskFull, atomic_path, checkpoints_in, load_state, save_state


def tree(folder):
    """{relative path: content} of everything below `folder`."""
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(Path(folder).rglob("*"))
    }


def write_pair(folder, number):
    """A checkpoint folder of two files that must always belong together."""
    folder.mkdir()
    save_state(folder / "state.pt", {"number": number, "tensor": torch.full((50,), float(number))})
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(str(number))


def read_pair(folder):
    state, number = load_state(folder / "state.pt"), int((folder / "model" / "config.json").read_text())
    assert state["number"] == number and (state["tensor"] == number).all()
    return number


# ---- atomic replacement ----------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_are_created_and_replaced(tmp_path):
    for number in (1, 2, 3):
        with atomic_path(tmp_path / "deep" / "a.pt") as temporary:
            assert temporary.parent == tmp_path / "deep" and temporary.name.startswith(".tmp-")
            save_state(temporary, {"number": number})
        with atomic_path(str(tmp_path / "deep" / "d")) as temporary:
            write_pair(temporary, number)
        assert load_state(tmp_path / "deep" / "a.pt") == {"number": number}
        assert read_pair(tmp_path / "deep" / "d") == number
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["a.pt", "d"], "nothing temporary stays"


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt, SystemExit, OSError])
@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_an_exception_in_the_middle_leaves_the_old(tmp_path, error, old):
    final = tmp_path / "x"
    if old == "file":
        final.write_text("old")
    elif old == "folder":
        write_pair(final, 1)
    before = tree(tmp_path)
    with pytest.raises(error), atomic_path(final) as temporary:
        if old == "file":
            temporary.write_text("half")
        else:
            write_pair(temporary, 2)
        raise error()
    assert tree(tmp_path) == before


def test_an_error_between_the_two_renames_of_a_folder_leaves_the_old(tmp_path, monkeypatch):
    """The old folder is already aside when the new one cannot be put in its place."""
    with atomic_path(tmp_path / "steps_1") as temporary:
        write_pair(temporary, 1)
    before, real, calls = tree(tmp_path), os.replace, []

    def replace(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"), atomic_path(tmp_path / "steps_1") as temporary:
        write_pair(temporary, 2)
    assert tree(tmp_path) == before


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    """fsync of every file and folder, the rename, fsync of the parent: else a power cut leaves an empty file."""
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b))[1])
    with atomic_path(tmp_path / "d") as temporary:
        write_pair(temporary, 1)
    at = events.index("rename")
    assert sorted(events[:at]) == sorted([temporary.name, "state.pt", "model", "config.json"]) and events[at + 1 :] == [
        tmp_path.name
    ]


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    """safetensors makes files of mode 0600, which colleagues on the same disk cannot open."""
    from safetensors.torch import save_file

    before = os.umask(0o022)
    try:
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            save_file({"w": torch.zeros(2)}, temporary / "model.safetensors")
            (temporary / "config.json").write_text("{}")
        os.umask(0o027)
        with atomic_path(tmp_path / "state.pt") as temporary:
            save_file({"w": torch.zeros(2)}, temporary)
        assert os.umask(0o027) == 0o027, "the mask itself is left alone"
    finally:
        os.umask(before)
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in tmp_path.rglob("*") if p.is_file()} == {
        "model.safetensors": "0o644",
        "config.json": "0o644",
        "state.pt": "0o640",
    }


FULL = [  # also as safetensors and torch.save tell it
    (OSError(errno.ENOSPC, "No space left on device"), 10**9),
    (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**9),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), 10**9),
    (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), 0),
]


@pytest.mark.parametrize("error, free", FULL)
def test_a_full_disk_keeps_the_old_and_says_so(tmp_path, monkeypatch, error, free):
    save_state(tmp_path / "last.pt", {"number": 1})
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
    said = "no room left while writing .*last.pt.*untouched"
    with pytest.raises(DiskFull, match=said), atomic_path(tmp_path / "last.pt") as temporary:
        temporary.write_text("half")
        raise error
    assert load_state(tmp_path / "last.pt") == {"number": 1} and len(tree(tmp_path)) == 1


def test_torch_save_to_a_full_disk(tmp_path, monkeypatch):
    """/dev/full refuses every write; only the free space cannot be had from it."""
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=0))
    with pytest.raises(DiskFull, match="no room left"), atomic_path(tmp_path / "last.pt") as temporary:
        temporary.symlink_to("/dev/full")
        save_state(temporary, {"a": torch.zeros(300_000)})
    assert tree(tmp_path) == {}


def test_another_error_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"), atomic_path(tmp_path / "last.pt"):
        raise RuntimeError("shape mismatch")


def test_room_is_checked_before_writing(tmp_path, monkeypatch):
    ckpt.require_space(tmp_path, 1)
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3 * 10**9))
    ckpt.require_space(tmp_path, 3 * 10**9)
    with pytest.raises(DiskFull, match=r"needs 17.00 GB, 3.00 GB are free.*Free space and resume"):
        ckpt.require_space(tmp_path, 17 * 10**9)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def check_after_kill(folder, acknowledged):
    """The newest checkpoint loads and is no older than the last one reported; cleaning leaves nothing temporary."""
    for path in checkpoints_in(folder):
        assert read_pair(path) == ckpt.step_of(path), "a name without .tmp- is a complete checkpoint"
    ckpt.remove_temporaries(folder)
    assert not list(folder.glob(".tmp-*"))
    assert read_pair(folder / "best") >= acknowledged, "also in the moment between two renames"
    newest = checkpoints_in(folder)[-1]
    assert ckpt.step_of(newest) >= acknowledged
    return read_pair(newest)


def killed_child(body):
    """Fork, run `body(report)` in the child until it dies -> (read end of the report pipe, pid)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            body(write)
        finally:
            os._exit(3)
    os.close(write)
    return read, pid


def test_kill_at_every_step_of_a_save(tmp_path):
    """SIGKILL before and after each fsync, rename and deletion of one round: all moments at which a save can die."""
    point, died = 0, True
    while died:
        folder = tmp_path / str(point)
        for number in (1, 2):
            with atomic_path(folder / f"steps_{number}") as temporary:
                write_pair(temporary, number)
        with atomic_path(folder / "best") as temporary:
            write_pair(temporary, 2)

        def body(report, point=point, folder=folder):
            calls = 0

            def die_here():
                nonlocal calls
                calls += 1
                if calls == point + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            def counted(function):
                def call(*args, **kwargs):
                    die_here()
                    try:
                        return function(*args, **kwargs)
                    finally:
                        die_here()

                return call

            for name in ("fsync", "replace", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            for name in ("steps_3", "best"):
                with atomic_path(folder / name) as temporary:
                    write_pair(temporary, 3)
            ckpt.rotate(folder, "steps_{step}", 2)
            os._exit(0)

        # an even point dies before call number point/2, an odd one after it
        read, pid = killed_child(body)
        os.close(read)
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        newest = check_after_kill(folder, 2)
        assert died or newest == 3
        point += 1
    assert point > 15, "the calls were counted"


# ---- housekeeping ----------------------------------------------------------------------------------------------------


def steps(folder):
    return [ckpt.step_of(path) for path in checkpoints_in(folder)]


def test_checkpoints_in_order_of_number(tmp_path):
    for name in ("steps_5", "steps_20", "steps_100", ".tmp-1@x~steps_7", "other"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [5, 20, 100] and checkpoints_in(tmp_path / "nowhere") == []
    save_state(tmp_path / "last.pt", dict(step=50))
    found = checkpoints_in(tmp_path, ("steps_*", "last.pt"))
    assert [path.name for path in found] == ["steps_5", "steps_20", "last.pt", "steps_100"]


@pytest.mark.parametrize("keep, left", [(2, [20, 100]), (0, [5, 9, 20, 100]), (1, [100]), (9, [5, 9, 20, 100])])
def test_rotate(tmp_path, keep, left):
    for step in (100, 5, 20, 9):
        (tmp_path / f"steps_{step}" / "model").mkdir(parents=True)
    theirs = [tmp_path / name for name in ("loss.png", "steps_5_keep", "steps_notes.txt")]
    for path in theirs:
        path.touch()
    ckpt.rotate(tmp_path, "steps_{step}", keep)
    assert all(path.exists() for path in theirs), "a user's copy and notes are not the run's checkpoints"
    theirs[1].unlink()
    theirs[2].unlink()
    assert steps(tmp_path) == left


def test_a_write_that_fails_for_another_reason_than_a_full_disk_is_a_failed_save_too(tmp_path):
    """torch.save of a quota or a lost disk: RuntimeError; the training can go on."""
    said = "[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"
    with pytest.raises(OSError, match="unexpected pos 704"), atomic_path(tmp_path / "state.pt"):
        raise RuntimeError(said)


def test_a_rotation_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Deleting a folder takes many calls; the name must go first."""
    for step in (1, 2):
        write_pair(tmp_path / f"steps_{step}", step)

    def dies_half_way(path, **options):
        (Path(path) / "state.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ckpt.shutil, "rmtree", dies_half_way)
        ckpt.rotate(tmp_path, "steps_{step}", 1)
    assert steps(tmp_path) == [2]
    ckpt.remove_temporaries(tmp_path)
    assert list(tree(tmp_path)) == ["steps_2", "steps_2/model", "steps_2/model/config.json", "steps_2/state.pt"]


def test_cleaning_puts_back_what_has_no_successor_and_spares_the_living(tmp_path):
    dead, day = f"{2**22 + 1}@{socket.gethostname()}", 86400
    write_pair(tmp_path / f".tmp-{dead}~old~best", 1)
    write_pair(tmp_path / f".tmp-{dead}~best", 2)
    for name, age in (("1@another~a", 0), ("1@another~b", 2 * day), (f"{os.getppid()}@{socket.gethostname()}~c", day)):
        (tmp_path / f".tmp-{name}").write_text("half")
        os.utime(tmp_path / f".tmp-{name}", (time.time() - age,) * 2)
    ckpt.remove_temporaries(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"best", ".tmp-1@another~a", f".tmp-{os.getppid()}@{socket.gethostname()}~c"}
    assert read_pair(tmp_path / "best") == 1
    ckpt.remove_temporaries(tmp_path / "nowhere")


# ---- what may be stored ----------------------------------------------------------------------------------------------

TEXT, KEYS = st.text(st.characters(exclude_categories=["Cs"])), st.text(max_size=4) | st.integers()
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT


def nested(inner):
    return st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3)


@given(st.recursive(PLAIN, nested, max_leaves=8))
def test_whatever_is_accepted_is_read_back_equal(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("plain") / "s.pt"
    save_state(path, {"state": state})
    got = load_state(path)["state"]
    assert got == state and type(got) is type(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_tensors_keep_dtype_and_bits(tmp_path, dtype):
    tensor = torch.arange(12).reshape(3, 4).to(dtype).t()
    save_state(tmp_path / "s.pt", {"t": tensor, "empty": torch.zeros(0, 3), "rng": torch.get_rng_state()})
    got = load_state(tmp_path / "s.pt")
    assert got["t"].dtype == dtype and torch.equal(got["t"], tensor) and got["empty"].shape == (0, 3)
    assert torch.equal(got["rng"], torch.get_rng_state())


Point = namedtuple("Point", "x y")
REFUSED = [np.float64(1), np.arange(3), np.int64(3), Path("x"), {1, 2}, Boom(), len]
REFUSED += [torch.device("cpu"), torch.float32, b"", Point(1, 2), torch.zeros(2).size(), defaultdict(list)]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_anything_else_is_refused_before_writing(tmp_path, value):
    with pytest.raises(TypeError, match=r"state.a\[1\].b is a \w+; only tensors and plain values"):
        save_state(tmp_path / "s.pt", {"a": [1, {"b": value}]})
    assert not (tmp_path / "s.pt").exists()
    with pytest.raises(TypeError, match=r"state.a has a key 1.5 of type float"):
        save_state(tmp_path / "s.pt", {"a": {1.5: 1}})


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path, form):
    marker, path = tmp_path / "was_here", tmp_path / "state.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"tensor": Malicious(marker)}))
    else:
        torch.save(
            {"tensor": torch.zeros(2), "x": Malicious(marker)}, path, _use_new_zipfile_serialization=form == "zip"
        )
    with pytest.raises(UserError, match="state.pt is refused: .*tensors and plain values only") as error:
        load_state(path)
    assert form == "pickle" or "posix.system" in str(error.value)
    assert not marker.exists() and "weights_only" not in str(error.value), (
        "torch's advice to load it nevertheless is not passed on"
    )
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "the weapon was loaded"


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "state.pt"
    save_state(path, {"t": torch.arange(1000), "s": "x" * 100})
    whole = path.read_bytes()
    for cut in [0, 1, 3, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="state.pt"):
            load_state(path)
    rng = random.Random(0)
    for length in (1, 2, 5, 20, 500) * 4:
        path.write_bytes(rng.randbytes(length))
        with pytest.raises(UserError, match="state.pt"):
            load_state(path)
    for text in (
        "hello\n",
        "<html>404</html>",
        '{"a": 1}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ):
        path.write_text(text)
        with pytest.raises(UserError, match="state.pt"):
            load_state(path)
    with pytest.raises(UserError, match="nowhere.pt: no such checkpoint"):
        load_state(tmp_path / "nowhere.pt")


# ---- one timeline ----------------------------------------------------------------------------------------------------


def find(wanted, folder):
    return ckpt.find_checkpoint(wanted, folder, ("steps_*",), ("best",))


def test_find_checkpoint(tmp_path):
    assert find(None, tmp_path) is None and find("auto", tmp_path) is None and find("auto", tmp_path / "no") is None
    (tmp_path / "metrics.jsonl").touch()
    assert find(None, tmp_path) is None, "a folder without a checkpoint is no obstacle"
    (tmp_path / "best").mkdir()
    for wanted in (None, "auto"):
        with pytest.raises(UserError, match="best already exists. It holds weights without an optimizer"):
            find(wanted, tmp_path)
    for step in (100, 20):
        write_pair(tmp_path / f"steps_{step}", step)
    write_pair(tmp_path / ".tmp-1@x~steps_300", 300)
    assert find("auto", tmp_path) == tmp_path / "steps_100"
    assert find(str(tmp_path / "steps_20"), tmp_path) == tmp_path / "steps_20"
    with pytest.raises(UserError, match="steps_100 already exists. Go on with --resume auto"):
        find(None, tmp_path)
    for wrong, said in (("steps_7", "no such checkpoint"), ("best", "can be resumed"), ("steps_20/model", "resumed")):
        with pytest.raises(UserError, match=f"{said}.*steps_20, steps_100"):
            find(str(tmp_path / wrong), tmp_path)
    (tmp_path / "other").mkdir()
    write_pair(tmp_path / "other" / "steps_3", 3)
    with pytest.raises(UserError, match="of another run"):
        find(str(tmp_path / "other" / "steps_3"), tmp_path)


def test_what_comes_after_the_resumed_step_is_set_aside(tmp_path):
    for step in (2, 4, 6):
        write_pair(tmp_path / f"steps_{step}", step)
    save_state(tmp_path / "best.pt", dict(step=6))
    (tmp_path / "final_hf").mkdir()
    moved = ckpt.set_aside(tmp_path, ("steps_*", "best.pt", "final_hf"), 4)
    assert [path.relative_to(tmp_path).as_posix() for path in moved] == ["set_aside_1/steps_6", "set_aside_1/best.pt"]
    assert steps(tmp_path) == [2, 4] and read_pair(moved[0]) == 6 and (tmp_path / "final_hf").is_dir()
    assert ckpt.set_aside(tmp_path, ("steps_*",), 4) == []
    write_pair(tmp_path / "steps_6", 6)
    assert ckpt.set_aside(tmp_path, ("steps_*",), 4)[0].parent.name == "set_aside_2"
    shutil.rmtree(tmp_path / "set_aside_1")  # to make room
    write_pair(tmp_path / "steps_6", 6)
    write_pair(tmp_path / "steps_8", 8)
    moved = ckpt.set_aside(tmp_path, ("steps_*",), 4)
    assert [path.parent.name for path in moved] == ["set_aside_1"] * 2 and (tmp_path / "set_aside_2/steps_6").is_dir()


def test_a_resume_that_would_silently_be_another_run_is_refused():
    config = dict(lr=1e-4, dataset={"horizon": 3}, resume=None, steps=10, train="full")
    saved = dict(fingerprint="abc", config=config)

    def check(changes, fingerprint="abc"):
        return ckpt.check_same_run("runs/steps_5", saved, fingerprint, config | changes, ("train", "dataset.horizon"))

    assert check({}) == [] and check(dict(steps=20, resume="auto")) == ["steps 10 -> 20"]
    assert check(dict(new_key=1)) == [], "a field that was added to a copied script"
    for changes, said in ((dict(train="lora"), "train full -> lora"), (dict(dataset={"horizon": 4}), "horizon 3 -> 4")):
        with pytest.raises(UserError, match=said):
            check(changes)
    with pytest.raises(UserError, match="the training data or its settings changed"):
        check({}, "xyz")


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_that_is_filled_on_its_device_is_the_one_of_from_pretrained(qwen_dir):
    """Weights, rotary tables, tied embeddings."""
    from transformers import Qwen2_5_VLForConditionalGeneration as Model

    whole = Model.from_pretrained(qwen_dir, dtype=torch.bfloat16, attn_implementation="sdpa")
    empty = qwen_vl.load_backbone(qwen_dir, torch.bfloat16, "sdpa", device=None)
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
    filled = qwen_vl.load_backbone(qwen_dir, torch.bfloat16, "sdpa")
    assert filled.lm_head.weight is filled.get_input_embeddings().weight
    for kind in ("named_parameters", "named_buffers"):
        a, b = (dict(getattr(model, kind)()) for model in (whole, filled))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_copy_on_the_host_is_one_and_tied_tensors_stay_one():
    weight = torch.nn.Parameter(torch.ones(3))
    state = dict(a=weight, b=[weight.detach(), (weight[:2], 1.5)], c=dict(text="x", none=None))
    copied = ckpt.on_host(state, copy=True)
    with torch.no_grad():
        weight.add_(1)
    assert copied["a"].tolist() == [1, 1, 1] and copied["a"] is copied["b"][0] and type(copied["a"]) is torch.Tensor
    assert copied["b"][1][0].tolist() == [1, 1] and copied["b"][1][1] == 1.5 and copied["c"] == state["c"]


# ---- training state --------------------------------------------------------------------------------------------------


def make_training(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    )
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1
    )
    return model, optimizer


def train_steps(model, optimizer, first, last):
    for step in range(first, last):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("stop", [0, 1, 7])
def test_resume_is_bitwise(tmp_path, stop):
    """Stopped after any update, saved, loaded into a model with other weights and moments: the same to the bit."""
    model, optimizer = make_training(0)
    train_steps(model, optimizer, 0, stop)
    trained, moments = ckpt.training_state(model, optimizer)
    assert set(trained) == {"0.weight", "0.bias", "4.weight", "4.bias"} and set(moments) == (
        set(trained) if stop else set()
    ), "what is frozen is not in the checkpoint"
    save_state(tmp_path / "state.pt", dict(trained=trained, moments=moments))
    train_steps(model, optimizer, stop, 15)

    other, other_optimizer = make_training(1)
    train_steps(other, other_optimizer, 100, 103)  # it has its own moments, which must go
    other[2].load_state_dict(model[2].state_dict())
    ckpt.restore_training_state(other, other_optimizer, **load_state(tmp_path / "state.pt"))
    train_steps(other, other_optimizer, stop, 15)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a) and float(b["step"]) == 15


@pytest.mark.parametrize(
    "bias", [None, torch.zeros(1)], ids=["missing", "another shape"]
)  # (1,) would broadcast silently into (8,)
def test_restoring_other_tensors_is_refused(bias):
    model, optimizer = make_training(0)
    trained, moments = ckpt.training_state(model, optimizer)
    del trained["0.bias"]
    if bias is not None:
        trained["0.bias"] = bias
    with pytest.raises(UserError, match="lacks 1 trained tensors or has them in another shape, e.g. 0.bias"):
        ckpt.restore_training_state(model, optimizer, trained, moments)
