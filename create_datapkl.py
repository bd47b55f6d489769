"""Robot recordings -> data.pkl: motions of 0.1 s by timestamp, images and sensor on one clock. Once per recording, before everything else of guide 5.

    python create_datapkl.py --dataset-dirs /data/White_silicone_white_circle /data/OCT_insertion --new-dataset-dir /data/Make_dataset/New_dataset
    python create_datapkl.py --dataset-dirs /data --dry-run          # read all, write nothing: rates, gaps, durations, sensor overlap

Three layouts (N rows of the robot log, Ns of the sensor, Nw windows):
    old      <data set>/recv_all_*/     robot_state_*.csv, sensor_data_*.npz {timestamps (Ns,), forces (Ns,), alines (Ns, 1025)}, View1..4/{left,right}/*_<epoch>.jpg, View5/
    new      New_dataset/<Task>/episode_*/   robot_states.csv, sensor_data.npz {timestamps (Nw,), data (Nw, 650, 1026)}, images/View1..5/<epoch>.jpg
    legacy   <data set>/Captures*/, ZED_Captures_*th/   robot_rt_*.csv, view1..4/{left,right}/, view5_oak/, no sensor
CSV: origin_timestamp (or timestamp, recv_timestamp) in seconds, joint_1..6 (or joint_angle_1..6) in degrees, pose_x, y, z, a, b, r (or EE_*) in mm and degrees.

data.pkl, beside the recording's files (builtins and arrays only, N actions):
    schema_version 2 | action (N, 7) float32: pose delta in mm and degrees (wrapped to [-180, 180)), and the constant 1.0 | action_timestamps,
    action_end_timestamps (N,) float64 | segment_id (N,) int32 | robot_state (N, 12) float32: joints and pose at the start | image {view: [paths relative to the
    folder]}, image_timestamps {view: (M,) float64} | sensor_data None or {file, timestamps (Ns,) float64 on the robot's clock, rate_hz, channels, clock_offset_s};
    the file, sensor_stream.npy, holds the rows (Ns, 1026) float32: force, A-scan | instruction | metadata
Inside a segment every action begins where the one before ended, so that they add up to the whole motion. A gap in the log begins a new segment.
"""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.checkpoint import atomic_path, require_space
from common.config import parse_config
from common.sessions import (
    CHANNELS,
    DATA_PKL,
    ROBOT_CSV,
    SCHEMA,
    SENSOR_FILE,
    SENSOR_HZ,
    BadSession,
    find_recordings,
    identity,
    load_data_pkl,
    source_facts,
)


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    dataset_dirs: list[str] = field(default_factory=list)  # folders with recordings, searched recursively
    new_dataset_dir: str | None = None  # one more: Make_dataset/New_dataset
    action_hz: float = 10.0  # actions per second
    tolerance_ms: float = 20.0  # the row that ends an action lies closer than this to 1 / action_hz after its start
    sensor_clock_offset: float = 0.0  # seconds to add to the sensor's time to get the robot's
    min_sensor_overlap: float = (
        0.9  # share of the robot log that the sensor must cover; below it is left out, for the clocks may differ
    )
    instruction: dict = field(
        default_factory=dict
    )  # {data set or task: text} over the texts derived from the folder's name
    workers: int = 4  # processes; 0: in this one
    force: bool = False  # make every data.pkl again; otherwise only where the recording or a setting changed
    dry_run: bool = False  # read and report, write nothing


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    for wrong, message in (
        (
            not cfg.dataset_dirs and not cfg.new_dataset_dir,
            "dataset_dirs is empty: name the folders with recordings, --dataset-dirs DATA, or --new-dataset-dir DATA",
        ),
        (not cfg.action_hz > 0, f"action_hz is {cfg.action_hz}: expected more than 0"),
        (
            not 0 < cfg.tolerance_ms < 500 / cfg.action_hz if cfg.action_hz > 0 else False,
            f"tolerance_ms is {cfg.tolerance_ms}: expected more than 0 and less than half an action, {500 / max(cfg.action_hz, 1e-9):g}",
        ),
        (
            not 0 <= cfg.min_sensor_overlap <= 1,
            f"min_sensor_overlap is {cfg.min_sensor_overlap}: expected a share from 0 to 1",
        ),
        (cfg.workers < 0, f"workers is {cfg.workers}: expected 0 or more"),
    ):
        if wrong:
            raise ValueError(message)


