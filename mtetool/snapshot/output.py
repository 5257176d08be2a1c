"""Output files that appear under their name only when they are whole."""

from __future__ import annotations

import errno
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mtetool.errors import (
    DiskFullError,
    FileExistsAlreadyError,
    HostError,
    HostIoError,
    NoSuchFileError,
    UsageError,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

MODE = 0o600  # Tags are secrets: MTE's protection rests on them.

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def output_file(path: str, *, force: bool) -> Iterator[BinaryIO]:
    """A file to write, front to back; "-" is standard output.

    A regular file gets its name when the body is done: whatever ends the body otherwise,
    SIGKILL included, leaves what was there before. What exists and is no regular file
    (/dev/null, a pipe) is written directly. Modes are 0600.

    Raises, before the body runs, UsageError for a terminal or a directory,
    FileExistsAlreadyError, NoSuchFileError for a directory that does not exist; from the
    file's own methods and the end DiskFullError and HostIoError. BrokenPipeError passes.
    """
    if path == "-":
        with _written(_standard_output(), "standard output") as out:
            yield out
        return
    with _named(path):
        target = _existing(path)
    if target is not None and stat.S_ISDIR(target.st_mode):
        raise UsageError(f"{path} is a directory", hint="name a file in it")
    if target is not None and not stat.S_ISREG(target.st_mode):
        with _named(path):
            direct = io.FileIO(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "w")
        with direct, _written(direct, path) as out:
            yield out
        return
    if target is not None and not force:
        raise _exists(path)
    # Behind a symbolic link, its target is written, and the link stays.
    with _named(path):
        new = NewFile(path, Path(os.path.realpath(path)), force=force)
    with new:
        with _written(new.file, path) as out:
            yield out
        with _named(path):
            new.keep()


def _existing(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None


def _exists(path: str) -> FileExistsAlreadyError:
    return FileExistsAlreadyError(f"{path} exists", hint="--force overwrites it", path=path)


def _standard_output() -> BinaryIO:
    stdout = sys.stdout
    if stdout is None:
        raise HostIoError("standard output is closed")
    if stdout.isatty():
        raise UsageError(
            "this output is binary, and standard output is a terminal",
            hint="name a file with -o, or pipe it",
        )
    stdout.flush()
    return stdout.buffer


def _translated(error: OSError, path: str) -> HostError:
    if error.errno in _FULL:
        return DiskFullError(
            f"{path}: {error.strerror}", hint="make room, or write elsewhere", path=path
        )
    return HostIoError(f"{path}: {error.strerror or error}", path=path)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors of the system about this output, in mtetool's words."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchFileError(
            f"{path} cannot be created: {error.strerror}", hint="does its directory exist?"
        ) from error
    except OSError as error:
        raise _translated(error, path) from error


class _Raw(io.RawIOBase):
    """Passes bytes on and translates errors where they happen.

    Only there: an OSError that the body of `output_file` meets elsewhere is not about the
    output.
    """

    def __init__(self, target: BinaryIO | io.FileIO, path: str) -> None:
        self._target = target
        self._path = path
        self.discard = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._target.fileno()

    def write(self, data: ReadableBuffer, /) -> int | None:
        if self.discard:
            return memoryview(data).nbytes
        try:
            return self._target.write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise _translated(error, self._path) from error

    def pass_on(self) -> None:
        """Flush the target."""
        with _named(self._path):
            self._target.flush()


@contextmanager
def _written(target: BinaryIO | io.FileIO, path: str) -> Iterator[BinaryIO]:
    """A buffer in front of a target, which is flushed in the end, and never after an error."""
    raw = _Raw(target, path)
    out = io.BufferedWriter(raw, 1 << 17)
    try:
        yield out
        out.flush()
        raw.pass_on()
    finally:
        raw.discard = True
        out.close()


class NewFile:
    """A file that is still nameless (O_TMPFILE), or has a temporary name beside its own.

    A nameless one vanishes with the process, however that ends; some file systems (NFS)
    have none. `file` is open for reading and writing; `keep` gives it the name `target`.
    Raises OSError, and FileExistsAlreadyError for a name that was taken meanwhile.
    """

    def __init__(self, path: str, target: Path, *, force: bool) -> None:
        self._path = path
        self._target = target
        self._force = force
        self._temporary: Path | None = None
        self.file = io.FileIO(self._open(), "w")
        os.fchmod(self.file.fileno(), MODE)

    def _open(self) -> int:
        if Path("/proc/self/fd").is_dir():
            with suppress(OSError):
                flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
                return os.open(self._target.parent, flags, MODE)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
        self._temporary = self._temporary_name()
        return os.open(self._temporary, flags, MODE)

    def _temporary_name(self) -> Path:
        # Shortened, so that a name of the greatest length still has a temporary one.
        return self._target.with_name(f".{self._target.name[:50]}.{secrets.token_hex(6)}.tmp")

    def keep(self) -> None:
        """Give the file its name, once its bytes are on the disk. Raises OSError."""
        os.fsync(self.file.fileno())
        directory = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if self._force:
                self._rename()
            else:
                self._appear()
            os.fsync(directory)
        finally:
            os.close(directory)

    def _rename(self) -> None:
        if self._temporary is None:
            name = self._temporary_name()
            self._link(name)
            self._temporary = name
        self._temporary.replace(self._target)
        self._temporary = None

    def _appear(self) -> None:
        """Take the name, unless something has it by now: that a link refuses, a rename not."""
        try:
            self._link(self._target)
        except FileExistsError as error:
            raise _exists(self._path) from error
        except OSError as error:
            # FAT and some FUSE file systems have no links: a look before has to do there.
            if self._temporary is None or error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
            if os.path.lexists(self._target):
                raise _exists(self._path) from error
            self._rename()

    def _link(self, name: Path) -> None:
        if self._temporary is not None:
            os.link(self._temporary, name)
            return
        # Naming a directory makes Python use linkat(2) with AT_SYMLINK_FOLLOW, as open(2)
        # says for O_TMPFILE; link(2) would link the symbolic link in /proc itself.
        here = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            source = f"/proc/self/fd/{self.file.fileno()}"
            os.link(source, name.absolute(), src_dir_fd=here, follow_symlinks=True)
        finally:
            os.close(here)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
