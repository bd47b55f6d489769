"""Predict what a training needs before any weights are loaded: GPU and host memory, disk, reading; and if it does not
fit the GPU, which config keys make it fit.

The script's own build_model, forward and backward run on tensors that have shapes but no values (torch's fake tensors),
so nothing is loaded or computed, and what every operation would allocate and free is counted. Only integers (ids,
positions, grids, masks) are real, because code branches on them. Counted that way: weights, gradients, activations,
the peak of a step and of a validation. By formula: moments (8 bytes per trained weight), FSDP, 4-bit, host and disk.

    plan.check(cfg, dataset, collate, lambda c, dtype: build_model(c, ..., "cpu", dtype))"""

import argparse
import contextlib
import copy
import math
import os
import resource
import shutil
import warnings
import weakref
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from common import UserError, hub, require

BATCH = ("per_device_batch_size", "batch_size")  # the scripts' names for one thing
ACCUMULATION = ("gradient_accumulation_steps", "grad_accumulation_steps", "grad_accum_steps")
ACCUMULATION += ("accumulate_grad_batches", "accumulation")
START = ("resume", "resume_from_checkpoint", "init_from", "load_model_weights", "pretrained_model_id")
FP32 = dict(mixed_precision="no", use_bfloat16=False, precision="32-true")  # key: value that turns bf16 off
RECOMPUTE = dict(gradient_checkpointing=True)
CHANGES = ({}, RECOMPUTE, RECOMPUTE | dict(adamw_8bit=True), RECOMPUTE | dict(train="language", adamw_8bit=True))
CHANGES += (dict(train="lora"), RECOMPUTE | dict(train="lora"), dict(use_quantization=True))  # tried in this order
USABLE = 0.93  # share of a GPU's bytes: 24 GiB hold 24 GB plus CUDA's context, buffers and fragments
NF4 = 0.5 + 4 / 64  # bytes per weight: 4 bits, and an fp32 scale per 64
MAX_REAL = 2**22  # numbers in a new tensor of integers, up to which it gets values
card = None  # GB, from --plan; None: the GPU of this machine
warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # peft's


# ---- a model without values ------------------------------------------------------------------------------------------
class Shapes(TorchDispatchMode):
    """Within it floats are fake tensors, integers real ones. live, peak: bytes of all fake storages."""

    def __init__(self):
        super().__init__()
        from torch._subclasses import fake_tensor as fakes  # slow to import

        self.fakes, self.fake = fakes, fakes.FakeTensorMode(allow_non_fake_inputs=True)
        self.live, self.peak, self.known = 0, 0, {}  # bytes, bytes, {address of a storage: its weak reference}

    def real(self, t):
        return not isinstance(t, self.fakes.FakeTensor) and is_integer(t)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        integers = all(self.real(t) for t in tensors)
        if not integers and "index" in func._opname:  # indexing by a mask: else the size of the result is unknown
            args = [self._mask_to_indices(a) if isinstance(a, (list, tuple)) else a for a in args]
        if "convolution" in func._opname:  # its kernels copy their inputs into a layout of their own
            copies = sum(t.nbytes * (1 if t.is_contiguous() else 2) for t in tensors)
            self.peak = max(self.peak, self.live + copies)
        if not tensors or not integers:
            out = func(*args, **kwargs)
            real = not tensors and isinstance(out, torch.Tensor) and is_integer(out) and out.numel() <= MAX_REAL
            if not real:
                return tree_map_only(self.fakes.FakeTensor, self.count, out)
        with self.fakes.unset_fake_temporarily():
            out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, self.without_values, out)

    def _mask_to_indices(self, indices):
        out = []
        with self.fakes.unset_fake_temporarily():
            for t in indices:
                mask = isinstance(t, torch.Tensor) and t.dtype == torch.bool
                if mask and not self.real(t):
                    t = torch.ones(t.shape, dtype=torch.bool)  # unknown: at most all
                out += t.nonzero(as_tuple=True) if mask else [t]
        return out

    def without_values(self, t):
        return t if self.real(t) else self.count(self.fake.from_tensor(t))

    def count(self, t):
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known[key] = weakref.ref(storage, lambda _: self._freed(key, size))
            self.live += size
            self.peak = max(self.peak, self.live)
        return t

    def _freed(self, key, size):
        del self.known[key]
        self.live -= size


