"""Reading of the settings of `lemo train`: a YAML file or a packaged preset, and flags, which
win."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lemo_hf.cli.train_config import RENAMED, SECTIONS, Settings
from lemo_hf.cli.train_sections import Run
from lemo_hf.cli.yaml_text import parse_yaml, read_yaml
from lemo_hf.shown import nearest, shown

PRESETS = Path(__file__).parent.parent / "presets"
FILE_NAME = "lemo_train.yaml"  # of what a run was asked for, in its output directory
# Keys under which a preset may name files of the repository, which lie in EXAMPLES, and the flag
# that gives others, or none.
EXAMPLES = "examples/"
_OTHERS = {
    "model.name": "--model NAME",
    "data.dataset": "--dataset NAME",
    "data.eval_dataset": "--data.eval_dataset NAME, or null",
    "lemo.config": "--lemo.config NAME, or null",
}


def read_settings(
    config: str | None, flags: Iterable[str] = (), options: Sequence[str] = ()
) -> Settings:
    """Read a file, then the flags ``--section.key value`` over it.

    Args:
        config: File, or name of a packaged preset; None: neither.
        flags: Words of the command line.
        options: Names of other flags, which a misspelt one may mean.

    Raises:
        OSError: There is no such file and no such preset.
        ValueError: The file is not YAML, or a key is unknown.
    """
    settings = Settings()
    if config is not None:
        path = find_config(config)
        sections, settings.full = _sections(read_yaml(path), str(path))
        for section, values in sections.items():
            if isinstance(values, dict):
                values = {RENAMED.get(key, key): value for key, value in values.items()}
            settings.values[section] = values
            settings.sources[section] = str(path)
    for section, key, value, source in _parse_flags(flags, options):
        settings.set(section, key, value, source)
    return settings


def find_config(name: str) -> Path:
    """A local file, or else the packaged preset of that name (with or without ``.yaml``).

    Raises:
        OSError: There is no such file and no such preset.
    """
    if Path(name).is_file():
        return Path(name)
    presets = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    stem = name.removesuffix(".yaml")
    if stem in presets:
        return presets[stem]
    raise FileNotFoundError(
        f"--config {name}: there is no such file and no such preset{nearest(stem, presets)} "
        f"Presets: {', '.join(presets)}."
    )


def check_preset(settings: Settings) -> None:
    """Raises ValueError if a packaged preset names files of the repository that are not here."""
    missing: list[str] = []
    flags: list[str] = []
    preset = ""
    for name, flag in _OTHERS.items():
        section, _, key = name.partition(".")
        source, values = Path(settings.sources.get(section, "")), settings.values.get(section)
        if source.parent != PRESETS or not isinstance(values, dict):
            continue
        value = values.get(key)
        lost = [
            path
            for path in (value if isinstance(value, list) else [value])
            if isinstance(path, str) and path.startswith(EXAMPLES) and not Path(path).exists()
        ]
        if lost:
            missing, flags, preset = [*missing, *lost], [*flags, flag], source.stem
    if missing:
        raise ValueError(
            f"--config {preset} is for the repository's own model and texts, and "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not here: start it in "
            f"the root of a checkout of lemo-hf, or name your own: {'; '.join(flags)}."
        )


def dump(run: Run, settings: Settings) -> str:
    """The run as YAML, which `read_settings` can read; secrets are left out.

    The sections model, data and lemo have all fields; lora and training have those that the user
    set.
    """
    values: dict[str, Any] = {
        "model": dataclasses.asdict(run.model),
        "data": dataclasses.asdict(run.data),
    }
    if run.lora is None:
        values["full"] = True
    else:
        values["lora"] = settings.values["lora"]
    values["lemo"] = False
    if run.lemo is not None:
        lemo = {k: v for k, v in run.lemo.to_dict().items() if k != "lemo_version"}
        values["lemo"] = {k: list(v) if isinstance(v, tuple) else v for k, v in lemo.items()}
    values["training"] = {
        k: v for k, v in settings.values["training"].items() if not k.endswith("_token")
    }
    return yaml.safe_dump(values, sort_keys=False)


def _sections(values: Any, path: str) -> tuple[dict[str, Any], bool]:
    """Sections of a file, and whether it says ``full: true``, which replaces a section ``lora``."""
    if not isinstance(values, dict):
        raise ValueError(
            f"{path} must hold the sections {', '.join(SECTIONS)}, got {shown(values)}."
        )
    full = values.pop("full", False)
    for section, content in values.items():
        if section not in SECTIONS:
            near = nearest(section, (*SECTIONS, "full"))
            raise ValueError(f"{path}: there is no section {shown(section)}{near}")
        if not (isinstance(content, dict) or (section == "lemo" and content is False)):
            raise ValueError(f"{path}: {section} must be a mapping of keys, got {shown(content)}.")
    if full is not ("lora" not in values):
        raise ValueError(
            f"{path}: full={shown(full)}: give either a section lora, or full: true to train all "
            "parameters."
        )
    return values, full


def _parse_flags(
    flags: Iterable[str], options: Sequence[str]
) -> Iterator[tuple[str, str, Any, str]]:
    """Section, key, value and the flag itself; a flag without a value is true."""
    words = list(flags)
    while words:
        word = words.pop(0)
        name, is_, text = word.partition("=")
        section, dot, key = name.removeprefix("--").partition(".")
        if not (name.startswith("--") and dot and key):
            raise ValueError(
                f"{word}: there is no such option{nearest(name, options)} Settings are given as "
                "--section.key value."
            )
        if section not in SECTIONS:
            raise ValueError(
                f"{name}: there is no section {shown(section)}{nearest(section, SECTIONS)}"
            )
        if not is_:
            text = words.pop(0) if words and not words[0].startswith("--") else "true"
        yield section, key.replace("-", "_"), parse_yaml(text, name), name
