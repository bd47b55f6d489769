"""Asynchronous VLA: the model, the training's promises on real session folders, and the two-rate loop under a simulated clock."""
import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_async
from common import sessions as ss
from common import vl_cache
from common.config import parse_config
from common.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent

# ---- model -----------------------------------------------------------------------------------------------------------


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    active = np.array([True] * 6 + [False])
    return train_async.AsyncVLA(**dict(vl_shape=(1, 12), sensor_dim=24, width=32, layers=2, heads=4, dropout=0.0, horizon=8, active=active) | changes).eval()


def small_batch(B=3, W=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(vl_features=torch.randn(B, 1, 12, generator=g), sensor=torch.randn(B, W, 1026, generator=g), sensor_length=torch.tensor([W, 7, 0][:B]),
                actions=torch.rand(B, 8, 7, generator=g) * 2 - 1, action_mask=torch.ones(B, 8, dtype=torch.bool), weight=torch.tensor([2.0, 2.0, 1.0][:B]))


def test_real_size():
    """The user's own count (fact sheet, section 6): 119.69 M, of which the sensor encoder is 47.24 M; the learned no-sensor embedding adds 3072 numbers."""
    with torch.device("meta"):
        model = train_async.AsyncVLA((1, 2048), 3072, 1024, 4, 8, 0.1, 8, [True] * 7)
    assert round((sum(p.numel() for p in model.parameters()) - 3072) / 1e6, 2) == 119.69
    assert round(sum(p.numel() for p in model.condition.sensor.parameters()) / 1e6, 2) == 47.24


@hypothesis.settings(max_examples=15)
@hypothesis.given(window=st.sampled_from([33, 65, 66, 130]), length=st.integers(1, 33), more=st.sampled_from([16, 64]), seed=st.integers(0, 99))
def test_sensor_padding_changes_nothing(window, length, more, seed):
    """Whatever stands where no rows are, and a longer window with the same rows, give the same feature."""
    torch.manual_seed(seed)
    encoder = train_async.SensorEncoder(16, 8, 2, 0.0).eval()
    rows = torch.randn(1, window, 1026)
    feature = encoder(rows, torch.tensor([length]))
    garbage = rows.clone()
    garbage[:, :window - length] = torch.nan
    longer = torch.cat([torch.full((1, more, 1026), 9.0), rows], dim=1)
    assert torch.isfinite(feature).all()
    assert torch.allclose(encoder(garbage, torch.tensor([length])), feature, atol=1e-5) and torch.allclose(encoder(longer, torch.tensor([length])), feature, atol=1e-5)
    rows[:, -1] += 1
    assert not torch.allclose(encoder(rows, torch.tensor([length])), feature, atol=1e-4)


def test_the_sensor_feature_knows_the_order_in_time():
    torch.manual_seed(0)
    encoder = train_async.SensorEncoder(16, 8, 2, 0.0).eval()
    rows = torch.randn(1, 64, 1026)
    assert (encoder(rows, torch.tensor([64])) - encoder(rows.flip(1), torch.tensor([64]))).abs().max() > 1e-3


def test_without_sensor_rows_a_learned_embedding_takes_their_place():
    model, batch = small_model(), small_batch()
    with torch.no_grad():
        model.condition.no_sensor.normal_()
    before = model.sample(batch)
    batch["sensor"][2] = torch.nan                                # has no rows: never looked at
    assert torch.equal(model.sample(batch), before)
    with torch.no_grad():
        model.condition.no_sensor += 1
    after = model.sample(batch)
    assert torch.equal(after[:2], before[:2]) and not torch.allclose(after[2], before[2])


def test_every_parameter_has_a_gradient_in_a_batch_without_any_sensor():
    """Else ranks whose batch has none would leave DDP waiting."""
    model, batch = small_model().train(), small_batch()
    batch["sensor_length"] = torch.zeros(3, dtype=torch.long)
    model(batch)["loss_sum"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_padding_and_resting_dimensions_teach_nothing():
    model, batch = small_model(), small_batch()
    batch["action_mask"][1, 3:] = False
    reference = model(batch)["sample_loss"]
    by_hand = ((model.sample(batch) - batch["actions"])[1, :3, :6] ** 2).mean()
    assert reference[1].item() == pytest.approx(by_hand.item(), rel=1e-5)
    batch["actions"][1, 3:], batch["actions"][..., 6] = torch.nan, 5.0
    assert torch.allclose(model(batch)["sample_loss"], reference)
    assert (model.sample(batch)[..., 6] == 0).all()


def test_the_truth_is_no_input():
    """The code behind the guide fed the truth in as z_chunk and predicted the difference: its loss could only be 0."""
    model, batch = small_model(), small_batch()
    predicted = model.sample(batch)
    batch["actions"] = batch["actions"].flip(0) * 3
    assert torch.equal(model.sample(batch), predicted)


def test_micro_batches_equal_one_batch():
    """Loss sums over the global sum of weights: k micro-batches of n have the gradient of one batch of k * n, also where they weigh differently."""
    model, batch = small_model(), small_batch(3)
    (model(batch)["loss_sum"] / 5).backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for b in range(3):
        (model({k: v[b:b + 1] for k, v in batch.items()})["loss_sum"] / 5).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, whole[name], atol=1e-6), name


def test_a_batch_is_learned_by_heart():
    """To below 1 % of the error of no action at all."""
    model, batch = small_model().train(), small_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(150):
        loss = model(batch)["loss_sum"] / 5
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.01 * (batch["actions"][..., :6] ** 2).mean().item()


# ---- schedule --------------------------------------------------------------------------------------------------------

def test_learning_rate_by_hand():
    """1000 steps: 30 of warm-up, 20 at the peak, cosine from there to min_lr / lr = 0.01, and that for ever."""
    cfg = train_async.Config()
    at = lambda step: train_async.lr_at(step, 1000, cfg)  # noqa: E731
    assert at(0) == pytest.approx(1 / 30) and at(29) == 1 and at(30) == 1 and at(50) == 1
    assert at(525) == pytest.approx(0.01 + 0.99 * 0.5) and at(1000) == pytest.approx(0.01) and at(1950) == pytest.approx(0.01)
    assert all(at(s + 1) <= at(s) for s in range(50, 1100))


# ---- two rates under a simulated clock -------------------------------------------------------------------------------

class SimulatedClock:
    """monotonic() and sleep() for two threads: time jumps to the earliest sleeper once both sleep, and one thread runs at a time."""

    def __init__(self, threads):
        self.now, self.running, self.sleepers, self.condition = 0.0, threads, [], threading.Condition()

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        with self.condition:
            me = (round(self.now + seconds, 9), threading.get_ident() == threading.main_thread().ident, len(self.sleepers))
            self.sleepers.append(me)
            self.running -= 1
            self.condition.notify_all()
            self.condition.wait_for(lambda: self.running == 0 and min(self.sleepers) == me, timeout=20)
            self.sleepers.remove(me)
            self.now, self.running = max(self.now, me[0]), self.running + 1

    def leave(self):
        with self.condition:
            self.running -= 1
            self.condition.notify_all()


class SlowPolicy:
    """Stands for a Policy: encoding takes `latency` seconds of the clock, predicting `expert` seconds; an action is (feature, number of rows, newest row, 0...)."""

    def __init__(self, clock, latency, expert=0.02, reuse=3, window=5, fail_at=None):
        self.clock, self.latency, self.expert, self.fail_at, self.calls = clock, latency, expert, fail_at, 0
        self.cfg, self.instructions, self.device = SimpleNamespace(sensor_window_size=window, vlm_reuse_count=reuse), ["go"], torch.device("cpu")

    def encode(self, pictures):
        self.calls += 1
        self.clock.sleep(self.latency)
        if self.calls == self.fail_at:
            self.clock.leave()                                    # this thread ends here
            raise RuntimeError("out of memory")
        return torch.tensor([[[pictures[0][0]["View1"]]]])

    def predict(self, observations):
        self.clock.sleep(self.expert)
        rows = observations[0]["sensor"]
        return np.array([[[float(observations[0]["vl_features"][0, 0]), 0 if rows is None else len(rows), 0 if rows is None else rows[-1, 0], 0, 0, 0, 1]]])


def take_picture(clock):
    return {"View1": clock.now}, clock.now


def drive(latency, seconds=6.0, camera=take_picture, **policy):
    clock = SimulatedClock(2)
    slow = SlowPolicy(clock, latency, **policy)
    loop = train_async.TwoRateLoop(slow, clock=clock, max_age_s=1.0)
    sent = []

    def execute(action):
        sent.append((clock.now, action))
        if loop.stopped.is_set():                                 # the last hold: let the other thread go
            clock.leave()
        else:
            loop.push_sensor(np.full((2, 1026), clock.now, np.float32))
    error = None
    try:
        loop.run(lambda: camera(clock), execute, seconds)
    except RuntimeError as e:
        error = e
    return loop, sent, error


@pytest.mark.parametrize("latency, reuse, ages", [(0.25, 3, {2: 1, 3: 1, 4: 1, 5: 1}), (0.381, 3, None), (0.381, 4, None)])
def test_the_loop_keeps_its_rate_whatever_the_vlm_takes(latency, reuse, ages):
    """Ten actions a second on the grid of the clock, holds until the first feature, ages as the arithmetic of capture and latency says."""
    loop, sent, _ = drive(latency, reuse=reuse)
    begun = [t for t, _ in sent[:-1]]
    assert len(begun) == 60 and loop.late == 0
    assert np.allclose(np.diff(begun), 0.1, atol=0.021)           # an action goes out when the expert is done, 20 ms after the tick; a hold at once
    first = next(i for i, (_, a) in enumerate(sent) if a is not None)
    assert loop.holds == first == int(latency / 0.1 + 1)
    assert all(a is not None for _, a in sent[first:-1]) and sent[-1][1] is None
    period = max(reuse / 10, latency)
    for t, action in sent[first:-1]:
        age = t - 0.02 - action[0]                                # of the feature at the tick
        assert latency - 1e-6 <= age < latency + period + 1e-6
    assert sum(loop.ages.values()) == 60 - first and min(loop.ages) >= int(latency * 10) and max(loop.ages) <= int((latency + period) * 10 + 1e-6)
    text = "\n".join(loop.report())
    assert f"{60 - first} actions, {first} holds" in text and "%" in text


def test_the_newest_sensor_rows_are_used_without_waiting_for_the_vlm():
    _, sent, _ = drive(0.25)
    for (t, action), (before, _) in list(zip(sent[1:-1], sent))[5:]:
        assert action[1] == 5 and action[2] == pytest.approx(before, abs=1e-3)      # full window, whose newest row came with the action before


def test_a_stale_feature_means_hold():
    """A camera that hangs after its third picture: one second later the robot is told to hold."""
    pictures = []

    def camera(clock):
        pictures.append(clock.now)
        if len(pictures) == 4:
            clock.sleep(100.0)
        return take_picture(clock)

    loop, sent, _ = drive(0.1, seconds=4.0, camera=camera)
    held = [t for t, action in sent[:-1] if action is None and t > 0.5]
    assert held and min(held) == pytest.approx(pictures[2] + 1.0, abs=0.11) and max(loop.ages) <= 10


def test_an_error_of_the_vlm_holds_and_is_raised():
    loop, sent, error = drive(0.2, fail_at=4)
    assert "out of memory" in str(error) and "hold" in str(error) and sent[-1][1] is None and len(sent) < 20


def test_an_instruction_must_be_chosen_where_there_are_several():
    policy = SlowPolicy(None, 0.1)
    policy.instructions = ["left", "right"]
    with pytest.raises(ValueError, match="2, e.g. \\['left', 'right'\\]"):
        train_async.TwoRateLoop(policy)
    assert train_async.TwoRateLoop(policy, "right").instruction == "right"


# ---- sessions and a cache, in their real files ---------------------------------------------------------------------------

def write_session(folder, seed, steps=30, sensor=True, views=("View1", "View5"), instruction="Touch the red point", gap=None):
    """A preprocessed recording: data.pkl, 650 Hz sensor rows, 5 Hz images. How bright the image is says how far to go (x), the sign of the force where to (y)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    start = 1.7e9 + 1000 * seed
    t = start + 0.1 * np.arange(steps + 1) + (0 if gap is None else 5.0 * (np.arange(steps + 1) >= gap))
    light = rng.integers(60, 200) + 40 * np.sin(np.arange(int(10 * (t[-1] - t[0])) + 10) / 9 + rng.uniform(0, 6))     # per 0.1 s
    frames = start - 0.15 + 0.2 * np.arange(int((t[-1] - start) / 0.2) + 2)
    for v, view in enumerate(views):
        (folder / view).mkdir()
        for stamp in frames:
            picture = np.full((56, 56, 3), np.clip(light[max(0, int((stamp - start) * 10))] + 10 * v, 0, 255), np.uint8)
            Image.fromarray(picture).save(folder / view / f"{stamp:.3f}.jpg")
    stamps = start - 0.5 + np.arange(int((t[-1] - start + 1) * 650)) / 650
    rows = (rng.normal(0, 0.3, (len(stamps), 1026)) + 50).astype(np.float32)
    force = np.sign(np.sin(stamps * 2 * np.pi / 0.7 + seed))
    rows[:, 0] = force + rng.normal(0, 0.1, len(rows))
    action = np.zeros((steps, 7), np.float32)
    action[:, 0] = light[((t[:-1] - start) * 10).astype(int)] / 100 - 1
    action[:, 1] = force[np.searchsorted(stamps, t[:-1], side="right") - 1] * (0.5 + 0.2 * rng.random(steps))
    action[:, 2:6], action[:, 6] = rng.normal(0, 0.05, (steps, 4)), 1.0
    if sensor:
        np.save(folder / "sensor_stream.npy", rows)
    keep = np.arange(steps) != (gap - 1 if gap else -1)                       # the step over the gap is no step
    data = dict(schema_version=2, action=action[keep], action_timestamps=t[:-1][keep], action_end_timestamps=t[1:][keep],
                segment_id=np.zeros(keep.sum(), np.int32) if gap is None else (np.arange(steps)[keep] >= gap).astype(np.int32), robot_state=np.zeros((keep.sum(), 12), np.float32),
                image={v: [f"{v}/{stamp:.3f}.jpg" for stamp in frames] for v in views}, image_timestamps={v: frames.copy() for v in views}, instruction=instruction,
                sensor_data=dict(file="sensor_stream.npy", timestamps=stamps, rate_hz=650.0, channels=1026, clock_offset_s=0.0) if sensor else None, metadata=dict(sources=[]))
    (folder / "data.pkl").write_bytes(pickle.dumps(data))
    return folder


def write_sessions(root):
    for i in range(3):
        write_session(root / "New_dataset" / "Red_point" / f"episode_20260101_00000{i}", i, gap=12 if i == 1 else None)
        write_session(root / "White_silicone_white_circle" / f"recv_all_20260101_00000{i}", 10 + i, instruction="Insert into the white circle")
    for i in range(2):
        write_session(root / "OCT_insertion" / f"Captures_{i}", 20 + i, sensor=False)
    return root


def build_cache(root, cache_root, model, stride=3, views=("View1", "View5")):
    encoder = vl_cache.VLEncoder(str(model), list(views), 56, 56)
    for s in ss.find_sessions([root]):
        ticks = s.ticks(stride, views)
        features = torch.full((len(ticks), 1, encoder.width), torch.nan)
        for j in np.flatnonzero(ticks.complete):
            images = {v: s.frame_path(v, int(ticks.frame_index[v][j])) for v in views}
            features[j] = encoder.encode([(images, s.instruction)])[0]
        vl_cache.write_features(cache_root, s, ticks, features, vl_cache.make_meta(encoder.recipe(), s, ticks))


@pytest.fixture(scope="session")
def sessions_root(tmp_path_factory, qwen_dir):
    """8 sessions of three data sets with their cached features in cache/."""
    root = write_sessions(tmp_path_factory.mktemp("sessions"))
    build_cache(root, root / "cache", qwen_dir)
    return root


def flags(root, model, out, **more):
    """A tiny run on `root`: 6 steps of 2 x 4 samples."""
    values = dict(dataset_dir=root, model=model, checkpoint_dir=out, image_resize_height=56, image_resize_width=56, hidden_dim=16, sensor_dim=12, num_layers=1, num_heads=2, dropout=0.1,
                  batch_size=4, grad_accum_steps=2, max_steps=6, num_workers=0, log_steps=2, val_split=0.3, lr=1e-3, sensor_window_size=65) | more
    return [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, (list, tuple)) else [v]))]


def run(root, model, out, script=train_async, **more):
    cfg = parse_config(script.Config, flags(root, model, out, **more), script.ALIASES)
    script.main(cfg)
    return out


@pytest.fixture(scope="session")
def finished(sessions_root, qwen_dir, tmp_path_factory):
    """checkpoint_dir of a run of 6 steps."""
    return run(sessions_root, qwen_dir, tmp_path_factory.mktemp("async"))


def load(path):
    return torch.load(path, weights_only=True)


def same_training(a, b):
    """Weights, moments and bookkeeping of two checkpoints are bitwise equal."""
    assert (a["step"], a["position"], a["best_val_loss"], a["epoch_sums"]) == (b["step"], b["position"], b["best_val_loss"], b["epoch_sums"])
    for key in [k for k in a if k.endswith("_state_dict") and k != "optimizer_state_dict"]:
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    assert all(torch.equal(v, b["optimizer_state_dict"][k][m]) for k, moments in a["optimizer_state_dict"].items() for m, v in moments.items())
