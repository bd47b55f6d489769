"""Robot sessions: folders with a data.pkl (written by create_datapkl.py), robot, sensor and cameras on one clock.

Step k of a session starts at starts[k]; action[k] is the motion of the TCP pose from there to ends[k], exactly 0.1 s
later. A gap in the robot log begins a new segment; nothing reaches across. What a policy sees at step k (VLM feature,
images, sensor rows) was recorded at starts[k] or earlier; only the targets lie ahead."""

import contextlib
import functools
import hashlib
import io
import itertools
import math
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from common import MissingFile, UserError, command, require, require_utf8
from common.log import progress
from common.stats import compute_stats

SCHEMA = 4  # of data.pkl
DATA_PKL, SENSOR_FILE, NOTES_FILE = "data.pkl", "sensor_stream.npy", "session.yaml"
CHANNELS = 1026  # of a sensor row: force, then 1025 A-scan values
SENSOR_HZ = 650  # nominal; Session.sensor_hz is what was measured
SENSOR_DTYPES = ("float16", "float32")  # of the rows on the disk
ACTION_HZ = 10  # what the trainings expect of the sessions' actions
GUIDE = ("New_dataset", "White_silicone_white_circle", "Needle_insertion_eye_trocar", "OCT_insertion", "part1")
ARRAYS = {  # key of data.pkl: (dtype, columns)
    "action": ("f4", 7),
    "action_timestamps": ("f8", 0),
    "action_end_timestamps": ("f8", 0),
    "segment_id": ("i4", 0),
    "robot_state": ("f4", 12),
}


class BadSession(UserError):
    """A recording or its data.pkl is unusable; the message names it, what was expected and the next command."""


# ---- data.pkl --------------------------------------------------------------------------------------------------------
# A pickle of dicts, lists, texts and numbers; an array is the tuple (dtype name, shape, bytes).


class PlainUnpickler(pickle.Unpickler):
    """Refuses whatever is more than plain values: all else needs a class or function, which this never looks up."""

    def find_class(self, module, name):
        raise ValueError(f"it holds more than plain values ({module}.{name}), as those of older versions do")


def load_data_pkl(path):
    """Path of a data.pkl -> its dict, with every field that the programs use checked; else BadSession."""
    raw = Path(path).read_bytes()
    try:
        data = _unpack(PlainUnpickler(io.BytesIO(raw)).load())
        _check(data)
    except Exception as error:  # damaged bytes surface as anything: EOFError, TypeError, IndexError, MemoryError...
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)[:200] or type(error).__name__
        again = command("create_datapkl.py", dataset_dirs=Path(path).parent)
        raise BadSession(f"{path} is refused: {reason}. Make it again: {again}") from error
    return data


def _unpack(value):
    if isinstance(value, dict):
        return {key: _unpack(item) for key, item in value.items()}
    if not isinstance(value, tuple):
        return value
    name, shape, raw = value
    if name not in ("float32", "float64", "int32"):
        raise ValueError("it has an array of another kind of numbers")
    return np.frombuffer(raw, name).reshape(shape).copy()


def _check(data):
    same = type(data["schema_version"]) is int and data["schema_version"] == SCHEMA
    require(same, f"its schema_version is not {SCHEMA}")
    n, sensor = len(data["action"]), data["sensor_data"]
    arrays = {key: (data[key], dtype, (n, width) if width else (n,)) for key, (dtype, width) in ARRAYS.items()}
    for view, paths in data["image"].items():
        size = data["image_size"][view]
        require(len(size) == 2 and {*map(type, size)} == {int}, f"the image_size of {view} is not (height, width)")
        arrays[f"image_timestamps of {view}"] = data["image_timestamps"][view], "f8", (len(paths),)
        for path in paths:
            inside = not os.path.isabs(path) and ".." not in path.split("/")
            require(inside, f"the image path '{path}' leads out of the recording")
    if sensor is not None:
        arrays["timestamps of the sensor"] = sensor["timestamps"], "f8", (len(sensor["timestamps"]),)
        arrays |= {f"{key} of the sensor": (sensor[key], "f8", (CHANNELS,)) for key in ("mean", "std")}
        known = (sensor["file"], sensor["channels"]) == (SENSOR_FILE, CHANNELS) and 0 < sensor["rate_hz"] < math.inf
        known = known and sensor["dtype"] in SENSOR_DTYPES
        require(known, f"sensor_data is not {CHANNELS} channels of fp16 or fp32 in {SENSOR_FILE} at a rate above 0")
    for key, (x, dtype, shape) in arrays.items():
        fits = isinstance(x, np.ndarray) and x.dtype == dtype and x.shape == shape and np.isfinite(x).all() and n
        require(fits, f"{key} is not {dtype} {shape}, finite and not empty")
    names = [*data["image"], *(name for name, _ in data["metadata"]["sources"])]
    plain = not any("/" in name for name in names) and isinstance(data["instruction"], str)
    require(plain, "a view or source is not a plain name, or the instruction no text")


