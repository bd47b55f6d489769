"""Closed-loop evaluation: drive a policy through an environment, count successes, draw images.

An environment is any object with

    reset(seed) -> observation        step(action) -> (observation, done)        success() -> {"success": bool, ...}

whose observations are those of the policy's predict. What else success() returns (numbers with their unit in the name,
booleans) is reported as its median, or as its count. Optional: expert() -> the right action now, hold() -> the action
of standing still, units of the action (compared with the policy's), picture() -> (h, w, 3) uint8 for a person, hz, verb
("inserted"), and looking, which is set to False while nobody needs images."""

import functools
import importlib
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageFont import load_default as font
from tqdm import tqdm

from common import require

MAX_STEPS = 10_000  # an environment that never ends is a mistake
RETURNS = dict(reset="an observation, which is a dict", step="(observation, done)", success="a dict with 'success'")


# ---- driving ---------------------------------------------------------------------------------------------------------
class Plan:
    """The actions of one drive: the newest chunk's row of this step or, with `ensemble` m, the mean of all chunks' rows
    of this step, weighted exp(-m i), i = 0 the oldest (ACT's temporal ensemble, Zhao et al. 2023). Deltas are averaged
    as positions: the sum of what had been sent when the chunk was predicted, plus the chunk's own deltas."""

    def __init__(self, delta, ensemble=None):
        self.delta, self.ensemble = delta, ensemble
        self.chunks, self.step, self.sent = [], 0, 0.0  # chunks: (first step, rows); sent: sum of all deltas

    def add(self, chunk):
        rows = np.asarray(chunk, np.float64)
        if self.ensemble is None:
            self.chunks = []
        elif self.delta:
            rows = self.sent + np.cumsum(rows, axis=0)
        self.chunks.append((self.step, rows))

    def next(self):
        self.chunks = [(begin, rows) for begin, rows in self.chunks if self.step - begin < len(rows)]
        actions = np.stack([rows[self.step - begin] for begin, rows in self.chunks])
        action = actions[-1]
        if self.ensemble is not None:
            action = np.average(actions, axis=0, weights=np.exp(-self.ensemble * np.arange(len(actions))))
            action = action - self.sent if self.delta else action
        self.step, self.sent = self.step + 1, self.sent + action
        return action


def checked(scene, method, *args):
    """-> scene.method(*args); UserError unless it has the form that the head of this file says."""
    result = getattr(scene, method)(*args)
    first, *more = result if isinstance(result, tuple) else (result,)
    right = isinstance(first, dict) and len(more) == (method == "step") and (method != "success" or "success" in first)
    kinds = ", ".join(type(part).__name__ for part in (first, *more))
    require(right, f"{type(scene).__name__}.{method} gives {kinds}; expected {RETURNS[method]}")
    return result


def drive(predict, scenes, seeds, delta, execute=1, ensemble=None, looking=True):
    """Drive all `scenes` (environments) in lockstep, each from its seed. predict(indices of the unfinished scenes,
    their observations) -> (B, H, A), of which `execute` rows are sent before the next call. -> a list of {seed, actions
    (T, A), seconds: of predict, per scene and call, steps, and what success() returned}."""
    observations, plans, seconds = [], [Plan(delta, ensemble) for _ in seeds], []
    for scene, seed in zip(scenes, seeds, strict=True):
        scene.looking = looking
        observations.append(checked(scene, "reset", seed))
    sent, bar = [[] for _ in seeds], tqdm(total=len(seeds), desc="drive", unit="scene", disable=None, leave=False)
    step, live = 0, list(range(len(seeds)))
    while live:
        require(step < MAX_STEPS, f"scene {seeds[live[0]]} did not end within {MAX_STEPS} steps")
        if step % execute == 0:
            begin = time.perf_counter()
            chunks = np.asarray(predict(live, [observations[k] for k in live]))
            seconds.append((time.perf_counter() - begin) / len(live))
            require(chunks.shape[1] >= execute, f"--execute {execute}: a chunk has {chunks.shape[1]} rows")
            for k, chunk in zip(live, chunks, strict=True):
                plans[k].add(chunk)
        unfinished = []
        for k in live:
            action = plans[k].next()
            require(np.isfinite(action).all(), f"scene {seeds[k]}, step {step}: the action is {action.tolist()}")
            scenes[k].looking = looking and (step + 1) % execute == 0  # the next observation goes to predict
            observations[k], done = checked(scenes[k], "step", action)
            sent[k].append(action)
            if not done:
                unfinished.append(k)
        bar.update(len(live) - len(unfinished))
        step, live = step + 1, unfinished
    bar.close()
    runs = []
    for scene, seed, actions in zip(scenes, seeds, sent, strict=True):
        run = dict(seed=seed, actions=np.stack(actions), seconds=float(np.median(seconds)), steps=len(actions))
        runs.append(run | checked(scene, "success"))
    return runs