# ---- robot -----------------------------------------------------------------------------------------------------------

TIME_COLUMNS = (
    "origin_timestamp",
    "timestamp",
    "recv_timestamp",
)  # in this order: recv stamps are per poll, several rows share one
JOINTS = [(f"joint_{i}", f"joint_angle_{i}") for i in range(1, 7)]
POSE = [(f"pose_{c}", f"ee_{c}") for c in "xyzabr"]


def read_robot(path):
    """CSV -> (stamps (n,) float64 increasing, rows (n, 12) float64 joints and pose, number of rows dropped because their stamp was not newer)."""
    with open(path, newline="", encoding="utf-8-sig") as f:
        lines = list(csv.reader(f))
    if len(lines) < 3:
        raise BadSession(
            f"{path.name} has {max(0, len(lines) - 1)} rows, expected a header and a row every 1 to 100 ms"
        )
    header = [name.strip().lower() for name in lines[0]]
    columns = []
    for names in (TIME_COLUMNS, *JOINTS, *POSE):
        there = [name for name in names if name in header]
        if not there:
            raise BadSession(f"{path.name} has no column {' or '.join(names)}; it has {', '.join(header)}")
        columns.append(header.index(there[0]))
    if len(lines[-1]) < len(header):  # the recorder was stopped in the middle of it
        lines.pop()
    rows = np.empty((len(lines) - 1, 13))
    for i, line in enumerate(lines[1:]):
        try:
            rows[i] = [float(line[c]) for c in columns]
        except (ValueError, IndexError):
            raise BadSession(
                f"{path.name} line {i + 2}: expected {len(header)} numbers, got {','.join(line)[:80]!r}"
            ) from None
    if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
        raise BadSession(f"{path.name} line {bad[0] + 2} has a value that is not finite")
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    newer = np.r_[True, np.diff(rows[:, 0]) > 0]  # the publisher resends its newest pose
    return rows[newer, 0], rows[newer, 1:], int((~newer).sum())


def wrap_degrees(d):
    """Angle difference -> [-180, 180)."""
    return (d + 180) % 360 - 180


def match_steps(stamps, period, tolerance):
    """Stamps (n,) in seconds -> (begin, end, segment), (N,) int each: chain of row pairs `period` apart. The end is the row nearest to begin + period, strictly
    closer than `tolerance` (epoch seconds are good to 0.3 us); the next action begins there. Where there is none the segment ends, and the next begins at the first row that has one."""
    wanted = stamps + period
    after = np.searchsorted(stamps, wanted).clip(1, len(stamps) - 1)
    nearest = np.where(wanted - stamps[after - 1] <= stamps[after] - wanted, after - 1, after)
    good = (np.abs(stamps[nearest] - wanted) < tolerance - 1e-6) & (nearest > np.arange(len(stamps)))
    begin, end, segment, i, broken = [], [], [], 0, False
    while i < len(stamps):
        if good[i]:
            segment.append(segment[-1] + broken if segment else 0)
            begin.append(i)
            end.append(nearest[i])
            i, broken = nearest[i], False
        else:
            i, broken = i + 1, True
    return np.array(begin, int), np.array(end, int), np.array(segment, np.int32)


# ---- sensor ----------------------------------------------------------------------------------------------------------


