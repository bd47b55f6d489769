"""Normalisation statistics: known answers, the file, its refusals, and the way to training units and back."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common import UserError, lerobot
from common.stats import FORMAT_VERSION, LISTS, MODES, Normalizer, compute_stats, load_stats, save_stats

DEFINITION = dict(source="ee_pose_delta", dim=2, rotation_unit="rad")
ACTION = dict(mean=[0.0, 1.0], std=[1.0, 2.0], min=[-3.0, -4.0], max=[3.0, 4.0], q01=[-2.0, -3.0], q99=[2.0, 3.0])
ACTION |= dict(mask=[True, True], count=100)


def entry(*columns):
    return compute_stats({"action": [np.array(columns, float).T]})["action"]


def file_of(**changes):
    about = dict(format_version=FORMAT_VERSION, num_episodes=2, num_frames=100, action_definition=DEFINITION)
    return about | dict(episodes=["a.h5", "b.h5"], excluded_episodes=["c.h5"], action=ACTION) | changes


# ---- numbers ---------------------------------------------------------------------------------------------------------
def test_known_answers():
    """0..100: quantiles fall on data points. (1, 2, 3, 6): mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5, q01 =
    1 + 0.03 * 1, q99 = 3 + 0.97 * 3."""
    s = compute_stats({"action": [np.arange(60.0)[:, None], np.arange(60.0, 101)[:, None]]})["action"]
    assert (s["min"], s["max"], s["mean"], s["count"], s["mask"]) == ([0], [100], [50], 101, [True])
    np.testing.assert_allclose([s["q01"][0], s["q99"][0], s["std"][0]], [1, 99, np.sqrt(850)])
    s = entry([1, 2, 3, 6], [-1, -1, -1, -1])
    expected = [[3, -1], [np.sqrt(3.5), 0], [1, -1], [6, -1], [1.03, -1], [5.91, -1]]
    np.testing.assert_allclose([s[k] for k in LISTS], expected, atol=1e-12)


def test_sums_are_taken_in_double_precision():
    """100,000 float32 values near 1e4, in parts: a float32 sum would lose the third digit of the spread."""
    x = (1e4 + np.random.default_rng(0).uniform(-1, 1, (100_000, 1))).astype(np.float32)
    stats = compute_stats({"action": [x[:7], x[7:]], "observation.state": [x]})
    assert stats["action"]["std"] == pytest.approx([x.astype(np.float64).std()], rel=1e-9)
    assert stats["action"] == stats["observation.state"]


# ---- the file --------------------------------------------------------------------------------------------------------
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
def test_round_trip_is_exact_and_plain_in_both_forms(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("stats")
    action = dict(zip(LISTS, ([v, 1e-5] for v in values), strict=True)) | dict(mask=[True, False], count=3)
    for stats in (file_of(action=action), file_of(action=entry([0.1, 7], np.float32([1, 3])))):
        for name in ("s.yaml", "s.json"):
            save_stats(folder / name, stats)
            assert load_stats(folder / name, (), DEFINITION, ["c.h5"], ["a.h5"]) == stats
        assert yaml.safe_load((folder / "s.yaml").read_text()) == json.loads((folder / "s.json").read_text()) == stats
    with pytest.raises(UserError, match="s.txt.*must be .yaml, .yml or .json"):
        save_stats(folder / "s.txt", stats)


def without(name):
    return dict(action={k: v for k, v in ACTION.items() if k != name})


REFUSED = {
    "no action": (dict(action=None), {}, "has no complete 'action'"),
    "no q01": (without("q01"), {}, "has no complete 'action'"),
    "no state": ({}, dict(keys=["action", "observation.state"]), "has no complete 'observation.state'"),
    "version": (dict(format_version=0), {}, "format_version 0, this code reads"),
    "source": ({}, dict(definition=DEFINITION | dict(source="action")), "computed for actions"),
    "unit": ({}, dict(definition=DEFINITION | dict(rotation_unit="deg")), "'rad'.* this run trains on .*'deg'"),
    "validation inside": ({}, dict(held_out=["c.h5", "b.h5"]), r"1 episode\(s\) that this run validates on, e.g. b.h5"),
    "other data": ({}, dict(trained=["x.h5"], held_out=["y.h5"]), "other data: 2 episodes, none used here"),
}
WRONG = dict(mean=[0.0], q99=[1.0, float("nan")], max=[1.0, float("inf")], min=[None, 0.0], std=0.5, mask=[True])
for key, value in WRONG.items():
    REFUSED[f"wrong {key}"] = (dict(action=ACTION | {key: value}), {}, "lists of the same length, of finite numbers")
REFUSED["order"] = (dict(action=ACTION | dict(min=[3.5, -4.0])), {}, "min <= max")


@pytest.mark.parametrize("changes,arguments,words", REFUSED.values(), ids=list(REFUSED))
def test_refusals(tmp_path, changes, arguments, words):
    """Each names the file, what is wrong and the command that makes a right one."""
    path = tmp_path / "dataset_stats.yaml"
    save_stats(path, file_of(**changes))
    with pytest.raises(UserError, match=words) as error:
        load_stats(path, **(dict(keys=["action"], command="THE COMMAND") | arguments))
    assert str(path) in str(error.value) and "Make it with: THE COMMAND" in str(error.value)


OTHER = [("a.json", b"{"), ("a.yaml", b"a: [1"), ("a.yaml", b""), ("a.yaml", b"some words"), ("a.json", b"[1, 2]")]


@pytest.mark.parametrize("name,content", [*OTHER, ("a.yaml", b"\xff\xfe\x00\x01")])
def test_a_file_that_holds_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is not a statistics file.*compute_stats.py"):
        load_stats(tmp_path / name)
    with pytest.raises(UserError, match="none.yaml not found.*python compute_stats.py --dataset.root_dir"):
        load_stats(tmp_path / "none.yaml")


# ---- Normalizer ------------------------------------------------------------------------------------------------------
def test_normalizer_known_answers():
    s = dict(mean=[1.0], std=[2.0], min=[-10.0], max=[30.0], q01=[-1.0], q99=[3.0])
    x = np.array([[-1.0], [1.0], [2.0], [3.0], [30.0], [-10.0], [50.0]])
    for mode, clip, expected in (
        ("q01_q99", True, [-1, 0, 0.5, 1, 1, -1, 1]),
        ("q01_q99", False, [-1, 0, 0.5, 1, 14.5, -5.5, 24.5]),
        ("min_max", True, [-0.55, -0.45, -0.4, -0.35, 1, -1, 1]),
        ("min_max", False, [-0.55, -0.45, -0.4, -0.35, 1, -1, 2]),
        ("mean_std", True, [-1, 0, 0.5, 1, 14.5, -5.5, 24.5]),
        ("identity", True, x[:, 0]),
    ):
        n = Normalizer(s, mode, clip)
        y = n.normalize(x)
        assert y.dtype == np.float32 and y.shape == x.shape
        np.testing.assert_allclose(y[:, 0], expected, atol=1e-6)
        if not clip:
            np.testing.assert_allclose(n.unnormalize(y), x, atol=1e-5)
    np.testing.assert_allclose(Normalizer(s).unnormalize(np.array([[-1.0], [0.5], [1.0]]))[:, 0], [-1, 2, 3])


def test_unknown_mode_and_missing_numbers():
    with pytest.raises(UserError, match="'zscore': expected q01_q99, min_max, mean_std"):
        Normalizer(entry([1, 2, 3]), "zscore")
    with pytest.raises(UserError, match="lack .'q01'"):
        Normalizer(dict(mean=[0.0], std=[1.0]))
    assert Normalizer(dict(mean=[0.0], std=[1.0]), "mean_std").dim == 1  # LeRobot writes no quantiles


@given(st.sampled_from(list(MODES)), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(-6, 6))
def test_round_trip(mode, dims, seed, magnitude):
    """Inside the range (q01..q99, min..max, anywhere) the way there and back is the identity, at every scale."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(200, dims)) + rng.normal(size=dims)) * 10.0**magnitude
    s = compute_stats({"action": [x]})["action"]
    n = Normalizer(s, mode)
    inside = np.clip(x, s["q01"], s["q99"]) if mode == "q01_q99" else x
    y = n.normalize(inside.reshape(10, 20, dims))
    assert n.dim == dims and y.shape == (10, 20, dims) and np.isfinite(y).all()
    if n.clip:
        assert np.abs(y).max() <= 1 and np.abs(y).max() > 0.99
    np.testing.assert_allclose(n.unnormalize(y).reshape(200, dims), inside, atol=3e-6 * np.abs(x).max())


