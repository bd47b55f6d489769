"""The frame store: made once, whole or not at all, and of the content that it says."""

import shutil

import numpy as np
import pytest
from torch.utils.data import DataLoader

from common import UserError
from common.frames import FrameStore


def test_frames_are_built_once_belong_to_the_content_and_to_the_recipe(tmp_path):
    source, made = tmp_path / "a.bin", []

    def open_source(path):
        def frame(i):
            made.append(i)
            if i == 2:
                raise OSError("torn")
            return np.full((2, 3, 3), path.read_bytes()[i], np.uint8)

        return frame

    def build(path, recipe="x", folder="store"):
        made.clear()
        store = FrameStore(tmp_path / folder, (2, 3, 3), recipe)
        store.build({path: 4}, open_source)
        return store, sorted(made)

    source.write_bytes(b"abcd")
    store, calls = build(source)
    assert calls == [0, 1, 2, 3] and store.about(source) == store.about(source) | dict(count=4, bad={2: "torn"})
    assert store.read(source, 3).tolist() == np.full((2, 3, 3), ord("d")).tolist()
    copy = tmp_path / "copy.bin"
    shutil.copyfile(source, copy)  # another name and another time
    assert build(source)[1] == build(copy)[1] == [] and build(source, "y")[1] == [0, 1, 2, 3]
    source.write_bytes(b"abce")
    assert build(source)[1] == [0, 1, 2, 3] and build(source)[0].read(source, 3)[0, 0, 0] == ord("e")
    torn = next(file for file in (tmp_path / "store").glob("*.u8"))
    torn.write_bytes(torn.read_bytes()[:-1])
    again = [build(path, recipe)[1] for path, recipe in ((source, "x"), (copy, "x"), (copy, "y"))]
    assert again.count([0, 1, 2, 3]) == 1 and again.count([]) == 2
    notes = [file for file in (tmp_path / "store").iterdir() if file.suffix in (".json", ".digest")]
    for damage in (b"", b"\0\0", b"{", b"null", b"[]", b"[1, 2]", b'{"count": 4}', b'{"count": "4", "bad": []}'):
        for file in notes:
            file.write_bytes(damage)
        assert build(copy)[1] == [0, 1, 2, 3], damage
    workers = DataLoader([0, 1, 3], num_workers=1, collate_fn=lambda i: store.read(copy, i[0])[0, 0, 0])
    assert list(workers) == [ord("a"), ord("b"), ord("d")]


def test_a_stopped_build_goes_on_and_no_half_file_is_taken(tmp_path):
    sources = {}
    for name in "abc":
        (tmp_path / name).write_bytes(name.encode() * 3)
        sources[tmp_path / name] = 3
    store, made = FrameStore(tmp_path / "store", (1, 1, 3), ""), []

    def open_source(path):
        if path.name == "b" and not made:
            made.append("stop")
            raise KeyboardInterrupt
        made.append(path.name)
        return lambda i: np.full((1, 1, 3), path.read_bytes()[i], np.uint8)

    with pytest.raises(KeyboardInterrupt):
        store.build(sources, open_source, first=0.4)  # begins at "b"
    store.build(sources, open_source, first=0.4)
    assert made == ["stop", "b", "c", "a"] and all(store.read(p, 2)[0, 0, 0] == ord(p.name) for p in sources)


def test_a_disk_without_room_is_named_before_anything_is_decoded(tmp_path):
    (tmp_path / "a").write_bytes(b"a")
    store = FrameStore(tmp_path / "store", (1000, 1000, 3), "")
    with pytest.raises(UserError, match="30000000.00 GB of decoded images do not fit into .*another local disk"):
        store.build({tmp_path / "a": 10**10}, None)


def test_a_machine_in_trouble_makes_no_picture_bad_for_good(tmp_path):
    source = tmp_path / "source"
    source.write_bytes(b"recorded")
    store = FrameStore(tmp_path / "store", (2, 2, 3), [])

    def busy(path):
        return lambda i: open("/proc/self/nothing_here", "rb")  # noqa: SIM115  stands for too many open files

    with pytest.raises(OSError):
        store.build({source: 3}, busy)
    store.build({source: 3}, lambda path: lambda i: np.full((2, 2, 3), i, np.uint8))
    assert store.about(source)["bad"] == {} and store.read(source, 2).max() == 2
