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
import train_diffusion
from common import sessions as ss
from common import vl_cache
from common.config import parse_config
from common.runlog import read_metrics

ROOT = Path(__file__).resolve().parent.parent

# ---- model -----------------------------------------------------------------------------------------------------------


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    active = np.array([True] * 6 + [False])
    return train_async.AsyncVLA(
        **dict(vl_shape=(1, 12), sensor_dim=24, width=32, layers=2, heads=4, dropout=0.0, horizon=8, active=active)
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
    )


def test_real_size():
    """The user's own count (fact sheet, section 6): 119.69 M, of which the sensor encoder is 47.24 M; the learned no-sensor embedding adds 3072 numbers."""
    with torch.device("meta"):
        model = train_async.AsyncVLA((1, 2048), 3072, 1024, 4, 8, 0.1, 8, [True] * 7)
    assert round((sum(p.numel() for p in model.parameters()) - 3072) / 1e6, 2) == 119.69
    assert round(sum(p.numel() for p in model.condition.sensor.parameters()) / 1e6, 2) == 47.24


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    window=st.sampled_from([33, 65, 66, 130]),
    length=st.integers(1, 33),
    more=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
def test_sensor_padding_changes_nothing(window, length, more, seed):
    """Whatever stands where no rows are, and a longer window with the same rows, give the same feature."""
    torch.manual_seed(seed)
    encoder = train_async.SensorEncoder(16, 8, 2, 0.0).eval()
    rows = torch.randn(1, window, 1026)
    feature = encoder(rows, torch.tensor([length]))
    garbage = rows.clone()
    garbage[:, : window - length] = torch.nan
    longer = torch.cat([torch.full((1, more, 1026), 9.0), rows], dim=1)
    assert torch.isfinite(feature).all()
    assert torch.allclose(encoder(garbage, torch.tensor([length])), feature, atol=1e-5) and torch.allclose(
        encoder(longer, torch.tensor([length])), feature, atol=1e-5
    )
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
    batch["sensor"][2] = torch.nan  # has no rows: never looked at
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
        (model({k: v[b : b + 1] for k, v in batch.items()})["loss_sum"] / 5).backward()
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
    assert (
        at(525) == pytest.approx(0.01 + 0.99 * 0.5)
        and at(1000) == pytest.approx(0.01)
        and at(1950) == pytest.approx(0.01)
    )
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
            me = (
                round(self.now + seconds, 9),
                threading.get_ident() == threading.main_thread().ident,
                len(self.sleepers),
            )
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
        self.cfg, self.instructions, self.device = (
            SimpleNamespace(sensor_window_size=window, vlm_reuse_count=reuse),
            ["go"],
            torch.device("cpu"),
        )

    def encode(self, pictures):
        self.calls += 1
        self.clock.sleep(self.latency)
        if self.calls == self.fail_at:
            self.clock.leave()  # this thread ends here
            raise RuntimeError("out of memory")
        return torch.tensor([[[pictures[0][0]["View1"]]]])

    def predict(self, observations):
        self.clock.sleep(self.expert)
        rows = observations[0]["sensor"]
        return np.array(
            [
                [
                    [
                        float(observations[0]["vl_features"][0, 0]),
                        0 if rows is None else len(rows),
                        0 if rows is None else rows[-1, 0],
                        0,
                        0,
                        0,
                        1,
                    ]
                ]
            ]
        )


def take_picture(clock):
    return {"View1": clock.now}, clock.now


def drive(latency, seconds=6.0, camera=take_picture, **policy):
    clock = SimulatedClock(2)
    slow = SlowPolicy(clock, latency, **policy)
    loop = train_async.TwoRateLoop(slow, clock=clock, max_age_s=1.0)
    sent = []

    def execute(action):
        sent.append((clock.now, action))
        if loop.stopped.is_set():  # the last hold: let the other thread go
            clock.leave()
        else:
            loop.push_sensor(np.full((2, 1026), clock.now, np.float32))

    error = None
    try:
        loop.run(lambda: camera(clock), execute, seconds)
    except RuntimeError as e:
        error = e
    return loop, sent, error


@pytest.mark.parametrize(
    "latency, reuse, ages", [(0.25, 3, {2: 1, 3: 1, 4: 1, 5: 1}), (0.381, 3, None), (0.381, 4, None)]
)
def test_the_loop_keeps_its_rate_whatever_the_vlm_takes(latency, reuse, ages):
    """Ten actions a second on the grid of the clock, holds until the first feature, ages as the arithmetic of capture and latency says."""
    loop, sent, _ = drive(latency, reuse=reuse)
    begun = [t for t, _ in sent[:-1]]
    assert len(begun) == 60 and loop.late == 0
    assert np.allclose(
        np.diff(begun), 0.1, atol=0.021
    )  # an action goes out when the expert is done, 20 ms after the tick; a hold at once
    first = next(i for i, (_, a) in enumerate(sent) if a is not None)
    assert loop.holds == first == int(latency / 0.1 + 1)
    assert all(a is not None for _, a in sent[first:-1]) and sent[-1][1] is None
    period = max(reuse / 10, latency)
    for t, action in sent[first:-1]:
        age = t - 0.02 - action[0]  # of the feature at the tick
        assert latency - 1e-6 <= age < latency + period + 1e-6
    assert (
        sum(loop.ages.values()) == 60 - first
        and min(loop.ages) >= int(latency * 10)
        and max(loop.ages) <= int((latency + period) * 10 + 1e-6)
    )
    text = "\n".join(loop.report())
    assert f"{60 - first} actions, {first} holds" in text and "%" in text


