"""create_datapkl.py: the motion by timestamp, the sensor's stream, the files on the disk, and what the program says."""

import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import yaml
from PIL import Image

import create_datapkl as cd
import make_demo
from common import UserError
from common.config import parse_config
from common.sessions import BadSession, Session, find_sessions, load_data_pkl

ROOT = Path(__file__).resolve().parent.parent
EPOCH = 1761551500.0
TWO_SECONDS = np.arange(0, 2, 0.01)


def run(root, *argv):
    """The program on `root` -> number of recordings that failed."""
    argv = ["--dataset_dirs", str(root), *argv, "--workers", "0"]
    return cd.main(parse_config(cd.Config, argv, cd.ALIASES))


def recording(folder, stamps, pose=None, name="recv_all_20251027_075140", image_times=None):
    """An old-layout recording with these robot rows and one small image per time in View1."""
    folder = Path(folder) / "White_silicone_white_circle" / name
    (folder / "View1/left").mkdir(parents=True)
    stamps = np.asarray(stamps, float)
    pose = np.zeros((len(stamps), 6)) if pose is None else pose
    clock = EPOCH + stamps
    table = np.column_stack([clock + 0.001, clock, clock, 0 * stamps, np.zeros((len(stamps), 6)), pose])
    header = make_demo.CSV_COLUMNS.format(force="force_placeholder")
    np.savetxt(folder / "robot_state_20251027_075140.csv", table, "%.17g", ",", header=header, comments="")
    for t in np.arange(0, stamps[-1], 0.5) if image_times is None else image_times:
        picture = make_demo.jpeg(np.zeros((8, 8, 3), np.uint8))
        (folder / f"View1/left/zed_1_left_{EPOCH + t:.3f}.jpg").write_bytes(picture)
    return folder


def stream(folder, stamps, forces=None, name="sensor_data_1.npz"):
    """An old-layout sensor file; row i's A-scan holds i, to 2,000 and again from 0."""
    n = len(stamps)
    counted = np.arange(n, dtype=np.float32) % 2000
    forces, alines = counted if forces is None else forces, np.repeat(counted[:, None], 1025, axis=1)
    np.savez(folder / name, timestamps=EPOCH + np.asarray(stamps, float), forces=forces, alines=alines)


def actions_of(stamps, pose, tolerance=0.02):
    stamps = np.asarray(stamps, float)
    rows = np.concatenate([np.zeros((len(stamps), 6)), pose], axis=1)
    stretches, *_ = cd.find_stretches(stamps, 0.1, tolerance)
    return cd.make_actions(stamps, rows, stretches, 0.1)


# ---- the motion ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("jitter_ms", [0, 4])
@pytest.mark.parametrize("hz", [8, 9, 10, 11, 12.5, 13, 14.9, 15, 16, 16.7, 17, 20, 25, 50, 100])
def test_every_rate_gives_motions_of_exactly_100_ms(hz, jitter_ms):
    """20 s at any rate: ten actions a second, a constant speed without bias, a turn through 180 degrees, and the sum of
    the actions is the way between the ends."""
    rng = np.random.default_rng(0)
    t = np.arange(0, 20, 1 / hz)
    t += np.clip(rng.normal(0, jitter_ms / 1000, len(t)), -0.4 / hz, 0.4 / hz)
    pose = np.zeros((len(t), 6))
    pose[:, 0], pose[:, 1], pose[:, 5] = 13 * t, 20 * np.sin(t), (176 + 4 * t + 180) % 360 - 180
    made = actions_of(EPOCH + t, pose)
    n, starts, ends = len(made["action"]), made["action_timestamps"], made["action_end_timestamps"]
    assert n >= 198 and (made["segment_id"] == 0).all() and made["action"].dtype == np.float32
    assert np.allclose(ends - starts, 0.1, atol=1e-6) and np.array_equal(starts[1:], ends[:-1])
    assert np.allclose(made["action"][:, 0], 1.3, atol=1e-4) and np.allclose(made["action"][:, 5], 0.4, atol=1e-4)
    truth = 20 * (np.sin(ends - EPOCH) - np.sin(starts - EPOCH))
    error = made["action"][:, 1] - truth
    assert abs(error.mean()) < 2e-3 and np.abs(error).max() < 0.05 and (made["action"][:, 6] == 1).all()
    way = [np.interp(ends[-1], EPOCH + t, pose[:, d]) - pose[0, d] for d in (0, 1)]
    assert np.allclose(made["action"][:, :2].sum(0), way, atol=1e-3)


