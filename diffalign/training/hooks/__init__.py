"""Trainer hooks: checkpoints, sample grids, monitoring, validation, export."""