def content_of(path):
    """-> hex digest of a file's content, whatever its times. An .npz is not read in full: it has checksums of its
    arrays."""
    if path.suffix.lower() != ".npz":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as archive:
        facts = [(member.filename, member.file_size, member.CRC) for member in archive.infolist()]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


# ---- folders ---------------------------------------------------------------------------------------------------------

RECORDING = re.compile(r"recv_all_.*|episode_.*|(zed_)?captures.*", re.I)
IMAGES = re.compile(r"view_?\d|images$", re.I)
ROBOT_CSV = re.compile(r"robot_(state|states|rt)(_.*)?\.csv", re.I)
NOTES = dict(sensor_offset_s=0.0, camera_offset_s=0.0, instruction=None, dataset=None, exclude=False)


def read_notes(folder):
    """-> the recording's session.yaml, with NOTES as defaults: seconds to add to the sensor's and the cameras' time to
    get the robot's (cameras: also {view: seconds}), instruction, data set, whether to leave the recording out."""
    path = Path(folder) / NOTES_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        notes = NOTES | (yaml.safe_load(text) or {})
        cameras = notes["camera_offset_s"]
        offsets = [notes["sensor_offset_s"], *(cameras.values() if isinstance(cameras, dict) else [cameras])]
        once = all(len(re.findall(rf"^{key}\s*:", text, re.M)) < 2 for key in NOTES) and set(notes) == set(NOTES)
        good = once and all(type(offset) in (int, float) and math.isfinite(offset) for offset in offsets)
        good = good and all(isinstance(notes[key], (str, type(None))) for key in ("instruction", "dataset"))
        good = good and isinstance(notes["exclude"], bool) and "/" not in (notes["dataset"] or "")
        require(good, f"got {notes}", ValueError)
    except (TypeError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        expected = f"expected KEY: VALUE, only {', '.join(NOTES)}, each once (seconds, texts, true or false)"
        raise BadSession(f"{path}: {expected}: {' '.join(str(error).split())}") from error
    return notes


def find_recordings(roots):
    """Folders at or below `roots` that hold a recording, by its name, its robot CSV or a data.pkl -> (sorted paths,
    each once; those whose session.yaml says exclude). Hidden folders (a dot before the name) are skipped."""
    found, seen = set(), set()
    for root in roots:
        wrong = f"'{root}' is not a folder: expected one that holds recordings (recv_all_*, episode_*)"
        require(os.path.isdir(root), wrong, MissingFile)
        for folder, subfolders, files in os.walk(os.path.realpath(root), followlinks=True):
            real = Path(os.path.realpath(folder))
            marked = DATA_PKL in files or any(map(ROBOT_CSV.fullmatch, files))
            if real in seen:  # by another link
                subfolders.clear()
            elif marked or (RECORDING.fullmatch(real.name) and any(map(IMAGES.match, subfolders))):
                found.add(real)
                subfolders.clear()  # no recording within a recording: do not walk its thousands of images
            seen.add(real)
            subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "qwen_vl_features"]
    require_utf8(found, " ".join(map(str, roots)))
    excluded = []
    for folder in sorted(found):
        with contextlib.suppress(BadSession):  # a bad session.yaml is reported when the recording is opened
            excluded += [folder] * read_notes(folder)["exclude"]
    return sorted(found.difference(excluded)), excluded


