"""Grids of cases: those in which each two values meet, and the others in `make soak`."""

from itertools import combinations, product

import pytest


def covering(*axes):
    """All cells of a grid as parameters, marked ``soak`` but for a few.

    In these few each value of an axis meets each value of every other axis.
    """
    cells = list(product(*(range(len(axis)) for axis in axes)))
    pairs = {cell: set(combinations(enumerate(cell), 2)) for cell in cells}
    missing, few = set().union(*pairs.values()), []
    while missing:
        best = max(cells, key=lambda cell: len(pairs[cell] & missing))
        missing -= pairs[best]
        few.append(best)
    return [
        pytest.param(
            *(axis[number] for axis, number in zip(map(list, axes), cell, strict=True)),
            marks=() if cell in few else pytest.mark.soak,
        )
        for cell in cells
    ]
