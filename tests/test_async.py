"""Asynchronous VLA: the network, samples from real session folders, the training's promises, the policy."""

import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import build_vl_cache
import create_datapkl
import evaluate
import train_async
import train_diffusion
from common import UserError, session_data, vl_cache
from common import sessions as ss
from common.config import parse_config
from common.log import read_metrics
from common.run import Run
from common.two_rate import TwoRateLoop
from test_sessions import EPOCH, content

BOTH = pytest.mark.parametrize("script", [train_async, train_diffusion], ids=lambda s: s.__name__)
STATS = dict(action=dict(constant=[False] * 6 + [True]))


# ---- model -----------------------------------------------------------------------------------------------------------
def small_model():
    torch.manual_seed(0)
    return train_async.AsyncVLA((1, 12), 24, 32, 2, 4, 0.0, 8, STATS).eval()


def small_batch(B=3, W=20):
    g = torch.Generator().manual_seed(0)
    batch = dict(vl_features=torch.randn(B, 1, 12, generator=g), age=torch.tensor([0.0, 0.2, 0.4][:B]))
    batch |= dict(sensor=torch.randn(B, W, 1026, generator=g), sensor_length=torch.tensor([W, 7, 0][:B]))
    batch |= dict(actions=torch.rand(B, 8, 7, generator=g) * 2 - 1, action_mask=torch.ones(B, 8, dtype=torch.bool))
    return batch | dict(weight=torch.tensor([2.0, 2.0, 1.0][:B]))


def test_real_size():
    """The user's own count (fact sheet, section 6): regression 119.69 M, of which sensor encoder 47.24 M; diffusion
    expert 57.88 M. Ours add the force's encoder, its share of the fusion, an embedding for no sensor, positions."""
    sizes = ((1, 2048), 3072, 1024, 4, 8, 0.1, 8, STATS)
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    with torch.device("meta"):
        regression, diffusion = train_async.AsyncVLA(*sizes), train_diffusion.DiffusionVLA(*sizes, 100)
    ascan, force = regression.condition.sensor["ascan"], regression.condition.sensor["force"]
    ours = count(force) + 768 * 1024 + 3072 + 768
    assert round((count(regression) - ours) / 1e6, 2) == 119.69 and round(count(ascan) / 1e6, 2) == 47.24
    assert round((count(diffusion) - count(ascan) - ours - 8 * 1024) / 1e6, 2) == 57.88


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.sampled_from([33, 65, 66, 130]), st.integers(1, 33), st.sampled_from([16, 64]), st.integers(0, 99))
def test_sensor_padding_changes_nothing(window, length, more, seed):
    """Whatever stands where no rows are, and a longer window with the same rows, give the same feature."""
    torch.manual_seed(seed)
    encoder, length = train_async.SensorEncoder(1026, 16, 8, 2, 0.0).eval(), torch.tensor([length])
    rows = torch.randn(1, window, 1026)
    feature, garbage = encoder(rows, length), rows.clone()
    garbage[:, : window - length] = torch.nan
    longer = torch.cat([torch.full((1, more, 1026), 9.0), rows], dim=1)
    assert torch.isfinite(feature).all() and torch.allclose(encoder(garbage, length), feature, atol=1e-5)
    assert torch.allclose(encoder(longer, length), feature, atol=1e-5)
    rows[:, -1] += 1
    assert not torch.allclose(encoder(rows, length), feature, atol=1e-4)
    whole = torch.tensor([window])  # and it knows the order in time
    assert not torch.allclose(encoder(rows, whole), encoder(rows.flip(1), whole), atol=1e-4)


@BOTH
def test_the_age_of_the_pictures_and_the_force_are_told(script):
    """As one of 1,026 equal channels the force moved the condition by 0.05 of what the A-scan does: never learned."""
    torch.manual_seed(0)
    condition, batch = script.Condition((1, 12), 24, 32, 4, 0.0, STATS).eval(), small_batch()
    first = condition(batch)
    older = condition(batch | dict(age=batch["age"] + torch.tensor([0.1, 0.0, 0.0])))
    assert (older - first).abs().amax(1).gt(1e-3).tolist() == [True, False, False]
    rows, other = torch.randn(2, 64, 20, 1026)
    batch = dict(vl_features=torch.zeros(64, 1, 12), age=torch.zeros(64), sensor_length=torch.full((64,), 20))
    force, scan = (torch.cat([a[..., :1], b[..., 1:]], dim=2) for a, b in ((other, rows), (rows, other)))
    first, by_force, by_scan = (condition(batch | dict(sensor=sensor)) for sensor in (rows, force, scan))
    assert 0.15 < (by_force - first).norm() / (by_scan - first).norm() < 6


