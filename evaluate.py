"""Evaluate any checkpoint of this collection: open loop on recorded episodes, or closed loop in an environment.

    python evaluate.py --checkpoint outputs/nora --data DATA [--episodes a.h5 b.h5]
    python evaluate.py --checkpoint outputs/nora --data DATA --replay outputs/nora/evaluation/predictions.npz
    python evaluate.py --checkpoint outputs/nora --closed-loop demo_scenes:Insertion --scenes 50 --execute 4

Open loop: for every frame the policy predicts its chunk of actions from what it would have seen, and the chunk is
compared with the recording. Errors are in the data's own physical units, per dimension, per step of the horizon and per
phase, next to two baselines, "hold still" and "mean action" (of the training statistics), and to the "floor": what is
lost when the recorded chunk itself goes through the policy's tokenizer or clipping. Metres and radians are never
averaged into one number: "relative" divides each dimension by its better baseline first. Steps beyond an episode's end
do not count. Writes report.html, report.json, summary.png, worst.png, one plot per episode, and predictions.npz, which
--replay compares with what the policy predicts on another machine. Closed loop: common/closed_loop.py.

The checkpoint names its script, which provides
    load_policy(path, device) -> policy
    policy.predict(list of observations) -> (B, H, A)    policy.reset()    policy.describe()
    policy.open_episodes(root, names) -> dicts {name, sample(t) -> observation, target, hold (M, A), phase (M,) or None}
    policy.action_names() -> [(name, unit)] * A          policy.stats["action"]: {mean, std}
    policy.nearest(chunks (n, H, A)) -> (n, H, A), the closest that it could answer (optional)
    policy.opposites: {instruction: one that leads elsewhere} (optional)
"""

import base64
import contextlib
import importlib
import io
import itertools
import json
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import numpy as np
import torch
from matplotlib import font_manager, rcParams
from matplotlib.figure import Figure
from PIL import Image

from common import UserError, closed_loop, require
from common.checkpoint import checkpoints_in, load_state, read_json
from common.config import parse_config
from common.log import progress
from common.policy import partners
from common.program import launch

