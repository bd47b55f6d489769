"""Every script as on a GPU, without one: tensors that are "on the GPU" compute on the CPU but know where they are, and
an operation that brings them together with others fails as it would there."""

import functools
import gc
import io
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers.generation.utils  # noqa: F401  reads type names of torch that are exchanged here
import transformers.models.auto.modeling_auto  # noqa: F401
from conftest import ROOT
from recipes import RECIPES
from torch.overrides import _get_current_function_mode_stack as modes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common import plan, program
from common.run import Run
from common.two_rate import TwoRateLoop

CARD = torch.device("cuda", 0)
FACTORIES = ("empty", "zeros", "ones", "full", "arange", "linspace", "eye", "rand", "randn", "randint", "tensor")
LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "as_tensor")
MIXED = ("copy_", "index", "index_put", "index_put_", "_index_put_impl_", "set_")  # take others from the CPU
real = torch.Tensor.to, torch.Tensor.device, torch.nn.utils.rnn.pad_sequence, torch.nn.functional.layer_norm


class Card(TorchDispatchMode):
    there = {}  # {address of a storage on it: its weak reference}; of all, as programs keep tensors in caches

    def on(self, t):
        return t.untyped_storage()._cdata in self.there

    def put(self, t, on=True):
        storage = t.untyped_storage()
        key = storage._cdata
        if not on:
            self.there.pop(key, None)
        elif key not in self.there:
            self.there[key] = weakref.ref(storage, lambda _: self.there.pop(key, None))
        return t

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on, name = [self.on(t) for t in tensors], func._opname
        strangers = [t.shape for t, there in zip(tensors, on, strict=True) if not there and t.dim()]
        free = name in MIXED or "_foreach" in name  # whose tensors need not be on one device
        shapes = [t.shape for t in tensors]
        assert not any(on) or not strangers or free, f"{name}: of {shapes} {strangers} are on the CPU"
        out = func(*args, **(kwargs or {}))
        if on[0] if name in MIXED else any(on):
            for t in tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    self.put(t)
        return out

    # ---- what takes the place of torch's own

    def device(self, t):
        return CARD if self.on(t) else real[1].__get__(t)

    def to(self, t, *args, **kwargs):
        args, target, dtype = list(args), kwargs.get("device"), kwargs.get("dtype")
        if args and not isinstance(args[0], torch.dtype):
            target = args.pop(0)
        if isinstance(target, torch.Tensor):
            target, dtype = target.device, target.dtype
        if args and not isinstance(args[0], bool):
            dtype = args.pop(0)
        target, here = torch.device(self.device(t) if target is None else target), self.on(t)
        how = dict(dtype=dtype or t.dtype, copy=kwargs.get("copy", False) or (target.type == "cuda") != here)
        place = target if "meta" in (target.type, self.device(t).type) else "cpu"
        return self.put(real[0](t, device=place, **how), target.type == "cuda")

    def factory(self, make):
        @functools.wraps(make)
        def made(*args, device=None, **kwargs):
            if device is None and make.__name__ in FACTORIES:  # with torch.device(...)
                device = next((m.device for m in modes() if getattr(m, "device", None) is not None), None)
            if device is None or torch.device(device).type != "cuda":
                return make(*args, **kwargs, **({} if device is None else dict(device=device)))
            return self.put(make(*args, device="cpu", **kwargs))

        return made

    def pad_sequence(self, rows, *args, **kwargs):  # made from options, which no mode sees
        on = {self.on(row) for row in rows}
        assert len(on) == 1, "pad_sequence: rows on two devices"
        copies = [self.put(row.clone(), False) for row in rows]
        return self.put(real[2](copies, *args, **kwargs), on == {True})

    def layer_norm(self, x, shape, weight=None, bias=None, eps=1e-5):  # CUDA's autocast has it in fp32
        if self.on(x) and torch.is_autocast_enabled("cuda"):
            x, weight, bias = (t if t is None else t.float() for t in (x, weight, bias))
        return real[3](x, shape, weight, bias, eps)


