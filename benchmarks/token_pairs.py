"""DPO on rows that are token ids already: TRL's trainer or ours, and a dataset."""

from typing import Any

from datasets import Dataset
from datasets.table import InMemoryTable
from trl import DPOTrainer

from lemo_hf.integrations.trl_dpo import LeMoDPOTrainer


def trainer_class(sparse: bool) -> type:
    """TRL's trainer, or `LeMoDPOTrainer`, that leaves its rows as they are."""

    class Ready(LeMoDPOTrainer if sparse else DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
            return dataset

    return Ready


def token_pairs(columns: dict[str, list[list[int]]], name: str) -> Dataset:
    """A dataset of columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    ``name`` stands for a hash of the content, which some versions of dill cannot make.
    """
    return Dataset(InMemoryTable.from_pydict(columns), fingerprint=name)
