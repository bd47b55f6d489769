"""What data.pkl, the mapped sensor stream and the feature cache save, measured in one run on this CPU; files in the
page cache.

    python benchmarks/sessions_cpu.py        # under a minute; the numbers in docs/create_datapkl.md come from it

start    milliseconds to open 20 recordings of 20 s (2,000 rows, 5 views of 100 images) from data.pkl / by reading the
         CSV, listing the images and interpolating.
check    the same with a look whether each recording changed since, as every training does once.
window   one 650-row sensor window of the mapped stream, shuffled / of a 213 MB .npz opened anew, as np.load does.
feature  one 2048-wide feature of a session's mapped file, shuffled / of torch.load of a file with this one feature.
item     everything that a training sample needs from the disk: feature, targets and a window of 65 or 650 rows.
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

torch.set_num_threads(1)


def preprocess(folder):
    with contextlib.redirect_stdout(io.StringIO()):
        cd.main(cd.Config(dataset_dirs=[str(folder)], workers=0))


def median_ms(function, items):
    """Median milliseconds of function(item)."""
    times = []
    for item in items:
        start = time.perf_counter()
        function(item)
        times.append(time.perf_counter() - start)
    return 1000 * float(np.median(times))


def write_recording(folder, rng, start):
    """20 s at 100 Hz in the old layout; the images have 8 x 8 pixels, for nothing here decodes them."""
    t, picture = start + np.arange(2000) / 100, make_demo.jpeg(np.zeros((8, 8, 3), np.uint8))
    pose = np.cumsum(rng.normal(0, 0.02, (2000, 6)), axis=0)
    for view in range(1, 6):
        place = folder / f"View{view}/left"
        place.mkdir(parents=True)
        for k in range(100):
            (place / f"zed_1_left_{start + k / 5:.3f}.jpg").write_bytes(picture)
    header, table = make_demo.CSV_COLUMNS.format(force="force"), np.column_stack([t, t, t, 0 * t, pose, pose])
    np.savetxt(folder / f"robot_state_{int(start)}.csv", table, "%.17g", ",", header=header, comments="")


def start(folder):
    rng, folders = np.random.default_rng(0), [folder / f"White/recv_all_{i}" for i in range(20)]
    for i, f in enumerate(folders):
        write_recording(f, rng, 1761551500.0 + 60 * i)
    preprocess(folder)

    def raw(f):
        log = cd.describe(f)[1]
        stamps, rows = cd.read_robot(log)
        cd.read_motion(log, stamps, rows, cd.Config(), [])

    csv, pkl = (median_ms(lambda _, read=read: [read(f) for f in folders], range(5)) for read in (raw, ss.Session))
    whole = median_ms(lambda _: ss.find_sessions([folder]), range(5))
    print(f"start    20 recordings: CSV {csv:.0f} ms, data.pkl {pkl:.1f} ms: {csv / pkl:.0f} times", flush=True)
    print(f"check    found, opened and compared with the recordings: {whole:.1f} ms", flush=True)


def disk(folder):
    rng, path = np.random.default_rng(0), folder / "one/recv_all_1"
    write_recording(path, rng, 1761551500.0)
    rows = rng.normal(size=(13000, 1026)).astype(np.float32)
    stamps = 1761551500.0 + np.arange(13000) / 650
    np.savez(path / "sensor_data_1.npz", timestamps=stamps, forces=rows[:, 0], alines=rows[:, 1:])
    preprocess(path)
    session, windows = ss.Session(path), folder / "windows.npz"
    np.savez(windows, timestamps=np.arange(80.0), data=np.zeros((80, 650, 1026), np.float32) + rows[:650])

    def from_npz(k):
        with np.load(windows) as z:
            return z["data"][k]

    steps = rng.integers(20, len(session), 400)
    npz = median_ms(from_npz, rng.integers(0, 80, 8))
    mapped, short = (median_ms(lambda k, n=n: np.array(session.sensor_window(int(k), n)), steps) for n in (650, 65))
    times = f"{npz / mapped:.0f} times; 65 rows mapped {short:.3f} ms"
    print(f"window   650 rows: .npz {npz:.0f} ms, mapped {mapped:.3f} ms: {times}", flush=True)

    ticks = session.ticks(3, ["View1"])
    features = torch.randn(len(ticks.start), 1, 2048, dtype=torch.float16)
    for i, feature in enumerate(features):
        torch.save(feature[None].clone(), folder / f"{i}.pt")
    ckpt.save_state(folder / "all.pt", dict(features=features))
    features = ckpt.load_state(folder / "all.pt")["features"]
    chosen = rng.integers(0, len(features), 2000)
    alone = median_ms(lambda i: torch.load(folder / f"{i}.pt", weights_only=True).float(), chosen)
    row = median_ms(lambda i: features[int(i)].float(), chosen)
    print(
        f"feature  a file each {alone:.3f} ms; a row of the session's {row:.4f} ms: {alone / row:.0f} times", flush=True
    )

    for window in (65, 650):

        def item(k, window=window):
            tick = session.tick_of_step(int(k), 3)
            return (
                features[int(tick)].float(),
                session.targets(int(k), 8),
                np.array(session.sensor_window(int(k), window)),
            )

        each = median_ms(item, steps)
        print(f"item     window {window}: {each:.3f} ms, {1000 / each:.0f} samples/s of one process", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, numpy {np.__version__}, {os.cpu_count()} CPU cores")
    with tempfile.TemporaryDirectory() as name:
        start(Path(name))
        disk(Path(name))
