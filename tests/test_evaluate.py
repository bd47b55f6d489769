"""evaluate.py: errors worked by hand, baselines that look at nothing later, and the whole command on a trained checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate

ROOT = Path(__file__).resolve().parent.parent


class Scripted:
    """Two episodes of 4 and 3 frames, one moving and one constant dim; predicts target + `offset`, except that padded steps are nonsense."""

    stats = {"action": {"mean": [1.0, 5.0]}}

    def __init__(self, offset=0.0):
        self.offset = offset
        self.targets = {
            "a.h5": np.array([[0, 5], [1, 5], [2, 5], [3, 5]], np.float32),
            "sub/b.h5": np.array([[4, 5], [0, 5], [2, 5]], np.float32),
        }

    def open_episodes(self, root, names):
        for name, target in self.targets.items():
            if names is None or name in names:
                yield dict(
                    name=name,
                    sample=lambda t, target=target: (target, t),
                    target=target,
                    hold=np.zeros_like(target) + [0, 5],
                    phase=np.array([1, 1, 2, 2][: len(target)]),
                )

    def predict(self, observations):
        out = np.full((len(observations), 2, 2), 1e6, np.float32)
        for row, (target, t) in zip(out, observations):
            n = len(target[t : t + 2])
            row[:n] = target[t : t + 2] + [self.offset, 0]
        return out

    def action_names(self):
        return [("x", "mm"), ("y", "")]


def test_errors_by_hand():
    records, tracks = evaluate.evaluate(Scripted(0.5), "", batch_size=2)
    report = evaluate.summarise(records, Scripted().action_names())
    assert len(records) == 7 and [len(t["t"]) for t in tracks] == [4, 3]
    assert report["policy"]["per_dim"] == {"x": 0.5, "y": 0.0}
    # x over the chunks' valid steps: a 0 1 | 1 2 | 2 3 | 3, b 4 0 | 0 2 | 2: holding still errs by |x|, mean 20/12; the mean action by |x - 1|
    assert report["hold still"]["per_dim"]["x"] == pytest.approx(20 / 12)
    assert report["mean action"]["per_dim"]["x"] == pytest.approx((1 + 0 + 0 + 1 + 1 + 2 + 2 + 3 + 1 + 1 + 1 + 1) / 12)
    assert report["policy"]["relative"] == pytest.approx(0.5 / (14 / 12)), (
        "the constant dim has nothing to be predicted"
    )
    assert report["mean action"]["per_step"][1][0] == pytest.approx((0 + 1 + 2 + 1 + 1) / 5)
    assert report["hold still"]["per_phase"]["2"][0] == pytest.approx((2 + 3 + 3 + 2) / 4)


def test_a_perfect_policy_has_no_error_and_padding_never_counts():
    report = evaluate.summarise(evaluate.evaluate(Scripted(0.0), "", batch_size=3)[0], Scripted().action_names())
    assert report["policy"]["relative"] == 0 and max(report["policy"]["per_dim"].values()) == 0


def test_stride_and_names_choose_the_frames():
    records, _ = evaluate.evaluate(Scripted(), "", ["sub/b.h5"], stride=2)
    assert [(r["episode"], r["t"]) for r in records] == [("sub/b.h5", 0), ("sub/b.h5", 2)]


def test_no_frame_is_an_error():
    with pytest.raises(ValueError, match="no frame"):
        evaluate.evaluate(Scripted(), "/data", ["other.h5"])


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no meta.json"):
        evaluate.find_script(tmp_path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, insertion_root, qwen_dir):
    import train_nora as nora
    from common.config import parse_config

    out = tmp_path_factory.mktemp("evaluated")
    flags = [
        "--dataset.root_dir",
        insertion_root,
        "--model",
        qwen_dir,
        "--fast",
        "fit",
        "--fast_vocab_size",
        300,
        "--horizon",
        2,
        "--use_ee_pose_delta_as_action",
        "--num_val_episodes",
        1,
        "--resize_resolution",
        56,
        56,
        "--batch_size",
        4,
        "--gradient_accumulation_steps",
        1,
        "--num_workers",
        0,
        "--max_steps",
        1,
        "--output_dir",
        out,
    ]
    nora.main(parse_config(nora.Config, [str(f) for f in flags], nora.ALIASES))
    return out


def test_the_command_reports_the_validation_episodes(tmp_path, checkpoint, insertion_root):
    result = subprocess.run(
        [
            sys.executable,
            str(ROOT / "evaluate.py"),
            "--checkpoint",
            str(checkpoint / "steps_1"),
            "--data",
            str(insertion_root),
            "--output",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    held_out = json.loads((checkpoint / "steps_1/meta.json").read_text())["validation"]
    assert (
        report["episodes"] == held_out
        and report["frames"] == 13
        and report["units"] == {"dx": "mm", "dy": "mm", "dz": "mm", "droll": "rad", "dpitch": "rad", "dyaw": "rad"}
    )
    assert (tmp_path / "summary.png").stat().st_size > 5000 and (tmp_path / (Path(held_out[0]).stem + ".png")).exists()
    for text in ("policy", "hold still", "mean action", "phase 1", "step 2", "summary.png"):
        assert text in result.stdout


def test_the_policy_sees_what_the_training_saw(checkpoint, insertion_root):
    """The command's error equals the training's own validation MAE on the same frames."""
    import train_nora as nora

    policy = nora.load_policy(checkpoint, "cpu")
    records, _ = evaluate.evaluate(policy, insertion_root, evaluate.held_out(checkpoint))
    rows = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    mae = next(r["val_action_mae"] for r in rows if "val_action_mae" in r)
    assert np.mean(
        list(evaluate.summarise(records, policy.action_names())["policy"]["per_dim"].values())
    ) == pytest.approx(mae, rel=1e-5)


def test_unknown_episode_is_named(checkpoint, insertion_root):
    import train_nora as nora

    with pytest.raises(ValueError, match="no episode 'x.h5'"):
        list(nora.load_policy(checkpoint, "cpu").open_episodes(insertion_root, ["x.h5"]))


def test_a_policy_file_that_another_script_made_is_found_by_its_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "policy.json").write_text('{"script": "train_mine"}')
    assert evaluate.find_script(tmp_path) == "train_mine"


def test_a_checkpoint_that_is_one_file_names_its_script_and_episodes(tmp_path):
    (tmp_path / "meta.json").write_text(
        '{"script": "train_other", "validation": ["x"]}'
    )  # of another script that saves into the same folder
    torch.save(
        {"meta": {"script": "train_mine", "validation": ["a", "b"]}, "weights": torch.zeros(3)},
        tmp_path / "mine_best.pt",
    )
    torch.save({"weights": torch.zeros(3)}, tmp_path / "checkpoint_step_2.pt")
    assert evaluate.find_script(tmp_path / "mine_best.pt") == "train_mine" and evaluate.held_out(
        tmp_path / "mine_best.pt"
    ) == ["a", "b"]
    assert evaluate.find_script(tmp_path / "checkpoint_step_2.pt") == "train_other"
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="broken.pt"):
        evaluate.find_script(tmp_path / "broken.pt")


def test_plots_are_limited_and_errors_are_not(tmp_path, monkeypatch):
    """The report covers all episodes although one is drawn, and a checkpoint file gets its report beside it."""
    torch.save({"meta": {"script": "scripted", "validation": []}}, tmp_path / "mine_best.pt")
    monkeypatch.setitem(
        sys.modules, "scripted", SimpleNamespace(load_policy=lambda path, device: Scripted(0.5), __name__="scripted")
    )
    report = evaluate.main(["--checkpoint", str(tmp_path / "mine_best.pt"), "--data", str(tmp_path), "--plots", "1"])
    folder = tmp_path / "mine_best_evaluation"
    assert (
        sorted(p.name for p in folder.glob("*.png")) == ["a.png", "summary.png"]
        and report["policy"]["per_dim"]["x"] == 0.5
    )
    assert json.loads((folder / "report.json").read_text())["episodes"] == ["a.h5", "sub/b.h5"]
