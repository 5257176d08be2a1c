"""Open a snapshot by its name, a file or standard input; read it in full or by its index."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mtetool.errors import (
    BadNameError,
    NoSuchFileError,
    NotASnapshotError,
    UsageError,
    file_error,
    host_error,
)
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.model import Summary
from mtetool.snapshot.reader import SnapshotReader


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, or of standard input for "-".

    Raises UsageError for a terminal, NoSuchFileError, BadNameError, NotASnapshotError for a
    directory, PermissionRefusedError, HostIoError.
    """
    if not path:
        raise BadNameError("the name of the file is empty", path=path)
    if path == "-":
        stdin = sys.stdin
        if stdin is None or stdin.isatty():
            raise UsageError(
                "a snapshot is expected on standard input, which is "
                + ("closed" if stdin is None else "a terminal"),
                hint="name a file, or pipe a snapshot in",
            )
        yield stdin.buffer
        return
    try:
        stream = Path(path).open("rb")  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoSuchFileError(
            f"{path}: no such file", hint="check the name: ls -ld", path=path
        ) from error
    except IsADirectoryError as error:
        what = f"{path} is not a snapshot: it is a directory"
        raise NotASnapshotError(what, hint="name a file in it", path=path) from error
    except OSError as error:
        raise file_error(error, path, f"{path} cannot be opened") from error
    except ValueError as error:
        what = f"{path!r} cannot be the name of a file: {error}"
        raise BadNameError(what, path=path) from error
    with stream:
        yield stream


def display_name(path: str) -> str:
    """The name of an input in messages."""
    return "standard input" if path == "-" else path


def is_seekable(stream: BinaryIO) -> bool:
    """Whether a stream is a regular file at its start, so that its index can be used.

    Raises HostError where that is unknown: a file must not be taken for a pipe, since less is known
    about a pipe before it is used.
    """
    try:
        fd = stream.fileno()
    except (OSError, ValueError):
        return False  # it is not one of the system's
    try:
        return stat.S_ISREG(os.fstat(fd).st_mode) and stream.tell() == 0
    except OSError as error:
        raise host_error(error, "the snapshot cannot be examined") from error


def read_summary(path: str) -> Summary:
    """A snapshot's description; the tags in a file are not read for it.

    From a pipe, everything is read and checked, and nothing decompressed. Raises as
    `opened`, and SnapshotError.
    """
    with opened(path) as stream:
        name = display_name(path)
        if is_seekable(stream):
            return IndexedSnapshot.of(stream, name).summary()
        reader = SnapshotReader(stream, name)
        for _ in reader:
            pass
        return Summary(reader.header, reader.footer, reader.missing, None)