def test_the_newest_sensor_rows_are_used_without_waiting_for_the_vlm():
    _, sent, _ = drive(0.25)
    for (t, action), (before, _) in list(zip(sent[1:-1], sent))[5:]:
        assert action[1] == 5 and action[2] == pytest.approx(
            before, abs=1e-3
        )  # full window, whose newest row came with the action before


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


def write_session(
    folder, seed, steps=30, sensor=True, views=("View1", "View5"), instruction="Touch the red point", gap=None
):
    """A preprocessed recording: data.pkl, 650 Hz sensor rows, 5 Hz images. How bright the image is says how far to go (x), the sign of the force where to (y)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    start = 1.7e9 + 1000 * seed
    t = start + 0.1 * np.arange(steps + 1) + (0 if gap is None else 5.0 * (np.arange(steps + 1) >= gap))
    light = rng.integers(60, 200) + 40 * np.sin(
        np.arange(int(10 * (t[-1] - t[0])) + 10) / 9 + rng.uniform(0, 6)
    )  # per 0.1 s
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
    keep = np.arange(steps) != (gap - 1 if gap else -1)  # the step over the gap is no step
    data = dict(
        schema_version=2,
        action=action[keep],
        action_timestamps=t[:-1][keep],
        action_end_timestamps=t[1:][keep],
        segment_id=np.zeros(keep.sum(), np.int32) if gap is None else (np.arange(steps)[keep] >= gap).astype(np.int32),
        robot_state=np.zeros((keep.sum(), 12), np.float32),
        image={v: [f"{v}/{stamp:.3f}.jpg" for stamp in frames] for v in views},
        image_timestamps={v: frames.copy() for v in views},
        instruction=instruction,
        sensor_data=dict(file="sensor_stream.npy", timestamps=stamps, rate_hz=650.0, channels=1026, clock_offset_s=0.0)
        if sensor
        else None,
        metadata=dict(sources=[], action_hz=10.0),
    )
    (folder / "data.pkl").write_bytes(pickle.dumps(data))
    return folder


def write_sessions(root):
    for i in range(3):
        write_session(root / "New_dataset" / "Red_point" / f"episode_20260101_00000{i}", i, gap=12 if i == 1 else None)
        write_session(
            root / "White_silicone_white_circle" / f"recv_all_20260101_00000{i}",
            10 + i,
            instruction="Insert into the white circle",
        )
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
    values = (
        dict(
            dataset_dir=root,
            model=model,
            checkpoint_dir=out,
            image_resize_height=56,
            image_resize_width=56,
            hidden_dim=16,
            sensor_dim=12,
            num_layers=1,
            num_heads=2,
            dropout=0.1,
            batch_size=4,
            grad_accum_steps=2,
            max_steps=6,
            num_workers=0,
            log_steps=2,
            val_split=0.3,
            lr=1e-3,
            sensor_window_size=65,
        )
        | more
    )
    return [
        word
        for k, v in values.items()
        for word in (f"--{k.replace('_', '-')}", *map(str, v if isinstance(v, (list, tuple)) else [v]))
    ]


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
    assert (a["step"], a["position"], a["best_val_loss"], a["epoch_sums"]) == (
        b["step"],
        b["position"],
        b["best_val_loss"],
        b["epoch_sums"],
    )
    for key in [k for k in a if k.endswith("_state_dict") and k != "optimizer_state_dict"]:
        assert all(torch.equal(v, b[key][k]) for k, v in a[key].items()), key
    assert all(
        torch.equal(v, b["optimizer_state_dict"][k][m])
        for k, moments in a["optimizer_state_dict"].items()
        for m, v in moments.items()
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def open_data(root, model, out="unused", script=train_async, **more):
    cfg = parse_config(script.Config, flags(root, model, out, **more), script.ALIASES)
    data = script.load_data(cfg)
    return cfg, data, script.SessionDataset(data.train + data.validation, data.features, cfg)


def items_of(dataset, name):
    """{step: item} of one session."""
    e = [s.name for s in dataset.sessions].index(name)
    return {int(k): dataset.read(e, row) for row, k in enumerate(dataset.steps[e])}


@pytest.mark.parametrize("script", [train_async, train_diffusion], ids=lambda s: s.__name__)
def test_actions_of_another_rate_are_refused(sessions_root, qwen_dir, monkeypatch, script):
    """A step is 100 ms everywhere: in the reuse of features, in the sensor's window, on the robot."""
    found = ss.find_sessions([sessions_root])
    found[1].metadata["action_hz"] = 20.0
    monkeypatch.setattr(ss, "find_sessions", lambda roots: found)
    with pytest.raises(
        ValueError, match=f"{found[1].name} has actions at 20 Hz, expected 10: python create_datapkl.py"
    ):
        open_data(sessions_root, qwen_dir, script=script)