@hypothesis.given(st.lists(st.integers(1, 60), min_size=3, max_size=200), st.integers(0, 1000))
def test_segments_telescope_and_bridge_no_gap(gaps, seed):
    """Whatever the pauses (4 to 240 ms): actions of a segment join and add up, none spans a gap, and of a stretch
    without a gap less than one action is lost."""
    t = EPOCH + np.cumsum(gaps) * 0.004
    angle = np.cumsum(np.random.default_rng(seed).uniform(-170, 170, len(t)))
    stretches, _, n_gaps = cd.find_stretches(t, 0.1, 0.02)
    gap_ends = t[1:][np.diff(t) > max(0.1, 1.5 * np.median(np.diff(t))) + 0.02 + 1e-5]
    assert n_gaps == len(gap_ends)
    if max(t[s[-1]] - t[s[0]] for s in stretches) < 0.1:
        return
    made = actions_of(t, np.tile(((angle + 180) % 360 - 180)[:, None], 6))
    starts, ends, segment = (made[k] for k in ("action_timestamps", "action_end_timestamps", "segment_id"))
    joined = np.diff(segment) == 0
    assert set(np.diff(segment)) <= {0, 1} and np.array_equal(starts[1:][joined], ends[:-1][joined])
    assert (np.searchsorted(gap_ends, starts + 1e-4) == np.searchsorted(gap_ends, ends - 1e-4)).all()
    for s in set(segment.tolist()):
        rows = np.flatnonzero(segment == s)
        ways = np.interp([starts[rows[0]], ends[rows[-1]]], t, angle)
        assert abs(made["action"][rows, 4].sum() - (ways[1] - ways[0])) < 0.05
    assert len(starts) == sum(int((t[s[-1]] - t[s[0]] + 1e-5) / 0.1) for s in stretches)


def test_by_hand():
    """Rows at 0, 100, 200 ms, a pause, 1000, 1119, 1240 ms at 1 mm a row: the second stretch gives two actions."""
    t = np.array([0, 0.1, 0.2, 1.0, 1.119, 1.24])
    made = actions_of(t, np.tile(np.arange(6.0)[:, None], 6))
    assert made["segment_id"].tolist() == [0, 0, 1, 1] and np.allclose(made["action_timestamps"], [0, 0.1, 1.0, 1.1])
    assert np.allclose(made["action"][:, 0], [1, 1, 0.1 / 0.119, 0.019 / 0.119 + 0.081 / 0.121], atol=1e-6)
    assert np.allclose(made["robot_state"][:, 6], [0, 1, 3, 3])  # the newest row: at 1.1 s that of 1.0 s


@pytest.mark.parametrize("back", [1.0, 0.03])
def test_a_clock_that_steps_back_splits(tmp_path, capsys, back):
    """13 mm/s; half-way the clock goes back: no step is longer than the motion, and it is said."""
    t = np.arange(0, 6, 0.01)
    pose = np.tile(13 * t[:, None], 6)
    folder = recording(tmp_path, np.where(t < 3, t, t - back), pose)
    assert run(tmp_path) == 0 and f"clock steps back by {back - 0.01:.3f} s at line 302" in capsys.readouterr().out
    data = load_data_pkl(folder / "data.pkl")
    assert np.allclose(data["action"][:, 0], 1.3, atol=1e-3) and data["metadata"]["n_segments"] == 2
    assert len(data["action"]) in (57, 58)


def test_repeated_overtaken_and_torn_rows_are_harmless(tmp_path):
    t = np.delete(np.arange(0, 4, 0.01), slice(150, 300))  # a pause of 1.5 s
    messy = np.concatenate([t[:50], t[49:50], t[50:], [4.0]])  # the newest pose sent twice
    messy[[11, 12]] = messy[[12, 11]]
    clean = recording(tmp_path / "a", t, np.tile(t[:, None], 6))
    dirty = recording(tmp_path / "b", messy, np.tile(messy[:, None], 6))
    table = next(dirty.glob("*.csv"))
    text = table.read_text().rstrip()[:-1]  # the recorder was stopped within the last number
    table.write_text(text.replace("\n", "\n\n"))  # and wrote \r\r\n, as Python does on Windows without newline=""
    assert run(tmp_path) == 0
    a, b = load_data_pkl(clean / "data.pkl"), load_data_pkl(dirty / "data.pkl")
    assert (a["metadata"]["n_duplicates"], b["metadata"]["n_duplicates"]) == (0, 2)
    assert a["metadata"]["n_gaps"] == b["metadata"]["n_gaps"] == 1 and a["metadata"]["n_segments"] == 2
    assert all(np.allclose(a[k], b[k], rtol=0, atol=1e-6) for k in ("action", "action_timestamps", "segment_id"))


