"""Preprocess robot recordings: write a data.pkl into each, with actions of exactly 0.1 s, images and sensor rows on one
clock. The first step of guide 5.

    python create_datapkl.py --dataset-dirs /data --new-dataset-dir /data/Make_dataset/New_dataset
    python create_datapkl.py --dataset-dirs /data --dry-run            # read all, write nothing: rates, gaps, overlap
    python create_datapkl.py --dataset-dirs /data --estimate-offsets   # by how much do the clocks differ?

Three layouts (Ns rows of the sensor, Nw windows):
    old      <data set>/recv_all_*/     robot_state_*.csv, sensor_data_*.npz {timestamps (Ns,), forces (Ns,),
                                        alines (Ns, 1025)}, View1..4/{left,right}/*_<epoch>.jpg, View5/
    new      New_dataset/<Task>/episode_*/   robot_states.csv, sensor_data.npz {timestamps (Nw,), data (Nw, 650, 1026)},
                                        images/View1..5/<epoch>.jpg
    legacy   <data set>/Captures*/, ZED_Captures_*th/   robot_rt_*.csv, view1..4/{left,right}/, view5_oak/, no sensor
CSV: origin_timestamp (or timestamp, recv_timestamp) in seconds, joint_1..6 (or joint_angle_1..6) in degrees,
pose_x, y, z, a, b, r (or EE_*) in mm and degrees. session.yaml beside it (all keys optional): sensor_offset_s,
camera_offset_s, instruction, dataset, exclude; see common.sessions.read_notes.

data.pkl, beside the recording's files (plain values, arrays as (dtype, shape, bytes); N actions):
    schema_version 4 | action (N, 7) float32: pose delta in mm and degrees, and the constant 1.0 | action_timestamps,
    action_end_timestamps (N,) float64, 0.1 s apart | segment_id (N,) int32 | robot_state (N, 12) float32: joints and
    pose, the newest row at the action's start | image {view: [paths relative to the folder]}, image_timestamps {view:
    (M,) float64}, image_size {view: [height, width]} | sensor_data None or {file, timestamps (Ns,) float64 on the
    robot's clock, rate_hz, channels, dtype, mean, std (1026,) float64}; the file, sensor_stream.npy, holds the rows
    (Ns, 1026): force, A-scan; fp16 where that is exact enough (FP16_ERROR), else fp32 | instruction | metadata
The actions of a segment add up to the difference of its end poses. A gap in the log begins a new segment.
"""

import contextlib
import errno
import glob
import io
import itertools
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from warnings import catch_warnings, simplefilter

import numpy as np
import pandas as pd
import yaml
from pandas.errors import ParserWarning
from PIL import Image
from tqdm import tqdm

from common import MissingFile, UserError, require
from common import sessions as ss
from common.checkpoint import atomic_path, require_space
from common.program import launch
from common.sessions import CHANNELS, SENSOR_HZ, BadSession

ALIASES = dict(dataset_dir="dataset_dirs")

# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    dataset_dirs: list[str] = field(default_factory=list)  # folders with recordings, searched recursively
    new_dataset_dir: str | None = None  # one more: Make_dataset/New_dataset
    action_hz: float = 10.0  # actions per second; the trainings expect 10
    tolerance_ms: float = 20.0  # two rows of the robot log further apart than an action and this are a gap
    min_sensor_overlap: float = 0.9  # share of the actions that the sensor must cover, else it is left out
    instruction: dict[str, str] = field(default_factory=dict)  # {data set or task: text}, else from their names
    workers: int = 4  # processes; 0: in this one
    force: bool = False  # make every data.pkl again; otherwise only where the recording or a setting changed
    dry_run: bool = False  # read and report, write nothing
    estimate_offsets: bool = False  # only propose clock offsets: robot speed against image motion and force
    write_offsets: bool = False  # with estimate_offsets: put the clear ones into each recording's session.yaml


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    given = cfg.dataset_dirs or cfg.new_dataset_dir
    require(given, "dataset_dirs is empty: name the folders with recordings, --dataset-dirs DATA, or --new-dataset-dir")
    require(cfg.action_hz > 0, f"action_hz is {cfg.action_hz}: expected more than 0")
    require(cfg.tolerance_ms > 0, f"tolerance_ms is {cfg.tolerance_ms}: expected more than 0")
    require(0 <= cfg.min_sensor_overlap <= 1, f"min_sensor_overlap is {cfg.min_sensor_overlap}: expected 0 to 1")
    require(cfg.workers >= 0, f"workers is {cfg.workers}: expected 0 or more")
    require(cfg.estimate_offsets or not cfg.write_offsets, "write_offsets goes with --estimate-offsets")


# ---- robot -----------------------------------------------------------------------------------------------------------

