"""A guest that stands still while its tags are read, and no longer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

from mtetool.backends.base import Guest

Thaw = Callable[[], float | None]


@contextmanager
def held_still(guest: Guest, out: BinaryIO, *, wanted: bool) -> Iterator[tuple[BinaryIO, Thaw]]:
    """Stop the guest's vCPUs, if `wanted`, until the function given back is called.

    That gives the seconds for which they stood still (None: not wanted). With it comes the stream
    to write to. It keeps what is written in memory meanwhile: the guest must not wait for a slow
    disk, or for whoever reads the other end of a pipe. That is compressed data, a few percent of
    the tags, which are a thirty-second of the guest's memory.
    """
    if not wanted:
        yield out, lambda: None
        return
    guest.freeze()
    try:
        kept = _Kept(out)

        def thaw() -> float:
            seconds = guest.thaw()
            kept.let_through()
            return seconds

        yield cast(BinaryIO, kept), thaw
    finally:
        guest.thaw()


class _Kept:
    """A stream that keeps what is written to it until it may go on to another."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._kept: io.BytesIO | None = io.BytesIO()

    def write(self, data: bytes) -> int:
        return self._out.write(data) if self._kept is None else self._kept.write(data)

    def let_through(self) -> None:
        if self._kept is not None:
            data, self._kept = self._kept.getvalue(), None
            view = memoryview(data)
            while view:
                view = view[self._out.write(view) :]
