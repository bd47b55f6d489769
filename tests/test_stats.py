"""Normalisation statistics: known answers, the file, its refusals, and the way to training units and back."""

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.stats import FORMAT_VERSION, LISTS, Normalizer, compute_stats, load_stats, save_stats

MODES = ("q01_q99", "min_max", "mean_std")
DEFINITION = dict(source="ee_pose_delta", dim=2, rotation_unit="rad")


def entry(*columns):
    return compute_stats({"action": [np.array(columns, float).T]})["action"]


def file_of(**changes):
    action = dict(
        mean=[0.0, 1.0],
        std=[1.0, 2.0],
        min=[-3.0, -4.0],
        max=[3.0, 4.0],
        q01=[-2.0, -3.0],
        q99=[2.0, 3.0],
        mask=[True, True],
        count=100,
    )
    return (
        dict(
            format_version=FORMAT_VERSION,
            num_episodes=2,
            num_frames=100,
            action_definition=DEFINITION,
            excluded_episodes=["c.h5"],
            action=action,
        )
        | changes
    )


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_known_answers():
    """0..100: quantiles fall on data points. (1, 2, 3, 6): mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5, q01 = 1 + 0.03 * 1, q99 = 3 + 0.97 * 3."""
    s = compute_stats({"action": [np.arange(60.0)[:, None], np.arange(60.0, 101)[:, None]]})["action"]
    assert (s["min"], s["max"], s["mean"], s["count"], s["mask"]) == ([0], [100], [50], 101, [True])
    assert (
        s["q01"] == pytest.approx([1]) and s["q99"] == pytest.approx([99]) and s["std"] == pytest.approx([np.sqrt(850)])
    )
    s = entry([1, 2, 3, 6], [-1, -1, -1, -1])
    np.testing.assert_allclose(
        [s[k] for k in LISTS], [[3, -1], [np.sqrt(3.5), 0], [1, -1], [6, -1], [1.03, -1], [5.91, -1]], atol=1e-12
    )


def test_the_split_into_parts_and_keys_changes_nothing():
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    both = compute_stats({"action": [x[:7], x[7:8], x[8:]], "observation.state": [x[:, :1]]})
    assert (
        both["action"] == compute_stats({"action": [x]})["action"]
        and both["observation.state"]["mean"] == both["action"]["mean"][:1]
    )


def test_sums_are_taken_in_double_precision():
    """100,000 float32 values near 1e4: a float32 sum would lose the third digit of the spread."""
    x = (1e4 + np.random.default_rng(0).uniform(-1, 1, (100_000, 1))).astype(np.float32)
    assert compute_stats({"action": [x]})["action"]["std"] == pytest.approx([x.astype(np.float64).std()], rel=1e-9)


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=6, max_size=6))
def test_round_trip_is_exact(tmp_path_factory, suffix, values):
    path = tmp_path_factory.mktemp("stats") / ("s" + suffix)
    stats = file_of(action=dict(zip(LISTS, ([v, 1e-5] for v in values))) | dict(mask=[True, False], count=3))
    save_stats(path, stats)
    assert load_stats(path, definition=DEFINITION, held_out=["c.h5"]) == stats


def test_computed_statistics_are_plain_and_survive_both_forms(tmp_path):
    stats = file_of(
        action=compute_stats({"action": [np.random.default_rng(1).normal(size=(9, 2)).astype(np.float32)]})["action"]
    )
    for name in ("a.yaml", "a.json"):
        save_stats(tmp_path / name, stats)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == json.loads((tmp_path / "a.json").read_text()) == stats


def test_suffix_decides_the_form(tmp_path):
    with pytest.raises(ValueError, match="s.txt.*must be .yaml, .yml or .json"):
        save_stats(tmp_path / "s.txt", file_of())
    assert not (tmp_path / "s.txt").exists()


AGAIN = "python compute_stats.py --dataset.root_dir DATA --output"


def without(name, key="action"):
    return {key: {k: v for k, v in file_of()["action"].items() if k != name}}


@pytest.mark.parametrize(
    "changes,arguments,words",
    [
        (dict(action=None), {}, ["has no complete 'action'"]),
        (without("q01"), {}, ["has no complete 'action'", "q01"]),
        (without("std"), {}, ["has no complete 'action'"]),
        (
            {},
            dict(keys=["action", "observation.state"]),
            ["has no complete 'observation.state'", "it has", "action_definition"],
        ),
        *[
            (
                dict(action=file_of()["action"] | change),
                {},
                ["'action' must have", "lists of the same length, of finite numbers"],
            )
            for change in (
                dict(mean=[0.0]),
                dict(q99=[1.0, float("nan")]),
                dict(max=[1.0, float("inf")]),
                dict(mean=[None, 0.0]),
                dict(mean=0.5),
                dict(mask=[True]),
            )
        ],
        (dict(format_version=0), {}, ["format_version 0", "this code reads"]),
        (dict(format_version=None), {}, ["format_version None"]),
        (
            {},
            dict(definition=DEFINITION | dict(source="action")),
            ["computed for actions", "'ee_pose_delta'", "this run trains on", "'action'"],
        ),
        ({}, dict(definition=DEFINITION | dict(rotation_unit="deg")), ["'rad'", "'deg'"]),
        (
            {},
            dict(held_out=["c.h5", "d.h5", "e.h5"]),
            ["2 episode(s) that this run validates on", "d.h5", "num_val_episodes"],
        ),
    ],
    ids=[
        "no action",
        "no q01",
        "no std",
        "no state",
        "lengths",
        "nan",
        "inf",
        "null",
        "scalar",
        "mask",
        "version",
        "no version",
        "source",
        "unit",
        "validation inside",
    ],
)
def test_refusals(tmp_path, changes, arguments, words):
    """Each names the file, what is wrong and the command that makes a right one."""
    path = tmp_path / "dataset_stats.yaml"
    save_stats(path, file_of(**changes))
    with pytest.raises(ValueError) as error:
        load_stats(path, **(dict(keys=["action"]) | arguments))
    for word in (*words, str(path), f"{AGAIN} {path}"):
        assert word in str(error.value), str(error.value)


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="dataset_stats_sim.yaml not found") as error:
        load_stats(tmp_path / "dataset_stats_sim.yaml")
    assert AGAIN in str(error.value)


