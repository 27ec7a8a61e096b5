"""The demo's clock: equal time, whatever a step takes by then."""

import random
import runpy
from itertools import count
from types import SimpleNamespace

import pytest
from support.paths import ROOT

from lemo_hf.schedule import is_late


@pytest.fixture
def clocked(monkeypatch):
    """Runs steps of given seconds, dense or not; when it ended, and which steps were dense."""
    demo = runpy.run_path(str(ROOT / "examples/demo/clock.py"))
    kind, now = demo["Clock"], [100.0]
    fake = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setitem(kind.elapsed.fget.__globals__, "time", fake)

    def run(seconds, takes, finish=0.0, dense_step=0.0):
        clock = kind(seconds, finish, dense_step)
        state = SimpleNamespace(global_step=0, max_steps=demo["OPEN"], log_history=[])
        control = SimpleNamespace(should_training_stop=False)
        rates, late = [clock.rate(0)], []
        clock.on_train_begin(None, state, control)
        while not control.should_training_stop:
            late.append(is_late(finish, state.global_step, state.max_steps))
            now[0] += dense_step if late[-1] else next(takes)
            state.global_step += 1
            rates.append(clock.rate(state.global_step))
            clock.on_step_end(None, state, control)
        clock.on_train_end(None, state, control)
        return clock.ends[-1], late, rates

    return run


def test_a_machine_that_slows_down_or_speeds_up_ends_in_time(clocked):
    slow = (1.0 if number < 5 else 3.0 for number in count())
    assert 28.5 <= clocked(30.0, slow)[0] <= 31.5
    fast = (3.0 if number < 5 else 1.0 for number in count())
    assert 29.5 <= clocked(30.0, fast)[0] <= 30.5


def test_the_dense_steps_at_the_end_are_their_share(clocked):
    ended, late, _ = clocked(60.0, (1.0 for _ in count()), finish=0.1, dense_step=4.0)
    assert 58 <= ended <= 62
    assert late == sorted(late) and sum(late) == round(0.1 * len(late))


def test_dense_steps_are_the_last_ones_whatever_they_take(clocked):
    for told in (2.0, 4.0, 8.0):
        chance = random.Random(0)
        takes = (chance.lognormvariate(0, 0.4) for _ in count())
        ended, late, _ = clocked(60.0, takes, finish=0.1, dense_step=told)
        assert abs(ended - 60) <= told
        assert late == sorted(late) and 1 <= sum(late) <= 0.2 * len(late)


def test_the_rate_warms_up_and_falls_to_nothing(clocked):
    rates = clocked(30.0, (1.0 for _ in count()))[2]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3], rel=0.01)
    assert max(rates) == rates[2] and rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == 0
