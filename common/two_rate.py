"""Two-rate inference on a robot: a slow VLM in a thread, a fast action loop, for any policy with encode(images) and
predict(observations). Training pairs step k with the feature of an older tick; here the clock does."""

import contextlib
import math
import threading
import time
from collections import Counter, deque

import numpy as np
import torch

from common import require
from common import sessions as ss


class TwoRateLoop:
    """A thread turns the newest images into a feature and publishes it with the time at which they were taken; the loop
    acts every 100 ms on the newest feature and the newest sensor rows, and never waits for the VLM. While there is no
    feature, or it is older than `max_age_s` (None: older than any in training), the robot holds. All times are of
    `clock`, which has monotonic() and sleep(s), like the module time."""

    def __init__(self, policy, instruction=None, max_age_s=1.0, clock=time):
        texts = policy.instructions
        which = f"say which instruction: the policy was trained on {len(texts)}, e.g. {texts[:3]}"
        require(instruction is not None or len(texts) == 1, which)
        self.policy, self.instruction, self.clock = policy, instruction or texts[0], clock
        self.max_age_s = policy.oldest_image_s if max_age_s is None else max_age_s
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream() if policy.device.type == "cuda" else None
        self.sensor = deque(maxlen=policy.cfg.sensor_window_size)  # (stamp, row), oldest first
        self.reset()

    def reset(self):
        """Forget the last run's feature, error and counts. Sensor rows stay: their stamps make them expire."""
        self.policy.reset()
        self.stopped = threading.Event()  # a new one: an old run's thread may still be in its last look
        self.newest, self.error = None, None  # newest: (feature (N, V), capture time), replaced as a whole
        # {age of the feature in 100 ms: actions}, holds, skipped ticks, actions on a feature older than in training
        self.ages, self.holds, self.late, self.older = Counter(), 0, 0, 0

    def push_sensor(self, rows, stamps=None):
        """Add (n, 1026) raw sensor rows, or one (1026,), as they arrive; from any thread. `stamps` (n,): when they were
        measured, in any order; default: at the rate of the training's sessions, the last one now."""
        rows = np.atleast_2d(np.asarray(rows, np.float32))
        wrong = f"sensor rows are {rows.shape}, expected (n, {ss.CHANNELS}): force, then the A-scan"
        require(rows.ndim == 2 and rows.shape[1] == ss.CHANNELS, wrong)
        if stamps is None:
            last = self.sensor[-1][0] if self.sensor else -math.inf  # rows that come in bursts keep their order
            stamps = np.maximum(self.clock.monotonic() - np.arange(len(rows))[::-1] / self.policy.sensor_hz, last)
        for stamp in np.atleast_1d(stamps)[-1:]:
            self._same_clock(stamp, "a sensor row")
        with self.lock:
            self.sensor.extend(zip(np.broadcast_to(stamps, len(rows)).tolist(), rows.copy(), strict=True))

    def _same_clock(self, stamp, what):
        age = self.clock.monotonic() - stamp
        where = f"{abs(age):.1f} s in the {'past' if age > 0 else 'future'}"
        require(-0.05 < age < 600, f"{what} is stamped {where}: not the loop's clock, time.monotonic()")

    def see(self, images, captured):
        """Encode {view: (h, w, 3)} taken at `captured` (the clock's time) and publish the feature; this is slow."""
        self._same_clock(captured, "an image")
        # its own CUDA stream: on the default one the next action would queue up behind the VLM
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            feature = self.policy.encode([(images, self.instruction)])[0]
        with self.lock:
            if self.newest is None or captured >= self.newest[1]:  # a camera may repeat an old image
                self.newest = (feature, captured)

    def warm_up(self, images, captured):
        """One look, and one action that is not sent: loads the VLM and initialises CUDA before the clock runs."""
        self.see(images, captured)
        self.policy.predict([self._observation(*self.newest, self.clock.monotonic())])
        self.reset()

    def _observation(self, feature, captured, now):
        with self.lock:
            pairs = sorted(self.sensor, key=lambda pair: pair[0])  # datagrams overtake each other
        # as in training: a sensor that has stopped is absent
        begin, end = ss.sensor_rows([stamp for stamp, _ in pairs], now, self.sensor.maxlen, self.policy.sensor_hz)
        rows = np.stack([row for _, row in pairs[begin:end]]) if end > begin else None
        return dict(vl_features=feature, age=now - captured, sensor=rows)

    def act(self):
        """-> (7,) the next action, or None for hold."""
        newest, now = self.newest, self.clock.monotonic()
        age = math.inf if newest is None else now - newest[1]
        if age > self.max_age_s:
            self.holds += 1
            return None
        if age > self.policy.oldest_image_s:
            if not self.older:
                most = f"at most {1000 * self.policy.oldest_image_s:.0f} ms in training: see --vlm-latency-ms"
                print(f"warning: a feature is {1000 * age:.0f} ms old, {most}, or max_age_s=None to hold")
            self.older += 1
        self.ages[int(age * ss.ACTION_HZ + 1e-6)] += 1
        return self.policy.predict([self._observation(*newest, now)])[0, 0]

    def _look(self, camera, stopped):
        try:
            while not stopped.is_set():
                next_tick = self.clock.monotonic() + self.policy.cfg.vlm_reuse_count / ss.ACTION_HZ
                self.see(*camera())
                self.clock.sleep(max(0.0, next_tick - self.clock.monotonic()))
        except Exception as error:  # whatever it is, the robot must not go on blind: run() raises it
            self.error = error

    def run(self, camera, execute, seconds):
        """camera() -> ({view: (h, w, 3)}, capture time); execute(action (7,), or None: hold) sends one 100 ms motion
        and returns. Ends with a hold; an error of camera, VLM, policy or execute holds, ends the loop and is raised."""
        self.reset()
        vision = threading.Thread(target=self._look, args=(camera, self.stopped), daemon=True)
        vision.start()
        begin, tick = self.clock.monotonic(), 0
        try:
            while tick < seconds * ss.ACTION_HZ and self.error is None:
                execute(self.act())
                missed = max(0, int((self.clock.monotonic() - begin) * ss.ACTION_HZ + 1e-6) - tick)
                self.late, tick = self.late + missed, tick + 1 + missed
                self.clock.sleep(max(0.0, begin + tick / ss.ACTION_HZ - self.clock.monotonic()))
        finally:
            self.stopped.set()
            try:
                execute(None)
            finally:
                vision.join(timeout=10)  # for its last look: a thread inside the VLM would crash the program at exit
        if self.error is not None:
            why = f"the VLM thread failed ({type(self.error).__name__}: {self.error}); the robot was told to hold"
            raise RuntimeError(why) from self.error

    def report(self):
        """-> lines that say how old the features were."""
        total = sum(self.ages.values())
        counts = f"{total} actions ({self.older} on features older than in training), {self.holds} holds"
        ages = [f"  {100 * a:4d}-{100 * a + 100:4d} ms {n:5d} {n / total:6.1%}" for a, n in sorted(self.ages.items())]
        return [f"{counts}, {self.late} late ticks; age of the feature:", *ages]
