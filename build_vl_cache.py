"""Features of a frozen Qwen2.5-VL for every VLM tick of every session, once, so that training opens no image and loads no VLM.

    python build_vl_cache.py --dataset-dirs /data                                    # after create_datapkl.py
    torchrun --nproc_per_node=4 build_vl_cache.py --dataset-dirs /data               # whole sessions shared out, longest first
    python build_vl_cache.py --dataset-dirs /data --verify 20                        # then compute 20 of them again and compare

One file per session below <cache_root>/qwen_vl_features/ (form: common/vl_cache.py), written whole or not at all: started again after a kill it does only what
is missing. The file's name ends in a fingerprint of everything that shapes a feature: model files, prompt, views, size, layer, pooling, dtype, stride, images.
"""

import os
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common import checkpoint as ckpt
from common import vl_cache
from common.config import parse_config
from common.sessions import common_views, find_sessions


# ---- config ----------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    dataset_dirs: list[str] = field(
        default_factory=list
    )  # folders with sessions that have a data.pkl, searched recursively
    cache_root: str | None = None  # folder that holds qwen_vl_features/; null: cache/ in the first of dataset_dirs
    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"  # hub id or directory
    views: list[str] = field(
        default_factory=list
    )  # camera views, View1 is the left one of a stereo pair; empty: those that every session has
    vlm_reuse_count: int = 3  # steps per tick; a training may use any multiple of it
    image_resize_height: int = 360  # pixels, rounded down to a multiple of 28
    image_resize_width: int = 640  # pixels, rounded down to a multiple of 28
    max_image_age: float = 1.5  # seconds; a tick whose newest image of a view is older has no feature
    layer: int = -1  # -1: the last hidden state; k: the state after k layers, which is cheaper
    tokens: int = 1  # per feature: 1 is the mean over all tokens, n the means of n equal stretches
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the stored numbers
    compute_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of the forward pass; auto: bf16 on CUDA, else fp32
    attn_implementation: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"  # auto: flash where it can run
    micro_batch: int = 1  # features per forward pass; halved when memory runs out
    num_workers: int = 4  # threads that read images ahead, per process
    hash_images: bool = False  # recognise images by their content instead of size and time: survives a copy that loses times, reads all of them
    verify: int = 0  # afterwards compute this many again, drawn at random, and compare
    prune: bool = False  # delete files of these sessions that were made with other settings or images, and what killed builds left
    check: bool = False  # read the sessions, show what would be done, stop


def check_config(cfg):
    """Refuse values that mean nothing, before anything is read."""
    ones = ("vlm_reuse_count", "image_resize_height", "image_resize_width", "tokens", "micro_batch", "num_workers")
    for wrong, message in (
        (
            not cfg.dataset_dirs,
            "dataset_dirs is empty: name the folders with the sessions, --dataset-dirs DATA (preprocessed by: python create_datapkl.py --dataset-dirs DATA)",
        ),
        *((getattr(cfg, key) < 1, f"{key} is {getattr(cfg, key)}: expected 1 or more") for key in ones),
        (
            cfg.max_image_age <= 0 or cfg.verify < 0,
            f"max_image_age is {cfg.max_image_age}, verify is {cfg.verify}: expected more than 0, and 0 or more",
        ),
    ):
        if wrong:
            raise ValueError(message)


# ---- one session -----------------------------------------------------------------------------------------------------


def unique_looks(ticks, views):
    """-> (looks (u, views) image numbers, each once, row (n,) of each tick in it, -1 where a view has none). A slow camera shows several ticks the same images."""
    index = np.stack([ticks.frame_index[v] for v in views], axis=1)
    looks, row = np.unique(index[ticks.complete], axis=0, return_inverse=True)
    rows = np.full(len(ticks), -1)
    rows[ticks.complete] = row.ravel()
    return looks, rows


