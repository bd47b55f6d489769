"""Seeded faults: two axes swapped, statistics of another set, a chunk off by one, BGR for RGB, a stale feature cache.
Each is refused or named in the report; a good policy, a poor one and one that does nothing are accused of nothing.
A stale cache: test_vl_cache.py."""

import json
import re
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import train_nora
from common import UserError
from common.policy import Contract
from common.stats import Normalizer, compute_stats, save_stats

H, EPISODES, FRAMES = 4, 6, 40  # rows of a chunk
NAMES = [("dx", "mm"), ("dy", "mm"), ("roll", "rad")]


def recordings(absolute=False):
    """{name: (M, 3)}: every episode moves in its own way, every dimension in another."""
    rng, found = np.random.default_rng(0), {}
    for k in range(EPISODES):
        way = np.cumsum(rng.standard_normal((FRAMES, 3)), axis=0) * [0.2, 0.15, 0.1]
        motion = (way - way.mean(0)).clip(-2, 2)
        found[f"{k}.h5"] = (np.float32([3, -2, 1]) + np.cumsum(0.2 * motion, 0) if absolute else motion).astype("f4")
    return found


class Arm:
    """Reads dx from the red channel of the image, dy from the green one, roll from the state; blue says nothing.
    `then` (H + 4, 3) -> (H, 3): what it makes of the rows from two before to two behind its chunk."""

    opposites = {}

    def __init__(self, then=lambda rows: rows[2:-2], absolute=False, pictures=lambda image: image):
        self.then, self.pictures, self.targets = then, pictures, recordings(absolute)
        self.absolute, self.calls = absolute, 0
        self.stats = compute_stats(dict(action=list(self.targets.values())))

    def action_names(self):
        return NAMES

    def reset(self):
        self.calls = 0

    def open_episodes(self, root, names):
        for name, target in self.targets.items():

            def sample(t, target=target):
                rows = target[np.clip(np.arange(t - 2, t + H + 2), 0, FRAMES - 1)]
                image = np.random.default_rng(t).integers(0, 256, (len(rows), 2, 3)).astype(np.uint8)
                image[..., 0], image[..., 1] = self.encode(rows[:, :1]), self.encode(rows[:, 1:2])
                before = target[max(t - 1, 0)]
                return dict(images=dict(camera1=self.pictures(image)), state=rows[:, 2], before=before)

            hold = np.concatenate([target[:1], target[:-1]]) if self.absolute else np.zeros_like(target)
            yield dict(name=name, sample=sample, target=target, hold=hold, phase=None)

    @staticmethod
    def encode(value):
        return np.round(128 + 12 * value).clip(0, 255).astype(np.uint8)

    def predict(self, observations):
        chunks, self.calls = [], self.calls + 1
        for k, o in enumerate(observations):
            image = o["images"]["camera1"].astype(float)
            rows = np.stack([(image[:, 0, 0] - 128) / 12, (image[:, 0, 1] - 128) / 12, o["state"]], axis=1)
            self.rng, self.before = np.random.default_rng([self.calls, k]), o["before"]
            chunks.append(self.then(rows))
        return np.float32(chunks)


def faults(policy, uses=24):
    records = evaluate.evaluate(policy, "")
    report = evaluate.summarise(records, NAMES)
    found = evaluate.find_uses(policy, "", None, records, report, uses, 16)
    return evaluate.find_faults(records, NAMES, report, found, np.asarray(policy.stats["action"]["std"]))


def noisy(size, share=1.0):
    """-> predictions of this share of the recorded motion, with noise of `size` times it."""
    policy = Arm()
    spread = np.array(policy.stats["action"]["std"])
    policy.then = lambda rows: share * rows[2:-2] + size * spread * policy.rng.standard_normal((H, 3))
    return policy


def blind():
    """Says what some other episode did there: as large as it should be, and of no use."""
    policy = Arm()
    others = np.concatenate(list(policy.targets.values()))
    policy.then = lambda rows: others[(i := policy.rng.integers(len(others) - H)) : i + H]
    return policy


def still(absolute):
    policy = Arm(absolute=absolute)
    policy.then = lambda rows: np.tile(policy.before if absolute else np.zeros(3), (H, 1))
    return policy


GOOD = dict(
    right=Arm,
    right_targets=lambda: Arm(absolute=True),
    noisy=lambda: noisy(0.8),
    timid_and_noisy=lambda: noisy(0.3, share=0.4),
    nothing_but_noise=lambda: noisy(1.0, share=0.0),
    another_episodes=blind,
    hold_still=lambda: still(False),
    repeat_the_last_target=lambda: still(True),
    mean_action=lambda: Arm(lambda rows: np.tile(np.mean(list(recordings().values()), (0, 1)), (H, 1))),
)


@pytest.mark.parametrize("name", GOOD)
def test_a_policy_without_a_fault_is_accused_of_nothing(name):
    assert faults(GOOD[name]()) == []


def columns(*order, sign=(1, 1, 1), shift=0, size=0.0):
    """The chunk with its columns in this order, from `shift` rows later, with noise."""
    rng = np.random.default_rng(1)

    def then(rows):
        chunk = rows[2 + shift : 2 + shift + H, order] * sign
        return chunk + size * rng.standard_normal(chunk.shape)

    return then