def test_rate_jitter_and_lost_time_are_told(tmp_path, capsys):
    """40 Hz with 3 ms of jitter, 1.5 of 10 s missing: above 5 % it is said loudly, below it is a number only."""
    t = np.arange(0, 10, 0.025) + np.random.default_rng(0).normal(0, 0.003, 400)
    holes = recording(tmp_path / "a", t[(t < 4) | (t > 5.5)])
    whole = recording(tmp_path / "b", t, name="recv_all_whole")
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    a, b = (load_data_pkl(folder / "data.pkl")["metadata"] for folder in (holes, whole))
    for facts in (a, b):
        assert facts["robot_hz"] == pytest.approx(40, abs=0.1) and facts["jitter_ms"] == pytest.approx(4.2, abs=0.5)
    assert a["lost_seconds"] == pytest.approx(1.5, abs=0.15) and b["lost_seconds"] < 0.05
    assert out.count("LOST") == 1 and f"LOST {a['lost_seconds']:.2f} of" in out and "jitter ms" in out


# ---- the sensor ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hz", [325, 650])
@hypothesis.settings(max_examples=4)
@hypothesis.given(st.lists(st.integers(1, 649), min_size=1, max_size=3), st.integers(0, 99))
def test_overlapping_windows_give_the_stream_back(tmp_path, hz, counts, seed):
    """However many rows are new, every row comes once and in order, at the rate at which they were measured."""
    rows = np.random.default_rng(seed).normal(size=(650 + sum(counts), 1026)).astype(np.float32)
    ends, path = 649 + np.cumsum([0, *counts]), tmp_path / "sensor_data.npz"
    np.savez(path, timestamps=EPOCH + ends / hz, data=np.stack([rows[e - 649 : e + 1] for e in ends]))
    stamps, got, blocks, rate, _ = cd.read_sensor([path])
    assert np.array_equal(got[np.concatenate(blocks)], rows)
    assert (np.diff(stamps) > 0).all() and rate == pytest.approx(hz, rel=1e-3)
    assert np.abs(stamps - (EPOCH + np.arange(len(rows)) / hz)).max() < 1e-4


def test_a_window_without_overlap_is_a_gap():
    a, b = np.random.default_rng(0).normal(size=(2, 650, 4)).astype(np.float32)
    assert cd.new_rows(a, b, 130) == 650 and cd.new_rows(a, np.concatenate([a[130:], b[:130]]), 130) == 130
    assert cd.new_rows(np.zeros((650, 4)), np.zeros((650, 4)), 131.4) == 131  # a resting sensor: the time decides
    spoiled = a.copy()
    spoiled[200, 2] = np.nan
    assert cd.new_rows(spoiled, np.concatenate([spoiled[130:], b[:130]]), 130) == 130


@pytest.mark.parametrize("hz, tick", [(650, 0.005), (650, 0.0156), (200, None), (325, 0.005), (650, None)])
def test_equal_stamps_are_spread_and_the_rate_is_measured(tmp_path, hz, tick):
    """A clock of 5 ms: all 8 s of rows are kept, their stamps rise, none is too early, and the rate is measured."""
    t = np.arange(8 * hz) / hz
    coarse = t if tick is None else np.floor(t / tick) * tick
    stream(tmp_path, coarse)
    stamps, rows, _, rate, _ = cd.read_sensor([tmp_path / "sensor_data_1.npz"])
    assert np.array_equal(rows[:, 0], np.arange(len(t)) % 2000) and (np.diff(stamps) > 0).all()
    assert rate == pytest.approx(hz, rel=0.005) and np.abs(stamps - EPOCH - t).max() < (tick or 0) + 1e-6
    assert (stamps >= EPOCH + coarse - 1e-6).all()


