"""The run log: metrics.jsonl, W&B that may fail, the loss plot."""

import resource
import sys
import warnings
from unittest.mock import MagicMock

import pytest
from PIL import Image

from common.log import RunLog, WandbConfig, plot_loss, read_metrics


def write(folder, steps, start=0, **options):
    """A run that logs twice its step as loss."""
    log = RunLog(folder, 10, start_step=start, **options)
    for step in steps:
        log.advance(step, dict(loss="0.5"))
        log.log(step, {"loss": 2.0 * step}, f"line {step}")
    log.close()


def rows(folder):
    return [(row["step"], row["loss"]) for row in read_metrics(folder)]


def test_rows_line_and_bar(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path / "new" / "run", total_steps=3)
    log.log(1, {"loss": 0.5, "lr": float("nan")}, "step 1")
    log.log(1, {"val_loss": 3.0})
    first, second = read_metrics(tmp_path / "new" / "run")  # on disk before close
    assert isinstance(first.pop("time"), float) and first == dict(step=1, loss=0.5, lr=None)
    assert second["val_loss"] == 3.0 and capsys.readouterr().out == "step 1\n"
    monkeypatch.setattr(sys.stdout, "write", MagicMock(side_effect=BrokenPipeError))  # or the terminal was closed
    log.log(2, {}, "step 2")
    log.close()


def test_rows_of_a_full_disk_are_written_when_there_is_room(tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    log = RunLog(tmp_path, 200)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        for step in range(1, 200):
            log.log(step, {"loss": 2.0 * step, "a metric with a long name": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.log(200, {"loss": 400.0})
    assert rows(tmp_path) == [(step, 2.0 * step) for step in range(1, 201)]
    assert "metrics.jsonl: [Errno 27] File too large. Training goes on" in capsys.readouterr().out


def test_other_ranks_do_nothing(tmp_path, capsys):
    write(tmp_path / "run", [1], active=False, wandb=WandbConfig(mode="online"))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("tail", ["", '{"step": 7, "lo', '{"step": 7, "loss": 0.1}', "\0\udcff", '{"loss": 3}'])
def test_a_resumed_log_goes_on_after_the_step_of_the_checkpoint(tmp_path, tail):
    """Rows after it are done again; what a kill left half-written goes as well. A new run begins an empty file."""
    write(tmp_path, [2, 4, 6])
    with (tmp_path / "metrics.jsonl").open("a", errors="surrogateescape") as f:
        f.write(tail)
    write(tmp_path, [5], start=4)
    assert rows(tmp_path) == [(2, 4.0), (4, 8.0), (5, 10.0)]
    write(tmp_path, [1])
    (tmp_path / "metrics.jsonl").write_text((tmp_path / "metrics.jsonl").read_text()[:-1])  # a row without its end
    write(tmp_path, [3], start=2)
    assert rows(tmp_path) == [(1, 2.0), (3, 6.0)]


# ---- W&B -------------------------------------------------------------------------------------------------------------
@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` of mocks."""
    module = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return module


def inits(wandb):
    """What each wandb.init was called with."""
    return [call.kwargs for call in wandb.init.call_args_list]


ONLINE = WandbConfig(mode="online", entity="team", tags=["a"], notes="why")


def test_wandb_gets_the_same_values(tmp_path, fake_wandb):
    write(tmp_path / "run7", [1, 2], project="P", wandb=ONLINE, config={"lr": 1})
    run = fake_wandb.init.return_value
    assert [(c.kwargs["step"], c.args[0]["loss"]) for c in run.log.call_args_list] == [(1, 2.0), (2, 4.0)]
    run.finish.assert_called_once_with()
    wanted = dict(project="P", entity="team", tags=["a"], notes="why", mode="online", name="run7", config={"lr": 1})
    assert inits(fake_wandb)[0].items() >= (wanted | dict(dir=str(tmp_path / "run7"))).items()


@pytest.mark.parametrize("fails", ["init", "log", "finish", "missing"])
def test_a_failing_wandb_never_stops_a_training_and_is_reported_once(tmp_path, fake_wandb, monkeypatch, capsys, fails):
    if fails == "missing":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        at = fake_wandb.init if fails == "init" else getattr(fake_wandb.init.return_value, fails)
        at.side_effect = ConnectionError("network down")
    write(tmp_path, [1, 2, 3], wandb=ONLINE)
    out = capsys.readouterr().out
    assert out.count("W&B:") == 1 and "line 3" in out
    assert f"Training goes on without W&B; the values are in {tmp_path / 'metrics.jsonl'}" in out
    assert len(rows(tmp_path)) == 3


def test_not_logged_in_records_offline(tmp_path, fake_wandb, monkeypatch, capsys):
    fake_wandb.login.return_value = False
    write(tmp_path, [1], wandb=ONLINE)
    assert f"wandb sync {tmp_path}" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", "k")
    write(tmp_path, [1], wandb=ONLINE)
    assert [given["mode"] for given in inits(fake_wandb)] == ["offline", "online"]


def test_a_resumed_run_continues_its_own_wandb_run(tmp_path, fake_wandb):
    """`resume` without the id of the first run would open a second one."""
    for folder, start in (("run", 0), ("run", 2), ("other/run", 0)):
        write(tmp_path / folder, [], start, wandb=ONLINE)
    first, second, elsewhere = inits(fake_wandb)
    assert first["id"] == second["id"] != elsewhere["id"] and second["resume"] == "allow"


# ---- plot ------------------------------------------------------------------------------------------------------------
def test_plot_loss_writes_a_picture_of_the_values(tmp_path):
    for name, steps in (("a", range(1, 30)), ("b", [1, 29])):
        write(tmp_path / name, steps)
    (tmp_path / "b" / "metrics.jsonl").open("a").write('{"step": 3, "val_loss": 9.0}\n')
    path = plot_loss(tmp_path / "a")
    picture = Image.open(path)
    assert path == tmp_path / "a" / "loss.png" and picture.format == "PNG" and picture.size == (840, 480)
    assert plot_loss(tmp_path / "b").read_bytes() != path.read_bytes(), "the curve is drawn from the numbers"
    write(tmp_path / "c", [])
    with warnings.catch_warnings(action="error"):  # a run without any loss
        assert plot_loss(tmp_path / "c").is_file()
