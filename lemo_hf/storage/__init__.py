"""Files: LeMo's own, datasets, checkpoints, and results to be written."""
