"""Files: LeMo's own, datasets, checkpoints, results that are to be written."""
