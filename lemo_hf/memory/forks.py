"""Memory in processes that are forked from one that trains."""

import gc
import os
from functools import cache


@cache
def spare_forks() -> None:
    """From now on no process that is forked from this one collects its parent's garbage.

    A data loader's workers would free pinned memory and CUDA graphs by asking CUDA, which aborts a
    forked process.
    """
    if hasattr(os, "register_at_fork"):  # Windows does not fork
        os.register_at_fork(after_in_child=gc.freeze)