def test_all_layouts_and_their_streams(tmp_path):
    """Old stream, new windows: what a Session reads is what was recorded. Legacy and old without sensor: None."""
    root = make_demo.write_sessions(tmp_path, 3, white=1, needle=1, new=1, oct=1, seconds=2.0, size=(24, 40))
    assert run(root, "--min-sensor-overlap", "0.8") == 0
    found = {s.dataset: s for s in find_sessions([root])}
    assert sorted(s.name for s in found.values()) == [
        "Needle_insertion_eye_trocar/-/recv_all_20251027_075240",
        "New_dataset/Blue_point/episode_20251027_075340",
        "OCT_insertion/-/Captures4",
        "White_silicone_white_circle/-/recv_all_20251027_075140",
    ]
    assert [found[d].has_sensor for d in sorted(found)] == [False, True, False, True]
    assert all({v.removesuffix("_left") for v in s.view_names} == {"View1", "View5"} for s in found.values())
    assert all(len(s) == 19 for s in found.values())
    old, new = found["White_silicone_white_circle"], found["New_dataset"]
    raw, rows = np.load(next(old.path.glob("sensor_data*.npz"))), np.load(old.sensor_path)
    assert np.array_equal(rows[:, 0], raw["forces"].astype(np.float16)) and np.array_equal(rows[:, 1:], raw["alines"])
    assert np.array_equal(old.sensor_stamps, raw["timestamps"]) and old.sensor_hz == pytest.approx(650, rel=1e-3)
    raw, rows = np.load(new.path / "sensor_data.npz"), np.load(new.sensor_path)
    raw = raw["data"].astype(np.float16)
    assert np.array_equal(rows[:650], raw[0]) and np.array_equal(rows[-650:], raw[-1]) and rows.dtype == np.float16
    assert len(rows) == len(new.sensor_stamps) < 650 * len(raw)


@pytest.mark.parametrize(
    "channel, offset, spread, kept",
    [
        (0, 1.0, 0.8, "float16"),  # a force: rounded by 0.03 % of how it varies
        (0, 1000.0, 0.01, "float32"),  # a force far from zero would be rounded to steps of 0.5
        (7, 51.3, 0.0, "float32"),  # a dead channel that fp16 cannot hold would stand out by ten deviations
        (7, 1e5, 0.8, "float32"),  # beyond fp16
    ],
)
def test_rows_are_kept_in_fp16_where_that_is_exact_enough(channel, offset, spread, kept):
    """A-scans are integers. Mean and standard deviation are those of the rows before they were rounded."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (1300, 1026)).astype(np.float32)
    rows[:, 0] = 1 + 0.8 * rng.normal(size=1300)
    rows[:, channel] = offset + spread * rng.normal(size=1300)
    dtype, mean, std = cd.compress(rows, np.split(np.arange(1300), [500]))
    assert dtype == kept and np.allclose(mean, rows.mean(0, np.float64), rtol=1e-12)
    assert np.allclose(std, rows.std(0, np.float64), rtol=1e-9)
    error = np.sqrt(np.square(rows.astype(kept).astype(np.float64) - rows).mean(0))
    assert (error <= 0.01 * np.maximum(std, 1e-3)).all() and (kept == "float32" or error[0] > 0)


def test_spoiled_rows_are_counted_named_and_left_out(tmp_path, capsys):
    """Two NaN and a row without a time in 2 s: the recording is made without these three, and --dry-run says so."""
    folder = recording(tmp_path, TWO_SECONDS)
    stamps, forces = np.arange(1300) / 650, np.ones(1300, np.float32)
    forces[[7, 900]], stamps[1000] = np.nan, np.nan
    stream(folder, stamps, forces)
    for dry in (["--dry-run"], []):
        assert run(tmp_path, *dry) == 0
        out = capsys.readouterr().out
        assert "3 sensor rows" in out and "sensor_data_1.npz row 7," in out and "row 900" in out
    s = find_sessions([tmp_path])[0]
    rows = np.load(s.sensor_path)
    assert rows.shape == (1297, 1026) and np.isfinite(rows).all() and len(s.sensor_window(15, 65)) == 65


def test_disordered_datagrams_are_sorted_and_files_join(tmp_path):
    order = np.random.default_rng(0).permuted(np.arange(100).reshape(5, 20), axis=1).ravel()
    stream(tmp_path, order / 650, order.astype(np.float32))
    stream(tmp_path, (50 + np.arange(100)) / 650, 50 + np.arange(100, dtype=np.float32), "sensor_data_2.npz")
    arrays = dict(np.load(tmp_path / "sensor_data_2.npz"))
    np.savez(tmp_path / "sensor_data_2.npz", **arrays | dict(alines=np.asfortranarray(arrays["alines"])))
    stamps, rows, blocks, *_ = cd.read_sensor([tmp_path / "sensor_data_2.npz", tmp_path / "sensor_data_1.npz"])
    rows = rows[np.concatenate(blocks)]
    assert (np.diff(stamps) > 0).all() and np.array_equal(np.unique(rows[:, 0]), np.arange(150)) and len(rows) <= 151
    assert np.abs((stamps - EPOCH) * 650 - rows[:, 0]).max() < 1  # each with its own stamp
    assert (rows[101:, 1:] == rows[101:, :1] - 50).all()


def test_a_long_recording_needs_no_memory_for_its_rows(tmp_path, monkeypatch):
    """6 s of rows, 16 MB as a stream and 80 MB as windows: some blocks are held at a time, or some windows."""
    monkeypatch.setattr(cd, "BLOCK", 64)
    rows = np.random.default_rng(0).normal(size=(3900, 1026)).astype(np.float32)
    ends = np.arange(650, 3901, 110)
    np.savez(tmp_path / "a.npz", timestamps=np.arange(3900) / 650, forces=rows[:, 0], alines=rows[:, 1:])
    np.savez(tmp_path / "b.npz", timestamps=ends / 650, data=np.stack([rows[e - 650 : e] for e in ends]))
    for name, most in (("a.npz", 4e6), ("b.npz", 16e6)):
        tracemalloc.start()
        _, got, blocks, *_ = cd.read_sensor([tmp_path / name])
        assert cd.compress(got, blocks)[0] == "float16" and tracemalloc.get_traced_memory()[1] < most
        tracemalloc.stop()
        assert np.array_equal(got[np.concatenate(blocks)], rows[: sum(map(len, blocks))])


def test_the_sensors_share_is_that_of_the_actions(tmp_path, capsys):
    """Of 2 s the sensor has 0.5 s and the last row. The robot's first stamp is 0, as before its clock was set."""
    folder = recording(tmp_path, np.r_[-EPOCH, np.arange(0, 2, 0.01)], image_times=np.arange(0, 2, 0.5))
    rows = np.arange(1300) / 650
    stream(folder, rows[(rows < 0.5) | (rows > 1.99)])
    assert run(tmp_path) == 0
    assert "covers 32% of the robot log (+0.00 s to +2.00 s of 1.80 s)" in capsys.readouterr().out
    stream(folder, rows)
    assert run(tmp_path) == 0 and Session(folder).has_sensor


