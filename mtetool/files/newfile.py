"""A new file that gets its name when it is whole, or that never was."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtetool.errors import FileExistsAlreadyError, host_error
from mtetool.files.place import Place

MODE = 0o600  # Tags are secrets: MTE's protection rests on them.

# Some file systems cannot bring a directory to disk; what they say then.
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)


class NewFile:
    """A file that is still nameless (O_TMPFILE), or has a temporary name beside its own.

    A nameless one vanishes with the process, however that ends; some file systems (NFS)
    have none, and replacing a file needs a temporary name for a moment. What a process that
    was killed has left under such a name, the next one that makes the same file removes: a
    lock shows that nobody works on it any more.

    `new_file` makes it. `open` and `keep` raise OSError; `keep` also FileExistsAlreadyError
    for a name that was taken meanwhile, and HostError where the file is in its place, but maybe
    not for good.
    """

    def __init__(self, place: Place, *, force: bool) -> None:
        self._path = place.path
        self._place = place
        # A signal may end the holding of the place before this is closed.
        self._at = os.dup(place.directory)
        self._force = force
        # Known before it is used: a signal may come between any two calls, and then what bears
        # this name goes. Shortened, so that a name of the greatest length has one as well.
        self._temporary = f".{place.name[:50]}.{os.urandom(6).hex()}.tmp"
        self.is_nameless = False
        self._file: io.FileIO | None = None

    @property
    def file(self) -> io.FileIO:
        """The file, open for reading and writing. Raises ValueError before `open`."""
        if self._file is None:
            raise ValueError("the file is not open yet")
        return self._file

    def open(self) -> None:
        """Make the file, and remove what was left of earlier ones."""
        _remove_leftovers(self._place)
        self._file = io.FileIO(self._make(), "w")
        os.fchmod(self.file.fileno(), MODE)
        _lock(self.file.fileno())

    def close(self) -> None:
        """Close it; unless it was kept, it is gone. May be called again."""
        try:
            if self._file is not None:
                # Every error of writing was reported by fsync.
                with suppress(OSError):
                    self._file.close()
        finally:
            if self._at >= 0:
                # What cannot be removed is left to the next run: what failed before counts.
                with suppress(OSError):
                    os.unlink(self._temporary, dir_fd=self._at)
                at, self._at = self._at, -1
                os.close(at)

    def _make(self) -> int:
        if Path("/proc/self/fd").is_dir():
            with suppress(OSError):
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                fd = os.open(".", flags, MODE, dir_fd=self._at)
                self.is_nameless = True
                return fd
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        return os.open(self._temporary, flags, MODE, dir_fd=self._at)

    def keep(self) -> None:
        """Give the file its name, once its bytes are on the disk."""
        os.fsync(self.file.fileno())
        with _opened(".", os.O_RDONLY | os.O_DIRECTORY, self._at) as directory:
            if self._force:
                self._check_again()
                self._rename()
            else:
                self._appear()
            try:
                os.fsync(directory)
            except OSError as error:
                if error.errno not in _NO_DIRECTORY_FSYNC:
                    what = f"{self._path} is written, but may not outlast a crash of this host"
                    raise host_error(error, what, path=self._path) from error

    def _check_again(self) -> None:
        """Refuse to replace anything but a file: neither a link nor a pipe that came meanwhile."""
        now = self._place.look()
        if now is not None and not stat.S_ISREG(now.st_mode):
            raise FileExistsAlreadyError(
                f"{self._path} was replaced meanwhile, by something that is not a file",
                hint="look who does that: ls -l; choose a directory of your own",
                path=self._path,
            )

    def _rename(self) -> None:
        if self.is_nameless:
            self._link(self._temporary)
        os.rename(self._temporary, self._place.name, src_dir_fd=self._at, dst_dir_fd=self._at)

    def _appear(self) -> None:
        """Take the name, unless something has it by now: that a link refuses, a rename not."""
        try:
            self._link(self._place.name)
        except FileExistsError as error:
            raise exists(self._path) from error
        except OSError as error:
            # FAT and some FUSE file systems have no links: a look before has to do there.
            if self.is_nameless or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            if self._place.look() is not None:
                raise exists(self._path) from error
            self._rename()

    def _link(self, name: str) -> None:
        if not self.is_nameless:
            os.link(self._temporary, name, src_dir_fd=self._at, dst_dir_fd=self._at)
            return
        # Naming a directory makes Python use linkat(2) with AT_SYMLINK_FOLLOW, as open(2)
        # says for O_TMPFILE; link(2) would link the symbolic link in /proc itself.
        source = f"/proc/self/fd/{self.file.fileno()}"
        os.link(source, name, dst_dir_fd=self._at, follow_symlinks=True)


@contextmanager
def new_file(place: Place, *, force: bool) -> Iterator[NewFile]:
    """A `NewFile` for a place that is held, not open yet, and closed in the end."""
    new = NewFile(place, force=force)
    try:
        yield new
    finally:
        try:
            new.close()
        except BaseException:
            # A signal's exception, which comes once.
            new.close()
            raise


def exists(path: str, kind: str | None = None) -> FileExistsAlreadyError:
    """The error for a name that something has already; `kind` is what, if not a file."""
    if kind is None:
        return FileExistsAlreadyError(f"{path} exists", hint="--force overwrites it", path=path)
    return FileExistsAlreadyError(
        f"{path} exists, and is {kind}", hint="--force writes to it as it is", path=path
    )


@contextmanager
def _opened(name: str, flags: int, at: int) -> Iterator[int]:
    fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=at)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def _lock(fd: int) -> bool:
    """Whether the file is ours alone, or by now. Where there are no locks: False."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_leftovers(place: Place) -> None:
    """Remove what killed processes left when they made this file: temporary and not locked.

    Best effort: what cannot be looked at stays.
    """
    ours = re.compile(rf"\.{re.escape(place.name[:50])}\.[0-9a-f]{{12}}\.tmp", re.DOTALL)
    with suppress(OSError), _opened(".", os.O_RDONLY | os.O_DIRECTORY, place.directory) as fd:
        for name in filter(ours.fullmatch, os.listdir(fd)):  # noqa: PTH208
            with suppress(OSError):
                _remove_leftover(name, fd)


def _remove_leftover(name: str, at: int) -> None:
    with _opened(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, at) as fd:
        status = os.fstat(fd)
        mine = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        # Its maker may have finished meanwhile: then it has no such name any more.
        if mine and _lock(fd) and os.path.samestat(status, os.lstat(name, dir_fd=at)):
            os.unlink(name, dir_fd=at)
