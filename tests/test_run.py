"""The runtime, on the smallest script there can be (tests/toy.py): resume, stop, errors, ranks."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

import toy
from common import UserError, fsdp, program
from common import checkpoint as ckpt
from common.log import read_metrics
from common.program import StopSignal, _explain, launch
from common.run import Run, Step

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def outer_signals():
    """A run that was stopped keeps its handlers to the end of its process, which is not the tests'."""
    before = {number: signal.getsignal(number) for number in (*program.STOPS, signal.SIGCHLD)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(folder, **options):
    return toy.main(toy.Config(output_dir=str(folder), **options))


def weights(folder, step):
    return ckpt.load_state(Path(folder) / f"steps_{step}" / "state.pt")["trained"]


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def meta(path):
    return json.loads((path / "meta.json").read_text())


def processes(folder, *argv, count=2, **popen):
    """torchrun of the toy -> the finished process."""
    env = os.environ | dict(PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", OMP_NUM_THREADS="1")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*torchrun, ROOT / "tests" / "toy.py", "--output_dir", folder, *argv]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=600)


# ---- one process -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def test_a_signal_saves_and_the_log_goes_on_as_if_there_had_been_none(tmp_path, whole, capsys):
    """The weights: see test_truths.py."""
    train(tmp_path, signal_step=5)
    assert f"stopped by signal after step 5; saved {tmp_path}/steps_5" in capsys.readouterr().out
    train(tmp_path, resume="auto")
    logs = [[(r["step"], r.get("loss"), r.get("val_loss")) for r in read_metrics(f)] for f in (whole, tmp_path)]
    assert logs[0] == logs[1]


def test_the_checkpoints_of_a_run(tmp_path):
    run = train(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("steps_*")) == ["steps_4", "steps_6"]
    best = meta(tmp_path / "best")
    values = {r["step"]: r["val_loss"] for r in read_metrics(tmp_path) if "val_loss" in r}
    assert best["best_step"] == min(values, key=values.get) and best["best_val_loss"] == min(values.values())
    assert run.best_step == best["best_step"] and (tmp_path / "loss.png").is_file() and (tmp_path / "toy.py").is_file()
    with pytest.raises(UserError, match="steps_6 already exists. Go on with --resume auto"):
        train(tmp_path)


def test_resume_auto_of_a_finished_run_and_of_none(tmp_path, capsys):
    half = tmp_path / f".tmp-{2**22 + 1}@{socket.gethostname()}~steps_4"
    half.mkdir()  # what a killed process left
    train(tmp_path, resume="auto")
    assert "no checkpoint" in capsys.readouterr().out and not half.exists()
    before = weights(tmp_path, 6)
    train(tmp_path, resume="auto")
    assert "nothing to do: the checkpoint is of step 6 of 6" in capsys.readouterr().out
    assert same(before, weights(tmp_path, 6))


def test_a_resume_from_an_earlier_checkpoint_is_one_timeline(tmp_path, capsys):
    train(tmp_path, keep=1, save_steps=0)
    train(tmp_path, keep=0, steps=10, resume="auto")
    newest = ckpt.find_checkpoint("auto", tmp_path, ["steps_*"])
    assert newest.name == "steps_10" and (tmp_path / "steps_6").is_dir()
    train(tmp_path, steps=8, resume=str(tmp_path / "steps_6"), seed=1)
    assert sorted(p.name for p in tmp_path.glob("steps_*")) == ["steps_6", "steps_8"]
    assert (tmp_path / "set_aside_1" / "steps_10").is_dir()
    assert ckpt.find_checkpoint("auto", tmp_path, ["steps_*"]).name == "steps_8", "auto goes on where this run stands"
    with pytest.raises(UserError, match="trained with another seed 1 -> 2"):
        train(tmp_path, steps=12, resume="auto", seed=2)


def test_a_best_of_a_later_step_is_set_aside_too(tmp_path):
    train(tmp_path, steps=2, val_steps=0)
    train(tmp_path, steps=6, val_steps=6, resume="auto")
    train(tmp_path, steps=6, val_steps=3, resume=str(tmp_path / "steps_2"))
    assert meta(tmp_path / "set_aside_1" / "best")["best_step"] == 6 and meta(tmp_path / "best")["best_step"] in (3, 6)


def test_a_run_that_goes_on_in_another_folder_has_its_best_there(tmp_path):
    train(tmp_path / "a", steps=3, val_steps=3)
    start = tmp_path / "a" / "steps_3"
    (start / "meta.json").write_text(json.dumps(meta(start) | dict(best_val_loss=0.0)))  # none will be better
    train(tmp_path / "b", steps=4, resume=str(start))
    assert meta(tmp_path / "b" / "best")["best_step"] == 4


def test_processes_that_see_other_checkpoints_do_not_train(tmp_path, monkeypatch):
    """Several machines, a disk of each one's own."""
    train(tmp_path, steps=2)
    monkeypatch.setattr(Run, "gather", lambda self, value: [value, None])
    with pytest.raises(UserError, match="all machines must share that disk"):
        train(tmp_path, resume="auto")


def test_a_metric_may_be_added_to_a_run(tmp_path, monkeypatch):
    """Its sums since the last line are in the checkpoint, without the new name."""
    train(tmp_path, log_steps=2, signal_step=3)
    assert len(meta(tmp_path / "steps_3")["window"]) == 1
    add = Step.add
    monkeypatch.setattr(Step, "add", lambda self, **sums: add(self, **sums, new=1.0))
    train(tmp_path, log_steps=2, resume="auto")


def test_a_full_disk_costs_the_new_checkpoint_only(tmp_path, capsys):
    train(tmp_path / "a", full_step=4)
    assert "NOT SAVED at step 4" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "a").glob("steps_*")) == ["steps_2", "steps_6"]
    with pytest.raises(ckpt.DiskFull, match=r"last checkpoint could not be written.*steps_4, is of step 4"):
        train(tmp_path / "b", full_step=6)


