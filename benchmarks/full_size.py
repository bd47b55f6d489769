"""Every script at its real size with random weights, and what the plan said: on a GPU at the published sizes, in parts
that fit in 8 minutes each; on a CPU the same code on make_demo.py's small backbones.

    python benchmarks/full_size.py --table                  # no GPU: what fits 24, 80 and 141 GB, from the plan alone
    python benchmarks/full_size.py --part nora              # smolvla, openvla, mobile, async, diffusion
    python benchmarks/full_size.py --part upstream          # a NORA step as upstream writes it, beside ours
    python benchmarks/full_size.py --part cached            # async and diffusion: a step with the VLM in it, and cached
    python benchmarks/full_size.py --part overhead          # what a training adds to forward, backward, clip and AdamW

A part prints a line per setting and adds it to benchmarks/results/full_size_<machine>.txt: samples/s of forward,
backward, clipping and AdamW; model FLOP/s (counted by torch, recomputation included) as a share of the GPU's dense
bf16 peak; the peak of memory beside the plan's; what a sample costs to read, in share of a step of one loader process;
seconds to copy a checkpoint's state, and to write one of up to 10 GB; the forward pass of one sample. Speed and memory
do not depend on the values of weights, so no model is downloaded: a script's own main reads make_demo.py's recordings,
and stops where it would build its model. Every module is then built as the plan builds it, and filled with random
numbers."""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ |= dict(HF_HUB_OFFLINE="1", WANDB_MODE="disabled")

import numpy as np
import torch

import build_vl_cache
import create_datapkl
import make_demo
import train_async
import train_diffusion
import train_mobile_kosmos
import train_nora
import train_openvla_vamos
import train_smolvla_sim
from common import checkpoint as ckpt
from common import hub, plan, run
from common.run import to_device
from common.vl_cache import VLEncoder
from modeling_openvla import TOWERS

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LARGEST = 10e9  # bytes of a checkpoint that is written: a part has 8 minutes
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "RTX 3090": 71, "RTX 4090": 165}  # dense bf16 TFLOP/s, data sheets

# ---- the published sizes, as changes of the config.json that make_demo.py writes -------------------------------------

QWEN_TEXT = dict(vocab_size=153728, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36)
QWEN_TEXT |= dict(num_attention_heads=16, num_key_value_heads=2, layer_types=["full_attention"] * 36)
QWEN_TEXT |= dict(rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
QWEN_VISION = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048)
QWEN_VISION |= dict(fullatt_block_indexes=[7, 15, 23, 31])
SMOL_TEXT = dict(vocab_size=49280, hidden_size=960, intermediate_size=2560, num_hidden_layers=32)
SMOL_TEXT |= dict(num_attention_heads=15, num_key_value_heads=5, head_dim=64)
SMOL_VISION = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
SMOL_VISION |= dict(image_size=512, patch_size=16)
LLAMA = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
LLAMA |= dict(num_attention_heads=32, num_key_value_heads=32, head_dim=128)
KOSMOS_TEXT = dict(vocab_size=65037, embed_dim=2048, layers=24, ffn_dim=8192, attention_heads=32)
KOSMOS_VISION = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
KOSMOS_VISION |= dict(image_size=224, patch_size=14)


