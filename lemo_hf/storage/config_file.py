"""``lemo_config.json``, written where a predictor's facts may lie in the same file."""

import os
from typing import Any

from lemo_hf.storage.files import CONFIG_NAME, read_json, whole_file, write_json
from lemo_hf.storage.outputs import locked


def predictor_section(directory: str | os.PathLike) -> dict[str, Any] | None:
    """What the file there says of a predictor beside it; None if there is no file or no
    predictor."""
    try:
        section = read_json(os.path.join(directory, CONFIG_NAME)).get("predictor")
    except (OSError, ValueError):
        return None
    return section if isinstance(section, dict) else None


def check_no_predictor(directory: str | os.PathLike, own: str | None) -> None:
    """Check that no other predictor than ``own`` (a directory, or a name on the Hub) lies there.

    Raises:
        ValueError: One does; a config in its place would make it unreadable.
    """
    if predictor_section(directory) is not None and not _is(own, directory):
        raise ValueError(
            f"{os.fspath(directory)} holds a predictor, which these settings would replace "
            f"(theirs is predictor={own!r}): give another directory."
        )


def write_config(
    directory: str | os.PathLike, values: dict[str, Any], replace_predictor: bool
) -> None:
    """Write the fields of a `LeMoConfig`; what the file says of its own predictor is kept.

    Raises:
        ValueError: Another predictor lies there, and it may not be replaced.
    """
    os.makedirs(directory, exist_ok=True)
    target = os.path.join(directory, CONFIG_NAME)
    with locked(directory):  # against a save of its predictor
        if not replace_predictor:
            check_no_predictor(directory, values["predictor"])
        section = predictor_section(directory)
        if section is not None and _is(values["predictor"], directory):
            values = {**values, "predictor": section}
            del values["predictor_revision"]
        with whole_file(target) as path:
            write_json(path, values)


def _is(own: str | None, directory: str | os.PathLike) -> bool:
    return own is not None and os.path.isdir(own) and os.path.samefile(own, directory)
