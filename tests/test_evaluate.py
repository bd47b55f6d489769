"""evaluate.py: errors worked by hand, baselines that look at nothing later, which checkpoint is opened, the command."""

import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import font_manager, rcParams

import evaluate
from common import UserError


class Scripted:
    """Two episodes of 4 and 3 frames, x and z moving and y constant; predicts target + `offset` in x, except that
    padded steps are nonsense."""

    stats = {"action": {"mean": [1.0, 5.0, 0.0], "std": [1.4, 0.0, 0.05]}}

    def __init__(self, offset=0.0):
        self.offset = offset
        a, b = [[0, 5, 0.1], [1, 5, 0], [2, 5, 0], [3, 5, 0]], [[4, 5, 0.1], [0, 5, 0], [2, 5, 0]]
        self.targets = {"a.h5": np.array(a, np.float32), "sub/b.h5": np.array(b, np.float32)}

    def open_episodes(self, root, names):
        unknown = sorted(set(names or []) - set(self.targets))
        if unknown:
            raise UserError(f"'{root}' has no episode '{unknown[0]}'")
        for name, target in self.targets.items():
            if names is None or name in names:
                hold, phase = np.zeros_like(target) + [0, 5, 0], np.array([1, 1, 2, 2][: len(target)])
                sample = lambda t, target=target: dict(target=target, t=t)  # noqa: E731
                yield dict(name=name, sample=sample, target=target, hold=hold, phase=phase)

    def reset(self):
        pass

    def predict(self, observations):
        out = np.full((len(observations), 2, 3), 1e6, np.float32)
        for row, o in zip(out, observations, strict=True):
            target, t = o["target"], o["t"]
            n = len(target[t : t + 2])
            row[:n] = target[t : t + 2] + [self.offset, 0, 0]
        return out

    def action_names(self):
        return [("x", "mm"), ("y", "mm"), ("z", "rad")]


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """scripted.py is one of the scripts; -> the checkpoints that its load_policy was given."""
    opened = []
    load = lambda path, device: opened.append(path) or Scripted(0.5)  # noqa: E731
    monkeypatch.setitem(sys.modules, "scripted", SimpleNamespace(load_policy=load))
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    (tmp_path / "scripted.py").write_text("")
    return opened


def about(path, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(script="scripted", validation=["a.h5"]) | more))


def summary(policy, **how):
    return evaluate.summarise(evaluate.evaluate(policy, "", **how), policy.action_names())


# ---- errors ----------------------------------------------------------------------------------------------------------
def test_errors_by_hand():
    """Units are never averaged; the constant dimension has nothing to be predicted, each other counts relative to its
    better baseline."""
    report = summary(Scripted(0.5), batch_size=2)
    policy, hold, mean = report["policy"], report["hold still"], report["mean action"]
    assert policy["per_dim"] == policy["bias"] == {"x": 0.5, "y": 0.0, "z": 0.0}
    # x over the chunks' valid steps: a 0 1 | 1 2 | 2 3 | 3, b 4 0 | 0 2 | 2: holding still errs by |x|, mean 20/12; the
    # mean action by |x - 1|
    assert hold["per_dim"]["x"] == pytest.approx(20 / 12) and hold["bias"]["x"] == pytest.approx(-20 / 12)
    assert mean["per_dim"]["x"] == pytest.approx(14 / 12)
    assert mean["per_step"][1][0] == pytest.approx((0 + 1 + 2 + 1 + 1) / 5)
    assert hold["per_phase"]["2"][0] == pytest.approx((2 + 3 + 3 + 2) / 4)
    assert policy["per_unit"] == pytest.approx({"mm": 0.5, "rad": 0.0})
    assert hold["per_unit"] == pytest.approx({"mm": 20 / 12, "rad": 0.2 / 12})
    assert policy["relative"] == pytest.approx((0.5 / (14 / 12) + 0) / 2)
    policy = summary(Scripted(0.0), batch_size=3)["policy"]  # a perfect one: padding never counts
    assert policy["relative"] == 0 and max(policy["per_dim"].values()) == 0
    records = evaluate.evaluate(Scripted(), "", ["sub/b.h5"], stride=2)
    assert [(r["episode"], r["t"]) for r in records] == [("sub/b.h5", 0), ("sub/b.h5", 2)]
    assert len(evaluate.summarise(records[1:], Scripted().action_names())["policy"]["per_step"]) == 1  # a chunk of one
    still = Scripted()
    still.targets["a.h5"][:] = still.stats["action"]["mean"] = [0, 5, 0]
    with pytest.raises(UserError, match="nothing moves in these 4 frames"):
        summary(still, names=["a.h5"])
    with pytest.raises(UserError, match="no frame to evaluate under '/data'"):
        evaluate.evaluate(SimpleNamespace(stats=Scripted.stats, open_episodes=lambda *_: []), "/data")


