"""The HDF5 adapter: every recorder's variant gives one sample, every defect its name, actions are right to the end."""

import io
import multiprocessing
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import make_demo
import train_nora
from common import UserError
from common import episodes as ep
from common.episodes import ActionDefinition, BadEpisode, ImageReader, action_chunk, read_episode
from common.stats import Normalizer

N, SIZE = 32, (60, 80)  # frames enough for the motion to change its speed


def write(folder, **changes):
    """One episode of the same scene whatever the variant -> its path."""
    return make_demo.write_insertion(folder, **(dict(episodes=1, max_frames=N, size=SIZE) | changes))[0]


@pytest.fixture
def episode_path(insertion_root, tmp_path):
    """A private copy of a JPEG episode (14 frames) to damage."""
    return Path(shutil.copy(ep.find_episodes(insertion_root)[0], tmp_path / "episode.h5"))


def replace(path, key, data, **kwargs):
    with h5py.File(path, "r+") as f:
        del f[key]
        if data is not None:
            f.create_dataset(key, data=data, **kwargs)


# ---- variants --------------------------------------------------------------------------------------------------------

SAMPLE_KEYS = {"images", "action", "is_pad", "state", "instruction", "episode", "frame"}


def samples(folder, **dataset):
    """Every sample of a folder as train_nora sees it, with the normaliser of the folder's own statistics."""
    dataset |= dict(horizon=3, cameras=["camera1", "camera3"], resize_resolution=[28, 28], state_in_prompt=True)
    dataset = train_nora.DatasetConfig(root_dir=str(folder), use_qpos=True, **dataset)
    cfg = train_nora.Config(dataset=dataset)
    data = train_nora.load_data(cfg)
    items = train_nora.NoraDataset(data.train, data.spec)
    return [items[i, i] for i in range(len(items))], data


@pytest.fixture(scope="module")
def raw_samples(tmp_path_factory):
    return samples(write(tmp_path_factory.mktemp("raw"), layout="raw").parent, use_ee_pose_delta_as_action=True)


