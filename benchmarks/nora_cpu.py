"""What train_nora.py adds to the work that has to be done anyway, as ratios measured in one run on this CPU.

    python benchmarks/nora_cpu.py            # about 3 minutes; the numbers in the docs are from results/nora_cpu.txt

loader   samples/s of the dataset (open files, bounds, chunking, dict) / samples/s of the bare calls: h5py read, JPEG
         decode, resize. 640x480, shuffled.
start    seconds to find, read and check 1,000 episodes / seconds to read the same arrays with bare h5py calls; files
         left open.
step     seconds of a training step of the whole program / seconds of forward + backward + clip + AdamW on the same
         batches; the 20th percentile of 36 steps of each, five pairs, because a shared machine has slow moments.
windows  seconds of the vision tower with all windows in one attention call / with transformers' loop over them.
"""

import contextlib
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
from common.log import read_metrics
from common.sampler import GlobalOrder, RankBatches

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
    pictures = np.empty(400, object)
    pictures[:] = [np.zeros(128 + i % 2, np.uint8) for i in range(400)]  # never decoded here
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
    files = f"files open afterwards: {left}; at most {ep.MAX_OPEN_FILES} per process while training"
    print(f"start    1,000 episodes, 400,000 frames: {times}; {files}", flush=True)


def step(folder):
    make_demo.write_insertion(folder / "train", episodes=8, size=(240, 320))
    make_demo.write_qwen2_5_vl(folder / "qwen", text=(256, 4), vision=(128, 4))
    steps, skip = 40, 4
    words = "--fast fit --horizon 8 --use_ee_pose_delta_as_action --batch_size 8 --gradient_accumulation_steps 1"
    flags = ["--dataset.root_dir", folder / "train", "--model", folder / "qwen", *words.split()]
    flags += ["--resize_resolution", 112, 112, "--num_workers", 1, "--max_steps", steps, "--logging_frequency", 1]
    cfg = config(*flags)
    data = nora.load_data(cfg)
    fast, processor = nora.fit_fast(cfg, data), nora.Processor(cfg.model, data.spec)
    dataset, collate = nora.NoraDataset(data.train, data.spec), nora.Collate(processor, fast, data.spec.normalizer)
    order = RankBatches(GlobalOrder(len(dataset), cfg.seed), 8, steps=steps)
    batches = [collate([dataset[k] for k in keys]) for keys in order]

    def whole(name):
        with contextlib.redirect_stdout(io.StringIO()):  # what a training says is not the benchmark's
            nora.main(config(*flags, "--output_dir", folder / name))
        times = [r["time"] for r in read_metrics(folder / name) if "train_loss" in r]
        return np.percentile(np.diff(times[skip:]), 20)

    def bare():
        core, _ = nora.build_model(cfg, processor, torch.device("cpu"), torch.float32, "sdpa")
        optimizer = torch.optim.AdamW(core.parameters(), lr=5e-5, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-8)
        times = []
        for batch in batches:
            t = time.perf_counter()
            (core(batch)["loss_sum"] / len(batch["targets"])).backward()
            torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - t)
        return np.percentile(times[skip:], 20)

    pairs = np.array([[whole(f"run{k}"), bare()] for k in range(5)])
    whole_ms, bare_ms = np.median(pairs, axis=0) * 1e3
    all_pairs = ", ".join(f"{a / b - 1:+.1%}" for a, b in pairs)
    print(f"step     whole program {whole_ms:.0f} ms, forward + backward + clip + AdamW {bare_ms:.0f} ms", flush=True)
    print(f"         overhead {np.median(pairs[:, 0] / pairs[:, 1]) - 1:+.1%} (pairs {all_pairs})", flush=True)


def windows():
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VisionTransformerPretrainedModel,
        Qwen2_5_VLVisionAttention as attention,
    )

    from common.qwen_vl import batch_vision_attention

    batch_vision_attention()
    sizes = dict(depth=4, hidden_size=256, intermediate_size=512, num_heads=4, out_hidden_size=256)
    config = Qwen2_5_VLVisionConfig(**sizes, fullatt_block_indexes=[3])
    tower = Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa").eval()
    patches, grid, batched = torch.randn(16 * 256, 1176), torch.tensor([[1, 16, 16]] * 16), attention.forward

    def run(forward):
        attention.forward = forward
        with torch.no_grad():
            tower(patches, grid)
        attention.forward = batched

    run(batched)
    fast, slow = interleaved(lambda: run(batched), lambda: run(attention.looped_forward))
    times = f"{fast * 1e3:.0f} ms batched, {slow * 1e3:.0f} ms looped; ratio {fast / slow:.2f}"
    print(f"windows  16 images of 224x224, 4 layers: {times}", flush=True)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, 1 thread, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        loader(Path(folder))
        start(Path(folder))
        step(Path(folder))
        windows()
