"""docs/new_experiment.md: the variant that the page shows is a script that trains, saves, loads and predicts."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np

from test_async import metrics, open_data, run, sessions_root  # noqa: F401  a fixture

ROOT = Path(__file__).resolve().parent.parent


def variant():
    """-> (text of train_mine.py, number of changed lines): the page's diff on train_diffusion.py."""
    page, source = (ROOT / "docs" / "new_experiment.md").read_text(), (ROOT / "train_diffusion.py").read_text()
    lines = re.search(r"^```diff\n(.*?)^```$", page, re.M | re.S)[1].splitlines(keepends=True)
    hunks = "".join("@@\n" if line.startswith("@@") else line for line in lines).split("@@\n")[1:]
    for hunk in hunks:
        rows = hunk.splitlines(keepends=True)
        old, new = ("".join(row[1:] for row in rows if row[0] in kinds) for kinds in (" -", " +"))
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source, sum(row[0] in "+-" for hunk in hunks for row in hunk.splitlines())


def test_the_variant_of_the_page_trains(sessions_root, qwen_dir, tmp_path, monkeypatch):  # noqa: F811
    source, changed = variant()
    assert changed <= 60
    (tmp_path / "train_mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("train_mine")
    monkeypatch.setitem(sys.modules, "train_mine", mine)
    run(sessions_root, qwen_dir, tmp_path / "out", mine, max_steps=30, log_steps=10, lr=3e-3, num_layers=1)
    losses = [row["train/noise_loss"] for row in metrics(tmp_path / "out") if "train/noise_loss" in row]
    assert losses[-1] < losses[0] and (tmp_path / "out" / "flow_best.pt").is_file()
    policy = mine.load_policy(tmp_path / "out", "cpu")
    _, _, dataset = open_data(sessions_root, qwen_dir, script=mine)
    chunk = policy.predict([dataset[(0, 3)]], samples=2)
    assert chunk.shape == (1, 8, 7) and np.isfinite(chunk).all() and (chunk[..., 6] == 1).all()


def test_the_flow_is_a_straight_line():
    """A velocity that knows the action walks any noise back to it, in any number of steps."""
    import torch

    scope = {}
    source, _ = variant()
    exec(source[source.index("class Flow") : source.index("class DiffusionVLA")], dict(torch=torch), scope)
    flow, noise = scope["Flow"](100), torch.randn(3, 8, 7)
    action = torch.rand(3, 8, 7) * 2 - 1
    assert torch.allclose(flow.add_noise(action, noise, torch.tensor([99, 49, 0]))[0], noise[0])
    for steps in (1, 4, 10):
        assert torch.allclose(flow.walk(lambda x, t: noise - action, noise, steps), action, atol=1e-5)
