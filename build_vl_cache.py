"""Features of a frozen Qwen2.5-VL for every VLM tick of every session, once, so that training opens no image and loads
no VLM.

    python build_vl_cache.py --dataset-dirs DATA                            # after create_datapkl.py
    torchrun --nproc_per_node=4 build_vl_cache.py --dataset-dirs DATA       # four processes share one queue

One file per session below <cache_root>/qwen_vl_features/ (form: common/vl_cache.py), written whole or not at all; what
is there, whole and made of the same images with the same settings is kept. The processes share nothing but that folder:
each takes the next session whose lock is free, so more may be started at any time, on any machine that sees it.
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

import numpy as np
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
    dataset_dirs: list[str] = field(default_factory=list)  # folders with sessions that have a data.pkl, also deep below
    cache_root: str | None = None  # folder that gets qwen_vl_features/; null: cache/ in the first of dataset_dirs
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id or directory
    views: list[str] = field(default_factory=list)  # View1 is the left one of a pair; empty: those of every session
    vlm_reuse_count: int = 3  # steps per tick; a training may use any multiple of it
    image_resize_height: int = 360  # pixels, rounded down to a multiple of 28
    image_resize_width: int = 640  # pixels, rounded down to a multiple of 28
    max_image_age: float = vl_cache.MAX_IMAGE_AGE  # seconds; a tick with an older newest image has no feature
    layer: int = -1  # -1: the last hidden state; k: the state after k layers, which is cheaper
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the stored numbers
    micro_batch: int = 1  # features per forward pass; halved when memory runs out
    num_workers: int = 4  # threads that read images ahead, per process
    prune: bool = False  # afterwards delete these sessions' files of other settings or images, and what kills left
    check: bool = False  # read the sessions, show what would be done, stop


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    first = "preprocessed by: python create_datapkl.py --dataset-dirs DATA"
    require(cfg.dataset_dirs, f"dataset_dirs is empty: --dataset-dirs DATA, the folders with the sessions, {first}")
    for key in ("vlm_reuse_count", "image_resize_height", "image_resize_width", "micro_batch", "num_workers"):
        require(getattr(cfg, key) >= 1, f"{key} is {getattr(cfg, key)}: expected 1 or more")
    require(cfg.max_image_age > 0, f"max_image_age is {cfg.max_image_age}: expected more than 0 seconds")


# ---- one session -----------------------------------------------------------------------------------------------------


def unique_looks(ticks, views):
    """-> (looks (u, views) image numbers, each once; row (n,) of each tick in it, -1 where a view has none). A slow
    camera shows several ticks the same images."""
    index = np.stack([ticks.frame_index[view] for view in views], axis=1)
    looks, row = np.unique(index[ticks.complete], axis=0, return_inverse=True)
    rows = np.full(len(ticks), -1)
    rows[ticks.complete] = row.ravel()
    return looks, rows


# ---- its file --------------------------------------------------------------------------------------------------------


def make_meta(recipe, session, ticks, known=None):
    """What a feature file must say about itself, plain values. `known`: see image_facts."""
    index = {view: np.where(ticks.complete, ticks.frame_index[view], -1).tolist() for view in recipe["views"]}
    used = {view: sorted(set(numbers) - {-1}) for view, numbers in index.items()}
    return dict(
        recipe=recipe,
        session=session.name,
        instruction=session.instruction,
        stride=ticks.stride,
        tick_times=ticks.tick_time.tolist(),
        frame_index=index,
        frames={view: vl_cache.image_facts(session, view, numbers, known) for view, numbers in used.items()},
    )


def fingerprint(meta):
    """24 hex digits that change with anything in make_meta's result but places and times on the disk."""
    frames = {view: [[name, digest] for name, _, _, digest in rows] for view, rows in meta["frames"].items()}
    recipe = {k: v for k, v in meta["recipe"].items() if k != "model"}  # its files identify a model, not its path
    return vl_cache.digest_of(meta | dict(frames=frames, recipe=recipe))


def file_of(root, session, meta):
    """Path of the file with these features."""
    return Path(root) / vl_cache.FOLDER / f"{vl_cache.stem_of(session)}__{fingerprint(meta)}.pt"


