"""Chats and instructions for `lemo train`: their columns become one of the two forms that TRL
knows.

- ``messages``, or ``conversations`` (ShareGPT), become ``messages``;
- ``prompt`` and ``completion``, texts or lists of messages, stay what they are;
- ``instruction``, ``input`` and ``output`` (Alpaca) become ``prompt`` and ``completion``: as
  messages if the tokenizer has a chat template, else as texts.

Datasets of different forms that are trained together all become ``messages``.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lemo_hf.cli.train_sections import DataSection
from lemo_hf.shown import nearest, shortened, shown
from lemo_hf.storage.files import read_text
from lemo_hf.storage.json_lines import read_file
from lemo_hf.storage.tables import check_file, interleaved, load_table, paths_of, suffix_of

KINDS = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"))
BESIDE = ("tools", "chat_template_kwargs")  # columns that a chat template reads
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's
BUFFER = 256  # chats among which a stream is shuffled


def names_of(data: DataSection) -> Sequence[Any]:
    """The datasets, as they are opened one by one."""
    return data.dataset if data.weights else [data.dataset]


def kind_of(row: Mapping[str, Any], data: DataSection, name: str) -> tuple[str, ...] | None:
    """The columns of a chat that ``row`` has; None if it is trained as text.

    Raises:
        ValueError: The row has neither a chat nor a text.
    """
    if data.text_column is None:
        for kind in KINDS:
            if set(kind) <= row.keys():
                return kind
    column = data.text_column or "text"
    if column in row:
        return None
    if data.text_column is None and {"chosen", "rejected"} <= row.keys():
        raise ValueError(
            f"{name} holds preferences (chosen, rejected), on which lemo train does not train: "
            "write a script with LeMoDPOTrainer of lemo_hf.integrations.trl_dpo, or name a column "
            "of text in data.text_column."
        )
    known = "" if data.text_column else f" nor those of chats ({', '.join(map('+'.join, KINDS))})"
    raise ValueError(
        f"{name} has no column {column!r}{known}; its columns are: "
        f"{shortened(', '.join(row))}{nearest(column, row)} Name the column with the text in "
        "data.text_column."
    )


def form_of(rows: Sequence[tuple[Mapping[str, Any], tuple[str, ...]]], template: bool) -> str:
    """The form that all rows get: ``"messages"``, ``"turns"`` (prompt and completion) or
    ``"texts"``.

    Args:
        rows: One row of each dataset, and its kind.
        template: Whether the tokenizer has a chat template.
    """
    forms = set()
    for row, kind in rows:
        if len(kind) == 1:
            forms.add("messages")
        elif kind[0] == "instruction":
            forms.add("turns" if template else "texts")
        else:
            forms.add("texts" if isinstance(row["prompt"], str) else "turns")
    return forms.pop() if len(forms) == 1 else "messages"


def chat_table(data: DataSection, form: str, seed: int) -> Any:
    """The rows of section ``data`` in one form, as a table of `datasets`; a stream is shuffled.

    Raises:
        OSError, ValueError: A dataset cannot be read, or one of its rows is not a chat.
    """
    tables = []
    for name in names_of(data):
        table = _opened(name, data)
        first = next(iter(table))
        kind = kind_of(first, data, str(name))
        asked = {"kind": kind, "form": form, "answers": data.answers_only, "name": str(name)}
        try:
            table = table.map(_chat, with_indices=True, fn_kwargs=asked, remove_columns=list(first))
        except UnicodeDecodeError as error:  # `datasets` decodes a text when it is asked for
            raise ValueError(f"{name} is not all UTF-8 ({error}): convert it.") from error
        tables.append(table)
    table = interleaved(tables, data.weights, seed) if data.weights else tables[0]
    if data.streaming:
        table = table.shuffle(seed=seed, buffer_size=BUFFER)
    if data.max_rows is None:
        return table
    return table.take(data.max_rows if data.streaming else min(data.max_rows, len(table)))


def _opened(name: Any, data: DataSection) -> Any:
    """A dataset's table. Streamed lines of JSON are read by our own reader, which names the file
    and the line that are damaged."""
    paths = paths_of(name)
    if not (data.streaming and all(suffix_of(path) == ".jsonl" for path in paths)):
        return load_table(name, data.split, streaming=data.streaming)
    from datasets import IterableDataset

    return IterableDataset.from_generator(_lines, gen_kwargs={"paths": paths})


def _lines(paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from map(dict, read_file(path))


def use_template(tokenizer: Any, data: DataSection) -> None:
    """Give the tokenizer the template of ``data.chat_template``, if it is set."""
    if data.chat_template is not None:
        check_file(data.chat_template)
        tokenizer.chat_template = read_text(data.chat_template)


def _chat(
    row: dict[str, Any], index: int, kind: tuple[str, ...], form: str, answers: bool, name: str
) -> dict[str, Any]:
    where = f"{name}, row {index + 1}"
    beside = {column: row[column] for column in BESIDE if column in row}
    if len(kind) == 1:
        messages = _turns(row[kind[0]], None, where)
        if answers and all(turn["role"] != "assistant" for turn in messages):
            raise ValueError(
                f"{where} has no turn of the assistant, and only these turns get labels: leave the "
                "row out, or set data.answers_only to false."
            )
        return {"messages": messages, **beside}
    prompt, completion = row[kind[0]], row[kind[1]]
    if kind[0] == "instruction":
        for column in ("instruction", "input"):
            if not isinstance(row.get(column), str | None):
                raise ValueError(
                    f"{where}: column {column!r} must hold text, got {shown(row[column])}."
                )
        prompt = "\n\n".join(filter(None, [prompt, row.get("input")]))
        prompt += "\n\n" if form == "texts" else ""
    if form == "texts":
        for column, text in zip(kind, (prompt, completion), strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}: column {column!r} must hold text, got {shown(text)}.")
        return {"prompt": prompt, "completion": completion}
    prompt, completion = _turns(prompt, "user", where), _turns(completion, "assistant", where)
    if form == "messages":
        return {"messages": prompt + completion, **beside}
    return {"prompt": prompt, "completion": completion, **beside}


def _turns(content: Any, role: str | None, where: str) -> list[dict[str, Any]]:
    """A list of messages with role and content; a text becomes one message of ``role``, if any."""
    from trl import maybe_convert_to_chatml

    if isinstance(content, str) and role is not None:
        return [{"role": role, "content": content}]
    if not (isinstance(content, list) and content and all(isinstance(x, dict) for x in content)):
        raise ValueError(f"{where} must hold a list of messages, got {shown(content)}.")
    turns = maybe_convert_to_chatml({"messages": [dict(turn) for turn in content]})["messages"]
    for turn in turns:
        said = turn.get("content") is not None or turn.get("tool_calls")
        if not (isinstance(turn.get("role"), str) and said):
            raise ValueError(f"{where}: a message needs a role and a content, got {shown(turn)}.")
        turn["role"] = ROLES.get(turn["role"], turn["role"])
    return turns
