"""Compute the features of a frozen Qwen2.5-VL for every VLM tick of every session once, so that training opens no image
and loads no VLM.

    python build_vl_cache.py --dataset-dirs DATA                            # after create_datapkl.py
    torchrun --nproc_per_node=4 build_vl_cache.py --dataset-dirs DATA       # four processes share one queue

Writes one file per session below <cache_root>/qwen_vl_features/ (format: common/vl_cache.py), atomically; features of
the same images with the same settings are kept. The processes share nothing but that folder: each takes the next
session whose lock is free, so more can be started at any time, on any machine that has the folder.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from common import checkpoint as ckpt
from common import require, vl_cache
from common.program import StopSignal, launch
from common.sessions import common_views, find_sessions

ALIASES = dict(dataset_dir="dataset_dirs", resize_height="image_resize_height", resize_width="image_resize_width")


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    dataset_dirs: list[str] = field(default_factory=list)  # folders with preprocessed sessions, searched recursively
    cache_root: str | None = None  # folder that gets qwen_vl_features/; null: cache/ in the first of dataset_dirs
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id or directory
    views: list[str] = field(default_factory=list)  # View1 is the left one of a pair; empty: those in all sessions
    vlm_reuse_count: int = 3  # steps per feature; a training may use any multiple of it
    image_resize_height: int = 360  # pixels, rounded down to a multiple of 28
    image_resize_width: int = 640  # pixels, rounded down to a multiple of 28
    max_image_age: float = 1.5  # seconds; a tick whose newest image of a view is older is left out
    layer: int = -1  # -1: the last hidden state; k: the state after k layers, which is cheaper
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the stored numbers
    micro_batch: int = 1  # features per forward pass; halved when GPU memory runs out
    num_workers: int = 4  # threads that read images ahead, per process
    prune: bool = False  # afterwards delete these sessions' files of other settings, and leftovers of killed processes
    check: bool = False  # read the sessions, show what would be done, stop


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    first = "preprocessed by: python create_datapkl.py --dataset-dirs DATA"
    require(cfg.dataset_dirs, f"dataset_dirs is empty: --dataset-dirs DATA, the folders with the sessions, {first}")
    least = dict(vlm_reuse_count=1, image_resize_height=28, image_resize_width=28, micro_batch=1, num_workers=1)
    for key, low in least.items():
        require(getattr(cfg, key) >= low, f"{key} is {getattr(cfg, key)}: expected {low} or more")
    require(cfg.max_image_age > 0, f"max_image_age is {cfg.max_image_age}: expected more than 0 seconds")


# ---- the work --------------------------------------------------------------------------------------------------------


class Builder:
    """Computes what is missing, session by session. Keeps the micro batch that fits, `paths` of the files, and the
    effort: `built` sessions, `computed` features, `seconds`. `go_on` is called with the number of features that are
    done since the last call, and returns False to stop."""

    def __init__(self, encoder, root, micro_batch=1, workers=4, go_on=lambda n: True):
        self.encoder, self.root, self.micro_batch, self.go_on = encoder, root, micro_batch, go_on
        self.pool, self.ahead = ThreadPoolExecutor(workers), 2 * max(workers, micro_batch)
        self.paths, self.built, self.computed, self.seconds = [], 0, 0, 0.0

    def make(self, session, looks):
        """-> False if another process is working on this session; True: its file is complete, or go_on said stop."""
        path = vl_cache.file_of(self.root, session, self.encoder.recipe)
        with claimed(path) as mine:
            if not mine:
                return False
            rows, known = {}, {}
            with contextlib.suppress(vl_cache.CacheMismatch):  # no file, or a damaged one: start from nothing
                file = vl_cache.FeatureFile(path)
                rows, known = dict(zip(file.rows, file.features, strict=True)), file.meta["pictures"]
            pictures = vl_cache.picture_facts(session, looks, known)
            keys = vl_cache.keys_of(session, looks, pictures)
            todo = {key: look for look, key in keys.items() if key not in rows}
            self.go_on(len(looks) - len(todo))
            if todo:
                _ = self.encoder.vlm  # load it now: that does not count as computing
                began = time.perf_counter()
                features = self.features(session, list(todo.values()))
                if features is None:
                    return True
                rows |= zip(todo, features, strict=True)
                self.seconds += time.perf_counter() - began
                self.built += 1
            if todo or not pictures.items() <= known.items():  # or images have new times: the next run need not read
                meta = dict(recipe=self.encoder.recipe, keys=list(rows), pictures=known | pictures)
                write_features(path, torch.stack(list(rows.values())), meta)
            self.paths.append(path)
            return True

    def features(self, session, looks):
        """-> (n, 1, D) in the stored dtype; None if go_on said stop."""

        def read(look):
            paths, sizes = [session.path / name for name in look], map(session.image_size, self.encoder.views)
            images = map(self.encoder.load, map(vl_cache.read_image, paths, sizes))
            return dict(zip(self.encoder.views, images, strict=True)), session.instruction

        coming, parts = read_ahead(self.pool, read, looks, self.ahead), []
        while batch := list(itertools.islice(coming, self.micro_batch)):
            while batch:
                try:
                    parts.append(self.encoder.encode(batch[: self.micro_batch]))
                except torch.OutOfMemoryError:
                    (height, width), name = self.encoder.size, session.name
                    less = f"lower --image-resize-height and -width (now {height}x{width}), or use fewer --views"
                    require(self.micro_batch > 1, f"CUDA out of memory at {name} with one feature at a time: {less}")
                    torch.cuda.empty_cache()
                    self.micro_batch //= 2
                    print(f"warning   out of GPU memory, going on with micro_batch {self.micro_batch}")
                    continue
                batch = batch[len(parts[-1]) :]
                if not self.go_on(len(parts[-1])):
                    return None
        self.computed += len(looks)
        features = torch.cat(parts).to(self.encoder.dtype)
        advice = "Build with --dtype fp32, or look at the images of this session"
        require(features.isfinite().all(), f"{session.name}: a feature is not finite in {features.dtype}. {advice}")
        return features


def write_features(path, features, meta):
    with ckpt.atomic_path(path) as temporary:
        ckpt.save_state(temporary, dict(features=features, meta=meta, checksum=vl_cache.checksum(features, meta)))


def read_ahead(pool, function, items, ahead):
    """Yield function(item) of every item, in order; the pool's threads are up to `ahead` items ahead."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ---- the queue -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(path):
    """Yield True if this process, alone of all machines, may work on the file `path`; False if another one does. The
    lock of a process that died is free. On a disk without locks work may be done twice, never wrong."""
    lock = path.with_name(f".lock-{path.stem}")
    with open(lock, "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                yield False
                return
        yield True
        lock.unlink(missing_ok=True)


def work_through(builder, sessions, looks, everything):
    """Make every session's file, the longest first. `everything`: also wait for those that other processes are making,
    and take over from one that dies."""
    todo = sorted(zip(sessions, looks, strict=True), key=lambda pair: -len(pair[1]))
    while todo:
        taken = [pair for pair in todo if builder.go_on(0) and not builder.make(*pair)]
        todo = taken if everything else []
        time.sleep(1 if todo else 0)


def prune(root, sessions, keep):
    """Delete the files of `sessions` that are not in `keep`, and leftovers of killed processes -> number of files."""
    ckpt.remove_temporaries(root / vl_cache.FOLDER)
    files = set().union(*(vl_cache.files_of(root, session) for session in sessions))
    for path in files.difference(keep):
        path.unlink()
    return len(files.difference(keep))


# ---- main ------------------------------------------------------------------------------------------------------------


def main(cfg):
    check_config(cfg)
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    print0 = print if rank == 0 else lambda *_: None

    # ---- data
    sessions = find_sessions(cfg.dataset_dirs)
    views, left_out = (sorted(set(cfg.views)), []) if cfg.views else common_views(sessions)
    if left_out:
        print0(f"warning   left out, for not every session has it: {', '.join(left_out)}. Choose with --views")
    looks = [session.ticks(cfg.vlm_reuse_count, views, cfg.max_image_age).unique() for session in sessions]
    bare = [session.name for session, own in zip(sessions, looks, strict=True) if not own]
    advice = f"other --views, a larger --max-image-age (now {cfg.max_image_age} s), a smaller --vlm-reuse-count "
    advice += f"(now {cfg.vlm_reuse_count}), or leave them out"
    require(not bare, f"{len(bare)} sessions have no tick with a fresh image of every view, e.g. {bare[:1]}: {advice}")
    total = sum(map(len, looks))
    shown = f"{total} looks at {', '.join(views)}, every {cfg.vlm_reuse_count} steps"
    print0(f"data      {len(sessions)} sessions, {shown}")
    folder = Path(cfg.cache_root or Path(cfg.dataset_dirs[0]) / "cache") / vl_cache.FOLDER
    if cfg.check:
        rows, columns = cfg.image_resize_height // 28, cfg.image_resize_width // 28  # patch 14, merge 2
        height, width, _ = vl_cache.read_image(sessions[0].path / looks[0][0][0]).shape
        shown = f"{width}x{height} is seen as {columns * 28}x{rows * 28}: {rows * columns} tokens"
        print0(f"          {views[0]} of {sessions[0].name}: {shown}, {rows * columns * len(views)} per feature")
        megabytes = total * 2048 * (2 if cfg.dtype == "fp16" else 4) / 1e6
        print0(f"cache     {folder}: about {megabytes:.1f} MB with the 3B model's width of 2048")
        print0(f"text      {sorted({session.instruction for session in sessions})}\ncheck passed")
        return

    # ---- build
    there = next(path for path in (folder, *folder.parents) if path.exists())
    require(os.access(there, os.W_OK), f"{there} cannot be written: --cache-root FOLDER puts the features elsewhere")
    settings = (cfg.image_resize_height, cfg.image_resize_width, cfg.layer, cfg.dtype)
    encoder = vl_cache.VLEncoder(cfg.model, views, *settings, device)
    (height, width), tokens, kind = encoder.size, encoder.grid[0] * encoder.grid[1], encoder.recipe["compute_dtype"]
    shown = f"images as {width}x{height}, {tokens} tokens per view, {tokens * len(views)} per feature"
    print0(f"model     {cfg.model}, layer {cfg.layer}, {kind} on {world} x {device.type}; {shown}")
    folder.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop, tqdm(total=total, unit="feature", disable=None if rank == 0 else True) as bar:

        def go_on(n):
            bar.update(n)
            return stop.received is None

        builder = Builder(encoder, folder.parent, cfg.micro_batch, cfg.num_workers, go_on)
        work_through(builder, sessions, looks, everything=rank == 0)
    if stop.received:
        print0(f"stopped by {stop.received}; finished sessions stay. Continue with the same command")
        raise SystemExit(1)
    if rank:
        return

    # ---- report
    disk = sum(path.stat().st_size for path in builder.paths) / 1e6
    shown = f"{total} features, {disk:.2f} MB in {folder}; {builder.built} built here"
    print(f"cache     {len(sessions)} sessions, {shown}")
    if builder.built:
        each = builder.seconds / builder.computed
        print(f"speed     {1 / each:.2f} features/s ({1000 * each:.1f} ms each) in this one of {world} processes")
    if cfg.prune:
        print(f"pruned    {prune(folder.parent, sessions, builder.paths)} files of other settings")
    same = ("cache_root", "model", "image_resize_height", "image_resize_width", "vlm_reuse_count", "max_image_age")
    train = {key: getattr(cfg, key) for key in same}
    print(f"train: {vl_cache.command('train_async.py', dataset_dir=cfg.dataset_dirs, views=views, **train)}")


if __name__ == "__main__":
    launch(main, Config, ALIASES)
