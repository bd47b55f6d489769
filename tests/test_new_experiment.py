"""docs/new_experiment.md: the variant that the page shows is a script that trains, saves, loads and predicts."""

import importlib
import re
import sys
from pathlib import Path

import h5py
import numpy as np
import torch

import make_demo
from common.config import parse_config
from test_async import metrics, open_data, run, sessions_root  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent


def variant(script="train_diffusion", block=0):
    """-> (text of train_mine.py, number of changed lines): a diff of the page on this script."""
    page, source = (ROOT / "docs" / "new_experiment.md").read_text(), (ROOT / f"{script}.py").read_text()
    lines = re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S)[block].splitlines(keepends=True)
    hunks = "".join("@@\n" if line.startswith("@@") else line for line in lines).split("@@\n")[1:]
    for hunk in hunks:
        rows = hunk.splitlines(keepends=True)
        old, new = ("".join(row[1:] for row in rows if row[0] in kinds) for kinds in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source, sum(row[0] in "+-" for hunk in hunks for row in hunk.splitlines())


def open_variant(folder, monkeypatch, *which):
    source, changed = variant(*which)
    assert changed <= 60
    (folder / "train_mine.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "train_mine", raising=False)
    monkeypatch.setitem(sys.modules, "train_mine", importlib.import_module("train_mine"))
    return sys.modules["train_mine"]


def test_the_variant_of_the_page_trains(sessions_root, qwen_dir, tmp_path, monkeypatch):  # noqa: F811
    mine = open_variant(tmp_path, monkeypatch)
    noise, action = torch.randn(3, 8, 7), torch.rand(3, 8, 7) * 2 - 1  # the true velocity leads back to the action
    assert torch.allclose(mine.Flow(100).walk(lambda x, t: noise - action, noise, 4), action, atol=1e-5)
    run(sessions_root, qwen_dir, tmp_path / "out", mine, max_steps=30, log_steps=10, lr=3e-3, num_layers=1)
    losses = [row["train/noise_loss"] for row in metrics(tmp_path / "out") if "train/noise_loss" in row]
    assert losses[-1] < losses[0] and (tmp_path / "out" / "flow_best.pt").is_file()
    policy = mine.load_policy(tmp_path / "out", "cpu")
    _, _, dataset = open_data(sessions_root, qwen_dir, script=mine)
    chunk = policy.predict([dataset[(0, 3)]], samples=2)
    assert chunk.shape == (1, 8, 7) and np.isfinite(chunk).all() and (chunk[..., 6] == 1).all()


def test_one_more_input_of_sessions(sessions_root, qwen_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    """--check, training and evaluation take the script's own dataset and collate."""
    mine = open_variant(tmp_path, monkeypatch, "train_async", 1)
    run(sessions_root, qwen_dir, tmp_path / "out", mine, max_steps=2, check=True)
    assert re.search(r"joints +\(4, 6\)", capsys.readouterr().out)
    run(sessions_root, qwen_dir, tmp_path / "out", mine, max_steps=2)
    policy = mine.load_policy(tmp_path / "out", "cpu")
    seen = next(policy.open_episodes(str(sessions_root)))["sample"](3)
    other = policy.predict([seen | dict(joints=seen["joints"] + 90)])
    assert (policy.predict([seen]) != other).any()


def test_one_more_input_of_hdf5_episodes(tmp_path, monkeypatch):
    for path in make_demo.write_insertion(tmp_path, 1, max_frames=8):
        with h5py.File(path, "a") as f:
            f["observations/force"] = np.linspace(0, 5, len(f["action"]))
    mine = open_variant(tmp_path, monkeypatch, "train_nora", 2)
    words = f"--dataset.root-dir {tmp_path} --dataset.state-in-prompt True".split()
    spec = mine.load_data(parse_config(mine.Config, words)).spec
    assert spec.contract.state[-1] == ["force", "N"] and spec.stats["observation.state"]["max"][-1] == 5
    seen = next(mine.Policy(None, None, spec).open_episodes(str(tmp_path)))["sample"](7)
    assert seen["state"].shape == (7,) and seen["state"][-1] == 5
