"""Pieces of the figures of a run's page, which are inline SVG.

Their colours are CSS variables (``--c0``), so that one picture serves light and dark pages. Nothing
refers to anything outside the page.
"""

from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 38
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM


def svg(parts: Sequence[Markup], label: str) -> Markup:
    """The figure; ``label`` is read out in its stead."""
    body = Markup("").join(parts)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, body
    )


def cell(x: float, y: float, width: float, height: float, share: float, title: str) -> Markup:
    """A field of a heat map; ``title`` shows where the mouse rests on it."""
    return Markup(
        '<rect x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}" '
        'fill="var(--c0)" fill-opacity="{:.2f}"><title>{}</title></rect>'
    ).format(x, y, width, height, 0.06 + 0.94 * share, title)


def text(x: float, y: float, words: str, anchor: str = "middle") -> Markup:
    """Words that start, end or have their middle at ``x``."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        x, y, anchor, words
    )


def axis_names(x_label: str, y_label: str) -> list[Markup]:
    """What the axes show."""
    middle = TOP + INNER_HEIGHT / 2
    turned = Markup(
        '<text x="{}" y="{}" text-anchor="middle" transform="rotate(-90 {} {})">{}</text>'
    )
    return [
        text(LEFT + INNER_WIDTH / 2, HEIGHT - 6, x_label),
        turned.format(13, middle, 13, middle, y_label),
    ]


def runs(row: Sequence[float]) -> list[tuple[int, int, float]]:
    """First and last column of equal neighbours, to two decimals, and their value."""
    found: list[tuple[int, int, float]] = []
    for i, value in enumerate(row):
        share = round(value, 2)
        if found and found[-1][2] == share:
            found[-1] = (found[-1][0], i, share)
        else:
            found.append((i, i, share))
    return found


def number(value: float) -> str:
    """With four digits."""
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.4g}"


def short(value: float) -> str:
    """A tick's number, which has little room."""
    return f"{value / 1000:,.4g}K" if abs(value) >= 10_000 else number(value)