def test_a_sample_by_hand(sessions_root, qwen_dir):
    """Session with a gap before step 11: what step 10, the last of its segment, and step 11, the first of the next one, consist of."""
    cfg, _, dataset = open_data(sessions_root, qwen_dir, sensor_loss_weight=3)
    s = next(s for s in dataset.sessions if s.name == "New_dataset/Red_point/episode_20260101_000001")
    items = items_of(dataset, s.name)
    last, first = items[10], items[11]
    assert s.segment[10] == 0 and s.segment[11] == 1
    assert (
        last["action_mask"].tolist() == [True] + [False] * 7
        and np.array_equal(last["actions"], np.repeat(s.action[10:11], 8, 0))
        and np.array_equal(last["previous"], s.action[9])
    )
    assert (
        first["action_mask"].all() and np.array_equal(first["actions"], s.action[11:19]) and not first["previous"].any()
    )
    assert [items[k]["reuse_step"] for k in (0, 1, 2, 3, 10, 11, 12)] == [0, 1, 2, 0, 1, 0, 1]
    features = dataset.features.files[s.name].features
    assert all(
        torch.equal(items[k]["vl_features"], features[tick].float())
        for k, tick in ((0, 0), (2, 0), (3, 1), (10, 3), (11, 4), (14, 5))
    )
    rows = np.load(s.path / "sensor_stream.npy")
    newest = np.flatnonzero(s.sensor_stamps <= s.starts[10])[-65:]
    assert last["sensor"].shape == (65, 1026) and np.array_equal(last["sensor"], rows[newest]) and last["weight"] == 3
    without = items_of(dataset, "OCT_insertion/-/Captures_0")[5]
    assert without["sensor"] is None and without["weight"] == 1
    batch = train_async.Collate(cfg, train_async.load_data(cfg).stats)([last, without])
    assert (
        batch["sensor"].shape == (2, 65, 1026)
        and batch["sensor_length"].tolist() == [65, 0]
        and batch["has_sensor"].tolist() == [True, False]
        and batch["actions"].abs().max() <= 1
    )


def test_a_slow_vlm_is_trained_as_it_will_be(sessions_root, qwen_dir):
    """With 381 ms of latency and a look every 6 steps the feature is 4 to 9 steps old; at the start the robot waits for the first."""
    _, _, dataset = open_data(sessions_root, qwen_dir, vlm_latency_ms=381, vlm_reuse_count=6)
    ages = [
        item["reuse_step"]
        for item in items_of(dataset, "White_silicone_white_circle/-/recv_all_20260101_000000").values()
    ]
    assert ages[:16] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 4, 5, 6, 7, 8, 9]


@hypothesis.settings(max_examples=8)
@hypothesis.given(k=st.integers(3, 26))
def test_what_comes_later_is_not_seen(sessions_root, qwen_dir, tmp_path_factory, k):
    """All images, sensor rows and robot rows after t_k replaced: step k's inputs stay the same, bit by bit."""
    original = ss.Session(sessions_root / "New_dataset" / "Red_point" / "episode_20260101_000000")
    folder = tmp_path_factory.mktemp("later") / "New_dataset" / "Red_point" / original.path.name
    shutil.copytree(original.path, folder)
    data, t = pickle.loads((folder / "data.pkl").read_bytes()), original.starts[k]
    data["action"][k + 1 :] = 7.0
    (folder / "data.pkl").write_bytes(pickle.dumps(data))
    rows = np.load(folder / "sensor_stream.npy")
    rows[original.sensor_stamps > t] = 1e6
    np.save(folder / "sensor_stream.npy", rows)
    changed = 0
    for view in original.view_names:
        for i in np.flatnonzero(original.view(view)[1] > t):
            Image.fromarray(np.zeros((56, 56, 3), np.uint8)).save(folder / original.view(view)[0][i])
            changed += 1
    assert changed

    def inputs(session, script):
        cfg = parse_config(script.Config, flags(session.path, qwen_dir, "unused", cache="online"), script.ALIASES)
        item = items_of(script.SessionDataset([session], script.Features(cfg, [session]), cfg), session.name)[k]
        return item["images"], item["sensor"], item["previous"]

    for script in (train_async, train_diffusion):
        (images, sensor, previous), (images2, sensor2, previous2) = (
            inputs(original, script),
            inputs(ss.Session(folder), script),
        )
        assert (
            all(np.array_equal(images[v], images2[v]) for v in images)
            and np.array_equal(sensor, sensor2)
            and np.array_equal(previous, previous2)
        )