def npy_rows(archive, name, block):
    """Yield blocks (<= block, ...) of the first axis of one array in an open .npz, without reading all of it."""
    with archive.open(name + ".npy") as f:
        version = np.lib.format.read_magic(f)
        shape, fortran, dtype = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )(f)
        if dtype.hasobject or (fortran and len(shape) > 1):
            raise BadSession(
                f"{Path(archive.filename).name}: {name} is {dtype}{', Fortran order' if fortran else ''}, expected C-order numbers"
            )
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for at in range(0, shape[0], block):
            n = min(block, shape[0] - at)
            raw = f.read(n * size)
            if len(raw) < n * size:
                raise BadSession(
                    f"{Path(archive.filename).name}: {name} ends after {at + len(raw) // size} of {shape[0]} rows"
                )
            yield np.frombuffer(raw, dtype).reshape(n, *shape[1:])


def open_sensor(paths):
    """npz files of one recording -> (first stamp, last stamp, function that yields (stamps (n,), rows (n, 1026) float32) in order of time)."""
    kinds, spans = set(), []
    for path in paths:
        try:
            with np.load(path, allow_pickle=False) as z:
                keys = set(z.files)
                stamps = z["timestamps"] if "timestamps" in keys else np.zeros(0)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError, KeyError) as error:
            raise BadSession(f"{path.name} cannot be read ({type(error).__name__}: {error})") from error
        kind = (
            "windows"
            if {"timestamps", "data"} <= keys
            else "stream"
            if {"timestamps", "forces", "alines"} <= keys
            else None
        )
        if kind is None:
            raise BadSession(
                f"{path.name} has {', '.join(sorted(keys))}; expected timestamps, forces, alines (old) or timestamps, data (new)"
            )
        if stamps.ndim != 1 or not np.isfinite(stamps).all():
            raise BadSession(
                f"{path.name}: timestamps are {stamps.shape}, or not all finite; expected one finite number per {'window' if kind == 'windows' else 'row'}"
            )
        kinds.add(kind)
        if len(stamps):
            first = stamps.min() - (649 / SENSOR_HZ if kind == "windows" else 0)
            spans.append((first, stamps.max(), path))
    if not spans:
        return None
    if len(kinds) > 1:
        raise BadSession(f"{', '.join(p.name for p in paths)}: expected all as one stream or all as windows, not both")
    spans.sort()
    read = read_windows if kinds == {"windows"} else read_stream

    def rows():
        last = -np.inf
        for *_, path in spans:
            for stamps, block in read(path):
                keep = stamps > last  # strictly newer than everything before
                keep[keep] = np.r_[True, np.diff(np.maximum.accumulate(stamps[keep])) > 0] if keep.any() else keep[keep]
                if keep.any():
                    last = stamps[keep][-1]
                    yield stamps[keep], block[keep]

    return spans[0][0], max(s[1] for s in spans), rows


def read_stream(path):
    """Old form -> blocks of (stamps, rows), by stamp."""
    with zipfile.ZipFile(path) as archive:
        stamps = np.concatenate([*npy_rows(archive, "timestamps", 1 << 20)]).astype(np.float64)
        forces = np.concatenate([*npy_rows(archive, "forces", 1 << 20)]).astype(np.float32).reshape(-1, 1)
        at, blocks = 0, npy_rows(archive, "alines", 6500)
        if np.any(np.diff(stamps) < 0):  # datagrams that overtook each other: all at once, to sort them
            whole, order = np.concatenate([*blocks]), np.argsort(stamps, kind="stable")
            check_rows(path, stamps, forces, whole)
            stamps, forces, blocks = stamps[order], forces[order], [whole[order]]
        for block in blocks:
            check_rows(path, stamps[at : at + len(block)], forces[at : at + len(block)], block)
            yield (
                stamps[at : at + len(block)],
                np.concatenate([forces[at : at + len(block)], block.astype(np.float32)], axis=1),
            )
            at += len(block)
        check_rows(path, stamps[at:], forces[at:], np.zeros((0, CHANNELS - 1)))


def check_rows(path, stamps, forces, alines):
    if not len(stamps) == len(forces) == len(alines) or alines.shape[1:] != (CHANNELS - 1,):
        raise BadSession(
            f"{path.name}: timestamps, forces and alines have other lengths, or alines are not (n, {CHANNELS - 1})"
        )


