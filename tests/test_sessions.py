"""Sessions: what belongs to a step, known by hand; data.pkl and what is refused; folders; the split; the statistics."""

import functools
import operator
import os
import pickle
import pickletools
import re
import shutil
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import create_datapkl
import make_demo
from common import sessions as ss
from common.stats import Normalizer

EPOCH = 1761551500.0


def content(n=12, segments=None, images=(), sensor=0, sensor_hz=650.0):
    """A data.pkl's dict: n steps of 0.1 s, View1 images at the seconds `images`, `sensor` rows at 650 Hz."""
    t = EPOCH + 0.1 * np.arange(n)
    data = dict(action=np.arange(7 * n, dtype=np.float32).reshape(n, 7), action_timestamps=t)
    data |= dict(action_end_timestamps=t + 0.1, robot_state=np.zeros((n, 12), np.float32))
    data["segment_id"] = np.asarray(np.zeros(n) if segments is None else segments, np.int32)
    data["image"] = {"View1_left": [f"View1/left/a_{i}.jpg" for i in range(len(images))]}
    data |= dict(image_timestamps={"View1_left": EPOCH + np.array(images, float)}, image_size={"View1_left": [8, 8]})
    data |= dict(sensor_data=None, instruction="go", metadata=dict(sources=[], action_hz=10.0))
    if sensor:
        stream = dict(file=ss.SENSOR_FILE, timestamps=EPOCH + np.arange(sensor) / sensor_hz, rate_hz=sensor_hz)
        stream |= dict(channels=1026, dtype="float32", mean=np.zeros(1026), std=np.ones(1026))
        data["sensor_data"] = stream
    return data


def session(folder, rows=None, **what):
    """A Session of `content`; `rows`: its sensor rows, else row i holds i."""
    folder = folder / "White_silicone_white_circle/recv_all_1"
    folder.mkdir(parents=True, exist_ok=True)
    data = content(**what)
    if data["sensor_data"]:
        counted = np.repeat(np.arange(what["sensor"], dtype=np.float32)[:, None], 1026, axis=1)
        np.save(folder / ss.SENSOR_FILE, counted if rows is None else rows)
    ss._map_sensor.cache_clear()
    create_datapkl.save_data_pkl(folder / "data.pkl", data)
    return ss.Session(folder)


# ---- ticks -----------------------------------------------------------------------------------------------------------
@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(1, 11), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 500))
def test_a_tick_is_of_the_steps_own_segment_and_in_time(tmp_path, lengths, reuse, latency_ms):
    """For any segments, reuse and latency: the newest tick of the segment that was ready, against all ticks."""
    segments = np.repeat(np.arange(len(lengths)), lengths)
    s, delay = session(tmp_path, n=len(segments), segments=segments), latency_ms / 1000
    start, at = s.tick_starts(reuse), s.tick_of_step(np.arange(len(s)), reuse, delay)
    for k in range(len(s)):
        first, ready = int(np.flatnonzero(segments == segments[k])[0]), []
        for i, b in enumerate(start):
            in_time = b <= k and s.starts[b] + delay <= s.starts[k] + 1e-5
            if segments[b] == segments[k] and (b - first) % reuse == 0 and in_time:
                ready.append(i)
        assert at[k] == (ready[-1] if ready else np.flatnonzero(start == first)[0])


def test_images_are_the_newest_of_the_past_and_fresh(tmp_path):
    """Ticks at 0, 0.3, 0.6, 0.9 s; images at 0.1, 0.3 and 0.7 s: none before the first, one exactly at a tick counts,
    none may be older than 0.25 s."""
    s = session(tmp_path, images=[0.1, 0.3, 0.7])
    for age, images in ((1.5, [None, 1, 1, 2]), (0.25, [None, 1, None, 2])):
        looks = [i and (f"View1/left/a_{i}.jpg",) for i in images]
        assert s.ticks(3, ["View1"], age).looks == looks and s.ticks(3, ["View1"], age).start.tolist() == [0, 3, 6, 9]
    assert s.ticks(3, ["View1"]).unique() == [("View1/left/a_1.jpg",), ("View1/left/a_2.jpg",)]
    with pytest.raises(ss.BadSession, match="no view 'View2'; it has View1_left"):
        s.ticks(3, ["View2"])
    names, stamps = s.view("View1")
    s._images["View5"] = (names, stamps - 0.04)  # the feature's images are as old as the views are on the mean
    captured = s.ticks(3, ["View1", "View5"]).captured[1:]
    np.testing.assert_allclose(captured, stamps[[1, 1, 2]] - 0.02, rtol=0, atol=1e-6)


