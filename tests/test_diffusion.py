"""Diffusion VLA: the mathematics against hand-worked numbers, the expert, and what the training adds to train_async.py's."""

import inspect
import math
import os
import signal

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import train_async
import train_diffusion as diffusion
from common.config import parse_config
from common.runlog import read_metrics
from test_async import flags, load, open_data, run, same_training, sessions_root  # noqa: F401  a fixture

# ---- mathematics -----------------------------------------------------------------------------------------------------


def test_alpha_bar_table():
    """Squared cosine with s = 0.008, beta capped at 0.999: the published table's values at T = 100."""
    abar = diffusion.NoiseSchedule(100).abar
    for t, value in {0: 0.99937, 49: 0.49384, 90: 0.01954, 98: 2.43e-4, 99: 2.43e-7}.items():
        assert abar[t].item() == pytest.approx(value, rel=3e-3), t
    assert abar.dtype == torch.float32 and (abar[1:] < abar[:-1]).all()


def test_add_noise_by_hand():
    schedule = diffusion.NoiseSchedule(100)
    abar = (
        math.cos((50 / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )  # of t = 49
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
    assert torch.allclose(out, x0, atol=2e-3)  # 1 / sqrt(abar_99) = 2029 times float32's rounding
    assert (
        len(seen) == steps
        and seen[0] == timesteps - 1
        and (steps == 1 or seen[-1] == 0)
        and seen == sorted(seen, reverse=True)
    )


def test_one_ddim_step_by_hand():
    """From t = 99 to t = 0 in two steps with a network that always says 0: x_0 = clip(x / sqrt(abar)), then eps is what is left."""
    schedule = diffusion.NoiseSchedule(100)
    x = torch.full((1, 1, 7), 1e-4)
    a99, a0 = schedule.abar[99].item(), schedule.abar[0].item()
    x0 = 1e-4 / math.sqrt(a99)  # 0.203, inside the clip
    left = (1e-4 - math.sqrt(a99) * x0) / math.sqrt(1 - a99)  # 0
    x1 = math.sqrt(a0) * x0 + math.sqrt(1 - a0) * left
    expected = x1 / math.sqrt(a0)
    out = schedule.ddim(lambda x, t: torch.zeros_like(x), x, 2)
    assert out[0, 0, 0].item() == pytest.approx(expected, rel=1e-3)
    assert (
        schedule.ddim(lambda x, t: torch.zeros_like(x), torch.ones(1, 1, 7), 1)[0, 0, 0].item() == 1.0
    )  # 2029 is clipped


# ---- expert ----------------------------------------------------------------------------------------------------------


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    active = np.array([True] * 6 + [False])
    return diffusion.DiffusionVLA(
        **dict(
            vl_shape=(1, 12),
            sensor_dim=24,
            width=32,
            layers=2,
            heads=4,
            dropout=0.0,
            horizon=8,
            active=active,
            timesteps=100,
        )
        | changes
    ).eval()


def small_batch(B=3, W=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(
        vl_features=torch.randn(B, 1, 12, generator=g),
        sensor=torch.randn(B, W, 1026, generator=g),
        sensor_length=torch.tensor([W, 7, 0][:B]),
        actions=torch.rand(B, 8, 7, generator=g) * 2 - 1,
        action_mask=torch.ones(B, 8, dtype=torch.bool),
        weight=torch.tensor([2.0, 2.0, 1.0][:B]),
        noise=torch.randn(B, 2, 8, 7, generator=g),
        t=torch.tensor([[3, 80], [50, 1], [99, 20]][:B]),
    )


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
    changed["actions"][1, 3:], changed["noise"][1, :, 3:] = torch.nan, 7.0  # beyond the end of the segment
    changed["noise"][..., 6] += 5  # the gripper
    changed["sensor"][1, :-7], changed["sensor"][2] = torch.nan, torch.nan  # where there are no rows
    assert torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    changed["actions"][1, 2] += 0.1
    assert not torch.allclose(model(changed)["sample_loss"], reference["sample_loss"], atol=1e-6)
    assert (model.sample(batch, batch["noise"][:, 0], 5)[..., 6] == 0).all()


def test_several_draws_are_a_mean_of_single_ones():
    model, batch = small_model(), small_batch()
    single = [
        model(batch | dict(noise=batch["noise"][:, k : k + 1], t=batch["t"][:, k : k + 1]))["sample_loss"]
        for k in (0, 1)
    ]
    assert torch.allclose(model(batch)["sample_loss"], (single[0] + single[1]) / 2, atol=1e-6)


def test_the_loss_weighs_samples():
    model, batch = small_model(), small_batch()
    out = model(batch)
    assert out["loss_sum"].item() == pytest.approx(
        (out["sample_loss"] * torch.tensor([2.0, 2.0, 1.0])).sum().item(), rel=1e-5
    )


def test_a_batch_is_learned_by_heart():
    """The noise of one batch at fixed timesteps, to below 1 % of the error of guessing none."""
    model, batch = small_model(width=64).train(), small_batch(W=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    zero = (batch["noise"][..., :6] ** 2).mean().item()
    for k in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 + math.cos(math.pi * k / 300)) / 2
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
    assert ema.average["w"].item() == pytest.approx(2 - (1 - 2**-0.75), rel=1e-6)
    with ema.swapped():
        assert parameter.item() == ema.average["w"].item()
    assert parameter.item() == 2.0


# ---- what both scripts share is the same ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "Features",
        "load_data",
        "SensorEncoder",
        "sinusoid",
        "Condition",
        "online_features",
        "fill_statistics",
        "to_device",
        "lr_at",
        "moving_dims",
        "describe",
    ],
)
def test_the_two_scripts_do_not_drift_apart(name):
    """Scripts do not import each other; what travels between them is kept equal by this test instead."""
    assert inspect.getsource(getattr(diffusion, name)) == inspect.getsource(getattr(train_async, name))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(sessions_root, qwen_dir, tmp_path_factory):  # noqa: F811
    """checkpoint_dir of a run of 6 steps."""
    return run(
        sessions_root,
        qwen_dir,
        tmp_path_factory.mktemp("diffusion"),
        diffusion,
        sensor_window_size=130,
        diffusion_timesteps=50,
    )


def test_the_files_of_a_run(finished):
    latest, best = (load(finished / f"diffusion_stage1_{end}.pt") for end in ("latest", "best"))
    assert (
        not (finished / "diffusion_stage1_final.pt").exists()
        and "raw_state_dict" not in best
        and "optimizer_state_dict" not in best
    )
    raw, average = latest["raw_state_dict"], latest["model_state_dict"]
    trained = [k for k in latest["optimizer_state_dict"]]
    assert all(torch.equal(average[k], best["model_state_dict"][k]) for k in average)
    assert any(not torch.equal(raw[k], average[k]) for k in trained) and all(
        torch.equal(raw[k], average[k]) for k in raw if k not in trained
    )
    rows = read_metrics(finished / "diffusion_stage1")
    steps = [r for r in rows if "train/noise_loss" in r]
    assert len(steps) == 3 and all(
        0 <= r["train/diffusion_t"] <= 49 and r["train/noise_loss"] == r["train/loss_step"] for r in steps
    )
    assert {"val/loss_epoch", "val/mae_mm", "val/mae_mm_zero", "val/mae_mm_last", "val/mae_deg"} <= set().union(*rows)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_equals_uninterrupted(finished, sessions_root, qwen_dir, tmp_path, monkeypatch, workers):  # noqa: F811
    """Noise and timesteps belong to the position, not to the process: stopped within an epoch and resumed with other workers, weights, average and moments are the same bits."""

    def lr_at(step, *rest, original=diffusion.lr_at):
        if step == 2 and not (tmp_path / "diffusion_stage1_latest.pt").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    monkeypatch.setattr(diffusion, "lr_at", lr_at)
    more = dict(sensor_window_size=130, diffusion_timesteps=50)
    run(sessions_root, qwen_dir, tmp_path, diffusion, num_workers=workers, **more)
    assert load(tmp_path / "diffusion_stage1_latest.pt")["step"] == 3
    run(sessions_root, qwen_dir, tmp_path, diffusion, num_workers=2 - workers, resume="auto", **more)
    same_training(load(tmp_path / "diffusion_stage1_latest.pt"), load(finished / "diffusion_stage1_latest.pt"))


def test_cached_and_online_training_are_the_same(finished, sessions_root, qwen_dir, tmp_path):  # noqa: F811
    run(
        sessions_root,
        qwen_dir,
        tmp_path,
        diffusion,
        cache="online",
        cache_root=tmp_path / "none",
        views=["View1", "View5"],
        sensor_window_size=130,
        diffusion_timesteps=50,
    )
    a, b = (read_metrics(folder / "diffusion_stage1") for folder in (finished, tmp_path))
    losses = lambda rows: [r[k] for r in rows for k in ("train/noise_loss", "val/loss_epoch", "val/mae_mm") if k in r]  # noqa: E731
    assert losses(a) == pytest.approx(losses(b), rel=1e-4) and len(losses(a)) == 5


def test_two_validations_differ_by_the_weights_alone(sessions_root, qwen_dir):  # noqa: F811
    """Fixed timesteps, noise that belongs to the step, no dropout: twice the same numbers, whatever the batch size, and nothing of the model is changed."""
    cfg, data, _ = open_data(sessions_root, qwen_dir, script=diffusion)
    held_out = diffusion.SessionDataset(data.validation[:1], data.features, cfg)
    core = diffusion.build_model(cfg, data.features.shape, data.stats, torch.device("cpu"))
    policy = diffusion.Policy(core, cfg, data.stats, data.features.recipe, ["go"], torch.device("cpu"))
    before = {k: v.clone() for k, v in core.state_dict().items()}
    first = diffusion.validate(core, policy, held_out, cfg, torch.device("cpu"), 0, 1, lambda x: x)
    torch.manual_seed(1)
    cfg.batch_size = 7
    second = diffusion.validate(core, policy, held_out, cfg, torch.device("cpu"), 0, 1, lambda x: x)
    assert (
        second == pytest.approx(first, rel=1e-5)
        and core.training
        and all(torch.equal(v, before[k]) for k, v in core.state_dict().items())
    )


def test_each_sample_has_its_own_noise(sessions_root, qwen_dir):  # noqa: F811
    """By position: two positions of the same step differ, the same position is the same in every process; timesteps cover 0 .. T-1 evenly."""
    _, _, dataset = open_data(sessions_root, qwen_dir, script=diffusion)
    a, again, b = dataset[(5, 1)], dataset[(5, 1)], dataset[(6, 1)]
    assert (
        np.array_equal(a["noise"], again["noise"])
        and np.array_equal(a["t"], again["t"])
        and not np.array_equal(a["noise"], b["noise"])
    )
    assert a["noise"].shape == (1, 8, 7)
    times = np.array([dataset[(p, 0)]["t"][0] for p in range(1000)])
    assert times.min() >= 0 and times.max() <= 99 and np.histogram(times, 4, (0, 100))[0].min() > 200


def test_a_saved_policy_predicts_with_the_average(finished, sessions_root, qwen_dir):  # noqa: F811
    """load_policy of latest and best agree; the same observation gives the same actions, other noise others; alone as in a batch."""
    best, latest = (diffusion.load_policy(finished / f"diffusion_stage1_{end}.pt", "cpu") for end in ("best", "latest"))
    _, _, dataset = open_data(sessions_root, qwen_dir, script=diffusion)
    items = [dataset[(0, i)] for i in (3, 40, 200)]
    actions = best.predict(items)
    assert (
        actions.shape == (3, 8, 7)
        and (actions[..., 6] == 1).all()
        and np.array_equal(latest.predict(items), actions)
        and np.array_equal(best.predict(items), actions)
    )
    assert not np.allclose(best.predict(items, np.ones((3, 8, 7), np.float32)), actions)
    low, high = (np.array(best.stats["action"][k], np.float32) for k in ("q01", "q99"))
    assert (actions >= low - 1e-5).all() and (actions <= high + 1e-5).all()
    for b, item in enumerate(items):
        np.testing.assert_allclose(best.predict([item])[0], actions[b], atol=1e-5)


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_guides_command_parses():
    cfg = parse_config(
        diffusion.Config,
        "--dataset_dir /data --training-stage stage1 --batch_size 4 --grad_accum 8 --lr 1e-4 --epochs 20 --diffusion_timesteps 100".split(),
        diffusion.ALIASES,
    )
    assert cfg == diffusion.Config(dataset_dir=["/data"])  # the guide's numbers are the defaults
    assert cfg.sensor_window_size == 650


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(training_stage="stage2"), "not supported"),
        (dict(ddim_steps=200), "ddim_steps is 200"),
        (dict(ema_decay=1), "ema_decay"),
    ],
)
def test_wrong_settings_are_explained(sessions_root, qwen_dir, tmp_path, changed, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        diffusion.main(
            parse_config(diffusion.Config, flags(sessions_root, qwen_dir, tmp_path, **changed), diffusion.ALIASES)
        )
