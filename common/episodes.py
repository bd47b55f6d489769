"""Insertion episodes in HDF5: one file is one episode, one sample dict whatever the recorder wrote.

    action                       (N, A) float     what the recorder stored: a pose delta or a joint target
    observations/ee_pose         (N, 6) float     x y z, roll pitch yaw; optional
    observations/qpos            (N, 6) float     joints; optional
    observations/images/<cam>    (N,) variable-length uint8 (JPEG), or (N, H, W, 3) uint8 RGB, any compression
    phase (N,) int, timestamp (N,) float, language_instruction str      optional

Camera names sorted alphabetically become camera1..K. Low-dimensional arrays are read once, of a large folder from an
index; images lazily, through a bounded number of open files per process, or from a frame store (frames.py). Nothing is
ever replaced by zeros: what cannot be read raises BadEpisode.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import zipfile
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from common import MissingFile, UserError, require
from common import checkpoint as ckpt
from common.frames import FrameStore
from common.stats import FORMAT_VERSION, compute_stats

INDEXED = 200  # files; fewer are read in a moment
INDEX_FORMAT = 1  # of what is kept of them
ARRAYS = ("action", "ee_pose", "qpos")
FILE_BYTES = 4_000_000  # of memory that HDF5 takes for an open file with JPEG pictures: 2.5 to 3.7 MB
NO_PICTURE = 100  # bytes; a JPEG is never that small, and recorders write one byte where its encoding failed


class BadEpisode(UserError):
    """A file or frame that cannot be used. The message names file, dataset and frame."""


@dataclass
class Episode:
    """Everything of one file but its images."""

    path: str
    name: str  # path relative to the data root: stable when the data moves
    num_frames: int
    cameras: dict  # {recorder's camera name: "jpeg" | "raw"}, sorted by name
    action: np.ndarray  # (N, A) float32, as recorded
    ee_pose: np.ndarray | None  # (N, 6) float32
    qpos: np.ndarray | None  # (N, 6) float32
    phase: np.ndarray | None  # (N,) int
    instruction: str | None  # the file's own language_instruction
    rate_hz: float | None  # frames per second by the file's timestamps; None where these do not tell

    @property
    def no_state(self):
        """(N, 1): what stands for the state of a policy that is told none."""
        return np.zeros((self.num_frames, 1), np.float32)


def find_episodes(root):
    """All *.h5 and *.hdf5 below `root`, sorted as path strings; linked folders are searched too, each real folder
    once."""
    none = "No HDF5 files found"
    require(str(root), f"{none}: dataset.root_dir is empty. Set it to the folder with your .h5 episodes", MissingFile)
    wrong = f"{none}: dataset.root_dir '{root}' is not a folder. Check the path (ls -la {root})"
    require(Path(root).is_dir(), wrong, MissingFile)
    paths, seen = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a second link to the same recordings
            subfolders.clear()
            continue
        seen.add(real)
        # links last: a recording keeps its real name
        subfolders.sort(key=lambda name, folder=folder: (os.path.islink(os.path.join(folder, name)), name))
        paths += [os.path.join(folder, name) for name in names if name.endswith((".h5", ".hdf5"))]
    require(paths, f"{none} under '{root}' (*.h5 and *.hdf5, recursively). Check dataset.root_dir", MissingFile)
    return sorted(paths)


def read_episode(path, root=None):
    """Read and check one file -> Episode (images stay on disk)."""
    try:
        with h5py.File(path, "r", locking=False) as f:  # NFS often refuses locks, and nothing here writes
            return _read_arrays(f, path, os.path.relpath(path, root) if root else Path(path).name)
    # what h5py raises for damage, or a group where a dataset should be
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        how = "It may be truncated: re-copy it, or pass --skip_bad_episodes to leave it out"
        raise BadEpisode(f"{path}: not a readable HDF5 file ({error}). {how}") from error


def _read_arrays(f, path, name):
    has = f"the file has {sorted(f)}. Re-record it"
    seen = "observations/images" in f and len(f["observations/images"])
    require(seen, f"{path}: no 'observations/images/<camera>'; {has}", BadEpisode)
    action, cameras = _lowdim(f, path, "action"), {}
    acts = action is not None and len(action)
    require(acts, f"{path}: no dataset 'action' or one with 0 rows; {has}", BadEpisode)
    n = len(action)
    for camera in sorted(f["observations/images"]):
        images, where = f["observations/images"][camera], f"{path}: dataset 'observations/images/{camera}'"
        require(len(images) == n, f"{where} has {len(images)} frames, 'action' has {n} rows", BadEpisode)
        jpeg = h5py.check_vlen_dtype(images.dtype) == np.uint8 and images.ndim == 1
        raw = images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3
        wanted = "(N,) variable-length uint8 (JPEG) or (N, H, W, 3) uint8"
        require(jpeg or raw, f"{where} is {images.dtype} {images.shape}; expected {wanted}", BadEpisode)
        cameras[camera] = "jpeg" if jpeg else "raw"
        sizes = _jpeg_sizes(path, images) if jpeg else np.array([])
        if len(bad := np.flatnonzero(sizes < NO_PICTURE)):
            raise BadEpisode(f"{where} frame {bad[0]} is no picture: {sizes[bad[0]]} bytes ({len(bad)} such frames)")
    phase = f["phase"][:].astype(int) if "phase" in f else None
    shape = None if phase is None else phase.shape
    require(shape in (None, (n,)), f"{path}: dataset 'phase' has shape {shape}, expected ({n},)", BadEpisode)
    pose, qpos = (_lowdim(f, path, f"observations/{key}", n) for key in ("ee_pose", "qpos"))
    rate = _frames_per_second(f["timestamp"][:]) if "timestamp" in f else None
    return Episode(str(path), name, n, cameras, action, pose, qpos, phase, read_instruction(f, path), rate)


def _frames_per_second(timestamps):
    """None where the clock stands still: recorders also write epoch seconds as float32, which tick every 128 s."""
    steps = np.diff(timestamps.astype(np.float64))
    middle = float(np.median(steps)) if len(steps) else 0.0
    return 1 / middle if 1e-4 < middle < 100 else None


def _jpeg_sizes(path, images):
    """(N,) bytes of each picture, from the descriptors of the variable-length dataset: the pictures stay unread."""
    n, start = len(images), images.id.get_offset()
    if start is not None:
        with open(path, "rb") as f:
            f.seek(start)
            table = f.read(16 * n)
    elif images.chunks and not images.compression:
        table = b"".join(images.id.read_direct_chunk((i,))[1] for i in range(0, n, images.chunks[0]))
    else:
        return np.array([len(images[i]) for i in range(n)])
    return np.frombuffer(table[: 16 * n], dtype=[("size", "<u4"), ("heap", "<u8"), ("index", "<u4")])["size"]


def load_episodes(root, skip_bad=False, run=None):
    """Read every episode below `root` -> (episodes, excluded), excluded being the messages of files left out by
    `skip_bad`. All must agree on cameras and dimensions. Of a large folder an index is kept, so that a later start
    opens only files of another size or time. `run`: rank 0 reads, the others then find its index."""
    mine = []
    if run is not None:
        run.once(lambda: mine.extend(_load(root, skip_bad, True)))
    return tuple(mine) or _load(root, skip_bad, run is None)


def _load(root, skip_bad, loud):
    paths, episodes, excluded, facts, known, index = find_episodes(root), [], [], {}, {}, None
    if len(paths) >= INDEXED:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vla_episodes"
        where = hashlib.sha256(f"{INDEX_FORMAT} {os.path.realpath(root)}".encode())
        index = cache / f"{where.hexdigest()[:32]}.npz"
        known = _read_index(index)
        if loud:
            print(f"reading   {len(paths)} episodes under {root}; {len(known)} are in {index}", flush=True)
    for path in tqdm(paths, desc="reading episodes", unit="file", disable=None if loud else True, leave=False):
        about, name = os.stat(path), os.path.relpath(path, root)
        facts[name] = [about.st_size, about.st_mtime_ns]
        then, fields = known.get(name, (None, None))
        try:
            episode = Episode(path, name, **fields) if then == facts[name] else read_episode(path, root)
            if episodes:
                _check_agreement(episodes[0], episode)
            episodes.append(episode)
        except BadEpisode as error:
            if not skip_bad:
                raise BadEpisode(f"{error} (--skip_bad_episodes leaves such files out and lists them)") from error
            excluded.append(str(error))
    none = f"none of the {len(excluded)} files under '{root}' is usable; the first: {''.join(excluded[:1])}"
    require(episodes, none, BadEpisode)
    if index and {e.name: facts[e.name] for e in episodes} != {name: then for name, (then, _) in known.items()}:
        _write_index(index, episodes, facts)
    return episodes, excluded


def _write_index(path, episodes, facts):
    """All that read_episode found in files of these [size, time]. Without room for it the files are read every time."""
    names, arrays = [key for key in ARRAYS if getattr(episodes[0], key) is not None], {}
    for key in names:
        arrays[key] = np.concatenate([getattr(e, key) for e in episodes])
    arrays["phase"] = np.concatenate([np.zeros(0, int), *(e.phase for e in episodes if e.phase is not None)])
    about = []
    for e in episodes:
        about.append([e.name, facts[e.name], e.num_frames, e.cameras, e.phase is not None, e.instruction, e.rate_hz])
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with contextlib.suppress(OSError), ckpt.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def _read_index(path):
    """-> {name: ([size, time], fields of its Episode)}; nothing of a file that is not there, damaged, or another's."""
    known, row, phase_row = {}, 0, 0
    try:
        with np.load(path) as file:  # checks every array's sum
            arrays = {key: file[key] for key in file.files}
        phase, about = arrays.pop("phase"), json.loads(arrays.pop("about").tobytes())
        for name, facts, n, cameras, phased, instruction, rate in about:
            fields = {key: arrays[key][row : row + n] if key in arrays else None for key in ARRAYS}
            fields["phase"] = phase[phase_row : phase_row + n] if phased else None
            fields |= dict(num_frames=n, cameras=cameras, instruction=instruction, rate_hz=rate)
            known[name] = facts, fields
            row, phase_row = row + n, phase_row + n * phased
        whole = all(len(array) == row for array in arrays.values()) and len(phase) == phase_row
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}
    return known if whole else {}


