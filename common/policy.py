"""The contract between a policy and a robot: what predict takes and returns, checked at every call.

    policy = load_policy(path, device)             policy.reset()      # forget the drive so far
    policy.predict(observations) -> (B, H, A) float32, physical units   policy.describe() -> dict of plain values

A script builds its Contract from what the checkpoint holds, calls check() in predict and describe() in describe."""

import math
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from common import require

ASPECT = 0.02  # relative tolerance of an image's width / height: recorders round
FAR = 0.5  # of the training range: a state further outside is a warning, mostly another unit or reference frame
DESCRIBED = "script recorded sensor instructions kind horizon rate_hz skip first_row needs"  # copied by describe()


@dataclass
class Contract:
    """Plain values only: asdict() can be saved, and Contract(**saved) is the same again."""

    script: str
    images: dict  # {name: (height, width) as recorded, or None if the checkpoint does not know}; RGB, uint8
    actions: list  # [(name, unit)] of a row
    horizon: int  # rows of a chunk
    rate_hz: float | None  # rows per second; None: the recordings have no clock
    kind: str  # "delta": a motion per row; "absolute": a target; "velocity"
    first_row: str  # what row 0 means in time, and which row to send when
    skip: int = 0  # first rows that already lie in the past when a chunk is ready: row `skip` is the first to send
    state: list = field(default_factory=list)  # [(name, unit)]; empty: the policy takes none
    low: list | None = None  # smallest state in training, one per name
    high: list | None = None
    recorded: dict = field(default_factory=dict)  # {name: the recorder's name of this camera}, where it is another
    sensor: str | None = None  # what the observation's sensor must hold
    instructions: list = field(default_factory=list)  # all of the training; empty: not known, any is taken
    must_be_told: bool = False  # an observation needs an instruction; False: without one the default task is used
    action_low: list | None = None  # smallest action in training, one per name
    action_high: list | None = None
    needs: dict = field(default_factory=dict)  # {what the policy needs from outside its directory: where it was}

    def __post_init__(self):
        for name in ("low", "high", "action_low", "action_high"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else [float(v) for v in values])
        self.rate_hz = self.rate_hz and float(self.rate_hz)
        self.needs = {what: str(where) for what, where in self.needs.items()}
        self.warned = Counter()  # kind of warning -> how often

    def check(self, observations, frames=False):
        """UserError for an observation that the policy cannot take; a warning for one unlike its training data.
        `frames`: images may be a list instead, the last frames of the only camera, oldest first."""
        dicts = isinstance(observations, (list, tuple)) and all(isinstance(o, dict) for o in observations)
        require(dicts and observations, "no observation was given: predict takes a list of one or more dicts")
        for o in observations:
            if self.state:
                self._check_state(o.get("state"))
            if "vl_features" not in o:  # else images and text are encoded already
                images = o.get("images")
                several = frames and isinstance(images, (list, tuple)) and images
                for shown in [dict.fromkeys(self.images, frame) for frame in images] if several else [images]:
                    self._check_images(shown)
                self._check_text(o.get("instruction"))

    def _check_images(self, images):
        given = sorted(images) if isinstance(images, dict) else f"a {type(images).__name__}, not a dict"
        for name, size in self.images.items():
            wrong = f"the observation's images are {given}, expected {', '.join(self.images)}: {name} is missing"
            require(isinstance(images, dict) and name in images, wrong)
            picture = np.asarray(images[name])
            valid = picture.ndim == 3 and picture.shape[-1] == 3 and picture.dtype == np.uint8
            wrong = f"{name} is {picture.dtype} {picture.shape}, expected uint8 (height, width, 3), RGB"
            require(valid and picture.size, wrong)
            if size is not None:
                (height, width), (rows, columns) = size, picture.shape[:2]
                wrong = f"{name} is {columns}x{rows}, in training it was {width}x{height}: another aspect ratio"
                same_aspect = abs(columns / rows * height / width - 1) <= ASPECT
                require(same_aspect, f"{wrong}. Send the whole image of the same camera, not cropped or squeezed")

    def _check_text(self, text):
        known = ", ".join(map(repr, self.instructions[:3]))
        wrong = f"the observation's instruction is {text!r}, the policy needs a text, e.g. {known}"
        require(isinstance(text, str) or (text is None and not self.must_be_told), wrong)
        if self.instructions and text is not None and text not in self.instructions:
            self._warn("instruction", f"the policy was not trained on {text!r}, but on {known}")

    def _check_state(self, state):
        shape, names = np.shape(state), ", ".join(f"{name} ({unit})" for name, unit in self.state)
        require(shape == (len(self.state),), f"the observation's state has shape {shape}, the policy needs {names}")
        state = np.asarray(state, np.float64)
        require(np.isfinite(state).all(), f"the observation's state is not finite: {state.tolist()}")
        # without the training's range there is nothing to compare with
        for (name, unit), value, low, high in zip(self.state, state, self.low or [], self.high or [], strict=False):
            beyond = max(low - value, value - high)
            if beyond > FAR * (high - low) + 1e-3 * max(abs(low), abs(high)) + 1e-6:
                seen = f"in training it was {low:.4g} to {high:.4g}: another unit or frame?"
                self._warn(f"state {name}", f"the state's {name} is {value:.4g} {unit}, {seen}")

    def _warn(self, kind, text):
        self.warned[kind] += 1
        if self.warned[kind] == 1:
            print(f"warning: {text} (said once, counted in contract.warned)", flush=True)

    def example(self):
        """An observation that check() takes: grey images, the middle of the state's range."""
        sizes = {name: size or (240, 320) for name, size in self.images.items()}
        images = {name: np.full((*map(int, size), 3), 128, np.uint8) for name, size in sizes.items()}
        state = np.mean([self.low, self.high], 0) if self.low and self.high else np.zeros(len(self.state))
        text = self.instructions[0] if self.instructions else ""
        return dict(images=images, state=state.astype(np.float32) if self.state else None, instruction=text)

    def describe(self, policy, example=None):
        """-> JSON-serialisable dict, with the latency measured on `example` (or example()). Resets the policy."""
        example, seconds = example or self.example(), []
        for _ in range(4):
            begin = time.perf_counter()
            chunk = policy.predict([example])
            seconds.append(time.perf_counter() - begin)
        policy.reset()
        expected = (1, self.horizon, len(self.actions))
        assert np.shape(chunk) == expected, f"predict gave {np.shape(chunk)}, the contract says {expected}"
        about = {key: getattr(self, key) for key in DESCRIBED.split()}
        sizes = {name: size or (None, None) for name, size in self.images.items()}
        about["cameras"] = {name: dict(height=height, width=width) for name, (height, width) in sizes.items()}
        about["pictures"] = "uint8 (height, width, 3), RGB"
        about["state"] = _columns(self.state, self.low, self.high)
        about["actions"] = _columns(self.actions, self.action_low, self.action_high)
        about["latency_ms"] = 1000 * float(np.median(seconds[1:]))  # the first call warms up
        return about


def _columns(named, low, high):
    """-> [{name, unit, and the training's low and high where known}]"""
    columns = [dict(name=name, unit=unit) for name, unit in named]
    for column, smallest, largest in zip(columns, low or [], high or [], strict=False):
        column.update(low=smallest, high=largest)
    return columns


def partners(episodes, progress):
    """Partner of each sample in a test that swaps inputs: the index of the sample nearest in progress among those of
    other episodes (of equally near ones the next in order). `episodes` (n,): names or numbers, `progress` (n,): phase,
    or fraction of the episode that is over. None if there is only one episode."""
    names, episodes = np.unique(episodes, return_inverse=True)
    progress, found = np.asarray(progress, np.float64), []
    if len(names) < 2:
        return None
    for i in range(len(episodes)):  # row by row: a matrix of all pairs might not fit into memory
        distance = np.where(episodes == episodes[i], math.inf, np.abs(progress - progress[i]))
        found.append((i + np.roll(distance, -i).argmin()) % len(distance))  # rolled: argmin takes the next in order
    return np.array(found)
