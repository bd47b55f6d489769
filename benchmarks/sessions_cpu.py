"""What data.pkl, the mapped sensor stream and the feature cache save, as ratios measured in one run on this CPU; files in the page cache.

    python benchmarks/sessions_cpu.py                # under a minute; the numbers in README come from results/sessions_cpu.txt

start    seconds to open 20 recordings of 20 s (2,000 rows, 5 views of 100 images) from data.pkl / by reading the CSV, listing the images and matching.
window   seconds of one 650-row sensor window of the mapped stream, shuffled / of a 213 MB .npz that is opened anew for it, as np.load does.
feature  seconds of one 2048-wide feature of the session's mapped file, shuffled / of torch.load of a file that holds this one feature.
item     seconds of everything that a training sample needs from the disk: feature, targets and a window of 65 or 650 rows.
"""

import contextlib
import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import create_datapkl as cd
import make_demo
from common import checkpoint as ckpt
from common import sessions as ss
from common import vl_cache as vc
from common.config import parse_config

torch.set_num_threads(1)
VIEWS = ["View1", "View2", "View3", "View4", "View5"]


def preprocess(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        cd.main(parse_config(cd.Config, ["--dataset_dirs", str(folder), "--workers", "0"]))


def median_ms(function, items):
    """Median milliseconds of function(item)."""
    times = []
    for item in items:
        start = time.perf_counter()
        function(item)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def write_recording(folder, rng, start):
    """20 s at 100 Hz in the old layout, with sensor; the images are empty files, for nothing here opens them."""
    t = start + np.arange(2000) / 100
    pose = np.cumsum(rng.normal(0, 0.02, (2000, 6)), axis=0)
    for v in VIEWS:
        (folder / v / "left").mkdir(parents=True)
        for k in range(100):
            (folder / v / "left" / f"zed_1_left_{start + k / 5:.3f}.jpg").touch()
    np.savetxt(
        folder / f"robot_state_{int(start)}.csv",
        np.column_stack([t, t, t, 0 * t, pose, pose]),
        "%.17g",
        ",",
        header=make_demo.CSV_COLUMNS.format(force="force_placeholder"),
        comments="",
    )


def start(folder):
    rng, folders = np.random.default_rng(0), [folder / f"White/recv_all_{i}" for i in range(20)]
    for i, f in enumerate(folders):
        write_recording(f, rng, 1761551500.0 + 60 * i)
    preprocess(folder)

    def raw(f):
        kind, log, sensor, images, nameless = cd.describe(f)
        stamps, rows, _ = cd.read_robot(log)
        cd.match_steps(stamps, 0.1, 0.02)

    csv, pkl = (median_ms(lambda _: [read(f) for f in folders], range(5)) for read in (raw, ss.Session))
    print(f"start    20 recordings: CSV {csv:.0f} ms, data.pkl {pkl:.1f} ms: {csv / pkl:.0f} times", flush=True)


def disk(folder):
    rng = np.random.default_rng(0)
    path = folder / "one/recv_all_1"
    write_recording(path, rng, 1761551500.0)
    rows = rng.normal(size=(13000, 1026)).astype(np.float32)
    stamps = 1761551500.0 + np.arange(13000) / 650
    np.savez(path / "sensor_data_1.npz", timestamps=stamps, forces=rows[:, 0], alines=rows[:, 1:])
    preprocess(path)
    session = ss.Session(path)
    windows = folder / "windows.npz"
    np.savez(windows, timestamps=np.arange(80.0), data=np.zeros((80, 650, 1026), np.float32) + rows[:650])

    def from_npz(k):
        with np.load(windows) as z:
            return z["data"][k]

    steps = rng.integers(20, len(session), 400)
    npz, mapped, short = (
        median_ms(from_npz, rng.integers(0, 80, 8)),
        median_ms(lambda k: session.sensor_window(int(k), 650), steps),
        median_ms(lambda k: session.sensor_window(int(k), 65), steps),
    )
    print(
        f"window   650 rows: .npz {npz:.0f} ms, mapped {mapped:.3f} ms: {npz / mapped:.0f} times; 65 rows mapped {short:.3f} ms",
        flush=True,
    )

    ticks = session.ticks(3, ["View1"])
    one = folder / "features"
    one.mkdir()
    features = torch.randn(len(ticks), 1, 2048, dtype=torch.float16)
    for i, f in enumerate(features):
        torch.save(f[None].clone(), one / f"{i}.pt")
    ckpt.save_state(
        folder / "all.pt",
        dict(features=features, tick_timestamps=torch.from_numpy(ticks.tick_time), frame_index={}, meta={}),
    )
    file = vc.FeatureFile(folder / "all.pt")
    chosen = rng.integers(0, len(ticks), 2000)
    per_file, row = (
        median_ms(lambda i: torch.load(one / f"{i}.pt", weights_only=True).float(), chosen),
        median_ms(lambda i: file.features[int(i)].float(), chosen),
    )
    print(
        f"feature  one file each, torch.load {per_file:.3f} ms; one row of the session's file {row:.4f} ms: {per_file / row:.0f} times",
        flush=True,
    )

    for window in (65, 650):

        def item(k):
            tick = session.tick_of_step(int(k), 3, 3)
            return file.features[int(tick)].float(), session.targets(int(k), 8), session.sensor_window(int(k), window)

        print(
            f"item     window {window}: {median_ms(item, steps):.3f} ms, {1000 / median_ms(item, steps):.0f} samples/s of one process",
            flush=True,
        )


if __name__ == "__main__":
    print(f"torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} CPU cores")
    with tempfile.TemporaryDirectory() as name:
        start(Path(name))
        disk(Path(name))