def enlarge(folder, text, vision, **top):
    """Write the published sizes into a demo backbone's config.json, and drop its weights, which no longer fit."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= text
    if vision:
        config["vision_config"] |= vision
    path.write_text(json.dumps(config | top))
    for weights in Path(folder).glob("*.safetensors*"):
        weights.unlink()
    return folder


def settings(name, folder, small):
    """-> (script, its config at the guide's values on make_demo.py's recordings, {label: changes} that are run)"""
    checkpointing = {"as the guide": {}, "checkpointing": dict(gradient_checkpointing=True)}
    if name == "nora":
        model = make_demo.write_qwen2_5_vl(folder / "qwen")
        if not small:
            enlarge(model, QWEN_TEXT, QWEN_VISION)
        make_demo.write_insertion(folder / "data", episodes=4, size=(240, 320))
        cfg = train_nora.Config(model=str(model), fast="fit", per_device_batch_size=16, gradient_accumulation_steps=2)
        d = cfg.dataset
        d.root_dir, d.horizon, d.use_ee_pose_delta_as_action = str(folder / "data"), 10, True
        recompute = dict(gradient_checkpointing=True)
        kinds = {
            "full": {},
            "full, checkpointing": recompute,
            "language, checkpointing": recompute | dict(train="language"),
        }
        return (
            train_nora,
            cfg,
            kinds | {"lora": dict(train="lora"), "lora, checkpointing": recompute | dict(train="lora")},
        )
    if name == "smolvla":
        model = make_demo.write_smolvlm2(folder / "smolvlm2", text=(96, 16))
        if not small:
            enlarge(model, SMOL_TEXT, SMOL_VISION, scale_factor=4)
        make_demo.write_insertion_sim(folder / "data", episodes=4, size=(240, 320))
        cfg = train_smolvla_sim.Config()
        cfg.dataset.root_dir, cfg.policy.vlm_model_name = str(folder / "data"), str(model)
        cfg.validation.num_episodes = 1
        if small:
            cfg.policy.resize_imgs_with_padding = (64, 64)
        full = dict(train_expert_only=False, freeze_vision_encoder=False)
        kinds = {"expert only": {}, "everything": full}
        if plan.places(cfg, "gradient_checkpointing"):
            kinds["everything, checkpointing"] = full | dict(gradient_checkpointing=True)
        return train_smolvla_sim, cfg, kinds
    if name == "openvla":
        model = make_demo.write_openvla(folder / "openvla")
        if not small:
            towers = zip(("featurizer", "fused_featurizer"), TOWERS.values(), strict=True)
            enlarge(model, LLAMA, None, vision_sizes=dict(towers), image_sizes=[224, 224])
            make_demo.write_json(Path(model) / "preprocessor_config.json", make_demo.prismatic_settings(224))
        make_demo.write_vamos(folder / "data", images=60, validation_images=8, size=(240, 320))
        cfg = train_openvla_vamos.Config(vla_path=str(model), data_root_dir=str(folder / "data"))
        cfg.frame_dir = str(folder / "frames")
        kinds = checkpointing
        return train_openvla_vamos, cfg, kinds | ({} if small else {"4-bit": dict(use_quantization=True)})
    if name == "mobile":
        model = make_demo.write_kosmos2(folder / "kosmos2")
        if not small:
            enlarge(model, KOSMOS_TEXT, KOSMOS_VISION, latent_query_num=64)
        make_demo.write_mobile(folder / "data", episodes=10)
        cfg = train_mobile_kosmos.Config(model=str(model))
        cfg.dataset.data_dir, cfg.dataset.episode_pattern = str(folder / "data"), "*.h5"
        cfg.dataset.frame_dir = str(folder / "frames")
        return train_mobile_kosmos, cfg, {"as the guide": {}}
    script = dict(async_=train_async, diffusion=train_diffusion)[name.replace("async", "async_")]
    root = make_demo.write_sessions(folder / "data", white=2, needle=0, new=0, oct=1, seconds=3.0)
    model = make_demo.write_qwen2_5_vl(folder / "qwen", action_tokens=False)
    create_datapkl.main(create_datapkl.Config(dataset_dirs=[str(root)], workers=0))
    shape = dict(image_resize_height=56, image_resize_width=56)
    build_vl_cache.main(build_vl_cache.Config(dataset_dirs=[str(root)], model=str(model), num_workers=1, **shape))
    cfg = script.Config(dataset_dir=[str(root)], model=str(model), val_split=0.3, **shape)
    if small:
        cfg.hidden_dim, cfg.sensor_dim = 128, 128
    return script, cfg, {"as the guide": {}}


# ---- one script ------------------------------------------------------------------------------------------------------


class Planned(Exception):
    """Ends a script's main where it would build its model."""


def captured(script, cfg, folder):
    """-> (dataset, collate, build) of the script's own main."""
    seen = []
    for key in ("output_dir", "checkpoint_dir", "run_root_dir", "adapter_tmp_dir"):
        plan.put(cfg, {key: str(folder / "out")})
    plan.put(cfg, dict(num_workers=0))

    def stop(*args):
        seen.extend(args[1:4])
        raise Planned

    cached = script in (train_async, train_diffusion)  # their features know the weights they were made with
    mocked = mock.patch.multiple(plan, check=stop), mock.patch.multiple(hub, NO_VALUES=not cached)
    with mocked[0], mocked[1], contextlib.redirect_stdout(sys.stderr), contextlib.suppress(Planned):
        script.main(cfg)
    return seen


