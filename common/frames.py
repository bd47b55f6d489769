"""The frame store: images decoded and resized once, kept as raw uint8 on a local disk, so that a training run reads
them in any order at the speed of that disk.

Every source file (a parquet file, a recording) gets KEY.u8, its images in order, and KEY.json: how many, and which of
them cannot be decoded. KEY is a hash of the file's content and of the recipe (size, way of resizing, Pillow's version):
a copy of the data finds its frames again, another recipe never does. Both files are written atomically, so a build that
was interrupted continues where it stopped, and several processes may build side by side."""

import contextlib
import hashlib
import json
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL

from common import checkpoint as ckpt
from common import require
from common.hub import content_facts
from common.log import progress

VERSION = 1


class FrameStore:
    """`shape` (h, w, 3) of a frame; `recipe`: plain values, everything but the file that a pixel depends on."""

    def __init__(self, folder, shape, recipe):
        self.folder, self.shape, self.bytes_per_frame = Path(folder), tuple(shape), int(np.prod(shape))
        self.recipe = json.dumps([VERSION, PIL.__version__, self.shape, recipe], sort_keys=True)
        self._keys, self._maps = {}, {}

    def files(self, path):
        """-> (KEY.u8, KEY.json) of a source file, which is read once: its digest is kept by its size and time."""
        path = Path(path).resolve()
        if path not in self._keys:
            note, known = self.folder / f"{_hash(str(path))}.digest", None
            with contextlib.suppress(OSError, ValueError):  # none yet, or damaged
                known = json.loads(note.read_text())
            facts = content_facts(path, known)
            if facts != known:
                write_json(note, facts)
            self._keys[path] = _hash(facts[2] + self.recipe)
        return self.folder / f"{self._keys[path]}.u8", self.folder / f"{self._keys[path]}.json"

    def about(self, path):
        """-> {count, bad {index: why}} of a source file, or None where its frames are missing or damaged."""
        file, note = self.files(path)
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or damaged
            about = json.loads(note.read_text())
            about["bad"] = {int(i): why for i, why in about["bad"].items()}
            return about if file.stat().st_size == about["count"] * self.bytes_per_frame else None

    def build(self, sources, open_source, first=0, threads=8):
        """Make what is missing of `sources` {path: number of images}, after printing how large it will be.
        open_source(path) -> function of an index that returns the frame, or raises if it cannot be decoded. Each rank
        starts at its own fraction `first` (0 to 1) of the list and skips what the others have made meanwhile."""
        missing = [path for path in sources if self.about(path) is None]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        ckpt.remove_temporaries(self.folder)
        needed = sum(sources[path] for path in missing) * self.bytes_per_frame / 1e9
        free = shutil.disk_usage(self.folder).free / 1e9
        size = f"{needed:.2f} GB of decoded images"
        require(needed < free, f"{size} do not fit into {self.folder}, {free:.2f} GB are free: give another local disk")
        if first == 0:  # one process tells
            print(f"frames    {size}, {len(missing)} files, go to {self.folder}", flush=True)
        begin = int(first * len(missing))
        for path in progress(missing[begin:] + missing[:begin], "decoding images", "file"):
            if self.about(path) is None:
                self._build_one(path, sources[path], open_source(path), threads)

    def _build_one(self, path, count, decode, threads):
        bad, blank = {}, np.zeros(self.shape, np.uint8)

        def frame(i):
            try:
                return decode(i)
            except Exception as error:  # damaged bytes surface as anything: OSError, SyntaxError, struct.error, ...
                cause = error.__cause__ or error
                if isinstance(cause, MemoryError) or getattr(cause, "errno", None):
                    raise  # the machine's fault, not the image's, which must not be recorded as bad for good
                bad[i] = str(error) or type(error).__name__
                return blank  # a placeholder that is never read

        file, note = self.files(path)
        with ckpt.atomic_path(file) as temporary, ThreadPoolExecutor(threads) as pool, open(temporary, "wb") as out:
            for start in range(0, count, 256):
                for pixels in pool.map(frame, range(start, min(start + 256, count))):
                    wrong = f"{path} has an image of {pixels.shape}, a frame store holds one size: {self.shape}"
                    require(pixels.shape == self.shape and pixels.dtype == np.uint8, f"{wrong}. Train without it")
                    out.write(np.ascontiguousarray(pixels).data)
        write_json(note, dict(source=str(path), recipe=self.recipe, count=count, bad=bad))

    def read(self, path, index):
        """-> (h, w, 3) uint8"""
        if path not in self._maps:
            # a map keeps its file open, and Linux allows a process 65530 maps
            if len(self._maps) >= min(resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4, 2**14):
                del self._maps[next(iter(self._maps))]
            frames = np.memmap(self.files(path)[0], np.uint8, "c")
            self._maps[path] = frames.view(np.ndarray).reshape(-1, *self.shape)  # a memmap is slow to index
        return self._maps[path][index]

    def __getstate__(self):
        return self.__dict__ | {"_maps": {}}  # a mapped file would travel to a worker as a copy


def rgb(picture):
    """Pillow's image -> the same in RGB. One of 16 or 32 bits is refused: Pillow would cut its values at 255."""
    require(picture.mode[0] not in "IF", f"it has mode {picture.mode}, expected 8 bits per channel", ValueError)
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _hash(text):
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def write_json(path, value):
    with ckpt.atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2))