def write_features(cache_root, session, ticks, features, meta):
    """features (n_ticks, 1, D) float32 -> file, atomically; returns its path."""
    dtype = meta["recipe"]["dtype"]
    stored = features.to(vl_cache.DTYPES[dtype])
    finite = torch.isfinite(stored[torch.from_numpy(ticks.complete)]).all()
    how = "Build with --dtype fp32, or look at the images of this session"
    require(finite, f"{session.name}: a feature is not finite in {dtype}. {how}")
    path = file_of(cache_root, session, meta)
    with ckpt.atomic_path(path) as temporary:
        ckpt.save_state(temporary, dict(features=stored, meta=meta, checksum=vl_cache.checksum(stored, meta)))
    return path


# ---- the work --------------------------------------------------------------------------------------------------------


class Builder:
    """Makes what is missing, session after session. Remembers the micro batch that fits, `paths` {session name: file},
    and what it took: `built` sessions, `computed` features, `seconds`. `go_on`, called with the number of features that
    are there now, says whether to go on."""

    def __init__(self, encoder, root, micro_batch=1, workers=4, go_on=lambda n: True):
        self.encoder, self.root, self.micro_batch, self.go_on = encoder, Path(root), micro_batch, go_on
        self.pool, self.ahead = ThreadPoolExecutor(workers), 2 * max(workers, micro_batch)
        self.paths, self.built, self.computed, self.seconds = {}, 0, 0, 0.0

    def make(self, session, ticks):
        """-> False where another process is at work on this session; True: its file is there, or go_on said no."""
        with claimed(self.root / vl_cache.FOLDER, vl_cache.stem_of(session)) as mine:
            if not mine:
                return False
            meta, path = find_file(self.root, session, ticks, self.encoder.recipe())
            if path:
                self.go_on(len(unique_looks(ticks, self.encoder.views)[0]))
            else:
                self.encoder.warm_up()  # loading is no part of the speed
                began = time.perf_counter()
                features = self.features(session, ticks)
                if features is None:
                    return True
                path = write_features(self.root, session, ticks, features, meta)
                self.seconds, self.built = self.seconds + time.perf_counter() - began, self.built + 1
            self.paths[session.name] = path
            return True

    def features(self, session, ticks):
        """-> (n_ticks, 1, D) float32, NaN at incomplete ticks; None if go_on said no."""
        views, (looks, row) = self.encoder.views, unique_looks(ticks, self.encoder.views)

        def read(look):
            images = {view: session.frame_path(view, i) for view, i in zip(views, look, strict=True)}
            return {view: self.encoder.load(path) for view, path in images.items()}, session.instruction

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
                    print(f"warning   memory ran out, goes on with micro_batch {self.micro_batch}")
                    continue
                batch = batch[len(parts[-1]) :]
                if not self.go_on(len(parts[-1])):
                    return None
        features = torch.full((len(ticks), 1, self.encoder.width), torch.nan)
        features[row >= 0] = torch.cat(parts)[row[row >= 0]]
        self.computed += len(looks)
        return features