def test_an_old_checkpoint_that_cannot_be_deleted_costs_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ckpt, "rotate", mock.Mock(side_effect=PermissionError(1, "Operation not permitted")))
    train(tmp_path, keep=1)
    assert "an older checkpoint stays: [Errno 1] Operation not permitted" in capsys.readouterr().out
    assert meta(tmp_path / "steps_6")["step"] == 6


def test_a_second_training_in_the_folder_of_one_is_refused(tmp_path, capfd):
    """They would replace each other's checkpoints. However the first one ends, its folder is free."""
    held, codes, fork = ckpt.claim(tmp_path), [], multiprocessing.get_context("fork")
    for _ in range(2):
        child = fork.Process(target=train, args=(tmp_path,))
        child.start()
        child.join()
        codes.append(child.exitcode)
        held.close()
    assert codes == [1, 0] and f"another training is running in {tmp_path}" in capfd.readouterr().err


def test_what_other_launchers_left_in_the_environment(tmp_path, whole, monkeypatch):
    """accelerate's settings change no gradient; half of torchrun's are refused."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(tmp_path / "a")
    norms = [[row.get("grad_norm") for row in read_metrics(folder)] for folder in (whole, tmp_path / "a")]
    assert norms[0] == norms[1]
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="LOCAL_RANK of another program"):
        train(tmp_path / "b")


def test_steps_that_are_not_finite_are_counted_over_a_resume(tmp_path):
    """skipped, named and counted: see test_truths.py."""
    flags = dict(nan_samples=list(range(20)), steps=12, save_steps=9)
    with pytest.raises(UserError, match="10 steps in a row were not finite, the last one 10: loss of episode frame"):
        train(tmp_path, **flags)
    program.run.join()  # what launch does before it ends
    about = meta(tmp_path / "steps_9")
    assert about["skipped_in_row"] == about["skipped"] == 9
    assert [r["skipped_steps"] for r in read_metrics(tmp_path) if "skipped_steps" in r] == list(range(1, 10))
    with pytest.raises(UserError, match="10 steps in a row"):
        train(tmp_path, **flags, resume="auto")


CRASHED = "DataLoader worker crashed.*Lower num_workers .now 1.*--num_workers 0"
UNREADABLE = "^sample 12: cannot be read$"


@pytest.mark.parametrize("workers, fault, said", [(0, "bad", UNREADABLE), (1, "bad", UNREADABLE), (1, "kill", CRASHED)])
def test_data_that_cannot_be_read_is_told_after_saving(tmp_path, workers, fault, said):
    with pytest.raises(UserError, match=said):  # not in the first step
        train(tmp_path, **{f"{fault}_sample": 12}, num_workers=workers, save_steps=0, steps=20)
    (saved,) = tmp_path.glob("steps_*")
    step = ckpt.step_of(saved)
    train(tmp_path / "whole", steps=step, save_steps=0)
    assert same(weights(tmp_path, step), weights(tmp_path / "whole", step))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_is_killed_while_it_hands_a_batch_over_is_told_too(tmp_path, error):
    def batches():
        yield from ()
        raise error

    run = Run(toy.Config(), tmp_path, 2)
    run.workers, run.left, run.queue, run.iterator = 1, 1, [], batches()
    run._fetch()
    assert isinstance(run.error, UserError) and "DataLoader worker crashed" in str(run.error)


@pytest.mark.parametrize("left_out, said", [("backward", "once per micro-batch"), ("micro_batches", "before update")])
def test_the_loops_own_mistakes_are_named(tmp_path, monkeypatch, left_out, said):
    monkeypatch.setattr(Step, left_out, lambda *_: ())
    with pytest.raises(AssertionError, match=said):
        train(tmp_path)


# ---- saving beside the training --------------------------------------------------------------------------------------
@pytest.fixture
def slow_disk(monkeypatch):
    """{step: Event}: its checkpoint is written only after the event; and the update after a write began sets it."""
    events, write = {}, fsdp.write_state

    def wait(folder, *args):
        step = ckpt.step_of(folder)
        assert step not in events or events[step].wait(60), "the training did not go on"
        write(folder, *args)

    def update(self, *args, real=Step.update):
        real(self, *args)
        if self.number - 1 in events:
            events[self.number - 1].set()

    monkeypatch.setattr(fsdp, "write_state", wait)
    monkeypatch.setattr(Step, "update", update)
    return events


def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path, whole, slow_disk):
    """And what is written is the step that was to be saved, weights and moments."""
    slow_disk.update({2: threading.Event(), 4: threading.Event()})
    train(tmp_path)
    assert all(event.is_set() for event in slow_disk.values())
    for step in (2, 4, 6):
        a, b = (ckpt.load_state(folder / f"steps_{step}" / "state.pt") for folder in (whole, tmp_path))
        assert same(a["trained"], b["trained"])
        assert all(same(a["moments"][name], b["moments"][name]) for name in a["moments"])
    stalled = {row["step"] for row in read_metrics(tmp_path) if "save_stall_s" in row}
    assert {3, 5} <= stalled, "the seconds of a save stand in the line after it"


def test_a_second_save_waits_for_the_first(tmp_path, monkeypatch):
    under_way, most, write = [], [], fsdp.write_state

    def slow(folder, *args):
        under_way.append(folder)
        most.append(len(under_way))
        time.sleep(0.05)
        write(folder, *args)
        under_way.remove(folder)

    monkeypatch.setattr(fsdp, "write_state", slow)
    train(tmp_path, save_steps=1, keep=1)
    assert most == [1] * 6 and [p.name for p in tmp_path.glob("steps_*")] == ["steps_6"]


def test_an_error_waits_for_the_checkpoint_that_is_being_written(monkeypatch, capsys, tmp_path, slow_disk):
    """Also where its disk is full: then the last complete step is saved instead."""
    slow_disk[4] = threading.Event()
    threading.Timer(1.0, slow_disk[4].set).start()
    argv = ("--output_dir", tmp_path / "a", "--error_step", 5, "--error", "boom")
    code, _, _ = command(monkeypatch, capsys, toy.main, *argv)
    assert str(code) == "boom" and meta(tmp_path / "a" / "steps_4")["step"] == 4
    assert not list((tmp_path / "a").glob(".tmp-*"))
    slow_disk.clear()
    argv = ("--output_dir", tmp_path / "b", "--error_step", 6, "--error", "boom", "--full_step", 4)
    code, out, _ = command(monkeypatch, capsys, toy.main, *argv)
    assert "NOT SAVED at step 4" in out and f"saved: {tmp_path}/b/steps_5. Continue after the error" in out


def test_a_save_that_found_no_memory_is_made_after_the_error(monkeypatch, capsys, tmp_path):
    """Its step does not count as saved."""
    on_host, failed = ckpt.on_host, []

    def full(value, *args, **options):
        if options and value["meta"]["step"] == 4 and not failed:
            failed.append(4)
            raise MemoryError("cannot allocate")
        return on_host(value, *args, **options)

    monkeypatch.setattr(ckpt, "on_host", full)
    code, out, _ = command(monkeypatch, capsys, toy.main, "--output_dir", tmp_path)
    assert code == 2 and f"saved: {tmp_path}/steps_4. Continue after the error" in out
    assert meta(tmp_path / "steps_4")["step"] == 4


def test_a_best_that_could_not_be_written_is_not_recorded(tmp_path, capsys):
    """A later one may be worse, and still the best that there is."""
    train(tmp_path, full_step=3, save_steps=6)
    assert "NOT SAVED at step 3" in capsys.readouterr().out
    assert meta(tmp_path / "best")["best_step"] == 6 == meta(tmp_path / "steps_6")["best_step"]


def test_frozen_weights_are_not_sent_around_but_must_be_the_same(tmp_path, monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    run = Run(toy.Config(), tmp_path, 2)
    run._share_frozen(model)
    assert model._ddp_params_and_buffers_to_ignore == ["0.weight", "0.bias"]
    monkeypatch.setattr(run, "gather", lambda value: [value, value + 1e-3])
    with pytest.raises(UserError, match="every machine needs the same backbone files"):
        run._share_frozen(model)


# ---- shards ----------------------------------------------------------------------------------------------------------
def one_rank(rank, count, port, folder, options):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in place.items()})
    AcceleratorState._reset_state(reset_partial_state=True)  # what an earlier run of this process left
    sys.stdout = open(folder.parent / f"said_{rank}", "a")  # noqa: SIM115
    for name in ("save", "save_best"):
        setattr(Run, name, counted(getattr(Run, name)))
    if "error" in options:
        sys.argv = ["toy.py", f"--output_dir={folder}", *(f"--{key}={value}" for key, value in options.items())]
        launch(toy.main, toy.Config)
    train(folder, **options)
    sys.stdout.flush()


def counted(save):
    from torch.distributed.tensor.debug import CommDebugMode

    def call(self, *args):
        with CommDebugMode() as mode:
            done = save(self, *args)
        gathers = sum(n for op, n in mode.get_comm_counts().items() if "all_gather" in str(op))
        print(f"{save.__name__} of step {self.step}: {gathers} gathers")
        return done

    return call


def ranks(folder, codes=(0, 0), **options):
    """The toy in forked processes, which end with these codes -> what rank 0 said."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    args = [(rank, len(codes), port, folder, options) for rank in range(len(codes))]
    children = [fork.Process(target=one_rank, args=a) for a in args]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == list(codes)
    return (folder.parent / "said_0").read_text()


