"""Pieces of model cards: text of others in Markdown, as it reads."""

import html
import json
import os
import re
from typing import Any

PAPER = "https://arxiv.org/abs/2501.09767"


def table(rows: list[dict[str, Any]]) -> str:
    """A table of ``rows``, whose columns are the first row's."""
    names = list(rows[0])
    lines = [
        list(map(_cell, names)),
        ["---"] * len(names),
        *([_cell(row.get(name)) for name in names] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if type(value) is float:
        return f"{value:.4g}"
    if type(value) is int:
        return f"{value:,}"
    text = value if isinstance(value, str) else json.dumps(value)
    return plain(text)


def plain(text: str) -> str:
    """Text as it reads, in a line or a cell: no HTML, link, code or column begins in it."""
    words = " ".join(html.escape(text, quote=False).split())
    return re.sub(r"([\\|`]|\](?=[(\[]))", r"\\\1", words)


def code(text: str) -> str:
    """A span of code, in more backticks than follow each other in it."""
    words = " ".join(text.split())
    ticks = _more_ticks(words, 1)
    space = " " if "`" in words else ""
    return f"{ticks}{space}{words}{space}{ticks}"


def block(language: str, text: str) -> str:
    """Lines of code, likewise."""
    ticks = _more_ticks(text, 3)
    return f"{ticks}{language}\n{text}\n{ticks}"


def _more_ticks(text: str, least: int) -> str:
    return "`" * max(least, *(len(run) + 1 for run in re.findall("`+", text)), 0)


def is_repository(name: str | None) -> bool:
    """Whether ``name`` can be the id of a repository; a directory says nothing to others."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return False
    return name is not None and not os.path.exists(name)