# ---- sensor, targets -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("window", [65, 650])
def test_sensor_windows_by_hand(tmp_path, window):
    """Row i is at i / 650 s and holds i. At step 0 there is one row, at step k the newest is 65 k (or, by a rounding
    error of the stamps, the one before). Another process gets the same, without the data."""
    s = session(tmp_path, sensor=650 * 3, images=[0.0])
    packed = pickle.dumps(s)
    assert len(packed) < 650 * 3 * 8 + 30000
    for k in (0, 1, 2, 11):
        rows = s.sensor_window(k, window)
        assert rows.shape == (min(window, 65 * k + 1), 1026) and rows[-1, 0] in (65 * k, 65 * k - 1)
        assert (np.diff(rows[:, 5]) == 1).all()
        assert np.array_equal(pickle.loads(packed).sensor_window(k, window), rows)


def test_a_sensor_that_stopped_is_absent_not_frozen(tmp_path):
    """130 rows, 0.2 s: at 0.3 s some rows are still of the last 0.2 s, at 0.5 s none. At half the rate 65 rows last
    twice as long: the measured rate says how long they count."""
    s = session(tmp_path, sensor=130)
    assert len(s.sensor_window(2, 65)) == 65 and 0 < len(s.sensor_window(3, 65)) <= 65
    slow = session(tmp_path / "slow", sensor=130, sensor_hz=325.0)
    assert slow.sensor_hz == 325 and 0 < len(slow.sensor_window(6, 65)) < 65
    unfelt = session(tmp_path / "none")
    assert not unfelt.has_sensor
    assert all(x is None for x in (s.sensor_window(5, 65), slow.sensor_window(8, 65), unfelt.sensor_window(3, 65)))


# ---- data.pkl --------------------------------------------------------------------------------------------------------
class Evil:
    def __init__(self, *call):
        self.call = call[0], call[1:]

    def __reduce__(self):
        return self.call


def test_what_is_written_is_read_and_names_no_class(tmp_path):
    data = content(images=[0.1], sensor=650) | dict(metadata=dict(sources=[["a.csv", "1"]], action_hz=np.float64(10)))
    create_datapkl.save_data_pkl(tmp_path / "data.pkl", data)
    got = ss.load_data_pkl(tmp_path / "data.pkl")
    assert all(np.array_equal(got[k], data[k]) and got[k].dtype == data[k].dtype for k in ss.ARRAYS)
    assert got["image"] == data["image"] and got["metadata"] == data["metadata"]
    names = {op.name for op, _, _ in pickletools.genops((tmp_path / "data.pkl").read_bytes())}
    assert not [name for name in names if re.search("GLOBAL|REDUCE|BUILD|INST|OBJ|EXT|PERSID", name)]


def refuses(folder, written, message):
    (folder / "data.pkl").write_bytes(written)
    with pytest.raises(ss.BadSession, match=message) as caught:
        ss.load_data_pkl(folder / "data.pkl")
    assert f"Make it again: python create_datapkl.py --dataset-dirs {folder}" in str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_hold_more_are_refused_and_run_nothing(tmp_path, protocol):
    """Calls, and arrays as objects (schema 2, a dtype with other flags)."""
    sign, plain = tmp_path / "sign", create_datapkl.pack(content() | dict(schema_version=ss.SCHEMA))
    evils = [Evil(os.system, f"touch {sign}"), Evil(eval, f"open({str(sign)!r}, 'w')"), Evil(os.mkdir, str(sign))]
    for evil in (*evils, SimpleNamespace(a=1), np.zeros(3), np.dtype("f8"), np.float64(1)):
        for key in ("metadata", "schema_version", "action"):
            refuses(tmp_path, pickle.dumps(plain | {key: evil}, protocol), "it holds more than plain values")
    assert not sign.exists()
    for damage in (b"", b"nonsense", pickle.dumps([1], protocol), pickle.dumps(plain, protocol)[:300]):
        refuses(tmp_path, damage, r"data\.pkl is refused")


WRONG = [  # (where, what stands there, what is said)
    ("schema_version", 2, f"schema_version is not {ss.SCHEMA}"),
    ("action", np.zeros((12, 6), np.float32), r"action is not f4 \(12, 7\)"),
    ("action", ("object", (12, 7), b"x" * 672), "another kind of numbers"),
    ("action", ("float32", (-1, 7), b"x" * 5), "buffer size"),
    ("robot_state", np.full((12, 12), np.nan, np.float32), "finite"),
    ("action_timestamps", [0.0] * 12, "action_timestamps is not"),
    ("image View1_left", ["/etc/passwd"], "'/etc/passwd' leads out of the recording"),
    ("image View1_left", ["View1/../../../other.jpg"], "leads out of the recording"),
    ("sensor_data file", "../x.npy", "sensor_data is not"),
    ("sensor_data rate_hz", 0, "sensor_data is not"),
    ("sensor_data dtype", "float64", "sensor_data is not"),
    ("sensor_data std", np.ones(3), "std of the sensor is not f8"),
    ("image_size View1_left", [8], "image_size of View1_left is not"),
    ("metadata", {}, "it has no 'sources'"),
    ("metadata sources", [["../robot.csv", "1"]], "not a plain name"),
    ("instruction", 5, "no text"),
]