def compare(policy, about, make_scene, seeds, execute=1, ensemble=None, batch_size=50):
    """Policy, its describe() -> {who: runs}. Who: the policy, the expert, holding still, and replay: what the expert
    (without one, the policy) did in the next scene. A baseline that the environment cannot do is left out."""
    scenes, delta, relative = [make_scene() for _ in seeds], about["kind"] == "delta", about["kind"] != "absolute"
    lacks = [method for method in RETURNS if not callable(getattr(scenes[0], method, None))]
    require(not lacks, f"{type(scenes[0]).__name__} has no method {', '.join(lacks)}: no environment")
    ours = [column["unit"] for column in about["actions"]]
    theirs = getattr(scenes[0], "units", None) or ours
    same = len(ours) == len(theirs) and all(a == b or not a or not b for a, b in zip(ours, theirs, strict=True))
    require(same, f"the policy's actions are in {ours}, the environment takes {theirs}: another one, or another unit")

    def predict(_, observations):
        observations = [rename(o, about["recorded"]) for o in observations]
        batches = [observations[i : i + batch_size] for i in range(0, len(observations), batch_size)]
        return np.concatenate([policy.predict(batch) for batch in batches])[:, about["skip"] :]

    def each(action):  # action(k) of the scene k -> chunks of one row
        return lambda live, _: np.stack([action(k) for k in live])[:, None]

    policy.reset()
    found = {"policy": drive(predict, scenes, seeds, delta, execute, ensemble)}
    blind = functools.partial(drive, scenes=scenes, seeds=seeds, delta=delta, looking=False)
    if hasattr(scenes[0], "expert"):
        found["expert"] = blind(each(lambda k: scenes[k].expert()))
    if hasattr(scenes[0], "hold"):
        found["hold still"] = blind(each(lambda k: scenes[k].hold()))
    elif relative:
        found["hold still"] = blind(each(lambda k: np.zeros(len(about["actions"]))))
    if len(seeds) > 1:
        recorded = [run["actions"] for run in found.get("expert", found["policy"])]
        last = [np.zeros_like(rows[0]) if relative else rows[-1] for rows in recorded]  # at its end it stands still
        tapes = [itertools.chain(rows, itertools.repeat(end)) for rows, end in zip(recorded, last, strict=True)]
        found["replay"] = blind(each(lambda k: next(tapes[(k + 1) % len(tapes)])))
    return found


def rename(observation, recorded):
    """Add to the observation's images, which may have the recorder's camera names, those that the policy knows."""
    images = observation.get("images")
    known = {name: images[theirs] for name, theirs in recorded.items() if isinstance(images, dict) and theirs in images}
    return observation | dict(images=images | known) if known else observation


# ---- measuring -------------------------------------------------------------------------------------------------------
def wilson(successes, count, z=1.96):
    """95 % confidence interval of a success rate."""
    rate, spread = successes / count, z * z / count
    half = z * np.sqrt(rate * (1 - rate) / count + spread / (4 * count))
    return (rate + spread / 2 - half) / (1 + spread), (rate + spread / 2 + half) / (1 + spread)


def summarise(runs):
    """-> {success: how many, scenes, interval, and of what else success() returned: medians, or counts of true}. A
    number that a scene does not have (None, NaN) is left out of the median; without any it is None."""
    successes = sum(bool(run["success"]) for run in runs)
    report = dict(success=successes, scenes=len(runs), interval=[float(v) for v in wilson(successes, len(runs))])
    for key in (key for key in runs[0] if key not in ("seed", "success", "actions", "seconds")):
        values = [run[key] for run in runs if str(run.get(key)) not in ("None", "nan")]
        if values and all(isinstance(v, (bool, np.bool_)) for v in values):
            report[key] = int(sum(values))
        elif all(isinstance(v, (int, float, np.number)) for v in values):
            report[key] = float(np.median(values)) if values else None
    return report


def print_table(reports, execute, ensemble, latency_ms):
    settings = f"{execute} of each chunk's rows sent" + ("" if ensemble is None else f", ensemble {ensemble:g}")
    first = next(iter(reports.values()))
    keys = [key for key in first if key not in ("success", "scenes", "interval")]
    width = max(12, *(len(key) + 2 for key in keys))
    print(f"\nclosed loop, {first['scenes']} scenes, {settings}; medians, of true or false the number of scenes")
    print(f"{'':12}{'success':>10}{'95 %':>12}" + "".join(f"{key:>{width}}" for key in keys))
    for who, report in reports.items():
        low, high = (round(100 * v) for v in report["interval"])
        cells = ["-" if report.get(key) is None else f"{round(report[key], 6):.4g}" for key in keys]
        score = f"{report['success']} of {report['scenes']}"
        print(f"{who:12}{score:>10}{f'{low}-{high} %':>12}" + "".join(f"{cell:>{width}}" for cell in cells))
    print(f"latency of predict for one observation: {latency_ms:.0f} ms")