def unnormalized(policy, other):
    """Normalised with the training's statistics, and brought back with another set's."""
    own, other = Normalizer(policy.stats["action"]), Normalizer(other["action"])
    policy.then = lambda rows: other.unnormalize(own.normalize(rows[2:-2]))
    return policy


def other_statistics(scale, offset):
    return unnormalized(Arm(), compute_stats(dict(action=[t * scale + offset for t in recordings().values()])))


def reverse(image):
    return np.ascontiguousarray(image[..., ::-1])


SAID = dict(
    axes=(lambda: Arm(columns(1, 0, 2)), ["dx and dy look swapped: error .* x the motion as it is, 0.0"]),
    quarter_turn=(lambda: Arm(columns(1, 0, 2, sign=(-1, 1, 1), size=0.2)), ["dx and dy look swapped"]),
    sign=(lambda: Arm(columns(0, 1, 2, sign=(1, 1, -1))), ["roll looks turned: error 2 x .* as it is, 0 x"]),
    millimetres=(lambda: other_statistics(1000, 0), [f"{n} is .*e.* x as large as recorded" for n, _ in NAMES]),
    spread=(lambda: other_statistics([3, 0.3, 1], 0), ["dx is (3|2.*) x as large", "dy is 0.3.* x as large"]),
    zero=(lambda: other_statistics(1, [0, 0, 5]), [r"roll is \+\d.* std off on the mean"]),
    one_later=(lambda: Arm(columns(0, 1, 2, shift=1)), ["the chunk fits best 1 row later: relative error 0.0.* off"]),
    targets_earlier=(lambda: Arm(columns(0, 1, 2, shift=-2), absolute=True), ["the chunk fits best 2 rows earlier"]),
    targets_later=(lambda: Arm(columns(0, 1, 2, shift=1), absolute=True), ["the chunk fits best 1 row later"]),
    bgr=(lambda: Arm(pictures=reverse), ["with red and blue exchanged the error is 0.0.* images in BGR"]),
)


@pytest.mark.parametrize("name", SAID)
def test_a_fault_is_named(name):
    """That one and, but for what it brings with it, no other."""
    make, wanted = SAID[name]
    said = faults(make())
    assert len(said) == len(wanted), said
    for text, pattern in zip(said, wanted, strict=True):
        assert re.match(pattern, text), text


def test_the_report_says_it(tmp_path, monkeypatch, capsys):
    """On the screen, in report.json and in report.html."""
    monkeypatch.setitem(sys.modules, "arm", SimpleNamespace(load_policy=lambda *_: Arm(columns(1, 0, 2))))
    monkeypatch.setattr(evaluate, "ROOT", tmp_path)
    (tmp_path / "arm.py").write_text("")
    (tmp_path / "meta.json").write_text(json.dumps(dict(script="arm", validation=[])))
    evaluate.main(["--checkpoint", str(tmp_path), "--data", "D", "--plots", "0", "--stride", "3", "--uses", "8"])
    (said,) = json.loads((tmp_path / "evaluation/report.json").read_text())["faults"]
    assert said.startswith("dx and dy look swapped") and f"CHECK: {said}" in capsys.readouterr().out
    assert f"CHECK: {said}" in (tmp_path / "evaluation/report.html").read_text()


# ---- refused ---------------------------------------------------------------------------------------------------------
def test_a_prediction_that_is_no_number_is_refused():
    with pytest.raises(UserError, match=r"0.h5 frame 0: the policy predicts \[nan, .*its checkpoint is damaged"):
        faults(Arm(lambda rows: rows[2:-2] * np.nan))


def test_statistics_of_another_model_are_refused(tmp_path):
    """NORA's are a file of their own beside the weights."""
    definition = dict(source="ee_pose_delta", dim=3, rotation_unit="rad")
    for name, scale in (("own", 1), ("other", 2)):
        stats = compute_stats(dict(action=[t * scale for t in recordings().values()]))
        about = dict(format_version=1, num_episodes=6, num_frames=240, action_definition=definition)
        save_stats(tmp_path / f"{name}.json", about | stats)
    action = json.loads((tmp_path / "own.json").read_text())["action"]
    contract = dict(script="train_nora", images={}, actions=NAMES, horizon=H, rate_hz=10, kind="delta", first_row="now")
    contract |= dict(action_low=action["min"], action_high=action["max"])
    about = dict(format_version=train_nora.FORMAT, action_definition=definition, contract=asdict(Contract(**contract)))
    about |= dict(image_size=[56, 56], task_instruction="", state_keys=[])
    (tmp_path / "policy.json").write_text(json.dumps(about))
    shutil.copy(tmp_path / "own.json", tmp_path / "dataset_stats.json")
    with pytest.raises(UserError, match="fast"):  # the statistics are taken, and what is missing next is named
        train_nora.read_exported(tmp_path)
    shutil.copy(tmp_path / "other.json", tmp_path / "dataset_stats.json")
    with pytest.raises(UserError, match="dataset_stats.json belongs to another model: policy.json has other"):
        train_nora.read_exported(tmp_path)