def test_shards_resume_bitwise_and_on_another_number_of_processes(tmp_path):
    """A save gathers the model alone, tensor by tensor; the moments stay where they are, also for a best."""
    said = ranks(tmp_path / "a", fsdp=True)
    parts = sorted(p.name for p in (tmp_path / "a" / "steps_4" / "shards").iterdir())
    assert parts == ["rank_0.safetensors", "rank_1.safetensors"]
    assert "save of step 2: 4 gathers" in said and "save_best of step 3: 4 gathers" in said
    ranks(tmp_path / "b", fsdp=True, signal_step=3)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    ranks(tmp_path / "b", fsdp=True, resume="auto")
    train(tmp_path / "c", batch_size=4, resume="auto")  # one process; its dropout is another
    a, b, c = (ckpt.load_state(tmp_path / name / "steps_6" / "model.pt") for name in "abc")
    assert same(a, b) and all(torch.allclose(a[name], c[name], rtol=0.1, atol=0.1) for name in a)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_process_costs_all_the_new_checkpoint_only(tmp_path, rank):
    said = ranks(tmp_path / "a", fsdp=True, full_step=4, full_rank=rank, val_steps=0)
    assert "NOT SAVED at step 4" in said and "No space left on device" in said
    assert sorted(p.name for p in (tmp_path / "a").iterdir() if "steps" in p.name) == ["steps_2", "steps_6"]


