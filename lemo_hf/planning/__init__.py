"""The memory of a training step, before anything is bought or loaded."""