ROOT = Path(__file__).resolve().parent
CLEAR = 0.7  # a suspected mistake is reported if undoing it leaves less than this share of the error
SHIFTS = range(-2, 3)  # rows by which chunks are shifted against the recording, to find an off-by-one
BASELINES = ("hold still", "mean action")
# {flag: flags that have no effect together with it}
IDLE = dict(closed_loop="data replay episodes stride plots uses", data="scenes execute ensemble")
IDLE["replay"] = "episodes stride batch_size plots uses output"
HANGUL = {"NanumGothic", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans KR", "Malgun Gothic", "AppleGothic"}
rcParams["font.family"] = ["DejaVu Sans", *sorted(HANGUL & {font.name for font in font_manager.fontManager.ttflist})]
COLORS = {"policy": "tab:orange", "hold still": "tab:blue", "mean action": "tab:green", "floor": "tab:gray"}


@dataclass
class Config:
    checkpoint: list[str] = field(default_factory=list)  # of a train_*.py, or a run's folder: its best, else its newest
    data: list[str] = field(default_factory=list)  # root folder of the recordings; of robot sessions also several
    episodes: list[str] = field(default_factory=list)  # names below data, or all; empty: the checkpoint's validation
    output: str | None = None  # folder of the report; null: evaluation/ in the folder given, beside a file
    stride: int = 1  # evaluate every n-th frame
    batch_size: int = 16  # frames
    plots: int = 20  # draw at most this many episodes; the errors are over all
    uses: int = 64  # frames on which inputs are swapped and blanked, to see which ones the policy uses; 0: skip this
    device: str | None = None  # cpu, cuda, ...; null: cuda if there is one
    replay: str | None = None  # predictions.npz of another evaluation: predict the same again and compare every bit
    closed_loop: str | None = None  # module:Class of an environment to drive through, instead of recordings
    scenes: int = 50  # seeds 0, 1, ... of the environment
    execute: int = 0  # rows of a chunk that are sent before the next prediction; 0: half of it
    ensemble: float | None = None  # m: average overlapping chunks with weights exp(-m i), i = 0 the oldest; ACT: 0.01


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def find_checkpoint(path):
    """A run's folder -> its best checkpoint, else its newest; a checkpoint -> itself."""
    path = Path(path)
    require(path.exists(), f"--checkpoint {path}: no such file or folder")
    for folder in (path, path / "checkpoints") if path.is_dir() else ():
        steps = checkpoints_in(folder, ("steps_*", "*_step_*.pt"))  # by number
        best = [*folder.glob("best"), *folder.glob("best_hf"), *folder.glob("*_best.pt")]
        files = sorted(set(folder.glob("*.pt")) - {folder / "state.pt"}, key=lambda p: p.stat().st_mtime)
        for found in (best, steps[-1:], files[-1:]):
            require(len(found) < 2, f"--checkpoint {path} holds several runs: choose {' or '.join(map(str, found))}")
            if found:
                return found[0]
    return path


def read_about(checkpoint):
    """-> {script, validation: names of the held-out episodes}, as far as the checkpoint and its run have them."""
    about, path = {}, Path(checkpoint)
    files = [path.parent / "meta.json", path / "model/policy.json", path / "policy.json", path / "meta.json"]
    for file in filter(Path.is_file, files):  # the checkpoint's own last: it counts
        about |= read_json(file)
    if path.is_file():
        about |= load_state(path).get("meta", {})
    unnamed = f"--checkpoint {path}: nothing there names its script; expected a checkpoint of a train_*.py"
    require("script" in about, f"{unnamed}, e.g. outputs/nora/steps_20000")
    known = (ROOT / f"{about['script']}.py").is_file()
    require(known, f"--checkpoint {path} was made by {about['script']}.py, which is not in {ROOT}")
    return about


# ---- errors ----------------------------------------------------------------------------------------------------------


def evaluate(policy, root, names=None, stride=1, batch_size=16):
    """-> records, one per predicted frame: {episode, t, phase or -1, predicted and recorded (H, A), valid (H,): False
    outside the episode, error {who: (H, A) guess minus recorded}, around (H + 4, A): recorded with two rows more on
    both sides, around_valid (H + 4,)}."""
    mean, records = np.asarray(policy.stats["action"]["mean"], np.float32), []
    for episode in policy.open_episodes(root, names):
        target, hold, phase = episode["target"], episode["hold"], episode["phase"]
        frames, predicted = list(range(0, len(target), stride)), []
        if not frames:
            print(f"left out  {episode['name']}: no motion after an image to compare with")
        for i in progress(range(0, len(frames), batch_size), episode["name"], "batch"):
            predicted.extend(policy.predict([episode["sample"](t) for t in frames[i : i + batch_size]]))
        for t, chunk in zip(frames, predicted, strict=True):
            damaged = f"{episode['name']} frame {t}: the policy predicts {chunk[0].tolist()}: its checkpoint is damaged"
            require(np.isfinite(chunk).all(), f"{damaged}. Copy it again, or choose another")
            index = np.arange(t + SHIFTS[0], t + len(chunk) + SHIFTS[-1])
            around, around_valid = target[np.clip(index, 0, len(target) - 1)], (index >= 0) & (index < len(target))
            recorded, valid = (rows[-SHIFTS[0] :][: len(chunk)] for rows in (around, around_valid))
            error = {"policy": chunk - recorded, "mean action": mean - recorded}
            error["hold still"] = hold[t] - recorded  # one action for the whole chunk: a baseline sees no later frame
            if hasattr(policy, "nearest"):
                error["floor"] = policy.nearest(recorded[None])[0] - recorded
            record = dict(episode=episode["name"], t=t, phase=-1 if phase is None else int(phase[t]), predicted=chunk)
            record |= dict(recorded=recorded, valid=valid, error=error, around=around, around_valid=around_valid)
            records.append(record)
    require(records, f"no frame to evaluate under '{root}'")
    return records


def stack(records, key):
    return np.stack([record[key] for record in records])


def baseline(report):
    """-> (A,) error of the better baseline, (A,) bool: does the dimension move? Else there is nothing to predict."""
    scale = np.minimum(*(list(report[who]["per_dim"].values()) for who in BASELINES))
    return scale, scale > 1e-6


def summarise(records, names):
    """{who: {per_dim, bias, per_unit, per_step, per_phase, relative}}: mean absolute errors in the data's units. `bias`
    is the mean signed error; `per_unit` the mean over the moving dimensions of one unit; `relative` the mean over
    dimensions of error / error of the better baseline, 1 is no better than a baseline."""
    valid, phases = stack(records, "valid")[..., None], stack(records, "phase")  # (n, H, 1), (n,)

    def average(error, mask):
        return (error * mask).sum((0, 1)) / np.maximum(mask.sum((0, 1)), 1)  # (A,)

    def named(values):
        return {name: float(v) for (name, _), v in zip(names, values, strict=True)}

    errors = {who: np.stack([r["error"][who] for r in records]) for who in COLORS if who in records[0]["error"]}
    report = {who: dict(per_dim=named(average(np.abs(signed), valid))) for who, signed in errors.items()}
    scale, moving = baseline(report)
    require(moving.any(), f"nothing moves in these {len(records)} frames: there is no error to compare with")
    units = {unit: [d for d, (_, u) in enumerate(names) if u == unit and moving[d]] for _, unit in names}
    for who, signed in errors.items():
        size = np.abs(signed)
        per_dim = average(size, valid)
        report[who] |= dict(
            bias=named(average(signed, valid)),
            per_unit={unit: float(per_dim[dims].mean()) for unit, dims in units.items() if dims},
            per_step=[average(size[:, [h]], valid[:, [h]]).tolist() for h in np.flatnonzero(valid.any((0, 2)))],
            per_phase={str(p): average(size[phases == p], valid[phases == p]).tolist() for p in set(phases) - {-1}},
            relative=float(np.mean(per_dim[moving] / scale[moving])),
        )
    return report


# ---- what it uses ----------------------------------------------------------------------------------------------------


def sample_again(policy, root, names, records):
    """-> the observations of these records, read again: all of them would not fit into memory."""
    found = {}
    for episode in policy.open_episodes(root, names):
        for t in [r["t"] for r in records if r["episode"] == episode["name"]]:
            found[episode["name"], t] = episode["sample"](t)
        if len(found) == len(records):
            break
    return [found[r["episode"], r["t"]] for r in records]


def changed_inputs(seen, others, opposites):
    """Observations and, for each, one of another episode -> {(input, change): observations with it changed}."""
    changed, pairs = {}, list(zip(seen, others, strict=True))
    images = seen[0].get("images")
    if isinstance(images, dict) and "vl_features" not in seen[0]:
        for name in images:
            changed[name, "swapped"] = [o | dict(images=o["images"] | {name: p["images"][name]}) for o, p in pairs]
            blank = np.full_like(images[name], 128)
            changed[name, "blanked"] = [o | dict(images=o["images"] | {name: blank}) for o in seen]
        if len(images) > 1:
            changed["all images", "swapped"] = [o | dict(images=p["images"]) for o, p in pairs]
        bgr = [{name: image[..., ::-1] for name, image in o["images"].items()} for o in seen]
        changed["colours", "reversed"] = [o | dict(images=images) for o, images in zip(seen, bgr, strict=True)]
    elif images is not None:  # a list: the newest frames of one camera
        changed["images", "swapped"] = [o | dict(images=p["images"]) for o, p in pairs]
        changed["images", "blanked"] = [o | dict(images=[np.full_like(i, 128) for i in o["images"]]) for o in seen]
        changed["colours", "reversed"] = [o | dict(images=[image[..., ::-1] for image in o["images"]]) for o in seen]
    for name in ("vl_features", "age", "state", "sensor"):
        if any(o.get(name) is not None for o in seen):
            changed[name, "swapped"] = [o | {name: p.get(name)} for o, p in pairs]
    if ("sensor", "swapped") in changed:
        changed["sensor", "missing"] = [o | dict(sensor=None) for o in seen]
        for name, columns in (("force", slice(0, 1)), ("A-scan", slice(1, None))):
            changed[name, "swapped"] = [o | dict(sensor=with_columns(o, p, columns)) for o, p in pairs]
    texts = sorted({o["instruction"] for o in seen if o.get("instruction")})
    other_text = {text: opposites.get(text, texts[k - 1]) for k, text in enumerate(texts)}
    if any(text != other for text, other in other_text.items()):
        changed["instruction", "swapped"] = [o | dict(instruction=other_text.get(o.get("instruction"))) for o in seen]
    return changed


def with_columns(observation, other, columns):
    """-> the observation's newest sensor rows, these `columns` taken from the other's."""
    rows, theirs = observation["sensor"], other["sensor"]
    if rows is None or theirs is None:
        return rows
    count = min(len(rows), len(theirs))
    rows = np.array(rows[len(rows) - count :])
    rows[:, columns] = theirs[len(theirs) - count :][:, columns]
    return rows


def find_uses(policy, root, names, records, report, count, batch_size):
    """-> {input: {change: relative error with it}, "own": {"": that without}}, on `count` frames. Swapped means: taken
    from another episode's frame at the nearest phase; if there is one episode only, from a frame far away."""
    chosen = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, count).astype(int))]
    length = {r["episode"]: r["t"] + 1 for r in records}
    phase = [10 * r["phase"] + r["t"] / length[r["episode"]] for r in chosen]
    other = partners([r["episode"] for r in chosen], phase)
    if other is None:  # one episode, or one file of unrelated images: a frame far away
        other = np.roll(np.arange(len(chosen)), len(chosen) // 2)
    seen = sample_again(policy, root, names, chosen)
    changes = {("own", ""): seen} | changed_inputs(seen, [seen[k] for k in other], getattr(policy, "opposites", {}))
    (scale, moving), found = baseline(report), {}
    valid, recorded = stack(chosen, "valid")[..., None], stack(chosen, "recorded")
    for (name, how), observations in changes.items():
        policy.reset()  # the same noise, if any
        batches = [observations[i : i + batch_size] for i in range(0, len(seen), batch_size)]
        error = np.abs(np.concatenate([policy.predict(batch) for batch in batches]) - recorded)
        per_dim = (error * valid).sum((0, 1)) / valid.sum()
        found.setdefault(name, {})[how] = float(np.mean(per_dim[moving] / scale[moving]))
    return found


def print_uses(uses, count):
    own = uses["own"][""]
    print(f"what the policy uses: relative error on {count} frames with an input of another episode, or without it")
    print(f"  {'nothing changed':22}{own:8.3g}")
    for name, changed in uses.items():
        for how, error in changed.items() if name != "own" else ():
            verdict = "" if error > 1.05 * own else "   hardly used"
            verdict = "   better than its own" if error < CLEAR * own else verdict
            print(f"  {f'{name} {how}':22}{error:8.3g}  {error / max(own, 1e-9):6.2f} x{verdict}")


# ---- what looks like a mistake ---------------------------------------------------------------------------------------


def find_faults(records, names, report, uses, std):
    """-> sentences on what looks like a mistake in data, checkpoint or images, not like too little training: see
    docs/faults.md. `std`: of the training's actions."""
    valid = stack(records, "valid")
    predicted, recorded = (stack(records, key)[valid].astype(float) for key in ("predicted", "recorded"))
    p, r, found = predicted - predicted.mean(0), recorded - recorded.mean(0), []
    ratio, moving = p.std(0) / np.maximum(r.std(0), 1e-12), np.flatnonzero(r.std(0) > 1e-6)

    def misfit(i, j, sign=1):  # error of predicted dim i as a guess of j, both centred: 1 is no better than the mean
        return np.abs(sign * p[:, i] - r[:, j]).mean() / np.abs(r[:, j]).mean()

    swapped = set()
    for i, j in itertools.combinations_with_replacement(moving, 2):
        (name, unit), (other, its_unit), signs = names[i], names[j], (-1,) if i == j else (1, -1)
        now = np.array([misfit(i, i), misfit(j, j)])
        then = np.array([min(misfit(a, b, sign) for sign in signs) for a, b in ((j, i), (i, j))])
        if unit == its_unit and (then < CLEAR * np.minimum(now, 1)).all():
            what = f"{name} looks turned" if i == j else f"{name} and {other} look swapped"
            swapped |= {i, j}
            found.append(f"{what}: error {now.max():.2g} x the motion as it is, {then.max():.2g} x the other way")
    for i in sorted(set(moving) - swapped):
        correlation = (p[:, i] * r[:, i]).mean() / r[:, i].var() / max(ratio[i], 1e-12)
        bias = (predicted - recorded)[:, i].mean() / max(std[i], r[:, i].std())
        larger = correlation > CLEAR and correlation * ratio[i] > 1 / CLEAR  # the slope, which noise only lowers
        # too little training also predicts too small motions, but not with such a correlation
        if larger or (correlation > 0.9 and ratio[i] < 0.5):
            found.append(f"{names[i][0]} is {ratio[i]:.2g} x as large as recorded: other statistics, or another unit?")
        elif abs(bias) > 2:
            found.append(f"{names[i][0]} is {bias:+.1f} std off on the mean: other statistics, or another zero?")
    found += find_shift(records, report)
    own, colours = (uses.get(name, {}).get(how) for name, how in (("own", ""), ("colours", "reversed")))
    if colours is not None and colours < CLEAR * own:
        found.append(f"with red and blue exchanged the error is {colours:.2g} instead of {own:.2g}: images in BGR?")
    return found


def find_shift(records, report):
    """-> [a sentence] if the chunk's first half fits the recording better some rows earlier or later, else []."""
    (scale, moving), count = baseline(report), (len(records[0]["valid"]) + 1) // 2
    around, valid, recorded = (stack(records, key) for key in ("around", "around_valid", "recorded"))

    def error_at(who, shift):
        rows = slice(shift - SHIFTS[0], shift - SHIFTS[0] + count)
        both = valid[:, -SHIFTS[0] :][:, :count] & valid[:, rows]
        guess = (recorded + np.stack([r["error"][who] for r in records]))[:, :count]
        return (np.abs(guess - around[:, rows])[both].mean(0)[moving] / scale[moving]).mean() if both.any() else np.inf

    errors = {shift: error_at("policy", shift) for shift in SHIFTS}
    best = min(errors, key=errors.get)
    if errors[best] >= 0.8 * min(1, errors[0], error_at("hold still", best)):  # better than holding still, shifted, too
        return []
    way = f"{abs(best)} row{'s' * (abs(best) > 1)} {'later' if best > 0 else 'earlier'}"
    return [f"the chunk fits best {way}: relative error {errors[best]:.2g}, as it is {errors[0]:.2g}: off by one?"]


# ---- report ----------------------------------------------------------------------------------------------------------


def print_table(report, names, records):
    """Mean absolute error per dimension and per unit, the policy's bias, and its error by phase and by step."""
    width = max(10, *(len(name) for name, _ in names)) + 1

    def line(title, values):
        print(f"{title:14}" + "".join(f"{v:>{width}.3g}" if isinstance(v, float) else f"{v:>{width}}" for v in values))

    print(f"\nmean absolute error over {len(records)} frames of {len({r['episode'] for r in records})} episode(s)")
    line("", [*(name for name, _ in names), "relative"])
    line("", [*(unit for _, unit in names), "1=baseline"])
    for who, r in report.items():
        line(who, [*r["per_dim"].values(), r["relative"]])
    policy = report["policy"]
    line("policy's bias", policy["bias"].values())
    for unit in policy["per_unit"]:
        each = ", ".join(f"{who} {r['per_unit'][unit]:.3g}" for who, r in report.items())
        print(f"mean of the dimensions in {unit or 'no unit'}: {each}")
    print("policy, by phase and by step of the chunk")
    for phase, values in sorted(policy["per_phase"].items()):
        line(f"  phase {phase}", values)
    for h in sorted({0, len(policy["per_step"]) // 2, len(policy["per_step"]) - 1}):
        line(f"  step {h + 1}", policy["per_step"][h])


def draw_episode(records, names, path):
    """Recorded and predicted first action of one episode's frames, one panel per dimension."""
    times, recorded = [r["t"] for r in records], np.stack([r["recorded"][0] for r in records])
    rows, columns = -(-len(names) // 3), min(3, len(names))
    figure = Figure(figsize=(13, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for i, (axis, (name, unit)) in enumerate(zip(axes.ravel(), names, strict=False)):
        axis.plot(times, recorded[:, i], color="black", lw=1.6, label="recorded")
        for who, style in zip(records[0]["error"], ("-", ":", "--", "-."), strict=False):
            guess = recorded + np.stack([r["error"][who][0] for r in records])
            axis.plot(times, guess[:, i], style, color=COLORS[who], lw=1, label=who)
        axis.set_title(f"{name} ({unit})" if unit else name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.ravel()[len(names) :]:
        axis.set_visible(False)
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{records[0]['episode']}: first action of each predicted chunk, over frames")
    figure.savefig(path, dpi=110)


def small(image, height=120):
    picture = Image.fromarray(np.asarray(image))
    return np.asarray(picture.resize((round(height * picture.width / picture.height), height)))


def draw_worst(policy, root, names, records, report, columns, path, count=4):
    """The windows with the largest relative error, one per episode: what was seen, recorded and predicted."""
    (scale, moving), worst = baseline(report), {}
    for r in records:
        score = float((np.abs(r["error"]["policy"])[r["valid"]][:, moving] / scale[moving]).mean())
        if score > worst.get(r["episode"], (-1.0, None))[0]:
            worst[r["episode"]] = (score, r)
    chosen = sorted(worst.values(), key=lambda item: -item[0])[:count]
    seen = sample_again(policy, root, names, [r for _, r in chosen])
    figure = Figure(figsize=(4 + 1.7 * len(columns), 2.1 * len(chosen)), layout="constrained")
    panels = figure.subplots(len(chosen), len(columns) + 1, squeeze=False, width_ratios=[2.4] + [1] * len(columns))
    for row, (score, r), observation in zip(panels, chosen, seen, strict=True):
        images = observation.get("images", {})
        shown = [small(image) for image in (images.values() if isinstance(images, dict) else images[-1:])]
        row[0].set_axis_off()
        row[0].set_title(f"{r['episode'][-34:]} frame {r['t']}: {score:.1f} x", fontsize=7)
        if shown:
            row[0].imshow(np.concatenate(shown, axis=1))
        for d, (axis, (name, unit)) in enumerate(zip(row[1:], columns, strict=True)):
            steps = np.arange(len(r["recorded"]))[r["valid"]]
            axis.plot(steps, r["recorded"][r["valid"], d], color="black", lw=1.4)
            axis.plot(steps, r["predicted"][r["valid"], d], ".-", color=COLORS["policy"], lw=1)
            axis.set_title(f"{name} ({unit})" if unit else name, fontsize=7)
            axis.tick_params(labelsize=6)
    figure.suptitle("worst windows: recorded (black) and predicted chunk, error over the better baseline's", fontsize=9)
    figure.savefig(path, dpi=110)


def write_html(path, title, text, pictures):
    """One self-contained file, to be sent to somebody."""
    parts = [f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title><h1>{escape(title)}</h1>"]
    parts.append(f"<pre>{escape(text)}</pre>")
    for picture in filter(Path.is_file, pictures):
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f"<h2>{escape(picture.stem)}</h2><img style='max-width:100%' src='data:image/png;base64,{data}'>")
    path.write_text("\n".join(parts), encoding="utf-8")


def draw_summary(report, names, path):
    """Errors over the better baseline: per dimension, and over the steps of the chunk."""
    figure, several = Figure(figsize=(12, 4), layout="constrained"), len(report["policy"]["per_step"]) > 1
    left, right = figure.subplots(1, 2, width_ratios=[3, 2 if several else 1e-3])
    scale, moving = baseline(report)
    for k, (who, r) in enumerate(report.items()):
        relative = np.divide(list(r["per_dim"].values()), scale, out=np.zeros(len(scale)), where=moving)
        left.bar(np.arange(len(names)) + (k - 1) * 0.22, relative, 0.2, color=COLORS[who], label=who)
        steps = (np.array(r["per_step"])[:, moving] / scale[moving]).mean(1)
        right.plot(np.arange(1, len(steps) + 1), steps, "o-", ms=3, color=COLORS[who], label=who)
    left.set_xticks(range(len(names)), [name for name, _ in names])
    left.set(ylabel="error / better baseline", title="per dimension (below 1 is better than both baselines)")
    right.set(xlabel="step of the chunk", title="per step of the horizon, mean over dimensions")
    right.set_visible(several)
    for axis in (left, right):
        axis.axhline(1, color="gray", lw=0.7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def save_predictions(path, records, episodes, cfg):
    """What --replay needs to predict the same again, in the same batches."""
    settings = dict(episodes=np.array(episodes or []), stride=cfg.stride, batch_size=cfg.batch_size)
    frames = dict(name=[r["episode"] for r in records], t=[r["t"] for r in records])
    np.savez(path, predicted=np.stack([r["predicted"] for r in records]), **frames, **settings)


def replay(policy, root, path):
    """Predict again what predictions.npz holds -> number of frames; UserError at the first that differs in any bit. A
    robot predicts one observation at a time: what that changes is printed for the first frames."""
    try:
        saved = dict(np.load(path))
        names, stride, batch = saved["episodes"].tolist() or None, int(saved["stride"]), int(saved["batch_size"])
        frames = list(zip(saved["name"].tolist(), saved["t"].tolist(), strict=True))
        require(len(frames) == len(saved["predicted"]) and min(stride, batch) > 0, "other numbers", ValueError)
    except Exception as error:  # damaged bytes surface as anything: BadZipFile, KeyError, TypeError, ...
        found = f"--replay {path}: no whole predictions.npz, which evaluate.py writes beside its report"
        raise UserError(f"{found} ({type(error).__name__}: {error})") from error
    records = evaluate(policy, root, names, stride, batch)
    other = f"the {len(records)} frames here are not the {len(frames)} of {path}: other recordings, or another reader"
    same = stack(records, "predicted").shape == saved["predicted"].shape
    require(same and [(r["episode"], r["t"]) for r in records] == frames, other)
    for record, stored in zip(records, saved["predicted"], strict=True):
        if record["predicted"].tobytes() != stored.tobytes():
            away = np.abs(record["predicted"] - stored).max()
            first = f"{record['episode']} frame {record['t']}: the prediction differs from the stored one by {away:.3g}"
            raise UserError(f"{first}. Another checkpoint, library version or kind of processor, or another image")
    policy.reset()
    alone = [policy.predict([seen]) for seen in sample_again(policy, root, names, records[:batch])]
    away = np.abs(np.concatenate(alone) - saved["predicted"][: len(alone)]).max()
    print(f"replay: {len(records)} predictions are those of {path}, to the bit")
    print(f"one observation at a time, as on a robot: the first {len(alone)} differ by at most {away:.3g}")
    return len(records)


def output_folder(cfg, given):
    if not cfg.output:
        return given / "evaluation" if given.is_dir() else Path(f"{given.with_suffix('')}_evaluation")
    return Path(cfg.output) / (given.as_posix().strip("/").replace("/", "__") if len(cfg.checkpoint) > 1 else "")


def report_on(cfg, policy, folder, about, names):
    """Evaluate on recordings and write the report -> summarise's report."""
    root = cfg.data if hasattr(policy, "several_roots") else cfg.data[0]
    require(root == cfg.data or len(cfg.data) == 1, f"{about['script']}.py reads one folder: --data DATA")
    if cfg.replay:
        return replay(policy, root, cfg.replay)
    folder.mkdir(parents=True, exist_ok=True)
    selected = None if names == ["all"] else names
    try:
        records = evaluate(policy, root, selected, cfg.stride, cfg.batch_size)
    except UserError as error:
        others = "These are the checkpoint's validation episodes; others: --episodes NAME ..., or all"
        require(cfg.episodes or "has no" not in str(error), f"{error}. {others}")
        raise
    columns, text = policy.action_names(), io.StringIO()
    report = summarise(records, columns)
    uses = find_uses(policy, root, selected, records, report, cfg.uses, cfg.batch_size) if cfg.uses else {}
    faults = find_faults(records, columns, report, uses, np.asarray(policy.stats["action"]["std"]))
    with contextlib.redirect_stdout(text):
        print_table(report, columns, records)
        if uses:
            print_uses(uses, min(cfg.uses, len(records)))
        for fault in faults:
            print(f"CHECK: {fault}")
    print(text.getvalue(), end="")
    episodes = list(dict.fromkeys(r["episode"] for r in records))
    about = about | dict(data=cfg.data, frames=len(records), episodes=sorted(episodes), units=dict(columns))
    about |= dict(mean_absolute_error=report, uses=uses, faults=faults)
    (folder / "report.json").write_text(json.dumps(about, indent=2))
    save_predictions(folder / "predictions.npz", records, selected, cfg)
    pictures = [folder / "closed_loop.png", folder / "summary.png", folder / "worst.png"]
    draw_summary(report, columns, folder / "summary.png")
    draw_worst(policy, root, selected, records, report, columns, folder / "worst.png")
    for name in episodes[: cfg.plots]:
        pictures.append(folder / f"{Path(name).with_suffix('').as_posix().replace('/', '__')}.png")
        draw_episode([r for r in records if r["episode"] == name], columns, pictures[-1])
    write_html(folder / "report.html", about["checkpoint"], text.getvalue(), pictures)
    relative, best = report["policy"]["relative"], min(report[who]["relative"] for who in BASELINES)
    verdict = "" if relative < best else ": no better than doing nothing, train longer or check the data"
    print(f"\nthe policy's error is {relative:.2f} x that of the better baseline per dimension{verdict}")
    print(f"report: {folder / 'report.html'}\npicture: {folder / 'summary.png'}")
    return report


def run_one(cfg, given):
    """One checkpoint -> its report."""
    checkpoint = find_checkpoint(given)
    about = read_about(checkpoint)
    names = cfg.episodes or about.get("validation") or ["all"]
    unknown = "the checkpoint names no validation episodes: training episodes may be among them"
    held_out = unknown if names == ["all"] else f"{len(names)} validation episodes of the checkpoint"
    what, which = "environment" if cfg.closed_loop else "episodes", cfg.closed_loop or cfg.replay
    print(f"checkpoint: {checkpoint}, of {about['script']}.py\n{what}: {which or ', '.join(cfg.episodes) or held_out}")
    policy = importlib.import_module(about["script"]).load_policy(checkpoint, cfg.device)
    known, folder = dict(checkpoint=str(checkpoint), script=about["script"]), output_folder(cfg, given)
    if not cfg.closed_loop:
        return report_on(cfg, policy, folder, known, names)
    settings = dict(scenes=cfg.scenes, execute=cfg.execute, ensemble=cfg.ensemble, batch_size=cfg.batch_size)
    return closed_loop.run(policy, cfg.closed_loop, folder, about=known, **settings)["policy"]


def print_comparison(reports, closed):
    """One line per checkpoint."""
    print("\nall checkpoints: mean absolute error of the policy" if not closed else "\nall checkpoints")
    for given, report in reports.items():
        values = report if closed else report["policy"]["per_dim"] | dict(relative=report["policy"]["relative"])
        print(f"  {given}: " + "  ".join(f"{k} {v:.3g}" for k, v in values.items() if isinstance(v, (int, float))))


def run(cfg):
    """Evaluate and report -> the report; of several checkpoints {checkpoint: report}."""
    needed = "--checkpoint and --data are needed, e.g. --checkpoint outputs/nora --data D"
    require(cfg.checkpoint and (cfg.data or cfg.closed_loop), f"{needed}; or --closed-loop MODULE:CLASS")
    for key, least in dict(stride=1, batch_size=1, plots=0, uses=0).items():
        require(getattr(cfg, key) >= least, f"--{key} is {getattr(cfg, key)}: expected {least} or more")
    for flag, names in IDLE.items():
        idle = [f"--{n}" for n in names.split() if getattr(cfg, flag) and getattr(cfg, n) != getattr(Config(), n)]
        require(not idle, f"{', '.join(idle)} would have no effect with --{flag}: leave it out")
    try:
        torch.zeros(1, device=cfg.device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {str(error).splitlines()[0]}") from error
    if cfg.closed_loop:
        closed_loop.open_environment(cfg.closed_loop)  # report a wrong name before a model is loaded
    reports = {given: run_one(cfg, Path(given)) for given in cfg.checkpoint}
    if len(reports) > 1 and not cfg.replay:
        print_comparison(reports, bool(cfg.closed_loop))
    return reports if len(reports) > 1 else reports[cfg.checkpoint[0]]


def main(argv=None):
    return run(parse_config(Config, argv))


if __name__ == "__main__":
    launch(run, Config)
