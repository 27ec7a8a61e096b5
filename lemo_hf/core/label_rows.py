"""The final norm of rows with labels alone, for a head that reads no others.

A norm of the whole stream, and what its backward stores, would be as large as all kept rows of the
layers.
"""

from torch import Tensor
from transformers import PreTrainedModel

from lemo_hf.core.family import Family
from lemo_hf.core.own_loss import StandIn, norm_before_the_head
from lemo_hf.core.sparse_pass import SparsePass
from lemo_hf.kernels.norm import norm_dtype
from lemo_hf.kernels.norm_rows import norm_rows_
from lemo_hf.kernels.rows import close_stream
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX


def norm_label_rows(
    model: PreTrainedModel, family: Family, sparse_pass: SparsePass, targets: Tensor
) -> StandIn | None:
    """Let the next call of the final norm compute only the rows with labels; None if its module
    must be called.

    Args:
        model: Causal LM that is about to run.
        family: Names of its parts.
        sparse_pass: Sparse pass under way.
        targets: ``[B, T]`` token that each position must predict, `IGNORE_INDEX` for none.
    """
    norm = norm_before_the_head(model, family)
    if norm is None:
        return None
    module = model.get_submodule(family.final_norm)

    def of_rows(x: Tensor) -> Tensor:
        index = (targets.to(x.device) != IGNORE_INDEX).flatten().nonzero().squeeze(1)
        if not len(index) or norm_dtype(x, norm) != x.dtype:
            return module(close_stream(x))
        return norm_rows_(x, index, norm)

    # Either way the gradient of the stream is its own, which layers update in place.
    sparse_pass.owns_gradient = True
    return StandIn(module, of_rows)
