"""When a function runs by a graph; that a graph gives its values is tested on a GPU."""

import pytest
import torch

from lemo_hf.kernels import replayed
from lemo_hf.kernels.replayed import MOST_GRAPHS, REMEMBERED, Replayed


class Again:
    """Stands for a graph: computes into the same tensor."""

    def __init__(self, run, result):
        self.run, self.result, self.replays = run, result, 0

    def replay(self):
        self.replays += 1
        self.result.copy_(self.run())


@pytest.fixture
def graphs(monkeypatch):
    made = []

    def capture(run, pool, device):
        made.append(Again(run, run()))
        return made[-1], made[-1].result

    monkeypatch.setattr(replayed, "capture", capture)
    monkeypatch.setattr(replayed, "_worth_it", lambda tensors: True)
    return made


def double(x, factor):
    return x * factor


def test_the_second_call_of_a_kind_is_recorded_and_results_are_not_shared(graphs):
    function = Replayed(double)
    results = [function(torch.full((3,), float(i)), 2) for i in range(4)]
    assert [x.tolist() for x in results] == [[2.0 * i] * 3 for i in range(4)]
    assert len(graphs) == 1 and graphs[0].replays == 3
    for _ in range(2):
        assert function(torch.ones(3), 3).tolist() == [3.0] * 3  # another constant: another kind
        assert function(torch.ones(3).double(), 2).dtype == torch.float64
    assert len(graphs) == 3


def test_so_many_kinds_have_a_graph_and_kinds_that_come_once_have_none(graphs):
    function = Replayed(double)
    for size in range(REMEMBERED + 5):
        function(torch.ones(size), 2)
    assert not graphs
    function(torch.ones(0), 2)  # too long ago
    assert not graphs
    for size in range(REMEMBERED, REMEMBERED - 10, -1):
        assert function(torch.ones(size), 2).shape == (size,)
    assert len(graphs) == MOST_GRAPHS


def test_what_cannot_be_recorded_runs_as_ever(graphs, monkeypatch, caplog):
    def fails(*args):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(replayed, "capture", fails)
    function = Replayed(double)
    assert all(function(torch.ones(2), 2).tolist() == [2.0, 2.0] for _ in range(3))
    assert caplog.text.count("no CUDA graph of double: operation not permitted") == 1


def test_on_a_cpu_there_is_no_graph():
    function = Replayed(double)
    for _ in range(3):
        function(torch.ones(2), 2)
    assert not function._graphs and not function._once
