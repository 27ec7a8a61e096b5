"""Mutations with fixed seeds, and a process in which nothing may go wrong but as it is promised.

`LEMO_CASES` says how many cases each target gets; case n is the same at every count.
"""

import copy
import json
import os
import random
import resource
import signal
import sys
import traceback
from pathlib import Path

import pytest

CASES = int(os.environ.get("LEMO_CASES", "60"))
PROMISED = (ValueError, OSError)  # which `lemo` tells in one line
SECONDS = 10  # of a case, which takes milliseconds
GIB = 4  # of addresses that all of them may take, and no more; threads reserve some


# Texts in whose place stands what Python does not write: see `as_written`.
UNWRITABLE = {'"<deep>"': "[" * 3000 + "]" * 3000, '"<digits>"': "9" * 5000}
HOSTILE = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**400, -(10**400)),
    *(0.5, -0.0, 5e-324, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")),
    *("", "a", "None", "\0", "\n", "é😀", "\ud800", "x" * 20_000, "<script>x</script>", "../.."),
    *("{}", "[](x)", "`", "1e5", "%s", "{0}", "<deep>", "<digits>"),
    *(list, dict, lambda: [[]], lambda: [None], lambda: [1, "a"], lambda: [0.5] * 5),
    *(lambda: {"a": None}, lambda: {"": {}}, lambda: {"step": 1}, lambda: [0] * 3000),
    *(lambda: json.loads("[" * 50 + "]" * 50), lambda: json.loads("[" * 400 + "]" * 400)),
)


def hostile(rng):
    """A value that nobody expects; lists are made anew, as they may be changed."""
    value = rng.choice(HOSTILE)
    return value() if callable(value) else value


def as_written(text):
    """JSON or YAML with what no writer of it would write."""
    for name, value in UNWRITABLE.items():
        text = text.replace(name, value)
    return text


def changed(value, rng):
    """A copy of JSON with something replaced, removed, added, or put in another's place."""
    value = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        holder, key = rng.choice(places)
        how = rng.randrange(6)
        if how < 3 or holder is value:
            holder[key] = hostile(rng)
        elif how == 3:
            del holder[key]
        elif how == 4 and isinstance(holder, dict):
            holder[rng.choice(("x", "kind", "", key.upper()))] = holder.pop(key)
        elif isinstance(holder, list):
            holder.insert(key, hostile(rng))
        else:
            other, there = rng.choice([place for place in places if place[0] is not value])
            holder[key] = copy.deepcopy(dict(_items(other)).get(there))
    return value.get("")


def _items(holder):
    return holder.items() if isinstance(holder, dict) else enumerate(holder)


def _places(value):
    """Holder and key of everything in it, so far as it is not too deep to look at."""
    stack = [(value, 0)]
    while stack:
        holder, depth = stack.pop()
        for key, part in _items(holder):
            yield holder, key
            if isinstance(part, dict | list) and depth < 12:
                stack.append((part, depth + 1))


def broken(content, rng):
    """Bytes of which some are changed, cut out, doubled, or replaced by those of a bomb."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 1, 4, 40, 4000)))
        how = rng.randrange(6)
        if how == 0:
            del content[start:end]
        elif how == 1:
            content[start:end] = rng.randbytes(end - start)
        elif how == 2:
            content[start:start] = content[start:end] * rng.choice((1, 3))
        elif how == 3:
            content[start:end] = bytes(end - start)
        elif how == 4:
            token = rng.choice((b"[", b"{", b'"', b"\n", b"\\u", b"\xff", b"null", b"9", b"&a *a"))
            content[start:end] = token * rng.choice((1, 1, 20, 3000))
        elif start < len(content):
            content[start] ^= 1 << rng.randrange(8)
        if not content:
            break
    return bytes(content)


class TakesTooLong(BaseException):
    """A case is stopped."""


def fuzz(attempt, folder, cases=CASES):
    """Call ``attempt(rng, folder)`` for each case: it ends, or raises what is promised.

    In a process of its own, so that one that crashes, hangs or eats memory is seen as such, and
    what a case leaves behind is gone.
    """
    log = folder / "failures.txt"
    sys.stdout.flush()
    child = os.fork()
    if child == 0:  # pragma: no cover
        code = 1
        try:
            code = _run(attempt, folder, cases, log)
        except BaseException:
            log.write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    found = log.read_text() if log.exists() else ""
    if status:
        pytest.fail(f"exit status {status}; {found[-6000:]}", pytrace=False)


def _run(attempt, folder, cases, log):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + int(GIB * 2**30),) * 2)
    signal.signal(signal.SIGALRM, _too_long)
    failures = 0
    outcomes = {"ended": 0, "refused": 0}
    for case in range(cases):
        place = folder / str(case)
        place.mkdir()
        log.write_text(f"case {case} did not end") if not failures else None
        signal.alarm(SECONDS)
        try:
            attempt(random.Random(case), place)
            outcomes["ended"] += 1
        except PROMISED as error:
            outcomes["refused"] += 1
            problem = None if 0 < len(str(error)) < 5000 else f"a message of {len(str(error))}"
        except BaseException:
            problem = traceback.format_exc(limit=-5)[-3000:]
        else:
            problem = None
        signal.alarm(0)
        if problem is not None:
            failures += 1
            with log.open("a" if failures > 1 else "w") as file:
                file.write(f"case {case}: {problem}\n")
    if not failures:  # neither every case nor none is refused, else nothing was tried
        log.write_text(f"{outcomes}")
        return 0 if cases < 20 or min(outcomes.values()) > 0 else 2
    return 1


def _too_long(*_):
    raise TakesTooLong