def is_integer(t):
    """Is it ids, positions or a mask? uint8 is an image."""
    return not t.is_floating_point() and t.dtype != torch.uint8


def norms_in_fp32(core):
    """As autocast runs them on CUDA; on the CPU, where the fake tensors are, it leaves them in bf16."""
    for module in core.modules():
        if isinstance(module, (torch.nn.LayerNorm, torch.nn.GroupNorm)):
            module.register_forward_pre_hook(lambda _, args: tuple(t.float() for t in args))


@torch.no_grad()
def convert(module, fn, recurse=True):
    """Stands in for nn.Module._apply, which cannot swap fake tensors. Tied weights stay tied."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    for name, parameter in list(module.named_parameters(recurse=False)):
        new = fn(parameter)
        if new.device == parameter.device:
            parameter.data = new
        else:
            module._parameters[name] = torch.nn.Parameter(new, parameter.requires_grad)
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = fn(buffer)
    return module


@contextlib.contextmanager
def without_weights():
    """Within it models are built without reading weights, and torch's random state stays as it is."""
    patched, rng = mock.patch.object(torch.nn.Module, "_apply", convert), torch.random.fork_rng(devices=[])
    with patched, rng, mock.patch.object(hub, "NO_VALUES", True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # deepcopy of a layer
        yield


# ---- what a step needs -----------------------------------------------------------------------------------------------
@dataclass
class Need:
    """Bytes on one rank's device, and parameter counts (trained, whole, gathered)."""

    weights: int
    gradients: int
    moments: int
    trained: int  # parameters that are trained
    whole: int  # all parameters
    gathered: int  # parameters that FSDP holds unsharded: two of the largest layer, and embeddings and heads
    activations: int = 0  # of one micro-batch, after its forward
    peak: int = 0  # of a step
    validation: int = 0  # peak of a validation

    @property
    def states(self):
        return self.weights + self.gradients + self.moments

    def sharded(self, ranks):
        """Peak with FSDP2: a share of the states, its own activations, the gathered bf16 weights and fp32 gradients."""
        return int(self.states / ranks + self.activations + 6 * self.gathered)


def measure(cfg, build, batch, on_card, ranks=1, room=math.inf):
    """Build the model without values, run a micro-batch (not the first of its step) and one of a validation -> Need.
    Where the states alone are more than `room` bytes nothing is run, and they are the peak."""
    cfg, bf16 = new_run(cfg), on_card and bf16_wanted(cfg)
    four_bit, fsdp = get(cfg, "use_quantization"), get(cfg, "fsdp")
    if four_bit:  # counted in 16 bits, then corrected; it implies the other
        put(cfg, dict(use_quantization=False, gradient_checkpointing=True))
    shapes, autocast = Shapes(), torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with without_weights(), shapes.fake, shapes:
        core = build(cfg, torch.bfloat16 if bf16 else torch.float32).train()
        need = _states(cfg, core, shapes.live, four_bit)
        need.peak = need.sharded(ranks) if fsdp else need.states
        if need.peak > room:
            return need
        if fsdp and bf16:  # FSDP gathers in bf16: autocast makes no copies
            core.bfloat16()
        if bf16:
            norms_in_fp32(core)
        built = shapes.live
        if get(cfg, ACCUMULATION) > 1 or ranks > 1:  # gradients of earlier micro-batches, or DDP's buckets
            for p in core.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        held, shapes.peak = shapes.live, 0
        batch = tree_map_only(torch.Tensor, shapes.without_values, batch)
        with autocast:
            out = core(batch)
        loss = sum(v for v in out.values() if v.requires_grad)
        del out
        need.activations = shapes.live - held
        loss.backward()
        whole = need.weights + need.moments + max(shapes.peak - built, need.gradients)
        need.peak = need.sharded(ranks) if fsdp else whole
        del loss
        core.zero_grad()
        shapes.peak = shapes.live
        with torch.no_grad(), autocast:
            core.eval()(batch)
        need.validation = shapes.peak - built + need.weights + need.moments
    return need


def bf16_wanted(cfg):
    return all(get(cfg, key) != off for key, off in FP32.items())


def _states(cfg, core, weights, four_bit):
    """-> Need of weights, gradients and moments, without activations and peaks."""
    parameters = list(core.parameters())
    trained = [p for p in parameters if p.requires_grad]
    whole, count = sum(p.numel() for p in parameters), sum(p.numel() for p in trained)
    moments = count * (2 if get(cfg, "adamw_8bit") else 8) + count * (4 if get(cfg, "ema_decay") else 0)
    if four_bit:
        linear = [m.weight for n, m in core.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        weights -= int((2 - NF4) * sum(p.numel() for p in linear if not p.requires_grad))
    lists = [m for m in core.modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1]
    inside = {id(inner) for m in lists for layer in m for inner in layer.modules()}
    layers = [sum(p.numel() for p in layer.parameters()) for m in lists if id(m) not in inside for layer in m]
    gathered = 2 * max(layers, default=0) + whole - sum(layers)
    return Need(weights, sum(p.nbytes for p in trained), moments, count, whole, gathered)


def new_run(cfg, changes=()):
    """-> a copy with the values `changes`, that starts from no checkpoint."""
    cfg = copy.deepcopy(cfg)
    put(cfg, dict.fromkeys(START) | dict(changes))
    return cfg


# ---- config keys: the scripts have different names for the same setting ----------------------------------------------
def places(cfg, keys):
    """-> [(config or its group, dotted prefix, key)] of the fields with one of these names, here or one level down."""
    groups = [(cfg, "")] + [(v, f"{k}.") for k, v in vars(cfg).items() if hasattr(v, "__dataclass_fields__")]
    keys = (keys,) if isinstance(keys, str) else keys
    return [(group, prefix, key) for group, prefix in groups for key in keys if hasattr(group, key)]


def get(cfg, keys):
    """-> the value of the first of `keys` that the config has; None without any."""
    return next((getattr(group, key) for group, _, key in places(cfg, keys)), None)


def put(cfg, values):
    for key, value in values.items():
        for group, _, name in places(cfg, key)[:1]:
            setattr(group, name, value)


def flags(cfg, values):
    """-> "--train lora --training.batch_size 4": what to write for these values."""
    return " ".join(f"--{prefix}{name} {values[key]}" for key in values for _, prefix, name in places(cfg, key)[:1])


# ---- what fits -------------------------------------------------------------------------------------------------------
def ways(cfg, build, batch_of, room, ranks):
    """Try CHANGES of the config -> [(flags, bytes)] of those that fit `room`, with the largest micro-batch each."""
    size, accumulation, tried, out = get(cfg, BATCH), get(cfg, ACCUMULATION), [], []
    for change in CHANGES:
        new = new_run(cfg, change)
        if new in tried or not all(places(cfg, key) for key in change):
            continue
        tried.append(new)
        need = measure(new, build, batch_of(size), True, ranks, room)
        micro, peak = size, need.peak
        if peak > room and size > 1 and need.activations:  # the peak is linear in the samples
            one = measure(new, build, batch_of(1), True, ranks, room).peak
            slope = (peak - one) / (size - 1)
            micro = max(m for m in range(1, size) if size % m == 0 and (m == 1 or one + slope * (m - 1) <= room))
            peak = int(one + slope * (micro - 1))
            change = change | {BATCH: micro, ACCUMULATION: accumulation * size // micro}
        if peak <= room:
            out.append((flags(cfg, change), peak))
    if get(cfg, "fsdp") is False and get(cfg, "train") == "full":
        change = RECOMPUTE | dict(fsdp=True)
        need = measure(new_run(cfg, change), build, batch_of(size), True, 8)
        fits = [n for n in range(2, 9) if need.sharded(n) <= room]
        out += [(f"{flags(cfg, change)} on {n} such GPUs", need.sharded(n)) for n in fits[:1]]
    return out


def advice(cfg):
    """-> what to change where memory ran out, with the present values."""
    named = [places(cfg, keys)[0] for keys in (BATCH, ACCUMULATION) if cfg is not None and places(cfg, keys)]
    text = " and raise ".join(f"{prefix}{key} (now {getattr(group, key)})" for group, prefix, key in named)
    text += " by the factor; --plan 24 tries what fits a GPU of 24 GB" if len(named) == 2 else ""
    return text and f"Lower {text}"


def asked_card(argv):
    """Command line -> (the arguments without --plan, the GB that --plan names, or None)."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plan", nargs="?", const="")
    known, rest = parser.parse_known_args(argv)
    good = known.plan is None or known.plan.replace(".", "", 1).isdecimal()
    require(good, f"--plan {known.plan}: expected the memory of a GPU in GB, as --plan 24")
    return rest, known.plan and float(known.plan)


def check(cfg, dataset, collate, build, run=None):
    """Print the plan. `build`(config, dtype) -> the module on the CPU whose forward(batch) gives the losses. `run`: the
    Run that is about to start: UserError if it does not fit the GPU; on a CPU there is none, and no plan."""
    installed = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
    room = card * 1e9 if card else USABLE * installed
    if run and not room:
        return
    say, ranks = (run.print, run.world) if run else (print, int(os.environ.get("WORLD_SIZE", 1)))
    size = get(cfg, BATCH)

    def batch_of(n, first=0):
        return collate([dataset[(i, i % len(dataset))] for i in range(first, first + n)])

    try:
        batch, before = batch_of(size), _bytes_read()
        batch_of(size, size)  # measured on a second batch: opening files does not count
        read, need = _bytes_read() - before, measure(cfg, build, batch, bool(room), ranks)
        _say(cfg, need, batch, read, ranks, room, say)
        fits = need.peak <= room or not room
        found = [] if fits else ways(cfg, build, batch_of, room, ranks)
    except Exception as error:  # an operation that cannot be counted is no reason not to train
        if not run and isinstance(error, UserError):
            raise
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return say(f"plan      none, it could not be counted ({why})")
    for text, peak in found:
        say(f"fits      {gb(peak):<8} {text}")
    what = f"this training needs {gb(need.peak)} of GPU memory, {gb(room)} can be used"
    fit = " | ".join(text for text, _ in found) or "a larger GPU"
    require(fits or need.peak <= 1.1 * room, f"{what}. What fits: {fit}")  # within the plan's error it may still fit


def _say(cfg, need, batch, read, ranks, room, say):
    size, accumulation, workers = (get(cfg, keys) for keys in (BATCH, ACCUMULATION, "num_workers"))
    kind, samples = "bf16" if room and bf16_wanted(cfg) else "fp32", size * accumulation * ranks
    verdict = "fits" if need.peak <= room else "DOES NOT FIT"
    verdict = f"{gb(room)} of the GPU: {verdict}" if room else "no GPU here: see --plan 24"
    say(f"plan      {gb(need.peak)} for {size} x {ranks} ranks x {accumulation} accumulation, {kind}; {verdict}")
    states = f"weights {gb(need.weights)} + gradients {gb(need.gradients)} + moments {gb(need.moments)}"
    say(f"memory    {states} + activations {gb(need.activations)}; validation {gb(need.validation)}")
    bytes_of = sum(t.nbytes for t in tree_leaves(batch) if isinstance(t, torch.Tensor))
    ahead = (workers * max(4, math.ceil(accumulation / workers)) if workers else 1) * bytes_of
    state, model = 12 * need.trained, need.whole * (2 if kind == "bf16" else 4)
    now = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = f"{gb(now)} per rank so far, {gb(ahead)} of batches ahead"
    say(f"host      {host}; to save {gb(state)} more on rank 0, and {gb(model)} where it exports a whole model")
    folder = Path(get(cfg, ("output_dir", "run_root_dir", "checkpoint_dir")) or ".").resolve()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    say(f"disk      {gb(state)} per checkpoint, {gb(model)} per whole model; {gb(free)} free in {folder}")
    say(f"reading   {gb(read * accumulation * ranks)} per step of {samples} samples; maps of files are not counted")


def gb(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bytes_read():
    """-> bytes read by this process so far; memory-mapped files do not count."""
    with open("/proc/self/io") as f:
        return int(f.readline().split()[1])
