"""create_datapkl.py: the motion by timestamp, the sensor's stream, the files on the disk, and what the program says and returns."""

import csv
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import create_datapkl as cd
import make_demo
from common.config import parse_config
from common.sessions import BadSession, Session, find_sessions, load_data_pkl

ROOT = Path(__file__).resolve().parent.parent
EPOCH = 1761551500.0


def config(*argv):
    return parse_config(cd.Config, [*argv, "--workers", "0"], {"dataset_dir": "dataset_dirs"})


def recording(folder, stamps, pose=None, name="recv_all_20251027_075140", image_times=None):
    """An old-layout recording with these robot rows and one small image per time in View1."""
    folder = Path(folder) / "White_silicone_white_circle" / name
    (folder / "View1/left").mkdir(parents=True)
    stamps = np.asarray(stamps, float)
    pose = np.zeros((len(stamps), 6)) if pose is None else pose
    table = np.column_stack(
        [EPOCH + stamps + 0.001, EPOCH + stamps, EPOCH + stamps, 0 * stamps, np.zeros((len(stamps), 6)), pose]
    )
    np.savetxt(
        folder / "robot_state_20251027_075140.csv",
        table,
        "%.17g",
        ",",
        header=make_demo.CSV_COLUMNS.format(force="force_placeholder"),
        comments="",
    )
    for t in np.arange(0, stamps[-1], 0.5) if image_times is None else image_times:
        (folder / f"View1/left/zed_1_left_{EPOCH + t:.3f}.jpg").write_bytes(
            make_demo.jpeg(np.zeros((8, 8, 3), np.uint8))
        )
    return folder


# ---- the motion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hz", [10, 20, 50, 100])
def test_every_rate_gives_ten_actions_per_second(hz):
    t = np.arange(0, 20, 1 / hz)
    begin, end, segment = cd.match_steps(t, 0.1, 0.02)
    assert (
        len(begin) in (199, 200)
        and np.allclose((t[end] - t[begin])[:199], 0.1)
        and (segment == 0).all()
        and np.array_equal(begin[1:], end[:-1])
    )


@hypothesis.given(st.lists(st.integers(1, 60), min_size=2, max_size=300), st.integers(0, 1000))
def test_chains_telescope_and_tile_their_segments(gaps_ms, seed):
    """Whatever the gaps: no action is off by 20 ms, actions of a segment join, a break is where no row is near enough, and the deltas add up to the whole way."""
    t = EPOCH + np.cumsum(gaps_ms) * 0.004
    begin, end, segment = cd.match_steps(t, 0.1, 0.02)
    pose = np.random.default_rng(seed).uniform(-180, 180, len(t))
    if len(begin):
        assert (np.abs(t[end] - t[begin] - 0.1) < 0.02).all() and segment[0] == 0 and set(np.diff(segment)) <= {0, 1}
        joined = np.diff(segment) == 0
        assert np.array_equal(begin[1:][joined], end[:-1][joined]) and (begin[1:] >= end[:-1]).all()
        delta = cd.wrap_degrees(pose[end] - pose[begin])
        assert (np.abs(delta) <= 180).all()
        for s in set(segment.tolist()):
            rows = np.flatnonzero(segment == s)
            assert abs(cd.wrap_degrees(delta[rows].sum() - (pose[end[rows[-1]]] - pose[begin[rows[0]]]))) < 1e-6
    used = set(begin.tolist())
    for i in range(len(t)):  # a row that could have begun an action but did not lies inside another one
        if i not in used and (np.abs(t - t[i] - 0.1) < 0.0199).any():
            assert any(b < i < e for b, e in zip(begin, end)) or i in end


