"""The benchmark's data as one compressed file: rows to train on, windows to test on, needles.

All is held by one safetensors file inside xz. Its sets of training rows are made of the same books,
so a dictionary that reaches from one set into the next stores each book about once.
"""

import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import numpy as safetensors
from torch.utils.data import Dataset

from lemo_hf.eval.needles import NeedleRow
from lemo_hf.kernels.segment_cross_entropy import IGNORE_INDEX

DATA, HEADER = "data.safetensors.xz", "data.json"
DICTIONARY = 64 * 2**20  # bytes; a set of 1,280 rows of 8,192 tokens has 20 MiB


class TokenRows(Dataset):
    """Rows to train on.

    Args:
        ids: ``[rows, tokens]`` uint16.
        labelled: ``[rows, tokens]``, nonzero where a token is a label; None: everywhere.
    """

    def __init__(self, ids: np.ndarray, labelled: np.ndarray | None = None):
        self.ids, self.labelled = ids, labelled

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        ids = self.ids[place].astype(np.int64)
        if self.labelled is None:
            return {"input_ids": ids, "labels": ids}
        return {"input_ids": ids, "labels": np.where(self.labelled[place], ids, IGNORE_INDEX)}


def read_header(folder: Path) -> dict:
    """What the data in ``folder`` were made of."""
    return json.loads((folder / HEADER).read_text(encoding="utf-8"))


@dataclass
class Data:
    """Everything that jobs read.

    Attributes:
        train: Rows by the name of their set.
        test: ``[windows, tokens]`` uint16 by kind of text.
        needles: Questions by the digits of their values.
        digits: Of the values in each training set.
    """

    train: dict[str, TokenRows]
    test: dict[str, np.ndarray]
    needles: dict[int, list[NeedleRow]]
    digits: dict[str, int]

    @property
    def tokens(self) -> int:
        """Of a test window: the context that models are extended to."""
        return next(iter(self.test.values())).shape[1]

    @classmethod
    def load(cls, folder: Path) -> "Data":
        """What `save` wrote into ``folder``."""
        header = read_header(folder)
        with lzma.open(folder / DATA) as file:
            arrays = safetensors.load(file.read())
        parts = {}
        for name, array in arrays.items():
            kind, *rest = name.split("/")
            parts.setdefault(kind, {})["/".join(rest)] = array
        labelled = parts.get("labelled", {})
        train = {name: TokenRows(ids, labelled.get(name)) for name, ids in parts["train"].items()}
        digits = {name: options["digits"] for name, options in header["sets"].items()}
        needles: dict[int, list[NeedleRow]] = {}
        for name, ids in sorted(parts["needles"].items(), key=lambda part: part[1].shape[1]):
            rows = needles.setdefault(int(name.split("/")[0]), [])
            answers, depths = parts["answers"][name].tolist(), parts["depths"][name].tolist()
            for row, answer, depth in zip(ids, answers, depths, strict=True):
                rows.append(NeedleRow(row.tolist(), answer, depth, -1, "", ""))
        test = {name: parts["test"][name] for name in header["test"]}  # in their order
        return cls(train, test, needles, digits)


def save(
    folder: Path,
    header: dict,
    train: dict[str, tuple[np.ndarray, np.ndarray | None]],
    test: dict[str, np.ndarray],
    needles: dict[int, list[NeedleRow]],
) -> int:
    """Write ``folder``, which is made if missing; the bytes of the data.

    Args:
        folder: Where to.
        header: What `read_header` gives back; ``sets`` has the ``digits`` of each training set.
        train: Ids and labelled tokens as of `TokenRows`.
        test: As of `Data`.
        needles: As of `Data`; keys and values are not kept.
    """
    arrays = {f"test/{name}": ids for name, ids in test.items()}
    for name, (ids, labelled) in train.items():
        arrays[f"train/{name}"] = ids
        if labelled is not None:
            arrays[f"labelled/{name}"] = labelled
    for digits, rows in needles.items():
        for length in sorted({len(row.input_ids) for row in rows}):
            name, some = f"{digits}/{length}", [row for row in rows if len(row.input_ids) == length]
            arrays[f"needles/{name}"] = np.array([row.input_ids for row in some], dtype=np.uint16)
            arrays[f"answers/{name}"] = np.array([row.answer_tokens for row in some])
            arrays[f"depths/{name}"] = np.array([row.depth for row in some])
    folder.mkdir(parents=True, exist_ok=True)
    how = {"id": lzma.FILTER_LZMA2, "preset": 1, "dict_size": DICTIONARY, "lp": 1, "lc": 3, "pb": 1}
    path = folder / DATA
    with lzma.open(path, "wb", check=lzma.CHECK_CRC32, filters=[how]) as file:
        file.write(safetensors.save(arrays))
    (folder / HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return path.stat().st_size
