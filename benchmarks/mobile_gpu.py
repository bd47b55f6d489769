"""train_mobile_kosmos.py at real size on one GPU, random weights: windows/s and peak memory with images and with cached image embeddings, and the latency of predict.

    python benchmarks/mobile_gpu.py | tee benchmarks/results/mobile_gpu_$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' _).txt
    python benchmarks/mobile_gpu.py --layers 2 --width 256 --window 2 --accumulation 2 --steps 2 --warmup 1    # any machine: does it run

Kosmos-2's sizes (24 + 24 layers, width 2048, 64 image tokens), LoRA 32 on the text model, the four-layer LSTM; batch 1 x accumulation 8, window 8, as in guide 4. Speed and memory
do not depend on the values of the weights. Windows are made beforehand, so this is the model's side of a step: forward, backward, unscaling, clipping, AdamW. With images the
frozen tower encodes 8 frames of every window; with cached embeddings (dataset.feature_cache) it is not used at all.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import make_demo
import train_mobile_kosmos as mobile
from common.config import parse_config


def real_size(layers, width):
    """A random Kosmos-2 (the defaults of its config class), or the same with fewer layers and another width of the text model."""
    from transformers import Kosmos2Config, Kosmos2Model

    config = Kosmos2Config(
        text_config=dict(layers=layers, embed_dim=width, ffn_dim=4 * width, attention_heads=max(1, width // 64)),
        vision_config=dict(num_hidden_layers=layers),
    )
    with torch.device(DEVICE):
        return Kosmos2Model(config)


def measure(args, folder, precision, cached):
    cfg = parse_config(
        mobile.Config,
        [
            "--model",
            str(folder / "kosmos2"),
            "--data_dir",
            str(folder / "data"),
            "--episode_pattern",
            "*.h5",
            "--precision",
            precision,
            "--window_size",
            str(args.window),
        ],
        mobile.ALIASES,
    )
    autocast = mobile.pick_precision(precision, DEVICE.type)
    backbone = mobile.Backbone.open(cfg.model)
    prompt = mobile.Prompt(backbone.tokenizer, cfg.dataset.max_text_len)
    data = mobile.load_data(cfg, mobile.IMAGE_SIZE)
    model = mobile.build_model(
        cfg, backbone, prompt, DEVICE, None, vlm=real_size(args.layers, args.width).to(autocast or torch.float32)
    ).train()
    dataset = mobile.MobileVLAH5Dataset(data, data.train, cfg, prompt)
    windows = [
        mobile._process_batch(dataset.collater([dataset[(0, i % len(dataset))]]), DEVICE)
        for i in range(args.accumulation)
    ]
    if cached:
        with torch.no_grad(), torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            windows = [(model.image_embeds(w[0][0])[None].to(autocast or torch.float32), *w[1:]) for w in windows]
        for part in ("vision_model", "image_to_text_projection"):  # what a run with a complete cache need not touch
            getattr(model.backbone, part).to("cpu")
        if CUDA:
            torch.cuda.empty_cache()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = (
        torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01, fused=CUDA or None),
        torch.amp.GradScaler(DEVICE.type, enabled=autocast == torch.float16),
    )
    elements = 2 * sum(int(w[11].sum()) for w in windows)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def step():
        for window in windows:
            with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
                losses, _ = mobile.compute_loss(model, window, elements)
            scaler.scale(losses["loss"]).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return losses["loss"]

    for _ in range(args.warmup):
        step()
    sync()
    start = time.perf_counter()
    for _ in range(args.steps):
        loss = step()
    sync()
    seconds = (time.perf_counter() - start) / args.steps
    print(
        f"{precision:<10} {'cached embeddings' if cached else 'images':<18} window {args.window}, batch 1 x {args.accumulation}: "
        f"{args.accumulation / seconds:8.2f} windows/s, {seconds * 1e3:8.1f} ms per step, "
        f"peak {torch.cuda.max_memory_allocated() / 1e9 if CUDA else float('nan'):.2f} GB, {sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} trained, "
        f"loss {loss.item():.3f}",
        flush=True,
    )
    if not cached:
        policy, image = (
            mobile.Policy(model.eval(), prompt, data.spec, data.stats, autocast),
            np.zeros((720, 1280, 3), np.uint8),
        )
        policy.predict(image, make_demo.MOBILE_GOAL)
        sync()
        start = time.perf_counter()
        for _ in range(args.window + 2):  # the last two of them rerun the LSTM over the window
            policy.predict(image, make_demo.MOBILE_GOAL)
        sync()
        print(
            f"{precision:<10} predict, one new 1280x720 image: {(time.perf_counter() - start) / (args.window + 2) * 1e3:.1f} ms",
            flush=True,
        )


def sync():
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
    CUDA = torch.cuda.is_available()
    DEVICE = torch.device("cuda" if CUDA else "cpu")
    print(f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        make_demo.write_mobile(Path(folder) / "data", episodes=4)
        make_demo.write_kosmos2(Path(folder) / "kosmos2")
        for precision in ("16-mixed", "bf16-mixed", "32-true") if CUDA else ("32-true",):
            for cached in (False, True):
                try:
                    measure(args, Path(folder), precision, cached)
                except torch.OutOfMemoryError:
                    print(f"{precision:<10} {'cached embeddings' if cached else 'images'}: out of memory", flush=True)
                if CUDA:
                    torch.cuda.empty_cache()