@pytest.mark.parametrize("mode", ["q01_q99", "min_max", "mean_std"])
@pytest.mark.parametrize("value", [0.0, 1e-9, -3.7, 12345.678])
def test_constant_dims_survive(mode, value):
    """0 in training units whatever comes in, the constant on the way back; float32 noise is no motion."""
    noisy = np.full(1000, value, np.float32).astype(float)
    noisy[::2] = np.nextafter(np.float32(value), np.float32(np.inf)) if value and abs(value) > 1e-8 else value
    n = Normalizer(entry(np.random.default_rng(0).normal(size=1000), np.full(1000, value), noisy), mode)
    y = n.normalize(np.array([[0.3, value, value], [0.3, value + 5, value + 5]]))
    assert np.isfinite(y).all() and (y[:, 1:] == 0).all() and y[0, 0] != 0
    back = n.unnormalize(np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(back[:, 1:], value, rtol=2e-7)


def test_a_rare_jump_survives():
    """A gripper that closes in 0.5 % of the frames: q01 = q99 = 0, yet open and closed must stay apart."""
    for jump in (1.0, -1.0):
        s = entry(np.where(np.arange(1000) < 5, jump, 0.0), np.linspace(-1, 1, 1000))
        assert s["q01"][0] == s["q99"][0] == 0
        y = Normalizer(s).normalize(np.array([[0.0, 0.0], [jump, 0.0]]))
        assert abs(y[0, 0] - y[1, 0]) == 2
        np.testing.assert_allclose(Normalizer(s).unnormalize(y)[:, 0], [0, jump], atol=1e-7)


def test_masked_dims_pass_unchanged_and_so_do_the_inputs():
    s = entry(np.arange(100.0), np.arange(100.0)) | dict(mask=[True, False])
    n, x = Normalizer(s), np.array([[50.0, 1234.5], [-9.0, 0.25]])
    np.testing.assert_array_equal(n.unnormalize(n.normalize(x))[:, 1], [1234.5, 0.25])
    assert n.normalize(x)[1, 0] == -1
    mean_std = Normalizer(s, "mean_std", clip=False)  # what an export tells LeRobot, which knows no mask
    exported = lerobot._statistics(mean_std, mean_std, {"action": s, "observation.state": s})
    assert (exported["action.mean"][1], exported["action.std"][1], exported["observation.state.std"][1]) == (0, 1, 1)
    np.testing.assert_array_equal(x, [[50.0, 1234.5], [-9.0, 0.25]])
    del s["mask"]
    assert Normalizer(s).mask.all(), "a file without a mask normalises everything"