def test_a_folder_that_cannot_be_made_keeps_no_process_waiting(tmp_path, monkeypatch):
    atomic_path = ckpt.atomic_path

    def lost(final):
        if str(final).endswith("steps_4"):
            raise OSError(116, "Stale file handle")
        return atomic_path(final)

    monkeypatch.setattr(ckpt, "atomic_path", lost)
    said = ranks(tmp_path / "a", fsdp=True, val_steps=0)
    assert "NOT SAVED at step 4" in said and "Stale file handle" in said and (tmp_path / "a" / "steps_6").is_dir()


# ---- errors at the command line --------------------------------------------------------------------------------------
def command(monkeypatch, capsys, main, *argv, **options):
    """launch(main) in this process -> (exit code or exception, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *map(str, argv)])
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        launch(main, toy.Config, **options)
        code = 0
    except (SystemExit, Exception) as error:
        code = error.code if isinstance(error, SystemExit) else error
    return code, *capsys.readouterr()


def test_a_users_mistake_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path):
    buffered = []
    command(monkeypatch, capsys, lambda _: buffered.append(sys.stdout.line_buffering))
    assert buffered == [True], "a log file must show what is said"
    code, _, err = command(monkeypatch, capsys, toy.main, "--step", 3)
    assert code == 2 and err == "train_toy.py: unknown flag --step; the nearest is --steps (--help lists all)\n"
    code, _, err = command(monkeypatch, capsys, toy.main, "--output_dir", tmp_path, "--bad_sample", 12, "--steps", 20)
    assert code == 2 and err == "train_toy.py: sample 12: cannot be read\n"
    code, _, err = command(monkeypatch, capsys, print, "--plan", 24)  # of a program that has no --check
    assert code == 2 and "unknown flag --plan" in err


def test_a_terminal_without_a_character_ends_no_training(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="euc_kr"))
    launch(lambda cfg: print("⚠️  손실", flush=True), toy.Config)
    assert sys.stdout.buffer.getvalue().decode("euc_kr") == "\\u26a0\\ufe0f  손실\n"


def test_a_defect_keeps_its_traceback_and_saves_first(monkeypatch, capsys, tmp_path, whole):
    argv = ("--output_dir", tmp_path, "--error_step", 4, "--error", "boom", "--save_steps", 0)
    code, out, _ = command(monkeypatch, capsys, toy.main, *argv)
    assert str(code) == "boom" and f"saved: {tmp_path}/steps_3. Continue after the error" in out
    train(tmp_path, resume="auto", save_steps=0)
    assert same(weights(tmp_path, 6), weights(whole, 6))


def test_out_of_memory_says_which_keys_to_change(monkeypatch, capsys, tmp_path):
    argv = ("--output_dir", tmp_path, "--error_step", 4, "--error", "memory")
    code, out, err = command(monkeypatch, capsys, toy.main, *argv)
    said = "CUDA out of memory (tried). Lower batch_size (now 2) and raise accumulation (now 2) by the factor"
    assert code == 2 and err.startswith(f"train_toy.py: {said}; --plan 24 tries")
    assert "steps_3. Continue after the error" in out
    assert _explain(MemoryError("tried"), toy.Config()).startswith("The host is out of memory (tried). Lower")
    assert _explain(RuntimeError("DefaultCPUAllocator: can't"), toy.Config()).startswith("The host is out of memory")
    assert _explain(UserError("CUDA out of memory at x: less"), None) == "CUDA out of memory at x: less"
    assert "num_workers 0" in _explain(RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), None)
    known = (28, "No space left on device"), (30, "Read-only file system"), (36, "File name too long"), (13, "")
    for number, text in known:
        assert "x.yaml" in _explain(OSError(number, text, "x.yaml"), None)


def test_signals_are_harmless_after_the_first_and_a_second_ctrl_c_acts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    for before, received in ((signal.SIG_DFL, "SIGHUP"), (signal.SIG_IGN, None)):  # a closed terminal; nohup
        signal.signal(signal.SIGHUP, before)
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == received
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGINT"
        now[0] += 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # a launcher's second one, while the program ends


def test_an_error_with_live_loader_workers_ends_the_program(tmp_path):
    """The workers ignore SIGTERM, with which Python ends its daemons before it waits for them."""
    env = os.environ | dict(PYTHONPATH=str(ROOT))
    argv = ["--output_dir", tmp_path, "--num_workers", 2, "--error_step", 2, "--error", "boom"]
    command = [sys.executable, ROOT / "tests" / "toy.py", *argv]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 1 and "RuntimeError: boom" in done.stderr
    assert "steps_1. Continue after the error" in done.stdout


# ---- two processes ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank, codes", [(0, (1, 2)), (1, (2, 1))])
def test_an_error_of_one_process_saves_first(tmp_path, rank, codes, capfd):
    said = ranks(tmp_path / "a", codes, error_step=4, error="boom", error_rank=rank, save_steps=0)
    assert f"saved: {tmp_path}/a/steps_3. Continue after the error" in said
    assert capfd.readouterr().err.count("RuntimeError: boom") == 1


def test_data_that_one_process_cannot_read_stops_all(tmp_path):
    done = processes(tmp_path, "--bad_sample", 12, "--steps", 40, "--save_steps", 0)
    assert done.returncode == 1 and "sample 12: cannot be read\n" in done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own"
    assert list(tmp_path.glob("steps_*"))


def test_launch_sh_ends_a_torchrun_that_has_no_processes_yet(tmp_path):
    """It may be waiting for other machines."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n: > {tmp_path}/started\nexec sleep 30\n")  # it has no child
    (tmp_path / "python").chmod(0o755)
    argv = ["bash", str(ROOT / "shells" / "train_async.sh"), "--num-gpus", "2"]
    running = subprocess.Popen(argv, env=os.environ | dict(PYTHON=str(tmp_path / "python")), stderr=subprocess.DEVNULL)
    while not (tmp_path / "started").exists():
        time.sleep(0.01)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=600) == 128 + signal.SIGTERM