def read_windows(path):
    """New form: overlapping windows of the newest 650 rows -> blocks of (stamps, the rows that are new). The saver runs on a wall clock, so how many are new
    varies; it is found where the window repeats the one before. Nothing in common: a gap, all are new."""
    with zipfile.ZipFile(path) as archive:
        ends = np.concatenate([*npy_rows(archive, "timestamps", 1 << 20)]).astype(np.float64)
        before, before_end = None, -np.inf
        for end, window in zip(ends, (w for block in npy_rows(archive, "data", 16) for w in block)):
            if window.ndim != 2 or window.shape[1] != CHANNELS:
                raise BadSession(f"{path.name}: a window is {window.shape}, expected (650, {CHANNELS})")
            if end <= before_end:  # the same window again, or an older one
                continue
            n = len(window) if before is None else new_rows(before, window, (end - before_end) * SENSOR_HZ)
            if n:
                stamps = end - np.arange(n - 1, -1, -1) / SENSOR_HZ
                if stamps[0] <= before_end:
                    # more rows than fit at 650 Hz: the clock of the saver jittered; spread them
                    stamps = before_end + (end - before_end) * np.arange(1, n + 1) / n
                yield stamps, np.asarray(window[-n:], np.float32)
            before, before_end = window, end


def new_rows(before, window, expected):
    """Number of rows at the end of `window` that `before` did not have; of several that fit (a resting sensor) the one nearest to `expected`."""
    size = len(window)
    fits = [
        n
        for n in range(size)
        if np.array_equal(window[size - n - 1], before[-1]) and np.array_equal(window[: size - n], before[n:])
    ]
    return min(fits, key=lambda n: abs(n - expected)) if fits else size


class NpyWriter:
    """Rows -> .npy of a length that is known at the end. NumPy pads the header so that the first axis can grow in place."""

    def __init__(self, path):
        self.file, self.count = open(path, "wb"), 0
        self.file.write(self._header())

    def _header(self):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            buffer, dict(shape=(self.count, CHANNELS), fortran_order=False, descr="<f4")
        )
        return buffer.getvalue()

    def write(self, rows):
        self.file.write(np.ascontiguousarray(rows, "<f4").tobytes())
        self.count += len(rows)

    def close(self):
        self.file.seek(0)
        self.file.write(self._header())
        self.file.close()


# ---- images ----------------------------------------------------------------------------------------------------------


def list_images(folder):
    """Recording folder -> ({view: [(stamp, path relative to it)] by time}, names without a time). View names: View1..; with _left, _right for stereo folders."""
    views, nameless = {}, []
    root = next((folder / name for name in sorted(os.listdir(folder)) if name.lower() == "images"), folder)
    for name in sorted(os.listdir(root)):
        number = re.match(r"view_?(\d+)", name, re.I)
        if not number or not (root / name).is_dir():
            continue
        for place, eye in (
            (root / name, ""),
            *(
                (root / name / sub, f"_{sub.lower()}")
                for sub in sorted(os.listdir(root / name))
                if sub.lower() in ("left", "right") and (root / name / sub).is_dir()
            ),
        ):
            for entry in os.scandir(place):
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() not in (".jpg", ".jpeg", ".png") or entry.name.startswith("."):
                    continue
                path = (place / entry.name).relative_to(folder).as_posix()
                try:
                    stamp = float(stem.rsplit("_", 1)[-1])
                except ValueError:
                    stamp = float("nan")
                if not np.isfinite(stamp):
                    nameless.append(path)
                    continue
                views.setdefault(f"View{number[1]}{eye}", []).append((stamp, path))
    return {view: sorted(images) for view, images in sorted(views.items())}, sorted(nameless)


# ---- one recording ---------------------------------------------------------------------------------------------------


def instruction_of(dataset, task, given):
    """Text for a recording: given for its task or data set, else from the names."""
    for name in (task, dataset):
        if name in given:
            return str(given[name])
    name = f"{dataset} {task}".lower()
    if "white" in name and "circle" in name:
        return "Insert the needle into the white circle"
    if "trocar" in name:
        return "Insert the needle into the eye trocar"
    if point := re.search(r"(\w+)_point", task.lower()):
        return f"Insert the needle into the {point[1]} point"
    return "Insert the needle into the target point"


