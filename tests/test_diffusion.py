"""Diffusion VLA: the mathematics against hand-worked numbers, the expert, and what the training adds to train_async.py's."""
import inspect
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import train_async
import train_diffusion as diffusion

# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_alpha_bar_table():
    """Squared cosine with s = 0.008, beta capped at 0.999: the published table's values at T = 100."""
    abar = diffusion.NoiseSchedule(100).abar
    for t, value in {0: 0.99937, 49: 0.49384, 90: 0.01954, 98: 2.43e-4, 99: 2.43e-7}.items():
        assert abar[t].item() == pytest.approx(value, rel=3e-3), t
    assert abar.dtype == torch.float32 and (abar[1:] < abar[:-1]).all()


def test_add_noise_by_hand():
    schedule = diffusion.NoiseSchedule(100)
    abar = math.cos((50 / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2     # of t = 49
    x = schedule.add_noise(torch.full((1, 2, 7), 0.5), torch.full((1, 2, 7), -2.0), torch.tensor([49]))
    assert x[0, 0, 0].item() == pytest.approx(0.5 * math.sqrt(abar) - 2 * math.sqrt(1 - abar), rel=1e-5)


@hypothesis.given(seed=st.integers(0, 10**6), timesteps=st.sampled_from([50, 100]), steps=st.integers(1, 50))
def test_ddim_with_the_true_noise_recovers_the_actions(seed, timesteps, steps):
    """An oracle that knows x_0 says which noise is in x_t; from any starting noise the result is x_0, for any number of steps."""
    schedule, generator = diffusion.NoiseSchedule(timesteps), torch.Generator().manual_seed(seed)
    x0 = torch.rand(3, 8, 7, generator=generator) * 2 - 1
    seen = []

    def oracle(x, t):
        seen.append(t[0].item())
        abar = schedule.abar[t][:, None, None]
        return (x - abar.sqrt() * x0) / (1 - abar).sqrt()

    out = schedule.ddim(oracle, torch.randn(3, 8, 7, generator=generator), steps)
    assert torch.allclose(out, x0, atol=2e-3)                    # 1 / sqrt(abar_99) = 2029 times float32's rounding
    assert len(seen) == steps and seen[0] == timesteps - 1 and (steps == 1 or seen[-1] == 0) and seen == sorted(seen, reverse=True)


def test_one_ddim_step_by_hand():
    """From t = 99 to t = 0 in two steps with a network that always says 0: x_0 = clip(x / sqrt(abar)), then eps is what is left."""
    schedule = diffusion.NoiseSchedule(100)
    x = torch.full((1, 1, 7), 1e-4)
    a99, a0 = schedule.abar[99].item(), schedule.abar[0].item()
    x0 = 1e-4 / math.sqrt(a99)                                   # 0.203, inside the clip
    left = (1e-4 - math.sqrt(a99) * x0) / math.sqrt(1 - a99)     # 0
    x1 = math.sqrt(a0) * x0 + math.sqrt(1 - a0) * left
    expected = x1 / math.sqrt(a0)
    out = schedule.ddim(lambda x, t: torch.zeros_like(x), x, 2)
    assert out[0, 0, 0].item() == pytest.approx(expected, rel=1e-3)
    assert schedule.ddim(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 7), 1)[0, 0, 0].item() == 1.0    # 2029 is clipped


# ---- expert ----------------------------------------------------------------------------------------------------------

def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    active = np.array([True] * 6 + [False])
    return diffusion.DiffusionVLA(**dict(vl_shape=(1, 12), sensor_dim=24, width=32, layers=2, heads=4, dropout=0.0, horizon=8, active=active, timesteps=100) | changes).eval()


def small_batch(B=3, W=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(vl_features=torch.randn(B, 1, 12, generator=g), sensor=torch.randn(B, W, 1026, generator=g), sensor_length=torch.tensor([W, 7, 0][:B]),
                actions=torch.rand(B, 8, 7, generator=g) * 2 - 1, action_mask=torch.ones(B, 8, dtype=torch.bool), weight=torch.tensor([2.0, 2.0, 1.0][:B]),
                noise=torch.randn(B, 8, 7, generator=g), t=torch.tensor([3, 50, 99][:B]))


def test_real_size():
    """Sensor encoder 47.24 M as documented (fact sheet, section 6), expert 57.88 M plus the position (8 x 1024); the learned no-sensor embedding is 3072."""
    with torch.device("meta"):
        model = diffusion.DiffusionVLA((1, 2048), 3072, 1024, 4, 8, 0.1, 8, [True] * 7, 100)
    sensor = sum(p.numel() for p in model.condition.sensor.parameters())
    assert round(sensor / 1e6, 2) == 47.24
    assert round((sum(p.numel() for p in model.parameters()) - sensor - 8 * 1024 - 3072) / 1e6, 2) == 57.88


def test_the_expert_tells_the_steps_of_the_chunk_apart():
    """Without a position the same noisy action at every step would get the same noise estimate."""
    model = small_model()
    x = torch.ones(1, 8, 7) * 0.3
    eps = model.predict_noise(torch.zeros(1, 32), x, torch.tensor([50]))
    assert (eps[0, 0, :6] - eps[0, 1, :6]).abs().max() > 1e-3


def test_padding_and_resting_dimensions_teach_nothing():
    model, batch = small_model(), small_batch()
    batch["action_mask"][1, 3:] = False
    reference = model(batch)
    changed = {k: v.clone() for k, v in batch.items()}
    changed["actions"][1, 3:], changed["noise"][1, 3:] = torch.nan, 7.0                # beyond the end of the segment
    changed["noise"][..., 6] += 5                                                      # the gripper
    changed["sensor"][1, :-7], changed["sensor"][2] = torch.nan, torch.nan             # where there are no rows
    assert torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    changed["actions"][1, 2] += 0.1
    assert not torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    assert (model.sample(batch, batch["noise"], 5)[..., 6] == 0).all()


def test_the_loss_weighs_samples():
    model, batch = small_model(), small_batch()
    out = model(batch)
    assert out["loss_sum"].item() == pytest.approx((out["sample_loss"] * torch.tensor([2.0, 2.0, 1.0])).sum().item(), rel=1e-5)


def test_a_batch_is_learned_by_heart():
    """The noise of one batch at fixed timesteps to below 1 % of the zero estimate, and what is then sampled is the batch's actions."""
    model, batch = small_model(width=64).train(), small_batch()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    zero = (batch["noise"][..., :6] ** 2).mean().item()
    for k in range(500):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * k / 500)) / 2
        loss = model(batch)["loss_sum"] / 5
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01 * zero


def test_ema_follows_its_power():
    """decay = 1 - (1 + step)^-0.75: none at first (the new weights are taken whole), 0.405 at step 1, at most 0.9999."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = diffusion.Ema({"w": parameter})
    with torch.no_grad():
        parameter.fill_(1.0)
    ema.update(0)
    assert ema.average["w"].item() == 1.0
    with torch.no_grad():
        parameter.fill_(2.0)
    ema.update(1)
    assert ema.average["w"].item() == pytest.approx(2 - (1 - 2 ** -0.75), rel=1e-6)
    with ema.swapped():
        assert parameter.item() == ema.average["w"].item()
    assert parameter.item() == 2.0


# ---- what both scripts share is the same ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["Features", "load_data", "SensorEncoder", "sinusoid", "Condition", "TwoRateLoop", "online_features", "fill_statistics", "to_device", "lr_at", "moving_dims", "describe"])
def test_the_two_scripts_do_not_drift_apart(name):
    """Scripts do not import each other; what travels between them is kept equal by this test instead."""
    assert inspect.getsource(getattr(diffusion, name)) == inspect.getsource(getattr(train_async, name))
