"""common/policy.py: what a policy refuses, what it warns of and counts, what it says of itself; whose pictures are
swapped in."""

import dataclasses
import json

import numpy as np
import pytest

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
    (observation(images={"camera1": np.zeros((96, 128, 3), np.uint8)}), "images of .'camera1'., .*camera2 is missing"),
    (with_image(np.zeros((48, 64, 3), np.float32)), "camera2 is float32 .48, 64, 3., expected uint8"),
    (with_image(np.zeros((48, 64), np.uint8)), r"camera2 is uint8 \(48, 64\)"),
    (with_image(np.zeros((3, 48, 64), np.uint8)), r"camera2 is uint8 \(3, 48, 64\)"),
    (with_image(np.zeros((64, 64, 3), np.uint8)), "camera2 is 64x64, in training it was 64x48: another aspect"),
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
    with pytest.raises(UserError, match="no observation"):
        c.check([])
    assert not c.warned


def test_a_policy_takes_what_it_does_not_need_or_know():
    """Other cameras beside; features instead of pictures; frames of one camera; sizes that were not recorded."""
    o = observation()
    contract().check([o | dict(images=o["images"] | dict(other=None)), dict(vl_features=0, state=[0, 0])])
    contract(images={"camera2": None}, state=[]).check([with_image(np.zeros((64, 64, 3), np.uint8))])
    frames = [np.zeros((96, 128, 3), np.uint8)] * 2
    contract(images={"camera1": (96, 128)}).check([observation(images=frames)])


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


def test_a_contract_survives_saving():
    c = contract()
    saved = json.loads(json.dumps(dataclasses.asdict(c)))
    again = Contract(**saved)
    again.check([observation()])
    assert again.describe(Doubling(again)).keys() == c.describe(Doubling(c)).keys()
    with pytest.raises(ValueError, match="'positions'"):
        contract(kind="positions")


def test_partners_by_hand():
    """Nearest progress in another episode; of equally near ones the next in order."""
    episodes, progress = ["a", "a", "b", "b", "c"], [0.0, 0.6, 0.1, 0.9, 0.5]
    assert partners(episodes, progress).tolist() == [2, 4, 0, 1, 1]
    assert partners([0, 1, 2], [1, 1, 1]).tolist() == [1, 2, 0]
    assert partners([0, 0, 1, 1], [1, 2, 2, 1]).tolist() == [3, 2, 1, 0]
    assert partners([0, 0], [0, 1]) is None
