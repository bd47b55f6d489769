"""common/policy.py: what a policy refuses, what it warns of and counts, what it says of itself; whose images are
swapped in. And of every script: its policy directory alone predicts what the training did, to the bit."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from recipes import RECIPES, newest

import evaluate
from common import UserError
from common.policy import Contract, partners


def contract(**changes):
    values = dict(script="train_x", images={"camera1": (96, 128), "camera2": (48, 64)}, horizon=4, rate_hz=14.9)
    values |= dict(actions=[("x", "mm"), ("roll", "rad")], kind="delta", first_row="row 0: from now to the next frame")
    values |= dict(state=[("x", "mm"), ("y", "mm")], low=[-10, 0], high=[10, 0], instructions=["insert"])
    return Contract(**values | changes)


def observation(**changes):
    images = dict(camera1=np.zeros((96, 128, 3), np.uint8), camera2=np.zeros((480, 640, 3), np.uint8))
    return dict(images=images, state=[0.0, 0.0], instruction="insert") | changes


def with_image(picture):
    return observation(images=observation()["images"] | dict(camera2=picture))


class Doubling:
    """A policy that counts how often it was called, and forgets it."""

    def __init__(self, contract):
        self.contract, self.calls = contract, 0

    def reset(self):
        self.calls = 0

    def predict(self, observations):
        self.contract.check(observations)
        self.calls += 1
        return np.zeros((len(observations), 4, 2), np.float32)


WRONG = [
    (observation(images={"camera1": np.zeros((96, 128, 3), np.uint8)}), "images are .'camera1'., .*camera2 is missing"),
    (with_image(np.zeros((48, 64, 3), np.float32)), "camera2 is float32 .48, 64, 3., expected uint8"),
    (with_image(np.zeros((3, 48, 64), np.uint8)), r"camera2 is uint8 \(3, 48, 64\)"),
    (with_image(np.zeros((64, 64, 3), np.uint8)), "camera2 is 64x64, in training it was 64x48: another aspect"),
    (observation(images=None), "images are ....*camera1 is missing"),
    (observation(images=[with_image(0)["images"]["camera1"]]), "images are a list, not a dict, .* camera1 is miss"),
    (observation(images=with_image(0)["images"]["camera1"]), "images are a ndarray, not a dict"),
    (observation(instruction=7), "instruction is 7, the policy needs a text, e.g. 'insert'"),
    (observation(state=[0.0, 0.0, 0.0]), r"state has shape \(3,\), the policy needs x \(mm\), y \(mm\)"),
    (observation(state=None), r"state has shape \(\), the policy needs"),
    (observation(state=[0.0, np.nan]), "state is not finite"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_an_observation_that_does_not_match_is_refused(wrong, message):
    c = contract()
    c.check([observation()])
    with pytest.raises(UserError, match=message):
        c.check([observation(), wrong])
    for nothing in ([], observation(), ["camera1"]):
        with pytest.raises(UserError, match="no observation was given: predict takes a list of one or more dicts"):
            c.check(nothing)
    assert not c.warned


def test_a_policy_takes_what_it_does_not_need_or_know():
    """Other cameras beside; features instead of images; frames of one camera; sizes that were not recorded; no text
    where it has its own."""
    o = observation()
    contract().check([o | dict(images=o["images"] | dict(other=None)), dict(vl_features=0, state=[0, 0])])
    contract(images={"camera2": None}, state=[]).check([with_image(np.zeros((64, 64, 3), np.uint8))])
    frames = [np.zeros((96, 128, 3), np.uint8)] * 2
    contract(images={"camera1": (96, 128)}).check([observation(images=frames)], frames=True)
    without = {key: value for key, value in o.items() if key != "instruction"}
    contract().check([without, observation(instruction=None)])
    for o in (without, observation(instruction=None)):
        with pytest.raises(UserError, match="instruction is None, the policy needs a text, e.g. 'insert'"):
            contract(must_be_told=True).check([o])


def test_what_is_unlike_the_training_is_said_once_and_counted(capsys):
    """Range -10 to 10: half of it beyond is far; a constant state may differ by rounding."""
    c = contract()
    c.check([observation(state=[19.9, 1e-7])])
    assert not c.warned and not capsys.readouterr().out
    for _ in range(3):
        c.check([observation(state=[-20.1, 0.0])])
    c.check([observation(state=[0.0, 0.5], instruction="extract")])
    assert dict(c.warned) == {"state x": 3, "state y": 1, "instruction": 1}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and "x is -20.1 mm, in training it was -10 to 10" in said[0]
    assert "not trained on 'extract', but on 'insert'" in said[2]


def test_describe_is_plain_and_leaves_the_policy_as_new():
    c = contract(action_low=np.float32([-3, -0.25]), action_high=np.float32([3, 0.25]), needs={"vlm": "/nas/vlm"})
    policy = Doubling(c)
    about = c.describe(policy)
    assert policy.calls == 0 and not c.warned and about.pop("latency_ms") >= 0
    assert json.loads(json.dumps(about)) == about
    assert about["cameras"] == {"camera1": dict(height=96, width=128), "camera2": dict(height=48, width=64)}
    assert about["state"][0] == dict(name="x", unit="mm", low=-10.0, high=10.0)
    assert about["actions"][1] == dict(name="roll", unit="rad", low=-0.25, high=0.25)
    assert about["needs"] == {"vlm": "/nas/vlm"} and about["rate_hz"] == 14.9 and about["kind"] == "delta"
    with pytest.raises(AssertionError, match="the contract says .1, 5, 2."):
        contract(horizon=5).describe(policy)
    again = Contract(**json.loads(json.dumps(dataclasses.asdict(c))))  # as a checkpoint keeps it
    again.check([observation()])
    assert again.describe(Doubling(again)) | dict(latency_ms=0) == about | dict(latency_ms=0)


def test_partners_by_hand():
    """Nearest progress in another episode; of equally near ones the next in order."""
    episodes, progress = ["a", "a", "b", "b", "c"], [0.0, 0.6, 0.1, 0.9, 0.5]
    assert partners(episodes, progress).tolist() == [2, 4, 0, 1, 1]
    assert partners([0, 1, 2], [1, 1, 1]).tolist() == [1, 2, 0]
    assert partners([0, 0, 1, 1], [1, 2, 2, 1]).tolist() == [3, 2, 1, 0] and partners([0, 0], [0, 1]) is None
    tracemalloc.start()
    assert partners(np.arange(1000) % 5, np.arange(1000)).tolist() == [*range(1, 1000), 998]
    assert tracemalloc.get_traced_memory()[1] < 2e6  # a table of all pairs of 50 sessions was 35 GB
    tracemalloc.stop()


# ---- every script: a policy directory in a fresh process -------------------------------------------------------------

ALL = dict(val_samples=99, val_decode_samples=99, learning_rate=1e-2, steps=20, val_frequency=20)
# the method that validation predicts with, what makes the last step validate all frames, and the policy's directory
LAST = {
    "async": ("decode", dict(epochs=1, steps=None), lambda out: out / "qwen_vla_async_best.pt"),
    "diffusion": ("decode", dict(epochs=1, steps=None, predict_draws=2), lambda out: out / "diffusion_stage1_best.pt"),
    "nora": ("decode", ALL, lambda out: newest("steps_*")(out) / "model"),
    "smolvla": ("decode", {}, lambda out: out / "checkpoints/final_hf"),
    "openvla": ("answer", dict(samples="first", val_samples=99), lambda out: next(out.glob("*/meta.json")).parent),
}
OVER = dict(trainer__max_epochs=1, steps=0, label_offset=0)
LAST["mobile"] = ("rollout", OVER, lambda out: out / "checkpoints/last.ckpt")
FRESH = """
import importlib, pickle, sys, numpy as np
script, policy, jobs, answers = sys.argv[1:]
policy = importlib.import_module(script).load_policy(policy, "cpu")
found, views = [], {}
def turned(image):  # the view that image[..., ::-1] makes of a BGR image
    own = np.ascontiguousarray(np.asarray(image)[..., ::-1])[..., ::-1]
    return views.setdefault(id(image), (own, image))[0]
