"""Insertion episodes in HDF5, one file per episode: found, checked, split, and served as frames with action chunks.

    action                       (N, A) float     what the recorder stored: a pose delta or a joint target
    observations/ee_pose         (N, 6) float     x y z, roll pitch yaw; optional
    observations/qpos            (N, 6) float     joints; optional
    observations/images/<cam>    (N,) variable-length uint8 (JPEG), or (N, H, W, 3) uint8 RGB, any compression
    phase (N,) int, timestamp (N,) float, language_instruction str      optional

Camera names sorted alphabetically become camera1..K. Low-dimensional arrays are read once (and cached in an index if
the folder is large), images lazily, through a bounded number of open files per process, or from a frame store
(frames.py). What cannot be read raises BadEpisode; nothing is ever replaced by zeros."""

import contextlib
import functools
import hashlib
import io
import os
import random
import resource
from dataclasses import asdict, dataclass
from pathlib import Path

import h5py
import numpy as np
import psutil
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from common import MissingFile, UserError, require, require_utf8
from common import checkpoint as ckpt
from common.frames import FrameStore, rgb
from common.log import progress
from common.stats import FORMAT_VERSION, Normalizer, compute_stats

INDEXED = 200  # a folder of at least this many files gets an index; fewer are read in a moment
MATRICES = ("action", "ee_pose", "qpos")  # the 2-D fields of an Episode
FILE_BYTES = 4_000_000  # memory that HDF5 takes for an open file with JPEG images: 2.5 to 3.7 MB
NO_PICTURE = 100  # bytes; a JPEG is never that small, and recorders write one byte where its encoding failed
DESCRIPTOR = [("size", "<u4"), ("heap", "<u8"), ("index", "<u4")]  # what HDF5 stores of a variable-length element


class BadEpisode(UserError):
    """A file or frame that cannot be used. The message names file, dataset and frame."""


@dataclass
class Episode:
    """Everything of one file but its images."""

    path: str
    name: str  # path relative to the data root: stable when the data moves
    num_frames: int
    cameras: dict  # {recorder's camera name: "jpeg" | "raw"}, sorted by name
    sizes: dict  # {the same: [height, width] of its first image}
    action: np.ndarray  # (N, A) float32, as recorded
    ee_pose: np.ndarray | None  # (N, 6) float32
    qpos: np.ndarray | None  # (N, 6) float32
    phase: np.ndarray | None  # (N,) int
    instruction: str | None  # the file's own language_instruction
    rate_hz: float  # frames per second by the file's timestamps; 0: unknown