VARIANTS = [
    dict(layout="gzip"),
    dict(layout="jpeg"),
    dict(layout="gzip", position_unit="m", rotation_unit="deg"),
    dict(layout="jpeg", timestamp=False, phase=False, instruction=False),
    dict(layout="raw", action="joints"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_variant_gives_the_same_sample(tmp_path, raw_samples, variant):
    """The pose deltas agree in their own unit, and what the model is trained on (normalised) without any unit."""
    # the demo never turns by more than 2 pi degrees' worth
    dataset = {} if variant.get("rotation_unit") != "deg" else dict(rotation_unit="deg")
    got, data = samples(write(tmp_path, **variant).parent, use_ee_pose_delta_as_action=True, **dataset)
    expected, expected_data = raw_samples
    to_mm = 1000 if variant.get("position_unit") == "m" else 1
    to_rad = np.pi / 180 if variant.get("rotation_unit") == "deg" else 1
    ours, theirs = data.spec.normalizer, expected_data.spec.normalizer
    assert data.spec.contract.actions[0][1] == ("m" if to_mm == 1000 else "mm")
    moves = ~theirs.constant
    assert moves.sum() == 5, "the demo's needle never yaws"
    assert len(got) == len(expected) == N - 1
    for a, b in zip(got, expected, strict=True):
        assert set(a) == SAMPLE_KEYS and a["images"].shape == (2, 28, 28, 3) and a["images"].dtype == np.uint8
        assert a["action"].shape == (3, 6) and a["action"].dtype == np.float32 and a["state"].shape == (12,)
        np.testing.assert_allclose(a["action"] * ([to_mm] * 3 + [to_rad] * 3), b["action"], atol=2e-5)
        pair = ours.normalize(a["action"])[:, moves], theirs.normalize(b["action"])[:, moves]
        np.testing.assert_allclose(*pair, atol=2e-3)
        np.testing.assert_allclose(a["state"][6:], b["state"][6:], atol=1e-4)
        np.testing.assert_array_equal(a["is_pad"], b["is_pad"])
        assert a["frame"] == b["frame"] and a["instruction"] == b["instruction"] == make_demo.INSTRUCTION
        difference = np.abs(a["images"].astype(int) - b["images"])
        assert difference.mean() < 3 if variant["layout"] == "jpeg" else difference.max() == 0


def test_a_jpeg_is_read_as_pillow_reads_it(tmp_path):
    jpeg, raw = (read_episode(write(tmp_path / layout, layout=layout)) for layout in ("jpeg", "raw"))
    names = ["side_camera", "tool_camera", "top_camera"]  # camera1..K: in alphabetical order
    for e, kind in ((jpeg, "jpeg"), (raw, "raw")):
        assert list(e.cameras.items()) == [(name, kind) for name in names]
    for camera in names:
        truth = ImageReader().read(raw, camera, 5)
        assert truth.shape == (*SIZE, 3) and truth.dtype == np.uint8
        decoded = np.asarray(Image.open(io.BytesIO(make_demo.jpeg(truth))).convert("RGB"))
        np.testing.assert_array_equal(ImageReader().read(jpeg, camera, 5), decoded)


INSTRUCTIONS = {
    "scalar str": dict(data="바늘 삽입"),
    "scalar bytes": dict(data="바늘 삽입".encode()),
    "(1,) str": dict(data=["바늘 삽입"], dtype=h5py.string_dtype()),
    "(1,) bytes": dict(data=np.array(["바늘 삽입".encode()])),
    "S256": dict(data=np.array("바늘 삽입".encode(), "S256")),
    "(1,) S256": dict(data=np.array(["바늘 삽입".encode()], "S256")),
    "fixed utf-8": dict(data="바늘 삽입".encode(), dtype=h5py.string_dtype("utf-8", 64)),
    "ascii vlen": dict(data="바늘 삽입".encode(), dtype=h5py.string_dtype("ascii")),
    "cp949": dict(data=np.array("바늘".encode("cp949"), "S16")),
}


@pytest.mark.parametrize("form", INSTRUCTIONS)
def test_the_instruction_is_text_however_it_is_stored(episode_path, form):
    replace(episode_path, "language_instruction", None)
    with h5py.File(episode_path, "r+") as f:
        f.create_dataset("language_instruction", **INSTRUCTIONS[form])
    if form == "cp949":  # of a Korean recorder on Windows
        return refuses(episode_path, "language_instruction")
    assert read_episode(episode_path).instruction == "바늘 삽입"


# ---- finding files ---------------------------------------------------------------------------------------------------


def test_files_are_found_at_any_depth_in_linked_folders_and_once(tmp_path, insertion_root):
    """Recordings on a NAS are usually linked into one data folder; a loop ends, no recording counts twice."""
    root, real = tmp_path / "root", tmp_path / "real"
    names = ["b.h5", "a/z.h5", "a/b/c.hdf5", "a.h5", "note.txt", "x.h5.tmp"]
    for path in [*(root / name for name in names), real / "in.h5"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "monday").symlink_to(real, target_is_directory=True)
    (real / "loop").symlink_to(root, target_is_directory=True)
    (root / "again").symlink_to(root / "monday", target_is_directory=True)
    found = ep.find_episodes(root)
    own = [path for path in found if not path.endswith("in.h5")]
    assert found == sorted(found) and own == sorted(str(root / name) for name in names[:4]) and len(found) == 5


@pytest.mark.parametrize("case", ["empty", "missing", "unset", "file"])
def test_nothing_to_read_says_so(tmp_path, case):
    root = {"empty": tmp_path, "missing": tmp_path / "nowhere", "unset": "", "file": tmp_path / "f"}[case]
    (tmp_path / "f").touch()
    with pytest.raises(FileNotFoundError, match="No HDF5 files found.*dataset.root_dir"):
        ep.load_episodes(root)


# ---- damaged files ---------------------------------------------------------------------------------------------------


def refuses(path, *words):
    """read_episode raises BadEpisode with the path and every word."""
    with pytest.raises(BadEpisode) as error:
        read_episode(path)
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_file(episode_path, share):
    os.truncate(episode_path, int(os.path.getsize(episode_path) * share))
    refuses(episode_path, "not a readable HDF5 file", "truncated", "--skip_bad_episodes")
    (episode_path.parent / "folder.h5").mkdir()
    with h5py.File(episode_path.parent / "group.h5", "w") as f:
        f.create_group("action"), f.create_group("observations/images/top_camera")
    for name in ("folder.h5", "group.h5"):
        refuses(episode_path.parent / name, "not a readable HDF5 file")


@pytest.mark.parametrize("key", ["action", "observations/ee_pose", "observations/qpos"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_value_that_is_not_finite_names_its_frame(episode_path, key, value):
    with h5py.File(episode_path, "r+") as f:
        array = f[key][:]
        array[3, 2] = array[9, 0] = value
        f[key][:] = array
    refuses(episode_path, f"dataset '{key}' frame 3", "not finite", "2 such frames")


def test_optional_keys_may_be_missing(episode_path):
    for key in ("observations/ee_pose", "observations/qpos", "phase", "timestamp", "language_instruction"):
        replace(episode_path, key, None)
    e = read_episode(episode_path)
    assert (e.ee_pose, e.qpos, e.phase, e.instruction) == (None, None, None, None) and e.num_frames == 14


POSE, TOP = "observations/ee_pose", "observations/images/top_camera"
SHAPES = [
    ("action", None, "no dataset 'action'"),
    ("observations/images", None, "observations/images/<camera>"),
    ("action", np.zeros((0, 6), np.float32), "'action' or one with 0 rows"),
    ("action", np.zeros((13, 6), np.float32), "has 14 frames, 'action' has 13 rows"),
    ("action", np.zeros(14, np.float32), "'action' has shape (14,)"),
    (POSE, np.zeros((13, 6), np.float32), f"'{POSE}' has shape (13, 6), expected (14"),
    (TOP, np.zeros((14, 6, 8), np.uint8), f"'{TOP}' is uint8 (14, 6, 8); expected"),
    (TOP, np.zeros((14, 6, 8, 3), np.float32), f"'{TOP}' is float32"),
    (TOP, np.zeros((12, 6, 8, 3), np.uint8), f"'{TOP}' has 12 frames"),
    ("phase", np.ones((14, 2), np.int32), "'phase'"),
]


@pytest.mark.parametrize("key,data,words", SHAPES)
def test_shapes_that_do_not_fit(episode_path, key, data, words):
    replace(episode_path, key, data)
    refuses(episode_path, words)


@pytest.mark.parametrize("damage", ["zero byte", "empty", "truncated", "noise"])
def test_a_bad_jpeg_names_file_camera_and_frame(episode_path, damage):
    """A recorder's failed encode is found when the file is read, other damage when the picture is."""
    with h5py.File(episode_path, "r+") as f:
        whole = f["observations/images/tool_camera"][4]
        noise = np.random.default_rng(0).integers(0, 256, 500, np.uint8)
        bad = {"zero byte": whole[:1] * 0, "empty": whole[:0], "truncated": whole[: len(whole) // 2], "noise": noise}
        f["observations/images/tool_camera"][4] = bad[damage]
    if damage in ("zero byte", "empty"):
        refuses(episode_path, f"'observations/images/tool_camera' frame 4 is no picture: {len(bad[damage])} bytes")
        return
    e, reader = read_episode(episode_path), ImageReader()
    with pytest.raises(BadEpisode, match=f"{episode_path}.*tool_camera' frame 4 is not a decodable JPEG: .* bytes"):
        reader.read(e, "tool_camera", 4)
    assert reader.read(e, "tool_camera", 3).shape == (*SIZE, 3), "the frame beside it is fine"
    os.remove(episode_path)
    with pytest.raises(BadEpisode, match="side_camera' frame 2 cannot be read"):
        ImageReader().read(e, "side_camera", 2)


# ---- a folder of episodes --------------------------------------------------------------------------------------------


def copies(root, folder, count=4):
    for path in ep.find_episodes(root)[:count]:
        shutil.copy(path, folder)
    return [str(p) for p in sorted(folder.glob("*.h5"))]


def test_skip_bad_counts_and_lists(tmp_path, insertion_root):
    paths = copies(insertion_root, tmp_path)
    os.truncate(paths[1], 1000)
    replace(paths[2], "action", None)
    with pytest.raises(BadEpisode, match=f"{paths[1]}.*--skip_bad_episodes"):
        ep.load_episodes(tmp_path)
    episodes, excluded = ep.load_episodes(tmp_path, skip_bad=True)
    assert [e.path for e in episodes] == [paths[0], paths[3]]
    assert [e.name for e in episodes] == [os.path.basename(p) for p in (paths[0], paths[3])]
    assert paths[1] in excluded[0] and paths[2] in excluded[1] and "no dataset 'action'" in excluded[1]
    with pytest.raises(UserError, match="no episode 'x.h5'.*--episodes"):
        os.remove(paths[1]), os.remove(paths[2]), ep.open_episodes(tmp_path, ["x.h5"])
    assert [e.path for e in ep.open_episodes(tmp_path, [episodes[1].name])] == [paths[3]]
    os.truncate(paths[0], 10), os.truncate(paths[3], 10)
    with pytest.raises(BadEpisode, match="none of the 2 files.*is usable"):
        ep.load_episodes(tmp_path, skip_bad=True)


@pytest.mark.parametrize("what", ["cameras", "action dims", "ee_pose dims", "qpos dims"])
def test_disagreeing_episodes_name_both_files(tmp_path, insertion_root, what):
    paths, seven = copies(insertion_root, tmp_path), np.zeros((14, 7), np.float32)
    keys = {"cameras": (TOP, None), "ee_pose dims": (POSE, None), "action dims": ("action", seven)}
    replace(paths[2], *keys.get(what, ("observations/qpos", seven)))
    with pytest.raises(BadEpisode, match=f"{paths[2]}: {what} .* do not match .*{paths[0]}"):
        ep.load_episodes(tmp_path)
    assert len(ep.load_episodes(tmp_path, skip_bad=True)[0]) == 3


def test_units_are_seen_in_the_values(tmp_path):
    mm, m = (read_episode(write(tmp_path / unit, position_unit=unit)) for unit in ("mm", "m"))
    deg = read_episode(write(tmp_path / "deg", rotation_unit="deg"))
    assert (ep.detect_position_unit([mm]), ep.detect_position_unit([m])) == ("mm", "m")
    with pytest.raises(BadEpisode, match=f"millimetres in {mm.path} but like metres in {m.path}"):
        ep.detect_position_unit([mm, m])
    deg.ee_pose[:, 3:] += 170
    assert ep.detect_rotation_unit([mm]) == "rad" and ep.detect_rotation_unit([mm, deg]) == "deg"
    mm.ee_pose[:, 5] = 2 * np.pi
    assert ep.detect_rotation_unit([mm]) == "rad", "a full turn is still radians"
    mm.ee_pose = None
    assert ep.detect_position_unit([mm]) is None and ep.detect_rotation_unit([mm]) == "rad"
    with pytest.raises(BadEpisode, match="use_ee_pose_delta_as_action needs 'observations/ee_pose'"):
        ep.define_action([mm], use_ee_pose_delta=True)


def test_hold_out_takes_the_newest_and_lists_them(tmp_path, insertion_root):
    episodes, _ = ep.load_episodes(insertion_root)
    assert ep.hold_out_last(episodes, 1) == (episodes[:3], episodes[3:])
    assert ep.hold_out_last(episodes, 0) == (episodes, [])
    for count in (4, 5, -1):
        with pytest.raises(UserError, match=f"num_val_episodes is {count}, but there are 4"):
            ep.hold_out_last(episodes, count)
    train, validation = ep.hold_out_random(episodes, 2, seed=1)
    assert len(validation) == 2 and sorted(train + validation) == [0, 1, 2, 3]
    assert ep.hold_out_random(episodes, 2, seed=1) == (train, validation)
    ep.write_validation_list(tmp_path / "validation_episodes.txt", episodes, [3])
    text = (tmp_path / "validation_episodes.txt").read_text()
    assert "Total episodes: 4\nValidation episodes: 1\nValidation episode indices: [3]" in text
    assert text.endswith(f"  [3] {episodes[3].path}\n")


# ---- files and processes ---------------------------------------------------------------------------------------------


def open_h5(folder):
    """How many .h5 files below `folder` this process holds open."""
    links = [os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(t.startswith(str(folder)) and t.endswith(".h5") for t in targets)


def test_open_files_are_bounded(tmp_path, episode_path):
    for i in range(20):
        shutil.copy(episode_path, tmp_path / f"many{i:02d}.h5")
    episodes, _ = ep.load_episodes(tmp_path)
    assert len(episodes) == 21 and open_h5(tmp_path) == 0, "reading the low-dimensional arrays leaves nothing open"
    reader, most = ImageReader(max_open=5), 0
    for e in episodes + episodes[::3] + episodes[:2] * 3:
        assert reader.read(e, "top_camera", 1).shape == (*SIZE, 3)
        most = max(most, open_h5(tmp_path))
    assert most == 5 and list(reader._files)[-2:] == [e.path for e in episodes[:2]], "the last ones used stay open"


def _read_in_child(reader, e, queue):
    queue.put((reader.read(e, "tool_camera", 7), reader._pid == os.getpid()))


def test_a_reader_used_before_fork_or_pickle_opens_its_own_files(insertion_root):
    e, reader = ep.load_episodes(insertion_root)[0][0], ImageReader()
    expected = reader.read(e, "tool_camera", 7)
    handle, context = reader._files[e.path][0], multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_read_in_child, args=(reader, e, queue))
    child.start()
    image, own = queue.get(timeout=60)
    child.join()
    copy = pickle.loads(pickle.dumps(reader))
    assert len(copy._files) == 0 and copy.max_open == reader.max_open
    for got in (image, reader.read(e, "tool_camera", 7), copy.read(e, "tool_camera", 7)):
        np.testing.assert_array_equal(got, expected)
    assert own and child.exitcode == 0
    assert reader._files[e.path][0] is handle and handle.id.valid, "the parent's handle lives on"


def test_as_many_files_stay_open_as_the_machine_bears(monkeypatch):
    """Half of `ulimit -n`, and an eighth of the free memory for all loader workers of all ranks together."""
    real = ep.resource.getrlimit(ep.resource.RLIMIT_NOFILE)[0]
    monkeypatch.setattr(ep.resource, "getrlimit", lambda _: (10**9, 10**9))
    alone = ep.files_to_keep()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ep, "get_worker_info", lambda: SimpleNamespace(num_workers=2))
    assert ep.files_to_keep() == pytest.approx(alone / 4, rel=0.2) and alone * ep.FILE_BYTES < 2**45
    monkeypatch.setattr(ep.resource, "getrlimit", lambda _: (60, 60))
    assert ep.files_to_keep() == 30 and real > 0


# ---- the index of a large folder -------------------------------------------------------------------------------------


@pytest.fixture
def indexed(tmp_path, insertion_root, monkeypatch):
    """(folder of four episodes that is large enough for an index, where the index is, [files that were opened])."""
    opened, read = [], ep.read_episode
    monkeypatch.setattr(ep, "INDEXED", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ep, "read_episode", lambda path, root: opened.append(Path(path).name) or read(path, root))
    (tmp_path / "data").mkdir()
    copies(insertion_root, tmp_path / "data")
    return tmp_path / "data", lambda: next((tmp_path / "cache/vla_episodes").glob("*.npz")), opened


def assert_same(ours, theirs):
    assert [e.name for e in ours] == [e.name for e in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for key, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, key), err_msg=key)


def test_the_second_start_opens_only_what_changed(indexed, capsys):
    folder, index, opened = indexed
    first, _ = ep.load_episodes(folder)
    assert len(opened) == 4 and f"reading   4 episodes under {folder}; 0 are in" in capsys.readouterr().out
    opened.clear()
    again, _ = ep.load_episodes(folder)
    assert opened == [] and "4 are in" in capsys.readouterr().out
    assert_same(again, first)
    changed, bad = Path(first[1].path), Path(first[2].path)
    with h5py.File(changed, "r+") as f:
        f["action"][3] += 1
        del f["phase"]
    os.utime(changed, ns=(1, 1))
    os.truncate(bad, 1000)
    shutil.copy(first[0].path, folder / "z.h5")
    found, excluded = ep.load_episodes(folder, skip_bad=True)
    assert sorted(opened) == sorted([changed.name, bad.name, "z.h5"]) and len(found) == 4 and str(bad) in excluded[0]
    assert found[1].phase is None and found[1].action[3, 0] == first[1].action[3, 0] + 1
    opened.clear()
    assert_same(ep.load_episodes(folder, skip_bad=True)[0], found)
    assert opened == [bad.name], "what is bad is looked at again"


@pytest.mark.parametrize("damage", ["truncated", "one byte", "text", "another shape"])
def test_a_damaged_index_is_made_again(indexed, damage):
    folder, index, opened = indexed
    first, _ = ep.load_episodes(folder)
    content = bytearray(index().read_bytes())
    content[len(content) // 2] ^= 1
    kinds = {"truncated": content[:500], "one byte": content, "text": b"no index"}
    if damage == "another shape":
        with np.load(index()) as file:
            np.savez(index(), **{key: file[key] for key in file.files} | dict(action=np.zeros((3, 6), np.float32)))
    else:
        index().write_bytes(kinds[damage])
    opened.clear()
    assert_same(ep.load_episodes(folder)[0], first)
    assert len(opened) == 4
    opened.clear()
    ep.load_episodes(folder)
    assert opened == []


def test_rank_0_reads_and_the_others_take_its_index(indexed):
    """And a cache folder that cannot be written costs no start."""
    folder, index, opened = indexed
    first, other = SimpleNamespace(once=lambda f: f()), SimpleNamespace(once=lambda f: None)
    found, _ = ep.load_episodes(folder, run=first)
    assert len(opened) == 4
    assert_same(ep.load_episodes(folder, run=other)[0], found)
    assert len(opened) == 4
    shutil.rmtree(index().parent)
    (folder.parent / "cache/vla_episodes").touch()
    assert_same(ep.load_episodes(folder)[0], found)
    assert len(opened) == 8


# ---- pictures decoded once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["jpeg", "raw", "gzip"])
def test_a_frame_store_holds_the_pixels_that_the_reader_gives(tmp_path, layout, monkeypatch):
    write(tmp_path / "data", layout=layout, episodes=2, max_frames=9)
    episodes, _ = ep.load_episodes(tmp_path / "data")
    resize, names = partial(train_nora.resize_image, size=(28, 56)), ["top_camera", "side_camera"]
    plain, stored = ImageReader(resize), ImageReader(resize)
    stored.keep(tmp_path / "frames", episodes, names, ["bicubic", 28, 56])
    monkeypatch.setattr(ImageReader, "_value", lambda *a: pytest.fail("the recordings are not needed any more"))
    got = {(e.name, c, t): stored.read(e, c, t) for e in episodes for c in names for t in range(9)}
    again = ImageReader(resize)
    again.read = lambda *a: np.zeros((28, 56, 3))  # of the shape
    again.keep(tmp_path / "frames", episodes, names, ["bicubic", 28, 56])
    monkeypatch.undo()
    for e in episodes:
        for c in names:
            for t in range(9):
                np.testing.assert_array_equal(got[e.name, c, t], plain.read(e, c, t))
                np.testing.assert_array_equal(pickle.loads(pickle.dumps(stored)).read(e, c, t), got[e.name, c, t])


def test_a_picture_that_cannot_be_stored_ends_the_start_with_its_name(tmp_path):
    path = write(tmp_path / "data", max_frames=9)
    episodes, _ = ep.load_episodes(tmp_path / "data")
    with h5py.File(path, "r+") as f:
        whole = f["observations/images/tool_camera"][4]
        f["observations/images/tool_camera"][4] = whole[: len(whole) // 2]
    for _ in range(2):  # also where the store is there already
        with pytest.raises(BadEpisode, match=f"{path}.*tool_camera' frame 4 is not a decodable JPEG"):
            ImageReader().keep(tmp_path / "frames", episodes, ["tool_camera"])
    sizes = [np.zeros((n, 6, 3), np.uint8) for n in (4, 4, 5)]
    store = ep.FrameStore(tmp_path / "sizes", (4, 6, 3), "")
    with pytest.raises(UserError, match="has a picture of .5, 6, 3., a frame store holds one size"):
        store.build({path: 3}, lambda path: sizes.__getitem__, quiet=True)


# ---- actions ---------------------------------------------------------------------------------------------------------


def pose_episode(pose, action=None, qpos=None):
    pose = np.asarray(pose, np.float32)
    action = pose if action is None else np.asarray(action, np.float32)
    return ep.Episode("p.h5", "p.h5", len(pose), {"top": "raw"}, action, pose, qpos, None, None, None)


@pytest.mark.parametrize("unit,turn", [("rad", 2 * np.pi), ("deg", 360.0)])
def test_a_delta_takes_the_short_way_round(unit, turn):
    """Worked by hand: from +179 to -179 degrees is +2, not -358; positions 0:3 are never wrapped."""
    one = turn / 360
    pose = np.zeros((5, 6))
    pose[:, 3] = np.array([179, -179, 179, 0, 175]) * one
    pose[:, 5] = np.array([-170, 170, -10, 10, 359]) * one
    pose[:, 0] = [0, 300, -300, 0, 1000]
    delta = ActionDefinition("ee_pose_delta", 6, unit).targets(pose_episode(pose))
    assert delta.shape == (4, 6) and delta.dtype == np.float32
    np.testing.assert_allclose(delta[:, 3] / one, [2, -2, -179, 175], atol=2e-4)
    np.testing.assert_allclose(delta[[0, 2, 3], 5] / one, [-20, 20, -11], atol=2e-4)
    assert abs(delta[1, 5] / one) == pytest.approx(180, abs=2e-4), "exactly half a turn: both ways are short"
    np.testing.assert_array_equal(delta[:, 0], [300, -600, 300, 1000])


@given(st.sampled_from([("rad", 2 * np.pi), ("deg", 360.0)]), st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_deltas_telescope_to_end_minus_start(kind, n, seed):
    (unit, turn), rng = kind, np.random.default_rng(seed)
    rotation = rng.uniform(-turn / 2, turn / 2, (n, 3))
    pose = np.concatenate([rng.uniform(-500, 500, (n, 3)), rotation], axis=1).astype(np.float32)
    delta = ActionDefinition("ee_pose_delta", 6, unit).targets(pose_episode(pose)).astype(np.float64)
    assert delta.shape == (n - 1, 6) and (np.abs(delta[:, 3:]) <= turn / 2 * (1 + 1e-6)).all()
    gap = delta.sum(0) - (pose[-1].astype(np.float64) - pose[0])
    assert np.abs(gap[:3]).max() < 1e-4 * n
    assert np.abs(gap[3:] - turn * np.round(gap[3:] / turn)).max() < 1e-6 * turn * n


def test_standing_still_is_what_the_recorded_action_means(tmp_path):
    """Joint targets stay where the joints are, pose targets where the pose is; recorded deltas become zero."""
    pose = np.cumsum(np.full((5, 6), 0.1), axis=0).astype(np.float32) + 3
    definition = ActionDefinition("action", 6)
    near = pose_episode(pose, action=pose + 0.01, qpos=pose * 7)
    np.testing.assert_array_equal(definition.still(near), near.ee_pose)
    near.qpos = near.action + np.float32(0.02)
    np.testing.assert_array_equal(definition.still(near), near.qpos)
    assert not definition.still(pose_episode(pose, action=np.full((5, 6), 0.1), qpos=pose)).any()
    assert not ActionDefinition("ee_pose_delta", 6).still(near).any()


def test_action_chunk_by_hand():
    targets = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    whole, padded, held = [[1, 10], [2, 20]], [[3, 30], [0, 0]], [[3, 30], [3, 30]]
    cases = (0, "zero", whole, [0, 0]), (2, "zero", padded, [0, 1]), (2, "repeat", held, [0, 1])
    for frame, hold, rows, pad in cases:
        chunk, is_pad = action_chunk(targets, frame, 2, hold)
        assert chunk.dtype == np.float32 and chunk.tolist() == rows and is_pad.tolist() == [bool(p) for p in pad]


def test_recorded_past_motion_is_recognised(tmp_path):
    past, joints = (read_episode(write(tmp_path / a, action=a)) for a in ("past_delta", "joints"))
    wrapped = pose_episode(past.ee_pose.copy(), action=past.action)
    wrapped.ee_pose[5:, 3] -= 2 * np.pi  # a roll that passes half a turn hides nothing
    following = np.concatenate([np.diff(past.ee_pose, axis=0), np.zeros((1, 6))])
    causal, still = pose_episode(past.ee_pose, action=following), pose_episode(np.ones((5, 6)), np.zeros((5, 6)))
    verdicts = [ep.records_past_motion([e]) for e in (past, wrapped, joints, causal, still)]
    assert verdicts == [True, True, False, False, False]
    past.ee_pose = None
    assert not ep.records_past_motion([past])


def test_a_flicker_of_the_last_bit_is_no_motion():
    """Forward kinematics of a fixed orientation flickers by one float32 step; stretched to [-1, 1] it would count."""
    pose = np.zeros((200, 6), np.float32)
    pose[:, :3] = np.cumsum(np.random.default_rng(0).normal(size=(200, 3)), axis=0)
    pose[:, 3] = np.float32(np.pi / 2)
    pose[::3, 3] = np.nextafter(np.float32(np.pi / 2), np.float32(4))
    definition = ActionDefinition("ee_pose_delta", 6, "rad")
    normalizer = Normalizer(ep.insertion_stats([pose_episode(pose)], definition, [])["action"])
    normalised = normalizer.normalize(definition.targets(pose_episode(pose)))
    assert np.abs(normalised[:, :3]).max() == 1 and np.abs(normalised[:, 3]).max() == 0


# ---- statistics of a data set ----------------------------------------------------------------------------------------


def test_statistics_see_training_episodes_only(tmp_path, insertion_root):
    episodes, _ = ep.load_episodes(insertion_root)
    train, validation = ep.hold_out_last(episodes, 1)
    definition = ep.define_action(episodes, True)
    before = ep.insertion_stats(train, definition, [e.name for e in validation], ("qpos", "ee_pose"))
    validation[0].ee_pose += 1000
    assert ep.insertion_stats(train, definition, [e.name for e in validation], ("qpos", "ee_pose")) == before
    assert (before["num_episodes"], before["num_frames"], before["excluded_episodes"]) == (3, 42, [validation[0].name])
    assert (before["action"]["count"], before["observation.state"]["count"]) == (39, 42)
    assert before["action_definition"] == dict(source="ee_pose_delta", dim=6, rotation_unit="rad")
    rows = np.concatenate([np.diff(e.ee_pose, axis=0) for e in train])
    np.testing.assert_allclose(before["action"]["max"], rows.max(0), atol=1e-5)
    states = np.concatenate([np.concatenate([e.qpos, e.ee_pose], 1) for e in train])
    np.testing.assert_allclose(before["observation.state"]["mean"], states.mean(0), rtol=1e-4, atol=1e-6)


# ---- recordings of the real collector --------------------------------------------------------------------------------


def test_recordings_of_the_simulator(shared):
    episodes, excluded = ep.load_episodes(shared / "data" / "insertion_sim")
    assert len(episodes) == 6 and excluded == []
    assert ep.detect_position_unit(episodes) == "m" and ep.detect_rotation_unit(episodes) == "rad"
    for e in episodes:
        assert list(e.cameras) == ["side_camera", "tool_camera", "top_camera"] and set(e.cameras.values()) == {"jpeg"}
        assert e.action.shape == e.ee_pose.shape == e.qpos.shape == (e.num_frames, 6)
        assert set(np.unique(e.phase)) <= {1, 2, 3} and e.instruction is None
        assert ImageReader().read(e, "top_camera", e.num_frames - 1).shape == (240, 320, 3)
    assert not ep.records_past_motion(episodes), "this collector stores joint targets"