def open_episodes(root, names=None):
    """The episodes of a report: all below `root`, or those of these names. Files that cannot be read are listed."""
    found, excluded = load_episodes(root, skip_bad=True)
    for message in excluded:
        print(f"excluded  {message}")
    there = [e.name for e in found]
    unknown = sorted(set(names or []) - set(there))
    have = f"it has {', '.join(there[:5])}, ...: choose some with --episodes"
    require(not unknown, f"'{root}' has no episode '{''.join(unknown[:1])}'; {have}")
    return [e for e in found if names is None or e.name in names]


def choose_cameras(episodes, wanted):
    """Recorder's names, or camera1..K for them in alphabetical order -> recorder's names, each once."""
    known = list(episodes[0].cameras)
    numbered = {f"camera{k}": name for k, name in enumerate(known, 1)}
    cameras = [c if c in known else numbered.get(c, c) for c in wanted]
    usable = cameras and len(set(cameras)) == len(cameras) and set(cameras) <= set(known)
    names = f"{', '.join(known)} (or camera1..camera{len(known)} in this order)"
    require(usable, f"dataset.cameras is {list(wanted)}; expected one or more of {names}, each once")
    return cameras


def play(root, names, cameras, keys, definition):
    """What a policy's open_episodes gives evaluate.py of each episode: {name, sample: callable(t) -> observation with
    images {policy's camera: (h, w, 3)}, state, instruction, target (M, A), hold (M, A): the action that stands still,
    phase (M,) or None}, in data units. `cameras` {policy's name: recorder's}, `keys`: see robot_state."""
    found, reader = open_episodes(root, names), ImageReader()
    wrong = [c for c in cameras.values() if c not in found[0].cameras]
    require(not wrong, f"'{root}' has cameras {list(found[0].cameras)}, the policy needs {wrong}")

    def sample(e, state, t):
        images = {camera: reader.read(e, recorded, t) for camera, recorded in cameras.items()}
        return dict(images=images, instruction=e.instruction, state=None if state is None else state[t])

    for e in found:
        target, state = definition.targets(e), robot_state(e, keys) if keys else None
        phase = None if e.phase is None else e.phase[: len(target)]
        observe = functools.partial(sample, e, state)
        yield dict(name=e.name, sample=observe, target=target, hold=definition.still(e), phase=phase)