TIMES = ("origin_timestamp", "timestamp", "recv_timestamp")  # recv stamps come last: several rows share one
JOINTS = [(f"joint_{i}", f"joint_angle_{i}") for i in range(1, 7)]
SECONDS = 1e10  # larger stamps are milli- or nanoseconds
SLACK = 1e-5  # seconds; float64 resolves today's epoch stamps to 0.3 us
POSE = [(f"pose_{c}", f"ee_{c}") for c in "xyzabr"]


@contextlib.contextmanager
def reading(path):
    """Turn what a damaged file raises into a BadSession that names the file."""
    try:
        yield
    except (ValueError, TypeError, KeyError, EOFError, ParserWarning, zipfile.BadZipFile, zlib.error) as error:
        raise BadSession(f"{path.name} cannot be read: {str(error).strip()}") from error


def read_robot(path):
    """CSV -> (stamps (n,) float64, rows (n, 12) float64 joints and pose), in the order of the file."""
    with reading(path):
        text = path.read_text(encoding="utf-8-sig")
        text = text[: text.rfind("\n") + 1]  # without a last row that the recorder could not finish
        with catch_warnings():
            simplefilter("error", ParserWarning)  # rows longer than the header
            table = pd.read_csv(io.StringIO(text), index_col=False)
        # pandas numbers a name that is there twice
        table.columns = [re.sub(r"\.\d+$", "", name.strip().lower()) for name in table.columns]
        chosen = []
        for names in (TIMES, *JOINTS, *POSE):
            present = [name for name in names if name in table.columns]
            lacks = f"it has no column {' or '.join(names)} among {', '.join(table.columns)}"
            require(present, lacks, ValueError)
            twice = f"it has several columns {present[0]} among {', '.join(table.columns)}"
            require(table.columns.tolist().count(present[0]) == 1, twice, ValueError)
            chosen.append(present[0])
        rows = table[chosen].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
        if len(bad := np.flatnonzero(~np.isfinite(rows).all(1))):
            lines = [(i + 1, line) for i, line in enumerate(text.splitlines()) if line.strip()]
            number, line = lines[bad[0] + 1]
            raise ValueError(f"line {number} is not {len(table.columns)} numbers: {line[:80]!r}")
        require(len(rows) > 1, f"it has {len(rows)} rows, expected one every 1 to 125 ms", ValueError)
        require((rows[:, 0] < SECONDS).all(), f"its stamps are no seconds: {rows[0, 0]:.0f}", ValueError)
    return rows[:, 0], rows[:, 1:]


def find_stretches(stamps, period, tolerance):
    """Stamps (n,) in the order of the file -> (stretches: arrays of row numbers with rising stamps and no gap; rows at
    which the clock steps back; number of gaps). Rows that are not newer than all before are left out: the publisher
    resends its newest pose, and packets overtake each other."""
    after = np.r_[stamps[2:], -np.inf]
    back = np.flatnonzero((stamps[1:] < stamps[:-1]) & (after < stamps[:-1])) + 1  # for more than one row
    clocks = []
    for rows in np.split(np.arange(len(stamps)), back):
        newest = np.maximum.accumulate(stamps[rows])
        clocks.append(rows[np.r_[True, stamps[rows[1:]] > newest[:-1]]])
    steps = np.concatenate([np.diff(stamps[rows]) for rows in clocks])
    typical = np.median(steps) if len(steps) else 0.0
    longest = max(period, 1.5 * typical) + tolerance + SLACK
    stretches = []
    for rows in clocks:
        stretches += np.split(rows, np.flatnonzero(np.diff(stamps[rows]) > longest) + 1)
    return stretches, back, len(stretches) - len(clocks)


def make_actions(stamps, rows, stretches, period):
    """-> dict of data.pkl's arrays. In every stretch the pose is interpolated at its first row's time and every period
    after that; an action is the difference of two such poses."""
    parts = {key: [] for key in ss.ARRAYS}
    long = [chosen for chosen in stretches if stamps[chosen[-1]] - stamps[chosen[0]] >= period - SLACK]
    for segment, chosen in enumerate(long):
        t, pose = stamps[chosen], rows[chosen, 6:]
        grid = t[0] + period * np.arange(int((t[-1] - t[0] + SLACK) / period) + 1)
        pose[:, 3:] = np.unwrap(pose[:, 3:], period=360, axis=0)
        delta = np.diff([np.interp(grid, t, column) for column in pose.T]).T
        newest = np.searchsorted(t, grid[:-1] + SLACK, side="right") - 1  # causal: no row after the action's start
        action, segment_id = np.c_[delta, np.ones(len(delta))], np.full(len(delta), segment)
        arrays = (action, grid[:-1], grid[1:], segment_id, rows[chosen[newest]])
        for key, array in zip(ss.ARRAYS, arrays, strict=True):
            parts[key].append(array)
    return {key: np.concatenate(part).astype(ss.ARRAYS[key][0]) for key, part in parts.items()}


# ---- sensor ----------------------------------------------------------------------------------------------------------