class Builder:
    """Computes the features of sessions; remembers the micro batch that fits."""

    def __init__(self, encoder, micro_batch, workers):
        self.encoder, self.micro_batch, self.pool, self.ahead = (
            encoder,
            micro_batch,
            ThreadPoolExecutor(workers),
            2 * workers,
        )

    def features(self, session, ticks, progress=lambda n: True):
        """-> ((n_ticks, tokens, D) float32, NaN at incomplete ticks, number of forward rows), or None if `progress`, called with the rows done, says stop."""
        looks, row = unique_looks(ticks, self.encoder.views)
        out = []
        for batch in self._batches(session, looks):
            while batch:
                try:
                    out.append(self.encoder.encode(batch[: self.micro_batch]))
                except torch.cuda.OutOfMemoryError as error:
                    if self.micro_batch == 1:
                        raise ValueError(
                            f"CUDA out of memory at {session.name} with one feature at a time: lower --image-resize-height and --image-resize-width (now "
                            f"{self.encoder.size[0]}x{self.encoder.size[1]}) or use fewer --views (now {', '.join(self.encoder.views)})"
                        ) from error
                    torch.cuda.empty_cache()
                    self.micro_batch //= 2
                    continue
                batch = batch[self.micro_batch :]
                if not progress(len(out[-1])):
                    return None
        computed = torch.cat(out) if out else torch.zeros(0, self.encoder.tokens, self.encoder.width)
        features = torch.full((len(ticks), *computed.shape[1:]), torch.nan)
        features[row >= 0] = computed[row[row >= 0]]
        return features, len(looks)

    def _batches(self, session, looks):
        """Lists of `micro_batch` observations, their images read ahead by the threads."""

        def read(look):
            return {
                v: self.encoder.load(session.frame_path(v, i)) for v, i in zip(self.encoder.views, look)
            }, session.instruction

        pending, todo, batch = deque(), iter(looks), []
        for look in todo:
            pending.append(self.pool.submit(read, look))
            if len(pending) > max(self.ahead, 2 * self.micro_batch):
                batch.append(pending.popleft().result())
                if len(batch) >= self.micro_batch:
                    yield batch
                    batch = []
        while pending:
            batch.append(pending.popleft().result())
            if len(batch) >= self.micro_batch or not pending:
                yield batch
                batch = []


def share_out(sizes, world):
    """Work sizes -> list of index lists, one per rank: the longest first, each to the rank with the least."""
    shares, load = [[] for _ in range(world)], [0] * world
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += sizes[i]
    return shares


# ---- verify, prune ---------------------------------------------------------------------------------------------------


def verify(encoder, sessions, ticks, paths, count):
    """Compute `count` random features again and compare with the files; ValueError names the first that differs. -> largest relative difference."""
    rng, candidates = (
        np.random.default_rng(),
        [(i, t) for i, tick in enumerate(ticks) for t in np.flatnonzero(tick.complete)],
    )
    worst, tolerance = (
        0.0,
        0.02 if encoder.recipe()["compute_dtype"] == "bf16" else 2e-3,
    )  # another batch size or GPU rounds otherwise
    for i, t in (candidates[j] for j in rng.choice(len(candidates), min(count, len(candidates)), replace=False)):
        session, stored = sessions[i], vl_cache.FeatureFile(paths[i]).features[t].float()
        again = encoder.encode(
            [({v: session.frame_path(v, ticks[i].frame_index[v][t]) for v in encoder.views}, session.instruction)]
        )[0]
        difference = float((again - stored).norm() / again.norm())
        if not difference <= tolerance:
            raise ValueError(
                f"{paths[i]}: the feature of tick {t} differs by {difference:.2%} from a new computation (allowed {tolerance:.1%}). Delete this file and build again"
            )
        worst = max(worst, difference)
    return worst


def prune(folder, sessions, keep):
    """Delete feature files of `sessions` other than those in `keep`, and temporaries -> (deleted, files of other sessions that stay)."""
    names, keep, deleted, others = {vl_cache.stem_of(s) for s in sessions}, set(keep), [], 0
    ckpt.remove_temporaries(folder)
    for path in sorted(folder.glob("*.pt")):
        if path.name[:-29] not in names:
            others += 1
        elif path not in keep:
            path.unlink()
            deleted.append(path)
    return deleted, others


