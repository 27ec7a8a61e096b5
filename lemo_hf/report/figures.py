"""The heat maps of a run's page, as inline SVG.

Their colour is a CSS variable (``--c0``), so that one picture serves light and dark pages. Nothing
refers to anything outside the page.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
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
    width = (WIDTH - LEFT - RIGHT) / len(starts)
    height = (HEIGHT - TOP - BOTTOM) / len(means)
    parts = []
    for number, row in enumerate(means):
        y = HEIGHT - BOTTOM - (number + 1) * height
        for first, last, share in _runs(row):
            when = _number(starts[first])
            when = when if first == last else f"{when} to {_number(starts[last])}"
            parts.append(
                Markup(
                    '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" '
                    'fill="var(--c0)" fill-opacity="{:.2f}"><title>{}</title></rect>'
                ).format(
                    LEFT + first * width,
                    y,
                    (last - first + 1) * width,
                    height * 0.94,
                    0.06 + 0.94 * share,
                    f"{y_label} {number}, {x_label} {when}: {share:.2f}",
                )
            )
    marks = range(0, len(starts), max(1, -(-len(starts) // 6)))
    for i in marks:
        parts.append(_text(LEFT + (i + 0.5) * width, HEIGHT - BOTTOM + 14, _short(starts[i])))
    for i in range(0, len(means), max(1, -(-len(means) // 8))):
        parts.append(_text(LEFT - 6, HEIGHT - BOTTOM - (i + 0.5) * height + 4, str(i), "end"))
    parts += _labels(x_label, y_label)
    return _svg(parts, f"heat map: {y_label} by {x_label}")


def _labels(x_label: str, y_label: str) -> list[Markup]:
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    turned = Markup(
        '<text x="{}" y="{}" text-anchor="middle" transform="rotate(-90 {} {})">{}</text>'
    )
    return [
        _text(LEFT + (WIDTH - LEFT - RIGHT) / 2, HEIGHT - 6, x_label),
        turned.format(11, middle, 11, middle, y_label),
    ]


def _text(x: float, y: float, text: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, text
    )


def _svg(parts: Sequence[Markup], label: str) -> Markup:
    body = Markup("").join(parts)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, body
    )


def _groups(count: int) -> list[range]:
    size = max(1, math.ceil(count / MOST_COLUMNS))
    return [range(i, min(i + size, count)) for i in range(0, count, size)]


def _runs(row: Sequence[float]) -> list[tuple[int, int, float]]:
    """First and last column of equal neighbours, to two decimals, and their value."""
    runs: list[tuple[int, int, float]] = []
    for i, value in enumerate(row):
        share = round(value, 2)
        if runs and runs[-1][2] == share:
            runs[-1] = (runs[-1][0], i, share)
        else:
            runs.append((i, i, share))
    return runs


def _number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.4g}"


def _short(value: float) -> str:
    """A tick's number, which has little room."""
    return f"{value / 1000:,.4g}K" if abs(value) >= 10_000 else _number(value)
