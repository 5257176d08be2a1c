"""Output files that appear under their name only when they are whole."""

from __future__ import annotations

import io
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mtetool.errors import HostIoError, NoSuchFileError, UsageError, host_error
from mtetool.snapshot.newfile import exists, new_file

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


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
        raise exists(path)
    # Behind a symbolic link, its target is written, and the link stays.
    with _named(path):
        real = Path(os.path.realpath(path))
    with new_file(path, real, force=force) as new:
        with _named(path):
            new.open()
        with _written(new.file, path) as out:
            yield out
        with _named(path):
            new.keep()


def _existing(path: str) -> os.stat_result | None:
    try:
        return os.stat(path)  # noqa: PTH116
    except FileNotFoundError:
        return None


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
        raise host_error(error, path, path=path) from error


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
            raise host_error(error, self._path, path=self._path) from error

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