def describe(folder):
    """Recording folder -> (format, robot CSV, sensor files, images, names without a time); BadSession where no robot log or no image is."""
    names = sorted(os.listdir(folder))
    logs = [folder / n for n in names if ROBOT_CSV.fullmatch(n)]
    if len(logs) != 1:
        raise BadSession(
            f"has {len(logs)} robot logs ({', '.join(p.name for p in logs) or 'none'}); expected one robot_state_*.csv, robot_states.csv or robot_rt_*.csv"
        )
    images, nameless = list_images(folder)
    if not images:
        raise BadSession(
            f"has no image with a time in its name (View1/left/*_<epoch>.jpg or images/View1/<epoch>.jpg){f'; {len(nameless)} without, e.g. {nameless[0]}' if nameless else ''}"
        )
    sensor = [folder / n for n in names if re.fullmatch(r"sensor_data.*\.npz", n, re.I)]
    kind = (
        "legacy"
        if logs[0].name.lower().startswith("robot_rt")
        else "new"
        if logs[0].name.lower() == "robot_states.csv"
        else "old"
    )
    return kind, logs[0], sensor, images, nameless


def process(folder, cfg):
    """Preprocess one recording -> report {name, status: made | unchanged | read | failed, error, warnings [], and the table's columns}. Raises only on a bug."""
    dataset, task, episode = identity(folder)
    report = dict(name=f"{dataset}/{task}/{episode}", folder=str(folder), status="failed", error="", warnings=[])
    try:
        return report | _process(Path(folder), dataset, task, cfg)
    except (BadSession, OSError, UnicodeDecodeError, csv.Error, zipfile.BadZipFile) as error:
        return report | dict(error=str(error) if isinstance(error, BadSession) else f"{type(error).__name__}: {error}")