def identity(folder):
    """Recording folder -> (data set, task or "-", episode). Data set: session.yaml's, else the innermost parent folder
    named in GUIDE, else the direct parent. Task: the folders in between, joined by +."""
    parts, named = Path(os.path.realpath(folder)).parts, read_notes(folder)["dataset"]
    known = [i for i, part in enumerate(parts[:-1]) if part in GUIDE]
    at = known[-1] if known else max(0, len(parts) - (3 if named else 2))
    return named or parts[at], "+".join(parts[at + 1 : -1]) or "-", parts[-1]


def find_sessions(roots):
    """Folders -> list of Session, sorted by name; BadSession lists the recordings whose data.pkl is missing, unusable
    or out of date, with the command to run."""
    folders, _ = find_recordings(roots)
    expected = f"expected recordings (recv_all_*, episode_*, Captures*), each with a {DATA_PKL}"
    require(folders, f"no sessions below {' '.join(map(str, roots))}: {expected}", MissingFile)
    found, wrong = [], []
    for folder in progress(folders, "reading sessions", "session"):
        try:
            found.append(Session(folder))
            require(not found[-1].stale(), f"{folder} changed since its {DATA_PKL} was made", BadSession)
        except FileNotFoundError:
            wrong.append(f"{folder} has no {DATA_PKL}")
        except BadSession as error:
            wrong.append(str(error).partition(". Make it again")[0])
    shown = "\n  ".join(wrong[:10] + [f"and {len(wrong) - 10} more"] * (len(wrong) > 10))
    lacking = f"{len(wrong)} of {len(folders)} recordings are not preprocessed:\n  {shown}"
    require(not wrong, f"{lacking}\nRun: {command('create_datapkl.py', dataset_dirs=roots)}", BadSession)
    found.sort(key=lambda s: s.name)
    once = f"Give only one of the two, rename one, or say dataset: NAME in its {NOTES_FILE}"
    for a, b in itertools.pairwise(found):
        require(a.name != b.name, f"two sessions are called {a.name}: {a.path} and {b.path}. {once}", BadSession)
    return found


def common_views(sessions):
    """-> (views that every session has, those that only some have), both sorted. Of a stereo pair only the left camera
    counts, without the suffix: View1."""
    have = [{v.removesuffix("_left") for v in s.view_names if not v.endswith("_right")} for s in sessions]
    views, others = set.intersection(*have), sorted(set.union(*have) - set.intersection(*have))
    lack = f"no view is in all of the {len(sessions)} sessions, only in some {', '.join(others)}"
    require(views, f"{lack}: choose with --views, or leave sessions out", BadSession)
    return sorted(views), others


# ---- one session -----------------------------------------------------------------------------------------------------
class Ticks(NamedTuple):
    """When the VLM runs: every so many steps from each segment's first. A look: the newest image of every view."""

    start: np.ndarray  # (n,) step of the tick
    looks: list  # per tick: tuple of paths in the session, or None where an image is too old
    captured: np.ndarray  # (n,) float64, seconds, when the images were taken: the mean over views

    def unique(self):
        """-> the different looks, sorted: two ticks may share one."""
        return sorted({look for look in self.looks if look})


