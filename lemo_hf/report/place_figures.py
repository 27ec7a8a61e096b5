"""The figures of where in a row blocks are kept: over the whole run, by step, by layer."""

from collections.abc import Sequence
from itertools import count

from markupsafe import Markup

from lemo_hf.report.svg import (
    BOTTOM,
    HEIGHT,
    INNER_HEIGHT,
    INNER_WIDTH,
    LEFT,
    TOP,
    axis_names,
    cell,
    runs,
    short,
    svg,
    text,
)

X_LABEL = "place in the row"


def place_curve(curve: Sequence[float]) -> Markup:
    """Shares in [0, 1] by place, as steps over the axis, and their mean."""
    width = INNER_WIDTH / len(curve)
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_level(share, "var(--rule)"))
        parts.append(text(LEFT - 6, _height(share) + 4, f"{share:g}", "end"))
    corners = [f"M{LEFT:.2f} {_height(0):.2f}"]
    for place, share in enumerate(curve):
        corners.append(f"V{_height(share):.2f}H{LEFT + (place + 1) * width:.2f}")
    corners.append(f"V{_height(0):.2f}Z")
    parts.append(
        Markup(
            '<path d="{}" fill="var(--c0)" fill-opacity=".3" stroke="var(--c0)" '
            'stroke-width="1.5" stroke-linejoin="round"/>'
        ).format("".join(corners))
    )
    mean = sum(curve) / len(curve)
    parts.append(_level(mean, "var(--ink)", dashes="4 3"))
    for place, share in enumerate(curve):
        parts.append(
            Markup(
                '<rect x="{:.2f}" y="{}" width="{:.2f}" height="{}" fill="transparent">'
                "<title>{}</title></rect>"
            ).format(
                *(LEFT + place * width, TOP, width, INNER_HEIGHT),
                f"{_between(place, place, len(curve))}: {share:.2f}, mean {mean:.2f}",
            )
        )
    parts += [*_place_ticks(), *axis_names(X_LABEL, "share kept")]
    return svg(parts, f"curve: share kept by {X_LABEL}")


def places_by_step(curves: Sequence[Sequence[float]], steps: Sequence[tuple[int, int]]) -> Markup:
    """Shares by place and step, the first steps at the bottom.

    Args:
        curves: ``[moments][places]``.
        steps: First and last step of each moment; steps that were not counted stay empty.
    """
    begin, end = steps[0][0], steps[-1][1]
    scale = INNER_HEIGHT / (end - begin + 1)
    parts = []
    for curve, (first, last) in zip(curves, steps, strict=True):
        when = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
        y = HEIGHT - BOTTOM - (last - begin + 1) * scale
        parts += _band(curve, y, (last - first + 1) * scale, when)
    for step in _round_steps(begin, end):
        y = HEIGHT - BOTTOM - (step - begin + 0.5) * scale
        parts.append(text(LEFT - 6, y + 4, short(step), "end"))
    parts += [*_place_ticks(), *axis_names(X_LABEL, "step")]
    return svg(parts, f"heat map: step by {X_LABEL}")


def places_by_layer(curves: Sequence[Sequence[float]], layers: Sequence[int]) -> Markup:
    """Shares by place and layer, the first layer at the bottom.

    Args:
        curves: ``[layers][places]``.
        layers: Their indices.
    """
    height = INNER_HEIGHT / len(layers)
    parts = []
    for row, (curve, layer) in enumerate(zip(curves, layers, strict=True)):
        y = HEIGHT - BOTTOM - (row + 1) * height
        parts += _band(curve, y, height * 0.94, f"layer {layer}")
        if row % -(-len(layers) // 8) == 0:
            parts.append(text(LEFT - 6, y + height / 2 + 4, str(layer), "end"))
    parts += [*_place_ticks(), *axis_names(X_LABEL, "layer")]
    return svg(parts, f"heat map: layer by {X_LABEL}")


def _band(curve: Sequence[float], y: float, height: float, what: str) -> list[Markup]:
    width = INNER_WIDTH / len(curve)
    return [
        cell(
            *(LEFT + first * width, y, (last - first + 1) * width, height, share),
            f"{what}, {_between(first, last, len(curve))}: {share:.2f}",
        )
        for first, last, share in runs(curve)
    ]


def _between(first: int, last: int, places: int) -> str:
    return f"{first / places:.3g} to {(last + 1) / places:.3g} of the row"


def _height(share: float) -> float:
    return HEIGHT - BOTTOM - share * INNER_HEIGHT


def _level(share: float, colour: str, dashes: str = "none") -> Markup:
    return Markup(
        '<path d="M{} {:.2f}h{}" stroke="{}" stroke-width="1" stroke-dasharray="{}"/>'
    ).format(LEFT, _height(share), INNER_WIDTH, colour, dashes)


def _place_ticks() -> list[Markup]:
    y = HEIGHT - BOTTOM + 14
    middle = [text(LEFT + x * INNER_WIDTH, y, f"{x:g}") for x in (0.25, 0.5, 0.75)]
    start = text(LEFT, y, "start", "start")
    return [start, *middle, text(LEFT + INNER_WIDTH, y, "end", "end")]


def _round_steps(begin: int, end: int) -> list[int]:
    """At most seven round numbers among the steps."""
    sizes = (factor * 10**zeros for zeros in count() for factor in (1, 2, 5))
    apart = next(size for size in sizes if (end - begin) / size <= 6)
    return list(range(-(-begin // apart) * apart, end + 1, apart)) or [begin]