def _process(folder, dataset, task, cfg):
    kind, log, sensor_files, images, nameless = describe(folder)
    instruction = instruction_of(dataset, task, cfg.instruction)
    sources = [[p.name, *source_facts(p)] for p in (log, *sensor_files)]
    settings = {k: getattr(cfg, k) for k in ("action_hz", "tolerance_ms", "sensor_clock_offset", "min_sensor_overlap")}
    known = json.dumps([SCHEMA, sources, settings, instruction, images], sort_keys=True)
    fingerprint = hashlib.sha256(known.encode()).hexdigest()[:24]
    if not cfg.force and (made := existing(folder, fingerprint)):
        return dict(status="unchanged", warnings=made["warnings"], **columns(made))

    warnings = (
        [f"{len(nameless)} images without a time in their name are left out, e.g. {nameless[0]}"] if nameless else []
    )
    stamps, rows, duplicates = read_robot(log)
    period, tolerance = 1 / cfg.action_hz, cfg.tolerance_ms / 1000
    steps = np.diff(stamps)
    hz = 1 / float(np.median(steps)) if len(steps) else 0.0
    if hz < 1 / (period + tolerance):
        raise BadSession(
            f"{log.name} has {hz:.2f} rows per second, actions at {cfg.action_hz:g} Hz need {1 / (period + tolerance):.2f} or more. Lower --action-hz, or leave this recording out"
        )
    begin, end, segment = match_steps(stamps, period, tolerance)
    if not len(begin):
        raise BadSession(
            f"{log.name}: no two rows of {len(stamps)} are {period:g} s apart (within {cfg.tolerance_ms:g} ms); it covers {stamps[-1] - stamps[0]:.3f} s. Leave this recording out"
        )
    delta = rows[end, 6:] - rows[begin, 6:]
    delta[:, 3:] = wrap_degrees(delta[:, 3:])
    for view, shots in images.items():
        inside = sum(stamps[0] - 1.5 <= t <= stamps[-1] for t, _ in shots)
        if not inside:
            warnings.append(
                f"{view}: none of {len(shots)} images is of the time of the robot log ({stamps[0]:.3f} .. {stamps[-1]:.3f}, images {shots[0][0]:.3f} .. {shots[-1][0]:.3f}): the clocks differ"
            )
    span, overlap, sensor = stamps[-1] - stamps[0], None, open_sensor(sensor_files) if sensor_files else None
    if sensor_files and not sensor:
        warnings.append(f"{', '.join(p.name for p in sensor_files)} hold no rows: no sensor")
    if sensor:
        first, last, read = sensor[0] + cfg.sensor_clock_offset, sensor[1] + cfg.sensor_clock_offset, sensor[2]
        overlap = max(0.0, min(last, stamps[-1]) - max(first, stamps[0])) / span
        if overlap < cfg.min_sensor_overlap:
            warnings.append(
                f"the sensor covers {overlap:.0%} of the robot log ({first - stamps[0]:+.2f} s to {last - stamps[0]:+.2f} s of {span:.2f} s), less than {cfg.min_sensor_overlap:.0%}: left out. "
                "Other clock: --sensor-clock-offset S; right as it is: --min-sensor-overlap "
                + f"{np.floor(overlap * 20) / 20:g}"
            )
            sensor = None
    metadata = dict(
        episode_name=folder.name,
        robot_hz=hz,
        action_hz=cfg.action_hz,
        num_actions=len(begin),
        num_robot_states=len(stamps),
        duration_seconds=float(span),
        has_sensor=sensor is not None,
        tolerance_s=tolerance,
        n_gaps=int((steps >= period + tolerance).sum()),
        n_segments=int(segment[-1]) + 1,
        n_duplicates=duplicates,
        sensor_overlap=overlap,
        format=kind,
        sources=sources,
        settings=settings,
        fingerprint=fingerprint,
        warnings=warnings,
        views={view: len(shots) for view, shots in images.items()},
    )
    if cfg.dry_run:
        return dict(status="read", warnings=warnings, **columns(metadata))

    stream = None
    if sensor:
        require_space(folder, int(span * SENSOR_HZ * CHANNELS * 4))
        (folder / DATA_PKL).unlink(missing_ok=True)  # a kill from here on must not leave it beside another stream
        parts = []
        with atomic_path(folder / SENSOR_FILE) as temporary:
            writer = NpyWriter(temporary)
            for t, block in read():
                if not np.isfinite(block).all():
                    raise BadSession(
                        f"{', '.join(p.name for p in sensor_files)}: a row at {t[0]:.3f} .. {t[-1]:.3f} is not finite"
                    )
                writer.write(block)
                parts.append(t)
            writer.close()
        stream = dict(
            file=SENSOR_FILE,
            timestamps=np.concatenate(parts) + cfg.sensor_clock_offset,
            rate_hz=float(SENSOR_HZ),
            channels=CHANNELS,
            clock_offset_s=cfg.sensor_clock_offset,
        )
    data = dict(
        schema_version=SCHEMA,
        action=np.concatenate([delta, np.ones((len(delta), 1))], axis=1).astype(np.float32),
        action_timestamps=stamps[begin],
        action_end_timestamps=stamps[end],
        segment_id=segment,
        robot_state=rows[begin].astype(np.float32),
        image={view: [path for _, path in shots] for view, shots in images.items()},
        image_timestamps={view: np.array([t for t, _ in shots]) for view, shots in images.items()},
        sensor_data=stream,
        instruction=instruction,
        metadata=metadata,
    )
    with atomic_path(folder / DATA_PKL) as temporary:
        temporary.write_bytes(pickle.dumps(data, protocol=4))
    if stream is None:
        (folder / SENSOR_FILE).unlink(missing_ok=True)  # of an earlier run with other settings
    return dict(status="made", warnings=warnings, **columns(metadata))


