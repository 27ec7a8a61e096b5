"""How small predictors are trained, and on which rows."""

import torch

from lemo_hf.tune.train_predictor import (
    PredictorTraining,
)

ROWS = [torch.randint(3, 60, (48,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
HOW = PredictorTraining(block_size=8, rank=8, epochs=2, batch_size=2, learning_rate=1e-2)