def test_shares_follow_the_table(sessions_root, qwen_dir):
    """Per sample 3 : 2 : 1; in an epoch every data set's share is that of weight x steps, within 1 %."""
    cfg, data, _ = open_data(sessions_root, qwen_dir, val_split=0)
    dataset = train_async.SessionDataset(data.train, data.features, cfg)
    weights = dataset.sample_weights(data.weights)
    order = train_async.GlobalOrder(len(dataset), 0, weights)
    drawn = np.array([dataset.locate(order.index(p))[0] for p in range(20 * len(dataset))])
    counts = {
        name: np.isin(drawn, [e for e, s in enumerate(dataset.sessions) if s.dataset == name]).mean()
        for name in dataset.datasets
    }
    steps = {
        name: sum(len(k) for s, k in zip(dataset.sessions, dataset.steps) if s.dataset == name)
        for name in dataset.datasets
    }
    table = {"New_dataset": 3, "White_silicone_white_circle": 2, "OCT_insertion": 1}
    for name, count in counts.items():
        assert count == pytest.approx(table[name] * steps[name] / sum(table[n] * steps[n] for n in table), abs=0.01)
    assert open_data(sessions_root, qwen_dir, dataset_weight=["OCT_insertion=4"])[1].weights["OCT_insertion"] == 4


@pytest.mark.parametrize("text", ["OCT=2", "OCT_insertion=0", "OCT_insertion=many", "OCT_insertion"])
def test_a_wrong_weight_is_an_error(sessions_root, qwen_dir, text):
    with pytest.raises(ValueError, match="dataset_weight"):
        open_data(sessions_root, qwen_dir, dataset_weight=[text])


def test_validation_sessions_touch_nothing(sessions_root, qwen_dir, tmp_path):
    """Statistics, samples and their order stay the same whatever the held-out sessions hold; no session is on both sides."""
    _, data, _ = open_data(sessions_root, qwen_dir)
    assert data.validation and not {s.name for s in data.train} & {s.name for s in data.validation}
    shutil.copytree(sessions_root, tmp_path / "s")
    held_out = tmp_path / "s" / data.validation[0].path.relative_to(sessions_root)
    changed = pickle.loads((held_out / "data.pkl").read_bytes())
    changed["action"] *= 100
    (held_out / "data.pkl").write_bytes(pickle.dumps(changed))
    _, again, _ = open_data(tmp_path / "s", qwen_dir)
    assert again.stats == data.stats and again.fingerprint == data.fingerprint


def test_without_a_fresh_image_there_is_nothing_to_train_on(sessions_root, qwen_dir):
    with pytest.raises(
        ValueError, match="no step of the 4 training sessions has an image of View1, View5 that is at most 0.01 s old"
    ):
        open_data(sessions_root, qwen_dir, max_image_age=0.01)


def test_a_missing_cache_names_the_command(sessions_root, qwen_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python build_vl_cache\.py [^\n]*\n[^\n]*--cache online"):
        open_data(sessions_root, qwen_dir, cache_root=tmp_path)


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(image_resize_height=84), "height was 56, now 84"),
        (dict(views=["View1"]), "views was"),
        (dict(vlm_reuse_count=4), "no multiple"),
    ],
)
def test_features_of_other_settings_are_refused(sessions_root, qwen_dir, changed, message):
    with pytest.raises(vl_cache.CacheMismatch, match=message):
        open_data(sessions_root, qwen_dir, **changed)


# ---- training --------------------------------------------------------------------------------------------------------


def test_the_files_of_a_run(finished, sessions_root):
    """The guide's names; everything loads with weights_only, nothing of the VLM is in it, metrics have the guide's names."""
    latest, best, final = (load(finished / f"qwen_vla_async{end}.pt") for end in ("", "_best", "_final"))
    assert (
        latest["step"] == best["step"] == final["step"] == 6
        and "optimizer_state_dict" in latest
        and "optimizer_state_dict" not in best
    )
    assert all(torch.equal(v, final["model_state_dict"][k]) for k, v in latest["model_state_dict"].items())
    assert not any("vlm" in k or "language" in k for k in latest["model_state_dict"])
    assert (
        latest["meta"]["script"] == "train_async"
        and latest["meta"]["validation"]
        == (finished / "qwen_vla_async" / "validation_episodes.txt").read_text().split("\n")[:-1]
    )
    rows = read_metrics(finished / "qwen_vla_async")
    steps = [r for r in rows if "train/loss_step" in r]
    assert [r["step"] for r in steps] == [2, 4, 6] and all(
        r["train/sensor_samples"] + r["train/nonsensor_samples"] == 8 and 0 <= r["train/vl_reuse_counter"] <= 2
        for r in steps
    )
    assert {"train/lr", "train/grad_norm", "train/loss_epoch", "val/loss_epoch"} <= set().union(*rows)
    assert not list(finished.glob(".tmp-*")) and (finished / "qwen_vla_async" / "loss.png").stat().st_size > 1000