@pytest.mark.parametrize("path, value, message", WRONG)
def test_wrong_contents_are_named_with_the_command(tmp_path, path, value, message):
    data = create_datapkl.pack(content(images=[0.0], sensor=65) | dict(schema_version=ss.SCHEMA))
    *groups, key = path.split()
    functools.reduce(operator.getitem, groups, data)[key] = create_datapkl.pack(value)
    refuses(tmp_path, pickle.dumps(data, 4), message)


# ---- folders ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path, name",
    [
        ("White_silicone_white_circle/recv_all_1", "White_silicone_white_circle/-/recv_all_1"),
        ("White_silicone_white_circle/day1/recv_all_1", "White_silicone_white_circle/day1/recv_all_1"),
        ("Make_dataset/New_dataset/Eye_trocar/episode_2", "New_dataset/Eye_trocar/episode_2"),
        ("part1/ZED_Captures_3th", "part1/-/ZED_Captures_3th"),
        ("New_dataset/episode_9", "New_dataset/-/episode_9"),
        ("copied/Blue_point/episode_9", "Blue_point/-/episode_9"),
    ],
)
def test_names_come_from_the_folders_unless_session_yaml_says_otherwise(tmp_path, path, name):
    (tmp_path / path).mkdir(parents=True)
    assert "/".join(ss.identity(tmp_path / path)) == name
    (tmp_path / path / "session.yaml").write_text("dataset: New_dataset")
    dataset, task, episode = ss.identity(tmp_path / path)
    assert dataset == "New_dataset" and f"{task}/{episode}" in (name.partition("/")[2], "Blue_point/episode_9")


WRONG_NOTES = ["sensor_ofset_s: 1", "sensor_offset_s: soon", "[1]", "exclude", "exclude: 2", "dataset: a/b", "a: ["]
WRONG_NOTES += ["sensor_offset_s: true", "instruction: no", "dataset: a\ndataset: b", "sensor_offset_s: 1" + "0" * 400]


@pytest.mark.parametrize("text", WRONG_NOTES)
def test_a_wrong_session_yaml_is_named(tmp_path, text):
    (tmp_path / "session.yaml").write_text(text)
    with pytest.raises(ss.BadSession, match="session.yaml: expected KEY: VALUE, only sensor_offset_s, camera"):
        ss.read_notes(tmp_path)


def test_a_recording_counts_once_whatever_leads_to_it(tmp_path):
    """A link to a recording, a link back to the root, a link to the whole data set, the folder given twice."""
    for name in ("recv_all_1", "recv_all_2", ".recv_all_3", "recv_all_4"):
        (tmp_path / "d/White_silicone_white_circle" / name).mkdir(parents=True)
        (tmp_path / "d/White_silicone_white_circle" / name / "robot_state_1.csv").touch()
    folder = tmp_path / "d/White_silicone_white_circle"
    (folder / "recv_all_4/session.yaml").write_text("exclude: true")
    (folder / "latest").symlink_to(folder / "recv_all_1")
    (folder / "loop").symlink_to(tmp_path / "d")
    (tmp_path / "d/again").symlink_to(folder)
    wanted = [(folder / name).resolve() for name in ("recv_all_1", "recv_all_2")]
    excluded = [(folder / "recv_all_4").resolve()]
    assert ss.find_recordings([tmp_path / "d", folder, folder / "latest"]) == (wanted, excluded)
    assert ss.identity(folder / "latest") == ("White_silicone_white_circle", "-", "recv_all_1")
    (folder / "recv_all_2").rename(os.fsdecode(bytes(folder) + b"/recv_all_\xb9\xd9"))
    with pytest.raises(ss.UserError, match=r"recv_all_\\udcb9.*is not UTF-8.*convmv"):
        ss.find_recordings([folder])


