"""Open-loop error of any checkpoint of this collection on recorded episodes.

    python evaluate.py --checkpoint outputs/nora --data DATA [--episodes a.h5 b.h5]

For every frame the policy predicts its chunk of actions from what it would have seen, and the chunk is compared with
what was recorded. Errors are in the data's own physical units, per dimension, per step of the horizon and per phase,
beside two baselines: "hold still" and "mean action" (of the training statistics). Metres and radians are never averaged
into one number: "relative" divides each dimension by its better baseline first. Steps beyond an episode's end do not
count. Writes report.json, summary.png and one plot per episode.

The checkpoint names its script; that script provides
    load_policy(path, device) -> policy
    policy.predict(list of observations) -> (B, H, A)
    policy.open_episodes(root, names) -> dicts {name, sample(t) -> observation, target, hold (M, A), phase (M,) or None}
    policy.action_names() -> [(name, unit)] * A          policy.stats["action"]["mean"]
"""

import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from common import UserError, require
from common.checkpoint import checkpoints_in, load_state
from common.config import parse_config
from common.run import launch

ROOT = Path(__file__).resolve().parent
WHO = {"policy": "tab:orange", "hold still": "tab:blue", "mean action": "tab:green"}


@dataclass
class Config:
    checkpoint: str = ""  # of a train_*.py: a file or folder it wrote, or that of a run: its best, else its newest
    data: list[str] = field(default_factory=list)  # root folder of the recordings; of robot sessions also several
    episodes: list[str] = field(default_factory=list)  # names below data, or all; empty: the checkpoint's validation
    output: str | None = None  # folder of the report; null: evaluation/ in the folder given, beside a file
    stride: int = 1  # evaluate every n-th frame
    batch_size: int = 16  # frames
    plots: int = 20  # draw at most this many episodes; the errors are over all
    device: str | None = None  # cpu, cuda, ...; null: cuda if there is one


# ---- the checkpoint --------------------------------------------------------------------------------------------------


def find_checkpoint(path):
    """A run's folder -> its best checkpoint, else its newest; a checkpoint -> itself."""
    path = Path(path)
    require(path.exists(), f"--checkpoint {path}: no such file or folder")
    for folder in (path, path / "checkpoints") if path.is_dir() else ():
        steps = checkpoints_in(folder, ("steps_*", "*_step_*.pt"))  # by number
        best = [p for pattern in ("best", "best_hf", "*_best.pt") for p in folder.glob(pattern)]
        for found in (best, steps[-1:], sorted(folder.glob("*.pt"), key=lambda p: p.stat().st_mtime)[-1:]):
            require(len(found) < 2, f"--checkpoint {path} holds several runs: choose {' or '.join(map(str, found))}")
            if found:
                return found[0]
    return path


def read_about(checkpoint):
    """-> {script, validation: names of the held-out episodes}, as far as the checkpoint and its run say."""
    about, path = {}, Path(checkpoint)
    near = [path.parent / "meta.json", path / "model/policy.json", path / "policy.json", path / "meta.json"]
    for file in filter(Path.is_file, near):  # the nearest last
        about |= json.loads(file.read_text())
    if path.is_file():
        about |= load_state(path).get("meta", {})
    named = f"--checkpoint {path}: nothing there names its script; expected a checkpoint of a train_*.py"
    require("script" in about, f"{named}, e.g. outputs/nora/steps_20000")
    here = (ROOT / f"{about['script']}.py").is_file()
    require(here, f"--checkpoint {path} was made by {about['script']}.py, which is not in {ROOT}")
    return about


# ---- errors ----------------------------------------------------------------------------------------------------------


def chunk_of(array, t, horizon):
    """Rows t..t+H-1 -> ((H, A), valid (H,)); rows past the end repeat the last one and are not valid."""
    index = np.arange(t, t + horizon)
    return array[np.minimum(index, len(array) - 1)], index < len(array)


