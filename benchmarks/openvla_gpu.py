"""train_openvla_vamos.py at real size (7.5 B, LoRA r 32) on one GPU: samples/s, MFU and peak memory of a step, the
largest batch inside 24 GB, and the time of predict.

    python benchmarks/openvla_gpu.py                                                      # random weights
    python benchmarks/openvla_gpu.py --base openvla/openvla-7b                            # and 4-bit with bitsandbytes
    python benchmarks/openvla_gpu.py --layers 2 --width 128 --batch_size 2 --steps 3      # any machine: does it run

Speed and memory do not depend on the values of the weights, so without --base they are random. A batch has the model's
pictures and 40 tokens per sample (a prompt with a goal point, two actions, end of sequence): this is the model's side
of a step: forward, backward, clipping, AdamW. MFU counts 2 FLOPs per weight and position forward and 2 for the gradient
of activations; adapters, attention, recomputation and the head (3 rows per sample) are not counted; over the card's
dense bf16 peak (--peak_tflops). OpenVLA's authors report about 72 GB at batch 16 (A100)."""

import argparse
import gc
import importlib.util
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train_openvla_vamos as openvla
from modeling_openvla import TOWERS, OpenVLAConfig, OpenVLAForActionPrediction, PrismaticImageProcessor

PEAKS = {"H200": 989, "H100": 989, "A100": 312, "RTX 3090": 71, "RTX 4090": 165}  # dense bf16 TFLOP/s, data sheets
TOKENS, CARD_BYTES = 40, 24 * 2**30
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def model_config(args):
    """openvla-7b, or the same with fewer layers and another width everywhere."""
    if args.layers == 32 and args.width == 4096:
        return OpenVLAConfig()
    towers, heads = {}, args.width // 64
    for name, size in zip(("featurizer", "fused_featurizer"), TOWERS.values(), strict=True):
        towers[name] = size | dict(embed_dim=args.width, depth=min(size["depth"], args.layers), num_heads=heads)
    text = dict(hidden_size=args.width, intermediate_size=args.width * 11008 // 4096, num_hidden_layers=args.layers)
    text |= dict(num_attention_heads=heads, num_key_value_heads=heads)
    return OpenVLAConfig(text_config=text, vision_sizes=towers)


def random_model(config):
    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        vla = OpenVLAForActionPrediction(config)
    torch.set_default_dtype(torch.float32)
    llama = vla.language_model.model
    llama.rotary_emb = type(llama.rotary_emb)(config=config.text_config).to(DEVICE)
    return vla.requires_grad_(False).eval()


def build(args, checkpointing, four_bit):
    """-> LossModel with its LoRA, as build_model makes it"""
    cfg = openvla.Config(lora_rank=args.lora_rank, gradient_checkpointing=checkpointing, use_quantization=four_bit)
    cfg.vla_path = args.base or "random weights"
    if not args.base:
        openvla.load_vla = lambda *_: random_model(model_config(args))
    folder = openvla.local_folder(args.base) if args.base else None
    vla = openvla.build_model(cfg, folder, DEVICE, DTYPE).get_base_model()
    return openvla.LossModel(vla, PrismaticImageProcessor()).train()


def batch_of(size, vla):
    patches, generator = vla.vision_backbone.patches, torch.Generator().manual_seed(0)
    ids = torch.randint(3, 29000, (size, TOKENS), generator=generator)
    ids[:, -3:] = torch.tensor([31800, 31900, 2])
    rows = torch.arange(size)[:, None] * (patches + TOKENS) + patches + torch.arange(TOKENS - 4, TOKENS - 1)
    images = torch.randint(0, 255, (size, *vla.config.image_sizes, 3), generator=generator, dtype=torch.uint8)
    batch = dict(images=images, input_ids=ids, rows=rows.flatten(), targets=ids[:, -3:], counts=[1] * size)
    batch |= dict(at=torch.arange(3 * size).view(size, 3))
    return openvla.to_device(batch, DEVICE)


def one_step(core, trained, optimizer, batch):
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
        loss = core(batch)["loss_sum"] / (3 * len(batch["images"]))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights_in(modules):
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim > 1)