def filled(build, cfg):
    """-> the module on the device with random weights: built without values, so that no CPU draws 7 billion numbers."""
    shapes, bf16 = plan.Shapes(), CUDA and plan.bf16_wanted(cfg)
    with plan.without_weights(), shapes.fake, shapes:
        core = build(cfg, torch.bfloat16 if bf16 else torch.float32).train()

    def fill(t):
        if not isinstance(t, shapes.fakes.FakeTensor):
            return t.to(DEVICE)
        new = torch.ones(t.shape, dtype=t.dtype, device=DEVICE)
        return new.normal_(0, 0.02) if t.ndim > 1 else new

    known = {}
    for module in core.modules():
        for group in (module._parameters, module._buffers):
            for key, old in [(key, t) for key, t in group.items() if t is not None]:
                if id(old) not in known:
                    new = fill(old)
                    known[id(old)] = torch.nn.Parameter(new, old.requires_grad) if key in module._parameters else new
                group[key] = known[id(old)]
    return core


def timed(steps, function, warmup=1):
    """-> seconds per call"""
    for i in range(warmup + steps):
        if i == warmup:
            wait()
            start = time.perf_counter()
        function()
    wait()
    return (time.perf_counter() - start) / steps


def wait():
    if CUDA:
        torch.cuda.synchronize()


def autocast(cfg):
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA and plan.bf16_wanted(cfg))


def measure(name, label, cfg, dataset, collate, build, args):
    """-> a line of results"""
    from torch.utils.flop_counter import FlopCounterMode

    size, accumulation = plan.get(cfg, plan.BATCH), plan.get(cfg, plan.ACCUMULATION)
    start = time.perf_counter()
    batch = collate([dataset[(i, i % len(dataset))] for i in range(size)])
    reading = time.perf_counter() - start
    need = plan.measure(cfg, build, batch, on_card=CUDA)
    if CUDA and need.states > torch.cuda.mem_get_info()[1]:
        return f"{name:<10} {label:<26} does not fit, says the plan: {plan.gb(need.peak)}"
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    core = filled(build, cfg)
    trained, batch = [p for p in core.parameters() if p.requires_grad], to_device(batch, DEVICE)
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=CUDA or None)

    def micro():
        with autocast(cfg):
            out = core(batch)
        sum(v for v in out.values() if v.requires_grad).backward()

    def step():
        for _ in range(accumulation):
            micro()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(args.steps, step)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    with FlopCounterMode(display=False) as counted:
        micro()
    optimizer.zero_grad()
    rate = counted.get_total_flops() * accumulation / seconds / 1e12
    known = next((v for k, v in PEAKS.items() if CUDA and k in torch.cuda.get_device_name()), None)
    mfu = f"{rate / known:6.1%} of the peak" if known else f"{rate:8.4f} TFLOP/s"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        start = time.perf_counter()
        state = ckpt.on_host(ckpt.training_state(core, optimizer), copy=True)
        copied = time.perf_counter() - start
        if 12 * need.trained < LARGEST:
            torch.save(state, Path(folder) / "state.pt")
        written = time.perf_counter() - start - copied
    one = to_device(collate([dataset[(0, 0)]]), DEVICE)
    core.eval()

    def look():
        with torch.no_grad(), autocast(cfg):
            core(one)

    latency = timed(args.steps, look)
    memory = f"{plan.gb(peak) if CUDA else 'not measured':>12} (plan {plan.gb(need.peak)})"
    text = f"{name:<10} {label:<26} {size * accumulation / seconds:9.2f} samples/s, {mfu}; peak {memory}; reading "
    text += f"{reading * accumulation / seconds:5.1%} of a step; save: copy {copied:.2f} s, "
    text += f"write {written:.2f} s; " if 12 * need.trained < LARGEST else "too large to write; "
    return text + f"forward of one {1e3 * latency:.1f} ms"


