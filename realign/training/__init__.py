"""Training: steps, schedule, sharding, checkpoints, metrics and the output folder."""
