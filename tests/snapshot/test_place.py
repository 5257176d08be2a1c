"""Where an output goes: links that are followed, those that are not, and what may be written."""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mtetool.errors import (
    BadNameError,
    FileExistsAlreadyError,
    HostError,
    HostIoError,
    MtetoolError,
    NoSuchFileError,
    PermissionRefusedError,
    UsageError,
)
from mtetool.files.output import output_file
from mtetool.files.place import located
from tests.snapshot.making import making, without_nameless_files, write

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="files of other users need root")
SOMEBODY = 4711


# --- names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", BadNameError),
        ("n" * 256, BadNameError),
        ("d/" * 2100 + "x", BadNameError),
        (".", UsageError),
        ("d/", UsageError),
        ("d/..", UsageError),
        ("d", UsageError),
        ("absent/x", NoSuchFileError),
        ("file/x", NoSuchFileError),
        ("loop", BadNameError),
    ],
)
def test_names_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: type[MtetoolError]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("d").mkdir()
    Path("file").touch()
    Path("loop").symlink_to("loop")
    with pytest.raises(error) as caught:
        write(name, b"", force=True)
    assert caught.value.status == 2
    assert caught.value.details["path"] == name


def test_links_are_followed_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative links from where they are, also links to files that do not exist yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "up").symlink_to("../c")
    (tmp_path / "a" / "b" / "one").symlink_to("../up/new")
    (tmp_path / "c").mkdir()
    (tmp_path / "two").symlink_to(tmp_path / "a" / "b" / "one")
    write("two", b"x")
    assert (tmp_path / "c" / "new").read_bytes() == b"x"
    with pytest.raises(FileExistsAlreadyError):
        write("two", b"y")
    write("two", b"y", force=True)
    assert (tmp_path / "c" / "new").read_bytes() == b"y"
    assert (tmp_path / "two").is_symlink()
    assert (tmp_path / "a" / "b" / "one").is_symlink()


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for force in (False, True):
        write(tmp_path / "link", b"x", force=force)
        with pytest.raises(FileExistsAlreadyError):
            write(tmp_path / "link", b"x")
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- files swapped in meanwhile -----------------------------------------------------------


