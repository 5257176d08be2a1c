"""Bytes of an input file at a place, exactly."""

from __future__ import annotations

import os
from typing import BinaryIO

from mtetool.errors import BadFormatError, host_error

_LARGEST_OFFSET = 1 << 63


def read_at(stream: BinaryIO, offset: int, n_bytes: int, name: str) -> bytes:
    """The bytes at a place. Raises BadFormatError where the file ends before, HostIoError."""
    if offset + n_bytes >= _LARGEST_OFFSET or offset + n_bytes > size_of(stream, name):
        raise BadFormatError(
            f"{name} ends at byte {size_of(stream, name):,}, and should have {n_bytes:,} bytes"
            f" at {offset:,}",
            hint="check whether it was copied whole, and whether the disk was full",
            offset=offset,
        )
    try:
        stream.seek(offset)
        data = stream.read(n_bytes)
    except OSError as error:
        raise host_error(error, f"{name}: reading failed") from error
    if len(data) < n_bytes:
        raise BadFormatError(f"{name} became shorter while it was read", offset=offset)
    return data


def size_of(stream: BinaryIO, name: str) -> int:
    """The length of an open file. Raises HostIoError."""
    try:
        return os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise host_error(error, f"{name}: its size is unknown") from error