@pytest.mark.parametrize(
    "name,content",
    [
        ("a.json", b"{"),
        ("a.yaml", b"a: [1"),
        ("a.yaml", b""),
        ("a.yaml", b"some words"),
        ("a.json", b"[1, 2]"),
        ("a.json", b"3"),
        ("a.yaml", b"\xff\xfe\x00\x01"),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_stats(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and AGAIN in str(error.value)


# ---- Normalizer ------------------------------------------------------------------------------------------------------


def test_normalizer_known_answers():
    s = dict(mean=[1.0], std=[2.0], min=[-10.0], max=[30.0], q01=[-1.0], q99=[3.0])
    x = np.array([[-1.0], [1.0], [2.0], [3.0], [30.0], [-10.0], [50.0]])
    for mode, expected in (
        ("q01_q99", [-1, 0, 0.5, 1, 1, -1, 1]),
        ("min_max", [-0.55, -0.45, -0.4, -0.35, 1, -1, 1]),
        ("mean_std", [-1, 0, 0.5, 1, 14.5, -5.5, 24.5]),
    ):
        y = Normalizer(s, mode).normalize(x)
        assert y.dtype == np.float32 and y.shape == x.shape
        np.testing.assert_allclose(y[:, 0], expected, atol=1e-6)
    np.testing.assert_allclose(Normalizer(s).unnormalize(np.array([[-1.0], [0.5], [1.0]]))[:, 0], [-1, 2, 3])


def test_unknown_mode():
    with pytest.raises(ValueError, match="'zscore': expected q01_q99, min_max or mean_std"):
        Normalizer(entry([1, 2, 3]), "zscore")


@given(st.sampled_from(MODES), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(-6, 6))
def test_round_trip(mode, dims, seed, magnitude):
    """Inside the range (q01..q99, min..max, anywhere) the way there and back is the identity, at every scale and shape."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(200, dims)) + rng.normal(size=dims)) * 10.0**magnitude
    s = compute_stats({"action": [x]})["action"]
    n = Normalizer(s, mode)
    inside = np.clip(x, s["q01"], s["q99"]) if mode == "q01_q99" else x
    y = n.normalize(inside.reshape(10, 20, dims))
    assert n.dim == dims and y.shape == (10, 20, dims) and np.isfinite(y).all()
    if mode != "mean_std":
        assert np.abs(y).max() <= 1 and np.abs(y).max() > 0.99
    np.testing.assert_allclose(n.unnormalize(y).reshape(200, dims), inside, atol=3e-6 * np.abs(x).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 1e-9, -3.7, 0.1, 12345.678])
def test_constant_dims_survive(mode, value):
    """0 in training units whatever comes in, the constant on the way back whatever the model says; float32 noise is no motion."""
    moving = np.random.default_rng(0).normal(size=1000)
    noisy = np.full(1000, value, np.float32).astype(float)
    noisy[::2] = np.nextafter(np.float32(value), np.float32(np.inf)) if value and abs(value) > 1e-8 else value
    n = Normalizer(entry(moving, np.full(1000, value), noisy), mode)
    y = n.normalize(np.array([[0.3, value, value], [0.3, value + 5, value + 5]]))
    assert np.isfinite(y).all() and (y[:, 1:] == 0).all() and y[0, 0] != 0
    back = n.unnormalize(np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(back[:, 1:], value, rtol=2e-7)


def test_a_rare_jump_survives():
    """A gripper that closes in 0.5 % of the frames: q01 = q99 = 0, yet open and closed must stay apart, in both directions."""
    for jump in (1.0, -1.0):
        x = np.zeros(1000)
        x[:5] = jump
        s = entry(x, np.linspace(-1, 1, 1000))
        assert s["q01"][0] == s["q99"][0] == 0
        n = Normalizer(s)
        y = n.normalize(np.array([[0.0, 0.0], [jump, 0.0]]))
        assert abs(y[0, 0] - y[1, 0]) == 2
        np.testing.assert_allclose(n.unnormalize(y)[:, 0], [0, jump], atol=1e-7)


def test_masked_dims_pass_unchanged():
    s = entry(np.arange(100.0), np.arange(100.0)) | dict(mask=[True, False])
    n = Normalizer(s)
    x = np.array([[50.0, 1234.5], [-9.0, 0.25]])
    np.testing.assert_array_equal(n.normalize(x)[:, 1], [1234.5, 0.25])
    np.testing.assert_array_equal(n.unnormalize(n.normalize(x))[:, 1], [1234.5, 0.25])
    assert n.normalize(x)[1, 0] == -1
    del s["mask"]
    assert Normalizer(s).mask.all(), "a file without a mask normalises everything"


def test_the_inputs_are_not_changed():
    n, x = Normalizer(entry([0, 1, 2], [5, 5, 5])), np.array([[7.0, 5.0]])
    n.normalize(x), n.unnormalize(x)
    np.testing.assert_array_equal(x, [[7, 5]])