# ---- files -----------------------------------------------------------------------------------------------------------
def find_episodes(root):
    """-> {path: its size and time} of all *.h5 and *.hdf5 below `root`, sorted; follows links, each folder once."""
    problem = f"No HDF5 files found in '{root}' (dataset.root_dir, or evaluate.py's --data)"

    def refuse(error):
        raise MissingFile(f"{problem}: {error.strerror}: '{error.filename}'") from error

    paths, seen = [], set()
    for folder, subfolders, names in os.walk(str(root), onerror=refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up, or a second link to the same recordings
            subfolders.clear()
            continue
        seen.add(real)
        # links last: a recording keeps its real name
        subfolders.sort(key=lambda name, folder=folder: (os.path.islink(os.path.join(folder, name)), name))
        paths += [os.path.join(folder, name) for name in names if name.endswith((".h5", ".hdf5"))]
    require(paths, f"{problem}, searched recursively for *.h5 and *.hdf5", MissingFile)
    require_utf8(paths, root)
    facts = {path: os.stat(path, follow_symlinks=os.path.exists(path)) for path in sorted(paths)}
    return {path: f"{about.st_size} {about.st_mtime_ns}" for path, about in facts.items()}


def read_episode(path, root=None):
    """Read and check one file -> Episode (images stay on disk)."""
    try:
        require(os.path.isfile(path), "no regular file", OSError)  # a named pipe would be waited for
        with h5py.File(path, "r", locking=False) as f:  # NFS often refuses locks, and nothing here writes
            return _read_arrays(f, str(path), os.path.relpath(path, root or Path(path).parent))
    # what h5py raises for damage, or a group where a dataset should be
    except (OSError, RuntimeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise BadEpisode(f"{path}: not a readable HDF5 file ({error}). It may be truncated: re-copy it") from error


def _read_arrays(f, path, name):
    has = f"the file has {sorted(f)}. Re-record it"
    cameras = f.get("observations/images", {})
    known = isinstance(cameras, h5py.Group) and cameras
    require(known, f"{path}: no 'observations/images/<camera>'; {has}", BadEpisode)
    n = (getattr(f.get("action"), "shape", None) or (0,))[0]
    require(n, f"{path}: no dataset 'action' or one with 0 rows; {has}", BadEpisode)
    images = {camera: _check_images(path, cameras[camera], n) for camera in sorted(cameras)}
    cameras, sizes = ({name: about[i] for name, about in images.items()} for i in range(2))
    action, phase = lowdim(f, path, "action", n), lowdim(f, path, "phase", n, 1, int)
    pose, qpos = (lowdim(f, path, f"observations/{key}", n) for key in ("ee_pose", "qpos"))
    rate = _frames_per_second(f["timestamp"][()]) if "timestamp" in f else 0.0
    return Episode(path, name, n, cameras, sizes, action, pose, qpos, phase, read_instruction(f, path), rate)


def _check_images(path, images, n):
    """A camera's dataset of `n` images -> ("jpeg" or "raw", [height, width] of the first)"""
    where = f"{path}: dataset '{images.name[1:]}'"
    shape = getattr(images, "shape", None) or (0,)
    require(shape[0] == n, f"{where} has {shape[0]} frames, 'action' has {n} rows", BadEpisode)
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[-1] == 3 and images.size:
        return "raw", list(images.shape[1:3])
    wanted = "(N,) variable-length uint8 (JPEG) or (N, H, W, 3) uint8"
    jpeg = h5py.check_vlen_dtype(images.dtype) == np.uint8 and images.ndim == 1
    require(jpeg, f"{where} is {images.dtype} {images.shape}; expected {wanted}", BadEpisode)
    start = images.id.get_offset()  # None: stored in chunks
    if start is None:
        sizes = np.array([len(picture) for picture in images])
    else:  # contiguous: the descriptors hold the sizes, no image is read
        sizes = np.fromfile(path, DESCRIPTOR, n, offset=start)["size"]
    if len(bad := np.flatnonzero(sizes < NO_PICTURE)):
        raise BadEpisode(f"{where} frame {bad[0]} is no image: {sizes[bad[0]]} bytes ({len(bad)} such frames)")
    with contextlib.suppress(OSError):
        return "jpeg", list(Image.open(io.BytesIO(images[0])).size[::-1])
    raise BadEpisode(f"{where} frame 0 is no image")


def lowdim(f, path, key, n, ndim=2, kind=np.float32):
    """-> dataset `key`, finite, of shape (n, dims), or with ndim 1 (n,); None if the file has none."""
    if key not in f:
        return None
    about, shape = getattr(f[key], "dtype", np.dtype("O")), getattr(f[key], "shape", None) or ()
    fits, expected = len(shape) == ndim and shape[0] == n and all(shape[1:]), f"({n}, dims)" if ndim == 2 else f"({n},)"
    where, wrong = f"{path}: dataset '{key}'", f"is {about} {shape}, expected numbers {expected}"
    require(fits and about.kind in "biuf", f"{where} {wrong}", BadEpisode)
    stored = f[key][:]
    array = stored.astype(np.float32)
    if len(bad := np.flatnonzero(~np.isfinite(array).all(axis=(*range(1, ndim),)))):
        what = f"is not finite: {array[bad[0]].tolist()} ({len(bad)} such frames)"
        raise BadEpisode(f"{where} frame {bad[0]} {what}")
    return stored.astype(kind)


def _frames_per_second(timestamps):
    """By the median step; 0 where none can be had (no numbers, NaN), or the clock stands still: epoch seconds stored as
    float32 tick every 128 s. Nothing is learned from this array, so it is no reason to refuse a file."""
    numbers = np.ravel(timestamps)
    known = numbers.dtype.kind in "iuf" and len(numbers) > 1
    middle = float(np.median(np.diff(numbers.astype(np.float64)))) if known else 0.0
    return 1 / middle if 1e-4 < middle < 100 else 0.0


def read_instruction(f, path):
    """language_instruction as scalar, (1,), bytes, S-type or str -> str; None without one."""
    stored = f.get("language_instruction")
    if stored is None or not getattr(stored, "size", 1):
        return None
    texts = [*dict.fromkeys(np.ravel(stored[()]).tolist())] if isinstance(stored, h5py.Dataset) else [stored]
    try:
        require(len(texts) == 1 and isinstance(texts[0], (bytes, str)), "", ValueError)
        return (texts[0].decode("utf-8") if isinstance(texts[0], bytes) else texts[0]).strip("\0 \n")
    except ValueError as error:
        raise BadEpisode(f"{path}: dataset 'language_instruction' is {texts[:2]}, expected one UTF-8 text") from error


def load_episodes(root, skip_bad=False, run=None):
    """Read every episode below `root` -> (episodes, excluded: messages about files that `skip_bad` left out). All must
    agree on cameras and dimensions. A large folder is cached in an index, until the size or time of a file changes.
    `run`: rank 0 reads for all."""
    if run:
        return run.once(load_episodes, root, skip_bad)
    episodes, excluded, stamps = [], [], find_episodes(root)
    cache, large = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), len(stamps) >= INDEXED
    index = Path(cache, "vla_episodes", f"{hashlib.sha256(os.path.realpath(root).encode()).hexdigest()[:32]}.parquet")
    if large:
        print(f"reading   {len(stamps)} episodes under {root}, kept in {index}", flush=True)
        if known := _read_index(index, stamps):
            return known, []
    for path in progress(stamps, "reading episodes", "file"):
        try:
            episode = read_episode(path, root)
            _check_agreement([*episodes[:1], episode][0], episode)
            episodes.append(episode)
        except BadEpisode as error:
            if not skip_bad:
                raise BadEpisode(f"{error} (--skip_bad_episodes leaves such files out and lists them)") from error
            excluded.append(str(error))
    problem = f"none of the {len(excluded)} files under '{root}' is usable; the first: {''.join(excluded[:1])}"
    require(episodes, problem, BadEpisode)
    if large and not excluded:  # else the next run looks at the bad files again
        _write_index(index, episodes, stamps)
    return episodes, excluded


def _check_agreement(first, other):
    for key in ("cameras", *MATRICES):
        one, two = (list(e.cameras) if key == "cameras" else np.shape(getattr(e, key))[1:] for e in (first, other))
        wrong = f"{other.path}: {key} {two} does not match {one} of {first.path}"
        require(one == two, f"{wrong}. Train on one kind of recording at a time: move one away", BadEpisode)
    for camera, (h, w) in first.sizes.items():
        height, width = other.sizes[camera]
        wrong = f"{other.path}: {camera} is {width}x{height}, in {first.path} {w}x{h}: another aspect ratio"
        require(abs(width / height * h / w - 1) < 0.02, f"{wrong}, and a policy takes one. Move one away", BadEpisode)


def _write_index(path, episodes, stamps):
    """A table with a row per episode. If it cannot be written, the files are read every time."""
    import pandas as pd

    table = pd.DataFrame([vars(e) for e in episodes]).assign(stamp=stamps.values())
    for key in MATRICES:
        table[key] = [x if x is None else x.ravel() for x in table[key]]
    with contextlib.suppress(OSError), ckpt.atomic_path(path) as temporary:
        table.to_parquet(temporary, write_page_checksum=True)


def _read_index(path, stamps):
    """-> episodes of these files; [] if a file has changed, or the index is missing or damaged."""
    import pandas as pd

    try:
        table = pd.read_parquet(path, page_checksum_verification=True).astype(object)
        if list(zip(table["path"], table.pop("stamp"), strict=True)) != list(stamps.items()):
            return []
        for key in MATRICES:
            pairs = zip(table[key], table["num_frames"], strict=True)
            table[key] = [x if x is None else x.reshape(n, -1) for x, n in pairs]
        table["sizes"] = [{camera: size.tolist() for camera, size in sizes.items()} for sizes in table["sizes"]]
        rows = table.where(table.notna(), None).to_dict("records")
        return [Episode(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def choose_cameras(episodes, wanted):
    """Recorder's names, or camera1..K for them in alphabetical order -> recorder's names, each once."""
    known = list(episodes[0].cameras)
    numbered = {f"camera{k}": name for k, name in enumerate(known, 1)}
    cameras = [numbered.get(name, name) for name in wanted]
    usable = cameras and len(set(cameras)) == len(cameras) and set(cameras) <= set(known)
    require(usable, f"dataset.cameras is {list(wanted)}; expected one or more of {numbered}, each once")
    return cameras


@functools.lru_cache(1)
def _load_once(root, *_):
    """load_episodes for an evaluation, which asks several times; what is left out is printed."""
    found, excluded = load_episodes(root, skip_bad=True)
    print(*[f"excluded  {message}\n" for message in excluded], sep="", end="")
    return found


def play(root, names, cameras, keys, definition):
    """A policy's open_episodes: replay recordings to evaluate.py. Yields for each episode below `root` (or of `names`)
    {name, sample: callable(t) -> observation with images {policy's camera: (h, w, 3)}, state, instruction, target
    (M, A), hold (M, A): the action that stands still, phase (M,) or None}, in data units. Files that cannot be read are
    listed. `cameras` {policy's name: recorder's}, `keys`: see robot_state."""
    found, reader = _load_once(root, *find_episodes(root).items()), ImageReader()
    first, by_name = found[0], {e.name: e for e in found}
    unknown = sorted(set(names or []) - set(by_name))
    known = f"it has {', '.join([*by_name][:5])}, ...: choose some with --episodes"
    require(not unknown, f"'{root}' has no episode '{''.join(unknown[:1])}'; {known}")
    present = [*first.cameras, *(key for key in MATRICES if getattr(first, key) is not None)]
    missing = {*cameras.values(), *keys, definition.source.removesuffix("_delta")} - {*present, "no_state"}
    require(not missing, f"'{root}' has {', '.join(present)}; the policy needs {', '.join(sorted(missing))}")
    dims = definition.targets(first).shape[1]
    require(dims == definition.dim, f"'{root}' has actions of {dims} dims, those of the policy have {definition.dim}")

    def sample(e, state, t):
        images = {camera: reader.read(e, recorded, t) for camera, recorded in cameras.items()}
        return dict(images=images, instruction=e.instruction, state=None if state is None else state[t])

    for name, e in by_name.items():
        if names is None or name in names:
            target, state = definition.targets(e), robot_state(e, keys) if keys else None
            phase = None if e.phase is None else e.phase[: len(target)]
            observe = functools.partial(sample, e, state)
            yield dict(name=name, sample=observe, target=target, hold=definition.still(e), phase=phase)


# ---- images ----------------------------------------------------------------------------------------------------------
class ImageReader:
    """Reads single images, through `resize` if given. Keeps as many files open as the machine allows, and their
    datasets, since looking one up takes longer than reading from it. Each process opens its own: an HDF5 handle must
    not cross a fork. `store`: a frame store to read from instead, see keep."""

    def __init__(self, resize=None):
        self.resize, self.store, self.cameras, self._open, self._pid = resize, None, [], None, None

    def read(self, episode, camera, frame):
        """-> (h, w, 3) uint8 RGB of `camera` (recorder's name)."""
        if self.store:
            return self.store.read(episode.path, frame * len(self.cameras) + self.cameras.index(camera))
        try:
            picture = self._stored(episode.path, camera, frame)
            if episode.cameras[camera] == "jpeg":
                picture = Image.open(io.BytesIO(picture))
                picture.load()
                size, first = list(picture.size[::-1]), episode.sizes[camera]
                require(size == first, f"its height and width are {size}, those of the first {first}", ValueError)
                picture = rgb(picture)
        except (OSError, RuntimeError, KeyError, IndexError, ValueError, SyntaxError) as error:
            where = f"{episode.path}: dataset 'observations/images/{camera}' frame {frame}"
            hint = "Re-copy the file, or move it away and go on without it: --resume auto --skip_bad_episodes"
            raise BadEpisode(f"{where} is no readable {episode.cameras[camera]} image ({error}). {hint}") from error
        return self.resize(picture) if self.resize else np.array(picture)

    def keep(self, folder, episodes, cameras, recipe=(), run=None):
        """Read the images of these episodes and cameras from a frame store in `folder` from now on, after building
        what is missing there. `recipe`: plain values, everything that `resize` depends on."""
        by_path, shape = {e.path: e for e in episodes}, self.read(episodes[0], cameras[0], 0).shape
        store, rank = FrameStore(folder, shape, [*cameras, *recipe]), run.rank if run else 0

        def open_source(path):
            reader, episode = ImageReader(self.resize), by_path[path]
            reader.read(episode, cameras[0], 0)  # opens the file before several threads read it
            return lambda i: reader.read(episode, cameras[i % len(cameras)], i // len(cameras))

        sources = {e.path: e.num_frames * len(cameras) for e in episodes}
        store.build(sources, open_source, rank / (run.world if run else 1))
        for path in sources:
            bad = store.about(path)["bad"]
            require(not bad, next(iter(bad.values()), ""), BadEpisode)
        self.store, self.cameras = store, list(cameras)

    def _stored(self, path, camera, frame):
        """-> a frame as stored: the bytes of a JPEG, or pixels (h, w, 3)"""
        if self._pid != os.getpid():
            self._open = functools.lru_cache(files_to_keep())(open_images)
            self._pid = os.getpid()
        dataset, kind = self._open(path)[1][camera]
        space = dataset.get_space()
        one = (1, *space.shape[1:])
        require(0 <= frame < space.shape[0], f"there are {space.shape[0]} frames", IndexError)
        space.select_hyperslab((frame, *(0 for _ in one[1:])), one)
        value = np.empty(one, kind)
        dataset.read(h5py.h5s.create_simple(one), space, value)  # dataset[frame] takes twice as long
        return value[0]

    def __getstate__(self):
        return self.__dict__ | {"_open": None, "_pid": None}


def open_images(path):
    """-> (open file, {camera: (dataset, its dtype)})"""
    file = h5py.File(path, "r", locking=False)
    return file, {name: (dataset.id, dataset.dtype) for name, dataset in file["observations/images"].items()}


def files_to_keep():
    """How many HDF5 files this process may keep open: at most half of `ulimit -n`, and its share of an eighth of the
    free memory, which all loader workers of all ranks on this machine divide."""
    worker = get_worker_info()
    processes = (worker.num_workers if worker else 1) * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(16, min(allowed // 2, psutil.virtual_memory().available // 8 // processes // FILE_BYTES))


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
        """(M, A), the target that holds the robot still. A recorded action may be a motion, a joint or a pose target:
        of zeros, qpos and ee_pose the one that is nearest to it."""
        target = self.targets(episode)
        places = [np.zeros_like(target)]
        if self.source == "action":
            places += [x for x in (episode.qpos, episode.ee_pose) if np.shape(x) == target.shape]
        return min(places, key=lambda place: np.abs(target - place).mean())


def define_action(episodes, use_ee_pose_delta, rotation_unit="auto"):
    """-> ActionDefinition of these episodes. rotation_unit "auto": degrees if any |rotation| exceeds 2 pi."""
    angles = (e.ee_pose[:, 3:6] for e in episodes if e.ee_pose is not None)
    unit = _angle_unit(angles) if rotation_unit == "auto" else rotation_unit
    if not use_ee_pose_delta:
        return ActionDefinition("action", episodes[0].action.shape[1], unit)
    shape = np.shape(episodes[0].ee_pose)
    problem = f"use_ee_pose_delta_as_action needs 'observations/ee_pose' (N, 6), found {shape}"
    require(shape[1:] == (6,), f"{episodes[0].path}: {problem}. Set it to false to train on 'action'", BadEpisode)
    return ActionDefinition("ee_pose_delta", 6, unit)


def _angle_unit(angles):
    """ "deg" if any of these arrays has a value beyond 2 pi, else "rad"."""
    return "deg" if any(np.abs(a).max(initial=0) > 2 * np.pi + 1e-3 for a in angles) else "rad"


def detect_position_unit(episodes):
    """ "mm" or "m" from the size of ee_pose[:, :3] (a desktop arm reaches less than 2 m, and more than 2 mm), None
    without poses. Episodes that disagree raise BadEpisode: their deltas differ by a factor of 1000."""
    units = {}
    for e in episodes:
        if e.ee_pose is not None:
            units.setdefault("mm" if np.abs(e.ee_pose[:, :3]).max() > 2.0 else "m", e.path)
    looks = f"ee_pose looks like millimetres in {units.get('mm')} but like metres in {units.get('m')}"
    require(len(units) < 2, f"{looks}. Convert one, or move it away", BadEpisode)
    return next(iter(units), None)


def name_columns(found, definition, keys):
    """-> ([[name, unit]] per action dim, the same per state dim); an action is named after what it is a target for."""
    first, length, angle = found[0], detect_position_unit(found) or "", definition.rotation_unit
    pose = [["x", length], ["y", length], ["z", length], ["roll", angle], ["pitch", angle], ["yaw", angle]]
    joints = 0 if first.qpos is None else first.qpos.shape[1]
    unit = _angle_unit(e.qpos for e in found if joints)
    names = dict(ee_pose=pose, no_state=[], qpos=[[f"q{i + 1}", unit] for i in range(joints)])
    actions = [[f"action{i + 1}", ""] for i in range(definition.dim)]
    if definition.source == "ee_pose_delta":
        actions = [[f"d{name}", unit] for name, unit in pose]
    for key in ("qpos", "ee_pose"):
        actions = names[key] if definition.still(first) is getattr(first, key) else actions
    return actions, sum((names[key] for key in keys), [])


def doubts(episodes, definition):
    """-> [] or [a sentence]: why a recorded `action` that looks like a motion may not be the motion to come"""
    e = episodes[0]
    if definition.source != "action" or definition.still(e).any():
        return []
    pose = e.ee_pose if np.shape(e.ee_pose) == e.action.shape else np.zeros_like(e.action)
    past = np.diff(pose[:, :3], axis=0)  # positions tell; rotations may wrap in between
    if past.any() and np.allclose(e.action[1:, :3], past, atol=1e-3 * np.abs(past).max()):
        why = "the motion already made (pose[t] - pose[t-1]): yesterday's action"
    elif np.shape(e.qpos) != e.action.shape:
        why = "taken for a motion: without qpos of its shape, a joint target looks the same"
    else:
        return []
    return [f"the recorded 'action' is {why}; dataset.use_ee_pose_delta_as_action: true takes the motion that follows"]


class Chunks(Dataset):
    """A dataset with a sample for every frame that has a target; a script's subclass adds __getitem__."""

    def __init__(self, episodes, definition, horizon):
        self.episodes, self.definition, self.horizon = episodes, definition, horizon
        self.targets = [definition.targets(e) for e in episodes]
        self.ends = np.cumsum([len(t) for t in self.targets])
        one = f"{', '.join(e.path for e in episodes[:3])}: one frame each, which no motion follows. Move them away"
        require(len(self) or not episodes, one, BadEpisode)

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
        """-> ((H, A) in data units, is_pad (H,)); steps past the end hold still: a delta is zero, a target repeats."""
        e, t = self.locate(i)
        rows = t + np.arange(self.horizon)
        is_pad, last = rows >= len(self.targets[e]), len(self.targets[e]) - 1
        chunk = self.targets[e][np.minimum(rows, last)]
        if self.definition.source == "ee_pose_delta":
            chunk[is_pad] = 0
        return chunk, is_pad


# ---- statistics and split --------------------------------------------------------------------------------------------
def robot_state(episode, keys):
    """(N, S) float32: the arrays `keys` (of "qpos", "ee_pose") side by side; of ["no_state"] a zero."""
    arrays = vars(episode) | dict(no_state=np.zeros((episode.num_frames, 1), np.float32))
    return np.concatenate([arrays[k] for k in keys], axis=1)


def insertion_stats(train, definition, held_out, state_keys=()):
    """Statistics of the episodes `train` in common/stats.py's file format; `held_out`: names of validation episodes."""
    arrays = {"action": Chunks(train, definition, 1).targets}
    if state_keys:
        arrays["observation.state"] = [robot_state(e, state_keys) for e in train]
    about = dict(format_version=FORMAT_VERSION, num_episodes=len(train))
    about |= dict(num_frames=int(sum(e.num_frames for e in train)), action_definition=asdict(definition))
    return about | dict(episodes=[e.name for e in train], excluded_episodes=list(held_out)) | compute_stats(arrays)


def check_state_stats(stats, train, state_keys, hint):
    """Refuse a file's statistics of another state: their range must hold every value of an episode that is in them."""
    episode = next(e for e in train if e.name in stats["episodes"])
    span = {name: stats["observation.state"][name] for name in ("min", "max")}
    state, unit = robot_state(episode, state_keys), Normalizer(span, "min_max", clip=False)
    inside = state.shape[1] == unit.dim and np.abs(unit.normalize(state)).max() < 1.1  # a file may be rounded
    require(inside, f"the statistics' state, {unit.dim} dims, is not {'+'.join(state_keys)} of {episode.path}. {hint}")


def hold_out(n, count, seed=None):
    """Hold `count` of `n` episodes out for validation: the last by name, mostly the newest, as names begin with a time;
    with `seed` drawn at random, as guide 2 does. -> (training, validation), sorted indices"""
    key = "num_val_episodes" if seed is None else "validation.num_episodes"
    require(0 <= count < n, f"{key} is {count}: expected 0 to {n - 1}, of {n} usable episodes")
    held = range(n - count, n) if seed is None else sorted(random.Random(seed).sample(range(n), count))
    return [i for i in range(n) if i not in held], list(held)


def split_or_keep(marks, split, table=None):
    """Split the usable episodes {name: mark}, a mark changing with the file's content, by split(). `table`: that of the
    resumed checkpoint, if bad files may be left out: where files are missing and nothing else has changed, its split is
    kept. -> (training, validation) indices, table {name: [mark, part]}, messages about the missing files"""
    gone = [name for name in table or () if name not in marks]
    if not (gone and all(name in table and table[name][0] == mark for name, mark in marks.items())):
        held, gone = set(split()[1]), []
        table = {name: [mark, "validation" if i in held else "train"] for i, (name, mark) in enumerate(marks.items())}
    train = [i for i, name in enumerate(marks) if table[name][1] == "train"]
    require(train, f"no training episode is left of {', '.join([*table][:5])}")
    validation = [i for i, name in enumerate(marks) if table[name][1] == "validation"]
    return train, validation, table, [f"{name}: left out since the checkpoint was written" for name in gone]


def trained_in(table):
    """[[name, mark]] of the training episodes in a table of split_or_keep, for a fingerprint of the data."""
    return [[name, mark] for name, (mark, part) in table.items() if part == "train"]