FP16_ERROR = 0.01  # largest RMS rounding error, as a share of a channel's standard deviation
BLOCK = 4096  # rows at a time: a recording's sensor rows may not fit into memory


def read_array(arrays, name, size):
    """An array in an open npz -> (its length, iterator over `size` rows at a time)."""
    file = arrays.zip.open(f"{name}.npy")
    np.lib.format.read_magic(file)
    (length, *shape), fortran, dtype = np.lib.format.read_array_header_1_0(file)
    counts = [min(size, length - i) for i in range(0, length, size)]
    if fortran or dtype.hasobject:
        return length, iter(np.split(arrays[name], np.cumsum(counts)[:-1]))
    row = dtype.itemsize * math.prod(shape)
    return length, (np.frombuffer(file.read(n * row), dtype).reshape(n, *shape) for n in counts)


def read_stream(arrays):
    """Old form: yields (stamps (n,), rows (n, 1026))."""
    stamps, forces, (length, alines) = arrays["timestamps"], arrays["forces"], read_array(arrays, "alines", BLOCK)
    differ = f"{length} alines for {len(stamps)} timestamps and {len(forces)} forces"
    require(len(stamps) == len(forces) == length, differ, ValueError)
    for i, rows in zip(range(0, length, BLOCK), alines, strict=True):
        yield stamps[i : i + BLOCK], np.hstack([forces[i : i + BLOCK].reshape(-1, 1), rows], dtype=np.float32)


def read_windows(arrays):
    """New form: overlapping windows of the newest 650 rows. Yields (stamp of the window (n,), its new rows (n, 1026)).
    The saver runs on a wall clock, so how many are new varies; it is found where the window repeats the one before.
    Nothing in common: a gap, all are new."""
    before, before_end, ends, (length, windows) = None, -np.inf, arrays["timestamps"], read_array(arrays, "data", 1)
    require(length == len(ends), f"{length} windows for {len(ends)} timestamps", ValueError)
    for (window,), end in zip(windows, ends, strict=True):
        if end > before_end:  # else the same window again, an older one, or one without a time
            n = len(window) if before is None else new_rows(before, window, (end - before_end) * SENSOR_HZ)
            yield np.full(n, end), window[len(window) - n :].astype(np.float32)
            before, before_end = window, end


def new_rows(before, window, expected):
    """-> number of rows at the end of `window` that `before` does not have; if several fit (a sensor at rest), the one
    nearest to `expected`."""
    size, old, new, last = len(window), before.tobytes(), window.tobytes(), before[-1].tobytes()
    ends = [n for n in range(size) if new.startswith(last, (size - n - 1) * len(last))]
    fits = [n for n in ends if new.startswith(old[n * len(last) :])]
    return min(fits, key=lambda n: abs(n - expected)) if fits else size


def spread(stamps, windows=False):
    """Non-decreasing stamps (n,) -> (strictly rising stamps, rows per second).

    Rows share a stamp where the clock ticks slower than they come: they are spread from it to the next one, never
    earlier, for causality. A window's stamp is that of its last row: its rows are spread back to the one before."""
    if windows:
        turned, rate = spread(-stamps[::-1])
        return -turned[::-1], rate
    first = np.flatnonzero(np.r_[True, np.diff(stamps) > 0])
    counts, steps = np.diff(np.r_[first, len(stamps)]), np.diff(stamps[first])
    near = steps <= max(0.1, 3 * np.median(steps)) if len(steps) else []  # the others are pauses
    rate = float(counts[:-1][near].sum() / steps[near].sum()) if np.any(near) else float(SENSOR_HZ)
    each = np.minimum(np.r_[steps, np.inf] / counts, 1 / rate)
    return stamps + (np.arange(len(stamps)) - np.repeat(first, counts)) * np.repeat(each, counts), rate


FORMS = {read_windows: {"timestamps", "data"}, read_stream: {"timestamps", "forces", "alines"}}  # keys of the npz


class NoSensor(BadSession):
    """The sensor's rows cannot be put into temporal order; the recording is usable without them."""