def _check_agreement(first, other):
    def signature(e):
        arrays = {"action dims": e.action, "ee_pose dims": e.ee_pose, "qpos dims": e.qpos}
        return dict(cameras=list(e.cameras)) | {key: x if x is None else x.shape[1] for key, x in arrays.items()}

    found, how = signature(other), "Train on one kind of recording at a time: move one away"
    for what, expected in signature(first).items():
        wrong = f"{other.path}: {what} {found[what]} do not match {expected} of {first.path}. {how}"
        require(found[what] == expected, wrong, BadEpisode)


def _lowdim(f, path, key, rows=None):
    """(rows, dims) float32, or None where there is none."""
    if key not in f:
        return None
    array = f[key][:].astype(np.float32)
    fits, where = array.ndim == 2 and len(array) == (rows or len(array)), f"{path}: dataset '{key}'"
    require(fits, f"{where} has shape {array.shape}, expected ({rows or 'frames'}, dims)", BadEpisode)
    if len(bad := np.flatnonzero(~np.isfinite(array).all(axis=1))):
        what = f"is not finite: {array[bad[0]].tolist()} ({len(bad)} such frames)"
        raise BadEpisode(f"{where} frame {bad[0]} {what}")
    return array


def read_instruction(f, path):
    """language_instruction as scalar, (1,), bytes, S-type or str -> str; None without one."""
    if "language_instruction" not in f or not f["language_instruction"].size:
        return None
    value = f["language_instruction"][()]
    value = value.reshape(-1)[0] if isinstance(value, np.ndarray) else value
    try:
        return (value.decode("utf-8") if isinstance(value, bytes) else str(value)).strip("\0 \n")
    except UnicodeDecodeError as error:
        raise BadEpisode(f"{path}: dataset 'language_instruction' is not UTF-8 text: {value!r}") from error