def evaluate(policy, root, names=None, stride=1, batch_size=16):
    """-> (records, tracks). records: one dict per predicted frame {episode, t, phase, error {who: (H, A) guess minus
    recorded}, valid (H,)}; tracks: per episode {name, t, recorded, policy (n, A): the first action of each chunk}."""
    mean, records, tracks = np.asarray(policy.stats["action"]["mean"], np.float32), [], []
    for episode in policy.open_episodes(root, names):
        target, hold, phase = episode["target"], episode["hold"], episode["phase"]
        frames, predicted = list(range(0, len(target), stride)), []
        for i in tqdm(range(0, len(frames), batch_size), desc=episode["name"], unit="batch", disable=None, leave=False):
            predicted.extend(policy.predict([episode["sample"](t) for t in frames[i : i + batch_size]]))
        for t, chunk in zip(frames, predicted, strict=True):
            wanted, valid = chunk_of(target, t, len(chunk))
            guesses = (chunk, hold[t], mean)  # holding still is known at t: it looks at no later frame
            error = {who: guess - wanted for who, guess in zip(WHO, guesses, strict=True)}
            now = None if phase is None else int(phase[t])
            records.append(dict(episode=episode["name"], t=t, phase=now, error=error, valid=valid))
        track = dict(name=episode["name"], t=np.array(frames), recorded=target[frames], hold=hold[frames], mean=mean)
        tracks.append(track | dict(policy=np.array([chunk[0] for chunk in predicted])))
    require(records, f"no frame to evaluate under '{root}'")
    return records, tracks


def summarise(records, names):
    """{who: {per_dim, bias, per_unit, per_step, per_phase, relative}}: mean absolute errors in the data's units. `bias`
    is the mean signed error; `per_unit` the mean over the moving dimensions of one unit; `relative` the mean over
    dimensions of error / error of the better baseline, 1 is no better than a baseline."""
    valid = np.stack([r["valid"] for r in records])[..., None]  # (n, H, 1)
    phases = np.array([-1 if r["phase"] is None else r["phase"] for r in records])
    errors = {who: np.stack([r["error"][who] for r in records]) for who in WHO}  # (n, H, A)

    def average(error, mask):
        return (error * mask).sum((0, 1)) / max(mask.sum(), 1)  # (A,)

    per_dim = {who: average(np.abs(e), valid) for who, e in errors.items()}
    scale = np.minimum(per_dim["hold still"], per_dim["mean action"])
    moving, report = scale > 1e-6, {}  # a dimension that never moves has nothing to be predicted
    units = {unit: [d for d, (_, u) in enumerate(names) if u == unit and moving[d]] for _, unit in names}
    for who, signed in errors.items():
        size, bias = np.abs(signed), average(signed, valid)
        report[who] = dict(
            per_dim={name: float(v) for (name, _), v in zip(names, per_dim[who], strict=True)},
            bias={name: float(v) for (name, _), v in zip(names, bias, strict=True)},
            per_unit={unit: float(per_dim[who][dims].mean()) for unit, dims in units.items() if dims},
            per_step=[average(size[:, [h]], valid[:, [h]]).tolist() for h in range(size.shape[1])],
            per_phase={str(p): average(size[phases == p], valid[phases == p]).tolist() for p in set(phases) - {-1}},
            relative=float(np.mean(per_dim[who][moving] / scale[moving])) if moving.any() else 0.0,
        )
    return report


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


