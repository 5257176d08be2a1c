"""New files that are cut short: by signals between any two calls, by kills, by failing disks."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mtetool.errors import HostError, HostIoError, SignalError
from mtetool.files.output import output_file
from tests.snapshot.making import making, without_nameless_files, write

OLD, NEW = b"old" * 1000, b"new" * 100_000


@pytest.fixture(params=["nameless", "named"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory, on a file system with nameless files, and on one without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "named":
            without_nameless_files(patch)
        yield tmp_path


def interrupted(run: Callable[[], None], at: int) -> bool:
    """Run it with a signal's exception at the `at`th place where the interpreter checks.

    Those places are the start of a function, and the return of one that is written in C. Return
    whether there were that many.
    """
    left = at

    def look(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_return", "c_exception"):
            left -= 1
            if not left:
                sys.setprofile(None)
                raise SignalError(2)

    try:
        sys.setprofile(look)
        run()
    except SignalError:
        pass
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.parametrize("force", [False, True])
def test_a_signal_between_any_two_calls_leaves_nothing_beside(directory: Path, force: bool) -> None:
    path = directory / "file"
    seen = set()
    for at in count(1):
        path.unlink(missing_ok=True)
        if force:
            path.write_bytes(OLD)
        came = interrupted(lambda: write(path, NEW, force=force), at)
        left = [other.name for other in directory.iterdir() if other != path]
        assert left == [], f"at place {at}"
        seen.add(path.read_bytes() if path.exists() else None)
        if not came:
            break
    assert at > 50
    assert seen == {OLD if force else None, NEW}


def leave(target: Path, name: str = "0123456789ab") -> Path:
    """Make the file that a process leaves if it is killed at the worst moment."""
    path = target.with_name(f".{target.name[:50]}.{name}.tmp")
    path.write_bytes(b"half")
    return path


@pytest.mark.parametrize("name", ["file", "n" * 255, "(odd) [name]*\n+"])
def test_the_next_run_removes_what_a_killed_one_left(directory: Path, name: str) -> None:
    left = [leave(directory / name), leave(directory / name, "f" * 12)]
    write(directory / name, b"x")
    assert not any(path.exists() for path in left)
    assert list(directory.iterdir()) == [directory / name]


def test_only_what_is_ours_is_removed(directory: Path, tmp_path: Path) -> None:
    target = directory / "file"
    kept = [
        leave(directory / "other"),
        leave(target, "0123456789aB"),
        leave(target, "0123456789ab0"),
        directory / ".file.tmp",
        directory / "file.0123456789ab.tmp",
        directory / ".file.0123456789ab.tmp.gz",
        directory / ".file.000000000000.tmp",
        directory / ".file.000000000001.tmp",
    ]
    for path in kept[3:6]:
        path.touch()
    kept[6].symlink_to(kept[0])
    kept[7].mkdir()
    write(target, b"x")
    assert sorted(directory.iterdir()) == sorted([target, *kept])


def test_what_somebody_else_may_work_on_stays(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leave(directory / "file")
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    write(directory / "file", b"x")
    assert left.exists()
    monkeypatch.undo()


@pytest.mark.parametrize("force", [False, True])
def test_two_that_make_one_file_do_not_remove_each_others(directory: Path, force: bool) -> None:
    path = directory / "file"
    with output_file(str(path), force=force) as first:
        first.write(b"first")
        first.flush()
        with making(path, force=force) as second:
            second.file.write(b"second")
    assert path.read_bytes() == b"first"
    assert list(directory.iterdir()) == [path]


def test_a_leftover_that_is_locked_stays(directory: Path) -> None:
    left = leave(directory / "file")
    with left.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write(directory / "file", b"x")
        assert left.exists()
    write(directory / "file", b"x", force=True)
    assert not left.exists()


def test_a_file_system_without_locks_removes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = leave(directory / "file")
    monkeypatch.setattr(fcntl, "flock", no_lock)
    write(directory / "file", b"x")
    assert left.exists()


def failing_fsync(monkeypatch: pytest.MonkeyPatch, number: int, *, directory: bool) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").resolve().is_dir() == directory:
            raise OSError(number, os.strerror(number))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_directory_that_cannot_be_brought_to_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_fsync(monkeypatch, errno.EIO, directory=True)
    with pytest.raises(HostIoError, match=r"is written, but.*\(EIO\)"):
        write(directory / "file", NEW)
    assert (directory / "file").read_bytes() == NEW
    # If the file system never does that, there is nothing to report.
    failing_fsync(monkeypatch, errno.EINVAL, directory=True)
    write(directory / "file", OLD, force=True)
    assert (directory / "file").read_bytes() == OLD


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_bytes_that_do_not_come_to_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (directory / "file").write_bytes(OLD)
    failing_fsync(monkeypatch, number, directory=False)
    with pytest.raises(HostError, match=errno.errorcode[number]) as caught:
        write(directory / "file", NEW, force=True)
    assert caught.value.hint
    assert (directory / "file").read_bytes() == OLD
    assert list(directory.iterdir()) == [directory / "file"]