class Session:
    """One recording folder with its data.pkl. Times are seconds of the robot's clock; pose in mm and degrees.

    path | dataset, task, name ("<dataset>/<task or ->/<episode>") | instruction | action (N, 7) float32, starts, ends
    (N,) float64, segment (N,) int32, robot_state (N, 12) float32 joints and pose | has_sensor, sensor_stamps (Ns,)
    float64 or None, sensor_hz, sensor {mean, std (1026,) of the rows before they were rounded, dtype, ...} |
    view_names. The sensor rows stay on disk, mapped by the process that reads them."""

    def __init__(self, folder):
        self.path = Path(os.path.realpath(folder))
        data = load_data_pkl(self.path / DATA_PKL)
        self.dataset, self.task, episode = identity(self.path)
        self.name = f"{self.dataset}/{self.task}/{episode}"
        self.action, self.starts, self.ends, self.segment, self.robot_state = (data[key] for key in ARRAYS)
        self.instruction, self.metadata = data["instruction"], data["metadata"]
        self._images = {view: (data["image"][view], data["image_timestamps"][view]) for view in sorted(data["image"])}
        self.view_names, self._sizes = list(self._images), data["image_size"]
        self.sensor = sensor = data["sensor_data"] or dict(timestamps=None, rate_hz=SENSOR_HZ)
        self.sensor_stamps, self.sensor_hz = sensor["timestamps"], sensor["rate_hz"]
        self.has_sensor, self.sensor_path = self.sensor_stamps is not None, self.path / SENSOR_FILE
        if self.has_sensor:
            size, path = len(self.sensor_stamps) * CHANNELS * np.dtype(sensor["dtype"]).itemsize, self.sensor_path
            other = f"{path} is missing or not of the size that {DATA_PKL} says. Make it again"
            same = path.is_file() and path.stat().st_size == size + 128  # numpy's header
            require(same, f"{other}: {command('create_datapkl.py', dataset_dirs=self.path)}", BadSession)
        begin = np.flatnonzero(np.r_[True, np.diff(self.segment) != 0])
        end = np.r_[begin[1:], len(self.segment)]
        # (N,) of the segment that a step is in: its first step, and one past its last
        self.first, self.stop = np.repeat(begin, end - begin), np.repeat(end, end - begin)

    def __len__(self):
        return len(self.action)

    def view(self, name):
        """-> (paths relative to the session, stamps (M,)) of a view; "View1" also finds "View1_left"."""
        key = name if name in self._images else f"{name}_left"
        advice = f"Choose others with --views, or say exclude: true in its {NOTES_FILE}"
        lacks = f"{self.name} has no view '{name}'; it has {', '.join(self.view_names)}. {advice}"
        require(key in self._images, lacks, BadSession)
        return self._images[key]

    def image_size(self, view):
        """-> (height, width) of the view's images as recorded."""
        return tuple(self._sizes[view if view in self._sizes else f"{view}_left"])

    def stale(self):
        """Has a file that data.pkl was made from, or session.yaml, changed since? Deleted files do not count: nothing
        reads them any more."""
        sources = [(self.path / name, content) for name, content in self.metadata["sources"]]
        try:
            changed = any(path.is_file() and content_of(path) != content for path, content in sources)
        except (OSError, zipfile.BadZipFile):
            return True
        return changed or read_notes(self.path) != self.metadata.get("notes", NOTES)

    # ---- what belongs to a step

    def tick_starts(self, reuse):
        """-> (n,) steps at which the VLM runs."""
        return np.flatnonzero((np.arange(len(self)) - self.first) % reuse == 0)

    def ticks(self, reuse, views, max_image_age=1.5):
        """-> Ticks of a VLM that runs every `reuse` steps; an image may be up to `max_image_age` seconds old."""
        start, frames = self.tick_starts(reuse), []
        time, captured = self.starts[start], np.zeros(len(start))
        for view in views:
            names, stamps = self.view(view)
            newest = np.searchsorted(stamps, time, side="right") - 1
            fresh = (newest >= 0) & (time - stamps[np.maximum(newest, 0)] <= max_image_age + 1e-6)
            frames.append([names[i] if ok else None for i, ok in zip(newest, fresh, strict=True)])
            captured += stamps[newest] / len(views)
        return Ticks(start, [look if all(look) else None for look in zip(*frames, strict=True)], captured)

    def tick_of_step(self, k, reuse, latency_s=0.0):
        """Step(s) k -> index into ticks(reuse) of the feature in use there: the newest one that is ready, `latency_s`
        after its tick. Until the segment's first one is ready it is that one: the robot waits for it."""
        ready = np.maximum(np.asarray(k) - steps_late(latency_s), self.first[k])
        return np.searchsorted(self.tick_starts(reuse), ready, side="right") - 1

    def sensor_window(self, k, window):
        """-> (n <= window, 1026), the newest sensor rows up to starts[k], as they are on the disk; None without any.
        Rows older than the window's own duration plus one step (0.1 s) are not taken: a sensor that has stopped is
        absent, not frozen."""
        if not self.has_sensor:
            return None
        begin, end = sensor_rows(self.sensor_stamps, self.starts[k], window, self.sensor_hz)
        return _map_sensor(str(self.sensor_path))[begin:end] if end > begin else None

    def targets(self, k, horizon):
        """-> ((horizon, 7) float32, (horizon,) bool): actions k, k+1, ... of the segment; past its end the last one
        is repeated, masked False."""
        at, stop = np.arange(k, k + horizon), self.stop[k]
        return self.action[np.minimum(at, stop - 1)], at < stop