def read_file(path, scratch):
    """One npz, its rows appended to the file `scratch` as float32 -> (its form, stamps (n,) in order, the rows in
    `scratch` they belong to (n,), names of the rows left out because a value is not finite)."""
    begin = scratch.tell() // (4 * CHANNELS)  # number of this file's first row in `scratch`
    read = [(np.zeros(0), np.zeros(0, bool))]  # (stamps, are they and their rows finite?)
    with reading(path), np.load(path) as arrays:
        form = next((form for form, keys in FORMS.items() if keys <= set(arrays)), None)
        expected = "expected timestamps, forces, alines (old) or timestamps, data (new)"
        require(form, f"it has {', '.join(sorted(arrays))}; {expected}", ValueError)
        known = arrays["timestamps"]
        numbers = known.ndim == 1 and known.dtype.kind in "iuf"
        require(numbers, f"timestamps are {known.dtype} {known.shape}, expected (n,) seconds", ValueError)
        known = known[np.isfinite(known)]
        require((known < SECONDS).all(), f"its stamps are no seconds: {known.max(initial=0):.0f}", ValueError)
        if len(back := np.flatnonzero(np.diff(known) < -0.1)):
            step = known[back[0]] - known[back[0] + 1]
            raise NoSensor(f"{path.name}: the clock steps back by {step:.3f} s after stamp {back[0] + 1}")
        for t, rows in form(arrays):
            wrong = f"rows are {rows.shape[1:]}, expected {CHANNELS} numbers: force, A-scan"
            require(rows.shape[1:] == (CHANNELS,), wrong, ValueError)
            scratch.write(np.ascontiguousarray(rows))
            read.append((t, np.isfinite(rows).all(1) & np.isfinite(t)))
    t, good = map(np.concatenate, zip(*read, strict=True))
    order = np.flatnonzero(good)[np.argsort(t[good], kind="stable")]  # datagrams overtake each other
    return form, t[order], begin + order, [f"{path.name} row {i}" for i in np.flatnonzero(~good)]


def read_sensor(paths):
    """npz files of one recording -> (rising stamps (n,); rows (m, 1026) float32, mapped from a temporary file that is
    deleted with them; list of arrays, the numbers of the rows that the stamps belong to; rows per second; names of the
    rows left out). BadSession if they cannot be read, NoSensor if they cannot be put in order."""
    with tempfile.TemporaryFile() as scratch:
        files = [read_file(path, scratch) for path in sorted(paths)]
        scratch.flush()
        parts = sorted([part for part in files if len(part[1])], key=lambda part: part[1][0])
        forms = {form for form, *_ in parts}
        found = "both streams and windows" if forms else "no rows"
        require(len(forms) == 1, f"{', '.join(path.name for path in paths)} hold {found}", NoSensor)
        rows = np.memmap(scratch, np.float32, "r").reshape(-1, CHANNELS)
    stamps, chosen = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    kept = stamps >= np.maximum.accumulate(stamps)  # drop what overlaps with the file before
    stamps, rate = spread(stamps[kept], read_windows in forms)
    blocks = np.split(chosen[kept], range(BLOCK, kept.sum(), BLOCK))
    return stamps, rows, blocks, rate, sum((spoiled for *_, spoiled in files), [])


def compress(rows, blocks):
    """The rows (m, 1026) float32 with the numbers in `blocks` -> (dtype: float16 if that rounds no channel by more than
    FP16_ERROR of its standard deviation (A-scans are integers: exact up to 2,048), else float32; mean, std (1026,)
    float64)."""
    n = sum(map(len, blocks))
    mean = sum(rows[block].sum(0, np.float64) for block in blocks) / n
    std = np.sqrt(sum(np.square(rows[block] - mean).sum(0) for block in blocks) / n)
    with np.errstate(over="ignore", invalid="ignore"):
        errors = (rows[block].astype(np.float16) - rows[block] for block in blocks)
        rounded = np.sqrt(sum(np.square(error).sum(0, np.float64) for error in errors) / n)
    return np.dtype("float16" if (rounded <= FP16_ERROR * ss.sensor_std(std)).all() else "float32"), mean, std


# ---- images ----------------------------------------------------------------------------------------------------------

PLACE, STAMP = r"(?:images/)?view_?(\d+)[^/]*/(?:(left|right)/)?", r"(\d+(?:\.\d*)?)"
IMAGE = re.compile(rf"{PLACE}(?:[^/]*_)?(?:{STAMP}|[^/_]*)\.(?:jpe?g|png)", re.I)


def list_images(folder):
    """Recording folder -> ({view: [(stamp, path relative to it)] by time}, names without a time, broken images). Views
    are View1, ..., with _left, _right for stereo folders."""
    views, nameless, broken, patterns = {}, [], [], ("*/*.*", "*/*/*.*", "*/*/*/*.*")
    names = itertools.chain(*(glob.glob(pattern, root_dir=folder) for pattern in patterns))
    for name in filter(IMAGE.fullmatch, names):
        number, eye, stamp = IMAGE.fullmatch(name).groups()
        if stamp is None or float(stamp) >= SECONDS:
            nameless.append(name)
        elif not is_whole(folder / name):
            broken.append(name)
        else:
            views.setdefault(f"View{number}_{eye.lower()}" if eye else f"View{number}", []).append((float(stamp), name))
    return {view: sorted(images) for view, images in sorted(views.items())}, sorted(nameless), sorted(broken)


def is_whole(path):
    """Does the file begin and end as a JPEG or PNG does?"""
    with open(path, "rb") as f:
        start = f.read(8)
        f.seek(max(0, os.path.getsize(path) - 64))
        end = f.read().rstrip(b"\0")
    jpeg = start.startswith(b"\xff\xd8\xff") and end.endswith(b"\xff\xd9")
    return jpeg or (start == b"\x89PNG\r\n\x1a\n" and end.endswith(b"IEND\xaeB`\x82"))


