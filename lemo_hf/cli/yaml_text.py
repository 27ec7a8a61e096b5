"""YAML from users, read in bounded time: no key twice, and no aliases that stand for millions of
values."""

import os
import re
from typing import Any

import yaml

from lemo_hf.shown import shown
from lemo_hf.storage.files import read_text

MOST_BYTES = 2**17
MOST_DEPTH = 64
MOST_VALUES = 10_000  # with aliases written out


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which also reads 1e-4 as a number and refuses a key that is given
    twice."""

    depth = 0

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values, with aliases written out")
        return node

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"the key in line {line} is a {key_node.id}: keys must be words")
            if key_node.value in seen:
                raise ValueError(f"{shown(key_node.value)} is given twice, again in line {line}")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | os.PathLike) -> Any:
    """The content of a YAML file; errors as of `parse_yaml`, and OSError."""
    return parse_yaml(read_text(path, MOST_BYTES), str(path))


def parse_yaml(text: str, source: str) -> Any:
    """The content of a YAML text.

    Args:
        text: Text in YAML.
        source: Place of the text, for messages.

    Raises:
        ValueError: The text is not YAML, has a key twice, a key that is not a word, or too many
            values.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    # PyYAML's constructors fail in their own ways: of `!!bool maybe` a KeyError is what comes.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        what = " ".join(str(error).split())  # PyYAML's messages have several lines
        raise ValueError(f"{source} is not valid YAML: {what}") from error


def _values(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """``node`` and all nodes below it; those that aliases name come once for each alias."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node in known:
        if not known[node]:
            line = node.start_mark.line + 1
            raise ValueError(f"the {node.id} in line {line} contains itself by an alias")
        return known[node]
    known[node] = 0
    parts = node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    known[node] = 1 + sum(_values(part, known) for part in parts)
    return known[node]