@pytest.fixture
def card(monkeypatch):
    card, on_cpu = Card(), lambda kind: "cpu" if kind == "cuda" else kind
    enabled, dtype_of, begin = torch.is_autocast_enabled, torch.get_autocast_dtype, Run.__init__

    class Autocast(torch.autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__(on_cpu(device_type), *args, **kwargs)

    def start(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        self.device = CARD

    def there_is_one():  # for this project's code, not for the libraries
        caller = sys._getframe(1).f_code.co_filename
        return caller.startswith(str(ROOT)) and "site-packages" not in caller

    for name in FACTORIES + LIKE:
        monkeypatch.setattr(torch, name, card.factory(getattr(torch, name)))
    for name in ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor"):
        monkeypatch.setattr(torch.Tensor, name, card.factory(getattr(torch.Tensor, name)))
    methods = dict(to=card.to, cpu=lambda t: card.to(t, "cpu"), cuda=lambda t: card.to(t, CARD), pin_memory=lambda t: t)
    for name, method in methods.items():
        monkeypatch.setattr(torch.Tensor, name, functools.partialmethod(lambda t, f, *a, **k: f(t, *a, **k), method))
    monkeypatch.setattr(torch.Tensor, "device", property(card.device))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(card.on))
    monkeypatch.setattr(torch, "autocast", Autocast)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind="cuda": enabled(on_cpu(kind)))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: dtype_of(on_cpu(kind)))
    monkeypatch.setattr(torch.nn.functional, "layer_norm", card.layer_norm)
    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence", card.pad_sequence)
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda t: False)
    monkeypatch.setattr(torch.cuda, "is_available", there_is_one)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=24 * 2**30))
    for name in ("Stream", "set_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(Run, "__init__", start)
    with card:
        yield card
    program.run = None


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("name", RECIPES)
def test_on_a_card(name, recipe_of, tmp_path, card, monkeypatch):
    """Training, validation, saving, going on, and the policy on the robot keep every tensor where it belongs; and a
    terminal sees how far a validation is."""
    recipe, terminal = recipe_of(name), io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    script, more = recipe.script, recipe.config(tmp_path, steps=4, resume="auto")
    plan.put(more, dict(gradient_checkpointing=True, use_bfloat16=name != "smolvla"))
    script.main(recipe.config(tmp_path, steps=2))
    script.main(more)
    gc.collect()  # of what is over
    before = len(card.there)
    assert "validation:   0%" in terminal.getvalue()
    policy = script.load_policy(recipe.newest(tmp_path), CARD)
    seen = next(iter(policy.open_episodes(recipe.data())))["sample"](0)
    assert len(card.there) > before
    if name == "mobile":  # whose precision is the guide's 16-mixed
        assert {p.dtype for n, p in policy.model.backbone.named_parameters() if "lora" not in n} == {torch.bfloat16}
    if name == "smolvla":  # in the precision of its training
        exported = script.load_policy(recipe.newest(tmp_path).with_name("final_hf"), CARD)
        assert not (policy.bf16 or exported.bf16)
    if name == "nora":
        about = recipe.newest(tmp_path) / "model/config.json"
        about.write_text(about.read_text().replace("bfloat16", "float32"))
        assert {p.dtype for p in script.load_policy(about.parent, CARD).model.parameters()} == {torch.float32}
    assert len(policy.predict([seen, seen])) == 2 and policy.describe()["latency_ms"] > 0
    if hasattr(policy, "encode"):
        pictures = dict.fromkeys(policy.recipe["views"], np.zeros((36, 64, 3), np.uint8))
        loop = TwoRateLoop(policy, "go")
        loop.see(pictures, time.monotonic())
        assert loop.act().shape == (7,) and len(policy.freeze().predict([seen])) == 1


def test_a_tensor_left_behind_is_found(card):
    x = torch.ones(2, 3).to("cuda")
    assert (x + 1).device == CARD and x.sum().cpu().device == torch.device("cpu")
    with pytest.raises(AssertionError, match="on the CPU"):
        x + torch.ones(3)
    with pytest.raises(AssertionError, match="on the CPU"):
        torch.nn.Linear(3, 1)(x)