# ---- one recording ---------------------------------------------------------------------------------------------------


def instruction_of(dataset, task, given):
    """-> the recording's instruction: `given` {task or data set: text}, else a guess from the names."""
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
    """Recording folder -> (format, robot CSV, sensor files, images, warnings); BadSession without log or image."""
    names = sorted(os.listdir(folder))
    logs = [folder / n for n in names if ss.ROBOT_CSV.fullmatch(n)]
    listed = f"has {len(logs)} robot logs ({', '.join(p.name for p in logs) or 'none'})"
    expected = "expected one robot_state_*.csv, robot_states.csv or robot_rt_*.csv"
    require(len(logs) == 1, f"{listed}; {expected}", BadSession)
    images, nameless, broken = list_images(folder)
    warnings = []
    if nameless:
        without = f"{len(nameless)} images without a time in seconds in their name"
        warnings.append(f"warning: {without} are left out, e.g. {nameless[0]}")
    if broken:
        warnings.append(f"warning: {len(broken)} broken images are left out: {', '.join(broken)}")
    lacks = "has no image with a time in seconds in its name (View1/left/*_<epoch>.jpg or images/View1/<epoch>.jpg)"
    require(images, "; ".join([lacks, *warnings]), BadSession)
    sensor = [folder / n for n in names if re.fullmatch(r"sensor_data.*\.npz", n, re.I)]
    stem = logs[0].stem.lower()
    kind = "legacy" if stem.startswith("robot_rt") else {"robot_states": "new"}.get(stem, "old")
    return kind, logs[0], sensor, images, warnings


def shift(images, offset, warnings):
    """{view: [(stamp, path)]} and session.yaml's camera_offset_s -> {view: stamps (M,) on the robot's clock}."""
    by_view = offset if isinstance(offset, dict) else dict.fromkeys(images, offset)
    out, used = {}, set()
    for view, shots in images.items():
        key = view if view in by_view else view.partition("_")[0]  # View1 is for View1_left and View1_right
        out[view] = np.array([t for t, _ in shots]) + by_view.get(key, 0.0)
        used.add(key)
    if unknown := ", ".join(map(str, set(by_view) - used)):
        warnings.append(f"warning: camera_offset_s of {unknown} has no effect: the views are {', '.join(images)}")
    return out


OTHER_CLOCK = "other clock? --estimate-offsets proposes what to write into session.yaml"