@pytest.mark.parametrize("stamps, said", [([], "hold no rows: no sensor"), ([*range(9), 5], "steps back by 3.0")])
def test_a_sensor_without_an_order_of_time_is_left_out(tmp_path, capsys, stamps, said):
    folder = recording(tmp_path, TWO_SECONDS)
    stream(folder, stamps)
    assert run(tmp_path) == 0 and said in capsys.readouterr().out and not Session(folder).has_sensor


# ---- session.yaml, clocks, images ------------------------------------------------------------------------------------
def test_offsets_stand_beside_the_recording_and_stay(tmp_path, capsys):
    """The sensor's clock is 10 s behind, the cameras' 2 s ahead: session.yaml repairs both, also at the next run."""
    folder = make_demo.write_session(tmp_path / "White/recv_all_1", "old", seconds=2.0, size=(24, 40), start=EPOCH)
    path = next(folder.glob("sensor_data*.npz"))
    arrays = dict(np.load(path))
    np.savez(path, **arrays | dict(timestamps=arrays["timestamps"] - 10))
    assert run(tmp_path) == 0 and "covers 0% of the robot log" in capsys.readouterr().out
    before = Session(folder)
    assert not before.has_sensor and not (folder / "sensor_stream.npy").exists()
    notes = "sensor_offset_s: 10\ncamera_offset_s: {View1: -2, view5: 1}\ninstruction: Touch it\n"
    (folder / "session.yaml").write_text(notes)
    with pytest.raises(BadSession, match="changed since its data.pkl was made"):
        find_sessions([tmp_path])
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "notes (was {'sensor_offset_s': 0.0" in out and "camera_offset_s of view5 has no effect" in out
    s = find_sessions([tmp_path])[0]
    assert s.instruction == "Touch it" and np.abs(s.sensor_stamps - arrays["timestamps"]).max() < 1e-6
    assert np.abs(before.view("View1")[1] - 2 - s.view("View1")[1]).max() < 1e-6
    assert np.array_equal(s.view("View5")[1], before.view("View5")[1])
    assert run(tmp_path) == 0 and "1 unchanged" in capsys.readouterr().out and Session(folder).has_sensor
    (folder / "session.yaml").write_text("exclude: true\n")
    with pytest.raises(UserError, match="no recordings below"):
        run(tmp_path)


