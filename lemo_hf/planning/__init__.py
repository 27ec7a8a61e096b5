"""The memory and the time of a training step, before anything is bought or loaded."""