def test_what_a_tokenizer_or_clipping_loses_is_the_floor():
    class Whole(Scripted):
        def nearest(self, chunks):
            return np.round(chunks).clip(None, [3, 9, 9])

    policy = Whole(0.5)
    floor = summary(policy)["floor"]
    assert floor["per_dim"] == pytest.approx({"x": 1 / 12, "y": 0, "z": 0.2 / 12})  # a 4 in x, 0.1 twice in z
    assert floor["bias"]["x"] == pytest.approx(-1 / 12) and "floor" not in summary(Scripted(0.5))


# ---- which checkpoint ------------------------------------------------------------------------------------------------
def files(folder, *names):
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".ckpt"):
            torch.save(dict(meta=dict(script="scripted", validation=[f"{number}"]), step=number), path)
        else:
            path.mkdir()


LAYOUTS = [
    (["steps_900", "steps_20000", "steps_1000"], "steps_20000"),  # by number, not by text
    (["best", "steps_20000"], "best"),
    (["steps_3", "steps_20/model"], "steps_20"),
    (["set_aside_1/steps_9", "steps_5"], "steps_5"),  # a run's timeline
    (["checkpoints/x_step_900.pt", "checkpoints/x_step_10000.pt"], "checkpoints/x_step_10000.pt"),
    (["checkpoints/best_hf", "checkpoints/checkpoint_step_4.pt"], "checkpoints/best_hf"),
    (["qwen_vla_async_best.pt", "qwen_vla_async.pt"], "qwen_vla_async_best.pt"),
    (["qwen_vla_async.pt"], "qwen_vla_async.pt"),
    (["model", "state.pt"], ""),  # a checkpoint itself, or one that the script's load_policy chooses
]


@pytest.mark.parametrize("names, chosen", LAYOUTS)
def test_a_run_is_its_best_checkpoint_else_its_newest(tmp_path, names, chosen):
    files(tmp_path, *names)
    assert evaluate.find_checkpoint(tmp_path) == tmp_path / chosen
    assert evaluate.find_checkpoint(tmp_path / names[0]) == tmp_path / names[0]
    files(tmp_path, "a_best.pt", "b_best.pt")
    with pytest.raises(UserError, match="holds several runs: choose .*best.* or .*best"):
        evaluate.find_checkpoint(tmp_path)


def test_the_nearest_file_names_script_and_episodes(tmp_path, scripted):
    about(tmp_path / "run/meta.json", script="other", validation=["x"])  # of another script with the same folder
    files(tmp_path / "run", "mine.pt")
    assert evaluate.read_about(tmp_path / "run/mine.pt")["validation"] == ["0"]
    about(tmp_path / "run/steps_2/meta.json", validation=["y"])
    about(tmp_path / "run/steps_2/model/policy.json")
    assert evaluate.read_about(tmp_path / "run/steps_2")["validation"] == ["y"]
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.pt").write_bytes(b"not a checkpoint")
    wrong = {"run": "made by other.py, which is not in", "nothing": "nothing there names", "broken.pt": "broken.pt"}
    for name, message in wrong.items():
        with pytest.raises(UserError, match=message):
            evaluate.read_about(tmp_path / name)


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_report(tmp_path, scripted, capsys):
    """Of the run's best checkpoint, on its validation episodes; plots are limited, errors are over all."""
    about(tmp_path / "run/best/meta.json", validation=["a.h5", "sub/b.h5"])
    run = str(tmp_path / "run")
    report = evaluate.main(["--checkpoint", run, "--data", "DATA", "--plots", "1", "--batch-size", "2"])
    assert scripted == [tmp_path / "run/best"] and report["policy"]["per_dim"]["x"] == 0.5
    folder = tmp_path / "run/evaluation"
    files = ["a.png", "predictions.npz", "report.html", "report.json", "summary.png", "worst.png"]
    assert sorted(p.name for p in folder.iterdir()) == files
    written = json.loads((folder / "report.json").read_text())
    assert written["episodes"] == ["a.h5", "sub/b.h5"] and written["frames"] == 7
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "policy&#x27;s bias" in page and "src='data" in page
    assert written["units"] == {"x": "mm", "y": "mm", "z": "rad"} and written["mean_absolute_error"] == report
    said = capsys.readouterr().out
    for text in ("2 validation episodes", "hold still", "policy's bias", "phase 1", "step 2", "in mm: policy 0.5"):
        assert text in said
    about(tmp_path / "two/meta.json")  # several checkpoints stand in one table
    paths = [run, str(tmp_path / "two")]
    words = ["--data", "DATA", "--plots", "0", "--output", str(tmp_path / "out"), "--uses", "0"]
    assert list(evaluate.main(["--checkpoint", *paths, *words])) == paths
    said = capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*/report.json"))) == 2
    assert all(f"  {path}: x 0.5  y 0  z 0  relative" in said for path in paths)