def test_finding_is_sorted_and_refuses_what_is_not_preprocessed(tmp_path):
    root = make_demo.write_sessions(tmp_path / "새 d", 0, white=2, needle=1, new=0, oct=1, seconds=1.0, size=(16, 24))
    (root / "OCT_insertion/Captures4/data.pkl").write_bytes(pickle.dumps(content() | dict(schema_version=2)))
    with pytest.raises(ss.BadSession, match=r"4 of 4 recordings are not preprocessed") as caught:
        ss.find_sessions([root])
    lines = str(caught.value).splitlines()
    assert [line.endswith("has no data.pkl") for line in lines[1:5]] == [True, False, True, True]
    assert "it holds more than plain values" in lines[2] and "Make it again" not in lines[2]
    assert lines[5] == f"Run: python create_datapkl.py --dataset-dirs '{root}'"
    create_datapkl.main(create_datapkl.Config(dataset_dirs=[str(root)], workers=0, min_sensor_overlap=0.5))
    found = ss.find_sessions([root, root / "OCT_insertion"])
    assert [s.name for s in found] == sorted(s.name for s in found) and len(found) == 4
    assert ss.common_views(found) == (["View1", "View5"], [])
    views = dict(a=["View1_left", "View1_right", "View5"], b=["View1", "View2"])
    parts = [SimpleNamespace(name=name, view_names=names) for name, names in views.items()]
    assert ss.common_views(parts) == (["View1"], ["View2", "View5"])
    with pytest.raises(ss.BadSession, match="no view is in all of the 3 sessions"):
        ss.common_views([*parts, SimpleNamespace(name="c", view_names=["View3"])])
    shutil.copytree(root / "OCT_insertion", tmp_path / "e/OCT_insertion")
    with pytest.raises(ss.BadSession, match="two sessions are called OCT_insertion/-/Captures4"):
        ss.find_sessions([tmp_path])
    with pytest.raises(FileNotFoundError, match="no sessions below"):
        ss.find_sessions([root / "OCT_insertion/Captures4/view1"])


# ---- split, statistics -----------------------------------------------------------------------------------------------
@hypothesis.given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), min_size=1), st.floats(0.01, 0.9))
def test_the_split_is_by_session_and_stable(sizes, fraction):
    """Each session on one side; data sets with two or more on both; one added to another data set moves nobody."""

    def make(sizes):
        names = [(d, f"{d}/-/{i}") for d in sizes for i in range(sizes[d])]
        return [SimpleNamespace(name=name, dataset=d) for d, name in names]

    train, validation = ss.split_sessions(make(sizes), fraction)
    names = {s.name for s in train}, {s.name for s in validation}
    assert not names[0] & names[1] and len(names[0] | names[1]) == sum(sizes.values())
    for d, n in sizes.items():
        assert {s.dataset for s in train} >= {d} and (d in {s.dataset for s in validation}) == (n > 1)
    assert names[1] == {s.name for s in ss.split_sessions(make(sizes | dict(z=5)), fraction)[1] if s.dataset != "z"}
    assert not ss.split_sessions(make(sizes), 0)[1]


def test_statistics_by_hand(tmp_path, monkeypatch):
    """Constant dims are flagged and closed; the sensor's numbers are those of all rows of all sessions, also far from
    zero, taken from their data.pkl without opening a stream; a dead A-scan channel does not blow up."""
    rng, parts = np.random.default_rng(0), []
    for i, n in enumerate((650, 1300)):
        rows = rng.normal(5 + i, 2, (n, 1026)).astype(np.float32)
        rows[:, 9], rows[:, 0] = 3, 1000 + rng.normal(0, 0.01, n)
        s = session(tmp_path / str(i), rows, sensor=n)
        s.sensor |= dict(mean=rows.mean(0, np.float64), std=rows.std(0, np.float64), dtype=ss.SENSOR_DTYPES[i])
        s.action = rng.normal(0, 1, (12, 7)).astype(np.float32)
        s.action[:, 6], s.action[:, 2] = 1, 0.5 + rng.uniform(0, 5e-5, 12)
        parts.append((s, rows.astype(np.float64)))
    with monkeypatch.context() as patch:
        patch.setattr(ss, "_map_sensor", lambda path: pytest.fail(f"{path} was read"))
        stats = ss.session_stats([s for s, _ in parts])
    whole = np.concatenate([rows for _, rows in parts])
    action, sensor = stats["action"], stats["sensor"]
    assert action["constant"] == [False, False, True, False, False, False, True]
    assert (stats["num_episodes"], stats["num_frames"], sensor["count"]) == (2, 24, 1950)
    assert np.allclose(sensor["mean"], whole.mean(0)) and sensor["std"][9] == 1e-3 and sensor["dtype"] == "float32"
    assert np.allclose(np.delete(sensor["std"], 9), np.delete(whole.std(0), 9), rtol=1e-6)
    assert ss.session_stats([parts[0][0]])["sensor"]["dtype"] == "float16"
    normal = Normalizer(action)
    assert (normal.normalize(s.action)[:, [2, 6]] == 0).all()
    assert np.allclose(normal.unnormalize(np.zeros((1, 7)))[0, 6], 1)
    assert ss.session_stats([session(tmp_path / "x")])["sensor"] is None
