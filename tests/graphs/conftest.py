"""Where tests of CUDA graphs run: on a GPU, and on a CPU, where passes run again for replays."""

import pytest
from support.eager_graphs import use_eager_graphs
from support.graph_cases import gpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=gpu)])
def device(request, monkeypatch):
    if request.param == "cpu":
        use_eager_graphs(monkeypatch)
    return request.param