def steps_late(latency_s):
    """-> whole steps of 1 / ACTION_HZ until a feature is ready."""
    return math.ceil(latency_s * ACTION_HZ - 1e-3)


def sensor_rows(stamps, time, window, hz=SENSOR_HZ):
    """Rising stamps (n,) -> (begin, end): the newest `window` rows up to `time`, without those older than the window's
    own duration plus one step. The same rule in training and on the robot."""
    end = int(np.searchsorted(stamps, time, side="right"))
    oldest = int(np.searchsorted(stamps, time - window / hz - 0.1))
    return max(end - window, oldest, 0), end


@functools.lru_cache(maxsize=64)  # each open map costs a file descriptor
def _map_sensor(path):
    return np.load(path, mmap_mode="r", allow_pickle=False)


# ---- split, statistics -----------------------------------------------------------------------------------------------
def split_sessions(sessions, fraction):
    """-> (train, validation), by a hash of the name, so that sessions stay on their side when others are added. A data
    set with two or more sessions has at least one on either side (unless `fraction` is 0); a single one is for
    training."""
    draw = {s.name: int.from_bytes(hashlib.sha256(s.name.encode()).digest()[:8], "big") / 2**64 for s in sessions}
    held_out = set()
    for dataset in sorted({s.dataset for s in sessions}):
        names = sorted((s.name for s in sessions if s.dataset == dataset), key=draw.get)
        if fraction > 0 and len(names) > 1:
            held_out |= set(names[: min(len(names) - 1, max(1, sum(draw[n] < fraction for n in names)))])
    return [s for s in sessions if s.name not in held_out], [s for s in sessions if s.name in held_out]


def sensor_std(std):
    """Standard deviations (1026,) -> those to divide by: the noise of a channel at rest must not be blown up."""
    return np.r_[std[0] if std[0] > 0 else 1.0, np.maximum(std[1:], 1e-3)]


def session_stats(train):
    """Statistics of the training sessions -> {format_version, num_episodes, num_frames, action_definition, action,
    sensor}, lists of numbers. From their data.pkl: no sensor stream is read.

    action: {mean, std, min, max, q01, q99, mask, count, constant}; a dim whose range is below 1e-4 (the gripper) is
    flagged constant, and its limits are set to its mean. sensor: {mean, std (1026), count, dtype: float16 if the rows
    of all sessions are, else float32}; None if no session has one."""
    action = compute_stats(dict(action=[s.action for s in train]))["action"]
    action["constant"] = [high - low < 1e-4 for low, high in zip(action["min"], action["max"], strict=True)]
    for d in np.flatnonzero(action["constant"]):
        for key in ("min", "max", "q01", "q99"):
            action[key][d] = action["mean"][d]
        action["std"][d] = 0.0
    sensor, with_sensor = None, [s for s in train if s.has_sensor]
    if with_sensor:
        rows = np.array([len(s.sensor_stamps) for s in with_sensor])
        means, stds = (np.stack([s.sensor[key] for s in with_sensor]) for key in ("mean", "std"))
        mean = np.average(means, axis=0, weights=rows)
        std = np.sqrt(np.average(stds**2 + (means - mean) ** 2, axis=0, weights=rows))
        sensor = dict(mean=mean.tolist(), std=sensor_std(std).tolist(), count=int(rows.sum()))
        sensor["dtype"] = max(s.sensor["dtype"] for s in with_sensor)  # "float32" sorts after "float16"
    definition = dict(source="tcp pose delta of 0.1 s", dim=7, position_unit="mm", rotation_unit="deg")
    about = dict(format_version=1, num_episodes=len(train), num_frames=sum(map(len, train)))
    return about | dict(action_definition=definition, action=action, sensor=sensor)
