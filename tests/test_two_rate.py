"""The two-rate loop under a simulated clock: rate, ages, holds, and what may go wrong on a robot."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UserError
from common.two_rate import TwoRateLoop


class SimulatedClock:
    """monotonic() and sleep() for two threads: time jumps to the earliest sleeper once both sleep, and one thread runs
    at a time."""

    def __init__(self, threads=2):
        self.now, self.running, self.sleepers, self.condition = 50.0, threads, [], threading.Condition()

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        with self.condition:
            main = threading.get_ident() == threading.main_thread().ident
            me = (round(self.now + seconds, 9), main, len(self.sleepers))
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
    """Stands for a Policy: encoding takes `latency` seconds of the clock, predicting 20 ms; an action is (feature,
    number of rows, newest row). Its features are the times of their images, which the loop must know."""

    def __init__(self, clock, latency, reuse=3, window=65, fail_at=None, oldest_image_s=0.3):
        self.clock, self.latency, self.fail_at, self.looks, self.resets = clock, latency, fail_at, 0, 0
        self.cfg = SimpleNamespace(sensor_window_size=window, vlm_reuse_count=reuse)
        self.oldest_image_s = oldest_image_s
        self.instructions, self.device, self.sensor_hz = ["go"], torch.device("cpu"), 650

    def reset(self):
        self.resets += 1

    def encode(self, pictures):
        self.looks += 1
        self.clock.sleep(self.latency)
        if self.looks == self.fail_at:
            raise RuntimeError("out of memory")
        return torch.tensor([[[pictures[0][0]["View1"]]]])

    def predict(self, observations):
        age = self.clock.now - observations[0]["vl_features"][0, 0].item()
        assert observations[0]["age"] == pytest.approx(age, abs=1e-4)
        self.clock.sleep(0.02)
        feature, rows = float(observations[0]["vl_features"][0, 0]), observations[0]["sensor"]
        return np.array([[[feature, *((0, 0) if rows is None else (len(rows), rows[-1, 0]))]]])


class Drive:
    """A loop, what it sent as (time, action), and the error it raised."""

    def __init__(self, latency, max_age_s=1.0, camera=None, execute=None, **policy):
        self.clock = SimulatedClock()
        self.policy = SlowPolicy(self.clock, latency, **policy)
        self.loop = TwoRateLoop(self.policy, clock=self.clock, max_age_s=max_age_s)
        self.loop._look = lambda *args, look=self.loop._look: (look(*args), self.clock.leave())
        self.camera = camera or (lambda clock: ({"View1": clock.now}, clock.now))
        self.body, self.sent, self.error = execute or (lambda drive: None), [], None

    def execute(self, action):
        self.sent.append((self.clock.now, action))
        if self.loop.stopped.is_set():  # the last hold: let the other thread end
            self.clock.leave()
        else:
            self.loop.push_sensor(np.full((65, 1026), self.clock.now, np.float32))
            self.body(self)

    def run(self, seconds=6.0):
        try:
            self.loop.run(lambda: self.camera(self.clock), self.execute, seconds)
        except Exception as error:
            self.error = error
        return self

    def again(self):
        self.clock.running, self.sent = 2, []
        return self.run(2.0)


@pytest.mark.parametrize("latency, reuse", [(0.25, 3), (0.381, 3), (0.381, 4)])
def test_the_loop_keeps_its_rate_whatever_the_vlm_takes(latency, reuse):
    """Ten actions a second on the grid of the clock, holds until the first feature, ages as capture and latency say."""
    drive = Drive(latency, reuse=reuse).run()
    loop, sent = drive.loop, drive.sent
    begun = [t for t, _ in sent[:-1]]
    assert len(begun) == 60 and loop.late == 0
    assert np.allclose(np.diff(begun), 0.1, atol=0.021)  # an action goes out 20 ms after the tick, a hold at once
    first = next(i for i, (_, a) in enumerate(sent) if a is not None)
    assert loop.holds == first == int(latency / 0.1 + 1)
    assert all(a is not None for _, a in sent[first:-1]) and sent[-1][1] is None
    period = max(reuse / 10, latency)
    for t, action in sent[first:-1]:
        assert latency - 1e-6 <= t - 0.02 - action[0] < latency + period + 1e-6  # age of the feature at the tick
    for (_, action), (before, _) in list(zip(sent[1:-1], sent, strict=False))[first + 1 :]:
        assert action[1] == 65 and action[2] == pytest.approx(before, abs=1e-3)  # rows that came with the action before
    assert sum(loop.ages.values()) == 60 - first and min(loop.ages) >= int(latency * 10)
    assert max(loop.ages) <= int((latency + period) * 10 + 1e-6)
    assert f"{60 - first} actions" in loop.report()[0] and f"{first} holds" in loop.report()[0]


def test_a_stale_feature_means_hold():
    """A camera that hangs after its third image: one second later the robot is told to hold."""
    pictures = []

    def camera(clock):
        pictures.append(clock.now)
        if len(pictures) == 4:
            clock.sleep(100.0)
        return {"View1": clock.now}, clock.now

    drive = Drive(0.1, camera=camera).run(4.0)
    held = [t for t, action in drive.sent[:-1] if action is None and t > 50.5]
    assert held and min(held) == pytest.approx(pictures[2] + 1.0, abs=0.11) and max(drive.loop.ages) <= 10


def gone(drive):
    if len(drive.sent) == 8:
        raise OSError("robot gone")


WRONG = {  # what the error says: what happens
    "in the future: not the loop's clock": dict(camera=lambda clock: ({"View1": 0.0}, 1.7e9)),  # time.time()
    "in the past: not the loop's clock": dict(camera=lambda clock: ({"View1": 0.0}, -1e6)),
    "out of memory); the robot was told to hold": dict(fail_at=4),
    "robot gone": dict(execute=gone),
}


@pytest.mark.parametrize("message", WRONG)
def test_an_error_of_camera_vlm_or_execute_holds_and_is_raised(message):
    drive = Drive(0.2, **WRONG[message]).run()
    assert message in str(drive.error) and drive.sent[-1][1] is None and len(drive.sent) < 20
    assert "clock" not in message or all(action is None for _, action in drive.sent)


def test_an_execute_that_blocks_is_counted_and_skips_ticks():
    drive = Drive(0.2, execute=lambda drive: drive.clock.sleep(0.73) if len(drive.sent) == 8 else None).run()
    assert drive.loop.late == 7 and len(drive.sent) == 60 - 7 + 1 and "7 late ticks" in drive.loop.report()[0]


def test_a_second_run_begins_anew():
    """It looks again and does not act on what the last run saw."""
    drive = Drive(0.25).run(2.0)
    looks, first = drive.policy.looks, drive.sent
    drive.again()
    assert drive.policy.looks == 2 * looks and drive.error is None and drive.policy.resets == 3
    assert [a is None for _, a in drive.sent] == [a is None for _, a in first]
    assert sum(drive.loop.ages.values()) + drive.loop.holds == 20


def test_warming_up_looks_without_counting():
    drive = Drive(0.25)
    drive.clock.running = 1
    drive.loop.warm_up({"View1": 50.0}, 50.0)
    assert drive.policy.looks == 1 and drive.loop.newest is None and not drive.loop.ages
    for taken in (50.0, 49.6):  # a camera that shows an old image again: the newer feature stays, and grows old
        drive.loop.see({"View1": taken}, taken)
    assert drive.loop.newest[1] == drive.loop.newest[0].item() == 50.0


def test_older_features_than_in_training_are_said_or_held(capsys):
    drive = Drive(0.381).run(3.0)  # trained on 0 to 300 ms
    assert drive.loop.older == sum(drive.loop.ages.values()) > 20 and "older than in training" in drive.loop.report()[0]
    assert capsys.readouterr().out.count("warning") == 1
    assert not Drive(0.381, max_age_s=None).run(3.0).loop.ages
    assert Drive(0.381, max_age_s=None, oldest_image_s=0.8).run(3.0).loop.ages
    assert "warning" not in capsys.readouterr().out


def test_sensor_rows_by_time():
    """One (1026,) row is a row; after an outage old rows do not come back with the first new one. Rows that overtake
    each other by their stamps, and bursts without, are in order."""
    for hz in (325, 650):  # at half the rate 65 rows reach back twice as long and count that long
        loop = Drive(0.1).loop
        loop.policy.sensor_hz, begin = hz, loop.clock.now
        loop.push_sensor(np.ones((65, 1026)))
        assert begin - loop.sensor[0][0] == pytest.approx(64 / hz)
        for age, there in ((0.09 + 65 / hz, True), (0.11 + 65 / hz, False)):
            loop.clock.now = begin + age
            assert (loop._observation(None, 0.0, loop.clock.now)["sensor"] is not None) == there
    loop.push_sensor(np.full(1026, 2.0))
    np.testing.assert_array_equal(loop._observation(None, 0.0, loop.clock.now)["sensor"], np.full((1, 1026), 2.0))
    loop.clock.now += 0.05
    loop.push_sensor(np.full((2, 1026), 3.0), [loop.clock.now - 0.03, loop.clock.now - 0.01])
    assert loop._observation(None, 0.0, loop.clock.now)["sensor"][-1, 0] == 3.0
    loop.clock.now += 0.1
    for i in (5, 4, 7, 6):
        loop.push_sensor(np.full(1026, i), [loop.clock.now - 0.05 + i / 1000])
    for i in (10, 20):
        loop.push_sensor(np.repeat(np.arange(i, i + 10)[:, None], 1026, axis=1))
    felt = loop._observation(None, 0.0, loop.clock.now)["sensor"][-24:, 0]
    assert felt.tolist() == [4, 5, 6, 7, *range(10, 30)]
    for rows in (np.ones((3, 1025)), np.ones((1, 1, 1026))):
        with pytest.raises(UserError, match="expected"):
            loop.push_sensor(rows)
    with pytest.raises(UserError, match="future"):
        loop.push_sensor(np.ones((1, 1026)), [1.7e9])


def test_an_instruction_must_be_chosen_where_there_are_several():
    policy = SlowPolicy(SimulatedClock(), 0.1)
    policy.instructions = ["left", "right"]
    with pytest.raises(UserError, match="2, e.g. \\['left', 'right'\\]"):
        TwoRateLoop(policy)
    assert TwoRateLoop(policy, "right").instruction == "right"
