"""Checkpoints under attack: exceptions, full disks, kill -9 at every system call and at random times, foreign pickles."""

import errno
import os
import pickle
import random
import signal
import subprocess
import sys
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
from common.checkpoint import DiskFull, atomic_path, load_state, save_state, steps_in


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
        assert (
            load_state(tmp_path / "deep" / "a.pt") == {"number": number}
            and read_pair(tmp_path / "deep" / "d") == number
        )
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
    with pytest.raises(error):
        with atomic_path(final) as temporary:
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
    with pytest.raises(OSError, match="Input/output"):
        with atomic_path(tmp_path / "steps_1") as temporary:
            write_pair(temporary, 2)
    assert tree(tmp_path) == before


def test_everything_is_on_disk_before_the_rename(tmp_path, monkeypatch):
    """fsync of every file and folder, then the rename, then fsync of the parent; otherwise a power cut leaves an empty file under the final name."""
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


@pytest.mark.parametrize(
    "error,free",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**9),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 10**9),
        (
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            10**9,
        ),  # what safetensors makes of it (and it deletes the file at once)
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"), 0),
    ],
)  # what torch.save makes of it
def test_a_full_disk_keeps_the_old_and_says_so(tmp_path, monkeypatch, error, free):
    save_state(tmp_path / "last.pt", {"number": 1})
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=free))
    with pytest.raises(DiskFull, match="no room left while writing .*last.pt.*untouched. Free space and resume"):
        with atomic_path(tmp_path / "last.pt") as temporary:
            temporary.write_text("half")
            raise error
    assert load_state(tmp_path / "last.pt") == {"number": 1} and len(tree(tmp_path)) == 1


def test_torch_save_to_a_full_disk(tmp_path, monkeypatch):
    """/dev/full refuses every write; only the free space cannot be had from it."""
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=0))
    with pytest.raises(DiskFull, match="no room left"):
        with atomic_path(tmp_path / "last.pt") as temporary:
            temporary.symlink_to("/dev/full")
            save_state(temporary, {"a": torch.zeros(300_000)})
    assert tree(tmp_path) == {}


def test_another_error_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="shape"):
        with atomic_path(tmp_path / "last.pt"):
            raise RuntimeError("shape mismatch")


def test_room_is_checked_before_writing(tmp_path, monkeypatch):
    ckpt.require_space(tmp_path, 1)
    monkeypatch.setattr(ckpt.shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=3 * 10**9))
    ckpt.require_space(tmp_path, 3 * 10**9)
    with pytest.raises(DiskFull, match=r"needs 17.00 GB, 3.00 GB are free.*Free space and resume"):
        ckpt.require_space(tmp_path, 17 * 10**9)


# ---- kill -9 ---------------------------------------------------------------------------------------------------------


def save_forever(folder, report, keep=2):
    """What a training does: a numbered folder with rotation, and one folder that is replaced; reports each number once it is in place."""
    for number in range(1, 10**6):
        for name in (f"steps_{number}", "best"):
            with atomic_path(folder / name) as temporary:
                write_pair(temporary, number)
        ckpt.rotate(folder, keep)
        os.write(report, number.to_bytes(4, "little"))


def check_after_kill(folder, acknowledged):
    """The newest checkpoint loads and is not older than the last one reported; after the repair nothing temporary is left."""
    ckpt.find_resume("auto", folder)  # finds a checkpoint also in the moment between two renames
    assert (folder / "best").is_dir()
    for path in steps_in(folder).values():
        assert read_pair(path) == int(path.name.removeprefix("steps_")), "a name without .tmp- is a complete checkpoint"
    ckpt.remove_temporaries(folder)
    assert not list(folder.glob(".tmp-*"))
    assert read_pair(folder / "best") >= acknowledged
    newest = list(steps_in(folder))[-1]
    assert newest >= acknowledged and read_pair(folder / f"steps_{newest}") == newest
    return newest


def killed_child(body):
    """Fork, run `body(report)` in the child until it dies by SIGKILL -> (read end of the report pipe, pid). The child never returns into pytest."""
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


def last_report(read):
    content = b""
    while part := os.read(read, 65536):
        content += part
    os.close(read)
    return int.from_bytes(content[-4:], "little")


@pytest.mark.parametrize("seed", range(4))
def test_kill_at_a_random_time(tmp_path, seed):
    for name in ("steps_0", "best"):
        with atomic_path(tmp_path / name) as temporary:
            write_pair(temporary, 0)
    read, pid = killed_child(lambda report: save_forever(tmp_path, report))
    time.sleep(random.Random(seed).uniform(0.02, 0.2))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    check_after_kill(tmp_path, last_report(read))