def part(name, args):
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        script, cfg, kinds = settings(name, Path(folder), args.small)
        dataset, collate, build = captured(script, cfg, Path(folder))
        for label, change in kinds.items():
            new = plan.new_run(cfg, change)
            if not args.small and new.__class__ is train_openvla_vamos.Config and new.use_quantization:
                yield f"{name:<10} {label:<26} not run: needs real weights and bitsandbytes"
                continue
            try:
                yield measure(name, label, new, dataset, collate, build, args)
            except torch.OutOfMemoryError:
                yield f"{name:<10} {label:<26} out of memory"
            torch.cuda.empty_cache()


def table(name, args):
    """Per setting of a script the plan's bytes on one rank, and whether GPUs of 24, 80 and 141 GB hold them."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        script, cfg, kinds = settings(name, Path(folder), args.small)
        dataset, collate, build = captured(script, cfg, Path(folder))
        size, accumulation = plan.get(cfg, plan.BATCH), plan.get(cfg, plan.ACCUMULATION)
        for label, change in kinds.items():
            batch = collate([dataset[(i, i % len(dataset))] for i in range(size)])
            need = plan.measure(plan.new_run(cfg, change), build, batch, on_card=True)
            keys = ("weights", "gradients", "moments", "activations", "validation")
            parts = ", ".join(f"{key} {plan.gb(getattr(need, key))}" for key in keys)
            fits = " ".join(f"{card}: {'yes' if need.peak <= card * 1e9 else 'no'}" for card in (24, 80, 141))
            yield f"{name:<10} {label:<26} {size} x {accumulation} {plan.gb(need.peak):>9}  {fits}; {parts}"


# ---- beside others ---------------------------------------------------------------------------------------------------


def upstream(args):
    """One NORA step as upstream's train.py writes it (transformers' forward with labels over every position, its
    accelerate's backward, clip, AdamW) beside ours, on the same weights and batch, in turn."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        script, cfg, _ = settings("nora", Path(folder), args.small)
        cfg.gradient_checkpointing = not args.small
        dataset, collate, build = captured(script, cfg, Path(folder))
        core = filled(build, cfg)
        batch = to_device(collate([dataset[(i, i % len(dataset))] for i in range(cfg.per_device_batch_size)]), DEVICE)
        trained = [p for p in core.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=CUDA or None)
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["target_rows"] + 1] = batch["targets"]
        labels = labels.view_as(batch["input_ids"])
        seen = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"], labels=labels)

        def theirs():
            return core.vlm(**seen, **core.pictures(batch["images"]), use_cache=False).loss

        def ours():
            return core(batch)["loss_sum"] / len(batch["targets"])

        def step(loss):
            with autocast(cfg):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        times = [(timed(1, lambda: step(theirs)), timed(1, lambda: step(ours))) for _ in range(args.steps)]
        slow, fast = (sorted(column)[len(times) // 2] for column in zip(*times, strict=True))
        yield f"upstream   nora, micro-batch {cfg.per_device_batch_size}: {slow * 1e3:.1f} ms, ours {fast * 1e3:.1f} ms"


def cached(args):
    """A step of async and diffusion on cached features, and with the VLM that sees a 1280x720 image per sample."""
    for name in ("async", "diffusion"):
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            script, cfg, _ = settings(name, Path(folder), args.small)
            dataset, collate, build = captured(script, cfg, Path(folder))
            core = filled(build, cfg)
            if not args.small:
                enlarge(cfg.model, QWEN_TEXT, QWEN_VISION)
            height, width = (56, 56) if args.small else (360, 640)
            with plan.without_weights():
                encoder = VLEncoder(cfg.model, ["View1"], height, width, device=DEVICE)
            filled(lambda _cfg, _dtype, encoder=encoder: encoder.vlm, cfg).eval()
            items = [dataset[(i, i % len(dataset))] for i in range(cfg.batch_size)]
            batch, seen = to_device(collate(items), DEVICE), np.zeros((720, 1280, 3), np.uint8)
            optimizer = script.make_optimizer(core, cfg, CUDA or None)

            def step(core=core, batch=batch, optimizer=optimizer, cfg=cfg):
                with autocast(cfg):
                    loss = core(batch)["loss_sum"]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()

            def online(encoder=encoder, n=cfg.batch_size, seen=seen, step=step):
                encoder.encode([({"View1": seen}, make_demo.INSTRUCTION)] * n)
                step()

            fast, slow = timed(args.steps, step), timed(args.steps, online)
            text = f"cached {fast * 1e3:.1f} ms, with the VLM {slow * 1e3:.1f} ms: {slow / fast:.1f} x"
            yield f"cached     {name}, {cfg.batch_size} samples: {text}"


class Timed:
    """A model whose calls are timed."""

    def __init__(self, model, timed):
        self.model, self.call = model, timed(model)

    def __call__(self, *args, **how):
        return self.call(*args, **how)

    def __getattr__(self, name):
        return getattr(self.model, name)


def overhead(args):
    """CPU seconds of a training's main process per step, with log, finite check and all, and what forward, backward,
    clipping and AdamW take of them, in the same steps; the loader's worker has a process of its own."""
    torch.set_num_threads(1)
    for name in PARTS:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            # a training reads its weights, which no real size has; at async's demo size receiving sensor rows is 12 %
            small = name not in ("async", "diffusion")
            script, cfg, _ = settings(name, Path(folder), small)
            for key in ("output_dir", "checkpoint_dir", "run_root_dir", "adapter_tmp_dir"):
                plan.put(cfg, {key: f"{folder}/out"})
            rare = ("val_frequency", "val_steps", "val_freq", "eval_epochs", "every_n_epochs")
            changes = dict.fromkeys(("max_train_steps", "max_steps", "steps"), 10 + args.steps)
            plan.put(cfg, changes | dict.fromkeys(rare, 10**9) | dict(num_workers=1, epochs=1000, max_epochs=1000))
            whole, bare = steps_of(script, cfg)
        share = f"forward, backward, clip and AdamW {1e3 * np.median(bare):.1f} ms of them"
        text = f"{1e3 * np.median(whole):.1f} ms of CPU per step, {share}: {np.median(whole / bare) - 1:+.1%}"
        yield f"overhead   {name:<10} {text}"


def steps_of(script, cfg):
    """-> (whole, bare), CPU seconds of each step from the sixth on."""
    parts, seen = [], []

    def timed(function):
        def call(*args, **how):
            begin = time.process_time()
            result = function(*args, **how)
            parts.append(time.process_time() - begin)
            return result

        return call

    def noted(*args, update=run.Step.update):
        update(*args)
        seen.append((time.process_time(), sum(parts)))

    def prepared(*args, prepare=run.Run.prepare, **how):
        return Timed(prepare(*args, **how), timed)

    places = [(run.Step, "update", noted), (run.Run, "prepare", prepared)]
    places += [(torch.Tensor, "backward", timed(torch.Tensor.backward))]
    places += [(torch.optim.AdamW, "step", timed(torch.optim.AdamW.step))]
    places += [(torch.nn.utils, "clip_grad_norm_", timed(torch.nn.utils.clip_grad_norm_))]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        for place, key, function in places:
            stack.enter_context(mock.patch.object(place, key, function))
        script.main(cfg)
    return np.diff(np.array(seen[5:]), axis=0).T


PARTS = ("nora", "smolvla", "openvla", "mobile", "async", "diffusion")
BESIDE = dict(upstream=upstream, cached=cached, overhead=overhead)


def results(args, machine):
    yield f"{machine}, torch {torch.__version__}, {'small' if args.small else 'real'} sizes"
    for name in args.parts:
        if args.table:
            yield from table(name, args)
        else:
            yield from BESIDE[name](args) if name in BESIDE else part(name, args)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, *BESIDE], action="append", dest="parts", help="default: all")
    parser.add_argument("--table", action="store_true", help="the plan alone, for GPUs of 24, 80 and 141 GB")
    parser.add_argument("--small", action="store_true", default=None, help="make_demo.py's sizes (default on a CPU)")
    parser.add_argument("--steps", type=int, default=5, help="timed repetitions")
    parser.add_argument("--folder", help="for temporary files, on a disk with room for a checkpoint")
    args = parser.parse_args()
    args.small = (not CUDA and not args.table) if args.small is None else args.small
    args.parts = args.parts or [*PARTS, *([] if args.table else BESIDE)]
    machine = torch.cuda.get_device_name() if CUDA else "CPU"
    out = Path(__file__).parent / "results" / f"full_size_{'plan' if args.table else machine.replace(' ', '_')}.txt"
    with out.open("a") as file:
        for line in results(args, machine):
            print(line, file=file, flush=True)
            print(line, flush=True)


if __name__ == "__main__":
    main()