def flops_per_sample(config):
    """of one training step, from the sizes: everything that runs but the head"""
    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(config)
    seen, read = [vla.projector], [vla.language_model.model.layers]
    for tower in vla.vision_backbone.children():
        seen += [tower.blocks[:-1], tower.patch_embed]
    patches = vla.vision_backbone.patches
    return 4 * (weights_in(seen) * patches + weights_in(read) * (patches + TOKENS))


def timed(steps, function, *args):
    """-> seconds per call"""
    sync()
    start = time.perf_counter()
    for _ in range(steps):
        function(*args)
    sync()
    return (time.perf_counter() - start) / steps


def sync():
    if CUDA:
        torch.cuda.synchronize()


def measure(args, checkpointing, four_bit):
    core = build(args, checkpointing, four_bit)
    trained = [p for p in core.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-4, fused=CUDA or None)
    kind = "4-bit" if four_bit else str(DTYPE).removeprefix("torch.")
    label = f"checkpointing {str(checkpointing):<5} {kind}"
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    try:
        step = (core, trained, optimizer, batch_of(args.batch_size, core.vla))
        timed(args.warmup, one_step, *step)
        seconds = timed(args.steps, one_step, *step)
        rate = args.batch_size * flops_per_sample(core.vla.config) / seconds / 1e12
        speed = f"MFU {rate / args.peak_tflops:.1%}" if args.peak_tflops else f"{rate:.3f} TFLOP/s"
        memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
        text = f"{args.batch_size / seconds:8.2f} samples/s, {seconds * 1e3:8.1f} ms, {speed}, peak {memory:.1f} GB"
        count = sum(p.numel() for p in trained)
        print(f"{label} batch {args.batch_size:>3}: {text}, {count:,} trained", flush=True)
    except torch.OutOfMemoryError:
        print(f"{label} batch {args.batch_size:>3}: out of memory", flush=True)
    if CUDA:
        optimizer.zero_grad(set_to_none=True)
        print(f"{label} largest batch inside 24 GiB: {largest(core, trained, optimizer)}", flush=True)
    if not checkpointing and not four_bit:
        core.eval()
        batch = batch_of(1, core.vla)
        ids, pixels = batch["input_ids"][:, :-4], core.image_processor.normalize(batch["images"])
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            core.vla.generate_action_ids(ids, pixels, 2)
            seconds = timed(args.steps, core.vla.generate_action_ids, ids, pixels, 2)
        print(f"predict one picture, adapter not merged: {seconds * 1e3:.0f} ms", flush=True)


def largest(core, trained, optimizer):
    """The largest batch that trains inside 24 GiB; a limit of this process stands for the smaller card."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, CARD_BYTES / torch.cuda.mem_get_info()[1]))
    fits = 0
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64):
        try:
            timed(2, one_step, core, trained, optimizer, batch_of(size, core.vla))
            fits = size
        except torch.OutOfMemoryError:
            break
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.set_per_process_memory_fraction(1.0)
    return fits or "none"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="OpenVLA directory or hub id; default: random weights of the same size")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lora_rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--peak_tflops", type=float, help=f"dense bf16 peak of the card (known: {', '.join(PEAKS)})")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    args.peak_tflops = args.peak_tflops or next((v for k, v in PEAKS.items() if k in name), None)
    four_bit = CUDA and args.base and importlib.util.find_spec("bitsandbytes")
    print(f"{name}, torch {torch.__version__}; {args.base or 'random weights'}")
    print(f"4-bit {'measured too' if four_bit else 'not measured: it needs CUDA, bitsandbytes and --base'}")
    for checkpointing, quantized in ((False, False), (True, False), *([(True, True)] if four_bit else [])):
        measure(args, checkpointing, quantized)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
