"""LeMo's own files, in a directory or on the Hub: found, read, and replaced as a whole."""

import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from lemo_hf.shown import nearest

# A text that is read as a whole. JSON of this size can take 25 times as much memory.
MOST_BYTES = 2**26
CONFIG_NAME = "lemo_config.json"
WEIGHTS_NAME = "lemo_predictors.safetensors"
ABANDONED = 24 * 3600  # seconds since a killed writer's last byte
_WRITTEN_BY = {
    CONFIG_NAME: "LeMoConfig.save_pretrained and LeMoPredictor.save_pretrained write it.",
    WEIGHTS_NAME: "LeMoPredictor.save_pretrained and push_to_hub write it; pickled files (.bin, "
    ".pt) are never loaded.",
}


def near_path(path: str | os.PathLike) -> str:
    """The end of a sentence that says ``path`` is not there: a question for a similar name beside
    it, or a full stop."""
    folder, name = os.path.split(os.path.normpath(path))
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = nearest(name, there)
    if folder and near != ".":  # the name alone would not be found
        found = next(x for x in there if near == f"; did you mean {x!r}?")
        return f"; did you mean {os.path.join(folder, found)!r}?"
    return near


def find_files(
    path_or_repo: str | os.PathLike, names: Sequence[str], **hub_kwargs: Any
) -> list[str]:
    """Paths of ``names`` in a directory, or in one commit of a Hub repository.

    Args:
        path_or_repo: Directory, or Hub repository id. Files of a repository are downloaded into the
            Hub's cache, or found there; with ``HF_HUB_OFFLINE=1`` only the cache is used.
        names: Names of the files.
        **hub_kwargs: Arguments of `hf_hub_download`: ``revision``, ``token``, ``cache_dir``, ...

    Raises:
        OSError: There is no such directory or repository, or it cannot be reached.
        ValueError: The directory or repository lacks one of the files.
    """
    source = os.fspath(path_or_repo)
    if os.path.isdir(source):
        for name in names:
            if not os.path.isfile(os.path.join(source, name)):
                raise ValueError(f"{source!r} has no {name}. {_WRITTEN_BY[name]}")
        return [os.path.join(source, name) for name in names]
    if os.path.isfile(source):
        said = f"{source!r} is a file: give the directory that holds {names[0]}."
        if source.endswith((".yaml", ".yml")):
            said += " Settings in YAML are those of lemo train --config."
        raise ValueError(said)
    paths = []
    for name in names:
        try:
            otherwise = f"give a directory{near_path(source).rstrip('.')}"
            paths.append(download(source, name, otherwise, **hub_kwargs))
        except EntryNotFound as error:
            raise ValueError(f"{error} {_WRITTEN_BY[name]}") from error
        # The other files come from the same commit, whatever is pushed in between.
        commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", paths[0])
        hub_kwargs["revision"] = commit[1] if commit else hub_kwargs.get("revision")
    return paths


class EntryNotFound(ValueError):
    """Error: a repository exists and lacks a file."""


def download(repo: str, name: str, otherwise: str, **hub_kwargs: Any) -> str:
    """Path of one file of a repository in the Hub's cache; downloads it if it is not there.

    Args:
        repo: Id of the repository.
        name: Name of the file.
        otherwise: Way out for users who cannot reach the Hub.
        **hub_kwargs: Arguments of `hf_hub_download`.

    Raises:
        EntryNotFound: The repository has no such file.
        OSError: There is no such repository or revision, or it cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub import errors

    revision = hub_kwargs.get("revision")
    at = f" at revision {revision!r}" if revision else ""
    try:
        return huggingface_hub.hf_hub_download(repo, name, **hub_kwargs)
    except errors.HFValidationError as error:
        raise OSError(f"{repo!r} is neither a directory nor a repository id: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(
            f"{name} of {repo!r}{at} is not in the Hub's cache, and the Hub cannot be reached or "
            f"HF_HUB_OFFLINE=1 is set: download it once while online, or {otherwise}"
            f"{'' if otherwise.endswith('?') else '.'}"
        ) from error
    except errors.EntryNotFoundError as error:
        raise EntryNotFound(f"{repo!r}{at} has no {name}.") from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{repo!r} has no branch, tag or commit {revision!r}.") from error
    except Exception as error:  # httpx and httpx2, of either client version, share no base class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            raise OSError(
                f"{repo!r} is not a directory, and the Hub shows no repository of that name. If it "
                "is private or gated, log in (`hf auth login`) or pass a token that may read it."
            ) from error
        raise OSError(
            f"{name} of {repo!r}{at} could not be downloaded ({type(error).__name__}: {error}). "
            "Try again: what was received is kept, nothing was loaded."
        ) from error


def read_text(path: str | os.PathLike, most: int = MOST_BYTES) -> str:
    """The text of a file, with a plain newline at the end of every line.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file has more than ``most`` bytes, or is not UTF-8; the message names the
            file.
    """
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path} has more than {most:,} bytes: it is not the file that was meant.")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file holds something else; the message names it.
    """
    text = read_text(path)
    try:
        values = parse_json(text)
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}): restore it, or download it again."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: The text is not JSON, is nested too deeply, or holds characters that UTF-8
            cannot write.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        values = json.loads(text)
        if "\\u" in text:  # half of a pair of these escapes is no text
            json.dumps(values, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return values


def write_json(path: str | os.PathLike, values: dict[str, Any]) -> None:
    """Write ``values`` as indented JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[str]:
    """A path to write to. Its file replaces ``path`` if all went well; else it is removed.

    Only this writer uses it, and its name begins with ``_``, which Trainer's pushes leave out. If
    ``path`` is a link, its target is replaced; a device (``/dev/stdout``) is written to directly.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        yield os.fspath(path)
        return
    target = os.path.realpath(path)
    directory, name = os.path.split(target)
    remove_abandoned(directory, name)
    written = os.path.join(directory, f"_{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield written
        with open(written, "rb+") as file:  # a full disk may say so only now
            os.fsync(file.fileno())
        os.replace(written, target)
    finally:
        if os.path.exists(written):
            os.remove(written)


def remove_abandoned(directory: str | os.PathLike[str], name: str) -> None:
    """Remove what killed writers of this file left: files that are a day old, since no writer
    pauses so long."""
    with os.scandir(os.fspath(directory)) as entries:
        left = [e for e in entries if e.name.startswith(f"_{name}.") and e.name.endswith(".part")]
    for entry in left:
        with suppress(OSError):  # another process may have removed it
            if time.time() - entry.stat().st_mtime > ABANDONED:
                os.remove(entry.path)