def test_kill_at_every_step_of_a_save(tmp_path):
    """SIGKILL before and after each fsync, rename and deletion of one round: a complete list of the moments at which a save can die."""
    point, died = 0, True
    while died:
        folder = tmp_path / str(point)
        for number in (1, 2):
            with atomic_path(folder / f"steps_{number}") as temporary:
                write_pair(temporary, number)
        with atomic_path(folder / "best") as temporary:
            write_pair(temporary, 2)

        def body(report):
            calls = 0

            def counted(function):
                def call(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == 2 * point + 1:
                        os.kill(os.getpid(), signal.SIGKILL)
                    result = function(*args, **kwargs)
                    calls += 1
                    if calls == 2 * point + 2:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return result

                return call

            for name in ("fsync", "replace", "unlink", "rmdir"):
                setattr(os, name, counted(getattr(os, name)))
            for name in ("steps_3", "best"):
                with atomic_path(folder / name) as temporary:
                    write_pair(temporary, 3)
            ckpt.rotate(folder, 2)
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


def test_steps_in_order_of_number(tmp_path):
    for name in ("steps_5", "steps_20", "steps_100", ".tmp-1-steps_7", "steps_x", "steps_3.bak", "other"):
        (tmp_path / name).mkdir()
    assert list(steps_in(tmp_path)) == [5, 20, 100] and steps_in(tmp_path)[20] == tmp_path / "steps_20"
    (tmp_path / "checkpoint_step_4.pt").touch()
    assert list(steps_in(tmp_path, r"checkpoint_step_(\d+)\.pt")) == [4] and steps_in(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "keep,protect,left",
    [
        (2, None, [20, 100]),
        (2, 5, [5, 20, 100]),
        (2, 100, [20, 100]),
        (0, None, [5, 9, 20, 100]),
        (1, 9, [9, 100]),
        (9, None, [5, 9, 20, 100]),
    ],
)
def test_rotate(tmp_path, keep, protect, left):
    for step in (100, 5, 20, 9):
        (tmp_path / f"steps_{step}" / "model").mkdir(parents=True)
    (tmp_path / "loss.png").touch()
    ckpt.rotate(tmp_path, keep, protect)
    assert list(steps_in(tmp_path)) == left and (tmp_path / "loss.png").exists()


def test_a_rotation_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Deleting a folder takes many calls; the name must go first."""
    for step in (1, 2):
        write_pair(tmp_path / f"steps_{step}", step)

    def dies_half_way(path, **options):
        (Path(path) / "state.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ckpt.shutil, "rmtree", dies_half_way)
        ckpt.rotate(tmp_path, 1)
    assert list(steps_in(tmp_path)) == [2]
    ckpt.remove_temporaries(tmp_path)
    assert list(tree(tmp_path)) == ["steps_2", "steps_2/model", "steps_2/model/config.json", "steps_2/state.pt"]


def test_remove_temporaries_puts_back_what_has_no_successor(tmp_path):
    write_pair(tmp_path / ".tmp-77-old-best", 1)
    write_pair(tmp_path / ".tmp-77-best", 2)
    write_pair(tmp_path / "steps_3", 3)
    write_pair(tmp_path / ".tmp-5-old-steps_3", 2)
    (tmp_path / ".tmp-9-last.pt").write_text("half")
    ckpt.remove_temporaries(tmp_path)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["best", "steps_3"]
        and read_pair(tmp_path / "best") == 1
        and read_pair(tmp_path / "steps_3") == 3
    )
    ckpt.remove_temporaries(tmp_path / "nowhere")


# ---- what may be stored ----------------------------------------------------------------------------------------------

PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
NESTED = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(NESTED)
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
    assert (
        got["t"].dtype == dtype
        and torch.equal(got["t"], tensor)
        and got["empty"].shape == (0, 3)
        and torch.equal(got["rng"], torch.get_rng_state())
    )


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value,name",
    [
        (np.float64(1), "float64"),
        (np.arange(3), "ndarray"),
        (np.int64(3), "int64"),
        (Path("x"), "PosixPath"),
        ({1, 2}, "set"),
        (torch.nn.Parameter(torch.zeros(1)), "Parameter"),
        (torch.device("cpu"), "device"),
        (torch.float32, "dtype"),
        (Boom(), "Boom"),
        (len, "builtin_function_or_method"),
        (b"", "bytes"),
        (Point(1, 2), "Point"),
        (torch.zeros(2).size(), "Size"),
        (defaultdict(list), "defaultdict"),
    ],
)
def test_anything_else_is_refused_before_writing(tmp_path, value, name):
    with pytest.raises(TypeError, match=rf"state.a\[1\].b is a {name}; only tensors and plain values"):
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
    with pytest.raises(ValueError, match="state.pt is refused: .*tensors and plain values only") as error:
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
        with pytest.raises(ValueError, match="state.pt"):
            load_state(path)
    rng = random.Random(0)
    for length in (1, 2, 5, 20, 500) * 4:
        path.write_bytes(rng.randbytes(length))
        with pytest.raises(ValueError, match="state.pt"):
            load_state(path)
    for text in (
        "hello\n",
        "<html>404</html>",
        '{"a": 1}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="state.pt"):
            load_state(path)
    with pytest.raises(FileNotFoundError, match="nowhere.pt: no such checkpoint"):
        load_state(tmp_path / "nowhere.pt")


# ---- stopping and resuming -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_a_second_one_acts_as_usual(number):
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & makes its children ignore SIGINT
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop = ckpt.StopSignal()
    try:
        assert stop.received is None
        os.kill(os.getpid(), number)
        assert stop.received == signal.Signals(number).name
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before, (
            "from here on Ctrl-C stops at once"
        )
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(10)
    finally:
        stop.restore()
        signal.signal(signal.SIGINT, outer)


def test_find_resume(tmp_path):
    assert ckpt.find_resume(None, tmp_path) is None and ckpt.find_resume("", tmp_path) is None
    assert ckpt.find_resume("auto", tmp_path) is None and ckpt.find_resume("auto", tmp_path / "nowhere") is None
    for step in (100, 20):
        write_pair(tmp_path / f"steps_{step}", step)
    write_pair(tmp_path / ".tmp-1-steps_300", 300)
    assert ckpt.find_resume("auto", tmp_path) == tmp_path / "steps_100"
    assert ckpt.find_resume(str(tmp_path / "steps_20"), tmp_path) == tmp_path / "steps_20"
    for wrong in (tmp_path, tmp_path / "steps_7", tmp_path / "steps_20" / "model"):
        with pytest.raises(FileNotFoundError) as error:
            ckpt.find_resume(str(wrong), tmp_path)
        assert f"'{wrong}' has no state.pt" in str(error.value) and "steps_20, steps_100" in str(error.value)
    os.replace(
        tmp_path / "steps_100", tmp_path / ".tmp-1-old-steps_100"
    )  # killed between the two renames of a replacement
    assert ckpt.find_resume("auto", tmp_path) == tmp_path / "steps_100" and read_pair(tmp_path / "steps_100") == 100


def test_check_resume_refuses_what_would_silently_differ():
    config = dict(learning_rate=1e-4, dataset={"horizon": 3}, output_dir="a", max_train_steps=10, train="full")
    meta = dict(format_version=1, data="abc", config=config)
    check = lambda changes, expected: ckpt.check_resume(
        "runs/steps_5", meta, expected, config | changes, ("learning_rate", "train")
    )  # noqa: E731
    assert check({}, dict(format_version=1, data="abc")) == []
    assert check(dict(max_train_steps=20, output_dir="b", check=True), {}) == ["max_train_steps 10 -> 20"]
    with pytest.raises(ValueError, match="runs/steps_5 has data abc, this run xyz.*--load_model_weights runs/steps_5"):
        check({}, dict(data="xyz"))
    with pytest.raises(ValueError, match="has format_version 1, this run 2: another version of this code wrote it"):
        check({}, dict(format_version=2))
    with pytest.raises(ValueError, match="trained with train full, now it is lora.*--load_model_weights runs/steps_5"):
        check(dict(train="lora"), {})


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
    """Weights and moments: stopped after any update, saved, loaded into a differently initialised model, the rest is the same to the bit."""
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
    ckpt.restore_training_state(other, other_optimizer, load_state(tmp_path / "state.pt"))
    train_steps(other, other_optimizer, stop, 15)
    for (name, a), b in zip(model.named_parameters(), other.parameters()):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state.values(), other_optimizer.state.values()):
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
    with pytest.raises(ValueError, match="lacks 1 trained tensors or has them in another shape, e.g. 0.bias"):
        ckpt.restore_training_state(model, optimizer, dict(trained=trained, moments=moments))


def test_an_error_with_live_loader_workers_ends_the_program(tmp_path):
    """The workers ignore SIGTERM, with which Python ends its daemons before it waits for them. The traceback keeps the loader's iterator alive."""
    program = tmp_path / "program.py"
    program.write_text("""import sys
from torch.utils.data import DataLoader
from common.checkpoint import StopSignal, ignore_stop_signals
stop = StopSignal()
def train():
    batches = iter(DataLoader(range(10**6), batch_size=1, num_workers=2, worker_init_fn=ignore_stop_signals))
    sys.kept = batches
    next(batches)
    raise RuntimeError("as a user's mistake would")
train()
""")
    result = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
    )
    assert result.returncode == 1 and "as a user's mistake would" in result.stderr
