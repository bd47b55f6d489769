"""Loss spikes of a run: detected against a moving average, and recorded with the samples behind them."""

import pandas as pd


class Spikes:
    """Steps with a loss above `threshold` times the mean of the last 100 (this step included): loss_spikes.txt to read,
    loss_spikes.csv to filter. `state` goes into the checkpoint: the last 100 losses, and a row per spike."""

    def __init__(self, run, threshold, episodes, saved=None):
        self.run, self.threshold, self.episodes = run, threshold, episodes
        self.state = saved or dict(history=[], rows=[])
        self.write()

    def check(self, losses, samples):
        """After each update: its `losses`, by name, and this rank's samples [(loss per sample, names)] of every
        micro-batch -> (metrics, log line) of a spike, else None. A collective call: samples of all ranks are listed."""
        loss, step = losses["loss"], self.run.step
        self.state["history"] = history = [*self.state["history"], loss][-100:]
        average = sum(history) / len(history)
        if len(history) < 50 or loss <= self.threshold * average:
            return None
        ratio, own = loss / average, []
        for values, names in samples:
            own += zip(values.tolist(), names, strict=True)
        worst = sorted(sum(self.run.gather(own), []), key=lambda sample: -sample[0])
        episodes = list(dict.fromkeys(name[0] for _, name in worst))
        row = dict(step=step) | {k: f"{losses[k]:.6f}" for k in ("loss", "action_loss", "temporal_loss")}
        row |= dict(moving_avg=f"{average:.6f}", ratio=f"{ratio:.2f}", episode_indices=[name[0] for _, name in worst])
        row["frame_indices"] = [name[2] for _, name in worst]
        row["episode_paths"] = "; ".join(f"[{i}] {self.episodes[i].path}" for i in episodes)
        self.state["rows"].append(row | dict(sample_losses=[round(value, 6) for value, _ in worst]))
        self.write()
        values = {"spike/loss": loss, "spike/moving_avg": average, "spike/ratio": ratio, "spike/step": step}
        text = f"LOSS SPIKE at step {step}: {loss:.4f} (avg: {average:.4f}, {ratio:.1f}x) | Episodes: {episodes}"
        return values, f"⚠️  {text}"

    def write(self):
        self.run.write("loss_spikes.csv", pd.DataFrame(self.state["rows"]).to_csv(index=False))
        text = f"Loss spikes\n{'=' * 80}\nThreshold: {self.threshold}x moving average\n"
        for row in self.state["rows"]:
            text += "\nLOSS SPIKE (samples: worst first)\n" + "".join(f"  {key}: {row[key]}\n" for key in row)
        self.run.write("loss_spikes.txt", text)
