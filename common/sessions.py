"""Robot sessions: folders with a data.pkl (written by create_datapkl.py), robot, sensor and cameras on one clock.

data.pkl holds builtins and arrays only and is read by an unpickler that knows nothing else. Step k of a session starts at starts[k]; action[k] is the motion of
the TCP pose from there to ends[k], about 0.1 s later. Where the robot log has a gap a new segment begins; nothing reaches across. Whatever belongs to
step k (VLM tick, images, sensor rows) is of starts[k] or earlier; only the targets lie ahead.
"""

import dataclasses
import functools
import hashlib
import os
import pickle
import re
from pathlib import Path

import numpy as np

from common.stats import compute_stats

SCHEMA = 2  # of data.pkl
STATS_FORMAT = 1  # of session_stats
DATA_PKL, SENSOR_FILE = "data.pkl", "sensor_stream.npy"
CHANNELS = 1026  # of a sensor row: force, then 1025 A-scan values
SENSOR_HZ = 650
ACTION_HZ = 10  # what the trainings expect of the sessions' actions
ARRAYS = dict(
    action=("f4", 7),
    action_timestamps=("f8", None),
    action_end_timestamps=("f8", None),
    segment_id=("i4", None),
    robot_state=("f4", 12),
)
REMAKE = "python create_datapkl.py --dataset-dirs {}"


class BadSession(ValueError):
    """A recording or its data.pkl cannot be used; the message names it, what was expected and the next command."""


# ---- data.pkl --------------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    """Builtin values and NumPy arrays; every other global is refused before anything of it runs."""

    def find_class(self, module, name):
        from numpy import _core  # 1.x pickles say numpy.core, 2.x numpy._core

        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
            ("__builtin__", "bytes"): _no_bytes,
        }
        for core in ("numpy.core", "numpy._core"):
            known |= {(f"{core}.multiarray", n): getattr(_core.multiarray, n) for n in ("_reconstruct", "scalar")} | {
                (f"{core}.numeric", "_frombuffer"): _core.numeric._frombuffer
            }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return known[module, name]