def test_by_hand():
    """Rows at 0, 100, 200 ms, a pause, 1000, 1119, 1240 ms: two actions, a gap, one action of 119 ms; the one of 121 ms begins a third segment with nothing in it."""
    begin, end, segment = cd.match_steps(np.array([0, 0.1, 0.2, 1.0, 1.119, 1.24]), 0.1, 0.02)
    assert begin.tolist() == [0, 1, 3] and end.tolist() == [1, 2, 4] and segment.tolist() == [0, 0, 1]


def test_the_tolerance_is_strict():
    assert (
        len(cd.match_steps(np.array([0.0, 0.125]), 0.1, 0.025)[0]) == 0
        and len(cd.match_steps(np.array([0.0, 0.125]), 0.1, 0.0251)[0]) == 1
    )


def test_angles_wrap_and_the_gripper_is_one(tmp_path):
    """A turn of +4 deg/s through +180: the code behind the guide has one action of -359.6 degrees here."""
    t = np.arange(0, 4, 0.01)  # the last row is 90 ms after the start of the last action: near enough
    pose = np.zeros((len(t), 6))
    pose[:, 0], pose[:, 5] = 3 * t, (176 + 4 * t + 180) % 360 - 180
    folder = recording(tmp_path, t, pose)
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0
    data = load_data_pkl(folder / "data.pkl")
    assert (
        np.allclose(data["action"][:39, 5], 0.4, atol=1e-4)
        and np.allclose(data["action"][:39, 0], 0.3, atol=1e-5)
        and (data["action"][:, 6] == 1).all()
    )
    assert (
        data["action"].dtype == np.float32
        and data["robot_state"].shape == (40, 12)
        and data["instruction"] == "Insert the needle into the white circle"
    )


def test_duplicates_gaps_and_disorder_are_counted_and_harmless(tmp_path):
    t = np.arange(0, 4, 0.01)
    t = np.delete(t, slice(150, 300))  # a pause of 1.5 s
    messy = np.concatenate([t[:50], t[49:50], t[50:]])  # the newest pose sent twice
    messy[[10, 11]] = messy[[11, 10]]
    clean, dirty = (
        recording(tmp_path / "a", t, np.tile(t[:, None], 6)),
        recording(tmp_path / "b", messy, np.tile(messy[:, None], 6)),
    )
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0
    a, b = load_data_pkl(clean / "data.pkl"), load_data_pkl(dirty / "data.pkl")
    assert (
        b["metadata"]["n_duplicates"] == 1
        and a["metadata"]["n_gaps"] == b["metadata"]["n_gaps"] == 1
        and a["metadata"]["n_segments"] == 2
    )
    assert all(np.array_equal(a[k], b[k]) for k in ("action", "action_timestamps", "segment_id"))
    assert set(np.diff(a["action_timestamps"])[np.diff(a["segment_id"]) > 0] > 1.5) == {True}


def test_the_action_before_a_change_does_not_know_of_it(tmp_path):
    """Causality of everything but targets: rows and images after t change no start, state or image list before t."""
    t = np.arange(0, 4, 0.01)
    pose = np.random.default_rng(0).normal(size=(len(t), 6))
    a = recording(tmp_path / "a", t, pose)
    pose[250:] += 5
    b = recording(tmp_path / "b", t, pose)
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0
    a, b = load_data_pkl(a / "data.pkl"), load_data_pkl(b / "data.pkl")
    assert (
        np.array_equal(a["action"][:24], b["action"][:24])
        and np.array_equal(a["robot_state"][:25], b["robot_state"][:25])
        and not np.array_equal(a["action"], b["action"])
    )


# ---- the sensor ------------------------------------------------------------------------------------------------------


def windows(counts, rows, size=650):
    """Rows (n, 1026), of which `counts` are new at each window -> (windows, index of each window's last row)."""
    ends = size - 1 + np.cumsum(counts)
    return np.stack([rows[e - size + 1 : e + 1] for e in ends]), ends