def test_launch_sh_passes_a_signal_on(tmp_path):
    """torchrun itself would end with 1, and kill the processes after 30 s."""
    (tmp_path / "shells").mkdir()
    (tmp_path / "shells" / "launch.sh").write_text((ROOT / "shells" / "launch.sh").read_text())
    (tmp_path / "toy.py").write_text((ROOT / "tests" / "toy.py").read_text())
    (tmp_path / "toy.yaml").write_text("steps: 100000\nsave_steps: 0\nval_steps: 0\n")
    argv = ["bash", tmp_path / "shells" / "launch.sh", "toy.py", "toy.yaml", "--num-gpus", "2", "--output_dir", "out"]
    env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHON=sys.executable)
    with open(tmp_path / "log", "w") as log:
        running = subprocess.Popen(list(map(str, argv)), cwd=tmp_path, env=env, stdout=log, stderr=log)
        try:
            rows = tmp_path / "out" / "metrics.jsonl"  # with one both processes are in the loop
            while not (rows.exists() and rows.stat().st_size) and running.poll() is None:
                time.sleep(0.2)
            running.send_signal(signal.SIGTERM)
            code = running.wait(timeout=600)
        finally:
            running.kill()
    said = (tmp_path / "log").read_text()
    assert code == 0 and "stopped by signal after step" in said, said[-3000:]
    assert len(list((tmp_path / "out").glob("steps_*"))) == 1