def test_offsets_are_proposed_from_what_moved(tmp_path, capsys, monkeypatch):
    """The robot moves now and then; image and force follow, on clocks 40 s behind and 3.7 s ahead."""
    rng, t = np.random.default_rng(5), np.arange(0, 20, 0.01)
    speed = np.repeat(rng.uniform(0, 30, 25) * (rng.random(25) < 0.6), 80)
    x = np.cumsum(speed) / 100
    folder = recording(tmp_path, t, np.c_[x, np.zeros((len(t), 5))], image_times=[])
    texture = rng.integers(0, 255, (36, 1200), dtype=np.uint8)
    for taken in np.arange(0, 20, 0.2):
        at = int(1.5 * np.interp(taken, t, x))
        Image.fromarray(texture[:, at : at + 64]).save(folder / f"View1/left/{EPOCH + taken - 40:.3f}.png")
    Image.fromarray(texture).save(folder / "View1/left/test_5.png")
    rows = np.arange(0, 20, 1 / 650)
    force = np.interp(rows, t, np.cumsum(speed * rng.choice([-1, 1], 25).repeat(80)) / 100)
    stream(folder, rows + 3.7, (force + rng.normal(0, 0.01, len(rows))).astype(np.float32))
    assert run(tmp_path, "--estimate-offsets") == 0 and not (folder / "session.yaml").exists()
    assert "sensor_offset_s: -3." in capsys.readouterr().out
    assert run(tmp_path, "--estimate-offsets", "--write-offsets") == 0
    notes = yaml.safe_load((folder / "session.yaml").read_text())
    assert abs(notes["sensor_offset_s"] + 3.7) < 0.05 and abs(notes["camera_offset_s"] - 40) < 0.15
    assert run(tmp_path) == 0 and Session(folder).has_sensor
    stream(folder, rows[:500])  # too short to compare: the cameras' offset is proposed all the same
    assert run(tmp_path, "--estimate-offsets") == 0 and "none proposed, sensor_data_1.npz" in capsys.readouterr().out
    monkeypatch.setattr(cd, "find_offset", lambda *_: (1.74, 0.88, 0.63))  # of a demo session; it is 0
    assert run(tmp_path, "--estimate-offsets") == 0 and "camera_offset_s: not clear" in capsys.readouterr().out


def test_broken_pictures_are_listed_and_left_out(tmp_path, capsys):
    """Empty, cut off, no image: each is named, its frame is left out, the others stay; repaired, it comes back."""
    folder = recording(tmp_path, np.arange(0, 4, 0.01))
    names = sorted(path.name for path in (folder / "View1/left").iterdir())
    whole = (folder / "View1/left" / names[0]).read_bytes()
    for name, content in zip(names[1:4], (b"", whole[:-20], b"nothing" * 20), strict=True):
        (folder / "View1/left" / name).write_bytes(content)
    assert run(tmp_path) == 0
    out = capsys.readouterr().out
    assert "3 broken images" in out and all(name in out for name in names[1:4]) and names[4] not in out
    assert [Path(p).name for p in Session(folder).view("View1")[0]] == [names[0], *names[4:]]
    (folder / "View1/left" / names[1]).write_bytes(whole)
    assert run(tmp_path) == 0 and "this changed: images" in capsys.readouterr().out
    assert len(Session(folder).view("View1")[0]) == len(names) - 2


# ---- files, errors, the command --------------------------------------------------------------------------------------
def test_a_second_run_does_nothing_and_a_change_is_noticed(tmp_path, capsys):
    """Nor does a copy that loses the files' times; another instruction, log or sensor is named."""
    folder = recording(tmp_path / "a", TWO_SECONDS)
    stream(folder, np.arange(1300) / 650)
    again = lambda *more, side="a": (run(tmp_path / side, *more), capsys.readouterr().out)[1]  # noqa: E731
    assert "1 made" in again()
    before = (folder / "data.pkl").stat().st_mtime_ns
    assert "1 unchanged" in again() and (folder / "data.pkl").stat().st_mtime_ns == before
    assert "1 made" in again("--force")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    for path in (tmp_path / "b").rglob("*.*"):
        os.utime(path, (1, 1))
    assert find_sessions([tmp_path / "b"]) and "1 unchanged" in again(side="b")
    out = again("--instruction", "White_silicone_white_circle", "Go on, then", "White", "Stop")
    assert "of a data set or task 'White': its instruction is not used" in out
    assert "instruction (was Insert the needle into the white circle, is Go on, then)" in out
    assert Session(folder).instruction == "Go on, then" and "1 made" in again()
    log, sensor = next(folder.glob("*.csv")), next((tmp_path / "b").rglob("*.npz"))
    log.write_text("\n".join(log.read_text().splitlines()[:-50]) + "\n")
    arrays = dict(np.load(sensor))
    np.savez(sensor, **arrays | dict(forces=arrays["forces"] + 1))
    for side in ("a", "b"):
        with pytest.raises(BadSession, match="changed since its data.pkl was made"):
            find_sessions([tmp_path / side])
        assert "robot log or sensor file" in again("--min-sensor-overlap", "0.5", side=side)
    assert len(find_sessions([tmp_path / "a"])[0]) == 14


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    folder = make_demo.write_session(tmp_path / "White/recv_all_1", "old", seconds=2.0, size=(24, 40))
    before = sorted(folder.rglob("*"))
    assert run(tmp_path, "--dry-run") == 0 and sorted(folder.rglob("*")) == before
    out = capsys.readouterr().out
    assert "'White' is none of the guide's: its samples get weight 1" in out
    assert all(text in out for text in ("1 read", "100.0", "650.0", "nothing written"))
    monkeypatch.setattr(cd, "read_motion", lambda *_: np.zeros(1 << 50))
    assert run(tmp_path) == 1 and "Unable to allocate" in capsys.readouterr().err


