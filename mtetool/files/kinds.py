"""Recognise the kind of a file by its first bytes, for messages that help."""

from __future__ import annotations

import os
import stat
from enum import Enum

SNAPSHOT_MAGIC = b"\x89MTESNP\n"
EMULATED_MAGIC = b"\x89MTEEMU\n"


class FileKind(Enum):
    """A kind of file that mtetool writes; the value is how such a file begins."""

    SNAPSHOT = SNAPSHOT_MAGIC
    EMULATED = EMULATED_MAGIC


def kind_of(path: str) -> FileKind | None:
    """The kind of a regular file; None if it is unknown or cannot be read."""
    try:
        # Non-blocking, because it may be a FIFO.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        start = os.pread(fd, len(SNAPSHOT_MAGIC), 0)
    except OSError:
        return None
    finally:
        os.close(fd)
    return next((kind for kind in FileKind if kind.value == start), None)
