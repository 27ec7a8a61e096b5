"""Forked processes that end badly: killed at a file operation or after a time.

A fork of a process that has imported everything starts at once, so that many can be killed.
"""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER, MS_RDONLY, MS_REMOUNT, MS_BIND = 0x20000, 0x10000000, 1, 32, 4096


@dataclass(frozen=True)
class Ended:
    """How a child ended, and what it printed."""

    killed: bool
    code: int
    output: str
    seconds: float


class Child:
    """A fork that runs ``work``.

    Args:
        work: Its return value is the exit code.
        log: File for what it prints.
        folder: Whose files' changes are counted.
        kill_at: Before its change of this number, from 1 on, it is killed.
        notes: File for the number of changes and the modules it imported, if it is not killed.
    """

    def __init__(
        self,
        work: Callable[[], int | None],
        log: Path,
        folder: Path | None = None,
        kill_at: int | None = None,
        notes: Path | None = None,
    ):
        self.log, self.started = log, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, folder, kill_at, notes)

    def _run(self, work, folder, kill_at, notes):
        code, imported = 1, set(sys.modules)
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            sys.stderr = os.fdopen(2, "w", closefd=False)
            changes = _count_changes(folder, kill_at)
            code = work() or 0
            if notes is not None:
                modules = sorted(set(sys.modules) - imported)
                notes.write_text(json.dumps({"changes": len(changes), "modules": modules}))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def runs(self) -> bool:
        """Whether it has not ended."""
        ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        return ended is None

    def wait(self, kill_after: float | None = None) -> Ended:
        """Wait for its end; kill it after so many seconds."""
        status = None
        if kill_after is not None:
            while status is None and time.monotonic() - self.started < kill_after:
                pid, found = os.waitpid(self.pid, os.WNOHANG)
                status = found if pid else None
                time.sleep(0.002)
            if status is None:
                os.kill(self.pid, signal.SIGKILL)
        if status is None:
            _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self.started
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Ended(os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), output, seconds)


def _count_changes(folder, kill_at):
    changes = []

    def seen(event, arguments):
        if folder is None or not arguments or not isinstance(arguments[0], str | os.PathLike):
            return
        if event == "open":
            if not (isinstance(arguments[2], int) and arguments[2] & WRITES):
                return
        elif event not in CHANGES:
            return
        if os.fspath(arguments[0]).startswith(str(folder)):
            changes.append((event, arguments[0]))
            if len(changes) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(seen)
    return changes


def own_mounts() -> bool:
    """Let this process mount for itself alone; False where the system does not allow it."""
    user, group = os.getuid(), os.getgid()
    if LIBC.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
        return False
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def mount_disk(folder: Path, size: int, again: bool = False) -> None:
    """A disk of ``size`` bytes at ``folder``, or another size for the one that is there."""
    _mount(b"tmpfs", folder, b"tmpfs", MS_REMOUNT if again else 0, f"size={size}".encode())


def mount_read_only(folder: Path) -> None:
    """Let nothing be written below ``folder``."""
    _mount(str(folder).encode(), folder, None, MS_BIND, None)
    _mount(None, folder, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None)


def _mount(source, target, kind, flags, options):
    if LIBC.mount(source, str(target).encode(), kind, flags, options) != 0:
        raise OSError(ctypes.get_errno(), f"mount {target}: {os.strerror(ctypes.get_errno())}")
