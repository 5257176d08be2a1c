"""Output files that appear under their names only when they are whole."""

from __future__ import annotations

import fcntl
import io
import os
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, BinaryIO

from mtetool.errors import (
    HostIoError,
    MtetoolError,
    OutputIsInputError,
    UsageError,
    host_error,
    shortened,
)
from mtetool.files.newfile import exists, new_file
from mtetool.files.place import Place, is_null, is_terminal, located, named

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


@contextmanager
def output_file(
    path: str, *, force: bool, inputs: Sequence[str] = (), may_replace_inputs: bool = False
) -> Iterator[BinaryIO]:
    """A file to write, front to back; "-" is standard output.

    A regular file gets its name when the body is done: anything else that ends the body, SIGKILL
    included, leaves everything as it was. Anything that exists and is not a regular file is written
    directly: /dev/null, a descriptor of ours (/dev/fd/N: a pipe), and with `force` named pipes and
    devices. Modes are 0600. None of the files in `inputs` ("-" is standard input) is written, under
    any name; with `may_replace_inputs`, one may be replaced. (For standard output see
    `keep_standard_output_off`.)

    Raises, before the body runs, OutputIsInputError, UsageError for a terminal or a directory,
    FileExistsAlreadyError, NoSuchFileError for a directory that does not exist, BadNameError,
    PermissionRefusedError. The file's own methods and the end raise DiskFullError and HostIoError.
    BrokenPipeError passes through.
    """
    if path == "-":
        with _written(_standard_output(), "standard output") as out:
            yield out
        return
    with located(path) as place:
        _check(place, inputs, force=force, may_replace_inputs=may_replace_inputs)
        if place.found is None or place.is_regular:
            with new_file(place, force=force) as new:
                with named(path):
                    new.open()
                with _written(new.file, path) as out:
                    yield out
                with named(path):
                    new.keep()
            return
        with named(path):
            direct = _opened_directly(place)
        with direct:
            with _written(direct, path) as out:
                yield out
            if stat.S_ISBLK(place.found.st_mode):
                with named(path):
                    os.fsync(direct.fileno())


def _check(place: Place, inputs: Sequence[str], *, force: bool, may_replace_inputs: bool) -> None:
    found, path = place.found, place.path
    if found is None:
        return
    if stat.S_ISDIR(found.st_mode):
        raise UsageError(f"{path} is a directory", hint="name a file in it", path=path)
    if not (may_replace_inputs and place.is_regular):
        _keep_off(found, path, inputs)
    check_not_a_stream(place)
    if not force and _needs_force(place, found):
        raise exists(path, _kind(found))


def _needs_force(place: Place, found: os.stat_result) -> bool:
    if place.descriptor is not None and not (place.is_regular or stat.S_ISBLK(found.st_mode)):
        return False  # the process that started us opened it for us
    return not is_null(found)


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def _kind(found: os.stat_result) -> str | None:
    return _KINDS.get(stat.S_IFMT(found.st_mode))


def _opened_directly(place: Place) -> io.FileIO:
    """Open a file that is not regular, for writing. A FIFO waits for its reader, as in a shell."""
    found = place.found
    assert found is not None
    if place.descriptor is not None:
        fd = os.dup(place.descriptor)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            os.close(fd)
            raise UsageError(f"{place.path} is not open for writing", path=place.path)
        return io.FileIO(fd, "w")
    if stat.S_ISSOCK(found.st_mode):
        raise UsageError(f"{place.path} is a socket, which cannot be opened", path=place.path)
    flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOCTTY
    if not stat.S_ISLNK(os.lstat(place.name, dir_fd=place.directory).st_mode):
        flags |= os.O_NOFOLLOW
    if stat.S_ISBLK(found.st_mode):
        flags |= os.O_EXCL  # EBUSY for a disk that is mounted
    direct = io.FileIO(os.open(place.name, flags, dir_fd=place.directory), "w")
    try:
        if not os.path.samestat(os.fstat(direct.fileno()), found):
            raise HostIoError(
                f"{place.path} was replaced while mtetool opened it",
                hint="check who did that: ls -l",
                path=place.path,
            )
        if direct.isatty():
            raise _terminal(place.path)
    except BaseException:
        direct.close()
        raise
    return direct


