"""The training loop, optimizers, the run folder, checkpoints, and hooks."""