@hypothesis.settings(max_examples=6)
@hypothesis.given(st.lists(st.integers(0, 649), min_size=1, max_size=3), st.integers(0, 99))
def test_overlapping_windows_give_the_stream_back(counts, seed):
    """However many rows are new, every row comes once and in order; stamps rise, and a window's last row has the window's time."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(650 + sum(counts), 1026)).astype(np.float32)
    data, ends = windows([0, *counts], rows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sensor_data.npz"
        np.savez(path, timestamps=EPOCH + ends / 650 + np.arange(len(ends)) * 1e-4, data=data)
        first, last, read = cd.open_sensor([path])
        stamps, got = (np.concatenate(x) for x in zip(*read()))
    assert (
        np.array_equal(got, rows)
        and (np.diff(stamps) > 0).all()
        and (stamps[-1] == pytest.approx(last, abs=1e-6) or counts[-1] == 0)
    )
    assert (
        np.abs(stamps - (EPOCH + np.arange(len(rows)) / 650)).max() < 0.0016 + len(ends) * 1e-4
        and first <= stamps[0] + 1e-6
    )


def test_a_window_without_overlap_is_a_gap():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 650, 4)).astype(np.float32)
    assert cd.new_rows(a, b, 130) == 650 and cd.new_rows(a, np.concatenate([a[130:], b[:130]]), 130) == 130
    assert cd.new_rows(np.zeros((650, 4)), np.zeros((650, 4)), 131.4) == 131  # a resting sensor: the time decides


def test_all_layouts_and_their_streams(tmp_path):
    """Old stream, new windows: what a Session reads is what was recorded. Legacy and old without sensor: None. View names are the same in all."""
    root = make_demo.write_sessions(tmp_path, 3, white=1, needle=1, new=1, oct=1, seconds=2.0, size=(24, 40))
    assert cd.main(config("--dataset_dirs", str(root), "--min-sensor-overlap", "0.8")) == 0
    found = {s.dataset: s for s in find_sessions([root])}
    assert sorted(s.name for s in found.values()) == [
        "Needle_insertion_eye_trocar/-/recv_all_20251027_075240",
        "New_dataset/Blue_point/episode_20251027_075340",
        "OCT_insertion/-/Captures4",
        "White_silicone_white_circle/-/recv_all_20251027_075140",
    ]
    assert [found[d].has_sensor for d in sorted(found)] == [False, True, False, True] and all(
        {v.removesuffix("_left") for v in s.view_names} == {"View1", "View5"} for s in found.values()
    )
    for name in ("White_silicone_white_circle", "New_dataset"):
        s = found[name]
        raw = np.load(next(s.path.glob("sensor_data*.npz")))
        rows = np.load(s.sensor_path)
        assert (
            rows.shape == (len(s.sensor_stamps), 1026)
            and rows.dtype == np.float32
            and (np.diff(s.sensor_stamps) > 0).all()
        )
        if name == "New_dataset":
            assert (
                np.array_equal(rows[:650], raw["data"][0])
                and np.array_equal(rows[-650:], raw["data"][-1])
                and len(rows) < 650 * len(raw["data"])
            )
        else:
            assert (
                np.array_equal(rows[:, 0], raw["forces"])
                and np.array_equal(rows[:, 1:], raw["alines"])
                and np.array_equal(s.sensor_stamps, raw["timestamps"])
            )
    assert all(len(s) in (19, 20) for s in found.values())


def test_sensor_that_covers_too_little_is_left_out_and_said(tmp_path, capsys):
    """10 s of another clock: no overlap. With the right offset it is there, and shifted."""
    folder = make_demo.write_session(tmp_path / "White/recv_all_1", "old", seconds=2.0, size=(24, 40), start=EPOCH)
    path = next(folder.glob("sensor_data*.npz"))
    arrays = dict(np.load(path))
    np.savez(path, **arrays | dict(timestamps=arrays["timestamps"] - 10))
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0
    assert (
        "covers 0% of the robot log" in capsys.readouterr().out
        and not Session(folder).has_sensor
        and not (folder / "sensor_stream.npy").exists()
    )
    assert cd.main(config("--dataset_dirs", str(tmp_path), "--sensor-clock-offset", "10")) == 0
    assert Session(folder).has_sensor and np.allclose(Session(folder).sensor_stamps, arrays["timestamps"])
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0  # and the stream of other settings goes again
    assert not (folder / "sensor_stream.npy").exists()


def test_disordered_datagrams_are_sorted(tmp_path):
    rng = np.random.default_rng(0)
    order, force, alines = (
        rng.permutation(100),
        np.arange(100, dtype=np.float32),
        rng.normal(size=(100, 1025)).astype(np.float32),
    )
    np.savez(
        tmp_path / "s.npz", timestamps=(EPOCH + np.arange(100) / 650)[order], forces=force[order], alines=alines[order]
    )
    stamps, rows = (np.concatenate(x) for x in zip(*cd.open_sensor([tmp_path / "s.npz"])[2]()))
    assert np.array_equal(rows[:, 0], force) and np.array_equal(rows[:, 1:], alines) and (np.diff(stamps) > 0).all()


# ---- files, errors, the command --------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_a_change_is_noticed(tmp_path, capsys):
    folder = recording(tmp_path, np.arange(0, 2, 0.01))
    run = lambda *more: (cd.main(config("--dataset_dirs", str(tmp_path), *more)), capsys.readouterr().out)[1]  # noqa: E731
    assert "1 made" in run()
    before = (folder / "data.pkl").stat().st_mtime_ns
    assert "1 unchanged" in run() and (folder / "data.pkl").stat().st_mtime_ns == before
    assert "1 made" in run("--force")
    assert (
        "1 made" in run("--instruction", "{White_silicone_white_circle: 'Go on, then'}")
        and Session(folder).instruction == "Go on, then"
    )
    run()
    (folder / "View1/left/zed_1_left_1761551501.900.jpg").write_bytes(b"x")
    assert "1 made" in run()
    csv_path = next(folder.glob("*.csv"))
    csv_path.write_text("\n".join(csv_path.read_text().splitlines()[:-50]) + "\n")
    with pytest.raises(BadSession, match="older than the recording"):
        find_sessions([tmp_path])
    assert "1 made" in run() and len(find_sessions([tmp_path])[0]) == 15


def test_dry_run_writes_nothing(tmp_path, capsys):
    folder = make_demo.write_session(tmp_path / "White/recv_all_1", "old", seconds=2.0, size=(24, 40))
    before = sorted(p.name for p in folder.rglob("*"))
    assert cd.main(config("--dataset_dirs", str(tmp_path), "--dry-run")) == 0
    out = capsys.readouterr().out
    assert (
        sorted(p.name for p in folder.rglob("*")) == before
        and "1 read" in out
        and "100.0" in out
        and "99%" in out
        and "nothing written" in out
    )


def break_(folder, how):
    table = next(folder.glob("*.csv"), None)
    lines = table.read_text().splitlines()
    if how == "no log":
        table.unlink()
    elif how == "two logs":
        shutil.copy(table, folder / "robot_state_2.csv")
    elif how == "no images":
        shutil.rmtree(folder / "View1")
    elif how == "no column":
        table.write_text("\n".join(line.replace("pose_a", "angle") for line in lines))
    elif how == "not a number":
        lines[7] = lines[7].rsplit(",", 1)[0] + ",x"
        table.write_text("\n".join(lines))
    elif how == "nan":
        lines[7] = lines[7].rsplit(",", 1)[0] + ",nan"
        table.write_text("\n".join(lines))
    elif how == "two rows":
        table.write_text("\n".join(lines[:2]))
    elif how == "slow":
        table.write_text("\n".join([lines[0], *lines[1::20]]))
    elif how == "broken npz":
        (folder / "sensor_data_1.npz").write_bytes(b"PK nonsense")
    elif how == "other npz":
        np.savez(folder / "sensor_data_1.npz", timestamp=np.zeros(3), force=np.zeros(3))
    elif how == "pickled npz":
        np.savez(
            folder / "sensor_data_1.npz",
            timestamps=np.array([{}], object),
            forces=np.zeros(1),
            alines=np.zeros((1, 1025)),
        )


@pytest.mark.parametrize(
    "how, message",
    [
        ("no log", "0 robot logs"),
        ("two logs", "2 robot logs"),
        ("no images", "no image with a time"),
        ("no column", "no column pose_a or ee_a"),
        ("not a number", "line 8"),
        ("nan", "line 8"),
        ("two rows", "1 rows"),
        ("slow", "5.00 rows per second"),
        ("broken npz", "sensor_data_1.npz cannot be read"),
        ("other npz", "expected timestamps, forces, alines"),
        ("pickled npz", "cannot be read"),
    ],
)
def test_a_recording_that_fails_is_named_and_the_others_are_made(tmp_path, capsys, how, message):
    bad, good = (
        recording(tmp_path, np.arange(0, 2, 0.01), name="recv_all_bad"),
        recording(tmp_path, np.arange(0, 2, 0.01), name="recv_all_good"),
    )
    break_(bad, how)
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 1
    out = capsys.readouterr()
    assert (
        f"FAILED {bad}" in out.err
        and message in out.err
        and (good / "data.pkl").is_file()
        and not (bad / "data.pkl").exists()
        and "1 made, 1 failed" in out.out
    )
    bad.rename(bad.with_name(".recv_all_bad"))  # as the message advises
    assert (
        "a dot before its name" in out.err
        and cd.main(config("--dataset_dirs", str(tmp_path))) == 0
        and len(find_sessions([tmp_path])) == 1
    )


def test_a_log_that_ends_in_the_middle_of_a_row_is_read(tmp_path):
    folder = recording(tmp_path, np.arange(0, 2, 0.01))
    table = next(folder.glob("*.csv"))
    table.write_text(table.read_text().rstrip()[:-90])
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 0 and len(Session(folder)) == 19


def test_workers_make_the_same_and_end(tmp_path):
    """Two processes write what none writes, and the command returns; its exit code tells of a failure. No temporaries stay."""
    for side in ("a", "b"):
        make_demo.write_sessions(tmp_path / side, 1, white=2, needle=1, new=0, oct=0, seconds=1.5, size=(24, 40))
    cd.main(config("--dataset_dirs", str(tmp_path / "a")))
    next((tmp_path / "b/Needle_insertion_eye_trocar").rglob("*.csv")).unlink()
    command = [sys.executable, str(ROOT / "create_datapkl.py"), "--dataset_dirs", str(tmp_path / "b"), "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        result.returncode == 1
        and "2 made, 1 failed" in result.stdout
        and "Needle_insertion_eye_trocar" in result.stderr
    )
    a, b = (
        [load_data_pkl(p) for p in sorted((tmp_path / side / "White_silicone_white_circle").rglob("data.pkl"))]
        for side in ("a", "b")
    )
    assert len(a) == len(b) == 2
    for x, y in zip(a, b):
        assert np.array_equal(x["action"], y["action"]) and x["image"] == y["image"]
    assert not [p for p in tmp_path.rglob(".tmp*")]


def test_a_sensor_file_that_ends_early_or_is_empty(tmp_path, capsys):
    folder = recording(tmp_path, np.arange(0, 2, 0.01))
    np.savez(
        folder / "sensor_data_1.npz",
        timestamps=np.zeros(0),
        forces=np.zeros(0, np.float32),
        alines=np.zeros((0, 1025), np.float32),
    )
    assert (
        cd.main(config("--dataset_dirs", str(tmp_path))) == 0
        and "sensor_data_1.npz hold no rows: no sensor" in capsys.readouterr().out
    )
    stamps = EPOCH + np.arange(1300) / 650
    np.savez(
        folder / "sensor_data_1.npz",
        timestamps=stamps,
        forces=np.zeros(1300, np.float32),
        alines=np.zeros((1200, 1025), np.float32),
    )
    assert cd.main(config("--dataset_dirs", str(tmp_path))) == 1
    assert (
        "have other lengths" in capsys.readouterr().err
        and not list(folder.glob(".tmp*"))
        and not (folder / "data.pkl").exists()
    )


def test_the_shipped_config_and_the_guides_flags_parse():
    cfg = parse_config(
        cd.Config,
        [
            "--config",
            str(ROOT / "configs/datapkl.yaml"),
            "--dataset-dirs",
            "a",
            "b",
            "--new-dataset-dir",
            "c",
            "--action-hz",
            "10",
            "--tolerance-ms",
            "20",
            "--workers",
            "2",
            "--force",
            "--dry-run",
        ],
    )
    assert (
        cfg.dataset_dirs,
        cfg.new_dataset_dir,
        cfg.action_hz,
        cfg.tolerance_ms,
        cfg.workers,
        cfg.force,
        cfg.dry_run,
    ) == (["a", "b"], "c", 10.0, 20.0, 2, True, True)


def test_wrong_calls(tmp_path):
    for argv, message in (
        (["--tolerance-ms", "80", "--dataset_dirs", "x"], "tolerance_ms is 80"),
        ([], "dataset_dirs is empty"),
        (["--dataset_dirs", str(tmp_path / "none")], "is not a folder"),
        (["--dataset_dirs", str(tmp_path)], "no recordings below"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cd.main(config(*argv))


def test_the_pickle_holds_only_plain_things(tmp_path):
    folder = recording(tmp_path, np.arange(0, 2, 0.01))
    cd.main(config("--dataset_dirs", str(tmp_path)))

    def check(x):
        assert type(x) in (dict, list, str, int, float, bool, np.ndarray, type(None)), type(x)
        for y in list(x.values()) if isinstance(x, dict) else x if isinstance(x, list) else ():
            check(y)

    with open(folder / "data.pkl", "rb") as f:
        check(pickle.load(f))


def test_recordings_of_other_hands(shared, tmp_path, capsys):
    """The real-format recordings: CSV at 100 Hz, views, sensor of a part of the time."""
    root = tmp_path / "sessions"
    shutil.copytree(shared / "data/sessions", root, copy_function=shutil.copyfile)
    for p in [root, *root.rglob("*")]:
        os.chmod(p, 0o755 if p.is_dir() else 0o644)
    assert cd.main(config("--dataset_dirs", str(root))) == 0
    assert "left out" in capsys.readouterr().out and not any(s.has_sensor for s in find_sessions([root]))
    assert cd.main(config("--dataset_dirs", str(root), "--min-sensor-overlap", "0.3")) == 0
    found = {s.dataset: s for s in find_sessions([root])}
    assert {d: (len(s), s.has_sensor, len(s.view_names)) for d, s in found.items()} == {
        "Needle_insertion_eye_trocar": (30, True, 9),
        "OCT_insertion": (140, False, 9),
        "White_silicone_white_circle": (30, True, 2),
    }
    for s in found.values():
        with open(next(s.path.glob("robot_state*.csv"))) as f:
            rows = np.array([[float(v) for v in r] for r in list(csv.reader(f))[1:]])
        first, last = np.searchsorted(rows[:, 1], [s.starts[0], s.ends[-1]])
        assert np.allclose(s.action[:, :3].sum(0), rows[last, 10:13] - rows[first, 10:13], atol=1e-3)
        assert np.abs((s.action[:, 3:6].sum(0) - rows[last, 13:16] + rows[first, 13:16] + 180) % 360 - 180).max() < 1e-3
        assert (np.abs(s.ends - s.starts - 0.1) < 0.02).all()