# --- what the output must not be ------------------------------------------------------------


def keep_standard_output_off(inputs: Sequence[str]) -> None:
    """Raise OutputIsInputError where standard output was redirected onto one of the inputs."""
    ours = _status_of(sys.stdout)
    if ours is not None:
        _keep_off(ours, "standard output", inputs)


def _keep_off(found: os.stat_result, path: str, inputs: Sequence[str]) -> None:
    for name in inputs:
        if _is_same_file(found, _input_status(name)):
            what = "standard input" if name == "-" else shortened(name)
            same = "" if what == path else f" (it is the same file as {what})"
            use = "open in the guest's process" if name.startswith("/proc/") else "an input"
            raise OutputIsInputError(
                f"{path} is {use}, so it cannot be the output too{same}",
                hint="write to another file",
                path=path,
                input=name,
            )


def _is_same_file(a: os.stat_result, b: os.stat_result | None) -> bool:
    """Whether two names belong to one file that can be destroyed: terminals and sockets cannot."""
    if b is None or stat.S_IFMT(a.st_mode) != stat.S_IFMT(b.st_mode):
        return False
    if stat.S_ISBLK(a.st_mode):
        return a.st_rdev == b.st_rdev
    may_be_destroyed = stat.S_ISREG(a.st_mode) or stat.S_ISFIFO(a.st_mode)
    return may_be_destroyed and os.path.samestat(a, b)


def _input_status(name: str) -> os.stat_result | None:
    """The status of an input; None where there is none, which its opening will report."""
    if name == "-":
        return _status_of(sys.stdin)
    try:
        return os.stat(name)  # noqa: PTH116
    except (OSError, ValueError):
        return None


def _status_of(stream: IO[str] | None) -> os.stat_result | None:
    if stream is None:
        return None
    try:
        return os.fstat(stream.fileno())
    except (OSError, ValueError):
        return None  # not one of the system's


def check_not_a_stream(place: Place) -> None:
    """Raise UsageError for a terminal, or where this run's messages or report go."""
    found = place.found
    if found is None or is_null(found):
        return
    if is_terminal(found):
        raise _terminal(place.path)
    for stream, name in ((sys.stdout, "standard output"), (sys.stderr, "standard error")):
        if _is_same_file(found, _status_of(stream)):
            raise UsageError(
                f"{name} already goes to {place.path}: the two would be mixed",
                hint="write to another file, or stream with -o - and send nothing else there",
                path=place.path,
            )


def names_standard_output(path: str) -> bool:
    """Whether writing to `path` is writing to standard output, as with "-".

    True for /dev/stdout and its kin, links to them, and the name of the same pipe; for a regular
    file also under its plain name, while nothing is in it yet (`-o x > x`).
    """
    ours = _status_of(sys.stdout)
    if path == "-" or ours is None:
        return path == "-"
    try:
        with located(path) as place:
            found, by_descriptor = place.found, place.descriptor is not None
    except MtetoolError:
        return False  # `output_file` will report it
    if found is None or is_null(found) or not os.path.samestat(found, ours):
        return False
    return by_descriptor or not stat.S_ISREG(ours.st_mode) or ours.st_size == 0


def _terminal(path: str) -> UsageError:
    return UsageError(
        f"this output is binary, and {path} is a terminal",
        hint="name a file with -o, or pipe it",
        path=path,
    )


def _standard_output() -> BinaryIO:
    stdout = sys.stdout
    if stdout is None:
        raise HostIoError("standard output is closed")
    if stdout.isatty():
        raise _terminal("standard output")
    stdout.flush()
    return stdout.buffer


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
        with named(self._path):
            self._target.flush()


@contextmanager
def _written(target: BinaryIO | io.FileIO, path: str) -> Iterator[BinaryIO]:
    """A buffer in front of a target; it is flushed in the end, but never after an error."""
    raw = _Raw(target, path)
    out = io.BufferedWriter(raw, 1 << 17)
    try:
        yield out
        out.flush()
        raw.pass_on()
    finally:
        raw.discard = True
        out.close()