def draw_episode(track, names, path):
    """Recorded and predicted first action over time, one panel per dimension."""
    rows, columns = -(-len(names) // 3), min(3, len(names))
    figure = Figure(figsize=(13, 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for i, (axis, (name, unit)) in enumerate(zip(axes.ravel(), names, strict=False)):
        axis.plot(track["t"], track["recorded"][:, i], color="black", lw=1.6, label="recorded")
        axis.plot(track["t"], track["policy"][:, i], color=WHO["policy"], lw=1.3, label="policy")
        axis.plot(track["t"], track["hold"][:, i], color=WHO["hold still"], lw=0.8, ls="--", label="hold still")
        axis.axhline(track["mean"][i], color=WHO["mean action"], lw=0.8, ls=":", label="mean action")
        axis.set_title(f"{name} ({unit})" if unit else name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.ravel()[len(names) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("frame")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle(f"{track['name']}: first action of each predicted chunk")
    figure.savefig(path, dpi=110)


def draw_summary(report, names, path):
    """Errors over the better baseline: per dimension, and over the steps of the chunk."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    base = np.minimum(*(np.array(list(report[who]["per_dim"].values())) for who in ("hold still", "mean action")))
    moving = base > 1e-6
    for k, (who, r) in enumerate(report.items()):
        relative = np.divide(list(r["per_dim"].values()), base, out=np.zeros(len(base)), where=moving)
        left.bar(np.arange(len(names)) + (k - 1) * 0.27, relative, 0.25, color=WHO[who], label=who)
        steps = (np.array(r["per_step"])[:, moving] / base[moving]).mean(1)
        right.plot(np.arange(1, len(steps) + 1), steps, "o-", ms=3, color=WHO[who], label=who)
    left.set_xticks(range(len(names)), [name for name, _ in names])
    left.set(ylabel="error / better baseline", title="per dimension (below 1 is better than both baselines)")
    right.set(xlabel="step of the chunk", title="per step of the horizon, mean over dimensions")
    right.set_visible(len(steps) > 1)
    for axis in (left, right):
        axis.axhline(1, color="gray", lw=0.7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def run(cfg):
    """Evaluate and report -> what summarise says."""
    require(cfg.checkpoint and cfg.data, "--checkpoint and --data are needed, e.g. --checkpoint outputs/nora --data D")
    least = f"--stride {cfg.stride} and --batch_size {cfg.batch_size} must be 1 or more, --plots {cfg.plots} 0 or more"
    require(min(cfg.stride, cfg.batch_size) >= 1 and cfg.plots >= 0, least)
    checkpoint = find_checkpoint(cfg.checkpoint)
    about = read_about(checkpoint)
    if cfg.episodes:
        names = None if cfg.episodes == ["all"] else cfg.episodes
    else:
        names = about.get("validation") or None
        unknown = "all (the checkpoint names no validation episodes, so training episodes may be among them)"
        print(f"episodes: {f'{len(names)} validation episodes of the checkpoint' if names else unknown}")
    print(f"checkpoint: {checkpoint}, of {about['script']}.py")
    policy = importlib.import_module(about["script"]).load_policy(checkpoint, cfg.device)
    root = cfg.data if hasattr(policy, "several_roots") else cfg.data[0]
    require(root == cfg.data or len(cfg.data) == 1, f"{about['script']}.py reads one folder: --data DATA")
    try:
        records, tracks = evaluate(policy, root, names, cfg.stride, cfg.batch_size)
    except UserError as error:
        other_data = names and not cfg.episodes and "has no" in str(error)
        how = f"{error}. These are the checkpoint's validation episodes; others: --episodes NAME ..., or all"
        raise UserError(how if other_data else str(error)) from error
    columns = policy.action_names()
    report = summarise(records, columns)
    given = Path(cfg.checkpoint)
    folder = Path(cfg.output or (given / "evaluation" if given.is_dir() else f"{given.with_suffix('')}_evaluation"))
    folder.mkdir(parents=True, exist_ok=True)
    print_table(report, columns, records)
    about = dict(checkpoint=str(checkpoint), data=cfg.data, script=about["script"], frames=len(records))
    about |= dict(episodes=sorted({r["episode"] for r in records}), units=dict(columns), mean_absolute_error=report)
    (folder / "report.json").write_text(json.dumps(about, indent=2))
    for track in tracks[: cfg.plots]:
        name = Path(track["name"]).with_suffix("").as_posix().replace("/", "__")
        draw_episode(track, columns, folder / f"{name}.png")
    draw_summary(report, columns, folder / "summary.png")
    relative, best = report["policy"]["relative"], min(report[who]["relative"] for who in ("hold still", "mean action"))
    verdict = "" if relative < best else ": no better than doing nothing, train longer or check the data"
    print(f"\nthe policy's error is {relative:.2f} x that of the better baseline per dimension{verdict}")
    print(f"report: {folder / 'report.json'}\npicture: {folder / 'summary.png'}")
    return report


def main(argv=None):
    return run(parse_config(Config, argv))


if __name__ == "__main__":
    launch(run, Config, memory="Lower --batch_size (now {batch_size})")