def _latin1(text, encoding):
    """How pickle protocol 2 spells bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it refers to _codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _no_bytes():
    """How protocol 2 spells b''."""
    return b""


def load_data_pkl(path):
    """Path of a data.pkl -> its dict (schema 2, see create_datapkl.py). Anything but builtins and arrays in it is refused, not executed; BadSession."""
    path = Path(path)
    again = f"Make it again: {REMAKE.format(path.parent)} --force"
    try:
        with open(path, "rb") as f:
            data = _Unpickler(f).load()
    except OSError:
        raise
    except (
        Exception
    ) as error:  # damaged bytes surface as anything: EOFError, UnpicklingError, IndexError, MemoryError...
        raise BadSession(
            f"{path} is refused: {error}; a data.pkl holds plain values and arrays only. {again}"
        ) from error
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA:
        found = f"schema_version {data.get('schema_version')}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise BadSession(
            f"{path} has {found}, this code reads {SCHEMA} (a file of another program has no action times). {again}"
        )
    wanted = {*ARRAYS, "image", "image_timestamps", "sensor_data", "instruction", "metadata"}
    if lacking := sorted(wanted - set(data)):
        raise BadSession(f"{path} has no {', '.join(lacking)}. {again}")
    n = len(data["action"])
    for key, (dtype, width) in ARRAYS.items():
        x = data[key]
        if not isinstance(x, np.ndarray) or x.dtype != np.dtype(dtype) or x.shape != ((n, width) if width else (n,)):
            raise BadSession(
                f"{path}: {key} is {getattr(x, 'dtype', type(x).__name__)} {getattr(x, 'shape', '')}, expected {dtype} {(n, width) if width else (n,)}. {again}"
            )
    if n == 0 or not all(np.isfinite(data[key]).all() for key in ARRAYS):
        raise BadSession(f"{path} has {'no action' if n == 0 else 'values that are not finite'}. {again}")
    return data


def source_facts(path):
    """(size in bytes, modification time in ns) of a file."""
    s = os.stat(path)
    return s.st_size, s.st_mtime_ns


# ---- folders ---------------------------------------------------------------------------------------------------------

RECORDING = re.compile(r"recv_all_.*|episode_.*|(zed_)?captures.*", re.I)
ROBOT_CSV = re.compile(r"robot_(state|states|rt)(_.*)?\.csv", re.I)


def find_recordings(roots):
    """Folders below `roots` (or these themselves) that hold a recording: by its name, its robot CSV or a data.pkl. Sorted, absolute, each once. A folder whose
    name begins with a dot is left out."""
    found = set()
    for root in roots:
        root = Path(root).absolute()
        if not root.is_dir():
            raise FileNotFoundError(
                f"'{root}' is not a folder: expected one that holds recordings (recv_all_*, episode_*, Captures*)"
            )
        for folder, subfolders, files in os.walk(root, followlinks=True):
            if (
                DATA_PKL in files
                or any(ROBOT_CSV.fullmatch(f) for f in files)
                or (RECORDING.fullmatch(os.path.basename(folder)) and _has_images(subfolders))
            ):
                found.add(Path(folder))
                subfolders.clear()  # thousands of images: nothing below is a recording
            else:
                subfolders[:] = [s for s in subfolders if not s.startswith(".") and s != "qwen_vl_features"]
    return sorted(found)


def _has_images(subfolders):
    return any(re.match(r"view\d|images$", s, re.I) for s in subfolders)


def identity(folder):
    """Recording folder -> (data set, task or "-", episode): .../New_dataset/<Task>/<episode>, else .../<data set>/<episode>."""
    parts = Path(folder).parts
    if "New_dataset" in parts[:-1]:
        at = len(parts) - 1 - parts[::-1].index("New_dataset")
        return "New_dataset", "/".join(parts[at + 1 : -1]).replace("/", "+") or "-", parts[-1]
    return parts[-2] if len(parts) > 2 else "-", "-", parts[-1]


def find_sessions(roots):
    """Folders -> list of Session, sorted by name. A recording without a data.pkl, or with one older than its files, is an error with the command to run."""
    folders = find_recordings(roots)
    if not folders:
        raise FileNotFoundError(
            f"no sessions below {', '.join(map(str, roots))}: expected recordings (recv_all_*, episode_*, Captures*), each with a data.pkl"
        )
    missing = [f for f in folders if not (f / DATA_PKL).is_file()]
    found = [Session(f) for f in folders if f not in set(missing)]
    stale = [s.path for s in found if s.stale()]
    if missing or stale:
        listed = [f"{f} (no {DATA_PKL})" for f in missing] + [
            f"{f} ({DATA_PKL} is older than the recording)" for f in stale
        ]
        more = f"\n  and {len(listed) - 10} more" if len(listed) > 10 else ""
        raise BadSession(
            f"{len(listed)} of {len(folders)} recordings are not preprocessed:\n  "
            + "\n  ".join(listed[:10])
            + more
            + f"\nRun: {REMAKE.format(' '.join(map(str, roots)))}"
        )
    found.sort(key=lambda s: s.name)
    for a, b in zip(found, found[1:]):
        if a.name == b.name:
            raise BadSession(
                f"two sessions are called {a.name}: {a.path} and {b.path}. Give only one of the two folders, or rename one"
            )
    return found


def common_views(sessions):
    """Views of View1..View5 (the left camera of a stereo pair) that every session has -> (sorted names, {view: names of the sessions that lack it})."""
    have = [{re.sub("_left$", "", v) for v in s.view_names if not v.endswith("_right")} for s in sessions]
    lacking = {v: [s.name for s, h in zip(sessions, have) if v not in h] for v in sorted(set().union(*have))}
    return [v for v, names in lacking.items() if not names], {v: names for v, names in lacking.items() if names}


# ---- one session -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Ticks:
    """When the VLM looks: every `stride` steps, from each segment's first."""

    stride: int
    start: np.ndarray  # (n,) int32, step at which the tick is
    tick_time: np.ndarray  # (n,) float64, seconds, = starts[start]
    frame_index: dict  # {view: (n,) int32}, newest image of that time or earlier; -1: none that is fresh enough

    def __len__(self):
        return len(self.start)

    @property
    def complete(self):
        """(n,) bool: every view has a frame."""
        return (
            np.all([i >= 0 for i in self.frame_index.values()], axis=0)
            if self.frame_index
            else np.ones(len(self), bool)
        )


