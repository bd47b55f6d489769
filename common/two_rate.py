"""Two-rate inference: a slow eye and a fast hand, for any policy with encode(images) and predict(observations).

Training pairs step k with the feature of an older tick; here the same happens on a robot's clock. Used by train_async.py and train_diffusion.py.
"""

import contextlib
import math
import threading
import time
from collections import Counter

import numpy as np
import torch

from common import sessions as ss


class TwoRateLoop:
    """Runs a policy on a robot at two rates. A thread turns the newest images into a feature and publishes it with the time at which they were taken; the
    loop acts every 100 ms on the newest feature and the newest sensor rows, and never waits for the VLM. A feature older than `max_age_s`, or none yet, means
    hold. `clock` has monotonic() and sleep(s), like the module time."""

    def __init__(self, policy, instruction=None, max_age_s=1.0, clock=time):
        if instruction is None and len(policy.instructions) != 1:
            raise ValueError(
                f"say which instruction: the policy was trained on {len(policy.instructions)}, e.g. {policy.instructions[:3]}"
            )
        self.policy, self.instruction, self.max_age_s, self.clock = (
            policy,
            instruction or policy.instructions[0],
            max_age_s,
            clock,
        )
        if self.instruction not in policy.instructions:
            print(f"warning: the policy has not been trained on {self.instruction!r}, but on {policy.instructions[:3]}")
        self.lock, self.error, self.stopped = threading.Lock(), None, threading.Event()
        self.stream = torch.cuda.Stream() if policy.device.type == "cuda" else None
        self.newest = None  # (feature (N, V), capture time), replaced as a whole
        self.ring, self.rows_seen = np.zeros((policy.cfg.sensor_window_size, ss.CHANNELS), np.float32), 0
        self.sensed, self.rows_last = (
            -math.inf,
            policy.cfg.sensor_window_size / ss.SENSOR_HZ + 1 / ss.ACTION_HZ,
        )  # when rows came last, and how long they count: Session.sensor_window's rule
        self.ages, self.holds, self.late = (
            Counter(),
            0,
            0,
        )  # actions per age of their feature in 100 ms, holds, ticks that came too late

    def push_sensor(self, rows):
        """Take (n, 1026) raw sensor rows, in the order of time, as they come; from any thread. A sensor that has stopped counts as absent, not as frozen."""
        with self.lock:
            self.sensed = self.clock.monotonic()
            for row in rows[-len(self.ring) :]:
                self.ring[self.rows_seen % len(self.ring)] = row
                self.rows_seen += 1

    def see(self, images, captured):
        """Encode {view: (h, w, 3)} taken at `captured` (the clock's time) and publish the feature; the slow part."""
        with (
            torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()
        ):  # on the default stream the next action would queue up behind the VLM
            feature = self.policy.encode([(images, self.instruction)])[0]
        with self.lock:
            self.newest = (feature, captured)

    def act(self):
        """-> (7,) the next action, or None: hold."""
        with self.lock:
            newest, seen = self.newest, self.rows_seen if self.clock.monotonic() - self.sensed <= self.rows_last else 0
            rows = np.roll(self.ring, -(seen % len(self.ring)), axis=0)[len(self.ring) - min(seen, len(self.ring)) :]
        age = math.inf if newest is None else self.clock.monotonic() - newest[1]
        if age > self.max_age_s:
            self.holds += 1
            return None
        self.ages[int(age * ss.ACTION_HZ + 1e-6)] += 1
        return self.policy.predict([dict(vl_features=newest[0], sensor=rows if len(rows) else None)])[0, 0]

    def run(self, camera, execute, seconds):
        """camera() -> ({view: (h, w, 3)}, capture time); execute(action (7,) or None: hold) sends one 100 ms motion. Ends with a hold; an error of the VLM
        thread holds, ends the loop and is raised here."""

        def look():
            try:
                while not self.stopped.is_set():
                    began = self.clock.monotonic()
                    self.see(*camera())
                    self.clock.sleep(
                        max(0.0, began + self.policy.cfg.vlm_reuse_count / ss.ACTION_HZ - self.clock.monotonic())
                    )
            except Exception as error:  # whatever it is, a robot must not go on without eyes
                self.error = error

        eyes = threading.Thread(target=look, daemon=True)
        eyes.start()
        begin, tick = self.clock.monotonic(), 0
        try:
            while tick < seconds * ss.ACTION_HZ and self.error is None:
                execute(self.act())
                missed = int((self.clock.monotonic() - begin) * ss.ACTION_HZ + 1e-6) - tick
                self.late, tick = self.late + max(0, missed), tick + 1 + max(0, missed)
                self.clock.sleep(max(0.0, begin + tick / ss.ACTION_HZ - self.clock.monotonic()))
        finally:
            self.stopped.set()
            execute(None)
            eyes.join(
                timeout=10
            )  # at most the look that is under way: a thread inside the VLM would crash the end of the program
        if self.error is not None:
            raise RuntimeError(
                f"the VLM thread failed ({type(self.error).__name__}: {self.error}); the robot was told to hold"
            ) from self.error

    def report(self):
        """-> lines that say how old the features were."""
        total = sum(self.ages.values())
        lines = [f"{total} actions, {self.holds} holds, {self.late} late ticks; age of the feature at the action:"]
        return lines + [
            f"  {100 * b:4d}-{100 * (b + 1):4d} ms {n:5d} {n / total:6.1%}" for b, n in sorted(self.ages.items())
        ]
