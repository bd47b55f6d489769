"""The HDF5 adapter: every recorder's variant gives one sample, every defect its name, actions are right to the end."""

import copy
import io
import multiprocessing
import os
import pickle
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

import make_demo
import train_nora
from common import UserError
from common import episodes as ep
from common.episodes import ActionDefinition, BadEpisode, ImageReader, read_episode
from common.stats import Normalizer

N, SIZE = 32, (60, 80)  # frames enough for the motion to change its speed


def write(folder, **changes):
    """One episode of the same scene whatever the variant -> its path."""
    return make_demo.write_insertion(folder, **(dict(episodes=1, max_frames=N, size=SIZE) | changes))[0]


@pytest.fixture
def episode_path(insertion_root, tmp_path):
    """A private copy of a JPEG episode (14 frames) to damage."""
    return Path(shutil.copy([*ep.find_episodes(insertion_root)][0], tmp_path / "episode.h5"))


def replace(path, key, data, **kwargs):
    with h5py.File(path, "r+") as f:
        del f[key]
        if data is not None:
            f.create_dataset(key, data=data, **kwargs)


# ---- variants --------------------------------------------------------------------------------------------------------

VARIANTS = [
    dict(layout="raw"),
    dict(layout="gzip", position_unit="m", rotation_unit="deg"),
    dict(layout="jpeg", timestamp=False, phase=False, instruction=False),
    dict(layout="raw", action="joints"),
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return read_episode(write(tmp_path_factory.mktemp("plain"), layout="gzip"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_variant_gives_the_same_episode(tmp_path, plain, variant):
    e, kind = read_episode(write(tmp_path, **variant)), "jpeg" if variant["layout"] == "jpeg" else "raw"
    # the demo never turns by more than 2 pi degrees' worth
    definition = ep.define_action([e], True, variant.get("rotation_unit", "auto"))
    unit, degrees = variant.get("position_unit", "mm"), variant.get("rotation_unit") == "deg"
    assert ep.detect_position_unit([e]) == unit and e.num_frames == N
    own = np.array([1000 if unit == "m" else 1] * 3 + [np.pi / 180 if degrees else 1] * 3)
    np.testing.assert_allclose(e.ee_pose * own, plain.ee_pose, atol=2e-4)
    np.testing.assert_allclose(definition.targets(e) * own, np.diff(plain.ee_pose, axis=0), atol=2e-4)
    names = ["side_camera", "tool_camera", "top_camera"]  # camera1..K: in alphabetical order
    assert list(e.cameras.items()) == [(name, kind) for name in names]
    assert (e.instruction, e.phase is None) == ((None, True) if kind == "jpeg" else (make_demo.INSTRUCTION, False))
    for camera in names:
        ours, theirs = (ImageReader().read(x, camera, 5) for x in (e, plain))
        assert ours.shape == (*SIZE, 3) and ours.dtype == np.uint8
        if kind == "jpeg":
            theirs = np.asarray(Image.open(io.BytesIO(make_demo.jpeg(theirs))).convert("RGB"))
        np.testing.assert_array_equal(ours, theirs)


INSTRUCTIONS = {
    "scalar str": dict(data="바늘 삽입"),
    "(1,) str": dict(data=["바늘 삽입"], dtype=h5py.string_dtype()),
    "S256": dict(data=np.array("바늘 삽입".encode(), "S256")),
    "(1,) S256": dict(data=np.array(["바늘 삽입".encode()], "S256")),
    "fixed utf-8": dict(data="바늘 삽입".encode(), dtype=h5py.string_dtype("utf-8", 64)),
    "ascii vlen": dict(data="바늘 삽입".encode(), dtype=h5py.string_dtype("ascii")),
}


@pytest.mark.parametrize("form", INSTRUCTIONS)
def test_the_instruction_is_text_however_it_is_stored(episode_path, form):
    replace(episode_path, "language_instruction", None)
    with h5py.File(episode_path, "r+") as f:
        f.create_dataset("language_instruction", **INSTRUCTIONS[form])
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
    found = [*ep.find_episodes(root)]
    own = [path for path in found if not path.endswith("in.h5")]
    assert found == sorted(found) and own == sorted(str(root / name) for name in names[:4]) and len(found) == 5
    Path(os.fsdecode(bytes(real) + "/바늘.h5".encode("cp949"))).touch()
    with pytest.raises(UserError, match=r"/\\udcb9.*is not UTF-8.*convmv"):
        ep.find_episodes(root)


def test_nothing_to_read_says_so(tmp_path):
    (tmp_path / "file").touch()
    for root in (tmp_path, tmp_path / "nowhere", tmp_path / "file", ""):
        with pytest.raises(FileNotFoundError, match="No HDF5 files found.*dataset.root_dir"):
            ep.load_episodes(root)


# ---- damaged files ---------------------------------------------------------------------------------------------------
def refuses(path, *words):
    """read_episode raises BadEpisode with the path and every word."""
    with pytest.raises(BadEpisode) as error:
        read_episode(path)
    for word in (str(path), *words):
        assert word in str(error.value), str(error.value)


def test_what_is_no_hdf5_episode_is_named(tmp_path, episode_path):
    whole = episode_path.read_bytes()
    for share in (0.0, 0.3, 0.999):
        (tmp_path / f"{share}.h5").write_bytes(whole[: int(len(whole) * share)])
        refuses(tmp_path / f"{share}.h5", "not a readable HDF5 file", "truncated")
    (tmp_path / "folder.h5").mkdir(), os.mkfifo(tmp_path / "pipe.h5")
    with h5py.File(tmp_path / "group.h5", "w") as f:
        f.create_group("action"), f.create_group("observations/images/top_camera")
    refuses(tmp_path / "folder.h5", "not a readable HDF5 file"), refuses(tmp_path / "pipe.h5", "no regular file")
    refuses(tmp_path / "group.h5", "no dataset 'action'")


POSE, TOP = "observations/ee_pose", "observations/images/top_camera"
BROKEN = np.zeros((14, 6), np.float32)
BROKEN[3, 2], BROKEN[9, 0] = np.nan, -np.inf
SHAPES = [
    *((key, BROKEN, f"dataset '{key}' frame 3 is not finite") for key in ("action", POSE, "observations/qpos")),
    ("action", None, "no dataset 'action'"),
    ("observations/images", None, "observations/images/<camera>"),
    ("action", np.zeros((0, 6), np.float32), "'action' or one with 0 rows"),
    ("action", np.zeros((13, 6), np.float32), "has 14 frames, 'action' has 13 rows"),
    ("action", np.zeros(14, np.float32), "'action' is float32 (14,), expected numbers (14, dims)"),
    (POSE, np.zeros((13, 6), np.float32), f"'{POSE}' is float32 (13, 6), expected numbers (14, dims)"),
    (TOP, np.zeros((14, 6, 8), np.uint8), f"'{TOP}' is uint8 (14, 6, 8); expected"),
    (TOP, np.zeros((14, 6, 8, 3), np.float32), f"'{TOP}' is float32"),
    (TOP, np.zeros((12, 6, 8, 3), np.uint8), f"'{TOP}' has 12 frames"),
    ("phase", np.ones((14, 2), np.int32), "'phase'"),
    ("phase", np.full(14, np.nan), "'phase' frame 0 is not finite"),
    ("action", np.zeros((14, 0), np.float32), "'action' is float32 (14, 0), expected numbers"),
    ("action", np.full((14, 6), 1j), "'action' is complex128 (14, 6), expected numbers"),
    (TOP, np.zeros((14, 0, 8, 3), np.uint8), f"'{TOP}' is uint8 (14, 0, 8, 3); expected"),
    (TOP, np.float32(1), f"'{TOP}' has 0 frames"),
    ("observations/images", np.zeros(3), "observations/images/<camera>"),
    ("language_instruction", [1.5], "'language_instruction' is [1.5], expected one UTF-8 text"),
    ("language_instruction", [b"pick", b"place"], "'language_instruction' is [b'pick', b'place'], expected one"),
    ("language_instruction", "바늘".encode("cp949"), "expected one UTF-8 text"),  # of a Korean recorder on Windows
]


@pytest.mark.parametrize("key,data,words", SHAPES)
def test_shapes_that_do_not_fit(episode_path, key, data, words):
    replace(episode_path, key, data)
    refuses(episode_path, words)


@pytest.mark.parametrize("stored", ["one after the other", "in chunks"])
def test_a_failed_encode_is_found_when_the_file_is_read(episode_path, stored):
    with h5py.File(episode_path, "r+") as f:
        pictures = f[TOP][:]
        pictures[7], pictures[9] = pictures[7][:1], pictures[9][:0]
        del f[TOP]
        chunks = dict(chunks=(5,)) if stored == "in chunks" else {}
        f.create_dataset(TOP, (14,), dtype=h5py.vlen_dtype(np.uint8), **chunks)[:] = pictures
    refuses(episode_path, f"'{TOP}' frame 7 is no image: 1 bytes (2 such frames)")


@pytest.mark.parametrize("damage", ["truncated", "noise", "of another size", "of 16 bits"])
def test_a_bad_jpeg_names_file_camera_and_frame(episode_path, damage):
    deep, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(np.full(SIZE, 3000, np.uint16)).save(deep, "PNG")  # Pillow would make it white
    with h5py.File(episode_path, "r+") as f:
        stored = {"truncated": bytes(f[TOP][4])[:900], "noise": noise.tobytes(), "of 16 bits": deep.getvalue()}
        f[TOP][4] = np.frombuffer(stored.get(damage, make_demo.jpeg(noise)), np.uint8)
    e, reader = read_episode(episode_path), ImageReader()
    with pytest.raises(BadEpisode, match=f"{episode_path}.*top_camera' frame 4 is no readable jpeg image .*Re-copy"):
        reader.read(e, "top_camera", 4)
    assert reader.read(e, "top_camera", 3).shape == (*SIZE, 3), "the frame beside it is fine"
    os.remove(episode_path)
    with pytest.raises(BadEpisode, match="side_camera' frame 2 is no readable jpeg"):
        ImageReader().read(e, "side_camera", 2)


# ---- a folder of episodes --------------------------------------------------------------------------------------------
def copies(root, folder, count=4):
    for path in [*ep.find_episodes(root)][:count]:
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
    os.truncate(paths[0], 10), os.truncate(paths[3], 10)
    (tmp_path / "z.h5").symlink_to("/gone.h5")
    with pytest.raises(BadEpisode, match="none of the 5 files.*is usable"):
        ep.load_episodes(tmp_path, skip_bad=True)


@pytest.mark.parametrize("what", ["cameras", "action", "ee_pose", "qpos", "top_camera is 60x60"])
def test_disagreeing_episodes_name_both_files(tmp_path, insertion_root, what):
    paths, seven = copies(insertion_root, tmp_path), np.zeros((14, 7), np.float32)
    changes = dict(
        cameras=(TOP, None), ee_pose=(POSE, None), action=("action", seven), qpos=("observations/qpos", seven)
    )
    replace(paths[1], TOP, np.zeros((14, 30, 40, 3), np.uint8))  # another size of the same aspect is fine
    replace(paths[2], *changes.get(what, (TOP, np.zeros((14, 60, 60, 3), np.uint8))))
    with pytest.raises(BadEpisode, match=f"{paths[2]}: {what}.* (does not match|in) .*{paths[0]}"):
        ep.load_episodes(tmp_path)
    assert len(ep.load_episodes(tmp_path, skip_bad=True)[0]) == 3


def test_units_are_seen_in_the_values(plain):
    mm, m, deg = (copy.deepcopy(plain) for _ in range(3))
    m.path, deg.ee_pose[:, 3:] = "metres.h5", 170
    m.ee_pose[:, :3] /= 1000
    mm.ee_pose[:, 5] = 2 * np.pi  # a full turn is still radians
    with pytest.raises(BadEpisode, match=f"millimetres in {mm.path} but like metres in {m.path}"):
        ep.detect_position_unit([mm, m])
    for episodes, unit in (([mm], "rad"), ([mm, deg], "deg")):
        assert ep.define_action(episodes, True).rotation_unit == unit


def test_timestamps_give_the_rate_or_nothing(episode_path):
    for stamps in (np.full(14, b"10:00"), np.full(14, np.nan), np.ones(14), 3.0):
        replace(episode_path, "timestamp", stamps)
        assert read_episode(episode_path).rate_hz == 0
    replace(episode_path, "timestamp", np.arange(13) / 4)
    assert read_episode(episode_path).rate_hz == 4


def test_what_is_optional_may_be_missing(episode_path):
    for key in ("observations/ee_pose", "observations/qpos", "phase", "timestamp", "language_instruction"):
        replace(episode_path, key, None)
    e = read_episode(episode_path)
    assert (e.ee_pose, e.qpos, e.phase, e.instruction) == (None, None, None, None) and e.num_frames == 14
    assert ep.detect_position_unit([e]) is None and ep.define_action([e], False).rotation_unit == "rad"
    assert "without qpos" in ep.doubts([e], ActionDefinition("action", 6))[0]
    with pytest.raises(BadEpisode, match="use_ee_pose_delta_as_action needs 'observations/ee_pose'"):
        ep.define_action([e], use_ee_pose_delta=True)


def test_hold_out_takes_the_newest_or_draws():
    assert ep.hold_out(4, 1) == ([0, 1, 2], [3]) and ep.hold_out(4, 0) == ([0, 1, 2, 3], [])
    drawn = sorted(random.Random(1).sample(range(9), 4))  # as guide 2 splits
    assert ep.hold_out(9, 4, seed=1) == ([i for i in range(9) if i not in drawn], drawn)
    for count in (4, -1):
        with pytest.raises(UserError, match=f"num_val_episodes is {count}: expected 0 to 3, of 4"):
            ep.hold_out(4, count)


# ---- files and processes ---------------------------------------------------------------------------------------------
def open_h5(folder):
    """How many .h5 files below `folder` this process holds open."""
    links = [os.path.join("/proc/self/fd", n) for n in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.lexists(link)]
    return sum(t.startswith(str(folder)) and t.endswith(".h5") for t in targets)


def test_open_files_are_bounded(tmp_path, episode_path, monkeypatch):
    monkeypatch.setattr(ep, "files_to_keep", lambda: 5)
    for i in range(20):
        shutil.copy(episode_path, tmp_path / f"many{i:02d}.h5")
    episodes, _ = ep.load_episodes(tmp_path)
    assert len(episodes) == 21 and open_h5(tmp_path) == 0, "reading the low-dimensional arrays leaves nothing open"
    reader, most = ImageReader(), 0
    for e in episodes + episodes[::3] + episodes[:2] * 3:
        assert reader.read(e, "top_camera", 1).shape == (*SIZE, 3)
        most = max(most, open_h5(tmp_path))
    assert most == 5


def test_a_reader_used_before_fork_or_pickle_opens_its_own_files(insertion_root):
    e, reader = ep.load_episodes(insertion_root)[0][0], ImageReader()
    expected = reader.read(e, "tool_camera", 7)

    def read_in_child(done):
        done.value = np.array_equal(reader.read(e, "tool_camera", 7), expected) and reader._pid == os.getpid()

    context = multiprocessing.get_context("fork")
    done = context.Value("b", False)
    child = context.Process(target=read_in_child, args=(done,))
    child.start()
    child.join()
    again = pickle.loads(pickle.dumps(reader))
    assert done.value and again._open is None
    for got in (reader.read(e, "tool_camera", 7), again.read(e, "tool_camera", 7)):
        np.testing.assert_array_equal(got, expected)


def test_as_many_files_stay_open_as_the_machine_bears(monkeypatch):
    """Half of `ulimit -n`, and an eighth of the free memory for all loader workers of all ranks together."""
    memory = SimpleNamespace(available=64 * 100 * ep.FILE_BYTES)
    monkeypatch.setattr(ep.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(ep.resource, "getrlimit", lambda _: (10**9, 10**9))
    assert ep.files_to_keep() == 800
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(ep, "get_worker_info", lambda: SimpleNamespace(num_workers=4))
    assert ep.files_to_keep() == 100
    monkeypatch.setattr(ep.resource, "getrlimit", lambda _: (60, 60))
    assert ep.files_to_keep() == 30


# ---- the index of a large folder -------------------------------------------------------------------------------------
@pytest.fixture
def indexed(tmp_path, insertion_root, monkeypatch):
    """(folder of four episodes that is large enough for an index, [files that were opened])."""
    opened, read = [], ep.read_episode
    monkeypatch.setattr(ep, "INDEXED", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ep, "read_episode", lambda path, root: opened.append(Path(path).name) or read(path, root))
    (tmp_path / "data").mkdir()
    copies(insertion_root, tmp_path / "data")
    return tmp_path / "data", opened


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        for key, value in vars(a).items():
            np.testing.assert_array_equal(value, getattr(b, key), err_msg=key)
            assert type(value) is type(getattr(b, key)), key


def test_the_second_start_opens_nothing_until_a_file_changes(indexed, capsys):
    folder, opened = indexed
    for path in [*ep.find_episodes(folder)][:2]:  # some have no phase and no instruction
        replace(path, "phase", None), replace(path, "language_instruction", None)
    first, _ = ep.load_episodes(folder)
    assert len(opened) == 4 and f"reading   4 episodes under {folder}" in capsys.readouterr().out
    assert_same(ep.load_episodes(folder)[0], first)
    assert len(opened) == 4
    with h5py.File(first[1].path, "r+") as f:
        f["action"][3] += 1
    os.utime(first[1].path, ns=(1, 1))
    assert ep.load_episodes(folder)[0][1].action[3, 0] == first[1].action[3, 0] + 1
    shutil.copy(first[0].path, folder / "z.h5")
    assert len(ep.load_episodes(folder)[0]) == 5 and len(opened) == 13
    os.truncate(first[2].path, 1000)
    for count in (18, 23):  # what is bad is looked at again
        found, excluded = ep.load_episodes(folder, skip_bad=True)
        assert len(found) == 4 and first[2].path in excluded[0] and len(opened) == count


DAMAGED = ["truncated", "one byte", "text", "a folder that cannot be written", "another order", "other kinds"]


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_index_is_made_again(indexed, damage):
    folder, opened = indexed
    first, _ = ep.load_episodes(folder)
    index = next((folder.parent / "cache/vla_episodes").iterdir())
    content = bytearray(index.read_bytes())
    content[len(content) // 4] ^= 1
    if damage == "a folder that cannot be written":
        shutil.rmtree(index.parent)
        index.parent.touch()
    elif damage.startswith("other"):
        pd.read_parquet(index).assign(action="text").to_parquet(index)
    elif damage == "another order":
        pd.read_parquet(index).iloc[::-1].to_parquet(index)
    else:
        index.write_bytes({"truncated": content[:500], "one byte": content, "text": b"no index"}[damage])
    assert_same(ep.load_episodes(folder)[0], first)
    assert len(opened) == 8


def test_rank_0_reads_for_all(indexed):
    folder, opened = indexed
    given = SimpleNamespace(once=lambda read, *args: ["what rank 0 read", args])
    assert ep.load_episodes(folder, True, given) == ["what rank 0 read", (folder, True)] and opened == []


# ---- images decoded once ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["jpeg", "gzip"])
def test_a_frame_store_holds_the_pixels_that_the_reader_gives(tmp_path, layout, monkeypatch):
    write(tmp_path / "data", layout=layout, episodes=2, max_frames=9)
    episodes, _ = ep.load_episodes(tmp_path / "data")
    resize, names = partial(train_nora.resize_image, size=(28, 56)), ["top_camera", "side_camera"]
    stored, frames = ImageReader(resize), [(e, c, t) for e in episodes for c in names for t in (0, 8)]
    expected = [stored.read(*frame) for frame in frames]
    for _ in range(2):  # built, and found again
        stored.keep(tmp_path / "frames", episodes, names, ["bicubic", 28, 56])
        copy = pickle.loads(pickle.dumps(stored))
        monkeypatch.setattr(ImageReader, "_stored", lambda *a: pytest.fail("the recordings are not needed any more"))
        np.testing.assert_array_equal([copy.read(*frame) for frame in frames], expected)


def test_a_picture_that_cannot_be_stored_ends_the_start_with_its_name(tmp_path):
    path = write(tmp_path / "data", max_frames=9)
    episodes, _ = ep.load_episodes(tmp_path / "data")
    with h5py.File(path, "r+") as f:
        whole = f["observations/images/tool_camera"][4]
        f["observations/images/tool_camera"][4] = whole[: len(whole) // 2]
    for _ in range(2):  # also where the store is there already
        with pytest.raises(BadEpisode, match=f"{path}.*tool_camera' frame 4 is no readable jpeg"):
            ImageReader().keep(tmp_path / "frames", episodes, ["tool_camera"])


# ---- actions ---------------------------------------------------------------------------------------------------------
def pose_episode(pose, action=None, qpos=None):
    pose = np.asarray(pose, np.float32)
    action = pose if action is None else np.asarray(action, np.float32)
    return ep.Episode("p.h5", "p.h5", len(pose), {"top": "raw"}, {"top": [6, 8]}, action, pose, qpos, None, None, 0.0)


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


def test_standing_still_is_what_the_recorded_action_means():
    """Joint targets stay where the joints are, pose targets where the pose is; recorded deltas become zero."""
    pose = np.cumsum(np.full((5, 6), 0.1), axis=0).astype(np.float32) + 3
    definition = ActionDefinition("action", 6)
    near = pose_episode(pose, action=pose + 0.01, qpos=pose / 7)
    assert definition.still(near) is near.ee_pose and ep.name_columns([near], definition, [])[0][0] == ["x", "mm"]
    near.qpos = near.action + np.float32(0.005)
    assert definition.still(near) is near.qpos and ep.name_columns([near], definition, [])[0][0] == ["q1", "rad"]
    moved = pose_episode(pose, action=np.full((5, 6), 0.1), qpos=pose)
    assert not definition.still(moved).any() and not ActionDefinition("ee_pose_delta", 6).still(near).any()
    named = [[[f"{name}{i}", unit] for i in range(1, 7)] for name, unit in (("action", ""), ("q", "rad"))]
    assert ep.name_columns([moved], definition, ["qpos"]) == tuple(named)


def test_chunks_by_hand():
    """Every frame that has a target is a sample; past the end a target stays where it is, a delta is zero."""
    pose = np.cumsum(np.arange(1, 7.0))[:, None] * np.ones(6)  # 1, 3, 6, 10, 15, 21
    episodes = [pose_episode(pose[:3]), pose_episode(pose[2:])]
    targets, deltas = (ep.Chunks(episodes, ActionDefinition(kind, 6), 2) for kind in ("action", "ee_pose_delta"))
    for dataset, expected in (
        (targets, [[1, 3], [3, 6], [6, 6], [6, 10], [10, 15], [15, 21], [21, 21]]),
        (deltas, [[2, 3], [3, 0], [4, 5], [5, 6], [6, 0]]),
    ):
        chunks, pads = zip(*(dataset.chunk(i) for i in range(len(dataset))), strict=True)
        assert [chunk[:, 0].tolist() for chunk in chunks] == expected and chunks[0].dtype == np.float32
        last = [dataset.locate(i + 1)[0] != dataset.locate(i)[0] for i in range(len(dataset))]
        assert [pad.tolist() for pad in pads] == [[False, end] for end in last]
    assert [deltas.locate(i) for i in range(5)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(BadEpisode, match="p.h5, p.h5: one frame each"):
        ep.insertion_stats([pose_episode(pose[:1])] * 2, deltas.definition, [])
    assert deltas.spread(3).tolist() == [0, 2, 4] and deltas.spread(99).tolist() == [0, 1, 2, 3, 4]


def test_recorded_past_motion_is_recognised(plain, tmp_path):
    past = read_episode(write(tmp_path, action="past_delta"))
    wrapped = pose_episode(past.ee_pose.copy(), action=past.action)
    wrapped.ee_pose[5:, 3] -= 2 * np.pi  # a roll that passes half a turn hides nothing
    following = np.concatenate([np.diff(past.ee_pose, axis=0), np.zeros((1, 6))])
    causal, still = pose_episode(past.ee_pose, action=following), pose_episode(np.ones((5, 6)), np.zeros((5, 6)))
    causal.qpos, still.qpos = causal.ee_pose + 1, still.ee_pose
    said = ["".join(ep.doubts([e], ActionDefinition("action", 6))) for e in (past, wrapped, causal, still)]
    assert ["yesterday" in text for text in said] == [True, True, False, False] and said[2:] == ["", ""]
    assert ep.doubts([past], ActionDefinition("ee_pose_delta", 6)) == []


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
def test_statistics_of_training_episodes_by_hand(insertion_root):
    episodes, _ = ep.load_episodes(insertion_root)
    stats = ep.insertion_stats(episodes[:3], ep.define_action(episodes, True), ["held"], ("qpos", "ee_pose"))
    assert (stats["num_episodes"], stats["num_frames"], stats["excluded_episodes"]) == (3, 42, ["held"])
    assert (stats["action"]["count"], stats["observation.state"]["count"]) == (39, 42)
    assert stats["action_definition"] == dict(source="ee_pose_delta", dim=6, rotation_unit="rad")
    rows = np.concatenate([np.diff(e.ee_pose, axis=0) for e in episodes[:3]])
    np.testing.assert_allclose(stats["action"]["max"], rows.max(0), atol=1e-5)
    states = np.concatenate([np.concatenate([e.qpos, e.ee_pose], 1) for e in episodes[:3]])
    np.testing.assert_allclose(stats["observation.state"]["mean"], states.mean(0), rtol=1e-4, atol=1e-6)


# ---- recordings of the real collector --------------------------------------------------------------------------------
def test_recordings_of_the_simulator(shared):
    episodes, excluded = ep.load_episodes(shared / "data" / "insertion_sim")
    assert len(episodes) == 6 and excluded == []
    assert ep.detect_position_unit(episodes) == "m" and ep.define_action(episodes, True).rotation_unit == "rad"
    for e in episodes:
        assert list(e.cameras) == ["side_camera", "tool_camera", "top_camera"] and set(e.cameras.values()) == {"jpeg"}
        assert e.action.shape == e.ee_pose.shape == e.qpos.shape == (e.num_frames, 6)
        assert set(np.unique(e.phase)) <= {1, 2, 3} and e.instruction is None
        assert ImageReader().read(e, "top_camera", e.num_frames - 1).shape == (240, 320, 3)
    assert ep.doubts(episodes, ActionDefinition("action", 6)) == [], "this collector stores joint targets"
