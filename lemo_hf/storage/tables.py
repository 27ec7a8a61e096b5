"""Datasets of users, found by name and opened with `datasets`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lemo_hf.shown import shortened
from lemo_hf.storage.files import near_path
from lemo_hf.storage.json_lines import damage_told, read_file

# datasets' builder by the end of a file's name; what compresses it (.gz, .xz, .zst) comes behind.
BUILDERS = {".json": "json", ".jsonl": "json", ".txt": "text", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
SAVED = ("state.json", "dataset_dict.json")  # of `datasets`' save_to_disk
Names = str | os.PathLike | Sequence[str | os.PathLike]


def paths_of(dataset: Names) -> list[str]:
    """The files, or the directory or Hub id, that ``dataset`` names.

    Raises:
        OSError: There is no such file.
        ValueError: Files have different formats, or several names are given that are not files.
    """
    given = [dataset] if isinstance(dataset, str | os.PathLike) else dataset
    paths = [os.fspath(path) for path in given]
    for path in paths:
        if suffix_of(path):
            check_file(path)
    if are_files(paths):
        builders = {BUILDERS.get(suffix_of(path) or "") for path in paths}
        if len(builders) > 1 or None in builders:
            raise ValueError(
                f"all files must have the same format, one of {', '.join(BUILDERS)}, got "
                f"{', '.join(paths)}."
            )
    elif len(paths) > 1:
        raise ValueError(f"several datasets must be files, got {', '.join(paths)}.")
    return paths


def check_file(path: str | os.PathLike) -> None:
    """Raises FileNotFoundError, with the nearest existing name, unless ``path`` is a file."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}{near_path(path)}")


def are_files(paths: Sequence[str]) -> bool:
    """Whether all paths are files."""
    return all(os.path.isfile(path) for path in paths)


def suffix_of(path: str) -> str | None:
    """The suffix that says the format of a file, if its name has one."""
    suffixes = [s for s in Path(path).suffixes if s not in COMPRESSED]
    suffix = suffixes[-1].lower() if suffixes else ""
    return suffix if suffix in BUILDERS else None


def load_table(dataset: Names, split: str = "train", *, streaming: bool = True) -> Any:
    """Open a dataset with `datasets`. A missing one is reported at once.

    Args:
        dataset: Hub id, directory, or one or several files of one format: .json, .jsonl, .txt (a
            file is a document) or .parquet, compressed or not.
        split: Split of a Hub dataset, or of a directory whose files have splits in their names.
            Files that are named one by one have none.
        streaming: Whether rows are read only when they are needed; else they are cached on disk.

    Returns:
        An `IterableDataset`, or a `Dataset`.

    Raises:
        OSError: There is no such dataset, or it cannot be reached.
        ValueError: A format is unknown, there is no such split, or a file is damaged.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    paths = paths_of(dataset)
    if any(Path(paths[0], name).is_file() for name in SAVED):
        raise ValueError(
            f"{paths[0]} was written by save_to_disk, which only load_from_disk reads: write it "
            "with ds.to_parquet('x.parquet') and give that file."
        )
    arguments: dict[str, Any] = {"path": paths[0], "split": split}
    texts = os.path.isdir(paths[0]) and any(Path(paths[0]).glob("**/*.txt"))
    if are_files(paths):
        suffix = suffix_of(paths[0])
        assert suffix is not None  # paths_of refused others
        arguments = {"path": BUILDERS[suffix], "data_files": paths, "split": "train"}
        texts = suffix == ".txt"
    if texts:
        arguments["sample_by"] = "document"
    name = named(paths, split)
    try:
        with told(name):
            return load_dataset(**arguments, streaming=streaming)
    except DatasetGenerationError as error:
        for path in paths:
            if os.path.isfile(path) and suffix_of(path) == ".jsonl":
                for _ in read_file(path):  # which names the line that is damaged
                    pass
        why = shortened(" ".join(str(error.__cause__ or error).split()))
        several = "; files that are read as one need the same columns" if len(paths) > 1 else ""
        raise ValueError(f"{name} cannot be read as one table: {why}{several}.") from error


def interleaved(tables: Sequence[Any], weights: Sequence[float], seed: int) -> Any:
    """Rows drawn from tables in the shares of ``weights``, until one table has no more.

    Raises:
        ValueError: The tables have different columns.
    """
    from datasets import interleave_datasets

    shares = [weight / sum(weights) for weight in weights]
    with told("datasets that are to be one"):
        return interleave_datasets(list(tables), probabilities=shares, seed=seed)


def named(paths: Sequence[str], split: str) -> str:
    """The name of a dataset in messages."""
    return ", ".join(paths) if are_files(paths) else f"{paths[0]}, split {split!r}"


@contextmanager
def told(name: str) -> Iterator[None]:
    """Within this context errors that datasets and pyarrow raise for an unreadable file name the
    file."""
    with damage_told(name):
        try:
            yield
        except StopIteration as error:
            raise ValueError(f"{name} is empty.") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text ({error}): save it as UTF-8.") from error
        except (ValueError, TypeError, LookupError) as error:
            raise ValueError(f"{name}: {error}") from error
