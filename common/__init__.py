"""What the programs of this collection must agree on: data on disk, statistics, sample order, checkpoints, logs, configuration."""