def existing(folder, fingerprint):
    """metadata of the data.pkl that is there, if it was made from these sources with these settings and is whole; else None."""
    try:
        data = load_data_pkl(folder / DATA_PKL)
    except (OSError, BadSession):  # missing, damaged or of another program: make it
        return None
    sensor = data["sensor_data"]
    whole = sensor is None or (
        (folder / sensor["file"]).is_file()
        and (folder / sensor["file"]).stat().st_size >= len(sensor["timestamps"]) * CHANNELS * 4
    )
    return data["metadata"] if whole and data["metadata"].get("fingerprint") == fingerprint else None


def columns(m):
    """metadata -> what the report shows."""
    return dict(
        format=m["format"],
        hz=m["robot_hz"],
        seconds=m["duration_seconds"],
        actions=m["num_actions"],
        segments=m["n_segments"],
        gaps=m["n_gaps"],
        duplicates=m["n_duplicates"],
        views=m["views"],
        overlap=m["sensor_overlap"],
        has_sensor=m["has_sensor"],
    )


# ---- all of them -----------------------------------------------------------------------------------------------------


def table(reports):
    """Reports -> lines."""
    width = max(len(r["name"]) for r in reports)
    lines = [
        f"{'recording':<{width}}  status     format  rows/s  seconds  actions  segments  gaps  duplicates  sensor       images per view"
    ]
    for r in reports:
        if r["status"] == "failed":
            lines.append(f"{r['name']:<{width}}  FAILED")
            continue
        sensor = "none" if r["overlap"] is None else f"{r['overlap']:.0%}" + ("" if r["has_sensor"] else " left out")
        lines.append(
            f"{r['name']:<{width}}  {r['status']:<9}  {r['format']:<6}  {r['hz']:6.1f}  {r['seconds']:7.1f}  {r['actions']:7d}  {r['segments']:8d}  {r['gaps']:4d}  {r['duplicates']:10d}  {sensor:<11}  "
            + " ".join(f"{view}:{n}" for view, n in r["views"].items())
        )
    return lines


def main(cfg):
    """Process all recordings, print the report; returns the number of those that failed."""
    check_config(cfg)
    roots = [*cfg.dataset_dirs, *([cfg.new_dataset_dir] if cfg.new_dataset_dir else [])]
    folders = find_recordings(roots)
    if not folders:
        raise FileNotFoundError(
            f"no recordings below {', '.join(roots)}: expected folders recv_all_*, episode_*, Captures* or ZED_Captures_* with a robot CSV"
        )
    bar = partial(tqdm, total=len(folders), desc="recordings", unit="recording", disable=None)
    one = partial(process, cfg=cfg)
    if cfg.workers and len(folders) > 1:
        try:
            with ProcessPoolExecutor(min(cfg.workers, len(folders)), multiprocessing.get_context("fork")) as pool:
                reports = list(bar(pool.map(one, map(str, folders))))
        except BrokenProcessPool as error:
            raise ValueError(
                f"a worker was killed (workers is {cfg.workers}), mostly for memory. Lower it; what is finished stays"
            ) from error
    else:
        reports = list(bar(map(one, map(str, folders))))
    print("\n".join(table(reports)))
    for r in reports:
        for warning in r["warnings"]:
            print(f"warning: {r['name']}: {warning}")
    failed = [r for r in reports if r["status"] == "failed"]
    good = [r for r in reports if r["status"] != "failed"]
    counts = {s: sum(r["status"] == s for r in reports) for s in ("made", "unchanged", "read", "failed")}
    print(
        f"{len(reports)} recordings: "
        + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        + f"; {sum(r['actions'] for r in good)} actions, {sum(r['seconds'] for r in good) / 60:.1f} min"
        + ("; nothing written (--dry-run)" if cfg.dry_run else "")
    )
    for r in failed:
        print(f"FAILED {r['folder']}: {r['error']}", file=sys.stderr)
    if failed:
        print(
            "A recording that cannot be repaired is left out by a dot before its name: mv FOLDER/recv_all_1 FOLDER/.recv_all_1",
            file=sys.stderr,
        )
    return len(failed)


if __name__ == "__main__":
    config = parse_config(Config, aliases={"dataset_dir": "dataset_dirs"})
    try:
        sys.exit(1 if main(config) else 0)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"create_datapkl.py: {error}")
