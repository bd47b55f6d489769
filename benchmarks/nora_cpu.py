"""What train_nora.py adds to the work that has to be done anyway, as ratios measured in one run on this CPU.

    python benchmarks/nora_cpu.py            # about 3 minutes; the numbers in the docs are from results/nora_cpu.txt

loader   samples/s of the dataset (open files, bounds, chunking, dict) / samples/s of the bare calls of upstream's
         loaders: h5py read, JPEG decode and resize by Pillow. 640x480, shuffled.
start    seconds of a later start with 1,000 episodes (find, check, read the index) / seconds to read the same arrays
         with bare h5py calls; files left open.
windows  CPU seconds of the vision tower with windows of one length in one attention call / with transformers' loop.
"""

import io
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the loader's worker has the other core
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import h5py
import numpy as np
import torch
from PIL import Image

import make_demo
import train_nora as nora
from common import episodes as ep
from common.config import parse_config

torch.set_num_threads(1)


def interleaved(a, b, rounds=5):
    """Median seconds of two functions called in turn, so that a slow moment of the machine hits both."""
    times = np.array([[timed(a), timed(b)] for _ in range(rounds)])
    return np.median(times, axis=0)


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def config(*flags):
    return parse_config(nora.Config, [str(f) for f in flags], nora.ALIASES)


def loader(folder):
    for layout in ("jpeg", "raw", "gzip"):
        make_demo.write_insertion(folder / layout, episodes=6, size=(480, 640), layout=layout, max_frames=20)
        data = nora.load_data(
            config("--dataset.root_dir", folder / layout, "--horizon", 10, "--use_ee_pose_delta_as_action")
        )
        dataset = nora.NoraDataset(data.train, data.spec)
        order = np.random.default_rng(0).permutation(len(dataset))[:60]
        files = {e.path: h5py.File(e.path, "r", locking=False) for e in data.train}

        def bare(data=data, dataset=dataset, order=order, files=files, layout=layout):
            for i in order:
                e, t = dataset.locate(i)
                value = files[data.train[e].path]["observations/images/side_camera"][t]
                image = Image.open(io.BytesIO(value.tobytes())) if layout == "jpeg" else Image.fromarray(value)
                np.asarray(image.convert("RGB").resize((224, 224), Image.BICUBIC))

        def ours(dataset=dataset, order=order):
            for i in order:
                dataset[(0, i)]

        bare(), ours()
        slow, fast = interleaved(ours, bare)
        speeds = f"{len(order) / slow:7.0f} samples/s, bare {len(order) / fast:7.0f}; ratio {fast / slow:.2f}"
        print(f"loader   {layout:<5} {speeds}", flush=True)
        for f in files.values():
            f.close()


def start(folder):
    file, pictures = io.BytesIO(), np.empty(400, object)
    Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(file, "JPEG")
    pictures[:] = [np.frombuffer(file.getvalue() + bytes(i % 2), np.uint8) for i in range(400)]
    for i in range(1000):
        path = folder / "many" / f"episode_{i:04d}.h5"
        path.parent.mkdir(exist_ok=True)
        with h5py.File(path, "w") as f:
            for key in ("action", "observations/ee_pose", "observations/qpos"):
                f.create_dataset(
                    key,
                    data=np.random.default_rng(i).normal(size=(400, 6)).astype(np.float32).cumsum(0),
                    compression="gzip",
                )
            images = f.create_dataset("observations/images/side_camera", (400,), dtype=h5py.vlen_dtype(np.uint8))
            images[:] = pictures

    def bare():
        for p in sorted((folder / "many").iterdir()):
            with h5py.File(p, "r") as f:
                [f[key][:] for key in ("action", "observations/ee_pose", "observations/qpos")]

    flags = ["--horizon", 10, "--use_ee_pose_delta_as_action", "--num_val_episodes", 20]

    def ours():
        nora.load_data(config("--dataset.root_dir", folder / "many", *flags))

    ours_s, bare_s = interleaved(ours, bare, rounds=3)
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    left = sum("episode_" in os.readlink(link) for link in links if link.exists())
    times = f"{ours_s:.1f} s, bare reading {bare_s:.1f} s; ratio {ours_s / bare_s:.2f}"
    files = f"files open afterwards: {left}; at most {ep.files_to_keep()} per process while training"
    print(f"start    1,000 episodes, 400,000 frames: {times}; {files}", flush=True)


def windows():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionAttention as attention,
    )

    from common.qwen_vl import batch_vision_attention

    batch_vision_attention()
    sizes = dict(depth=4, hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=64)
    config = Qwen2_5_VLVisionConfig(**sizes, fullatt_block_indexes=[3])
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").eval()
    for rows, columns, what in ((16, 16, "16 images of 224x224"), (24, 44, "20 images of 616x336")):
        count = int(what.split()[0])
        patches, grid = torch.randn(count * rows * columns, 1176), torch.tensor([[1, rows, columns]] * count)
        times = []
        for forward in [attention.forward, attention.looped_forward] * 6:
            batched, attention.forward = attention.forward, forward
            begin = time.process_time()
            with torch.no_grad():
                tower(patches, grid)
            times.append(time.process_time() - begin)
            attention.forward = batched
        fast, slow = np.median(np.array(times[2:]).reshape(-1, 2), axis=0) * 1e3
        print(f"windows  {what}, 4 narrow layers: {fast:.0f} ms of CPU, looped {slow:.0f} ms; {slow / fast:.2f} x")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, 1 thread, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        loader(Path(folder))
        start(Path(folder))
        windows()