class ImageReader:
    """Reads single pictures: resize(picture), or as recorded without `resize`. Files stay open, at most `max_open` (as
    many as this machine bears), and their datasets, as looking one up takes longer than reading from it. Each process
    opens its own: an HDF5 handle must not cross a fork. `store`: pictures that were decoded once, see keep."""

    def __init__(self, resize=None, max_open=None):
        self.resize, self.max_open, self.store, self.cameras = resize, max_open, None, []
        self._files, self._pid = OrderedDict(), None

    def read(self, episode, camera, frame):
        """-> (h, w, 3) uint8 RGB of `camera` (recorder's name)."""
        if self.store:
            return self.store.read(episode.path, frame * len(self.cameras) + self.cameras.index(camera))
        where = f"{episode.path}: dataset 'observations/images/{camera}' frame {frame}"
        try:
            value = self._value(episode.path, camera, frame)
        except (OSError, RuntimeError, KeyError, IndexError, ValueError) as error:
            how = "Re-copy the file, or move it away and go on without it: --resume auto --skip_bad_episodes"
            raise BadEpisode(f"{where} cannot be read ({error}). {how}") from error
        if episode.cameras[camera] == "jpeg":
            try:
                value = Image.open(io.BytesIO(value))
                value.load()
            except (OSError, SyntaxError, ValueError) as error:
                how = "Move the file away and go on without it: --resume auto --skip_bad_episodes"
                size = len(self._value(episode.path, camera, frame))
                raise BadEpisode(f"{where} is not a decodable JPEG: {size} bytes ({error}). {how}") from error
            value = value if value.mode == "RGB" else value.convert("RGB")
        return self.resize(value) if self.resize else np.asarray(value)

    def keep(self, folder, episodes, cameras, recipe=(), run=None):
        """From now on read the pictures of these episodes and cameras from a frame store in `folder`, on a local disk;
        makes what is missing there. `recipe`: plain values, all that `resize` depends on."""
        by_path, shape = {e.path: e for e in episodes}, self.read(episodes[0], cameras[0], 0).shape
        store, rank = FrameStore(folder, shape, [*cameras, *recipe]), run.rank if run else 0

        def open_source(path):
            reader, episode = ImageReader(self.resize, max_open=1), by_path[path]
            reader._open(path)  # before several threads want it
            return lambda i: reader.read(episode, cameras[i % len(cameras)], i // len(cameras))

        sources = {e.path: e.num_frames * len(cameras) for e in episodes}
        store.build(sources, open_source, rank / (run.world if run else 1), quiet=rank > 0)
        for path in sources:
            bad = store.about(path)["bad"]
            require(not bad, next(iter(bad.values()), ""), BadEpisode)
        self.store, self.cameras = store, list(cameras)

    def _value(self, path, camera, frame):
        """What is stored of a frame: bytes of a JPEG, or pixels."""
        dataset, kind = self._open(path)[camera]
        space = dataset.get_space()
        one = (1, *space.shape[1:])
        require(0 <= frame < space.shape[0], f"there are {space.shape[0]} frames", IndexError)
        space.select_hyperslab((frame, *(0 for _ in one[1:])), one)
        value = np.empty(one, kind)
        dataset.read(h5py.h5s.create_simple(one), space, value)  # dataset[frame] takes twice as long
        return value[0]

    def _open(self, path):
        """-> {camera: (dataset, its dtype)} of a file."""
        if self._pid != os.getpid():
            self._files, self._pid = OrderedDict(), os.getpid()
            self.most = self.max_open or files_to_keep()
        if path in self._files:
            self._files.move_to_end(path)
        else:
            if len(self._files) >= self.most:
                self._files.popitem(last=False)[1][0].close()
            file = h5py.File(path, "r", locking=False)
            images = file["observations/images"].items()
            self._files[path] = file, {name: (dataset.id, dataset.dtype) for name, dataset in images}
        return self._files[path][1]

    def __getstate__(self):
        return self.__dict__ | {"_files": OrderedDict(), "_pid": None}


def files_to_keep():
    """How many HDF5 files this process may hold open: half of `ulimit -n`, and an eighth of the free memory for all
    loader workers of all ranks on this machine together."""
    worker = get_worker_info()
    processes = (worker.num_workers if worker else 1) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(allowed // 2, free_memory() // 8 // processes // FILE_BYTES))


def free_memory():
    """Bytes that this machine can still give."""
    return 1024 * int(re.search(r"MemAvailable: *(\d+)", Path("/proc/meminfo").read_text())[1])


# ---- actions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ActionDefinition:
    """What one row of the training target is; two programs that share statistics must agree on it.

    source "action": the recorded row. source "ee_pose_delta": ee_pose[t+1] - ee_pose[t], the motion that follows t.
    rotation_unit "rad" | "deg": of the rotation columns 3:6 of ee_pose; a delta is wrapped to half a turn in it."""

    source: str
    dim: int
    rotation_unit: str = "rad"

    def targets(self, episode):
        """(M, A) float32; row t belongs to frame t. M = N for "action", N-1 for "ee_pose_delta"."""
        if self.source == "action":
            return episode.action
        delta = np.diff(episode.ee_pose, axis=0)
        turn = np.float32(360.0 if self.rotation_unit == "deg" else 2 * np.pi)
        delta[:, 3:6] = (delta[:, 3:6] + turn / 2) % turn - turn / 2
        # a resting joint flickers in the last bits of its float32 pose; normalised, that would look like full motion
        return np.where(np.abs(delta) <= 2 * np.spacing(np.abs(episode.ee_pose[1:])), np.float32(0), delta)

    def still(self, episode):
        """(M, A), the target that stands still: the joints or the pose, where the recorded action is near them, else
        no motion."""
        target = self.targets(episode)
        for where in (episode.qpos, episode.ee_pose) if self.source == "action" else ():
            fits = where is not None and where.shape == target.shape
            if fits and np.abs(target - where).mean() < np.abs(target).mean():
                return where
        return np.zeros_like(target)


def define_action(episodes, use_ee_pose_delta, rotation_unit="auto"):
    """ActionDefinition for these episodes. rotation_unit "auto": degrees if any |rotation| exceeds a full turn in
    radians."""
    unit = detect_rotation_unit(episodes) if rotation_unit == "auto" else rotation_unit
    if not use_ee_pose_delta:
        return ActionDefinition("action", episodes[0].action.shape[1], unit)
    pose = episodes[0].ee_pose
    shape, how = None if pose is None else pose.shape, "Set it to false to train on the recorded 'action'"
    wanted = f"use_ee_pose_delta_as_action needs 'observations/ee_pose' (N, 6), found {shape}"
    require(shape and shape[1] == 6, f"{episodes[0].path}: {wanted}. {how}", BadEpisode)
    return ActionDefinition("ee_pose_delta", 6, unit)


def detect_rotation_unit(episodes):
    """ "deg" if any rotation of ee_pose lies beyond 2 pi, else "rad" ("rad" when there is none to look at)."""
    poses = [e.ee_pose for e in episodes if e.ee_pose is not None and e.ee_pose.shape[1] == 6]
    return "deg" if any(np.abs(pose[:, 3:6]).max() > 2 * np.pi + 1e-3 for pose in poses) else "rad"


def detect_position_unit(episodes):
    """ "mm" or "m" from the size of ee_pose[:, :3] (a desktop arm reaches less than 2 m, and more than 2 mm), None
    without poses. Episodes that disagree raise BadEpisode: their deltas differ by a factor of 1000."""
    units = {}
    for e in episodes:
        if e.ee_pose is not None:
            units.setdefault("mm" if np.abs(e.ee_pose[:, :3]).max() > 2.0 else "m", e.path)
    if len(units) > 1:
        looks = f"ee_pose looks like millimetres in {units['mm']} but like metres in {units['m']}"
        raise BadEpisode(f"{looks}. Convert one, or move it away")
    return next(iter(units), None)


def picture_size(episodes, camera):
    """[height, width] of a camera's pictures, from up to 32 episodes; BadEpisode where their aspects differ, because a
    policy takes one only."""
    first, reader = episodes[0], ImageReader()
    size = reader.read(first, camera, 0).shape[:2]
    for i in np.unique(np.linspace(0, len(episodes) - 1, 32).astype(int)):
        other = reader.read(episodes[i], camera, 0).shape[:2]
        wrong = f"{episodes[i].path}: {camera} is {other} pixels, in {first.path} {size}: another aspect ratio"
        same = abs(other[1] / other[0] * size[0] / size[1] - 1) < 0.02
        require(same, f"{wrong}. Train on one kind of recording at a time: move one away", BadEpisode)
    return list(size)


def name_columns(found, definition, keys):
    """-> ([[name, unit]] per action dim, the same per state dim). An action is a joint target if qpos tells more about
    it than its own mean does."""
    first, position, turn = found[0], detect_position_unit(found) or "", definition.rotation_unit
    action, qpos, names = first.action, first.qpos, [[f"action{i + 1}", ""] for i in range(definition.dim)]
    pose = [["x", position], ["y", position], ["z", position], ["roll", turn], ["pitch", turn], ["yaw", turn]]
    joints = []
    if qpos is not None:
        unit = "deg" if max(np.abs(e.qpos).max() for e in found) > 2 * np.pi + 1e-3 else "rad"
        joints = [[f"q{i + 1}", unit] for i in range(qpos.shape[1])]
    if definition.source == "ee_pose_delta":
        names = [[f"d{n}", unit] for n, unit in pose]
    elif joints and qpos.shape == action.shape:
        follows = np.abs(action - qpos).mean() <= 0.5 * np.abs(action - action.mean(0)).mean()
        names = joints if follows else names
    state = {"qpos": joints, "ee_pose": pose if first.ee_pose is None else pose[: first.ee_pose.shape[1]]}
    return names, sum((state.get(key, []) for key in keys), [])


def records_past_motion(episodes):
    """True if `action` is the motion already made, action[t] = ee_pose[t] - ee_pose[t-1]: it teaches yesterday's
    action."""
    e = episodes[0]
    if e.ee_pose is None or e.ee_pose.shape != e.action.shape or e.num_frames < 3:
        return False
    past = np.diff(e.ee_pose[:, :3], axis=0)  # positions tell; rotations may wrap in between
    return bool(np.abs(past).max() > 0 and np.allclose(e.action[1:, :3], past, atol=1e-3 * np.abs(past).max()))


def action_chunk(targets, frame, horizon, hold):
    """Rows frame..frame+horizon-1 of `targets` -> ((H, A) float32, is_pad (H,) bool).

    Past the end `hold` "zero" pads with zeros (a delta: stand still), "repeat" with the last row (an absolute target).
    """
    chunk = targets[frame : frame + horizon]
    missing = horizon - len(chunk)
    if missing:
        fill = np.zeros_like(targets[:1]) if hold == "zero" else targets[-1:]
        chunk = np.concatenate([chunk, np.repeat(fill, missing, axis=0)])
    return chunk, np.arange(horizon) >= horizon - missing


class Chunks(Dataset):
    """The samples of some episodes: every frame that has a target. A script's dataset adds what it reads of a frame."""

    def __init__(self, episodes, definition, horizon):
        self.episodes, self.definition, self.horizon = episodes, definition, horizon
        self.targets = [definition.targets(e) for e in episodes]
        self.ends = np.cumsum([len(t) for t in self.targets])

    def __len__(self):
        return int(self.ends[-1]) if len(self.ends) else 0

    def spread(self, most):
        """At most `most` samples, evenly spread."""
        return np.unique(np.linspace(0, len(self) - 1, min(most, len(self))).astype(int))

    def locate(self, i):
        """Sample -> (episode number, frame)."""
        e = int(np.searchsorted(self.ends, i, side="right"))
        return e, int(i - (self.ends[e - 1] if e else 0))

    def chunk(self, i):
        """((H, A) in data units, is_pad (H,)); past the end it stands still."""
        e, t = self.locate(i)
        hold = "zero" if self.definition.source == "ee_pose_delta" else "repeat"
        return action_chunk(self.targets[e], t, self.horizon, hold)


# ---- statistics and split --------------------------------------------------------------------------------------------


def robot_state(episode, keys):
    """(N, S) float32: the arrays `keys` (of "qpos", "ee_pose", "no_state") side by side."""
    return np.concatenate([getattr(episode, k) for k in keys], axis=1)


def insertion_stats(train, definition, held_out, state_keys=()):
    """Statistics of the training episodes in the file form of common/stats.py; `held_out`: names of the validation
    episodes."""
    arrays = {"action": [definition.targets(e) for e in train]}
    if state_keys:
        arrays["observation.state"] = [robot_state(e, state_keys) for e in train]
    about = dict(format_version=FORMAT_VERSION, num_episodes=len(train))
    about |= dict(num_frames=int(sum(e.num_frames for e in train)), action_definition=asdict(definition))
    return about | dict(episodes=[e.name for e in train], excluded_episodes=list(held_out)) | compute_stats(arrays)


def _check_count(key, count, episodes):
    fits = 0 <= count < len(episodes)
    require(fits, f"{key} is {count}, but there are {len(episodes)} usable episodes: hold out fewer")


def hold_out_last(episodes, count):
    """(training, validation): the last `count` episodes of the sorted list; recorders put the time into the name, so
    these are the newest."""
    _check_count("num_val_episodes", count, episodes)
    return episodes[: len(episodes) - count], episodes[len(episodes) - count :]


def hold_out_random(episodes, count, seed):
    """(training, validation) as sorted lists of indices: `count` episodes drawn with `seed`, as guide 2 splits."""
    _check_count("validation.num_episodes", count, episodes)
    validation = sorted(random.Random(seed).sample(range(len(episodes)), count))
    return sorted(set(range(len(episodes))) - set(validation)), validation


def split_or_keep(marks, split, then=None):
    """Split usable episodes {name: what another file of that name would change} by split(). `then`: the table of the
    checkpoint that is resumed, if bad files may be left out: where that is all that happened since, its split stays,
    for it is the same run. -> (training, validation) indices, table {name: [mark, part]}, messages on what is gone"""
    gone = [name for name in then or () if name not in marks]
    if gone and all(name in then and then[name][0] == mark for name, mark in marks.items()):
        table, notes = then, [f"{name}: left out since the checkpoint was written" for name in gone]
        validation = [i for i, name in enumerate(marks) if then[name][1] == "validation"]
        train = sorted(set(range(len(marks))) - set(validation))
    else:
        (train, validation), notes = split(), []
        parts = {i: "validation" for i in validation}
        table = {name: [mark, parts.get(i, "train")] for i, (name, mark) in enumerate(marks.items())}
    require(train, f"no training episode is left of {', '.join([*table][:5])}")
    return train, validation, table, notes


def trained_in(table):
    """[[name, mark]] of the training episodes of such a table: what a fingerprint of the data is made of."""
    return [[name, mark] for name, (mark, part) in table.items() if part == "train"]


def write_validation_list(path, episodes, validation):
    """validation_episodes.txt: `validation` holds indices into the sorted list `episodes`."""
    head = ["Validation episodes", "=" * 80, f"Total episodes: {len(episodes)}"]
    head += [f"Validation episodes: {len(validation)}", f"Validation episode indices: {list(validation)}", ""]
    lines = [*head, "Validation episode paths:", *(f"  [{i}] {episodes[i].path}" for i in validation)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
