"""A new file that gets its name when it is whole, or never exists."""

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

# The errors of file systems that cannot bring a directory to disk.
_NO_DIRECTORY_FSYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)


class NewFile:
    """A file that is still nameless (O_TMPFILE), or has a temporary name beside its own.

    A nameless file vanishes with the process, however that ends; some file systems (NFS) have none,
    and replacing a file needs a temporary name for a moment. A file that a killed process has left
    under such a name is removed by the next process that makes the same file: a lock shows that it
    is no longer in use.

    `new_file` makes it. `open` and `keep` raise OSError; `keep` also raises FileExistsAlreadyError
    for a name that was taken meanwhile, and HostError where the file is in place, but may not
    survive a crash.
    """

    def __init__(self, place: Place, *, force: bool) -> None:
        self._path = place.path
        self._place = place
        # A signal may release the place before this is closed.
        self._at = os.dup(place.directory)
        self._force = force
        # Known before it is used: a signal may come between any two calls, and then the file of
        # this name is removed. Shortened, so that a file with the longest possible name has one.
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
        """Make the file, and remove leftovers of earlier ones."""
        _remove_leftovers(self._place)
        self._file = io.FileIO(self._make(), "w")
        os.fchmod(self.file.fileno(), MODE)
        _lock(self.file.fileno())

    def close(self) -> None:
        """Close the file; unless it was kept, it is gone. Idempotent."""
        try:
            if self._file is not None:
                # fsync has reported every write error.
                with suppress(OSError):
                    self._file.close()
        finally:
            if self._at >= 0:
                # The next run removes a file that stays: the error before this one counts.
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
        """Give the file its name once its bytes are on the disk."""
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
                    what = f"{self._path} is written, but may not survive a crash of this host"
                    raise host_error(error, what, path=self._path) from error

    def _check_again(self) -> None:
        """Refuse to replace anything but a file: a link or a pipe may have come meanwhile."""
        now = self._place.look()
        if now is not None and not stat.S_ISREG(now.st_mode):
            raise FileExistsAlreadyError(
                f"{self._path} was replaced meanwhile by something that is not a file",
                hint="check who did that: ls -l; choose a directory of your own",
                path=self._path,
            )

    def _rename(self) -> None:
        if self.is_nameless:
            self._link(self._temporary)
        os.rename(self._temporary, self._place.name, src_dir_fd=self._at, dst_dir_fd=self._at)

    def _appear(self) -> None:
        """Take the name, unless it is taken by now: a link refuses that, a rename does not."""
        try:
            self._link(self._place.name)
        except FileExistsError as error:
            raise exists(self._path) from error
        except OSError as error:
            # FAT and some FUSE file systems have no links: there, a look beforehand must do.
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
    """A `NewFile` for a place that is held; it is not open yet, and closed in the end."""
    new = NewFile(place, force=force)
    try:
        yield new
    finally:
        try:
            new.close()
        except BaseException:
            # The exception of a signal, which comes only once.
            new.close()
            raise


def exists(path: str, kind: str | None = None) -> FileExistsAlreadyError:
    """The error for a name that is taken; `kind` says by what, if not by a file."""
    if kind is None:
        return FileExistsAlreadyError(f"{path} exists", hint="overwrite it with --force", path=path)
    return FileExistsAlreadyError(
        f"{path} exists, and is {kind}", hint="write to it with --force", path=path
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
    """Lock the file unless another process has; whether it is ours. False without locks."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def _remove_leftovers(place: Place) -> None:
    """Remove files that killed processes left when they made this one: temporary, not locked.

    Best effort: files that cannot be examined stay.
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
        # Its maker may have finished meanwhile: then it no longer has this name.
        if mine and _lock(fd) and os.path.samestat(status, os.lstat(name, dir_fd=at)):
            os.unlink(name, dir_fd=at)
