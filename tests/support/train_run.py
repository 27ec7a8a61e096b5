"""A small run of `lemo train`: its model, its text and its settings."""

from support.paths import DEMO

MODEL = str(DEMO / "model")
TEXT = (DEMO / "text" / "train-alice-adams.txt").read_text()[:16_000]
SETTINGS = """
model: {name: MODEL, dtype: float32}
data: {dataset: BOOK, tokens: 256}
lora: {r: 4, lora_alpha: 8, target_modules: all-linear}
lemo: {retention: 0.5, block_size: 32, dense_first_layers: 1}
training:
  output_dir: OUTPUT
  max_steps: 3
  per_device_train_batch_size: 2
  learning_rate: 1e-3
  logging_steps: 1
  save_strategy: "no"
  seed: 3
  use_cpu: true
"""
