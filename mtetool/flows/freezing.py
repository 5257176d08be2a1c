"""A guest that stands still while its tags are read, and no longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

from mtetool.backends.base import Guest
from mtetool.buffers import prepared

DEFAULT_SPOOL_BYTES = 1 << 30
"""What a frozen guest's snapshot may take in memory: 32 GiB of random tags, 300 of a heap's."""

# What is likely to be kept, of each byte of tags; its room is made before the guest is stopped.
_EXPECTED_SHARE = 16
_MOST_EXPECTED_BYTES = 64 << 20

Thaw = Callable[[], float | None]


@contextmanager
def held_still(guest: Guest, *, wanted: bool) -> Iterator[Thaw]:
    """Stop the guest's vCPUs, if `wanted`, until the function given back is called.

    That gives the seconds for which they stood still (None: not wanted).
    """
    if not wanted:
        yield lambda: None
        return
    guest.freeze()
    try:
        yield guest.thaw
    finally:
        guest.thaw()


class Spool:
    """A stream that keeps what is written to it in memory until it may go on to another.

    The guest must not wait for a slow disk, or for whoever reads the other end of a pipe. What
    is kept is compressed, a few percent of the tags, of which there are `n_granules` bytes. Where
    it would become more than `limit_bytes`, it goes on at once.
    """

    def __init__(self, out: BinaryIO, limit_bytes: int, n_granules: int) -> None:
        self._out = out
        self._limit_bytes = limit_bytes
        expected = min(n_granules // _EXPECTED_SHARE, _MOST_EXPECTED_BYTES)
        self._room = prepared(min(expected, limit_bytes))
        self._used = 0
        self._parts: list[bytes] = []
        self._kept_bytes = 0
        self._keeps = limit_bytes > 0
        self.overflowed = False
        """Whether there was more than the limit, so that the guest had to wait for `out`."""

    def write(self, data: bytes) -> int:
        """As the stream's own, but that all is taken."""
        if self._keeps and self._kept_bytes + len(data) > self._limit_bytes:
            self.overflowed = True
            self.let_through()
        if self._keeps:
            self._keep(data)
        else:
            _write_all(self._out, data)
        return len(data)

    def _keep(self, data: bytes) -> None:
        self._kept_bytes += len(data)
        end = self._used + len(data)
        if self._parts or end > len(self._room):
            self._parts.append(data)
            return
        self._room[self._used : end] = data
        self._used = end

    def let_through(self) -> None:
        """Write what was kept, and keep no more."""
        self._keeps = False
        kept: list[bytes | memoryview] = [self._room[: self._used], *self._parts]
        self._used, self._parts = 0, []
        for part in kept:
            _write_all(self._out, part)


def _write_all(out: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