@pytest.fixture(params=["nameless", "named"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty directory, on a file system with nameless files, and on one without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "named":
            without_nameless_files(patch)
        yield tmp_path


@pytest.mark.parametrize("dangling", [False, True])
@pytest.mark.parametrize("force", [False, True])
def test_a_name_that_becomes_a_link_is_not_followed(
    directory: Path, force: bool, dangling: bool
) -> None:
    path, victim = directory / "file", directory / "victim"
    if not dangling:
        victim.write_bytes(b"precious")
    if force:
        path.write_bytes(b"old")

    def body() -> None:
        with output_file(str(path), force=force) as out:
            out.write(b"new")
            path.unlink(missing_ok=True)
            path.symlink_to("victim")

    with pytest.raises(FileExistsAlreadyError):
        body()
    assert path.is_symlink()
    assert not victim.exists() if dangling else victim.read_bytes() == b"precious"
    assert {one.name for one in directory.iterdir()} <= {"file", "victim"}


def test_a_directory_that_becomes_a_link_is_not_followed(directory: Path) -> None:
    asked, held, trap = (directory / name for name in ("asked", "held", "trap"))
    asked.mkdir()
    trap.mkdir()
    with output_file(str(asked / "file"), force=True) as out:
        out.write(b"new")
        asked.rename(held)
        asked.symlink_to("trap")
    assert list(trap.iterdir()) == []
    assert [one.name for one in held.iterdir()] == ["file"]


def test_a_link_without_force_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On FAT, a rename must do, and it would replace a file that was made meanwhile."""

    def no_link(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    without_nameless_files(monkeypatch)
    monkeypatch.setattr(os, "link", no_link)
    with making(tmp_path / "file", force=False) as new:
        (tmp_path / "file").symlink_to("victim")
        with pytest.raises(FileExistsAlreadyError):
            new.keep()
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_pipe_that_becomes_another_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo, trap = tmp_path / "fifo", tmp_path / "trap"
    os.mkfifo(fifo)
    os.mkfifo(trap)
    reader = os.open(trap, os.O_RDONLY | os.O_NONBLOCK)
    real = os.open

    def swap(path: str, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_ACCMODE == os.O_WRONLY:
            trap.rename(fifo)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(HostIoError, match="replaced"):
        write(fifo, b"secret", force=True)
    assert os.read(reader, 10) == b""
    os.close(reader)


# --- directories that all users can write to ----------------------------------------------


@contextmanager
def sticky(directory: Path) -> Iterator[Path]:
    """A directory like /tmp."""
    shared = directory / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    yield shared


@needs_root
@pytest.mark.parametrize("mode", [0o1777, 0o777, 0o1775])
@pytest.mark.parametrize("owner", [0, SOMEBODY])
def test_a_link_of_somebody_else_in_a_shared_directory(
    tmp_path: Path, mode: int, owner: int
) -> None:
    """As fs.protected_symlinks, even if off: sticky directories, except links of their owner."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(mode)
    (shared / "out").symlink_to(tmp_path / "victim")
    os.lchown(shared / "out", owner, owner)
    if owner and mode == 0o1777:
        with pytest.raises(PermissionRefusedError, match="another user's") as caught:
            write(shared / "out", b"x", force=True)
        assert caught.value.details["path"] == str(shared / "out")
        assert not (tmp_path / "victim").exists()
        os.lchown(shared, owner, owner)
    write(shared / "out", b"x", force=True)
    assert (tmp_path / "victim").exists()


@needs_root
def test_a_pipe_of_somebody_else_in_a_shared_directory(tmp_path: Path) -> None:
    with sticky(tmp_path) as shared:
        os.mkfifo(shared / "fifo")
        os.lchown(shared / "fifo", SOMEBODY, SOMEBODY)
        reader = os.open(shared / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(PermissionRefusedError, match="another user's"):
            write(shared / "fifo", b"x", force=True)
        os.close(reader)


# --- files that are not regular -----------------------------------------------------------


def test_only_new_files_and_dev_null_are_written_unasked(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/full")
    for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/full"), Path("/dev/zero")):
        with pytest.raises(FileExistsAlreadyError, match=r"a named pipe|a character device"):
            write(path, b"x")
    (tmp_path / "null").symlink_to("/dev/null")
    write("/dev/null", b"x")
    write(tmp_path / "null", b"x")


def test_a_socket_and_a_directory_are_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "socket", tmp_path):
            with pytest.raises(UsageError):
                write(path, b"x", force=True)


@needs_root
def test_a_block_device_needs_force(tmp_path: Path) -> None:
    """The device does not exist: the answer comes before it is opened."""
    os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 12345))
    with pytest.raises(FileExistsAlreadyError, match="a block device"):
        write(tmp_path / "disk", b"x")
    with pytest.raises(HostError, match="ENXIO"):
        write(tmp_path / "disk", b"x", force=True)


def test_a_pipe_without_a_reader_can_be_waited_for_and_left(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    def leave(*_: object) -> None:
        raise InterruptedError("left")

    before = signal.signal(signal.SIGALRM, leave)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises((InterruptedError, HostError), match="left"):
            write(tmp_path / "fifo", b"x", force=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- descriptors --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["/dev/fd/{}", "/proc/self/fd/{}", "/proc/{pid}/fd/{}"])
def test_a_pipe_by_its_descriptor_needs_no_force(form: str) -> None:
    """A shell names its >(command) like this."""
    reader, writer = os.pipe()
    name = form.format(writer, pid=os.getpid())
    write(name, b"x")
    os.close(writer)
    assert os.read(reader, 10) == b"x"
    assert os.read(reader, 10) == b""
    with pytest.raises(UsageError, match="not open for writing"):
        write(f"/dev/fd/{reader}", b"x")
    os.close(reader)


def test_a_socket_by_its_descriptor() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write(f"/dev/fd/{ours.fileno()}", b"x")
        assert theirs.recv(10) == b"x"


def test_a_file_by_its_descriptor_is_that_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as opened:
        name = f"/dev/fd/{opened.fileno()}"
        with pytest.raises(FileExistsAlreadyError):
            write(name, b"new")
        write(name, b"new", force=True)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_deleted_file_by_its_descriptor_is_not_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as opened:
        path.unlink()
        for other in (None, tmp_path / "file (deleted)"):
            if other is not None:
                other.touch()
            with pytest.raises(UsageError, match="no name"):
                write(f"/dev/fd/{opened.fileno()}", b"new", force=True)
    assert [one.name for one in tmp_path.iterdir()] == ["file (deleted)"]


def test_a_directory_by_its_descriptor(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with located(f"/dev/fd/{fd}/file") as place:
        assert place.found is None
    write(f"/dev/fd/{fd}/file", b"x")
    assert (tmp_path / "file").read_bytes() == b"x"
    with pytest.raises(UsageError, match="directory"):
        write(f"/dev/fd/{fd}", b"x", force=True)
    os.close(fd)


def test_a_terminal_by_any_name(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    (tmp_path / "tty").symlink_to(os.ttyname(follower))
    for name in (os.ttyname(follower), tmp_path / "tty", f"/dev/fd/{follower}"):
        for force in (False, True):
            with pytest.raises(UsageError, match="terminal"):
                write(name, b"x", force=force)
    os.close(leader)
    os.close(follower)
