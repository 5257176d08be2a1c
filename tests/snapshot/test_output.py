"""A file appears under its name when it is whole, or not at all."""

from __future__ import annotations

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool.errors import (
    DiskFullError,
    FileExistsAlreadyError,
    HostIoError,
    NoSuchFileError,
    UsageError,
)
from mtetool.files.output import output_file
from tests.snapshot.making import making, without_nameless_files, write


@pytest.fixture(params=["nameless", "named"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory, on a file system with nameless files, and on one without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "named":
            without_nameless_files(patch)
        yield tmp_path


def test_a_new_file_appears_whole_with_mode_0600(directory: Path) -> None:
    path = directory / "new"
    old = os.umask(0)
    try:
        with output_file(str(path), force=False) as out:
            out.write(b"1" * 1_000_000)
            assert not path.exists()
    finally:
        os.umask(old)
    assert path.read_bytes() == b"1" * 1_000_000
    assert path.stat().st_mode & 0o7777 == 0o600
    assert path.stat().st_nlink == 1
    assert list(directory.iterdir()) == [path]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, BrokenPipeError])
def test_whatever_ends_the_body_leaves_what_was_there(
    directory: Path, error: type[BaseException], force: bool
) -> None:
    path = directory / "file"
    if force:
        path.write_bytes(b"old")

    def body() -> None:
        with output_file(str(path), force=force) as out:
            out.write(b"new" * 100_000)
            raise error

    with pytest.raises(error):
        body()
    assert list(directory.iterdir()) == ([path] if force else [])
    if force:
        assert path.read_bytes() == b"old"


def test_an_existing_file_needs_force(directory: Path) -> None:
    path = directory / "file"
    path.write_bytes(b"old")
    path.chmod(0o644)
    with pytest.raises(FileExistsAlreadyError), output_file(str(path), force=False):
        pytest.fail("the body must not run")
    assert path.read_bytes() == b"old"
    write(path, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o7777 == 0o600
    assert list(directory.iterdir()) == [path]


def test_a_file_that_appears_meanwhile_is_kept(directory: Path) -> None:
    path = directory / "file"

    def body() -> None:
        with output_file(str(path), force=False) as out:
            out.write(b"ours")
            path.write_bytes(b"theirs")

    with pytest.raises(FileExistsAlreadyError):
        body()
    assert path.read_bytes() == b"theirs"
    assert list(directory.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(directory: Path) -> None:
    (directory / "real").write_bytes(b"old")
    link = directory / "link"
    link.symlink_to("real")
    with pytest.raises(FileExistsAlreadyError):
        write(link, b"new")
    write(link, b"new", force=True)
    assert link.is_symlink()
    assert (directory / "real").read_bytes() == b"new"


def test_the_longest_name(directory: Path) -> None:
    write(directory / ("n" * 255), b"x")
    write(directory / ("n" * 255), b"y", force=True)
    assert (directory / ("n" * 255)).read_bytes() == b"y"


def test_a_relative_path(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(directory)
    write("here", b"x")
    assert (directory / "here").read_bytes() == b"x"


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    without_nameless_files(monkeypatch)
    monkeypatch.setattr(os, "link", no_link)
    write(tmp_path / "file", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_directory_and_what_is_in_none(directory: Path) -> None:
    with pytest.raises(UsageError, match="directory"):
        write(directory, b"", force=True)
    with pytest.raises(NoSuchFileError, match="directory"):
        write(directory / "absent" / "file", b"")
    (directory / "file").touch()
    with pytest.raises((NoSuchFileError, HostIoError)):
        write(directory / "file" / "file", b"")


@pytest.mark.parametrize("size", [1, 1 << 20])
def test_a_full_device(size: int) -> None:
    with pytest.raises(DiskFullError):
        write("/dev/full", b"x" * size, force=True)
    assert Path("/dev/full").exists()


def test_what_a_failed_body_had_buffered_is_dropped() -> None:
    def body() -> None:
        with output_file("/dev/full", force=True) as out:
            out.write(b"x")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        body()


def test_dev_null_is_written_directly() -> None:
    write("/dev/null", b"x")
    assert Path("/dev/null").is_char_device()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_file_system(tmp_path: Path) -> None:
    mount = shutil.which("mount")
    assert mount
    options = ["-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if subprocess.run([mount, *options], check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        with pytest.raises(DiskFullError):
            write(tmp_path / "file", b"x" * (1 << 20))
        assert list(tmp_path.iterdir()) == []
        write(tmp_path / "file", b"x")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_fifo_is_written_directly(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE) as reader:
        write(fifo, b"through", force=True)
        assert reader.stdout is not None
        assert reader.stdout.read() == b"through"


def test_errors_of_the_body_are_not_about_the_output(tmp_path: Path) -> None:
    def body() -> None:
        with output_file(str(tmp_path / "file"), force=False):
            raise OSError(5, "the guest's")

    with pytest.raises(OSError, match="the guest's"):
        body()


def test_a_broken_pipe_passes_untouched() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with pytest.raises(BrokenPipeError):
        write(f"/dev/fd/{write_end}", b"x" * (1 << 20))
    os.close(write_end)


class _Stdout(io.TextIOWrapper):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__(io.BytesIO())
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = _Stdout(terminal=False)
    monkeypatch.setattr(sys, "stdout", stdout)
    write("-", b"bytes")
    write("-", b" more")
    assert stdout.buffer.getvalue() == b"bytes more"  # type: ignore[attr-defined]


def test_standard_output_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Stdout(terminal=True))
    with pytest.raises(UsageError, match="terminal"):
        write("-", b"")


_SLEEPER = """
import sys, time
from mtetool.files.output import output_file
with output_file(sys.argv[1], force=True) as out:
    out.write(b"x" * 1_000_000)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_kill_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    probe = tmp_path / "probe"
    write(probe, b"")
    with making(tmp_path / "x", force=False) as new:
        if not new.is_nameless:
            pytest.skip("this file system has no nameless files")
    path.write_bytes(b"old")
    with subprocess.Popen(
        [sys.executable, "-c", _SLEEPER, str(path)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        child.send_signal(signal.SIGKILL)
    assert sorted(tmp_path.iterdir()) == [path, probe]
    assert path.read_bytes() == b"old"


def test_the_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    seen: list[bool] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        seen.append(path.exists())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    write(path, b"x")
    assert seen == [False, True]  # the file; then, once it has its name, the directory
