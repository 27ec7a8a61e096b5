"""A plan in one call: a planner that plans once."""

from lemo_hf.planning.plan import GIB, Planner


def _room(memory_gib, reserve_gib):
    return None if memory_gib is None else (memory_gib - reserve_gib) * GIB


def plan(
    config, lemo, tokens, *, memory_gib=None, reserve_gib=0.0, finish=False, fused=False, **settings
):
    room = _room(memory_gib, reserve_gib)
    return Planner(config, **settings).plan(lemo, tokens, room, finish, fused)


def plans(config, lemo, tokens, *, memory_gib=None, reserve_gib=0.0, **settings):
    return Planner(config, **settings).plans(lemo, tokens, _room(memory_gib, reserve_gib))


def longest(config, lemo, memory_gib, *, reserve_gib=0.0, **settings):
    return Planner(config, **settings).longest(lemo, _room(memory_gib, reserve_gib))


def fitting_finish(config, lemo, tokens, memory_gib, *, reserve_gib=0.0, **settings):
    room = _room(memory_gib, reserve_gib)
    return Planner(config, **settings).fitting_finish(lemo, tokens, room)