def process(folder, cfg):
    """Preprocess one recording -> report {name, folder, status: made | unchanged | read | failed, error, lines to
    print, changes since the last data.pkl, metadata}."""
    report = dict(name=str(folder), folder=str(folder), status="failed", error="", lines=[], changes=[], metadata={})
    try:
        report["name"] = "/".join(ss.identity(folder))
        return report | (estimate if cfg.estimate_offsets else preprocess)(folder, cfg)
    except (OSError, BadSession, MemoryError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC  # of the temporary file; DiskFull names our own
        return report | dict(error=f"{error}: {tempfile.gettempdir()} (set TMPDIR)" if full else str(error))


def preprocess(folder, cfg):
    kind, log, sensor_files, images, warnings = describe(folder)
    notes = ss.read_notes(folder)
    given = dict(
        sources=[],
        image={view: [path for _, path in shots] for view, shots in images.items()},
        instruction=notes["instruction"] or instruction_of(*ss.identity(folder)[:2], cfg.instruction),
        settings={key: getattr(cfg, key) for key in ("action_hz", "tolerance_ms", "min_sensor_overlap")},
        notes=notes,
    )
    for path in (log, *sensor_files):
        with reading(path):
            given["sources"].append([path.name, ss.content_of(path)])
    before = read_existing(folder)
    names = dict(sources="robot log or sensor file", image="images")
    changed = {key: (before.get(key), new) for key, new in given.items() if before and before.get(key) != new}
    changes = [names.get(key, f"{key} (was {old}, is {new})") for key, (old, new) in changed.items()]
    if before and not changes and not cfg.force:
        return dict(status="unchanged", lines=before["warnings"], metadata=before)

    stamps, rows = read_robot(log)
    motion, facts = read_motion(log, stamps, rows, cfg, warnings)
    begin, end = motion["action_timestamps"].min(), motion["action_end_timestamps"].max()
    image_stamps = shift(images, notes["camera_offset_s"], warnings)
    for view, shots in image_stamps.items():
        if not np.any((begin - 1.5 <= shots) & (shots <= end)):
            when = f"images {shots[0] - begin:+.3f} .. {shots[-1] - begin:+.3f} s from its start"
            warnings.append(f"warning: {view}: no image is of the robot log's time ({when}): {OTHER_CLOCK}")
    sensor, overlap = None, None
    if sensor_files:
        sensor, overlap = make_sensor(folder, sensor_files, notes["sensor_offset_s"], motion, cfg, warnings)
    metadata = facts | dict(
        episode_name=folder.name,
        action_hz=cfg.action_hz,
        has_sensor=sensor is not None,
        sensor_hz=sensor["rate_hz"] if sensor else None,
        sensor_overlap=overlap,
        format=kind,
        num_images=sum(map(len, images.values())),
        warnings=warnings,
        **{key: given[key] for key in ("sources", "settings", "notes")},
    )
    report = dict(status="read" if cfg.dry_run else "made", lines=warnings, changes=changes, metadata=metadata)
    if cfg.dry_run:
        return report
    parts = dict(image=given["image"], image_timestamps=image_stamps, instruction=given["instruction"])
    parts["image_size"] = {v: list(Image.open(folder / shots[0][1]).size[::-1]) for v, shots in images.items()}
    with atomic_path(folder / ss.DATA_PKL) as temporary:
        save_data_pkl(temporary, motion | parts | dict(sensor_data=sensor, metadata=metadata))
    if sensor is None:
        (folder / ss.SENSOR_FILE).unlink(missing_ok=True)  # of an earlier run with other settings
    return report


def save_data_pkl(path, data):
    """Write data.pkl's dict (see the head of this file), arrays as numpy arrays, to `path`."""
    path.write_bytes(pickle.dumps(pack(data | dict(schema_version=ss.SCHEMA)), protocol=4))


def pack(value):
    if isinstance(value, dict):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    return value.item() if isinstance(value, np.generic) else value


def read_existing(folder):
    """-> metadata, instruction and images of the folder's data.pkl; None if there is none that can be used."""
    try:
        session = ss.Session(folder)
    except (OSError, BadSession):  # missing, damaged or of another version: make it again
        return None
    image = {view: session.view(view)[0] for view in session.view_names}
    return session.metadata | dict(instruction=session.instruction, image=image)


def read_motion(log, stamps, rows, cfg, warnings):
    """Robot log -> (data.pkl's arrays, facts for the report)."""
    period = 1 / cfg.action_hz
    stretches, back, gaps = find_stretches(stamps, period, cfg.tolerance_ms / 1000)
    steps = np.concatenate([np.diff(stamps[chosen]) for chosen in stretches])
    hz = 1 / float(steps.mean()) if len(steps) else 0.0
    needed = f"actions at {cfg.action_hz:g} Hz need {0.8 * cfg.action_hz:g} or more. Are its stamps seconds, in order"
    slow = f"{log.name} has {hz:.2f} rows per second, {needed}? Else lower --action-hz, or leave it out"
    require(hz >= 0.78 * cfg.action_hz, slow, BadSession)
    spans = [float(stamps[chosen[-1]] - stamps[chosen[0]]) for chosen in stretches]
    short = f"{log.name}: the {len(stamps)} rows have no stretch of {period:g} s without a gap. Leave it out"
    require(max(spans) >= period - SLACK, short, BadSession)
    motion = make_actions(stamps, rows, stretches, period)
    seconds = float(np.maximum(np.diff(stamps[np.concatenate(stretches)]), 0).sum())
    lost = max(0.0, seconds - len(motion["action"]) * period - spans[-1] % period)  # the rest at its end is no loss
    for row in back:
        step = f"the robot's clock steps back by {stamps[row - 1] - stamps[row]:.3f} s at line {row + 2}"
        warnings.append(f"warning: {step}: split there, but images and sensor can fit one side only")
    if lost > 0.05 * seconds:
        warnings.append(f"warning: LOST {lost:.2f} of {seconds:.2f} s of the robot log ({gaps} gaps)")
    facts = dict(
        robot_hz=hz,
        jitter_ms=1000 * float(steps.std()),
        lost_seconds=lost,
        duration_seconds=seconds,
        num_actions=len(motion["action"]),
        num_robot_states=len(stamps),
        n_segments=int(motion["segment_id"][-1]) + 1,
        n_gaps=gaps,
        n_duplicates=len(stamps) - sum(map(len, stretches)),
    )
    return motion, facts


def make_sensor(folder, files, offset, motion, cfg, warnings):
    """npz files -> (sensor_data of data.pkl or None, share of the actions that begin at most 0.1 s after a sensor row).
    Writes sensor_stream.npy."""
    try:
        stamps, rows, blocks, rate, spoiled = read_sensor(files)
    except NoSensor as error:
        warnings.append(f"warning: {error}: no sensor")
        return None, None
    stamps = stamps + offset
    starts = motion["action_timestamps"]
    newest = np.searchsorted(stamps, starts, side="right") - 1
    overlap = float(np.mean((newest >= 0) & (starts - stamps[newest] <= 0.1)))
    if overlap < cfg.min_sensor_overlap:
        when = f"{stamps[0] - starts[0]:+.2f} s to {stamps[-1] - starts[0]:+.2f} s of {starts[-1] - starts[0]:.2f} s"
        right = f"right as it is: --min-sensor-overlap {np.floor(overlap * 20) / 20:g}"
        covers = f"the sensor covers {overlap:.0%} of the robot log ({when}), less than {cfg.min_sensor_overlap:.0%}"
        warnings.append(f"warning: {covers}: left out. {OTHER_CLOCK}; {right}")
        return None, overlap
    dtype, mean, std = compress(rows, blocks)
    if not cfg.dry_run:
        require_space(folder, len(stamps) * CHANNELS * dtype.itemsize)
        (folder / ss.DATA_PKL).unlink(missing_ok=True)  # a kill must not leave an old one beside the new stream
        with atomic_path(folder / ss.SENSOR_FILE) as target, open(target, "wb") as f:
            header = dict(descr=dtype.str, fortran_order=False, shape=(len(stamps), CHANNELS))
            np.lib.format.write_array_header_1_0(f, header)
            for block in blocks:
                f.write(rows[block].astype(dtype))
    if spoiled:
        shown = ", ".join(spoiled[:20]) + (f" and {len(spoiled) - 20} more" if len(spoiled) > 20 else "")
        warnings.append(f"warning: {len(spoiled)} sensor rows with values that are not finite are left out: {shown}")
    if abs(rate / SENSOR_HZ - 1) > 0.05:
        warnings.append(f"warning: the sensor has {rate:.0f} rows per second: 65 rows last {65 / rate:.2f} s")
    about = dict(timestamps=stamps, rate_hz=rate, dtype=dtype.name, mean=mean, std=std)
    return about | dict(file=ss.SENSOR_FILE, channels=CHANNELS), overlap


# ---- clock offsets ---------------------------------------------------------------------------------------------------


def estimate(folder, cfg):
    """Propose what to add to the cameras' and the sensor's time: while the robot moves fast, the images and the force
    change fast, too. -> report, with the proposals as its lines."""
    _, log, files, images, lines = describe(folder)
    stamps, rows = read_robot(log)
    stretches, *_ = find_stretches(stamps, 1 / cfg.action_hz, cfg.tolerance_ms / 1000)
    longest = max(stretches, key=len)
    steps = np.diff(rows[longest, 6:], axis=0)
    steps[:, 3:] = (steps[:, 3:] + 180) % 360 - 180
    travelled = np.r_[0, np.cumsum(np.linalg.norm(steps, axis=1))]  # a degree counts as a mm
    seen = [image_changes(folder, shots) for view, shots in images.items() if not view.endswith("_right")]
    found, clear = dict(camera_offset_s=find_offset(stamps[longest], travelled, seen)), {}
    try:
        if files:
            found["sensor_offset_s"] = find_offset(stamps[longest], travelled, [force_changes(files)])
    except NoSensor as error:  # the cameras' proposal does not need it
        lines.append(f"sensor_offset_s: none proposed, {error}")
    for key, (offset, here, elsewhere) in found.items():
        if here > 0.5 and here - elsewhere > 0.3:
            clear[key] = round(offset, 2)
        proposal = clear.get(key, "not clear, none proposed")
        lines.append(f"{key}: {proposal}  # correlation {here:.2f}, the next best {elsewhere:.2f}")
    if clear and cfg.write_offsets:
        path = folder / ss.NOTES_FILE
        known = {key: value for key, value in ss.read_notes(folder).items() if value != ss.NOTES[key]}
        path.write_text(yaml.safe_dump(known | clear, allow_unicode=True), encoding="utf-8")
        lines.append(f"written to {path}; now run create_datapkl.py without --estimate-offsets")
    return dict(status="read", lines=lines)


def image_changes(folder, shots):
    """[(stamp, path)] -> (stamps (m,), mean change of a pixel between neighbours (m - 1,))."""
    small = []
    middle = np.median([t for t, _ in shots])
    shots = [(t, path) for t, path in shots if abs(t - middle) < 3600]  # not strays of another recording
    for _, path in shots:
        with Image.open(folder / path) as image:
            image.draft("L", (128, 72))
            small.append(np.asarray(image.convert("L").resize((64, 36), Image.BOX), np.float64))
    return np.array([t for t, _ in shots]), np.abs(np.diff(small, axis=0)).mean((1, 2))


def force_changes(files):
    """npz files -> (middles of bins of 50 ms (m,), change of the mean force from bin to bin (m - 1,))."""
    stamps, rows, blocks, *_ = read_sensor(files)
    require(stamps[-1] - stamps[0] >= 1, f"{files[0].name} has less than a second of the sensor", NoSensor)
    edges = np.arange(stamps[0], stamps[-1], 0.05)
    mean = np.diff(np.interp(edges, stamps, np.cumsum(rows[np.concatenate(blocks), 0], dtype=np.float64)))
    return edges[:-1] + 0.025, np.abs(np.diff(mean))


def find_offset(t, travelled, series):
    """Robot's times and travelled path (n,), series [(stamps (m,), change (m - 1,))] on another clock -> (seconds to
    add to that clock, correlation there, best correlation elsewhere). Half of the shorter recording must overlap."""
    begin, end = min(s[0] for s, _ in series), max(s[-1] for s, _ in series)
    half = min(t[-1] - t[0], end - begin) / 2
    offsets = np.arange(t[0] - end + half, t[-1] - begin - half + 0.02, 0.02)
    curve = np.zeros(len(offsets))
    for stamps, change in series:
        between = np.diff(stamps)
        for i, offset in enumerate(offsets):
            at = stamps + offset
            inside = (at[:-1] >= t[0]) & (at[1:] <= t[-1]) & (between > 0)
            if inside.sum() >= 10:
                speed = np.diff(np.interp(at, t, travelled))[inside] / between[inside]
                other = change[inside] / between[inside]
                if speed.std() > 0 and other.std() > 0:
                    curve[i] += np.corrcoef(speed, other)[0, 1] / len(series)
    best = int(np.argmax(curve))
    return float(offsets[best]), float(curve[best]), float(curve[np.abs(offsets - offsets[best]) > 0.3].max(initial=0))


# ---- all of them -----------------------------------------------------------------------------------------------------


# of the printed table, {metadata key: title}
COLUMNS = dict(format="format", robot_hz="rows/s", jitter_ms="jitter ms", duration_seconds="seconds")
COLUMNS |= dict(lost_seconds="lost", num_actions="actions", n_segments="segments", n_duplicates="repeated")
COLUMNS |= dict(num_images="images", has_sensor="sensor", sensor_overlap="share", sensor_hz="sensor/s")


def run_all(function, folders, workers):
    """-> [function(folder)], computed by `workers` processes."""
    bar = partial(tqdm, total=len(folders), desc="recordings", unit="recording", disable=None)
    if not workers or len(folders) == 1:
        return list(bar(map(function, folders)))
    try:
        with ProcessPoolExecutor(min(workers, len(folders)), multiprocessing.get_context("fork")) as pool:
            return list(bar(pool.map(function, folders)))
    except BrokenProcessPool as error:
        cause = f"a worker was killed (workers is {workers}), mostly for memory"
        raise UserError(f"{cause}. Lower it; what is finished stays") from error


def main(cfg):
    """Process all recordings, print the report; returns the number of those that failed."""
    check_config(cfg)
    roots = [*cfg.dataset_dirs, *([cfg.new_dataset_dir] if cfg.new_dataset_dir else [])]
    folders, excluded = ss.find_recordings(roots)
    expected = "expected folders recv_all_*, episode_*, Captures* or ZED_Captures_* with a robot CSV"
    require(folders, f"no recordings below {', '.join(roots)}: {expected}", MissingFile)
    reports = run_all(partial(process, cfg=cfg), folders, cfg.workers)
    facts = pd.DataFrame([r["metadata"] for r in reports], columns=list(COLUMNS))
    if not cfg.estimate_offsets:
        facts.insert(0, "recording", [r["name"] for r in reports])
        facts.insert(1, "status", [r["status"] for r in reports])
        print(facts.convert_dtypes().round(2).astype(object).fillna("").rename(columns=COLUMNS).to_string(index=False))
    for r in reports:
        for line in r["lines"]:
            print(f"{r['name']}: {line}")
    for change, n in Counter(change for r in reports for change in r["changes"]).items():
        print(f"{n} made again, for this changed: {change}")
    for folder in excluded:
        print(f"{folder}: left out, for its {ss.NOTES_FILE} says exclude")
    for name in sorted({r["name"].split("/")[0] for r in reports} - {"", *ss.GUIDE}):
        weight = f"its samples get weight 1, unless the training gets --dataset-weight {name}=W"
        print(f"warning: data set '{name}' is none of the guide's: {weight}, or {ss.NOTES_FILE} names another data set")
    for name in sorted(set(cfg.instruction).difference(*(r["name"].split("/")[:2] for r in reports))):
        print(f"warning: no recording is of a data set or task '{name}': its instruction is not used")
    counts = ", ".join(f"{n} {status}" for status, n in Counter(r["status"] for r in reports).items())
    minutes = facts["duration_seconds"].sum() / 60
    dry = "; nothing written (--dry-run)" if cfg.dry_run else ""
    print(f"{len(reports)} recordings: {counts}; {facts['num_actions'].sum():.0f} actions, {minutes:.1f} min{dry}")
    failed = [r for r in reports if r["status"] == "failed"]
    for r in failed:
        print(f"FAILED {r['folder']}: {r['error']}", file=sys.stderr)
    if failed:
        print("One that is beyond repair: exclude: true in its session.yaml, or a dot before its name", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: else the workers would stay behind
    launch(lambda cfg: sys.exit(1 if main(cfg) else 0), Config, ALIASES)