def rewrite(change):
    return lambda folder, log, lines: log.write_text("".join(change(lines)))


def npz(**arrays):
    return lambda folder, log, lines: np.savez(folder / "sensor_data_1.npz", **arrays)


BREAKS = {  # what the program says of a recording: what was done to it
    "2 robot logs": lambda folder, log, lines: shutil.copy(log, folder / "robot_state_2.csv"),
    "no image with a time": lambda folder, log, lines: shutil.rmtree(folder / "View1"),
    "no column pose_a or ee_a": rewrite(lambda lines: [line.replace("pose_a", "angle") for line in lines]),
    "line 9 is not 16 numbers": rewrite(lambda lines: [*lines[:7], "\n", "nan" + lines[8][30:], *lines[9:]]),
    "Length of header": rewrite(lambda lines: [lines[0], *(line.replace("\n", ",7\n") for line in lines[1:])]),
    "csv cannot be read: its stamps are no seconds": rewrite(lambda lines: [x.replace(".", "0000.") for x in lines]),
    "left/99999999999.jpg": lambda f, *_: [p.rename(p.with_stem("99999999999")) for p in f.glob("View1/left/*")],
    "0 rows": rewrite(lambda lines: lines[:1]),
    "several columns pose_x": rewrite(lambda lines: [line.replace("pose_y", "Pose_x") for line in lines]),
    "several columns pose_z": rewrite(lambda lines: [line.replace("send_timestamp", "pose_z") for line in lines]),
    "5.00 rows per second": rewrite(lambda lines: [lines[0], *lines[1::20]]),
    "robot_state_20251027_075140.csv cannot be read": rewrite(lambda lines: []),
    "no stretch of 0.1 s": rewrite(lambda lines: lines[:8]),
    "sensor_data_1.npz cannot be read": lambda folder, log, lines: (folder / "sensor_data_1.npz").write_bytes(b"PK no"),
    "expected timestamps, forces, alines": npz(timestamp=np.zeros(3), force=np.zeros(3)),
    "2 alines for 3 timestamps": npz(timestamps=np.arange(3), forces=np.zeros(3), alines=np.zeros((2, 1025))),
    "sensor_data_1.npz cannot be read: its stamps are no seconds": npz(timestamps=[1e18], data=np.zeros((1, 2, 1026))),
    "3 windows for 2 timestamps": npz(timestamps=EPOCH + np.arange(2), data=np.zeros((3, 2, 1026))),
    "timestamps are float64 (1, 1), expected (n,)": npz(timestamps=np.ones((1, 1)), data=np.zeros((1, 2, 1026))),
    "len() of unsized object": npz(timestamps=[EPOCH], forces=np.float32(1), alines=np.zeros((1, 1025))),
    "session.yaml: expected KEY: VALUE, only": lambda bad, *_: (bad / "session.yaml").write_text("exclude: [\n a"),
    "Object arrays cannot be loaded": npz(timestamps=np.array([{}]), forces=np.zeros(1), alines=np.zeros((1, 1025))),
}