def test_the_baselines_by_hand(finished, sessions_root, qwen_dir):
    """No motion and the last action again, mean absolute error in mm over x, y, z and all unpadded steps of the held-out chunks."""
    row = next(r for r in read_metrics(finished / "qwen_vla_async") if "val/mae_mm" in r)
    _, data, _ = open_data(sessions_root, qwen_dir)
    zero, last = [], []
    for s in data.validation:
        for k in range(len(s)):
            end = np.flatnonzero(s.segment == s.segment[k])[-1] + 1
            chunk, begins = s.action[k : min(k + 8, end), :3], k == 0 or s.segment[k - 1] != s.segment[k]
            zero.append(np.abs(chunk))
            last.append(np.abs(chunk - (0 if begins else s.action[k - 1, :3])))
    assert row["val/mae_mm_zero"] == pytest.approx(np.concatenate(zero).mean(), rel=1e-5) and row[
        "val/mae_mm_last"
    ] == pytest.approx(np.concatenate(last).mean(), rel=1e-5)


def test_training_with_a_cache_opens_no_image_and_loads_no_vlm(sessions_root, qwen_dir, tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("opened")

    monkeypatch.setattr(Image, "open", forbidden)
    monkeypatch.setattr(vl_cache.VLEncoder, "__init__", forbidden)
    run(sessions_root, qwen_dir, tmp_path, max_steps=2)


def test_cached_and_online_training_are_the_same(finished, sessions_root, qwen_dir, tmp_path):
    run(sessions_root, qwen_dir, tmp_path, cache="online", cache_root=tmp_path / "none", views=["View1", "View5"])
    a, b = (read_metrics(folder / "qwen_vla_async") for folder in (finished, tmp_path))
    losses = lambda rows: [r[k] for r in rows for k in ("train/loss_step", "val/loss_epoch") if k in r]  # noqa: E731
    assert losses(a) == pytest.approx(losses(b), rel=1e-4) and len(losses(a)) == 4
    other = load(tmp_path / "qwen_vla_async.pt")["model_state_dict"]
    assert all(
        torch.allclose(v.float(), other[k].float(), atol=1e-4)
        for k, v in load(finished / "qwen_vla_async.pt")["model_state_dict"].items()
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_and_resumed_equals_uninterrupted(
    finished, sessions_root, qwen_dir, tmp_path, monkeypatch, capsys, workers
):
    """SIGTERM within an epoch, at another number of workers: the step is finished and saved, and --resume auto ends in the same bits."""

    def lr_at(step, *rest, original=train_async.lr_at):
        if step == 2 and not (tmp_path / "qwen_vla_async.pt").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(step, *rest)

    monkeypatch.setattr(train_async, "lr_at", lr_at)
    run(sessions_root, qwen_dir, tmp_path, num_workers=workers)
    assert (
        "stopped by signal after step 3" in capsys.readouterr().out
        and load(tmp_path / "qwen_vla_async.pt")["step"] == 3
    )
    run(sessions_root, qwen_dir, tmp_path, num_workers=2 - workers, resume="auto")
    same_training(load(tmp_path / "qwen_vla_async.pt"), load(finished / "qwen_vla_async.pt"))
    assert [r["step"] for r in read_metrics(tmp_path / "qwen_vla_async") if "train/loss_step" in r] == [2, 4, 6]


BOTH = pytest.mark.parametrize(
    "script, latest",
    [(train_async, "qwen_vla_async.pt"), (train_diffusion, "diffusion_stage1_latest.pt")],
    ids=["async", "diffusion"],
)


@BOTH
def test_ranks_and_micro_batches_equal_one_batch(sessions_root, qwen_dir, tmp_path, script, latest):
    """torchrun with 2 ranks x 2 micro-batches of 4 samples, one process with 4 x 4, and one batch of 16 end with the same weights and the same validation."""
    common = dict(dropout=0.0, max_steps=3, log_steps=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script.__file__]
    result = subprocess.run(
        command + flags(sessions_root, qwen_dir, tmp_path / "two", **common),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "4 x 2 ranks x 2 accumulation = 16" in result.stdout
    run(sessions_root, qwen_dir, tmp_path / "one", script, grad_accum_steps=4, **common)
    run(sessions_root, qwen_dir, tmp_path / "whole", script, batch_size=16, grad_accum_steps=1, **common)
    whole, logs = load(tmp_path / "whole" / latest), latest.removesuffix(".pt").removesuffix("_latest")
    for n in ("two", "one"):
        other = load(tmp_path / n / latest)
        for a, b in zip(read_metrics(tmp_path / "whole" / logs), read_metrics(tmp_path / n / logs), strict=True):
            assert all(
                b[k] == pytest.approx(a[k], rel=1e-5)
                for k in (
                    "step",
                    "train/loss_step",
                    "train/grad_norm",
                    "train/vl_reuse_counter",
                    "train/sensor_samples",
                )
                if k in a
            )
        assert other["best_val_loss"] == pytest.approx(whole["best_val_loss"], rel=1e-5)
        for key, value in whole["model_state_dict"].items():
            # the key's bias, and all of query and key where there is one token to attend to, have no gradient but rounding, which Adam blows up; the loss above covers them
            if "in_proj" not in key:
                assert torch.allclose(value.float(), other["model_state_dict"][key].float(), atol=3e-5), (
                    key
                )  # of a learning rate of 1e-3


def test_an_existing_run_is_not_overwritten(finished, sessions_root, qwen_dir):
    before = (finished / "qwen_vla_async.pt").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="--resume auto"):
        run(sessions_root, qwen_dir, finished)
    assert (finished / "qwen_vla_async.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "changed, message",
    [
        (dict(seed=1), "seed 42, now 1"),
        (dict(sensor_window_size=130), "sensor_window_size"),
        (dict(val_split=0), "sessions or their features changed"),
        (dict(resume="qwen_vla_async_best.pt"), "no optimizer"),
    ],
)
def test_a_resume_that_would_be_another_run_is_refused(finished, sessions_root, qwen_dir, changed, message):
    changed = dict(resume="auto", max_steps=8) | changed
    changed["resume"] = changed["resume"] if changed["resume"] == "auto" else finished / changed["resume"]
    with pytest.raises(ValueError, match=message):
        run(sessions_root, qwen_dir, finished, **changed)


def test_a_finished_run_has_nothing_to_do(finished, sessions_root, qwen_dir, capsys):
    run(sessions_root, qwen_dir, finished, resume="auto")
    assert "nothing to do" in capsys.readouterr().out


@BOTH
def test_non_finite_steps_are_skipped_named_and_end_the_run_after_ten(
    sessions_root, qwen_dir, tmp_path, script, latest
):
    """NaN in one session's sensor file: steps that draw it change no weight and are named; where every sample is NaN the run stops."""
    shutil.copytree(sessions_root, tmp_path / "s")
    for folder in (tmp_path / "s").glob("*/recv_all_*"):
        rows = np.load(folder / "sensor_stream.npy")
        rows[3::10] = np.nan  # not among the rows of the statistics
        np.save(folder / "sensor_stream.npy", rows)
    run(tmp_path / "s", qwen_dir, tmp_path / "a", script, batch_size=1, grad_accum_steps=1, max_steps=8)
    skipped = [
        name
        for r in read_metrics(tmp_path / "a" / latest.removesuffix(".pt").removesuffix("_latest"))
        for name in r.get("nonfinite", ())
    ]
    assert skipped and all("recv_all" in session for session, _ in skipped)
    assert all(torch.isfinite(v).all() for v in load(tmp_path / "a" / latest)["model_state_dict"].values())
    with pytest.raises(FloatingPointError, match="10 steps in a row"):
        run(tmp_path / "s", qwen_dir, tmp_path / "b", script, batch_size=16, max_steps=20)


def test_an_error_ends_the_program(sessions_root, qwen_dir, tmp_path):
    """Also with loader workers, which ignore SIGTERM: the program must not wait for them."""
    code = "import sys, train_async as t\ndef lr_at(*_): raise RuntimeError('broken')\nt.lr_at = lr_at\nt.main(t.parse_config(t.Config, sys.argv[1:], t.ALIASES))"
    result = subprocess.run(
        [sys.executable, "-c", code, *flags(sessions_root, qwen_dir, tmp_path, num_workers=1)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert result.returncode == 1 and "broken" in result.stderr


def test_a_full_disk_keeps_the_old_checkpoint(sessions_root, qwen_dir, tmp_path, monkeypatch, capsys):
    run(sessions_root, qwen_dir, tmp_path, max_steps=2)
    before = load(tmp_path / "qwen_vla_async.pt")

    def full(folder, needed):
        raise train_async.ckpt.DiskFull(28, "no room")

    monkeypatch.setattr(train_async.ckpt, "require_space", full)
    with pytest.raises(train_async.ckpt.DiskFull, match="is of step 2"):
        run(sessions_root, qwen_dir, tmp_path, max_steps=4, resume="auto")
    assert "CHECKPOINT NOT SAVED at step 4" in capsys.readouterr().out
    after = load(tmp_path / "qwen_vla_async.pt")
    assert after["step"] == 2 and all(
        torch.equal(v, after["model_state_dict"][k]) for k, v in before["model_state_dict"].items()
    )


# ---- policy ----------------------------------------------------------------------------------------------------------


def test_a_saved_policy_predicts_the_same(sessions_root, qwen_dir, tmp_path):
    cfg, data, dataset = open_data(sessions_root, qwen_dir)
    core = train_async.build_model(cfg, data.features.shape, data.stats, torch.device("cpu"))
    policy = train_async.Policy(core.eval(), cfg, data.stats, data.features.recipe, ["go"], torch.device("cpu"))
    train_async.fill_statistics(core, dataset, data.stats, policy)
    content = dict(
        format_version=1,
        meta=dict(script="train_async"),
        config=dataclasses.asdict(cfg),
        stats=data.stats,
        recipe=data.features.recipe,
        vl_shape=list(data.features.shape),
        instructions=["go"],
    )
    train_async.save_model(tmp_path / "p.pt", content, core)
    items = [dataset[(0, i)] for i in (3, 40, 200)]
    predicted = policy.predict(items)
    assert predicted.shape == (3, 8, 7) and (predicted[..., 6] == 1).all()
    loaded = train_async.load_policy(tmp_path / "p.pt", "cpu")
    assert np.array_equal(loaded.predict(items), predicted)
    for b, item in enumerate(items):  # the same alone as in a batch
        np.testing.assert_allclose(loaded.predict([item])[0], predicted[b], atol=1e-5)


def test_predict_from_images_equals_predict_from_the_cache(finished, sessions_root, qwen_dir):
    """One preprocessing: raw images, rows and instruction give what the cached feature and the dataset's item give; another instruction gives something else."""
    policy = train_async.load_policy(finished, "cpu")
    _, _, dataset = open_data(sessions_root, qwen_dir)
    e, row = 2, 7
    s, item = dataset.sessions[e], dataset.read(e, row)
    tick, ticks = int(dataset.ticks[e][row]), dataset.features._ticks[s.name]
    images = {v: np.asarray(Image.open(s.frame_path(v, int(ticks.frame_index[v][tick])))) for v in ("View1", "View5")}
    raw = dict(images=images, instruction=s.instruction, sensor=item["sensor"])
    np.testing.assert_allclose(policy.predict([raw]), policy.predict([item]), atol=1e-5)
    assert np.abs(policy.predict([raw | dict(instruction="Do something else")]) - policy.predict([raw])).max() > 1e-6
    more = np.concatenate([np.full((50, 1026), 3.0, np.float32), item["sensor"]])
    np.testing.assert_allclose(
        policy.predict([raw | dict(sensor=more)]), policy.predict([raw]), atol=1e-6
    )  # older rows than the window's are not used


def test_the_loop_runs_a_real_policy(finished, sessions_root):
    """What the loop sends is predict's first action on the feature of its last look and on the ring buffer's rows in order; too early or too late it holds."""
    policy = train_async.load_policy(finished, "cpu")
    clock = SimpleNamespace(now=10.0, monotonic=lambda: clock.now)
    loop = train_async.TwoRateLoop(policy, "Touch the red point", max_age_s=0.5, clock=clock)
    assert loop.act() is None
    rng = np.random.default_rng(0)
    images = {v: rng.integers(0, 255, (56, 56, 3), dtype=np.uint8) for v in ("View1", "View5")}
    rows = rng.normal(50, 1, (100, 1026)).astype(np.float32)
    loop.see(images, clock.now)
    clock.now += 0.1
    for part in (rows[:20], rows[20:90], rows[90:]):  # more than the ring holds, in uneven pieces
        loop.push_sensor(part)
    clock.now += 0.11
    expected = policy.predict([dict(images=images, instruction="Touch the red point", sensor=rows[-65:])])[0, 0]
    np.testing.assert_allclose(loop.act(), expected, atol=1e-6)
    clock.now += 0.1  # 0.21 s after the last row: in training, too, such a step has no sensor
    unfelt = policy.predict([dict(images=images, instruction="Touch the red point", sensor=None)])[0, 0]
    np.testing.assert_allclose(loop.act(), unfelt, atol=1e-6)
    assert np.abs(unfelt - expected).max() > 1e-6
    clock.now += 0.5
    assert loop.act() is None and loop.ages == {2: 1, 3: 1} and loop.holds == 2


def test_wrong_observations_are_explained(finished):
    policy = train_async.load_policy(finished, "cpu")
    with pytest.raises(ValueError, match="View5 is missing"):
        policy.predict([dict(images={"View1": np.zeros((56, 56, 3), np.uint8)}, instruction="go", sensor=None)])
    with pytest.raises(ValueError, match=r"\(n, 1026\)"):
        policy.predict([dict(vl_features=torch.zeros(1, 64), sensor=np.zeros((65, 3)))])


def test_evaluation_reads_every_stretch(finished, sessions_root):
    """evaluate.py's contract: a session with a gap is two episodes, held-out names are known, standing still keeps the gripper."""
    policy, names = train_async.load_policy(finished, "cpu"), load(finished / "qwen_vla_async.pt")["meta"]["validation"]
    episodes = list(policy.open_episodes(sessions_root, names))
    lengths = {e["name"].rsplit("/", 1)[-1]: len(e["target"]) for e in episodes}
    assert lengths["episode_20260101_000001#1"] == 11 and lengths["episode_20260101_000001#2"] == 18
    assert {e["name"].split("#")[0] for e in episodes} == set(names) and all(
        (e["hold"] == [0, 0, 0, 0, 0, 0, 1]).all() for e in episodes
    )
    records, _ = evaluate.evaluate(policy, str(sessions_root), names, stride=10)
    report = evaluate.summarise(records, policy.action_names())
    assert report["hold still"]["per_dim"]["gripper"] == 0 and np.isfinite(report["policy"]["relative"])
    with pytest.raises(ValueError, match="no session 'nobody'"):
        next(policy.open_episodes(sessions_root, ["nobody"]))


def test_evaluation_without_a_cache_runs_the_vlm(finished, sessions_root, tmp_path, capsys):
    shutil.copytree(sessions_root / "OCT_insertion", tmp_path / "OCT_insertion")
    policy = train_async.load_policy(finished, "cpu")
    fresh, cached = (
        next(policy.open_episodes(root, ["OCT_insertion/-/Captures_0"])) for root in (tmp_path, sessions_root)
    )
    np.testing.assert_allclose(policy.predict([fresh["sample"](4)]), policy.predict([cached["sample"](4)]), atol=1e-5)
    assert "computed now by" in capsys.readouterr().out


def test_a_foreign_file_is_refused(tmp_path, finished):
    torch.save(dict(model=torch.nn.Linear(2, 2)), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        train_async.load_policy(tmp_path / "bad.pt")
    state = load(finished / "qwen_vla_async_best.pt")
    torch.save(state | dict(meta=dict(script="train_other")), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="train_other"):
        train_async.load_policy(tmp_path / "other.pt")


# ---- command line ----------------------------------------------------------------------------------------------------


def test_the_guides_command_parses():
    cfg = parse_config(
        train_async.Config,
        "--batch-size 4 --grad-accum-steps 8 --lr 1e-4 --sensor-enabled --vlm-reuse-count 3 --sensor-window-size 65 --image-resize-height 360 "
        "--image-resize-width 640".split(),
        train_async.ALIASES,
    )
    assert cfg == train_async.Config()  # the guide's numbers are the defaults
    for text in ("--no-sensor-enabled", "--no-sensor", "--sensor_enabled False"):
        assert not parse_config(train_async.Config, text.split(), train_async.ALIASES).sensor_enabled
    assert (
        parse_config(
            train_async.Config, "--wandb offline --max_steps 3 --sensor-loss-weight 3.0".split(), train_async.ALIASES
        ).wandb.mode
        == "offline"
    )


def test_check_prints_a_batch_without_a_cache(sessions_root, qwen_dir, tmp_path, capsys):
    train_async.main(
        parse_config(
            train_async.Config,
            flags(sessions_root, qwen_dir, tmp_path, check=True, cache_root=tmp_path),
            train_async.ALIASES,
        )
    )
    shown = capsys.readouterr().out
    assert (
        "check passed" in shown
        and "not there yet" in shown
        and "build_vl_cache.py" in shown
        and "New_dataset" in shown
        and "(4, 65, 1026)" in shown
    )
    assert not list(tmp_path.iterdir())


def test_without_data_the_error_says_what_to_do():
    with pytest.raises(ValueError, match="create_datapkl.py"):
        train_async.main(train_async.Config())


# ---- the guide's three commands --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, file", [("train_async", "qwen_vla_async_final.pt"), ("train_diffusion", "diffusion_stage1_latest.pt")]
)
def test_recordings_go_through_the_guides_commands(shared, recordings, qwen_dir, tmp_path, script, file):
    """Real-format recordings of three data sets: preprocessed, cached, trained on, predicted with; and what was learned of a session opens for evaluation."""
    module = __import__(script)
    run(recordings, qwen_dir, tmp_path, module, sensor_window_size=65, max_steps=2, log_steps=2, batch_size=2)
    policy = module.load_policy(tmp_path / file, "cpu")
    rows = [
        r["train/sensor_samples"]
        for r in read_metrics(next(p for p in tmp_path.iterdir() if p.is_dir()))
        if "train/sensor_samples" in r
    ]
    assert rows and 0 < rows[0] < 4
    episodes = list(policy.open_episodes(recordings))
    assert {e["name"].split("/")[0] for e in episodes} == {
        "White_silicone_white_circle",
        "Needle_insertion_eye_trocar",
        "OCT_insertion",
    }
    for e in episodes:
        chunk = policy.predict([e["sample"](len(e["target"]) - 1)])
        assert chunk.shape == (1, 8, 7) and np.isfinite(chunk).all() and (chunk[..., 6] == 1).all()


@pytest.fixture(scope="module")
def recordings(shared, qwen_dir, tmp_path_factory):
    """A copy of ../shared/data/sessions after create_datapkl.py and build_vl_cache.py; the sensor files of these short recordings begin a second late."""
    import build_vl_cache
    import create_datapkl

    root = tmp_path_factory.mktemp("recordings") / "sessions"
    shutil.copytree(shared / "data" / "sessions", root)
    create_datapkl.main(
        parse_config(
            create_datapkl.Config, ["--dataset-dirs", str(root), "--workers", "0", "--min-sensor-overlap", "0.3"]
        )
    )
    build_vl_cache.main(
        parse_config(
            build_vl_cache.Config,
            [
                "--dataset-dirs",
                str(root),
                "--model",
                str(qwen_dir),
                "--image-resize-height",
                "56",
                "--image-resize-width",
                "56",
            ],
        )
    )
    return root
