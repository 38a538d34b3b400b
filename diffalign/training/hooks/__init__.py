"""What happens around the steps of a run: checkpoints, sample grids, monitoring, validation, export."""
