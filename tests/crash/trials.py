"""Trials: one harm to one command, then what a user does, compared with a run without harm."""

import importlib
import json
import random
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crash.children import Child, mount_disk, mount_read_only, own_mounts
from crash.scenarios import SCENARIOS, fresh, make_inputs, same

MIB, PAGE, NO_MOUNTS = 2**20, 4096, 77


def import_all(modules: list[str]) -> None:
    """Import what a child imported, so that later ones find it there."""
    for name in modules:
        with suppress(Exception):
            importlib.import_module(name)


@dataclass(frozen=True)
class Trial:
    """What was done to which command, and what came out wrong, if anything."""

    scenario: str
    harm: str
    detail: str
    wrong: str | None


class Trials:
    """All trials of a session.

    Args:
        folder: For all files.
        chance: Says when and where.
        only: One scenario's name; None: all.
    """

    def __init__(self, folder: Path, chance: random.Random, only: str | None = None):
        self.folder, self.chance, self.done = folder, chance, []
        make_inputs(folder)
        self.scenarios = {
            name: kind(folder) for name, kind in SCENARIOS.items() if only in (None, name)
        }
        self.expected, self.seconds, self.changes, self.sizes = {}, {}, {}, {}
        self.left_out = set()  # harms that need mounts, where a user may not mount
        for name in self.scenarios:
            import_all(self._without_harm(name)["modules"])
            self.changes[name] = self._without_harm(name)["changes"]

    def _without_harm(self, name: str) -> dict:
        """A run without harm: its result, time and size; returns the child's notes."""
        scenario, notes = self.scenarios[name], self.folder / "notes"
        out = fresh(self.folder / "whole", scenario)
        work = partial(scenario.work, out)
        ended = Child(work, self.folder / "log", out, notes=notes).wait()
        assert ended.code == 0, f"{name} failed without harm:\n{ended.output}"
        self.expected[name], self.seconds[name] = scenario.result(out), ended.seconds
        self.sizes[name] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
        return json.loads(notes.read_text())

    def kills(self, number: int) -> None:
        """Half before a change of a file, the other half at random, some of these twice."""
        names = list(self.scenarios)
        for i in range(number):
            self._killed(names[i // 2 % len(names)], at_random=i % 2 == 1)

    def _killed(self, name: str, at_random: bool) -> None:
        killed = False
        while not killed:  # it may have ended by itself before
            out = fresh(self.folder / "killed", self.scenarios[name])
            if at_random:
                after = self.chance.uniform(0, self.seconds[name])
                killed, detail = self._kill(name, out, after=after), f"after {after:.3f} s"
            else:
                at = self.chance.randint(1, self.changes[name])
                killed, detail = self._kill(name, out, at=at), f"{at} of {self.changes[name]}"
        if at_random and self.chance.random() < 0.3:
            after = self.chance.uniform(0, self.seconds[name])
            again = self._kill(name, out, after=after, again=True)
            detail += f" and after {after:.3f} s" if again else ""
        harm = "killed at random" if at_random else "killed at a file operation"
        self._go_on(name, out, harm, detail)

    def _kill(self, name, out, at=None, after=None, again=False) -> bool:
        """Whether it was killed before it ended."""
        scenario = self.scenarios[name]
        work = scenario.go_on if again else scenario.work
        child = Child(partial(work, out), self.folder / "log", out, kill_at=at)
        return child.wait(after).killed

    def full_disks(self, number: int) -> None:
        """A disk that holds some of what the command writes; then there is room."""
        names = list(self.scenarios)
        for i in range(number):
            name = names[i % len(names)]
            size = self.chance.randint(PAGE, self.sizes[name] + 16 * PAGE)
            self._session(self._on_full_disk, name, "full disk", f"{size:,} bytes", size)

    def read_only(self) -> None:
        """A directory that cannot be written to: said at once, in one line."""
        for name, scenario in self.scenarios.items():
            if scenario.is_command:
                self._session(self._on_read_only, name, "read-only", "")

    def two_at_once(self, number: int = 1) -> None:
        """The same command twice: one works and the other is refused, or both come to the same."""
        for name in [name for name in self.scenarios for _ in range(number)]:
            scenario = self.scenarios[name]
            out = fresh(self.folder / "two", scenario)
            first = Child(partial(scenario.work, out), self.folder / "log")
            time.sleep(self.chance.uniform(0, self.seconds[name] / 2))
            second = Child(partial(scenario.work, out), self.folder / "log2")
            ended = [first.wait(), second.wait()]
            codes = sorted(child.code for child in ended)
            told = " ".join(child.output for child in ended)
            refused = "another run is writing" in told or "holds a run already" in told
            if codes == [0, 0] or (codes == [0, 2] and refused):
                self._go_on(name, out, "two at once", f"exit codes {codes}")
            else:
                wrong = f"exit codes {codes}: {told[-2000:]}"
                self.done.append(Trial(name, "two at once", "", wrong))

    def _session(self, work, name: str, harm: str, detail: str, *more) -> None:
        """Run ``work`` in a process that may mount; what it returns is what is wrong."""
        result = self.folder / "session"
        result.unlink(missing_ok=True)

        def session():
            if not own_mounts():
                return NO_MOUNTS
            wrong = work(name, *more)
            result.write_text(wrong or "")
            return 0

        ended = Child(session, self.folder / "session.log").wait()
        if ended.code == NO_MOUNTS:
            self.left_out.add(harm)
            return
        wrong = result.read_text() if ended.code == 0 else f"{ended.code}: {ended.output[-2000:]}"
        self.done.append(Trial(name, harm, detail, wrong or None))

    def _on_full_disk(self, name: str, size: int) -> str | None:
        scenario, disk = self.scenarios[name], self.folder / "disk"
        disk.mkdir(exist_ok=True)
        mount_disk(disk, 64 * MIB)
        out = disk / "out"
        scenario.prepare(out)
        there = sum(path.stat().st_blocks * 512 for path in out.rglob("*")) if out.exists() else 0
        mount_disk(disk, there + size, again=True)
        ended = Child(partial(scenario.work, out), self.folder / "full.log").wait()
        told = scenario.told(ended)
        mount_disk(disk, 64 * MIB, again=True)
        return told or self._wrong(name, out)

    def _on_read_only(self, name: str) -> str | None:
        scenario = self.scenarios[name]
        out = fresh(self.folder / "fixed", scenario)
        mount_read_only(self.folder / "fixed")
        ended = Child(partial(scenario.work, out), self.folder / "fixed.log").wait()
        last = (ended.output.strip().splitlines() or [""])[-1]
        one_line = last.startswith("lemo: ") and "Traceback" not in ended.output
        if ended.code != 2 or not one_line or "cannot be written" not in last:
            return f"exit code {ended.code}: {ended.output[-2000:]}"
        return None

    def _go_on(self, name: str, out: Path, harm: str, detail: str) -> None:
        self.done.append(Trial(name, harm, detail, self._wrong(name, out)))

    def _wrong(self, name: str, out: Path) -> str | None:
        """What is wrong with what a harm left, or with what comes of going on from there."""
        scenario = self.scenarios[name]
        try:
            scenario.check(out)
            ended = Child(partial(scenario.go_on, out), self.folder / "go_on.log").wait()
            if ended.code != 0:
                return f"going on ended with {ended.code}: {ended.output[-2000:]}"
            if not same(scenario.result(out), self.expected[name]):
                return "another result"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None
