"""Where an output goes: a name in a directory that is held open, whose links are followed once.

Between the look at a name and the writing, any user who may write to its directory can put a link
there. So links are followed here, one by one, each as the kernel would with fs.protected_symlinks.
Afterwards only the last directory's descriptor and a name in it are used, with calls that follow
nothing.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mtetool.errors import BadNameError, NoSuchFileError, UsageError, file_error

_LINKS_MAX = 40  # as the kernel: MAXSYMLINKS
_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd")
_NULL = os.makedev(1, 3)
# Consoles, serial lines, /dev/tty, pseudo-terminals: Linux's Documentation/admin-guide/devices.txt
_TERMINAL_MAJORS = {4, 5, *range(136, 144)}


@dataclass(frozen=True, slots=True)
class Place:
    """A name in an open directory.

    `found` is the status of the file that has the name, None if there is none; a link is followed
    for it only in a directory of descriptors (/proc/PID/fd). `descriptor` is the number where a
    descriptor of this process was named (/dev/fd/N), even if it led to a file that has a name.
    """

    path: str
    directory: int
    name: str
    found: os.stat_result | None
    descriptor: int | None = None

    def look(self) -> os.stat_result | None:
        """Look up the name again, without following a link. Raises OSError."""
        return _status(self.name, self.directory)

    @property
    def is_regular(self) -> bool:
        """Whether a regular file has the name."""
        return self.found is not None and stat.S_ISREG(self.found.st_mode)


def is_null(found: os.stat_result) -> bool:
    """Whether it is /dev/null, by whatever name."""
    return stat.S_ISCHR(found.st_mode) and found.st_rdev == _NULL


def is_terminal(found: os.stat_result) -> bool:
    """Whether it is a terminal, as far as can be known without opening it."""
    return stat.S_ISCHR(found.st_mode) and os.major(found.st_rdev) in _TERMINAL_MAJORS


@contextmanager
def named(path: str) -> Iterator[None]:
    """Turn the system's errors about this output into mtetool's own."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchFileError(
            f"{path} cannot be created: {error.strerror}",
            hint="check that its directory exists",
            path=path,
        ) from error
    except OSError as error:
        raise file_error(error, path) from error


@contextmanager
def located(path: str) -> Iterator[Place]:
    """Follow `path` to its end, and hold the directory.

    Raises BadNameError for an empty name, UsageError for a name that only a directory can have and
    for a deleted file behind a descriptor, NoSuchFileError for a directory that does not exist,
    PermissionRefusedError also for a link or a FIFO that another user put into a directory like
    /tmp, HostIoError.
    """
    with ExitStack() as stack:
        with named(path):
            place = _located(path, stack)
        yield place


def _located(path: str, stack: ExitStack) -> Place:
    at: int | None = None
    rest = path
    for _ in range(_LINKS_MAX):
        if not rest:
            raise BadNameError("the name of the file is empty", path=path)
        parent, name = os.path.split(rest)
        at = _opened_directory(parent, at, stack)
        if name in ("", ".", ".."):
            raise UsageError(f"{path} is the name of a directory", hint="name a file", path=path)
        found = _status(name, at)
        if found is None or not stat.S_ISLNK(found.st_mode):
            if found is not None and stat.S_ISFIFO(found.st_mode):
                _check_owner(found, at, name)
            return Place(path, at, name, found)
        table = _DESCRIPTORS.fullmatch(_name_of(at))
        if table is not None:
            own = int(name) if table[1] == str(os.getpid()) else None
            return _behind_descriptor(path, at, name, own, stack)
        _check_owner(found, at, name)
        rest = os.readlink(name, dir_fd=at)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _behind_descriptor(path: str, at: int, name: str, own: int | None, stack: ExitStack) -> Place:
    found = os.stat(name, dir_fd=at)  # the kernel goes straight to the open file
    if not stat.S_ISREG(found.st_mode):
        return Place(path, at, name, found, own)
    place = _located(os.readlink(name, dir_fd=at), stack)
    if place.found is None or not os.path.samestat(place.found, found):
        raise UsageError(
            f"{path} is a file that has no name any more, so it cannot be replaced",
            hint="name a file with -o, or stream with -o -",
            path=path,
        )
    return Place(path, place.directory, place.name, found, own)


def _opened_directory(parent: str, at: int | None, stack: ExitStack) -> int:
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    fd = os.open(parent or ".", flags, dir_fd=at)
    stack.callback(os.close, fd)
    return fd


def _status(name: str, at: int) -> os.stat_result | None:
    try:
        return os.lstat(name, dir_fd=at)
    except FileNotFoundError:
        return None


def _name_of(directory: int) -> str:
    """The name of an open directory; "" where /proc, and with it all such links, is missing."""
    try:
        return str(Path(f"/proc/self/fd/{directory}").readlink())
    except OSError:
        return ""


def _check_owner(found: os.stat_result, at: int, name: str) -> None:
    """Raise EACCES for a link or FIFO through which another user may want to misuse us.

    This is the kernel's rule for links and FIFOs in sticky directories that everyone may write to
    (fs/namei.c, may_follow_link and may_create_in_sticky), whether it is turned on or not.
    """
    directory = os.fstat(at)
    if not (directory.st_mode & stat.S_ISVTX and directory.st_mode & stat.S_IWOTH):
        return
    if found.st_uid not in (os.geteuid(), directory.st_uid):
        raise PermissionError(
            errno.EACCES, f"{name} is another user's, in a directory that everyone may write to"
        )
