"""Files written as a whole, whoever else writes them; whether they can be, before the work."""

import os
import time
from functools import partial
from pathlib import Path

import pytest
from crash.children import Child, mount_disk, mount_read_only, own_mounts

from lemo_hf.storage.files import ABANDONED, whole_file
from lemo_hf.storage.outputs import check_output, locked, only_run


def write(path, text):
    with whole_file(path) as part:
        Path(part).write_text(text)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    write(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as part:
        Path(part).write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    write(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o666 == 0o644
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link", "newer")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "newer"
    write("/dev/null", "a device is written to, not replaced")
    assert not os.path.isfile("/dev/null") and not list(Path("/dev").glob("_null*"))


def test_writers_do_not_share_a_name(tmp_path):
    path = tmp_path / "a.txt"
    with whole_file(path) as one, whole_file(path) as two:
        assert one != two
        Path(one).write_text("one")
        Path(two).write_text("two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["a.txt"]


def test_what_a_killed_writer_left_is_removed_a_day_later(tmp_path):
    def killed():
        with whole_file(tmp_path / "a.txt") as part:
            Path(part).write_text("half")
            os.kill(os.getpid(), 9)

    assert Child(killed, tmp_path / "log").wait().killed
    (left,) = tmp_path.glob("_a.txt.*.part")
    write(tmp_path / "a.txt", "whole")
    assert left.exists()  # its writer could be alive
    long_ago = time.time() - ABANDONED - 1
    os.utime(left, (long_ago, long_ago))
    write(tmp_path / "b.txt", "another file's writer leaves it")
    assert left.exists()
    write(tmp_path / "a.txt", "whole")
    assert not left.exists()


def test_outputs_that_cannot_be_written_are_said(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path, directory, why in (
        ("folder", False, "it is a directory"),
        ("file", True, "it is a file"),
        ("file/x.json", False, "file is not a directory"),
        ("file/x/y", True, "file is not a directory"),
    ):
        with pytest.raises(OSError, match=f"^--output .*{path} cannot be written: .*{why}"):
            check_output(tmp_path / path, "--output", directory=directory)
    check_output(tmp_path / "file", "--output")
    check_output(tmp_path / "new" / "x.json", "--output")
    check_output(tmp_path / "new" / "x", "--output", directory=True)
    check_output("/dev/stdout", "--output")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("disk", ["full", "read-only"])
def test_disks_that_cannot_be_written_are_said(tmp_path, disk):
    def work():
        if not own_mounts():
            return 77
        if disk == "full":
            mount_disk(tmp_path, 4096)
        else:
            mount_read_only(tmp_path)
        try:
            check_output(tmp_path / "x.json", "--output")
        except OSError as error:
            print(error)
        return 0

    ended = Child(work, tmp_path.parent / f"{disk}.log").wait()
    if ended.code == 77:
        pytest.skip("no process may mount here")
    why = {"full": "No space left on device", "read-only": "Read-only file system"}[disk]
    assert f"--output {tmp_path / 'x.json'} cannot be written: {why}." in ended.output


def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path):
    def work():
        if not own_mounts():
            return 77
        mount_disk(tmp_path, 16 * 4096)
        write(tmp_path / "x.json", "old")
        try:
            write(tmp_path / "x.json", "new" * 16 * 4096)
        except OSError as error:
            print(error.strerror, os.listdir(tmp_path), (tmp_path / "x.json").read_text())
        return 0

    ended = Child(work, tmp_path.parent / "fills.log").wait()
    if ended.code == 77:
        pytest.skip("no process may mount here")
    assert ended.output == "No space left on device ['x.json'] old\n"


def test_a_run_has_its_folder_to_itself(tmp_path):
    def other():
        with only_run(tmp_path / "run"):
            return 0

    with only_run(tmp_path / "run"):
        ended = Child(other, tmp_path / "log").wait()
        assert ended.code == 1 and "another run is writing to" in ended.output
    assert Child(other, tmp_path / "log").wait().code == 0


def test_locks_of_a_folder(tmp_path):
    def take(shared):
        try:
            with locked(tmp_path, shared=shared, wait=False):
                return 0
        except BlockingIOError:
            return 5

    def code(shared):
        return Child(partial(take, shared), tmp_path / "log").wait().code

    with locked(tmp_path):
        assert (code(True), code(False)) == (5, 5)
    with locked(tmp_path, shared=True):
        assert (code(True), code(False)) == (0, 5)
    assert code(False) == 0