def read_ahead(pool, function, items, ahead):
    """Yield function(item) of every item, in order, begun by the pool's threads up to `ahead` items early."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


# ---- the queue -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def claimed(folder, name):
    """Yield True while this process is the only one at work on `name`, on any machine; False: another one is. The
    system frees the lock of a process that died. Where the disk knows no locks, work may be done twice, never wrong."""
    path = folder / f".lock-{name}"
    with open(path, "ab") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                yield False
                return
        yield True
        path.unlink(missing_ok=True)


def find_file(root, session, ticks, recipe):
    """-> (meta of the session's features as they must be now, the path of a whole file that has them, or None). Of an
    image whose size and time are those in a file the hash is taken from there; other times are noted in the file."""
    files, known = [], {}
    for path in vl_cache.files_of(root, session):
        with contextlib.suppress(vl_cache.CacheMismatch):  # damaged: as if it were not there
            files.append(vl_cache.FeatureFile(path))
    for file in reversed(files):
        for rows in file.meta["frames"].values():
            known |= {row[0]: row for row in rows}
    meta = make_meta(recipe, session, ticks, known)
    path = file_of(root, session, meta)
    found = next((file for file in files if file.path == path), None)
    if found and found.meta != meta:
        write_features(root, session, ticks, found.features.float(), meta)
    return meta, path if found else None


def work_through(builder, sessions, ticks, everything):
    """Make every session's file, the longest first. `everything`: also wait for those that other processes make, and
    take them over where one dies."""
    todo = sorted(zip(sessions, ticks, strict=True), key=lambda pair: -len(pair[1]))
    while todo:
        taken = [pair for pair in todo if builder.go_on(0) and not builder.make(*pair)]
        todo = taken if everything else []
        time.sleep(1 if todo else 0)


def prune(root, sessions, keep):
    """Delete files of `sessions` other than those in `keep`, and what killed processes left -> number of files."""
    ckpt.remove_temporaries(root / vl_cache.FOLDER)
    old = []
    for session in sessions:
        old += [path for path in vl_cache.files_of(root, session) if path not in keep]
    for path in old:
        path.unlink()
    return len(old)


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
    everywhere, lacking = common_views(sessions)
    views, how = sorted(set(cfg.views)) or everywhere, "choose with --views, or leave sessions out"
    lack = "; ".join(f"{view} is missing in {len(names)}, e.g. {names[0]}" for view, names in lacking.items())
    require(views, f"no view is in all of the {len(sessions)} sessions ({lack}): {how}")
    if lack and not cfg.views:
        print0(f"warning   {lack}; left out. Or {how}")
    ticks = [session.ticks(cfg.vlm_reuse_count, views, cfg.max_image_age) for session in sessions]
    bare = [session.name for session, t in zip(sessions, ticks, strict=True) if not t.complete.any()]
    how = f"other --views, a larger --max-image-age (now {cfg.max_image_age} s), or leave them out"
    require(not bare, f"{len(bare)} sessions have no tick with a fresh image of every view, e.g. {bare[:1]}: {how}")
    number, fresh = sum(map(len, ticks)), sum(int(t.complete.sum()) for t in ticks)
    size = sum(len(unique_looks(t, views)[0]) for t in ticks)
    seen = f"{fresh} with a fresh image of {', '.join(views)}: {size} different features"
    print0(f"data      {len(sessions)} sessions, {number} ticks every {cfg.vlm_reuse_count} steps, {seen}")
    folder = Path(cfg.cache_root or Path(cfg.dataset_dirs[0]) / "cache") / vl_cache.FOLDER
    if cfg.check:
        rows, columns = cfg.image_resize_height // 28, cfg.image_resize_width // 28  # patch 14, merge 2
        height, width, _ = vl_cache.read_image(sessions[0].frame_path(views[0], 0)).shape
        seen = f"{width}x{height} is seen as {columns * 28}x{rows * 28}: {rows * columns} tokens"
        print0(f"          {views[0]} of {sessions[0].name}: {seen}, {rows * columns * len(views)} per feature")
        megabytes = number * 2048 * (2 if cfg.dtype == "fp16" else 4) / 1e6
        print0(f"cache     {folder}: about {megabytes:.1f} MB with the 3B model's width of 2048")
        print0(f"text      {sorted({session.instruction for session in sessions})}\ncheck passed")
        return

    # ---- build
    asked = (cfg.image_resize_height, cfg.image_resize_width, cfg.layer, cfg.dtype)
    encoder = vl_cache.VLEncoder(cfg.model, views, *asked, device)
    (height, width), tokens, kind = encoder.size, encoder.grid[0] * encoder.grid[1], encoder.recipe()["compute_dtype"]
    shown = f"images as {width}x{height}, {tokens} tokens per view, {tokens * len(views)} per feature"
    print0(f"model     {cfg.model}, layer {cfg.layer}, {kind} on {world} x {device.type}; {shown}")
    folder.mkdir(parents=True, exist_ok=True)
    with StopSignal() as stop, tqdm(total=size, unit="feature", disable=None if rank == 0 else True) as bar:

        def go_on(n):
            bar.update(n)
            return stop.received is None

        builder = Builder(encoder, folder.parent, cfg.micro_batch, cfg.num_workers, go_on)
        work_through(builder, sessions, ticks, everything=rank == 0)
    if stop.received:
        print0(f"stopped by {stop.received}; finished sessions stay. Continue with the same command")
        raise SystemExit(1)
    if rank:
        return

    # ---- report
    disk = sum(path.stat().st_size for path in builder.paths.values()) / 1e6
    print(f"cache     {len(sessions)} sessions, {number} ticks, {disk:.2f} MB in {folder}; {builder.built} built here")
    if builder.built:
        each = builder.seconds / builder.computed
        print(f"speed     {1 / each:.2f} features/s ({1000 * each:.1f} ms each) in this one of {world} processes")
    if cfg.prune:
        print(f"pruned    {prune(folder.parent, sessions, builder.paths.values())} files of other settings or images")
    same = ("cache_root", "model", "image_resize_height", "image_resize_width", "vlm_reuse_count", "max_image_age")
    train = {key: getattr(cfg, key) for key in same}
    print(f"train: {vl_cache.command('train_async.py', dataset_dir=cfg.dataset_dirs, views=views, **train)}")


if __name__ == "__main__":
    launch(main, Config, ALIASES)
