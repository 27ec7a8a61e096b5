"""The benchmark's texts as token ids in one file, from which workers make rows."""

import io
import json
import lzma
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

FILE = "texts.npz.xz"
SPLITS = ("train", "test")
Documents = list[np.ndarray]  # uint16 ids, a document each


@dataclass(frozen=True)
class Texts:
    """Documents of both splits.

    Attributes:
        books: By split, whole books.
        reports: By split, each a cluster of news articles.
        summaries: By split, one a report, in the same order.
        origin: Of the files they were made from.
    """

    books: dict[str, Documents]
    reports: dict[str, Documents]
    summaries: dict[str, Documents]
    origin: dict

    def save(self, folder: Path) -> int:
        """Write `FILE`; its bytes."""
        arrays = {}
        for kind in ("books", "reports", "summaries"):
            for split, documents in getattr(self, kind).items():
                arrays[f"{kind}.{split}"] = np.concatenate(documents)
                arrays[f"{kind}.{split}.sizes"] = np.array([len(x) for x in documents])
        arrays["origin"] = np.frombuffer(json.dumps(self.origin).encode(), dtype=np.uint8)
        whole = io.BytesIO()
        np.savez(whole, **arrays)
        folder.mkdir(parents=True, exist_ok=True)
        packed = lzma.compress(whole.getvalue(), preset=6)
        (folder / FILE).write_bytes(packed)
        return len(packed)

    @classmethod
    def load(cls, folder: Path) -> "Texts":
        """What `save` wrote into ``folder``."""
        content = np.load(io.BytesIO(lzma.decompress((folder / FILE).read_bytes())))

        def documents(kind: str) -> dict[str, Documents]:
            return {
                split: np.split(
                    content[f"{kind}.{split}"], content[f"{kind}.{split}.sizes"].cumsum()[:-1]
                )
                for split in SPLITS
            }

        origin = json.loads(content["origin"].tobytes())
        return cls(documents("books"), documents("reports"), documents("summaries"), origin)

    @cached_property
    def book_weights(self) -> dict[str, np.ndarray]:
        """Chance of each book to be read from, by split: its share of the tokens."""
        sizes = {s: np.array([len(x) for x in books]) for s, books in self.books.items()}
        return {split: size / size.sum() for split, size in sizes.items()}

    def windows(self, tokens: int, count: int) -> np.ndarray:
        """The middles of held-out books, ``[count or fewer, tokens]``: longest books first."""
        books = sorted(self.books["test"], key=len, reverse=True)
        found = [b[(len(b) - tokens) // 2 :][:tokens] for b in books if len(b) >= tokens]
        if not found:
            raise ValueError(f"no held-out book has {tokens} tokens")
        return np.stack(found[:count])
