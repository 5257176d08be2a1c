"""Shared by the tests of outputs: writing one, and a file system with fewer abilities."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mtetool.files.newfile import NewFile, new_file
from mtetool.files.output import output_file
from mtetool.files.place import located


def without_nameless_files(patch: pytest.MonkeyPatch) -> None:
    """Make O_TMPFILE fail as it does on NFS."""
    real = os.open

    def open_named(path: str, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *arguments, **options)

    patch.setattr(os, "open", open_named)


def write(
    path: Path | str, data: bytes, *, force: bool = False, inputs: tuple[str, ...] = ()
) -> None:
    with output_file(str(path), force=force, inputs=inputs) as out:
        out.write(data)


@contextmanager
def making(path: Path, *, force: bool) -> Iterator[NewFile]:
    """Open a new file."""
    with located(str(path)) as place, new_file(place, force=force) as new:
        new.open()
        yield new
