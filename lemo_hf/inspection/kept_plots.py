"""Picture of a `KeptByPolicy`: a line of blocks for each policy, over the position in the text."""

import json
import os
import textwrap
from pathlib import Path
from typing import Any

from lemo_hf.eval.plots import COLORS, GREY, _figure, _token_axis, save_figure
from lemo_hf.inspection.kept import KeptByPolicy, kept_in_words, percent
from lemo_hf.inspection.layer_plots import KEPT, LEFT_OUT
from lemo_hf.storage.files import whole_file

LABELS, INK = "#b85c1e", "#24292e"  # the first is COLORS[1], dark enough for letters
# Heights in rows: of a row's blocks, to the next row, beyond it where policies change, of the
# names above the rows, of the axis below; and inches a row.
HEIGHT, PITCH, GROUP, NAMES, AXIS, INCHES = 0.74, 1.0, 0.3, 0.95, 1.3, 0.27
WIDTH = 100  # letters of a line above the rows


def save_comparison(found: KeptByPolicy, directory: str | os.PathLike) -> list[Path]:
    """Write ``kept.png``, ``kept.txt`` and ``kept.json``, and return their paths."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    picture, words, numbers = (directory / f"kept.{kind}" for kind in ("png", "txt", "json"))
    save_figure(policies_figure(found), picture)
    with whole_file(words) as part:
        Path(part).write_text(found.to_text(), encoding="utf-8")
    with whole_file(numbers) as part:
        text = json.dumps(found.to_dict(), ensure_ascii=False) + "\n"
        Path(part).write_text(text, encoding="utf-8")
    return [picture, words, numbers]


def policies_figure(*compared: KeptByPolicy) -> Any:
    """One panel for each comparison, one above the other; kept blocks are dark.

    Returns:
        A matplotlib figure, 9 inches wide.
    """
    heads = [_head(found) for found in compared]
    heights = [
        _places(found)[-1] + HEIGHT + NAMES + AXIS + 0.75 * len(head)
        for found, head in zip(compared, heads, strict=True)
    ]
    figure = _figure((9.0, INCHES * sum(heights)))
    panels = figure.subplots(len(compared), squeeze=False, height_ratios=heights)[:, 0]
    for axis, found, head in zip(panels, compared, heads, strict=True):
        draw_policies(axis, found)
        title, *more = head
        axis.set_title(
            title, loc="left", x=0, fontsize=11, weight="bold", color=INK, pad=4 + 13.5 * len(more)
        )
        if more:
            axis.annotate(
                "\n".join(more),
                (0, 1),
                xytext=(0, 3),
                xycoords="axes fraction",
                textcoords="offset points",
                va="bottom",
                color=INK,
                fontsize=9.5,
                linespacing=1.25,
            )
    panels[-1].set_xlabel("position in the row (tokens)", color=GREY)
    return figure


def draw_policies(axis: Any, found: KeptByPolicy) -> None:
    """Draw the lines of one comparison, each with its name at the left and the state of its
    passages at the right."""
    from matplotlib.colors import ListedColormap

    colors = ListedColormap([LEFT_OUT, KEPT, COLORS[1]])
    ends = [i * found.block_size for i in range(len(found.label_blocks))] + [found.tokens]
    places = _places(found)
    beside = ("axes fraction", "data")
    for row, top in zip(found.rows, places, strict=True):
        shades = [
            kept + (kept and label)
            for kept, label in zip(row.kept, found.label_blocks, strict=True)
        ]
        sides = [top, top + HEIGHT]
        axis.pcolormesh(ends, sides, [shades], cmap=colors, vmin=0, vmax=2, rasterized=True)
        middle = top + HEIGHT / 2
        name = {"ha": "right", "va": "center", "color": INK}
        axis.annotate(row.name, (-0.012, middle), xycoords=beside, **name)
        if row.passages:
            fate = min(row.passages) or (max(row.passages) and 0.5)
            style = {"color": KEPT, "weight": "bold"} if fate == 1 else {"color": GREY}
            words = kept_in_words(fate)
            axis.annotate(words, (1.012, middle), xycoords=beside, va="center", **style)
    bottom = places[-1] + HEIGHT + 0.12
    _name_parts(axis, found, bottom)
    named = found.passages or any(found.label_blocks)
    axis.set_ylim(bottom, -NAMES if named else -0.12)
    _token_axis(axis, found.tokens)
    axis.set_yticks([])
    axis.tick_params(length=3, color=GREY, labelcolor=GREY)
    axis.spines[:].set_visible(False)


def _name_parts(axis: Any, found: KeptByPolicy, bottom: float) -> None:
    """Write the names of marked passages and of labels above the lines."""
    size = found.block_size
    for passage in found.passages:
        first = passage.first // size * size
        end = min(found.tokens, (passage.last // size + 1) * size)
        for x in (first, end):
            # Behind the rows, so that it hides no block: seen between them.
            axis.plot([x, x], [-0.2, bottom], color=INK, lw=0.9, zorder=0)
        name = "passage that answers" if found.question else "passage"
        # Inside the axes, and clear of the labels' own name.
        place = min(max((first + end) / 2, 0.1 * found.tokens), 0.8 * found.tokens)
        axis.annotate(name, (place, -0.25), ha="center", va="bottom", color=INK)
    if any(found.label_blocks):
        axis.annotate("labels", (found.tokens, -0.25), ha="right", va="bottom", color=LABELS)


def _places(found: KeptByPolicy) -> list[float]:
    """Top of each line; the steps of one policy stand closer."""
    places, top = [0.0], 0.0
    for row, before in zip(found.rows[1:], found.rows, strict=False):
        top += PITCH if row.policy == before.policy else PITCH + GROUP
        places.append(top)
    return places


def _head(found: KeptByPolicy) -> list[str]:
    """Text above the lines: what is labelled, and the question."""
    kept = f"{percent(found.retention)} of the blocks are kept"
    if found.question is None:
        return [f"All tokens labelled: {kept} (dark)"]
    lines = [f"A question at the end, its answer labelled: {kept} (dark)"]
    for words in (found.question, found.answer):
        lines += textwrap.wrap(f"“{words}”", WIDTH, max_lines=2, placeholder=" …”")
    for passage in found.passages[:1]:
        lines += textwrap.wrap(f"Passage: “{passage.text}”", WIDTH, max_lines=2, placeholder=" …”")
    return lines
