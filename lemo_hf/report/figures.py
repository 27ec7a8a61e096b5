"""The heat map of retention by layer and step."""

import math
from collections.abc import Sequence

from markupsafe import Markup

from lemo_hf.report.svg import (
    BOTTOM,
    HEIGHT,
    INNER_HEIGHT,
    INNER_WIDTH,
    LEFT,
    axis_names,
    cell,
    number,
    runs,
    short,
    svg,
    text,
)

MOST_COLUMNS = 100  # of a heat map; more are averaged


def heat_map(
    values: Sequence[Sequence[float]], columns: Sequence[float], x_label: str, y_label: str
) -> Markup:
    """Shares in [0, 1] as a map, the first row at the bottom.

    Args:
        values: ``[rows][columns]``.
        columns: Places of the columns, such as steps.
        x_label: Name of the horizontal axis.
        y_label: Name of the vertical axis.
    """
    groups = _groups(len(columns))
    means = [[sum(row[i] for i in group) / len(group) for group in groups] for row in values]
    starts = [columns[group[0]] for group in groups]
    width, height = INNER_WIDTH / len(starts), INNER_HEIGHT / len(means)
    parts = []
    for index, row in enumerate(means):
        y = HEIGHT - BOTTOM - (index + 1) * height
        for first, last, share in runs(row):
            when = number(starts[first])
            when = when if first == last else f"{when} to {number(starts[last])}"
            x, wide = LEFT + first * width, (last - first + 1) * width
            title = f"{y_label} {index}, {x_label} {when}: {share:.2f}"
            parts.append(cell(x, y, wide, height * 0.94, share, title))
    for i in range(0, len(starts), max(1, -(-len(starts) // 6))):
        parts.append(text(LEFT + (i + 0.5) * width, HEIGHT - BOTTOM + 14, short(starts[i])))
    for i in range(0, len(means), max(1, -(-len(means) // 8))):
        parts.append(text(LEFT - 6, HEIGHT - BOTTOM - (i + 0.5) * height + 4, str(i), "end"))
    parts += axis_names(x_label, y_label)
    return svg(parts, f"heat map: {y_label} by {x_label}")


def _groups(count: int) -> list[range]:
    size = max(1, math.ceil(count / MOST_COLUMNS))
    return [range(i, min(i + size, count)) for i in range(0, count, size)]
