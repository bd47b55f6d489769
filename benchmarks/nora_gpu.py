"""train_nora.py at real size on one GPU, random weights: samples/s, MFU and peak memory of full, lora and head
training, and of decoding.

    python benchmarks/nora_gpu.py | tee benchmarks/results/nora_gpu.txt
    python benchmarks/nora_gpu.py --layers 2 --width 256 --batch_size 2 --steps 3         # any machine: does it run

Speed and memory do not depend on the values of the weights. Batches are made beforehand (real prompt, real FAST
lengths, 224x224), so this is the model's side of a step: forward, backward, clipping, AdamW. MFU counts 2 FLOPs per
weight and token forward, 2 for the gradient of activations and 2 for the gradient of weights where they are trained,
attention not counted, over the card's dense bf16 peak (--peak_tflops).
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
import train_nora as nora
from common.config import parse_config
from common.qwen_vl import batch_vision_attention, pick_attention
from common.run import to_device

PEAKS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "RTX 3090": 71,
    "RTX 4090": 165,
}  # dense bf16 TFLOP/s, from the makers' data sheets


def real_size(vocabulary, ids, layers, width):
    """A random Qwen2.5-VL-3B (reference: its config.json), or the same with fewer layers and another width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    heads = width // 128
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=max(vocabulary, 153728 if width == 2048 else 0),
            hidden_size=width,
            intermediate_size=width * 11008 // 2048,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=min(32, layers),
            hidden_size=1280,
            intermediate_size=3420,
            num_heads=16,
            out_hidden_size=width,
            fullatt_block_indexes=[7, 15, 23, 31],
            window_size=112,
        ),
        tie_word_embeddings=True,
        **ids,
    )
    config._attn_implementation = pick_attention("auto", DEVICE)
    with torch.device(DEVICE):
        return Qwen2_5_VLForConditionalGeneration(config)


def measure(args, folder, train, checkpointing, windows="batched"):
    words = f"--train {train} --horizon 10 --use_ee_pose_delta_as_action --gradient_checkpointing {checkpointing}"
    paths = ["--model", str(folder / "qwen"), "--dataset.root_dir", str(folder / "data")]
    cfg = parse_config(nora.Config, [*words.split(), *paths], nora.ALIASES)
    data = nora.load_data(cfg)
    fast, processor = nora.fit_fast(cfg, data, most=4000), nora.Processor(cfg.model, data.spec)
    dataset, collate = nora.NoraDataset(data.train, data.spec), nora.Collate(processor, fast, data.spec.normalizer)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(dataset), args.batch_size) for _ in range(4)]
    batches = [to_device(collate([dataset[(0, int(i))] for i in pick]), DEVICE) for pick in picks]
    batch_vision_attention()
    from transformers import GenerationConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention as attention

    batched = attention.forward
    attention.forward = batched if windows == "batched" else attention.looped_forward
    torch.manual_seed(0)
    vocabulary = processor.tokenizer.get_vocab()
    ids = dict(video_token_id=vocabulary["<|video_pad|>"], vision_start_token_id=vocabulary["<|vision_start|>"])
    ids["image_token_id"] = processor.image_token_id
    vlm = real_size(len(processor.tokenizer), ids, args.layers, args.width)
    vlm = vlm.bfloat16() if CUDA and train != "full" else vlm
    vlm.generation_config = GenerationConfig(eos_token_id=processor.end, pad_token_id=processor.pad)
    nora.choose_trained(cfg, vlm, processor.first_action)
    model = nora.Nora(vlm, processor).to(DEVICE).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=CUDA or None)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()

    def step(batch):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = model(batch)["loss_sum"] / len(batch["targets"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for k in range(args.warmup):
        step(batches[k % 4])
    sync()
    start = time.perf_counter()
    for k in range(args.steps):
        loss = step(batches[k % 4])
    sync()
    seconds = (time.perf_counter() - start) / args.steps
    tokens = batches[0]["input_ids"].numel()
    patches = batches[0]["images"].shape[0] * batches[0]["images"].shape[1] * 256
    language, vision = (
        sum(p.numel() for n, p in m.named_parameters() if "embed_tokens" not in n)
        for m in (vlm.model.language_model, vlm.model.visual)
    )
    per_weight = {"full": 6, "lora": 4, "head": 4}[train]  # the frozen tower only goes forward
    flops = per_weight * language * tokens + (6 if train == "full" else 2) * vision * patches
    mfu = f"{flops / seconds / 1e12:.2f} TFLOP/s"
    if args.peak_tflops:
        mfu = f"MFU {flops / seconds / args.peak_tflops / 1e12:.1%}"
    what = f"{train:<5} checkpointing {str(checkpointing):<5} windows {windows:<8} batch {args.batch_size:>3}"
    speed = f"{args.batch_size / seconds:8.2f} samples/s, {seconds * 1e3:8.1f} ms, {mfu}"
    what = f"{what}, {tokens // args.batch_size} tokens:"
    memory = torch.cuda.max_memory_allocated() / 1e9 if CUDA else float("nan")
    count = sum(p.numel() for p in trained)
    print(f"{what} {speed}, peak {memory:.1f} GB, {count:,} trained, loss {loss.item():.2f}", flush=True)
    if train == "head":
        policy = nora.Policy(model.eval(), fast, data.spec)
        observation = dict(images={"camera1": np.zeros((480, 640, 3), np.uint8)}, instruction=make_demo.INSTRUCTION)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            policy.predict([observation])
            sync()
            start = time.perf_counter()
            for _ in range(3):
                policy.predict([observation])
        sync()
        took = f"{(time.perf_counter() - start) / 3 * 1e3:.0f} ms"
        print(f"predict one image, 10 x 6 actions with random weights (trained models stop sooner): {took}", flush=True)
    attention.forward = batched


def sync():
    if CUDA:
        torch.cuda.synchronize()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument(
        "--peak_tflops", type=float, help="dense bf16 peak of the card (default: known for " + ", ".join(PEAKS) + ")"
    )
    args = parser.parse_args()
    CUDA = torch.cuda.is_available()
    DEVICE = torch.device("cuda" if CUDA else "cpu")
    name = torch.cuda.get_device_name() if CUDA else "CPU"
    args.peak_tflops = args.peak_tflops or next((v for k, v in PEAKS.items() if k in name), None)
    print(f"{name}, torch {torch.__version__}, attention {pick_attention('auto', DEVICE)}")
    with tempfile.TemporaryDirectory() as folder:
        make_demo.write_insertion(Path(folder) / "data", episodes=4, size=(240, 320))
        make_demo.write_qwen2_5_vl(Path(folder) / "qwen")
        for train, checkpointing, windows in (
            ("full", False, "batched"),
            ("full", False, "looped"),
            ("full", True, "batched"),
            ("lora", False, "batched"),
            ("lora", True, "batched"),
            ("head", False, "batched"),
        ):
            try:
                measure(args, Path(folder), train, checkpointing, windows)
            except torch.OutOfMemoryError:
                what = f"{train:<5} checkpointing {str(checkpointing):<5} windows {windows}"
                print(f"{what}: out of memory at batch {args.batch_size}", flush=True)
            if CUDA:
                torch.cuda.empty_cache()
