"""Open-loop error of any checkpoint of this collection on recorded episodes.

    python evaluate.py --checkpoint outputs/nora/steps_20000 --data DATA [--episodes a.h5 b.h5] [--output DIR]

For every frame the policy predicts its chunk of actions from what it would have seen, and the chunk is compared with what was
recorded. Errors are in the data's own physical units, per dimension, per step of the horizon and per phase, beside two baselines:
"hold still" and "mean action" (of the training statistics). Steps beyond an episode's end do not count. Without --episodes the
validation episodes named in the checkpoint are used.

The checkpoint names its script; that script provides
    load_policy(path, device) -> policy
    policy.predict(list of observations) -> (B, H, A)
    policy.open_episodes(root, names) -> dicts {name, sample(t) -> observation, target (M, A), hold (M, A), phase (M,) or None}
    policy.action_names() -> [(name, unit)] * A          policy.stats["action"]["mean"]
Writes report.json, summary.png and one plot per episode (of the first --plots) into --output (default: CHECKPOINT/evaluation, beside a checkpoint that is a file).
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common.checkpoint import load_state


def find_script(path):
    """Checkpoint (a folder or a .pt file) -> name of the training script that made it."""
    path = Path(path)
    if path.is_file() and "script" in (meta := load_state(path).get("meta", {})):
        return meta["script"]
    for candidate in (
        path / "meta.json",
        path / "policy.json",
        path / "model" / "policy.json",
        path.parent / "meta.json",
    ):
        if candidate.is_file():
            return json.loads(candidate.read_text())["script"]
    newest = sorted(path.glob("steps_*/meta.json"), key=lambda p: int(p.parent.name.split("_")[1]))
    if newest:
        return json.loads(newest[-1].read_text())["script"]
    raise FileNotFoundError(
        f"--checkpoint {path}: no meta.json or policy.json there and no meta inside; expected a checkpoint of a train_*.py, e.g. outputs/nora/steps_20000"
    )


def held_out(path):
    """Names of the validation episodes stored with the checkpoint, [] if there are none."""
    path = Path(path)
    if path.is_file() and "validation" in (meta := load_state(path).get("meta", {})):
        return meta["validation"]
    metas = [
        p
        for p in (path / "meta.json", path.parent / "meta.json", *sorted(path.glob("steps_*/meta.json")))
        if p.is_file()
    ]
    return json.loads(metas[-1].read_text()).get("validation", []) if metas else []


def chunk_of(array, t, horizon):
    """Rows t..t+H-1 -> ((H, A), valid (H,)); rows past the end repeat the last one and are not valid."""
    index = np.arange(t, t + horizon)
    return array[np.minimum(index, len(array) - 1)], index < len(array)


def evaluate(policy, root, names=None, stride=1, batch_size=16):
    """-> (records, tracks). records: one dict per predicted frame {episode, t, phase, error {who: (H, A) absolute error}, valid (H,)}; tracks: per
    episode {name, t, recorded, policy (n, A): the first action of each chunk}."""
    mean = np.asarray(policy.stats["action"]["mean"], np.float32)
    records, tracks = [], []
    for episode in policy.open_episodes(root, names):
        frames = range(0, len(episode["target"]), stride)
        predicted = []
        for i in tqdm(range(0, len(frames), batch_size), desc=episode["name"], unit="batch", disable=None, leave=False):
            predicted.extend(policy.predict([episode["sample"](t) for t in frames[i : i + batch_size]]))
        for t, chunk in zip(frames, predicted):
            target, valid = chunk_of(episode["target"], t, len(chunk))
            still = np.repeat(
                episode["hold"][t : t + 1], len(chunk), axis=0
            )  # known at t: holding still looks at no later frame
            error = {
                "policy": np.abs(chunk - target),
                "hold still": np.abs(still - target),
                "mean action": np.abs(mean - target),
            }
            records.append(
                dict(
                    episode=episode["name"],
                    t=t,
                    phase=None if episode["phase"] is None else int(episode["phase"][t]),
                    error=error,
                    valid=valid,
                )
            )
        tracks.append(
            dict(
                name=episode["name"],
                t=np.array(frames),
                recorded=episode["target"][list(frames)],
                policy=np.array([c[0] for c in predicted]),
                mean=mean,
                hold=episode["hold"][list(frames)],
            )
        )
    if not records:
        raise ValueError(f"no frame to evaluate under '{root}'")
    return records, tracks


def summarise(records, names):
    """Mean absolute errors: {who: {per_dim, per_step, per_phase, mean}}. `mean` weighs each dimension by the size of its motion: error / error of
    the better baseline, so that mm and rad can be averaged; 1 is no better than a baseline."""
    who_all = list(records[0]["error"])
    valid = np.stack([r["valid"] for r in records])  # (n, H)
    report, errors = {}, {who: np.stack([r["error"][who] for r in records]) for who in who_all}  # (n, H, A)

    def average(error, mask):
        return (error * mask[..., None]).sum((0, 1)) / max(mask.sum(), 1)  # (A,)

    per_dim = {who: average(e, valid) for who, e in errors.items()}
    scale = np.minimum(per_dim["hold still"], per_dim["mean action"])
    moving = scale > 1e-6  # a dimension that never moves has nothing to be predicted
    phases = sorted({r["phase"] for r in records if r["phase"] is not None})
    for who, e in errors.items():
        report[who] = dict(
            per_dim={name: float(v) for (name, _), v in zip(names, per_dim[who])},
            per_step=[[float(v) for v in average(e[:, h : h + 1], valid[:, h : h + 1])] for h in range(e.shape[1])],
            per_phase={
                str(p): [float(v) for v in average(e[rows], valid[rows])]
                for p in phases
                if len(rows := [i for i, r in enumerate(records) if r["phase"] == p])
            },
            relative=float(np.mean(per_dim[who][moving] / scale[moving])) if moving.any() else 0.0,
        )
    return report


def print_table(report, names, records):
    """Mean absolute error per dimension, the relative error, and the policy's error by phase and by step."""
    width = max(10, *(len(n) for n, _ in names)) + 1
    print(f"\nmean absolute error over {len(records)} frames of {len({r['episode'] for r in records})} episode(s)")
    print(f"{'':14}" + "".join(f"{name:>{width}}" for name, _ in names) + f"{'relative':>11}")
    print(f"{'':14}" + "".join(f"{unit:>{width}}" for _, unit in names) + f"{'1=baseline':>11}")
    for who, r in report.items():
        print(
            f"{who:14}" + "".join(f"{r['per_dim'][name]:>{width}.3g}" for name, _ in names) + f"{r['relative']:>11.3f}"
        )
    print("policy, by phase and by step of the chunk")
    for phase, values in report["policy"]["per_phase"].items():
        print(f"  phase {phase:<6}" + "".join(f"{v:>{width}.3g}" for v in values))
    steps = report["policy"]["per_step"]
    for h in sorted({0, len(steps) // 2, len(steps) - 1}):
        print(f"  step {h + 1:<7}" + "".join(f"{v:>{width}.3g}" for v in steps[h]))


def draw(tracks, report, names, folder):
    """summary.png (errors against the baselines) and one plot per episode (recorded and predicted first action over time)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    for track in tracks:
        rows = -(-len(names) // 3)
        figure, axes = plt.subplots(
            rows, min(3, len(names)), figsize=(13, 2.9 * rows), squeeze=False, sharex=True, layout="constrained"
        )
        for i, (axis, (name, unit)) in enumerate(zip(axes.ravel(), names)):
            axis.plot(track["t"], track["recorded"][:, i], color="black", lw=1.6, label="recorded")
            axis.plot(track["t"], track["policy"][:, i], color="tab:orange", lw=1.3, label="policy")
            axis.plot(track["t"], track["hold"][:, i], color="tab:blue", lw=0.8, ls="--", label="hold still")
            axis.axhline(track["mean"][i], color="tab:green", lw=0.8, ls=":", label="mean action")
            axis.set_title(f"{name} ({unit})" if unit else name, fontsize=10)
            axis.grid(alpha=0.3)
        for axis in axes.ravel()[len(names) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("frame")
        axes[0, 0].legend(fontsize=8)
        figure.suptitle(f"{track['name']}: first action of each predicted chunk")
        paths.append(folder / f"{Path(track['name']).with_suffix('').as_posix().replace('/', '__')}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained", width_ratios=[3, 2])
    base = np.minimum(*(np.array(list(report[w]["per_dim"].values())) for w in ("hold still", "mean action")))
    colors = {"policy": "tab:orange", "hold still": "tab:blue", "mean action": "tab:green"}
    for k, (who, r) in enumerate(report.items()):
        values = np.array(list(r["per_dim"].values()))
        axes[0].bar(
            np.arange(len(names)) + (k - 1) * 0.27,
            np.where(base > 1e-6, values / np.maximum(base, 1e-12), 0),
            0.25,
            color=colors[who],
            label=who,
        )
        steps = np.array(r["per_step"]) / np.maximum(base, 1e-12)
        axes[1].plot(
            np.arange(1, len(steps) + 1), steps[:, base > 1e-6].mean(1), "o-", ms=3, color=colors[who], label=who
        )
    axes[0].set_xticks(range(len(names)), [n for n, _ in names])
    axes[0].set(ylabel="error / better baseline", title="per dimension (below 1 is better than both baselines)")
    axes[1].set(xlabel="step of the chunk", title="per step of the horizon, mean over dimensions")
    axes[1].set_visible(len(steps) > 1)
    for axis in axes:
        axis.axhline(1, color="gray", lw=0.7)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    paths.append(folder / "summary.png")
    figure.savefig(paths[-1], dpi=110)
    plt.close(figure)
    return paths


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint of a train_*.py (a directory or file it wrote)")
    parser.add_argument("--data", required=True, help="root folder of the recordings")
    parser.add_argument(
        "--episodes", nargs="*", help="names relative to --data (default: the checkpoint's validation episodes)"
    )
    parser.add_argument(
        "--output", help="folder for the report (default: CHECKPOINT/evaluation, of a file CHECKPOINT_evaluation)"
    )
    parser.add_argument("--stride", type=int, default=1, help="evaluate every n-th frame")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=16)
    parser.add_argument(
        "--plots", type=int, default=20, help="draw at most this many episodes; the errors are over all"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    args = parser.parse_args(argv)
    if min(args.stride, args.batch_size) < 1 or args.plots < 0:
        parser.error(
            f"--stride {args.stride} and --batch_size {args.batch_size} must be 1 or more, --plots {args.plots} 0 or more"
        )
    script = importlib.import_module(find_script(args.checkpoint))
    names = args.episodes or held_out(args.checkpoint) or None
    if not args.episodes:
        print(
            f"episodes: {len(names)} validation episodes of the checkpoint"
            if names
            else "episodes: all (the checkpoint names no validation episodes, so training episodes may be among them)"
        )
    policy = script.load_policy(args.checkpoint, args.device)
    records, tracks = evaluate(policy, args.data, names, args.stride, args.batch_size)
    columns = policy.action_names()
    report = summarise(records, columns)
    folder = Path(
        args.output
        or (
            Path(args.checkpoint) / "evaluation"
            if Path(args.checkpoint).is_dir()
            else f"{Path(args.checkpoint).with_suffix('')}_evaluation"
        )
    )
    folder.mkdir(parents=True, exist_ok=True)
    print_table(report, columns, records)
    (folder / "report.json").write_text(
        json.dumps(
            dict(
                checkpoint=str(args.checkpoint),
                data=str(args.data),
                script=script.__name__,
                frames=len(records),
                episodes=sorted({r["episode"] for r in records}),
                units=dict(columns),
                mean_absolute_error=report,
            ),
            indent=2,
        )
    )
    paths = draw(tracks[: args.plots], report, columns, folder)
    relative, best = report["policy"]["relative"], min(r["relative"] for who, r in report.items() if who != "policy")
    print(
        f"\nthe policy's error is {relative:.2f} x that of the better baseline per dimension"
        + ("" if relative < best else ": no better than doing nothing, train longer or check the data")
    )
    print(f"report: {folder / 'report.json'}\nplots: {len(paths)} in {folder}\npicture: {folder / 'summary.png'}")
    return report


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    main()
