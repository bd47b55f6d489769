"""The run log: metrics.jsonl, W&B that may fail, the loss plot."""

import json
import sys
import types
import warnings

import pytest
import torch
from PIL import Image

from common.log import RunLog, WandbConfig, memory_gb, plot_loss, read_metrics


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_line_and_bar(tmp_path, capsys):
    log = RunLog(tmp_path / "new" / "run", total_steps=3)
    for step in (1, 2):
        log.advance(step, dict(loss="0.5"))
        log.log(step, {"loss": 1 / step, "lr": 1e-4}, f"step {step}  loss {1 / step:.3f}")
    log.log(2, {"val_loss": 3.0})
    assert [(r["step"], r.get("loss"), r.get("val_loss")) for r in rows(tmp_path / "new" / "run")] == [
        (1, 1.0, None),
        (2, 0.5, None),
        (2, None, 3.0),
    ], "on disk before close"
    assert all(isinstance(r["time"], float) for r in rows(tmp_path / "new" / "run"))
    log.close()
    assert read_metrics(tmp_path / "new" / "run") == rows(tmp_path / "new" / "run")
    assert "step 1  loss 1.000\nstep 2  loss 0.500\n" in capsys.readouterr().out


def test_other_ranks_do_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", 3, active=False, wandb=WandbConfig(mode="online"))
    log.advance(1)
    log.log(1, {"loss": 1.0}, "line")
    log.print("text")
    log.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "tail", ["", '{"step": 7, "lo', '{"step": 7, "loss": 0.1}', '{"step":', "{", "\0\0\0\0\0", '{"loss": 3}']
)
def test_a_resumed_log_goes_on_after_the_step_of_the_checkpoint(tmp_path, tail):
    """Rows after it are done again; what a kill left half-written goes as well."""
    log = RunLog(tmp_path, 10)
    for step in (2, 4, 6):
        log.log(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write(tail)
    log = RunLog(tmp_path, 10, start_step=4)
    assert [r["step"] for r in rows(tmp_path)] == [2, 4]
    log.log(5, {"loss": 5.5})
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(2, 2.0), (4, 4.0), (5, 5.5)]


def test_a_last_row_without_its_newline_is_kept_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}')
    log = RunLog(tmp_path, 10, start_step=2)
    log.log(3, {"loss": 3.0})
    log.close()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


def test_a_new_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    RunLog(tmp_path, 10).close()
    assert rows(tmp_path) == []


# ---- W&B -------------------------------------------------------------------------------------------------------------


class FakeRun:
    def __init__(self, fails):
        self.fails, self.logged, self.finished = fails, [], 0

    def log(self, values, step):
        if "log" in self.fails:
            raise ConnectionError("network down")
        self.logged.append((step, values))

    def finish(self):
        if "finish" in self.fails:
            raise TimeoutError("no answer")
        self.finished += 1


@pytest.fixture
def fake_wandb(monkeypatch):
    """A module `wandb` whose calls named in `fails` raise; `inits` collects the arguments of init."""
    module = types.ModuleType("wandb")
    module.fails, module.inits, module.api = set(), [], types.SimpleNamespace(api_key="key")

    def init(**kwargs):
        module.inits.append(kwargs)
        if "init" in module.fails:
            raise RuntimeError("permission denied")
        module.run = FakeRun(module.fails)
        return module.run

    module.init, module.login = init, lambda prompt: bool(module.api.api_key)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return module


def run_to_the_end(folder, mode="online"):
    log = RunLog(
        folder, 3, project="P", wandb=WandbConfig(mode=mode, entity="team", tags=["a"], notes="why"), config={"lr": 1}
    )
    for step in (1, 2, 3):
        log.log(step, {"loss": float(step)}, f"line {step}")
    log.close()
    assert [r["loss"] for r in rows(folder)] == [1.0, 2.0, 3.0]


def test_wandb_gets_the_same_values(tmp_path, fake_wandb):
    run_to_the_end(tmp_path / "run7")
    assert fake_wandb.run.logged == [(s, {"loss": float(s)}) for s in (1, 2, 3)] and fake_wandb.run.finished == 1
    init = fake_wandb.inits[0]
    assert (
        init["project"],
        init["entity"],
        init["tags"],
        init["notes"],
        init["mode"],
        init["name"],
        init["config"],
        init["dir"],
    ) == ("P", "team", ["a"], "why", "online", "run7", {"lr": 1}, str(tmp_path / "run7"))


@pytest.mark.parametrize("fails", [{"init"}, {"log"}, {"finish"}, {"log", "finish"}])
def test_a_failing_wandb_never_stops_a_training_and_is_reported_once(tmp_path, fake_wandb, capsys, fails):
    fake_wandb.fails = fails
    run_to_the_end(tmp_path)
    out = capsys.readouterr().out
    assert (
        out.count("W&B:") == 1
        and "Training goes on without W&B" in out
        and str(tmp_path / "metrics.jsonl") in out
        and "line 3" in out
    )


def test_a_missing_or_broken_wandb_never_stops_a_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run_to_the_end(tmp_path)
    assert capsys.readouterr().out.count("Training goes on without W&B") == 1


def test_not_logged_in_records_offline(tmp_path, fake_wandb, monkeypatch, capsys):
    fake_wandb.api.api_key = None
    run_to_the_end(tmp_path)
    assert fake_wandb.inits[0]["mode"] == "offline" and f"wandb sync {tmp_path}" in capsys.readouterr().out
    monkeypatch.setenv("WANDB_API_KEY", "k")
    run_to_the_end(tmp_path)
    assert fake_wandb.inits[1]["mode"] == "online"


def test_disabled_does_not_import_wandb(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = RunLog(tmp_path, 1, wandb=WandbConfig(mode="disabled"))
    log.close()


def test_a_resumed_run_continues_its_own_wandb_run(tmp_path, fake_wandb):
    """`resume` without the id of the first run would open a second one."""
    for start in (0, 2):
        RunLog(tmp_path / "runA", 3, start_step=start, wandb=WandbConfig(mode="online")).close()
    RunLog(tmp_path / "other" / "runA", 3, wandb=WandbConfig(mode="online")).close()
    first, second, elsewhere = fake_wandb.inits
    assert (
        first.get("id")
        and first["id"] == second.get("id")
        and second["resume"] == "allow"
        and elsewhere["id"] != first["id"]
    )


# ---- plot, memory ----------------------------------------------------------------------------------------------------


def test_plot_loss_writes_a_picture_of_the_values(tmp_path):
    log = RunLog(tmp_path, 3)
    for step in range(1, 30):
        log.log(step, {"loss": 8 / step})
    log.log(29, {"val_loss": 1.0})
    log.close()
    path = plot_loss(tmp_path)
    picture = Image.open(path)
    assert path == tmp_path / "loss.png" and picture.format == "PNG" and picture.size == (840, 480)
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1.0}) + "\n" for s in range(1, 30)))
    assert plot_loss(flat).read_bytes() != path.read_bytes(), "the curve is drawn from the numbers"


def test_plot_of_a_run_without_any_loss(tmp_path):
    RunLog(tmp_path, 3).close()
    with warnings.catch_warnings(action="error"):
        assert plot_loss(tmp_path).is_file()


def test_memory_is_that_of_this_process():
    before = memory_gb()
    block = torch.ones(50_000_000)
    assert 0.1 < memory_gb() - before < 0.4 and len(block) or torch.cuda.is_available()
