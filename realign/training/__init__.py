"""Training: one step, its schedule, sharding, checkpoints, metrics and the run's folder."""
