"""Figures of a run's page as inline SVG: lines and heat maps that follow the page's colours.

Colours are CSS variables (``--c0`` to ``--c4``, ``--ink``, ``--rule``), so that one picture serves
light and dark pages. Nothing refers to anything outside the page.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
COLORS = 5
MOST_COLUMNS = 100  # of a heat map; more are averaged
MOST_DOTS = 60  # of a line; more would hide it
LARGEST = 1e15  # number that is drawn: beyond it floats are too far apart for ticks

Point = tuple[float, float]


def line_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, from_zero: bool = False
) -> Markup:
    """Lines with a legend.

    Args:
        series: Points by name; those that are not finite, or beyond `LARGEST`, are left out.
        x_label: What is below.
        y_label: What is beside, with its unit.
        from_zero: The vertical axis begins at 0.
    """
    lines = {
        name: [(x, y) for x, y in points if abs(x) <= LARGEST and abs(y) <= LARGEST]
        for name, points in series.items()
    }
    points = [point for line in lines.values() for point in line]
    if not points:
        return Markup("")
    xs, ys = zip(*points, strict=True)
    x_ticks = _ticks(min(xs), max(xs), whole=True)
    y_ticks = _ticks(min(0, *ys) if from_zero else min(ys), max(ys))
    x_of = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks[0], max(y_ticks[-1], max(ys)), HEIGHT - BOTTOM, TOP)
    parts = [_axes(x_ticks, y_ticks, x_of, y_of, x_label, y_label)]
    for number, (name, line) in enumerate(lines.items()):
        color = f"var(--c{number % COLORS})"
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in line)
        parts.append(
            Markup('<polyline points="{}" fill="none" stroke="{}" stroke-width="1.8"/>').format(
                path, color
            )
        )
        for x, y in line if len(line) <= MOST_DOTS else ():
            parts.append(
                Markup(
                    '<circle cx="{:.1f}" cy="{:.1f}" r="2.2" fill="{}"><title>{}</title></circle>'
                ).format(x_of(x), y_of(y), color, f"{name}: {_number(y)} at {_number(x)}")
            )
    return _legend(list(lines)) + _svg(parts, f"{y_label} over {x_label}: {', '.join(lines)}")


def heat_map(
    values: Sequence[Sequence[float]], columns: Sequence[float], x_label: str, y_label: str
) -> Markup:
    """Shares in [0, 1] as a map, the first row at the bottom.

    Args:
        values: ``[rows][columns]``.
        columns: Where the columns are, such as steps.
        x_label: What is below.
        y_label: What is beside.
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


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> Markup:
    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(
            Markup('<line x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}" stroke="var(--rule)"/>').format(
                LEFT, WIDTH - RIGHT, y, y
            )
        )
        parts.append(_text(LEFT - 6, y + 4, _short(tick), "end"))
    parts += [_text(x_of(tick), HEIGHT - BOTTOM + 15, _short(tick)) for tick in x_ticks]
    return Markup("").join([*parts, *_labels(x_label, y_label)])


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


def _legend(names: Sequence[str]) -> Markup:
    items = [
        Markup('<span><i style="background:var(--c{})"></i>{}</span>').format(i % COLORS, escape(n))
        for i, n in enumerate(names)
    ]
    return Markup('<div class="legend">{}</div>').format(Markup("").join(items))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers; the first is at most ``low`` unless ``whole``."""
    largest = max(abs(low), abs(high))
    span = high - low if high - low > 1e-12 * largest else largest
    span = span if span > 1e-100 else 1
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if raw <= power * m * 1.0001)
    if whole:
        step = max(1, round(step))
        least = math.ceil(low / step) * step
        return [least + i * step for i in range(int((high - least) // step) + 1)]
    first = math.floor(low / step) * step
    return [first + i * step for i in range(math.ceil((high - first) / step - 1e-9) + 1)]


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
