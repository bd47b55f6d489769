"""Loss spikes of a run: found by a moving average, written down with the samples behind them."""

import pandas as pd


class Spikes:
    """Loss spikes: loss_spikes.txt to read, loss_spikes.csv to filter. The samples of a step are listed worst first."""

    COLUMNS = ("step", "loss", "action_loss", "temporal_loss", "moving_avg", "ratio", "episode_indices")
    COLUMNS += ("frame_indices", "episode_paths", "sample_losses")

    def __init__(self, run, threshold, episodes, saved):
        self.run, self.threshold, self.episodes = run, threshold, episodes
        self.history, self.rows = list(saved["history"]), list(saved["rows"])  # the newest losses; the spikes
        self.write()

    def check(self, loss):
        """Take the loss of a step -> moving average if it is a spike, else None."""
        self.history = (self.history + [loss])[-100:]
        average = sum(self.history) / len(self.history)
        return average if len(self.history) >= 50 and loss > self.threshold * average else None

    def record(self, losses, average, samples):
        """Write the newest step down -> (metrics, line). `losses` of the step by name; samples: this rank's [(losses,
        names)]. A collective call."""
        step, loss, own = self.run.step, losses["loss"], []
        for values, names in samples:
            own += zip(values.tolist(), names, strict=True)
        worst = sorted(sum(self.run.gather(own), []), key=lambda sample: -sample[0])
        episodes = list(dict.fromkeys(name[0] for _, name in worst))
        row = {k: f"{losses[k]:.6f}" for k in ("loss", "action_loss", "temporal_loss")}
        row |= dict(step=step, moving_avg=f"{average:.6f}", ratio=f"{loss / average:.2f}")
        row |= dict(episode_indices=[name[0] for _, name in worst], frame_indices=[name[2] for _, name in worst])
        row["episode_paths"] = "; ".join(f"[{i}] {self.episodes[i].path}" for i in episodes)
        self.rows.append(row | dict(sample_losses=[round(value, 6) for value, _ in worst]))
        self.write()
        values = {"spike/loss": loss, "spike/moving_avg": average, "spike/ratio": loss / average, "spike/step": step}
        ratio = f"(avg: {average:.4f}, {loss / average:.1f}x)"
        return values, f"⚠️  LOSS SPIKE at step {step}: {loss:.4f} {ratio} | Episodes: {episodes}"

    def write(self):
        self.run.write("loss_spikes.csv", pd.DataFrame(self.rows, columns=self.COLUMNS).to_csv(index=False))
        text = f"Loss spikes\n{'=' * 80}\nThreshold: {self.threshold}x moving average\n"
        for row in self.rows:
            text += f"\nLOSS SPIKE at Step {row['step']} (samples: worst first)\n"
            text += "".join(f"  {key.replace('_', ' ').title()}: {row[key]}\n" for key in self.COLUMNS[1:])
        self.run.write("loss_spikes.txt", text)
