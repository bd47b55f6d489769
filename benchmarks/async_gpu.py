"""train_async.py and train_diffusion.py at real size with a real-size Qwen2.5-VL-3B (random weights) on one GPU:
features/s for 1 to 5 views, training with cached features and with the VLM in every step, latency of every part against
the budget of the two-rate loop, and that loop itself on the machine's clock.

    python benchmarks/async_gpu.py
    python benchmarks/async_gpu.py --layers 2 --width 256 --hidden_dim 128 --height 112 --width_px 196 --views 1 2

The second runs on any machine. Speed and memory do not depend on the values of the weights. Images are 1280x720 arrays
in memory: squashing them to the model's size is counted, decoding JPEG is not."""

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

import make_demo
import train_async
import train_diffusion
from common import vl_cache
from common.qwen_vl import batch_vision_attention, pick_attention
from common.run import to_device
from common.two_rate import TwoRateLoop

INSTRUCTION = "Insert the needle into the target point"
BUDGET_MS = 300  # vlm_reuse_count 3 at 10 Hz


def make_encoder(folder, args, views):
    """VLEncoder with the tokenizer of a tiny model and the network of Qwen2.5-VL-3B, or that with fewer layers and
    another width."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    encoder = vl_cache.VLEncoder(
        str(folder), [f"View{v + 1}" for v in range(views)], args.height, args.width_px, device=DEVICE
    )
    if make_encoder.vlm is None:
        tiny, vocabulary = Qwen2_5_VLConfig.from_pretrained(folder), 151936 if args.width == 2048 else 4096
        config = Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=vocabulary,
                hidden_size=args.width,
                intermediate_size=args.width * 11008 // 2048,
                num_hidden_layers=args.layers,
                num_attention_heads=args.width // 128,
                num_key_value_heads=2,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
                bos_token_id=None,
                eos_token_id=None,
            ),
            vision_config=dict(
                depth=min(32, args.layers),
                hidden_size=1280,
                intermediate_size=3420,
                num_heads=16,
                out_hidden_size=args.width,
                fullatt_block_indexes=[7, 15, 23, 31],
                window_size=112,
            ),
            tie_word_embeddings=True,
            image_token_id=tiny.image_token_id,
            video_token_id=tiny.video_token_id,
            vision_start_token_id=tiny.vision_start_token_id,
        )
        config._attn_implementation = pick_attention("auto", DEVICE)
        batch_vision_attention()
        torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
        with torch.device(DEVICE):
            make_encoder.vlm = Qwen2_5_VLForConditionalGeneration(config).model.requires_grad_(False).eval()
        torch.set_default_dtype(torch.float32)
    encoder.vlm, encoder.width = make_encoder.vlm, args.width  # before the first encode would load the tiny one
    return encoder


make_encoder.vlm = None


def sync():
    if CUDA:
        torch.cuda.synchronize()


def timed(steps, function, *args):
    """-> seconds per call, after one that does not count."""
    function(*args)
    sync()
    start = time.perf_counter()
    for _ in range(steps):
        function(*args)
    sync()
    return (time.perf_counter() - start) / steps


def pictures(views, n, rng):
    return [
        ({f"View{v + 1}": rng.integers(0, 256, (720, 1280, 3), dtype=np.uint8) for v in range(views)}, INSTRUCTION)
        for _ in range(n)
    ]


def make_policy(script, args, window):
    cfg = script.Config(hidden_dim=args.hidden_dim, sensor_dim=3 * args.hidden_dim, sensor_window_size=window)
    names = ("mean", "std", "min", "max", "q01", "q99")
    action = {k: [{"mean": 0.0, "std": 0.5}.get(k, -1.0 if k in ("min", "q01") else 1.0)] * 7 for k in names}
    stats = dict(action=action | dict(mask=[True] * 7, constant=[False] * 6 + [True]))
    about = dict(vl_shape=(1, args.width), stats=stats, recipe={}, instructions=[INSTRUCTION])
    return script.Policy(script.build_model(cfg, about, DEVICE), cfg, about, DEVICE)


def training_step(script, policy, batch_size, rng):
    """-> (call(encoder, pictures) that does one optimizer step on `batch_size` samples, these)."""
    cfg, core = policy.cfg, policy.model.train()
    draws = getattr(cfg, "noise_draws", 1)
    optimizer = script.make_optimizer(core, cfg, CUDA or None)
    items = [
        dict(
            vl_features=torch.zeros(1, core.condition.vl_mean.numel()),
            sensor=rng.standard_normal((cfg.sensor_window_size, 1026), dtype=np.float32),
            actions=rng.uniform(-1, 1, (cfg.horizon, 7)).astype(np.float32),
            action_mask=np.ones(cfg.horizon, bool),
            weight=np.float32(1),
            reuse_step=0,
            name=("", 0),
            noise=rng.standard_normal((draws, cfg.horizon, 7), dtype=np.float32),
            t=np.full(draws, 7),
        )
        for _ in range(batch_size)
    ]

    def step(encoder=None, pictures=()):
        batch = policy.collate(items)
        if encoder is not None:
            batch["vl_features"] = encoder.encode(pictures)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = core(to_device(batch, DEVICE))["loss_sum"] / batch_size
        loss.backward()
        torch.nn.utils.clip_grad_norm_(core.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, items


def main(args):
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        make_demo.write_qwen2_5_vl(folder, text=(64, 2), vision=(32, 2), action_tokens=False)
        encode_ms = {}
        print(f"VLM: {args.layers} layers, width {args.width}, images {args.height}x{args.width_px}")
        for views in args.views:
            encoder = make_encoder(folder, args, views)
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            one, several = pictures(views, 1, rng), pictures(views, args.micro_batch, rng)
            encode_ms[views] = 1e3 * timed(args.steps, encoder.encode, one)
            batch_ms = 1e3 * timed(args.steps, encoder.encode, several)
            slow = encode_ms[views] > BUDGET_MS
            alone = f"{encode_ms[views]:8.1f} ms per feature, {1e3 / encode_ms[views]:7.2f} features/s"
            several = f"in batches of {args.micro_batch}: {1e3 * args.micro_batch / batch_ms:7.2f} features/s"
            advice = f", use --vlm-reuse-count {-(-encode_ms[views] // 100):.0f}" if slow else ""
            peak = f"; peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if CUDA else ""
            budget = f"{'over' if slow else 'within'} {BUDGET_MS} ms{advice}{peak}"
            print(f"{views} view(s): {alone}; {several}; {budget}", flush=True)
        views = args.views[-1]
        for script, window in ((train_async, 65), (train_diffusion, 650)):
            policy = make_policy(script, args, window)
            step, items = training_step(script, policy, args.batch_size, rng)
            batch = pictures(views, args.batch_size, rng)
            cached = timed(args.steps, step)
            online = timed(args.steps, step, encoder, batch)
            size = sum(p.numel() for p in policy.model.parameters()) / 1e6
            print(f"{script.__name__}: {size:.1f} M parameters, batch {args.batch_size}, window {window}:", end=" ")
            both = f"{args.batch_size / cached:.1f} samples/s, with {views} view(s) {args.batch_size / online:.2f}"
            print(f"cached {both}: {online / cached:.1f}x", flush=True)
            policy.model.eval()
            observation = dict(vl_features=items[0]["vl_features"], sensor=items[0]["sensor"])
            alone = 1e3 * timed(args.steps, policy.predict, [observation])
            print(f"{script.__name__}: predict {alone:.1f} ms alone", flush=True)
            policy.encoder, policy.cfg.vlm_reuse_count = encoder, max(3, int(-(-encode_ms[views] // 100)))
            policy.cfg.vlm_latency_ms = [encode_ms[views]]
            loop = TwoRateLoop(policy, max_age_s=10.0)
            shot, spent = pictures(views, 1, rng)[0][0], []
            stop = threading.Event()

            def feed(loop=loop, stop=stop):
                while not stop.is_set():
                    loop.push_sensor(rng.standard_normal((65, 1026), dtype=np.float32))
                    stop.wait(0.1)

            threading.Thread(target=feed, daemon=True).start()
            act = loop.act

            def measured_act(act=act, spent=spent):
                begin = time.perf_counter()
                action = act()
                if action is not None:
                    spent.append(1e3 * (time.perf_counter() - begin))
                return action

            loop.act = measured_act
            loop.run(lambda shot=shot: (shot, time.monotonic()), lambda action: None, args.seconds)
            stop.set()
            if spent:
                look = f"{views} views, a look every {policy.cfg.vlm_reuse_count} steps"
                times = (
                    f"median {np.median(spent):.1f} ms, 95 % {np.quantile(spent, 0.95):.1f} ms, max {max(spent):.1f}"
                )
                print(f"{script.__name__}: two-rate loop of {args.seconds} s ({look}): predict {times}")
            print("\n".join(loop.report()), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--height", type=int, default=360)
    parser.add_argument("--width_px", type=int, default=640)
    parser.add_argument("--micro_batch", type=int, default=4, help="features per forward pass of the second speed")
    parser.add_argument("--batch_size", type=int, default=4, help="samples per training step")
    parser.add_argument("--steps", type=int, default=10, help="timed repetitions")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the two-rate loop")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden_dim", type=int, default=1024, help="width of the expert")
    CUDA = torch.cuda.is_available()
    DEVICE = torch.device("cuda" if CUDA else "cpu")
    name, attention = torch.cuda.get_device_name() if CUDA else "CPU", pick_attention("auto", DEVICE)
    print(f"{name}, torch {torch.__version__}, attention {attention}, {torch.get_num_threads()} threads")
    main(parser.parse_args())