def test_without_sensor_rows_a_learned_embedding_takes_their_place():
    """And every parameter has a gradient in a batch without any: else ranks with one would leave DDP waiting."""
    model, batch = small_model(), small_batch()
    batch["sensor"][2] = torch.nan  # has no rows: never looked at
    before = model.sample(batch)
    with torch.no_grad():
        model.condition.no_sensor += 1
    after = model.sample(batch)
    assert torch.equal(after[:2], before[:2]) and (after[2] - before[2]).abs().max() > 1e-4
    batch["sensor"], batch["sensor_length"] = torch.zeros(3, 20, 1026), torch.zeros(3, dtype=torch.long)
    model.train()(batch)["loss_sum"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_and_resting_dimensions_teach_nothing():
    model, batch = small_model(), small_batch()
    batch["action_mask"][1, 3:] = False
    out = model(batch)
    by_hand = ((model.sample(batch) - batch["actions"])[1, :3, :6] ** 2).mean()
    assert out["sample_loss"][1].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert out["loss_sum"].item() == pytest.approx((out["sample_loss"] * batch["weight"]).sum().item(), rel=1e-5)
    batch["actions"][1, 3:], batch["actions"][..., 6] = torch.nan, 5.0
    assert torch.allclose(model(batch)["sample_loss"], out["sample_loss"])
    assert (model.sample(batch)[..., 6] == 0).all()


def test_learning_rate_by_hand():
    """1000 steps: 30 of warm-up, 20 at the peak, cosine from there to min_lr / lr = 0.01, and that for ever."""
    cfg = train_async.Config()
    at = [train_async.lr_at(step, 1000, cfg) / cfg.lr for step in range(2000)]
    assert at[0] == pytest.approx(1 / 30) and at[29] == at[30] == at[50] == 1
    assert at[525] == pytest.approx(0.01 + 0.99 * 0.5) and at[1000] == at[1950] == pytest.approx(0.01)
    assert all(b <= a for a, b in zip(at[50:], at[51:], strict=False))


# ---- sessions and a cache, in their real files -----------------------------------------------------------------------
def write_session(folder, seed, steps=30, sensor=True, instruction="Touch the red point", gap=None):
    """A preprocessed recording: data.pkl, 650 Hz sensor rows, 5 Hz images. How bright the image is says how far to go
    (x), the sign of the force where to (y). `gap`: 5.1 s that are missing before this step."""
    rng, kept = np.random.default_rng(seed), np.arange(steps)  # in 0.1 s
    if gap:
        kept = np.r_[:gap, gap + 51 : steps + 51]
    n, frames = kept[-1] + 1, np.arange(-0.15, 0.1 * kept[-1], 0.2)
    light = np.clip(rng.integers(60, 200) + 40 * np.sin(np.arange(n) / 9 + rng.uniform(0, 6)), 0, 245)
    data = content(steps, kept > (gap or n), frames, 65 * n * sensor) | dict(instruction=instruction)
    data["action_timestamps"], data["action_end_timestamps"] = EPOCH + 0.1 * kept, EPOCH + 0.1 * (kept + 1)
    data |= dict(image={}, image_timestamps={}, image_size=dict(View1=[56, 56], View5=[56, 56]))
    for v, view in enumerate(data["image_size"]):
        (folder / view).mkdir(parents=True)
        data["image"][view] = [f"{view}/{i}.jpg" for i in range(len(frames))]
        data["image_timestamps"][view] = EPOCH + frames
        for name, t in zip(data["image"][view], frames, strict=True):
            Image.fromarray(np.full((56, 56, 3), light[max(0, int(10 * t))] + 10 * v, np.uint8)).save(folder / name)
    rows = rng.normal(50, 0.3, (65 * n, 1026)).astype(np.float32)
    force = np.sign(np.sin(np.arange(65 * n) / 650 * 2 * np.pi / 0.7 + seed))
    rows[:, 0] = force + rng.normal(0, 0.1, len(rows))
    data["action"][:] = np.c_[light[kept] / 100 - 1, force[65 * kept], rng.normal(0, 0.05, (steps, 4)), np.ones(steps)]
    data["action"][:, 1] *= 0.5 + 0.2 * rng.random(steps)
    if sensor:
        np.save(folder / ss.SENSOR_FILE, rows)
        data["sensor_data"] |= dict(mean=rows.mean(0, np.float64), std=rows.std(0, np.float64))
    create_datapkl.save_data_pkl(folder / "data.pkl", data)


def write_sessions(root):
    for i in range(3):
        new, white = root / "New_dataset" / "Red_point", root / "White_silicone_white_circle"
        write_session(new / f"episode_20260101_00000{i}", i, gap=11 if i == 1 else None)
        write_session(white / f"recv_all_20260101_00000{i}", 10 + i, instruction="Insert into the white circle")
    for i in range(2):
        write_session(root / "OCT_insertion" / f"Captures_{i}", 20 + i, sensor=False)
    return root


def build_cache(root, model):
    words = f"--dataset-dirs {root} --model {model} --image-resize-height 56 --image-resize-width 56".split()
    build_vl_cache.main(parse_config(build_vl_cache.Config, words))


@pytest.fixture(scope="session")
def sessions_root(tmp_path_factory, qwen_dir):
    """8 sessions of three data sets with their cached features in cache/."""
    root = write_sessions(tmp_path_factory.mktemp("sessions"))
    build_cache(root, qwen_dir)
    return root


def flags(root, model, out, **more):
    """A tiny run on `root`: 6 steps of 2 x 4 samples."""
    values = dict(dataset_dir=root, model=model, checkpoint_dir=out, image_resize_height=56, image_resize_width=56)
    values |= dict(hidden_dim=16, sensor_dim=12, num_layers=1, num_heads=2, dropout=0.1, sensor_window_size=65)
    values |= dict(batch_size=4, grad_accum_steps=2, max_steps=6, num_workers=0, log_steps=2, val_split=0.3, lr=1e-3)
    lists = {k: v if isinstance(v, (list, tuple)) else [v] for k, v in (values | more).items()}
    return [word for k, v in lists.items() for word in (f"--{k.replace('_', '-')}", *map(str, v))]


def config(script, *args, **more):
    return parse_config(script.Config, flags(*args, **more), script.ALIASES)


def run(root, model, out, script=train_async, **more):
    script.main(config(script, root, model, out, **more))
    return out


def metrics(out):
    return read_metrics(next(p for p in Path(out).iterdir() if p.is_dir()))


def forbidden(*_, **__):
    raise AssertionError("opened")


@pytest.fixture(scope="session")
def finished(sessions_root, qwen_dir, tmp_path_factory):
    """checkpoint_dir of a run of 6 steps, which opens no image and loads no VLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "open", forbidden)
        patch.setattr(vl_cache.VLEncoder, "__init__", forbidden)
        return run(sessions_root, qwen_dir, tmp_path_factory.mktemp("async"))


def load(path):
    return torch.load(path, weights_only=True)


# ---- data ------------------------------------------------------------------------------------------------------------
def open_data(root, model, out="unused", script=train_async, **more):
    cfg = config(script, root, model, out, **more)
    data = session_data.load_data(cfg)
    return cfg, data, script.SessionDataset(data.train + data.validation, data.features, cfg)


def untrained(*args, script=train_async, **more):
    """-> (a policy with new weights, the samples of all sessions, its validation's values: callable)."""
    cfg, data, dataset = open_data(*args, script=script, **more)
    core = script.build_model(cfg, data.about, torch.device("cpu"))
    policy = script.Policy(core, cfg, data.about, torch.device("cpu"))
    return policy, dataset, lambda: script.validate(core, policy, dataset, Run(cfg, "unused", 4))


def items_of(dataset, name):
    """{step: item} of one session."""
    e = [s.name for s in dataset.sessions].index(name)
    return {int(dataset.steps[i]): dataset[(int(i), int(i))] for i in np.flatnonzero(dataset.owner == e)}


def test_the_terminal_of_rank_0_sees_how_far_it_is(sessions_root, qwen_dir, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    untrained(sessions_root, qwen_dir)[-1]()
    for what in ("reading sessions", "reading features", "validation"):
        assert f"{what}:   0%" in terminal.getvalue()
    terminal.truncate(0)
    monkeypatch.setenv("RANK", "1")
    assert ss.find_sessions([sessions_root]) and not terminal.getvalue()


def test_sessions_that_do_not_fit_are_refused(sessions_root, qwen_dir, monkeypatch):
    """A step is 100 ms everywhere: in the reuse of features, in the sensor's window, on the robot."""
    found = ss.find_sessions([sessions_root])
    found[1].metadata["action_hz"] = 20.0
    monkeypatch.setattr(ss, "find_sessions", lambda roots: found)
    with pytest.raises(UserError, match=f"{found[1].name} has actions at 20 Hz, expected 10: python create_datapkl.py"):
        open_data(sessions_root, qwen_dir)
    found[1].metadata["action_hz"] = 10
    for s in ss.split_sessions(found, 0.3)[1]:  # no image is of its time: nothing to validate on
        s._images = {view: (paths, stamps - 100) for view, (paths, stamps) in s._images.items()}
    with pytest.raises(UserError, match="no step of the [1-9] validation sessions has an image of View1, View5"):
        open_data(sessions_root, qwen_dir)


def test_a_sample_by_hand(sessions_root, qwen_dir):
    """Session with a gap before step 11: what step 10, the last of its segment, and step 11, the first of the next one,
    consist of."""
    cfg, data, dataset = open_data(sessions_root, qwen_dir, sensor_loss_weight=3)
    s = next(s for s in dataset.sessions if s.name == "New_dataset/Red_point/episode_20260101_000001")
    items = items_of(dataset, s.name)
    last, first = items[10], items[11]
    assert s.segment[10] == 0 and s.segment[11] == 1 and last["action_mask"].tolist() == [True] + [False] * 7
    assert np.array_equal(last["actions"], np.repeat(s.action[10:11], 8, 0))
    assert np.array_equal(last["previous"], s.action[9]) and not first["previous"].any()
    assert first["action_mask"].all() and np.array_equal(first["actions"], s.action[11:19])
    assert [items[k]["reuse_step"] for k in (0, 1, 2, 3, 10, 11, 12)] == [0, 1, 2, 0, 1, 0, 1]
    file, looks = dataset.features.files[s.name], dataset.features.ticks[s.name].looks
    for k, tick in ((0, 0), (2, 0), (3, 1), (10, 3), (11, 4), (14, 5)):
        assert torch.equal(items[k]["vl_features"], file[looks[tick]].float())
        taken = [s.view(name[:5])[1][s.view(name[:5])[0].index(name)] for name in looks[tick]]
        assert items[k]["age"] == pytest.approx(s.starts[k] - np.mean(taken), abs=1e-6) and items[k]["age"] > 0
    rows = np.load(s.path / ss.SENSOR_FILE)
    newest = np.flatnonzero(s.sensor_stamps <= s.starts[10])[-65:]
    assert last["sensor"].shape == (65, 1026) and np.array_equal(last["sensor"], rows[newest]) and last["weight"] == 3
    without = items_of(dataset, "OCT_insertion/-/Captures_0")[5]
    assert without["sensor"] is None and without["weight"] == 1
    batch = session_data.Collate(cfg, data.about["stats"])([last, without])
    assert batch["sensor"].shape == (2, 65, 1026) and batch["sensor_length"].tolist() == [65, 0]
    assert batch["age"].tolist() == pytest.approx([last["age"], without["age"]])
    assert batch["has_sensor"].tolist() == [True, False] and batch["actions"].abs().max() <= 1


def test_a_slow_vlm_is_trained_as_it_will_be(sessions_root, qwen_dir):
    """With 381 ms of latency and a look every 6 steps the feature is 4 to 9 steps old; at the start the robot waits for
    the first. A range of latencies mixes what each of its numbers gives, by the position."""
    name, more = "White_silicone_white_circle/-/recv_all_20260101_000000", dict(vlm_reuse_count=6)
    _, _, dataset = open_data(sessions_root, qwen_dir, vlm_latency_ms=381, **more)
    ages = [item["reuse_step"] for item in items_of(dataset, name).values()]
    assert ages[:16] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9]
    _, _, mixed = open_data(sessions_root, qwen_dir, vlm_latency_ms=[0, 381], **more)
    i = int(np.flatnonzero(mixed.owner == [s.name for s in mixed.sessions].index(name))[13])  # step 13: tick 6 or 12
    drawn = [mixed[(p, i)]["reuse_step"] for p in range(100)]
    _, ranged, _ = open_data(sessions_root, qwen_dir, vlm_latency_ms=[0, 150], **more)
    _, _, slow = open_data(sessions_root, qwen_dir, vlm_latency_ms=150, **more)
    assert ranged.about["oldest_image_s"] == pytest.approx(max(slow[(0, i)]["age"] for i in range(len(slow))), abs=1e-3)
    assert set(drawn) == {1, 7} and drawn == [mixed[(p, i)]["reuse_step"] for p in range(100)]


@pytest.mark.parametrize("k", [3, 11, 26])
def test_what_comes_later_is_not_seen(sessions_root, qwen_dir, tmp_path, k):
    """All images, sensor rows and robot rows after t_k replaced: step k's inputs stay the same, bit by bit."""
    original = ss.Session(sessions_root / "New_dataset/Red_point/episode_20260101_000000")
    folder = Path(shutil.copytree(original.path, tmp_path / "New_dataset/Red_point" / original.path.name))
    data, rows, t = ss.load_data_pkl(folder / "data.pkl"), np.load(folder / ss.SENSOR_FILE), original.starts[k]
    data["action"][k + 1 :], rows[original.sensor_stamps > t] = 7.0, 1e6
    create_datapkl.save_data_pkl(folder / "data.pkl", data)
    np.save(folder / ss.SENSOR_FILE, rows)
    later = [original.view(v)[0][i] for v in original.view_names for i in np.flatnonzero(original.view(v)[1] > t)]
    for name in later:
        Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / name)
    assert later

    def inputs(session):
        cfg = config(train_async, session.path, qwen_dir, "unused")
        features = session_data.Features(cfg, [session], optional=FileNotFoundError)  # without a cache: the images
        item = items_of(train_async.SessionDataset([session], features, cfg), session.name)[k]
        return [*item["images"].values(), item["sensor"], item["previous"]]

    same = zip(inputs(original), inputs(ss.Session(folder)), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)


def test_weights_follow_the_table(sessions_root, qwen_dir):
    """Shares that follow weights: test_sampler.py."""
    _, _, dataset = open_data(sessions_root, qwen_dir)
    table = {"New_dataset": 3, "White_silicone_white_circle": 2, "OCT_insertion": 1}
    assert dataset.sample_weights(train_async.WEIGHTS).tolist() == [table[name] for name in dataset.datasets]
    assert dataset.sample_weights({}, ["OCT_insertion=4"]).sum() == len(dataset) + 3 * 60


def test_validation_sessions_touch_nothing(sessions_root, qwen_dir, tmp_path):
    """Statistics and order stay the same whatever the held-out sessions hold; no session is on both sides."""
    _, data, _ = open_data(sessions_root, qwen_dir)
    assert data.validation and not {s.name for s in data.train} & {s.name for s in data.validation}
    shutil.copytree(sessions_root, tmp_path / "s")
    held_out = tmp_path / "s" / data.validation[0].path.relative_to(sessions_root)
    changed = ss.load_data_pkl(held_out / "data.pkl")
    changed["action"] *= 100
    create_datapkl.save_data_pkl(held_out / "data.pkl", changed)
    assert open_data(tmp_path / "s", qwen_dir)[1].about == data.about


def test_what_clipping_removes_and_the_sensors_rate_are_said(sessions_root, qwen_dir, tmp_path, capsys):
    """A turn of 3 degrees in less than 1 % of the steps is beyond q99: training sees almost nothing of it. What the
    policy knows of the sensor's rate is what was measured in the sessions."""
    shutil.copytree(sessions_root, tmp_path / "s")
    rare = sorted((tmp_path / "s").glob("*/**/data.pkl"))
    for i, path in enumerate(rare):
        data = ss.load_data_pkl(path)
        data["action"][:, 3] = 0.001 * (np.arange(len(data["action"])) % 3 - 1)
        data["action"][7, 3] = 3.0 if i == 0 else 0.0
        (data["sensor_data"] or {})["rate_hz"] = 325.0
        create_datapkl.save_data_pkl(path, data)
    run(tmp_path / "s", qwen_dir, tmp_path / "out", max_steps=1, val_split=0)
    assert "0.20 s at 325 Hz" in (out := capsys.readouterr().out)
    assert train_async.load_policy(tmp_path / "out", "cpu").sensor_hz == 325
    lines = [line.split() for line in out.splitlines()]
    most = next(words for words in lines if words[:4] == ["clipping", "removes", "at", "most"])
    share = next(words for words in lines if words[:3] == ["clipping", "removes,", "percent"])
    assert float(most[4 + 3]) == pytest.approx(3.0, abs=0.01) and float(share[3 + 3]) > 90


# ---- training --------------------------------------------------------------------------------------------------------
def test_the_files_of_a_run(finished):
    """Files and metrics have the guide's names; all loads with weights_only, nothing of the VLM is in it."""
    latest, best, final = (load(finished / f"qwen_vla_async{end}.pt") for end in ("", "_best", "_final"))
    assert latest["step"] == best["step"] == final["step"] == 6
    assert "optimizer_state_dict" in latest and "optimizer_state_dict" not in best.keys() | final.keys()
    weights = latest["model_state_dict"]
    assert all(torch.equal(v, final["model_state_dict"][k]) for k, v in weights.items())
    assert not any("vlm" in k or "language" in k for k in weights)
    names = (finished / "qwen_vla_async" / "validation_episodes.txt").read_text().split("\n")[:-1]
    assert latest["meta"] == dict(script="train_async", validation=names)
    rows = metrics(finished)
    steps = [r for r in rows if "train/loss_step" in r]
    assert [r["step"] for r in steps] == [2, 4, 6] and all(0 <= r["train/vl_reuse_counter"] <= 2 for r in steps)
    assert all(r["train/sensor_samples"] + r["train/nonsensor_samples"] == 8 for r in steps)
    known = set().union(*rows)
    assert {"train/lr", "train/grad_norm", "train/samples_per_s", "val/loss_epoch", "val/bias_dx"} <= known
    assert {f"val/swap_{name}" for name in ("feature", "sensor", "force", "ascan")} <= known
    assert not list(finished.glob(".tmp-*")) and (finished / "qwen_vla_async" / "loss.png").stat().st_size > 1000


def test_validation_by_hand(finished, sessions_root, qwen_dir):
    """Baselines, error, bias and loss over the held-out chunks; loss_weight of the training changes none of it."""
    row = next(r for r in metrics(finished) if "val/mae_mm" in r)
    cfg, data, _ = open_data(sessions_root, qwen_dir)
    policy, zero, last, bias, losses = train_async.load_policy(finished, "cpu"), [], [], [], []
    held_out = train_async.SessionDataset(data.validation, data.features, cfg)
    for i in range(len(held_out)):
        item = held_out[(i, i)]
        real = item["action_mask"]
        chunk = item["actions"][real]
        zero.append(np.abs(chunk[:, :3]))
        last.append(np.abs(chunk[:, :3] - item["previous"][:3]))
        guess = policy.predict([item])[0][real]
        bias.append(guess - chunk)
        action = policy.collate.action
        losses.append(((action.normalize(guess) - action.normalize(chunk))[:, :6] ** 2).mean())
    assert row["val/mae_mm_zero"] == pytest.approx(np.concatenate(zero).mean(), rel=1e-5)
    assert row["val/mae_mm_last"] == pytest.approx(np.concatenate(last).mean(), rel=1e-5)
    assert row["val/mae_mm"] == pytest.approx(np.abs(np.concatenate(bias))[:, :3].mean(), rel=1e-4)
    assert row["val/bias_dy"] == pytest.approx(np.concatenate(bias)[:, 1].mean(), rel=1e-3)
    assert row["val/loss_epoch"] == pytest.approx(np.mean(losses), rel=1e-3)


def test_workers_validate_the_same(sessions_root, qwen_dir, monkeypatch):
    """Held-out samples are read by the loader's workers: the main process opens no stream, and no number changes."""
    values, here, main, read = [], [], os.getpid(), ss._map_sensor
    monkeypatch.setattr(ss, "_map_sensor", lambda path: (os.getpid() == main and here.append(path)) or read(path))
    for workers in (2, 0):
        values.append(untrained(sessions_root, qwen_dir, num_workers=workers)[2]())
        assert bool(here) == (workers == 0)
    assert values[0] == values[1]


def test_a_policy_that_does_not_look_is_told_apart(sessions_root, qwen_dir):
    """Its error with the images of another session at the same phase is that with its own: 1, and a warning. One that
    reads what the feature knows gets worse with another's, and none."""
    policy, dataset, validated = untrained(sessions_root, qwen_dir)
    seen = {}
    for s in dataset.sessions:  # light is how far to go, and all that the images tell
        for k, tick in zip(*dataset.features.usable(s), strict=True):
            seen[dataset.features.read(s, tick)["vl_features"].numpy().tobytes()] = s.action[k]

    def looking(batch):
        return np.stack([np.tile(seen[x.numpy().tobytes()], (8, 1)) for x in batch["vl_features"]])

    for decode, looks in ((looking, True), (lambda batch: np.zeros((len(batch["vl_features"]), 8, 7)), False)):
        policy.decode = decode
        values = validated()
        assert (values["val/swap_feature"] > 1.05) == looks and (looks or values["val/swap_feature"] == 1)
        assert ("does not look at its images" in session_data.ChunkErrors.text(values)) != looks


@pytest.mark.parametrize("column, used", [(0, "force"), (5, "ascan")])
def test_the_ablation_names_what_is_used(sessions_root, qwen_dir, column, used):
    """A policy that reads one number of the newest sensor row: only with another sample's is its error another one."""
    policy, _, validated = untrained(sessions_root, qwen_dir)
    policy.decode = lambda batch: batch["sensor"][:, -1:, [column]].expand(-1, 8, 7).numpy()
    values = validated()
    changed = {name for name in ("feature", "sensor", "force", "ascan") if values[f"val/swap_{name}"] != 1}
    assert changed == {used, "sensor"} and (column or values["val/swap_force"] > 1)


@BOTH
def test_a_new_run_begins_with_the_weights_of_another(finished, sessions_root, qwen_dir, tmp_path, script):
    """--init-from on more sessions: weights and statistics are the old ones, step and moments new; another network is
    refused by name, and a resume of weights alone."""
    first = finished if script is train_async else run(sessions_root, qwen_dir, tmp_path / "first", script)
    with pytest.raises(UserError, match="no checkpoint that can be resumed"):
        run(sessions_root, qwen_dir, first, script, resume=next(first.glob("*_best.pt")))
    slow = dict(lr=1e-12, min_lr=0) | (dict(sensor_lr=1e-12) if script is train_async else {})
    out = run(sessions_root, qwen_dir, tmp_path / "b", script, init_from=first, max_steps=1, val_split=0, **slow)
    old, new = script.load_policy(first, "cpu"), script.load_policy(out, "cpu")
    assert new.stats == old.stats and load(next(out.glob("*.pt")))["step"] == 1
    items = [open_data(sessions_root, qwen_dir, script=script)[2][(0, 3)]]
    np.testing.assert_allclose(new.predict(items), old.predict(items), atol=1e-5)
    with pytest.raises(UserError, match="another model"):
        run(sessions_root, qwen_dir, tmp_path / "c", script, init_from=first, hidden_dim=32)


# ---- policy ----------------------------------------------------------------------------------------------------------
def test_predict_from_images_equals_predict_from_the_cache(finished, sessions_root, qwen_dir):
    """One preprocessing: raw images, rows and instruction give what the cached feature and the dataset's item give;
    another instruction gives something else."""
    policy = train_async.load_policy(finished, "cpu")
    _, _, dataset = open_data(sessions_root, qwen_dir)
    i = int(np.flatnonzero(dataset.owner == 2)[7])
    s, item = dataset.sessions[2], dataset[(0, i)]
    look = dataset.features.ticks[s.name].looks[dataset.ticks[i]]
    images = {v: np.asarray(Image.open(s.path / n)) for v, n in zip(("View1", "View5"), look, strict=True)}
    raw = dict(images=images, instruction=s.instruction, sensor=item["sensor"], age=item["age"])
    np.testing.assert_allclose(policy.predict([raw]), policy.predict([item]), atol=1e-5)
    assert np.abs(policy.predict([raw | dict(instruction="Something else")]) - policy.predict([raw])).max() > 1e-6
    older = np.concatenate([np.full((50, 1026), 3.0, np.float32), item["sensor"]])  # rows before the window
    np.testing.assert_allclose(policy.predict([raw | dict(sensor=older)]), policy.predict([raw]), atol=1e-6)
    glitch = np.concatenate([item["sensor"], np.full((2, 1026), np.nan, np.float32)])  # left out, as in training
    assert np.array_equal(policy.predict([raw | dict(sensor=glitch)]), policy.predict([raw]))


def test_the_loop_runs_a_real_policy(finished):
    """What the loop sends is predict's first action on the feature of its last look and on the newest rows in order;
    too early or too late it holds."""
    policy = train_async.load_policy(finished, "cpu")
    clock = SimpleNamespace(now=10.0, monotonic=lambda: clock.now)
    loop = TwoRateLoop(policy, "Touch the red point", max_age_s=0.5, clock=clock)
    assert loop.act() is None and 0.2 < policy.oldest_image_s < 0.8  # two steps of reuse, and a camera at 4 Hz
    rng = np.random.default_rng(0)
    images = {v: rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for v in ("View1", "View5")}
    rows = rng.normal(50, 1, (100, 1026)).astype(np.float32)
    loop.see(images, clock.now)
    clock.now += 0.1
    for part in (rows[:20], rows[20:90], rows[90:]):  # more than the window, in uneven pieces
        loop.push_sensor(part)
        clock.now += 0.02
    raw = dict(images=images, instruction="Touch the red point")
    felt = policy.predict([raw | dict(sensor=rows[-65:], age=0.16)])[0, 0]
    unfelt = policy.predict([raw | dict(sensor=None, age=0.46)])[0, 0]
    fresh, again = (policy.predict([raw | dict(sensor=None) | age])[0, 0] for age in ({}, dict(age=0.0)))
    assert np.array_equal(fresh, again) and np.abs(fresh - unfelt).max() > 1e-4  # how old the images are matters
    np.testing.assert_allclose(loop.act(), felt, atol=1e-6)
    clock.now += 0.3  # after the last row: in training, too, such a step has no sensor
    np.testing.assert_allclose(loop.act(), unfelt, atol=1e-6)
    assert np.abs(unfelt - felt).max() > 1e-6
    clock.now += 0.5
    assert loop.act() is None and loop.ages == {1: 1, 4: 1} and loop.holds == 2


def test_what_the_policy_says_of_itself(finished, qwen_dir):
    """Everything that a robot's program needs, as plain values. What it refuses: see also test_policy.py."""
    policy = train_async.load_policy(finished, "cpu")
    for key, value, said in (("sensor", np.zeros((65, 3)), r"\(n, 1026\)"), ("age", np.nan, "age is nan, expected")):
        with pytest.raises(UserError, match=said):
            policy.predict([{"vl_features": torch.zeros(1, 64), key: value}])
    about = json.loads(json.dumps(policy.describe()))
    assert about["cameras"] == {view: dict(height=56, width=56) for view in ("View1", "View5")}
    assert (about["kind"], about["rate_hz"], about["horizon"], about["script"]) == ("delta", 10, 8, "train_async")
    assert [(a["name"], a["unit"]) for a in about["actions"]] == session_data.ACTIONS and about["latency_ms"] > 0
    assert about["actions"][0]["low"] < about["actions"][0]["high"] and "the newest 65 at 650 Hz" in about["sensor"]
    assert about["needs"] == dict(vlm=str(qwen_dir)) and len(about["instructions"]) == 2 and policy.encoder is None


@BOTH
def test_weights_are_cast_once(sessions_root, qwen_dir, script, monkeypatch):
    """Under bf16 autocast frozen weights were cast again in every call, and in every step of the diffusion. The same
    numbers to the bit."""
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", False)  # as CUDA's autocast has it
    policy, dataset, _ = untrained(sessions_root, qwen_dir, script=script)
    policy.model.requires_grad_(False).eval()
    policy.bf16, chunks, casts = True, [], []
    for step in (lambda: policy, policy.freeze):
        step().reset()
        with CountCasts() as count:
            chunks.append(policy.predict([dataset[(0, 0)]]))
        casts.append(count.casts)
    assert np.array_equal(*chunks) and casts[1] < casts[0] / 2


class CountCasts(TorchDispatchMode):
    casts = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.casts += op is torch.ops.aten._to_copy.default
        return op(*args, **(kwargs or {}))


def test_evaluation_reads_every_stretch(finished, sessions_root):
    """evaluate.py's contract: a session with a gap is two episodes, held-out names are known, standing still keeps the
    gripper."""
    policy, names = train_async.load_policy(finished, "cpu"), load(finished / "qwen_vla_async.pt")["meta"]["validation"]
    episodes = list(policy.open_episodes(sessions_root, names))
    lengths = {e["name"].rsplit("/", 1)[-1]: len(e["target"]) for e in episodes}
    assert lengths["episode_20260101_000001#1"] == 11 and lengths["episode_20260101_000001#2"] == 19
    assert {e["name"].split("#")[0] for e in episodes} == set(names)
    assert all((e["hold"] == [0, 0, 0, 0, 0, 0, 1]).all() for e in episodes)
    with pytest.raises(UserError, match="no session 'nobody'"):
        next(policy.open_episodes(sessions_root, ["nobody"]))


def test_the_printed_evaluate_command_works(sessions_root, qwen_dir, tmp_path, capsys, monkeypatch):
    """Of a run on two folders, started elsewhere, its checkpoints in one with a space in its name."""
    monkeypatch.chdir(tmp_path)
    parts = [sessions_root / name for name in ("New_dataset", "White_silicone_white_circle")]
    run(parts, qwen_dir, tmp_path / "a run", cache_root=sessions_root / "cache", max_steps=1)
    words = shlex.split(capsys.readouterr().out.partition("evaluate: ")[2])
    assert Path(words[1]).samefile(evaluate.__file__)
    report = evaluate.main([*words[2:], "--stride", "10", "--plots", "0"])
    assert "validation episodes of the checkpoint" in capsys.readouterr().out
    assert report["hold still"]["per_dim"]["gripper"] == 0 and np.isfinite(report["policy"]["relative"])


def test_evaluation_without_a_cache_runs_the_vlm(finished, sessions_root, tmp_path, capsys):
    shutil.copytree(sessions_root / "OCT_insertion", tmp_path / "OCT_insertion")
    policy, names = train_async.load_policy(finished, "cpu"), ["OCT_insertion/-/Captures_0"]
    fresh, cached = (next(policy.open_episodes(root, names)) for root in (tmp_path, sessions_root))
    np.testing.assert_allclose(policy.predict([fresh["sample"](4)]), policy.predict([cached["sample"](4)]), atol=1e-5)
    assert "computed now by" in capsys.readouterr().out


# ---- command line ----------------------------------------------------------------------------------------------------
def test_the_guides_command_parses():
    parse = lambda text: parse_config(train_async.Config, text.split(), train_async.ALIASES)  # noqa: E731
    guide = "--batch-size 4 --grad-accum-steps 8 --lr 1e-4 --sensor-enabled --vlm-reuse-count 3 --sensor-window-size 65"
    assert parse(f"{guide} --image-resize-height 360 --image-resize-width 640") == train_async.Config()
    for text in ("--no-sensor-enabled", "--no-sensor", "--sensor_enabled False"):
        assert not parse(text).sensor_enabled
    assert parse("--wandb offline --max_steps 3 --sensor-loss-weight 3.0").wandb.mode == "offline"


def test_check_prints_a_batch_without_a_cache(sessions_root, qwen_dir, tmp_path, capsys):
    train_async.main(config(train_async, sessions_root, qwen_dir, tmp_path, check=True, cache_root=tmp_path))
    shown = capsys.readouterr().out
    for text in ("check passed", "not there yet", "build_vl_cache.py", "New_dataset", "(4, 65, 1026)"):
        assert text in shown
    assert not list(tmp_path.iterdir())