# ---- main ------------------------------------------------------------------------------------------------------------


def main(cfg):
    check_config(cfg)
    cuda = torch.cuda.is_available()
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # only counts and names are exchanged
    print0 = print if rank == 0 else lambda *_: None

    # ---- data
    sessions = find_sessions(cfg.dataset_dirs)
    everywhere, lacking = common_views(sessions)
    views = sorted(cfg.views) or everywhere
    if not views:
        raise ValueError(
            f"no view is in all of the {len(sessions)} sessions: choose with --views, or leave sessions out. Missing: { ({v: n[:2] for v, n in lacking.items()}) }"
        )
    if not cfg.views:
        for view, names in lacking.items():
            print0(
                f"warning   {view} is left out, for {len(names)} of {len(sessions)} sessions lack it, e.g. {names[0]}. Leave those out, or name the --views to use"
            )
    ticks = [s.ticks(cfg.vlm_reuse_count, views, cfg.max_image_age) for s in sessions]
    sizes = [len(unique_looks(t, views)[0]) for t in ticks]
    steps = sum(
        len(s.usable_steps(cfg.vlm_reuse_count, cfg.vlm_reuse_count, views, cfg.max_image_age)[0]) for s in sessions
    )
    bare = [s.name for s, n in zip(sessions, sizes) if n == 0]
    print0(
        f"data      {len(sessions)} sessions, {sum(map(len, ticks))} ticks every {cfg.vlm_reuse_count} steps, {sum(int(t.complete.sum()) for t in ticks)} with a fresh image of {', '.join(views)}; "
        f"{sum(sizes)} features to compute, {steps} training steps use them"
    )
    if bare:
        raise ValueError(
            f"{len(bare)} sessions have no tick with a fresh image of every view, e.g. {bare[0]}: other --views, a larger --max-image-age (now {cfg.max_image_age} s), or leave them out"
        )
    root = Path(cfg.cache_root or Path(cfg.dataset_dirs[0]) / "cache")
    if cfg.check:
        side = 28  # patch 14, merge 2
        n = (cfg.image_resize_height // side) * (cfg.image_resize_width // side)
        image = vl_cache.read_image(sessions[0].frame_path(views[0], 0))
        print0(
            f"images    {views[0]} of {sessions[0].name} is {image.shape[1]}x{image.shape[0]}; seen as {cfg.image_resize_width // side * side}x{cfg.image_resize_height // side * side}: "
            f"{n} tokens per view, {n * len(views)} per feature"
        )
        print0(
            f"text      {sorted({s.instruction for s in sessions})}\ncache     {root / vl_cache.FOLDER}: about {sum(map(len, ticks)) * cfg.tokens * 2048 * (2 if cfg.dtype == 'fp16' else 4) / 1e6:.1f} MB "
            "with the 3B model's width of 2048\ncheck passed"
        )
        return 0

    # ---- what is missing: rank 0 decides, so that all ranks share out the same list
    if rank == 0:
        vl_cache.download(cfg.model)
    if world > 1:
        dist.barrier()  # one download, not one per rank
    encoder = vl_cache.VLEncoder(
        cfg.model,
        views,
        cfg.image_resize_height,
        cfg.image_resize_width,
        cfg.layer,
        "mean",
        cfg.tokens,
        cfg.dtype,
        device,
        cfg.compute_dtype,
        cfg.attn_implementation,
    )
    plan = [None]
    if rank == 0:
        metas = [vl_cache.make_meta(encoder.recipe(), s, t, cfg.hash_images) for s, t in zip(sessions, ticks)]
        paths = [vl_cache.cache_path(root, s, vl_cache.fingerprint(meta)) for s, meta in zip(sessions, metas)]
        todo = [i for i, p in enumerate(paths) if not p.is_file()]
        shares = share_out([sizes[i] for i in todo], world)
        plan = [([[todo[j] for j in share] for share in shares], metas, paths)]
    if world > 1:
        dist.broadcast_object_list(plan)
    shares, metas, paths = plan[0]
    mine, missing = shares[rank], sum(map(len, shares))
    folder = root / vl_cache.FOLDER
    tokens = encoder.grid[0] * encoder.grid[1]
    print0(
        f"model     {cfg.model}, layer {cfg.layer}, {encoder.recipe()['compute_dtype']} on {world} x {device.type}; images as {encoder.size[1]}x{encoder.size[0]}, {tokens} tokens per view, {tokens * len(views)} per feature\n"
        f"cache     {folder}: {len(paths) - missing} of {len(paths)} sessions are there, {missing} to build, {sum(sizes[i] for share in shares for i in share)} features"
    )
    folder.mkdir(parents=True, exist_ok=True)
    size = max([0, *(len(ticks[i]) for i in mine)]) * cfg.tokens * encoder.width * 4
    ckpt.require_space(folder, 2 * size)

    # ---- build
    builder, stop, done, computed, seconds = (
        Builder(encoder, cfg.micro_batch, cfg.num_workers),
        ckpt.StopSignal(),
        0,
        0,
        0.0,
    )
    bar = tqdm(
        total=sum(sizes[i] for i in mine),
        desc=f"features{f' (rank {rank})' if world > 1 else ''}",
        unit="feature",
        disable=None if rank == 0 else True,
    )

    def progress(n):
        bar.update(n)
        return stop.received is None

    if mine:
        encoder.vlm  # loading is no part of the speed
    for i in mine:
        began = time.perf_counter()
        result = builder.features(sessions[i], ticks[i], progress)
        if result is None:
            break
        vl_cache.write_features(root, sessions[i], ticks[i], result[0], metas[i])
        seconds, computed, done = seconds + time.perf_counter() - began, computed + result[1], done + 1
    bar.close()
    stop.restore()
    if builder.micro_batch < cfg.micro_batch:
        print(
            f"warning   rank {rank}: memory ran out at micro_batch {cfg.micro_batch}, went on with {builder.micro_batch}"
        )
    totals = torch.tensor([computed, seconds, done], dtype=torch.float64)
    if world > 1:
        dist.all_reduce(totals)  # waits for the slowest
    computed, seconds, done = totals.tolist()
    if done < missing:
        print0(
            f"stopped by signal; {int(done)} of {missing} sessions were finished and stay. Continue with the same command"
        )
        return 1

    # ---- report
    status = 0
    if rank == 0:
        disk = sum(p.stat().st_size for p in paths)
        print(f"cache     {len(paths)} sessions, {sum(map(len, ticks))} ticks, {disk / 1e6:.2f} MB in {folder}")
        if computed:
            each = seconds / computed
            print(
                f"speed     {computed / seconds * world:.2f} features/s ({1000 * each:.1f} ms each per process, {world} processes)\n"
                f"break-even online, every step computes its own feature: {steps} per epoch, {steps * each / world:.1f} s. The cache took {computed * each / world:.1f} s: "
                f"it pays after {computed / max(1, steps):.2f} epochs"
            )
        if cfg.prune:
            deleted, others = prune(folder, sessions, paths)
            print(
                f"pruned    {len(deleted)} files"
                + (f"; {others} of sessions that are not below {', '.join(cfg.dataset_dirs)} stay" if others else "")
            )
        if cfg.verify:
            worst = verify(encoder, sessions, ticks, paths, cfg.verify)
            print(
                f"verified  {cfg.verify} features computed again: largest difference {worst:.2e} of the feature's length"
            )
        print(
            f"train: python train_async.py --dataset_dir {' '.join(cfg.dataset_dirs)} --vlm-reuse-count {cfg.vlm_reuse_count}"
            + (f" --cache-root {cfg.cache_root}" if cfg.cache_root else "")
        )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    config = parse_config(
        Config,
        aliases={
            "dataset_dir": "dataset_dirs",
            "resize_height": "image_resize_height",
            "resize_width": "image_resize_width",
        },
    )
    try:
        sys.exit(main(config))
    except (ValueError, FileNotFoundError, ckpt.DiskFull) as error:
        sys.exit(f"build_vl_cache.py: {error}")
