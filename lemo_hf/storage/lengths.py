"""Lengths of a dataset's rows, if reading them changes nothing."""

from collections.abc import Mapping
from typing import Any

from transformers.utils import is_datasets_available


def longest_row(rows: Any, enough: int) -> int | None:
    """Number of tokens of the longest row; reading stops at the first that has ``enough``.

    Args:
        rows: Dataset with ``input_ids``. Only lists and plain `datasets.Dataset` are read: others
            may draw by chance, or have no end.
        enough: Number of tokens.

    Returns:
        The length, or None if it cannot be known.
    """
    if not (isinstance(rows, list) or _is_plain_dataset(rows)):
        return None
    longest = 0
    for row in rows:
        if not isinstance(row, Mapping):
            return None
        longest = max(longest, len(row.get("input_ids", ())))
        if longest >= enough:
            break
    return longest


def _is_plain_dataset(rows: Any) -> bool:
    """Whether ``rows`` are a `datasets.Dataset` without a transform, which may draw by chance."""
    if not is_datasets_available():
        return False
    from datasets import Dataset

    return isinstance(rows, Dataset) and rows.format["type"] != "custom"
