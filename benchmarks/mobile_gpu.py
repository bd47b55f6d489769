"""train_mobile_kosmos.py at real size on one GPU, random weights: windows/s, peak memory, and the latency of predict.

    python benchmarks/mobile_gpu.py | tee benchmarks/results/mobile_gpu_$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' _).txt
    python benchmarks/mobile_gpu.py --layers 2 --width 256 --window 2 --accumulation 2 --steps 2 --warmup 1  # any machine

Kosmos-2's sizes (24 + 24 layers, width 2048, 64 image tokens), LoRA 32 on the text model, the four-layer LSTM; batch 1 x
accumulation 8, window 8, as in guide 4; a sample is an episode with all its windows. Speed and memory do not depend on
the values of the weights. Samples are made beforehand, so this is the model's side of a step: forward, backward, clipping, AdamW.
"""  # noqa: E501  a command line

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import Kosmos2Config

import make_demo
import train_mobile_kosmos as mobile
from common.run import to_device

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def prepare(args, folder, bf16):
    """-> (policy around a random model of real size, `accumulation` windows on the device)"""
    cfg = mobile.Config(model=str(folder / "kosmos2"), window_size=args.window)
    cfg.dataset.data_dir, cfg.dataset.episode_pattern = str(folder / "data"), "*.h5"
    data, backbone = mobile.load_data(cfg), mobile.open_backbone(cfg.model)
    text = dict(embed_dim=args.width, ffn_dim=4 * args.width, attention_heads=max(1, args.width // 64))
    vision = dict(num_hidden_layers=args.layers)
    backbone.config = Kosmos2Config(text_config=dict(layers=args.layers, **text), vision_config=vision)
    prompt = mobile.Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    mobile.load_weights = lambda *_, **__: []  # they stay random
    model = mobile.build_model(cfg, backbone, prompt, DEVICE, torch.bfloat16 if bf16 else torch.float32).train()

    def read(path, frames):
        return np.stack([mobile.picture_reader(path, "bgr", 224)(i) for i in frames])

    dataset = mobile.MobileVLAH5Dataset(data.train, cfg, read, prompt)
    windows = [dataset.collater([dataset[(0, i % len(dataset))]]) for i in range(args.accumulation)]
    policy = mobile.Policy(model, prompt, cfg, 224, vars(data), bf16)
    return policy, [to_device(window, DEVICE) for window in windows]


def measure(args, folder, bf16):
    policy, windows = prepare(args, folder, bf16)
    model, kind = policy.model, "bf16" if bf16 else "fp32"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=CUDA or None)
    elements = 2 * sum(int(window["chunck_mask"].sum()) for window in windows)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def step():
        for window in windows:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                loss = model(window)["loss_sum"] / elements
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = timed(step, args.steps, args.warmup)
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
    sizes = f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} trained"
    count = sum(len(window["frames"]) for window in windows)
    speed = f"{count / seconds:.2f} windows/s, {seconds * 1e3:.1f} ms per step, peak {memory:.2f} GB"
    print(f"{kind} window {args.window}, batch 1 x {args.accumulation}: {speed}, {sizes}", flush=True)
    model.eval()
    image = np.zeros((720, 1280, 3), np.uint8)
    newest = dict(images=dict(camera=image), instruction=make_demo.MOBILE_GOAL)
    seconds = timed(lambda: policy.predict([newest]), args.window + 2, 1)
    print(f"{kind} predict, one new 1280x720 image: {seconds * 1e3:.1f} ms", flush=True)


def timed(function, times, warmup):
    """-> seconds per call"""
    for i in range(warmup + times):
        if i == warmup:
            wait()
            start = time.perf_counter()
        function()
    wait()
    return (time.perf_counter() - start) / times


def wait():
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24, help="of the text model and of the vision tower")
    parser.add_argument("--width", type=int, default=2048, help="of the text model")
    args = parser.parse_args()
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        make_demo.write_mobile(Path(name) / "data", episodes=4)
        make_demo.write_kosmos2(Path(name) / "kosmos2")
        for bf16 in (True, False) if CUDA else (False,):
            try:
                measure(args, Path(name), bf16)
            except torch.OutOfMemoryError:
                print(f"{'bf16' if bf16 else 'fp32'}: out of memory", flush=True)
