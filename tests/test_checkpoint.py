"""Checkpoints under attack: exceptions, full disks, kill -9 at every system call, pickles."""

import errno
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import socket
import time
import types
import warnings
from collections import defaultdict, namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from common import checkpoint as ckpt
from common import UserError, hub, qwen_vl
from common.checkpoint import DiskFull, atomic_path, checkpoints_in, load_state, save_state


def tree(folder):
    """{relative path: content} of everything below `folder`."""
    found = sorted(Path(folder).rglob("*"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None for p in found}


def write_pair(folder, number):
    """A checkpoint folder of two files that must always belong together."""
    folder.mkdir()
    save_state(folder / "state.pt", {"number": number, "tensor": torch.full((50,), float(number))})
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(str(number))


def save_pair(path, number):
    with atomic_path(path) as temporary:
        write_pair(temporary, number)


def steps(folder):
    return [ckpt.step_of(path) for path in checkpoints_in(folder)]


def read_pair(folder):
    state, number = load_state(folder / "state.pt"), int((folder / "model" / "config.json").read_text())
    assert state["number"] == number and (state["tensor"] == number).all()
    return number


# ---- atomic replacement ----------------------------------------------------------------------------------------------
class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("old", [None, "file", "folder"])
def test_an_exception_in_the_middle_leaves_the_old(tmp_path, error, old):
    final = tmp_path / "x"
    if old == "file":
        final.write_text("old")
    if old == "folder":
        write_pair(final, 1)
    before = tree(tmp_path)
    with pytest.raises(error), atomic_path(final) as temporary:
        write_pair(temporary, 2)
        raise error()
    assert tree(tmp_path) == before


def test_an_error_between_the_two_renames_of_a_folder_leaves_the_old(tmp_path, monkeypatch):
    """The old folder is already aside when the new one cannot be put in its place."""
    save_pair(tmp_path / "steps_1", 1)
    before, real, calls = tree(tmp_path), os.replace, []

    def replace(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output"):
        save_pair(tmp_path / "steps_1", 2)
    assert tree(tmp_path) == before


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    """fsync of every file and folder, the rename, fsync of the parent: else a power cut leaves an empty file."""
    events, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_path(tmp_path / "d") as temporary:
        write_pair(temporary, 1)
    at = events.index("rename")
    assert sorted(events[:at]) == sorted([temporary.name, "state.pt", "model", "config.json"])
    assert events[at + 1 :] == [tmp_path.name]


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    """safetensors makes files of mode 0600, which colleagues on the same disk cannot open."""
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "model") as temporary:
            temporary.mkdir()
            (temporary / "a").touch(mode=0o600)
        with atomic_path(tmp_path / "b") as temporary:
            temporary.touch(mode=0o600)
        assert os.umask(0o027) == 0o027, "the mask itself is left alone"
    finally:
        os.umask(before)
    assert [oct(p.stat().st_mode & 0o777) for p in (tmp_path / "model" / "a", tmp_path / "b")] == ["0o640"] * 2


def test_a_disk_that_knows_no_modes_and_flushes_no_folder(tmp_path, monkeypatch):
    def fsync(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "chmod", mock.Mock(side_effect=PermissionError(errno.EPERM, "Operation not permitted")))
    save_pair(tmp_path / "steps_1", 1)
    assert read_pair(tmp_path / "steps_1") == 1


FULL = [  # also as safetensors and torch.save tell it; the last one whatever its cause is
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
    RuntimeError("Error while serializing: I/O error: Stale file handle (os error 116)"),
]


@pytest.mark.parametrize("error", FULL)
def test_a_full_disk_keeps_the_old_and_says_so(tmp_path, error):
    save_state(tmp_path / "last.pt", {"number": 1})
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


def test_room_is_checked_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3 * 10**9))
    ckpt.require_space(tmp_path, 3 * 10**9)
    with pytest.raises(DiskFull, match=r"needs 17.00 GB, 3.00 GB are free.*Free space and resume"):
        ckpt.require_space(tmp_path, 17 * 10**9)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------
def check_after_kill(folder):
    """What has a name without .tmp- is complete, and no older than before; cleaning leaves nothing temporary."""
    found = checkpoints_in(folder)
    assert [read_pair(path) for path in found] == steps(folder)
    ckpt.remove_temporaries(folder)
    assert not list(folder.glob(".tmp-*"))
    assert read_pair(folder / "best") >= 2, "also in the moment between two renames"
    return read_pair(found[-1])