def test_a_replay_compares_every_bit(tmp_path, scripted, capsys, monkeypatch):
    """The same again is equal; a change in the last bit of one number, or another frame, is named."""
    about(tmp_path / "steps_1/meta.json")
    words = ["--checkpoint", str(tmp_path / "steps_1"), "--data", "DATA"]
    evaluate.main([*words, "--plots", "0", "--episodes", "all", "--output", str(tmp_path)])
    evaluate.main([*words, "--replay", str(tmp_path / "predictions.npz")])  # a batch of two episodes
    assert not (tmp_path / "steps_1/evaluation").exists()
    assert "the first 7 differ by at most 0\n" in capsys.readouterr().out
    evaluate.main([*words, "--plots", "0", "--batch-size", "3"])
    stored = tmp_path / "steps_1/evaluation/predictions.npz"
    assert evaluate.main([*words, "--replay", str(stored)]) == 4
    assert "4 predictions are those of" in capsys.readouterr().out
    predict = Scripted.predict

    def nudged(self, observations):
        out = predict(self, observations)
        if len(observations) == 3:  # the batches of the first run, not of the default
            out[1, 0, 0] = np.nextafter(out[1, 0, 0], np.float32(9))
        return out

    monkeypatch.setattr(Scripted, "predict", nudged)
    with pytest.raises(UserError, match=r"a.h5 frame 1: the prediction differs from the stored one by \S+e-0"):
        evaluate.main([*words, "--replay", str(stored)])
    shorter = Scripted(0.5)
    shorter.targets["a.h5"] = shorter.targets["a.h5"][:3]
    monkeypatch.setitem(sys.modules, "scripted", SimpleNamespace(load_policy=lambda *_: shorter))
    with pytest.raises(UserError, match="the 3 frames here are not the 4 of"):
        evaluate.main([*words, "--replay", str(stored)])
    content = bytearray(stored.read_bytes())
    content[len(content) // 8] ^= 1
    stored.write_bytes(content)
    for path, why in {"gone.npz": "FileNotFound", str(stored): "Bad CRC-32"}.items():
        with pytest.raises(UserError, match=f"--replay {path}: no whole predictions.npz, .*{why}"):
            evaluate.main([*words, "--replay", path])


def test_a_policy_drives(tmp_path, scripted, monkeypatch, capsys):
    """--closed-loop needs no recordings; the report lies where the others do."""
    from test_closed_loop import Walker

    monkeypatch.setitem(sys.modules, "scripted", SimpleNamespace(load_policy=lambda *_: Walker()))
    about(tmp_path / "steps_1/meta.json")
    words = ["--checkpoint", str(tmp_path / "steps_1"), "--closed-loop", "test_closed_loop:Line", "--scenes", "2"]
    report = evaluate.main([*words, "--execute", "2", "--ensemble", "0.1"])
    assert report["success"] == 2 and "ensemble 0.1" in capsys.readouterr().out
    written = json.loads((tmp_path / "steps_1/evaluation/closed_loop.json").read_text())
    assert (written["script"], written["execute"], written["ensemble"]) == ("scripted", 2, 0.1)


class Seeing(Scripted):
    """Moves as camera1, state and the force say; not by camera2 or the A-scan, and the instruction turns it."""

    def __init__(self):
        super().__init__()
        self.targets["sub/b.h5"][:, 2] += 0.3

    def open_episodes(self, root, names):
        for k, episode in enumerate(super().open_episodes(root, names)):

            def sample(t, target=episode["target"], k=k):
                row, other = target[t], np.full((4, 6, 3), 9, np.uint8)
                images = dict(camera1=np.full((2, 2, 3), row[0] * 10, np.uint8), camera2=other + np.uint8(k))
                sensor = np.tile(np.float32([row[2], t, 7]), (3 + k, 1))
                text = ("left", "right")[k]
                return dict(images=images, state=row[:1], sensor=sensor, instruction=text, right=bool(k))

            yield episode | dict(sample=sample)

    def predict(self, observations):
        out = np.zeros((len(observations), 1, 3), np.float32)
        for row, o in zip(out, observations, strict=True):
            seen, known = o["images"]["camera1"].mean() / 10, o["state"][0]
            row[0, :2] = 0.5 * seen + 0.5 * known + 0.2 * (o["instruction"] != ("left", "right")[o["right"]]), 5
            row[0, 2] = 0 if o["sensor"] is None else o["sensor"][-1, 0]
        return out


def test_what_a_policy_uses(tmp_path):
    """Swapped inputs hurt where they are used and nowhere else."""
    policy = Seeing()
    records = evaluate.evaluate(policy, "")
    report = evaluate.summarise(records, policy.action_names())
    uses = evaluate.find_uses(policy, "", None, records, report, 64, 3)
    assert uses["own"][""] == pytest.approx(report["policy"]["relative"]) == pytest.approx(0, abs=1e-6)
    same = {(name, how) for name, changed in uses.items() for how, error in changed.items() if error < 1e-6}
    unused = {("camera2", "swapped"), ("camera2", "blanked"), ("A-scan", "swapped"), ("colours", "reversed")}
    assert same == {("own", ""), *unused}  # the images are grey
    names = "own camera1 camera2 all_images colours state sensor force A-scan instruction"
    assert set(uses) == {name.replace("_", " ") for name in names.split()}
    assert uses["camera1"] != uses["state"] and uses["all images"]["swapped"] == uses["camera1"]["swapped"]
    evaluate.draw_worst(policy, "", None, records, report, policy.action_names(), tmp_path / "worst.png", count=1)
    assert (tmp_path / "worst.png").stat().st_size > 5000  # cameras may differ in size
    assert uses["instruction"]["swapped"] == pytest.approx(0.2 / report["mean action"]["per_dim"]["x"] / 2)
    alone = evaluate.find_uses(policy, "", ["a.h5"], records[:4], report, 64, 3)  # frames 0, 2 and 1, 3 change places
    assert alone["camera1"]["swapped"] > 0.2 and alone["camera2"]["swapped"] < 1e-6
    policy.opposites = dict(left="left", right="right")  # what must lead elsewhere is known, and comes first
    assert "instruction" not in evaluate.find_uses(policy, "", None, records, report, 64, 3)


def test_other_recordings_need_names(tmp_path, scripted):
    about(tmp_path / "steps_1/meta.json", validation=["gone.h5"])
    words = ["--checkpoint", str(tmp_path / "steps_1"), "--data", "DATA", "--plots", "0"]
    with pytest.raises(UserError, match="'DATA' has no episode 'gone.h5'. .*checkpoint's validation.*--episodes NAME"):
        evaluate.main(words)
    with pytest.raises(UserError, match="'DATA' has no episode 'x.h5'$"):
        evaluate.main([*words, "--episodes", "x.h5"])
    evaluate.main([*words, "--episodes", "all"])
    assert len(json.loads((tmp_path / "steps_1/evaluation/report.json").read_text())["episodes"]) == 2
    with pytest.raises(UserError, match="scripted.py reads one folder"):
        evaluate.main([*words[:4], "MORE"])


WRONG = {
    "": "--data are needed",
    "--data b --stride 0": "--stride is 0: expected 1 or more",
    "--data b --uses -1": "--uses is -1: expected 0 or more",
    "--data b --device cuda:99": "--device cuda:99: ",
    "--data b --device meta": "--device meta: ",
    "--data b --scenes 3 --ensemble 0": "--scenes, --ensemble would have no effect with --data",
    "--data b --scenes 3 --closed-loop demo_scenes:Turntable": "--data would have no effect with --closed_loop",
    "--data b --replay c --output d": "--output would have no effect with --replay",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_command_is_refused_before_anything_is_opened(words):
    with pytest.raises(UserError, match=WRONG[words]):
        evaluate.main(["--checkpoint", "a", *words.split()])


def test_korean_names_are_drawn_where_a_font_can(monkeypatch):
    font = font_manager.FontEntry(fname=font_manager.findfont("DejaVu Sans"), name="NanumGothic")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [font, *font_manager.fontManager.ttflist])
    importlib.reload(evaluate)
    assert rcParams["font.family"] == ["DejaVu Sans", "NanumGothic"]
