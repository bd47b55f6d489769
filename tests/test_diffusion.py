"""Diffusion VLA: the mathematics against hand-worked numbers, the expert, and what the training adds to
train_async.py's."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import train_diffusion as diffusion
from common.config import parse_config
from common.run import Run
from test_async import STATS, config, load, metrics, open_data, run, sessions_root  # noqa: F401  a fixture
from test_async import small_batch as async_batch


# ---- mathematics -----------------------------------------------------------------------------------------------------
def test_alpha_bar_table():
    """Squared cosine with s = 0.008, beta capped at 0.999: the published table's values at T = 100."""
    abar = diffusion.NoiseSchedule(100).abar
    for t, value in {0: 0.99937, 49: 0.49384, 90: 0.01954, 98: 2.43e-4, 99: 2.43e-7}.items():
        assert abar[t].item() == pytest.approx(value, rel=3e-3), t
    assert abar.dtype == torch.float32 and (abar[1:] < abar[:-1]).all()


def test_add_noise_by_hand():
    f = lambda t: math.cos((t / 100 + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    schedule, abar = diffusion.NoiseSchedule(100), f(50) / f(0)  # of t = 49
    x = schedule.add_noise(torch.full((1, 2, 7), 0.5), torch.full((1, 2, 7), -2.0), torch.tensor([49]))
    assert x[0, 0, 0].item() == pytest.approx(0.5 * math.sqrt(abar) - 2 * math.sqrt(1 - abar), rel=1e-5)


@hypothesis.given(seed=st.integers(0, 10**6), timesteps=st.sampled_from([50, 100]), steps=st.integers(1, 50))
def test_ddim_with_the_true_noise_recovers_the_actions(seed, timesteps, steps):
    """An oracle that knows x_0 says which noise is in x_t; from any starting noise the result is x_0, for any number of
    steps."""
    schedule, generator, seen = diffusion.NoiseSchedule(timesteps), torch.Generator().manual_seed(seed), []
    x0 = torch.rand(3, 8, 7, generator=generator) * 2 - 1

    def oracle(x, t):
        seen.append(t[0].item())
        abar = schedule.abar[t][:, None, None]
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    out = schedule.ddim(oracle, torch.randn(3, 8, 7, generator=generator), steps)
    assert torch.allclose(out, x0, atol=2e-3)  # 1 / sqrt(abar_99) = 2029 times float32's rounding
    assert len(seen) == steps and seen[0] == timesteps - 1 and (steps == 1 or seen[-1] == 0)
    assert seen == sorted(seen, reverse=True)


def test_ddim_steps_by_hand():
    """From t = 99 to t = 0 in two steps with a network that always says 0: x_0 = clip(x / sqrt(abar)), and stays."""
    schedule, silent = diffusion.NoiseSchedule(100), lambda x, t: torch.zeros_like(x)
    out = schedule.ddim(silent, torch.full((1, 1, 7), 1e-4), 2)
    assert out[0, 0, 0].item() == pytest.approx(1e-4 / math.sqrt(schedule.abar[99]), rel=1e-3)  # 0.203
    assert schedule.ddim(silent, torch.ones(1, 1, 7), 1)[0, 0, 0].item() == 1.0  # 2029 is clipped


# ---- expert ----------------------------------------------------------------------------------------------------------
def small_model(width=32):
    torch.manual_seed(0)
    return diffusion.DiffusionVLA((1, 12), 24, width, 2, 4, 0.0, 8, STATS, 100).eval()


def small_batch(B=3, W=20):
    g = torch.Generator().manual_seed(1)
    noise, t = torch.randn(B, 2, 8, 7, generator=g), torch.tensor([[3, 80], [50, 1], [99, 20]][:B])
    return async_batch(B, W) | dict(noise=noise, t=t)


def test_the_expert_tells_the_steps_of_the_chunk_apart():
    """Without a position the same noisy action at every step would get the same noise estimate."""
    eps = small_model().predict_noise(torch.zeros(1, 32), torch.ones(1, 8, 7) * 0.3, torch.tensor([50]))
    assert (eps[0, 0, :6] - eps[0, 1, :6]).abs().max() > 1e-3


def test_padding_and_resting_dimensions_teach_nothing():
    model, batch = small_model(), small_batch()
    batch["action_mask"][1, 3:] = False
    reference = model(batch)
    by_hand = (reference["sample_loss"] * batch["weight"]).sum().item()
    assert reference["loss_sum"].item() == pytest.approx(by_hand, rel=1e-5)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["actions"][1, 3:], changed["noise"][1, :, 3:] = torch.nan, 7.0  # beyond the end of the segment
    changed["noise"][..., 6] += 5  # the gripper
    changed["sensor"][1, :-7], changed["sensor"][2] = torch.nan, torch.nan  # where there are no rows
    assert torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    changed["actions"][1, 2] += 0.1
    assert not torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    assert (model.sample(batch, batch["noise"], 5)[..., 6] == 0).all()


def test_several_draws_are_a_mean_of_single_ones():
    """In the loss and in sampling, where they share the condition."""
    model, batch = small_model(), small_batch()
    parts = [batch | dict(noise=batch["noise"][:, k : k + 1], t=batch["t"][:, k : k + 1]) for k in (0, 1)]
    losses, chunks = [model(b)["sample_loss"] for b in parts], [model.sample(b, b["noise"], 5) for b in parts]
    assert torch.allclose(model(batch)["sample_loss"], sum(losses) / 2, atol=1e-6)
    assert torch.allclose(model.sample(batch, batch["noise"], 5), sum(chunks) / 2, atol=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------

MORE = dict(sensor_window_size=130, diffusion_timesteps=50)


@pytest.fixture(scope="session")
def finished(sessions_root, qwen_dir, tmp_path_factory):  # noqa: F811
    """checkpoint_dir of a run of 6 steps."""
    return run(sessions_root, qwen_dir, tmp_path_factory.mktemp("diffusion"), diffusion, **MORE)


def test_the_files_of_a_run(finished):
    latest, best = (load(finished / f"diffusion_stage1_{end}.pt") for end in ("latest", "best"))
    assert not {"raw_state_dict", "optimizer_state_dict"} & best.keys()
    raw, average, trained = latest["raw_state_dict"], latest["model_state_dict"], latest["optimizer_state_dict"]
    assert all(torch.equal(average[k], best["model_state_dict"][k]) for k in average)
    assert any(not torch.equal(raw[k], average[k]) for k in trained)
    assert all(torch.equal(raw[k], average[k]) for k in raw if k not in trained)
    rows = metrics(finished)
    steps = [r for r in rows if "train/noise_loss" in r]
    assert len(steps) == 3 and all(0 <= r["train/diffusion_t"] <= 49 for r in steps)
    assert all(r["train/noise_loss"] == r["train/loss_step"] for r in steps)
    assert {"val/loss_epoch", "val/mae_mm", "val/mae_mm_zero", "val/mae_mm_last", "val/bias_dx"} <= set().union(*rows)


def validated(cfg, data, part):
    held_out = diffusion.SessionDataset(part, data.features, cfg)
    core = diffusion.build_model(cfg, data.about, torch.device("cpu"))
    before = {k: v.clone() for k, v in core.state_dict().items()}
    policy = diffusion.Policy(core, cfg, data.about, torch.device("cpu"))
    values = diffusion.validate(core, policy, held_out, Run(cfg, "unused", 1))
    assert core.training and all(torch.equal(v, before[k]) for k, v in core.state_dict().items())
    return values


def test_two_validations_differ_by_the_weights_alone(sessions_root, qwen_dir):  # noqa: F811
    """Fixed timesteps, noise that belongs to the step, no dropout: twice the same numbers, whatever the batch size."""
    cfg, data, _ = open_data(sessions_root, qwen_dir, script=diffusion)
    first = validated(cfg, data, data.validation[:1])
    torch.manual_seed(1)
    cfg.batch_size = 7
    assert validated(cfg, data, data.validation[:1]) == pytest.approx(first, rel=1e-5)


def test_each_sample_has_its_own_noise(sessions_root, qwen_dir):  # noqa: F811
    """By position: two positions of the same step differ, the same position is the same in every process; timesteps
    cover 0 .. T-1 evenly."""
    _, _, dataset = open_data(sessions_root, qwen_dir, script=diffusion)
    a, again, b = dataset[(5, 1)], dataset[(5, 1)], dataset[(6, 1)]
    assert np.array_equal(a["noise"], again["noise"]) and np.array_equal(a["t"], again["t"])
    assert not np.array_equal(a["noise"], b["noise"]) and a["noise"].shape == (8, 8, 7)
    times = np.concatenate([dataset[(p, 0)]["t"] for p in range(200)])
    assert times.min() >= 0 and times.max() <= 99 and np.histogram(times, 4, (0, 100))[0].min() > 300


def test_the_same_observation_is_not_always_pulled_to_the_same_side(finished, sessions_root, qwen_dir):  # noqa: F811
    """New noise in every call and for every observation, the same again after a reset, whatever the batches: what one
    fixed draw adds to every action of a run (-0.57 mm a step on the demo) averages out. `samples` averages at once."""
    best, latest = (diffusion.load_policy(finished / f"diffusion_stage1_{end}.pt", "cpu") for end in ("best", "latest"))
    item = open_data(sessions_root, qwen_dir, script=diffusion)[2][(0, 3)]
    first = best.predict([item] * 3)
    assert first.shape == (3, 8, 7) and (first[..., 6] == 1).all()
    assert all(np.abs(first[a] - first[b]).max() > 1e-3 for a, b in ((0, 1), (1, 2)))
    assert np.abs(best.predict([item]) - first[:1]).max() > 1e-3
    best.reset()
    np.testing.assert_allclose(np.concatenate([best.predict([item]) for _ in range(3)]), first, atol=1e-5)
    np.testing.assert_allclose(latest.predict([item] * 3), first, atol=1e-5)
    best.reset()
    np.testing.assert_allclose(best.predict([item], samples=3)[0], first.mean(0), atol=1e-5)
    low, high = (np.array(best.stats["action"][k], np.float32) for k in ("q01", "q99"))
    assert (first >= low - 1e-5).all() and (first <= high + 1e-5).all()


# ---- command line ----------------------------------------------------------------------------------------------------
def test_the_guides_command_parses():
    words = "--dataset_dir /data --training-stage stage1 --batch_size 4 --grad_accum 8 --lr 1e-4 --epochs 20"
    cfg = parse_config(diffusion.Config, f"{words} --diffusion_timesteps 100".split(), diffusion.ALIASES)
    assert cfg == diffusion.Config(dataset_dir=["/data"])  # the guide's numbers are the defaults
    assert cfg.sensor_window_size == 650
