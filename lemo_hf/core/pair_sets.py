"""Preference training: the reference model's pass keeps what the trained model's pass kept."""

from dataclasses import dataclass

import torch

from lemo_hf.core.sparse_pass import SparsePass


@dataclass
class PairSets:
    """Kept sets that the passes of the trained model and of its reference share.

    Attributes:
        fixed: Whether a row keeps the same at every step, which reference log-probabilities
            computed before training need.
        alone: Whether passes without gradient are the reference's, with no pass of the trained
            model before them.
        latest: The trained model's pass over the current batch, once it has ended.
    """

    fixed: bool = False
    alone: bool = False
    latest: SparsePass | None = None

    def are_asked(self) -> bool:
        """Whether a pass that begins now is the reference's, in any mode."""
        return not torch.is_grad_enabled() and (self.alone or self.latest is not None)
