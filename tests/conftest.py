"""Shared by all tests: one thread per process, and tiny data sets written once per session by make_demo.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tests fork, and two busy cores beat eight waiting threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

import hypothesis
import pytest
import torch

import make_demo

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
# the same examples on every run: a red test stays red until the code changes
how = dict(deadline=None, derandomize=True, database=None, max_examples=60)
how["suppress_health_check"] = [hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture]
hypothesis.settings.register_profile("repeatable", **how)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def insertion_root(tmp_path_factory):
    """Folder with 4 JPEG episodes of 14 frames, 60 x 80 pixels, mm and rad, with phase, instruction and timestamp."""
    folder = tmp_path_factory.mktemp("insertion")
    make_demo.write_insertion(folder, episodes=4, layout="jpeg", size=(60, 80), max_frames=14)
    return folder


@pytest.fixture(scope="session")
def qwen_dir(tmp_path_factory):
    """A random Qwen2.5-VL small enough for a forward pass in milliseconds."""
    return make_demo.write_qwen2_5_vl(tmp_path_factory.mktemp("qwen2_5_vl"), text=(64, 2), vision=(32, 2))


@pytest.fixture(scope="session")
def fast_dir(tmp_path_factory):
    """A FAST tokenizer in the public file layout."""
    return make_demo.write_fast(tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def no_plot():
    """Drawing takes longer than a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.run.plot_loss", lambda *_: "")
        yield


@pytest.fixture(scope="session")
def recipe_of(tmp_path_factory):
    """recipe_of(name) -> a recipe of recipes.py, its data and backbone on disk."""
    from recipes import RECIPES  # which imports every script

    def get(name):
        recipe = RECIPES[name]
        recipe.written = recipe.written or recipe.write(tmp_path_factory.getbasetemp() / "recipes")
        return recipe

    return get


@pytest.fixture(scope="session")
def shared():
    """The folder of real-format recordings beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist: the real-format recordings are not part of the repository")
    return folder