jobs = pickle.load(open(jobs, "rb"))
for o in (o for observations, _ in jobs for o in observations):
    images = o.get("images") or {}
    if isinstance(images, dict):
        o |= dict(images={name: turned(image) for name, image in images.items()}) if images else {}
    else:
        o["images"] = list(map(turned, images))
for observations, noise in jobs:
    own = noise is None  # else predict draws its own, of which a validation is independent
    found.append(policy.predict(observations) if own else policy.decode(policy.inputs(observations), noise))
pickle.dump(found, open(answers, "wb"))
"""


def watched(recipe, method, monkeypatch):
    """-> [policy of the last validation, what it predicted then (rows as bytes), the noises of its batches]"""
    seen, script = [None, set(), []], recipe.script
    real = script.validate, getattr(script.Policy, method)

    def predict(policy, *args):
        out = real[1](policy, *args)
        chunks = out[0] if isinstance(out, tuple) else out
        chunks = policy.normalizer.unnormalize(chunks) if method == "rollout" else chunks
        seen[1].update(chunk.tobytes() for chunk in chunks)
        if recipe.name == "train_diffusion" and not any(args[1] is noise for noise in seen[2]):
            seen[2].append(args[1])
        return out

    def validate(*args):
        seen[:] = next(arg for arg in args if isinstance(arg, script.Policy)), set(), []
        with pytest.MonkeyPatch.context() as m:
            m.setattr(script.Policy, method, predict)
            return real[0](*args)

    monkeypatch.setattr(script, "validate", validate)
    return seen


@pytest.mark.parametrize("name", RECIPES)
def test_a_policy_directory_alone_predicts_what_the_validation_did(name, recipe_of, tmp_path, monkeypatch):
    """Moved, in a fresh process, from the images as they were recorded, in the batches of the validation. Images
    may be views, as docs/inference.md makes them of BGR."""
    recipe, (method, last, where) = recipe_of(name), LAST[name]
    every = {key: 4 for key in ("val_frequency", "validation__val_freq", "val_steps") if key in recipe.values}
    predicted = watched(recipe, method, monkeypatch)
    recipe.script.main(recipe.config(tmp_path / "run", **dict(steps=4) | every | last))
    policy, rows, noises = predicted
    names = evaluate.read_about(where(tmp_path / "run"))["validation"]
    jobs = [[e["sample"](t) for t in range(len(e["target"]))] for e in policy.open_episodes(recipe.data(), names)]
    if method != "rollout":  # which is of an episode at once
        frames = sum(jobs, [])
        jobs = [frames[i : i + 2] for i in range(0, len(frames), 2)]
    noises = noises or [None] * len(jobs)
    (tmp_path / "jobs").write_bytes(pickle.dumps(list(zip(jobs, noises, strict=True))))
    moved = (tmp_path / "elsewhere").mkdir() or tmp_path / "elsewhere" / where(tmp_path / "run").name
    where(tmp_path / "run").rename(moved)
    command = [sys.executable, "-c", FRESH, recipe.name, moved, tmp_path / "jobs", tmp_path / "answers"]
    here = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=here, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = np.concatenate(pickle.loads((tmp_path / "answers").read_bytes()))
    assert len({chunk.tobytes() for chunk in answers}) > (name != "nora")  # which learns one answer in 20 steps
    assert [chunk.tobytes() in rows for chunk in answers] == [True] * len(answers)
