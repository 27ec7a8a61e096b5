"""Preference training: the reference's pass keeps what the policy's pass over the pairs kept."""

from dataclasses import dataclass

import torch

from lemo_hf.core.sparse_pass import SparsePass


@dataclass
class PairSets:
    """What the passes of a policy and of its reference share.

    Attributes:
        fixed: A row keeps the same at every step, as reference log-probabilities that are computed
            before training ask for.
        alone: Passes without gradient are the reference's, and no policy's pass comes before them.
        latest: The policy's pass over the batch under way, once it has ended.
    """

    fixed: bool = False
    alone: bool = False
    latest: SparsePass | None = None

    def are_asked(self) -> bool:
        """Whether a pass that begins now is the reference's, in training mode or not."""
        return not torch.is_grad_enabled() and (self.alone or self.latest is not None)
