"""LongBench's rows: from the Hub's data.zip, a copy of it, or a folder of JSON lines."""

import os
import zipfile
from io import BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import Any, cast

from lemo_hf.eval.longbench_tasks import choose_tasks
from lemo_hf.shown import shortened, shown
from lemo_hf.storage.files import download, near_path
from lemo_hf.storage.json_lines import damage_told, read_file, read_rows

REPOSITORY, ARCHIVE = "zai-org/LongBench", "data.zip"
FIELDS = {"input": str, "context": str, "answers": list, "length": int}
# Of one task: by the lengths in its paper none of the benchmark's has more than about 25 MB.
MOST_BYTES = 2**27


def load_task(
    task: str,
    data: str | os.PathLike | None = None,
    *,
    extended: bool = False,
    revision: str | None = None,
) -> list[dict[str, Any]]:
    """Load the rows of one task.

    Args:
        task: Name of the task.
        data: Folder with ``{task}.jsonl``, .jsonl.xz or .jsonl.gz, in itself or in its ``data/``; a
            copy of the benchmark's data.zip; or None, to get it from the Hub. Archives are read
            without unpacking to disk.
        extended: Whether to load the rows of LongBench-E, ``{task}_e.jsonl``.
        revision: Branch, tag or commit of the Hub's data set.

    Returns:
        The rows in their order, with all their fields: ``input``, ``context``, ``answers``,
        ``length``, ``all_classes`` (None where a task has no classes) and others.

    Raises:
        OSError: There is no such folder or file, or the Hub cannot be reached.
        ValueError: There is no such task, no row of it, or a row lacks a field.
    """
    choose_tasks([task], extended=extended)
    if data is not None and revision is not None:
        raise ValueError(
            f"revision {revision!r} names a version of the Hub's data, and data was given too: "
            "leave out one of them."
        )
    name = f"{task}_e.jsonl" if extended else f"{task}.jsonl"
    if data is None:
        instead = "give data, a copy of it or a folder of its files"
        hub: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
        data = download(REPOSITORY, ARCHIVE, instead, **hub)
    path = Path(data)
    rows: list[dict[str, Any]]
    if path.is_dir():
        path = _file_of(path, name)
        rows = list(read_file(path, MOST_BYTES))
    elif zipfile.is_zipfile(path):
        with damage_told(path), zipfile.ZipFile(path) as archive:
            file = _member(archive, name, path)
            rows = list(read_rows(file, f"{name} of {path}", MOST_BYTES))
    elif path.exists():
        raise ValueError(f"{path} is neither a folder nor a zip archive of LongBench's data.")
    else:
        raise FileNotFoundError(
            f"there is no folder or archive {os.fspath(path)!r}{near_path(path)}"
        )
    if not rows:
        raise ValueError(f"{name} of {path} has no row.")
    for number, row in enumerate(rows, 1):
        check_fields(row, {**FIELDS, "all_classes": list | None}, f"{name}, row {number}")
    return rows


def check_fields(row: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    """Check that a row has ``fields``, each of its type; lists must hold texts.

    Raises:
        ValueError: A field is missing or of another type.
    """
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(
                f"{where} has no field {name!r}, its fields are: {shortened(', '.join(row))}."
            )
        value = row[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = getattr(kind, "__name__", kind)
            raise ValueError(f"{where}: {name!r} must be {expected}, got {type(value).__name__}.")
        for item in value if isinstance(value, list) else ():
            if not isinstance(item, str):
                raise ValueError(f"{where}: {name!r} must hold texts, got {shown(item)}.")


def _file_of(folder: Path, name: str) -> Path:
    names = [name, f"{name}.xz", f"{name}.gz"]
    places = [place / name for place in (folder, folder / "data") for name in names]
    found = [path for path in places if path.is_file()]
    if not found:
        raise FileNotFoundError(
            f"there is no {name} in {os.fspath(folder)!r}, in its folder data, or compressed as "
            ".xz or .gz."
        )
    return found[0]


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> BufferedReader:
    for member in archive.namelist():
        if PurePosixPath(member).name == name:
            return BufferedReader(cast(RawIOBase, archive.open(member)))
    raise FileNotFoundError(f"the archive {os.fspath(path)!r} has no {name}.")