@pytest.mark.parametrize("message", BREAKS)
def test_a_recording_that_fails_is_named_and_the_others_are_made(tmp_path, capsys, message):
    bad, good = (recording(tmp_path, np.arange(0, 2, 0.01), name=f"recv_all_{n}") for n in ("bad", "good"))
    log = next(bad.glob("*.csv"))
    BREAKS[message](bad, log, log.read_text().splitlines(keepends=True))
    assert run(tmp_path) == 1
    out = capsys.readouterr()
    assert f"FAILED {bad}" in out.err and message in out.err and "1 failed, 1 made" in out.out
    assert (good / "data.pkl").is_file() and not (bad / "data.pkl").exists() and not list(bad.glob(".tmp*"))
    (bad / "session.yaml").write_text("exclude: true")  # as the message advises
    assert "exclude: true" in out.err and run(tmp_path) == 0 and len(find_sessions([tmp_path])) == 1


def test_workers_make_the_same(tmp_path, capsys):
    """Two processes write what none writes, and name what failed."""
    for side in ("a", "b"):
        make_demo.write_sessions(tmp_path / side, 1, white=2, needle=1, new=0, oct=0, seconds=1.5, size=(24, 40))
        next((tmp_path / side / "Needle_insertion_eye_trocar").rglob("*.csv")).unlink()
    assert run(tmp_path / "a") == cd.main(cd.Config(dataset_dirs=[str(tmp_path / "b")], workers=2)) == 1
    out = capsys.readouterr()
    assert out.out.count("1 failed, 2 made") == 2 and out.err.count("Needle_insertion") == 2
    files = [sorted((tmp_path / side / "White_silicone_white_circle").rglob("data.pkl")) for side in ("a", "b")]
    assert [p.read_bytes() for p in files[0]] == [p.read_bytes() for p in files[1]] and len(files[0]) == 2


def test_a_stop_signal_leaves_no_worker_behind(tmp_path):
    """It comes while the workers read: their logs are pipes, which end when we close them."""
    pipes = [next(recording(tmp_path, TWO_SECONDS, name=f"recv_all_{i}").glob("*.csv")) for i in range(2)]
    for pipe in pipes:
        pipe.unlink()
        os.mkfifo(pipe)
    command = [sys.executable, ROOT / "create_datapkl.py", "--dataset-dirs", tmp_path, "--workers", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        files = [open(pipe, "w") for pipe in pipes]  # noqa: SIM115  waits for the readers
        process.terminate()
        for pipe, file in zip(pipes, files, strict=True):
            pipe.unlink()
            file.close()
        assert "KeyboardInterrupt" in process.communicate(timeout=60)[0]  # the end of every process that can write


def test_the_shipped_config_and_the_guides_flags_parse():
    flags = "--dataset-dirs a b --new-dataset-dir c --action-hz 10 --tolerance-ms 20 --workers 2 --force --dry-run"
    cfg = parse_config(cd.Config, ["--config", str(ROOT / "configs/datapkl.yaml"), *flags.split()])
    assert (cfg.dataset_dirs, cfg.new_dataset_dir, cfg.workers) == (["a", "b"], "c", 2) and cfg.force and cfg.dry_run


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tolerance-ms", "0"], "tolerance_ms is 0"),
        (["--write-offsets"], "goes with --estimate-offsets"),
        (["--dataset-dirs", "none"], "'none' is not a folder: expected one that holds recordings"),
        ([], "no recordings below"),
    ],
)
def test_wrong_calls(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        run(tmp_path, *argv)


def test_recordings_of_other_hands(shared, tmp_path, capsys):
    """The real-format recordings: CSV at 100 Hz, views, sensor of a part of the time."""
    root = tmp_path / "sessions"
    shutil.copytree(shared / "data/sessions", root, copy_function=shutil.copyfile)
    for p in [root, *root.rglob("*")]:
        os.chmod(p, 0o755 if p.is_dir() else 0o644)
    assert run(root) == 0 and "left out" in capsys.readouterr().out
    assert run(root, "--min-sensor-overlap", "0.3") == 0
    assert "'min_sensor_overlap': 0.9}, is" in capsys.readouterr().out
    found = {s.dataset: s for s in find_sessions([root])}
    assert {d: (len(s), s.has_sensor, len(s.view_names)) for d, s in found.items()} == {
        "Needle_insertion_eye_trocar": (29, True, 9),
        "OCT_insertion": (139, False, 9),
        "White_silicone_white_circle": (29, True, 2),
    }
    for s in found.values():
        rows = np.loadtxt(next(s.path.glob("robot_state*.csv")), delimiter=",", skiprows=1)
        pose = np.unwrap(rows[:, 10:], period=360, axis=0)
        way = [np.interp([s.starts[0], s.ends[-1]], rows[:, 1], column) for column in pose.T]
        assert np.allclose(s.action[:, :6].sum(0), np.diff(way, axis=1)[:, 0], atol=1e-3)