def save_a_round(folder, point):
    """One round of a run, in a process of its own that dies before (even `point`) or after a call of the system."""
    calls = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            for act in (lambda: None, lambda: function(*args, **kwargs)):
                result = act()
                if next(calls) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("fsync", "replace", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    for name in ("steps_3", "best"):
        save_pair(folder / name, 3)
    ckpt.rotate(folder, "steps_{step}", 2)


def test_kill_at_every_step_of_a_save(tmp_path):
    """SIGKILL before and after each fsync, rename and deletion of one round: all moments at which a save can die."""
    point, code = 0, -signal.SIGKILL
    while code:
        folder = tmp_path / str(point)
        for name, number in (("steps_1", 1), ("steps_2", 2), ("best", 2)):
            save_pair(folder / name, number)
        child = multiprocessing.get_context("fork").Process(target=save_a_round, args=(folder, point))
        child.start()
        child.join()
        code = child.exitcode
        assert code in (0, -signal.SIGKILL)
        newest = check_after_kill(folder)
        assert newest == 3 or (newest == 2 and code)
        point += 1
    assert point > 15, "the calls were counted"


# ---- housekeeping ----------------------------------------------------------------------------------------------------
def test_checkpoints_in_order_of_number(tmp_path):
    for name in ("steps_5", "steps_20", "steps_100", ".tmp-1@x~steps_7", "other"):
        (tmp_path / name).mkdir()
    assert steps(tmp_path) == [5, 20, 100] and checkpoints_in(tmp_path / "nowhere") == []
    save_state(tmp_path / "last.pt", dict(step=50))
    found = checkpoints_in(tmp_path, ("steps_*", "last.pt"))
    assert [path.name for path in found] == ["steps_5", "steps_20", "last.pt", "steps_100"]


@pytest.mark.parametrize("keep, left", [(2, [20, 100]), (0, [5, 9, 20, 100]), (9, [5, 9, 20, 100])])
def test_rotate(tmp_path, keep, left):
    for step in (100, 5, 20, 9):
        (tmp_path / f"steps_{step}" / "model").mkdir(parents=True)
    theirs = [tmp_path / name for name in ("loss.png", "steps_5_keep", "steps_notes.txt")]
    for path in theirs:
        path.touch()
    ckpt.rotate(tmp_path, "steps_{step}", keep)
    assert all(path.exists() for path in theirs), "a user's copy and notes are not the run's checkpoints"
    assert sorted(int(path.name[6:]) for path in tmp_path.glob("steps_*") if path.is_dir()) == left


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


def test_tensors_keep_dtype_and_bits(tmp_path):
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(kind): torch.arange(12).reshape(3, 4).to(kind).t() for kind in kinds}
    tensors |= dict(empty=torch.zeros(0, 3), rng=torch.get_rng_state())
    save_state(tmp_path / "s.pt", tensors)
    for name, got in load_state(tmp_path / "s.pt").items():
        torch.testing.assert_close(got, tensors[name], rtol=0, atol=0)


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
        content = {"tensor": torch.zeros(2), "x": Malicious(marker)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="state.pt is refused: .*tensors and plain values only") as error:
        load_state(path)
    assert (form == "pickle" or "posix.system" in str(error.value)) and not marker.exists()
    assert "weights_only" not in str(error.value), "torch's advice to load it nevertheless is not passed on"
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists(), "the weapon was loaded"


def test_a_damaged_file_is_named(tmp_path):
    path, rng = tmp_path / "state.pt", random.Random(0)
    save_state(path, {"t": torch.arange(1000), "s": "x" * 100})
    whole = path.read_bytes()
    damaged = [whole[:cut] for cut in (0, 1, 3, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1)]
    damaged += [rng.randbytes(length) for length in (1, 2, 5, 20, 500) * 4]
    damaged += [whole.replace(bytes([100, 0, 0, 0]), bytes([101, 0, 0, 0]))]  # a bit of a tensor
    damaged += [b"hello\n", b"<html>404</html>", b'["a"]', b"version https://git-lfs.github.com/spec/v1\nsize 12\n"]
    torch.save([1], path)  # whole, of another program
    for content in [path.read_bytes(), *damaged]:
        path.write_bytes(content)
        for read in (load_state, ckpt.read_json):
            with pytest.raises(UserError, match="state.pt"):
                read(path)
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
    config = dict(lr=1e-4, dataset={"horizon": 3}, resume=None, steps=10, train="full", init_from=None)
    saved = dict(fingerprint="abc", config=config)

    def check(changes, fingerprint="abc"):
        return ckpt.check_same_run("runs/steps_5", saved, fingerprint, config | changes, ("train", "dataset.horizon"))

    assert check({}) == [] and check(dict(steps=20, resume="auto")) == ["steps 10 -> 20"]
    assert check(dict(new_key=1)) == [], "a field that was added to a copied script"
    for changes, said in ((dict(train="lora"), "train full -> lora"), (dict(dataset={"horizon": 4}), "horizon 3 -> 4")):
        with pytest.raises(UserError, match=said):
            check(changes)
    with pytest.raises(UserError, match="the training data or its settings changed.* with --init-from runs/steps_5"):
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


def test_only_what_the_files_can_cause_is_called_a_damaged_model():
    filters = list(warnings.filters)
    for error, raised in ((torch.AcceleratorError("CUDA error"), torch.AcceleratorError), (KeyError("x"), UserError)):
        with pytest.raises(raised), hub.opening("model"):
            raise error
    assert warnings.filters == filters, "those of the program"


# ---- training state --------------------------------------------------------------------------------------------------
# (1,) would broadcast
@pytest.mark.parametrize("changes", [dict(bias=None), dict(bias=torch.zeros(1)), dict(gone=torch.zeros(1))])
def test_restoring_other_tensors_is_refused(changes):
    model = nn.Linear(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    trained, moments = ckpt.training_state(model, optimizer)
    trained = {name: tensor for name, tensor in (trained | changes).items() if tensor is not None}
    with pytest.raises(UserError, match=f"1 trained tensors of the checkpoint have another .* e.g. {[*changes][0]}:"):
        ckpt.restore_training_state(model, optimizer, trained, moments)
