"""Pictures of evaluations: what is drawn is what was measured."""

import io
import math
import subprocess
import sys
from itertools import combinations, pairwise

import numpy as np
import pytest
from matplotlib.image import imread
from support.paths import ROOT

from lemo_hf.eval.plots import (
    loss_by_position_figure,
    retrieval_figure,
    save_figure,
)
from lemo_hf.eval.retrieval import Retrieval


def measured(lengths, depths, skip=()):
    cells = []
    for x, length in enumerate(lengths):
        for y, depth in enumerate(depths):
            if (x, y) not in skip:
                cell = {"length": length, "depth": depth, "samples": 4}
                cell["accuracy"] = (x * len(depths) + y) / (len(lengths) * len(depths))
                cells.append({**cell, "token_accuracy": 0.5, "log_probability": -9.0})
    return Retrieval(cells)


def buckets(edges, start=3.0):
    return [
        {"first": max(first, 1), "last": last - 1, "loss": start - i / 10}
        for i, (first, last) in enumerate(pairwise(edges))
    ]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def inches(path):
    height, width = imread(path).shape[:2]
    return width / 150, height / 150


def misplaced(figure):
    """Texts that lie on one another or beyond the edge, as drawn."""
    figure.savefig(io.BytesIO(), format="png")
    drawn = [text for axis in figure.axes for text in (*axis.texts, axis.title)]
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        drawn += [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
    boxes = {
        text: text.get_window_extent() for text in drawn if text.get_visible() and text.get_text()
    }
    edge = figure.bbox.padded(1)
    found = [t.get_text() for t, box in boxes.items() if not (box.min >= edge.min).all()]
    found += [t.get_text() for t, box in boxes.items() if not (box.max <= edge.max).all()]
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        if box.overlaps(other):
            found.append((a.get_text(), b.get_text()))
    return found


@pytest.mark.parametrize(("columns", "rows"), [(1, 1), (4, 5), (20, 11)])
def test_the_heat_map_has_every_value(columns, rows, tmp_path):
    lengths = [1000 * i for i in range(1, columns)] + [131072]
    depths = [i / max(rows - 1, 1) for i in range(rows)]
    result = measured(lengths, depths)
    figure = retrieval_figure(result)
    axis, bar = figure.axes
    (mesh,) = axis.collections
    drawn = np.asarray(mesh.get_array()).reshape(rows, columns)
    assert np.array_equal(drawn, result.grid()) and mesh.get_clim() == (0, 1)
    assert texts(axis) == [f"{value:.2f}" for line in result.grid() for value in line]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == [f"{length:,}" for length in lengths[:-1]] + ["128K"]
    assert axis.get_yticklabels()[0].get_text() == "0%" and axis.yaxis_inverted()
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0.0", "0.5", "1.0"]
    assert not misplaced(figure)
    save_figure(figure, tmp_path / "map.png")
    assert inches(tmp_path / "map.png") == pytest.approx(figure.get_size_inches(), abs=0.01)


def test_the_heat_map_leaves_empty_what_was_not_asked():
    result = measured([1024, 2048], [0.0, 1.0], skip=[(1, 0)])
    axis = retrieval_figure(result).axes[0]
    assert texts(axis) == ["0.00", "0.25", "0.75"]
    drawn = np.ma.masked_invalid(axis.collections[0].get_array()).reshape(2, 2)
    assert drawn.mask.tolist() == [[False, True], [False, False]]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1K", "2K"]


def test_loss_lines_are_at_the_middle_of_their_buckets(tmp_path):
    even = [0, 2048, 4096, 6144, 8192]
    results = {"dense": buckets(even), "LeMo": buckets(even, 3.2)}
    figure = loss_by_position_figure(results)
    (axis,) = figure.axes
    assert [line.get_label() for line in axis.lines] == ["dense", "LeMo"]
    for line, result in zip(axis.lines, results.values(), strict=True):
        assert list(line.get_ydata()) == [bucket["loss"] for bucket in result]
        assert list(line.get_xdata()) == [1024.0, 3071.5, 5119.5, 7167.5]
    assert axis.get_xscale() == "linear" and axis.get_xlim() == (0, 8192)
    assert not misplaced(figure)
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert {"0", "1K", "8K"} <= set(labels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["dense", "LeMo"]
    save_figure(figure, tmp_path / "loss.png")
    assert inches(tmp_path / "loss.png") == (7.5, 4.6)


def test_growing_buckets_make_the_axis_logarithmic():
    edges = [0, *(2**i for i in range(6, 18))]
    figure = loss_by_position_figure({"base": buckets(edges)})
    (axis,) = figure.axes
    assert axis.get_xscale() == "log"
    middles = [math.sqrt(max(a + 1, 2) * b) for a, b in pairwise(edges)]
    assert list(axis.lines[0].get_xdata()) == pytest.approx(middles)
    assert not misplaced(figure)
    assert "8K" in [label.get_text() for label in axis.get_xticklabels()]


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="no bucket to draw"):
        loss_by_position_figure({"dense": []})


@pytest.mark.parametrize("function", [retrieval_figure, loss_by_position_figure])
def test_without_matplotlib_the_error_says_what_to_install(function, monkeypatch):
    arguments = {
        retrieval_figure: measured([1024], [0.5]),
        loss_by_position_figure: {"dense": buckets([0, 8])},
    }
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "lemo-hf\[plot\]"'):
        function(arguments[function])


def test_the_module_imports_no_matplotlib_and_drawing_no_pyplot():
    code = (
        "import sys, lemo_hf.eval.plots as p\n"
        "assert 'matplotlib' not in sys.modules\n"
        "p.loss_by_position_figure({'a': [{'first': 1, 'last': 7, 'loss': 2.0}]})\n"
        "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
