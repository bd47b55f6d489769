"""The plan of a run: memory counted on tensors without values, against what the allocator hands out."""

import dataclasses
import shutil

import pytest
import torch
from recipes import RECIPES
from torch import nn
from torch.profiler import ProfilerActivity, profile

from common import UserError, plan
from common.config import parse_config
from common.program import launch


class Planned(Exception):
    """Ends a script's main where it plans."""


def planned(recipe, folder, monkeypatch, **changes):
    """-> (config, dataset, collate, build) that the script's main gives to plan.check."""
    seen = []

    def check(*args):
        seen.extend(args)
        raise Planned

    monkeypatch.setattr(plan, "check", check)
    with pytest.raises(Planned):
        recipe.script.main(recipe.config(folder, **changes))
    return seen[:4]


def floats(tensors):
    """Bytes of what the plan counts: integers are small, and real."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if not plan.is_integer(t)}
    return sum(storage.nbytes() for storage in storages.values())


def allocated(cfg, build, batch):
    """-> (bytes of the weights, peak of the second micro-batch of a step) as the allocator of the CPU reports them."""
    core = build(plan.new_run(cfg), torch.float32).train()
    weights = floats([*core.parameters(), *core.buffers()])

    def forward_backward():
        out = core(batch)
        loss = sum(v for v in out.values() if v.requires_grad)
        del out
        loss.backward()

    forward_backward()
    held = floats([p.grad for p in core.parameters() if p.grad is not None])
    held += floats([t for t in batch.values() if isinstance(t, torch.Tensor)])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        forward_backward()
    live = peak = 0
    for event in seen.profiler.kineto_results.events():
        live += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, live)
    return weights, weights + held + peak


@pytest.mark.parametrize("name", RECIPES)
def test_the_peak_is_that_of_the_allocator(name, recipe_of, tmp_path, monkeypatch):
    cfg, dataset, collate, build = planned(recipe_of(name), tmp_path, monkeypatch, batch=4)
    batch = collate([dataset[(i, i % len(dataset))] for i in range(4)])
    need = plan.measure(cfg, build, batch, on_card=False)
    weights, peak = allocated(cfg, build, batch)
    assert need.weights == weights
    assert need.peak - need.moments == pytest.approx(peak, rel=0.1)


class Model(nn.Module):
    """100 -> 50, and one sum; its loss keeps the input of the layer and the squared output's factor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(100, 50, bias=False)

    def forward(self, batch):
        return dict(loss_sum=self.layer(batch["x"]).square().sum())


@dataclasses.dataclass
class Config:
    batch_size: int = 8
    accumulation: int = 2
    num_workers: int = 0
    output_dir: str = "."
    check: bool = False


def test_a_layer_by_hand():
    need = plan.measure(Config(), lambda cfg, dtype: Model(), dict(x=torch.zeros(8, 100)), on_card=False)
    assert need.weights == need.gradients == 4 * 5000 and need.moments == 8 * 5000 and need.trained == 5000
    assert need.activations == 4 * (800 + 400 + 1)  # the batch, the layer's output, the loss
    # backward: the weights' new gradient beside the one that is there, and the batch
    assert 4 * 5800 <= need.peak - need.states <= 4 * (5800 + 4 * 400)
    assert need.sharded(4) == need.states // 4 + need.activations + 6 * 5000  # no layers: all of it is gathered


def test_a_mask_without_values_takes_all():
    """As transformers 5.17 makes that of SmolVLM's patches, from an image of floats."""
    shapes = plan.Shapes()
    with shapes.fake, shapes:
        mask, ids = torch.ones(3, 4).bool(), torch.bucketize(torch.rand(3, 4), torch.rand(5))
        ids[mask] = ids[mask]
        assert ids[mask].shape == (12,)


def test_nothing_is_read_and_no_random_number_drawn(recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of("nora")
    model = shutil.copytree(recipe.written["model"], tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    cfg = recipe.config(tmp_path / "out", check=True, model=str(model))
    torch.manual_seed(3)
    recipe.script.main(cfg)
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))


def test_what_does_not_fit_is_refused_with_settings_that_do(recipe_of, tmp_path, monkeypatch, capsys):
    recipe = recipe_of("nora")
    monkeypatch.setattr(plan, "card", 0.0062)
    with pytest.raises(UserError, match="of GPU memory, 6.2 MB can be used. What fits: ") as refused:
        recipe.script.main(recipe.config(tmp_path, check=True, train="full"))
    assert "DOES NOT FIT" in capsys.readouterr().out
    lora = next(way for way in str(refused.value).partition("What fits: ")[2].split(" | ") if "lora" in way)
    cfg = recipe.config(tmp_path, check=True)
    values = vars(parse_config(type(cfg), lora.split()))
    vars(cfg).update({word[2:]: values[word[2:]] for word in lora.split()[::2]})
    recipe.script.main(cfg)
    assert "6.2 MB of the GPU: fits" in capsys.readouterr().out


def test_checkpointing_and_smaller_batches_need_less(recipe_of, tmp_path, monkeypatch):
    cfg, dataset, collate, build = planned(recipe_of("nora"), tmp_path, monkeypatch)
    batches = [collate([dataset[(i, 0)] for i in range(n)]) for n in (1, 2, 4)]
    one, two, four = (plan.measure(cfg, build, batch, on_card=True).activations for batch in batches)
    assert four - two == pytest.approx(2 * (two - one), rel=0.05)
    cfg.gradient_checkpointing = True
    assert plan.measure(cfg, build, batches[2], on_card=True).activations < 0.5 * four
    # OpenVLA's towers have layer norms, which give fp32 on CUDA: in the first pass and in the second
    cfg, dataset, collate, build = planned(recipe_of("openvla"), tmp_path, monkeypatch)
    batch = collate([dataset[(i, 0)] for i in range(2)])
    whole = plan.measure(cfg, build, batch, on_card=True).activations
    cfg.gradient_checkpointing = True
    assert plan.measure(cfg, build, batch, on_card=True).activations < whole


def test_the_plan_of_another_card_is_a_check(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr("sys.argv", ["train_toy.py", "--batch_size", "4", "--plan", "24"])
    launch(lambda cfg: asked.append((cfg, plan.card)), Config)
    assert asked == [(Config(batch_size=4, check=True), 24.0)]
    assert plan.asked_card(["--plan=80", "--check"]) == (["--check"], 80.0)
    assert plan.asked_card(["--check"]) == (["--check"], None)
    with pytest.raises(UserError, match="--plan big: expected the memory of a GPU in GB"):
        plan.asked_card(["--plan", "big"])
    monkeypatch.setattr(plan, "card", None)


def test_every_key_of_the_plan_is_a_key_of_a_script():
    known = [recipe.script.Config() for recipe in RECIPES.values()]
    for key in {key for change in plan.CHANGES for key in change} | {*plan.FP32, *plan.START}:
        assert any(plan.places(cfg, key) for cfg in known), key
    for cfg in known:
        assert all(plan.places(cfg, keys) for keys in (plan.BATCH, plan.ACCUMULATION, "num_workers"))
    cfg = RECIPES["smolvla"].script.Config()
    said = plan.flags(cfg, dict(batch_size=4, gradient_accumulation_steps=2))
    assert said == "--training.batch_size 4 --training.gradient_accumulation_steps 2"