class Session:
    """One recording folder with its data.pkl. Times are seconds of the robot's clock; pose in mm and degrees.

    path | dataset, task, name ("<dataset>/<task or ->/<episode>") | instruction | action (N, 7) float32, starts, ends (N,) float64, segment (N,) int32,
    robot_state (N, 12) float32 joints and pose | has_sensor, sensor_stamps (Ns,) float64 or None | view_names, views. The sensor rows stay on disk and are
    mapped by the process that reads them.
    """

    def __init__(self, folder):
        self.path = Path(folder).absolute()
        data = load_data_pkl(self.path / DATA_PKL)
        self.dataset, self.task, episode = identity(self.path)
        self.name = f"{self.dataset}/{self.task}/{episode}"
        self.action, self.starts, self.ends, self.segment, self.robot_state = (data[key] for key in ARRAYS)
        self.instruction, self.metadata = data["instruction"], data["metadata"]
        self._images = {view: (data["image"][view], data["image_timestamps"][view]) for view in sorted(data["image"])}
        self.view_names = list(self._images)
        sensor = data["sensor_data"]
        self.has_sensor = sensor is not None
        self.sensor_stamps, self.sensor_path = (
            (sensor["timestamps"], self.path / sensor["file"]) if sensor else (None, None)
        )
        if sensor and (
            not self.sensor_path.is_file() or self.sensor_path.stat().st_size < len(self.sensor_stamps) * CHANNELS * 4
        ):
            raise BadSession(
                f"{self.sensor_path} is missing or too short for its {len(self.sensor_stamps)} sensor rows. Make it again: {REMAKE.format(self.path)} --force"
            )
        # first step of each segment, and that of every step's own
        self._first = np.flatnonzero(np.r_[True, np.diff(self.segment) != 0])
        self._last = np.r_[self._first[1:], len(self.segment)]  # one past the segment's last
        self._row = np.repeat(np.arange(len(self._first)), self._last - self._first)

    def __len__(self):
        return len(self.action)

    @functools.cached_property
    def views(self):
        """{view: (list of absolute paths, stamps (M,) float64)}, sorted by time."""
        return {view: ([self.path / p for p in paths], stamps) for view, (paths, stamps) in self._images.items()}

    def view(self, name):
        """-> (paths relative to the session, stamps (M,)) of a view; "View1" also finds "View1_left"."""
        key = name if name in self._images else f"{name}_left"
        if key not in self._images:
            raise BadSession(
                f"{self.name} has no view '{name}'; it has {', '.join(self.view_names)}. Choose others with --views, or leave this session out"
            )
        return self._images[key]

    def frame_path(self, view, index):
        """Absolute path of image number `index` of a view."""
        return self.path / self.view(view)[0][index]

    def stale(self):
        """Did a file that data.pkl was made from change since? Files that were deleted meanwhile do not count: nothing here needs them."""
        return any(
            (self.path / name).is_file() and source_facts(self.path / name) != (size, mtime)
            for name, size, mtime in self.metadata["sources"]
        )

    # ---- time

    def ticks(self, stride, views, max_image_age=1.5):
        """-> Ticks of the VLM for `views`; an image may be up to `max_image_age` seconds old."""
        start = np.concatenate([np.arange(a, b, stride) for a, b in zip(self._first, self._last)]).astype(np.int32)
        time, frames = self.starts[start], {}
        for view in views:
            stamps = self.view(view)[1]
            newest = np.searchsorted(stamps, time, side="right") - 1
            fresh = (newest >= 0) & (time - stamps[np.maximum(newest, 0)] <= max_image_age + 1e-6)
            frames[view] = np.where(fresh, newest, -1).astype(np.int32)
        return Ticks(stride, start, time, frames)

    def tick_of_step(self, k, stride, reuse, latency_s=0.0):
        """Step(s) k -> index into ticks(stride) of the feature that is in use there.

        A VLM that looks every `reuse` steps of its segment and whose feature is ready `latency_s` after the tick: the newest with tick time + latency <=
        starts[k]; before any is ready the segment's first, for the robot waits for it. `reuse` must be a multiple of `stride`.
        """
        if reuse % stride:
            raise ValueError(f"vlm_reuse_count is {reuse}: expected a multiple of the ticks' stride {stride}")
        k = np.asarray(k)
        row = self._row[k]
        first = self._first[row]
        offset = np.r_[0, np.cumsum(-(-(self._last - self._first) // stride))][row]  # index of the segment's first tick
        j = (k - first) // reuse
        if latency_s > 0:
            late = lambda j: (j > 0) & (self.starts[first + j * reuse] + latency_s > self.starts[k] + 1e-5)  # noqa: E731
            while np.any(wait := late(j)):
                j = np.where(wait, j - 1, j)
        return offset + j * (reuse // stride)

    def usable_steps(self, stride, reuse, views, max_image_age=1.5, latency_s=0.0):
        """-> (steps, ticks), (m,) int each: the steps whose tick has a fresh image of every view, and that tick's index in ticks(stride)."""
        steps = np.arange(len(self))
        ticks = self.tick_of_step(steps, stride, reuse, latency_s)
        keep = self.ticks(stride, views, max_image_age).complete[ticks]
        return steps[keep], ticks[keep]

    def sensor_window(self, k, window):
        """-> ((window, 1026) float32, length): the newest sensor rows up to starts[k], zeros on the left where there are fewer. Rows older than the window's
        own duration plus one step (0.1 s) are not taken: a sensor that has stopped is absent, not frozen."""
        out = np.zeros((window, CHANNELS), np.float32)
        if not self.has_sensor:
            return out, 0
        begin, end = sensor_rows(self.sensor_stamps, self.starts[k], window)
        if end > begin:
            out[window - (end - begin) :] = _map_sensor(str(self.sensor_path))[begin:end]
        return out, max(0, end - begin)

    def targets(self, k, horizon):
        """-> ((horizon, 7) float32, (horizon,) bool): actions k, k+1, ... of the segment; past its end the last one again, masked False."""
        last = self._last[self._row[k]]
        at = np.arange(k, k + horizon)
        return self.action[np.minimum(at, last - 1)], at < last


def sensor_rows(stamps, time, window):
    """Stamps (n,) in order -> (begin, end): the newest `window` rows up to `time`, without those that are older than the
    window's own duration plus one step; in training and on the robot."""
    end = int(np.searchsorted(stamps, time, side="right"))
    oldest = int(np.searchsorted(stamps, time - window / SENSOR_HZ - 0.1))
    return max(end - window, oldest, 0), end


@functools.lru_cache(maxsize=64)
def _map_sensor(path):
    """Each open map costs a file descriptor, so only the last ones stay open."""
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    if rows.ndim != 2 or rows.shape[1] != CHANNELS or rows.dtype != np.float32:
        raise BadSession(
            f"{path} is {rows.dtype} {rows.shape}, expected float32 (n, {CHANNELS}). Make it again: {REMAKE.format(Path(path).parent)} --force"
        )
    return rows


# ---- split, statistics -----------------------------------------------------------------------------------------------


def split_sessions(sessions, fraction):
    """-> (train, validation), by a hash of the name, so that a session stays on its side when others are added. Every data set with two or more sessions has at
    least one on either side (unless fraction is 0); the only session of a data set is for training."""
    draw = {s.name: int.from_bytes(hashlib.sha256(s.name.encode()).digest()[:8], "big") / 2**64 for s in sessions}
    held_out = set()
    for dataset in sorted({s.dataset for s in sessions}):
        names = sorted((s.name for s in sessions if s.dataset == dataset), key=draw.get)
        if fraction > 0 and len(names) > 1:
            held_out |= set(names[: min(len(names) - 1, max(1, sum(draw[n] < fraction for n in names)))])
    return [s for s in sessions if s.name not in held_out], [s for s in sessions if s.name in held_out]


def session_stats(train):
    """Statistics of the training sessions -> {format_version, num_episodes, num_frames, action_definition, action, sensor}, lists of numbers.

    action: {mean, std, min, max, q01, q99, mask, count, constant}; a dim that moves by less than 1e-4 (the gripper) is flagged constant and its limits are
    closed to one value. sensor: {mean, std (1026; A-scan at least 1e-3), count}, over every tenth row, float64 sums; None without any sensor.
    """
    action = compute_stats(dict(action=[s.action for s in train]))["action"]
    action["constant"] = [high - low < 1e-4 for low, high in zip(action["min"], action["max"])]
    for d in np.flatnonzero(action["constant"]):
        for key in ("min", "max", "q01", "q99"):
            action[key][d] = action["mean"][d]
        action["std"][d] = 0.0
    count, mean, square = 0, np.zeros(CHANNELS), np.zeros(CHANNELS)
    for s in train:
        rows = _map_sensor(str(s.sensor_path)) if s.has_sensor else ()
        for at in range(0, len(rows), 6500):  # 10 s: 27 MB
            x = rows[at : at + 6500 : 10].astype(np.float64)
            total = count + len(x)  # Chan's update: no difference of large sums
            delta, own = x.mean(0) - mean, ((x - x.mean(0)) ** 2).sum(0)
            mean, square, count = mean + delta * len(x) / total, square + own + delta**2 * count * len(x) / total, total
    sensor = None
    if count:
        std = np.sqrt(square / count)
        std[1:], std[0] = np.maximum(std[1:], 1e-3), std[0] if std[0] > 0 else 1.0
        sensor = dict(mean=mean.tolist(), std=std.tolist(), count=count)
    return dict(
        format_version=STATS_FORMAT,
        num_episodes=len(train),
        num_frames=int(sum(len(s) for s in train)),
        action_definition=dict(source="tcp pose delta of 0.1 s", dim=7, position_unit="mm", rotation_unit="deg"),
        action=action,
        sensor=sensor,
    )