# ---- drawing ---------------------------------------------------------------------------------------------------------
def film(make_scene, run, count):
    """Send a run's actions again -> ([(step, image)] at `count` moments, did it end as before?). The image is the
    scene's own, else what the policy sees."""
    scene, steps = make_scene(), len(run["actions"])
    moments, pictures = set(np.linspace(0, steps, count).round().astype(int).tolist()), []
    scene.looking = not hasattr(scene, "picture")
    observation = scene.reset(run["seed"])
    for step in range(steps + 1):
        if step in moments:
            images = observation["images"] if scene.looking else [scene.picture()]
            views = list(images.values()) if isinstance(images, dict) else images[-1:]
            for view in map(np.asarray, views):
                wrong = f"{type(scene).__name__} gives an image of {view.dtype} {view.shape}"
                require(view.dtype == np.uint8 and view.shape[2:] == (3,), f"{wrong}; expected uint8 (h, w, 3)")
            tall = max(map(len, views))  # cameras may differ in size
            views = [np.pad(view, ((0, tall - len(view)), (0, 0), (0, 0))) for view in views]
            pictures.append((step, np.concatenate(views, axis=1)))
        if step < steps:
            observation, _ = scene.step(run["actions"][step])
    return pictures, bool(scene.success()["success"]) == bool(run["success"])


def draw_strip(make_scene, found, path, count=5, width=320):
    """A row of images per drive: a success and a failure of the policy, the baselines in the first one's scene."""
    policy, hz, rows = found["policy"], getattr(make_scene(), "hz", None), []
    outcomes = [bool(run["success"]) for run in policy]
    chosen = [policy[outcomes.index(outcome)] for outcome in (True, False) if outcome in outcomes]
    drives = [("policy", run) for run in chosen]
    for who in list(found)[1:]:
        drives += [(who, run) for run in found[who] if run["seed"] == chosen[0]["seed"]]
    for who, run in drives:
        pictures, same = film(make_scene, run, count)
        height = round(width * pictures[0][1].shape[0] / pictures[0][1].shape[1])
        row = Image.new("RGB", (count * (width + 4), height + 42), "white")
        draw = ImageDraw.Draw(row)
        for k, (step, picture) in enumerate(pictures):
            row.paste(Image.fromarray(picture).resize((width, height)), (k * (width + 4), 42))
            draw.text((k * (width + 4) + 4, 24), f"{step / hz:.1f} s" if hz else f"step {step}", "gray", font(14))
        outcome = "success" if run["success"] else "failed"
        measured = [f"{k} {v:.3g}" for k, v in run.items() if isinstance(v, float) and k != "seconds"]
        note = [] if same else ["ended otherwise when driven again for this image"]
        draw.text((4, 4), f"{who}, scene {run['seed']}: {', '.join([outcome, *measured, *note])}", "black", font(14))
        rows.append(np.asarray(row))
    Image.fromarray(np.concatenate(rows)).save(path)


def run(policy, environment, folder, scenes=50, execute=0, ensemble=None, batch_size=50, about=None):
    """Drive, print the table, write closed_loop.json and closed_loop.png -> {who: summarise's report}. `environment`:
    "module:Class", see open_environment; `execute` 0: half of a chunk; `about`: more for the JSON."""
    require(scenes >= 1 and execute >= 0, f"--scenes {scenes} must be 1 or more, --execute {execute} 0 or more")
    make_scene = open_environment(environment)
    folder.mkdir(parents=True, exist_ok=True)
    contract = policy.describe()
    execute = execute or max(1, (contract["horizon"] - contract["skip"]) // 2)
    found = compare(policy, contract, make_scene, list(range(scenes)), execute, ensemble, batch_size)
    reports = {who: summarise(runs) for who, runs in found.items()}
    print_table(reports, execute, ensemble, contract["latency_ms"])
    about = (about or {}) | dict(environment=environment, execute=execute, ensemble=ensemble, policy=contract)
    about |= dict(summary=reports, scenes={})
    for who, runs in found.items():
        plain = [{k: None if str(v) == "nan" else v for k, v in run.items() if k != "actions"} for run in runs]
        about["scenes"][who] = plain  # JSON has no NaN
    (folder / "closed_loop.json").write_text(json.dumps(about, indent=2, default=lambda value: value.tolist()))
    draw_strip(make_scene, found, folder / "closed_loop.png")
    print(f"report: {folder / 'closed_loop.json'}\npicture: {folder / 'closed_loop.png'}")
    still = f" (holding still: {reports['hold still']['success']})" if "hold still" in reports else ""
    did = getattr(make_scene, "verb", "did the task in")
    print(f"{did} {reports['policy']['success']} of {scenes} unseen scenes{still}")
    return reports


def open_environment(name):
    """ "module:Class" -> the class; the module may be among the scripts or in the current folder."""
    module, _, cls = name.partition(":")
    require(module and cls, f"--closed-loop {name}: expected module:Class, e.g. demo_scenes:Insertion")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        within = not f"{module}.".startswith(f"{error.name}.")
        require(within, f"--closed-loop {name}: no module {module} in {Path.cwd()}")
        raise
    require(hasattr(found, cls), f"--closed-loop {name}: {found.__file__} has no {cls}")
    return getattr(found, cls)
