"""A guest that stands still while its tags are read, and no longer."""

from __future__ import annotations

import os
import select
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

from mtetool.buffers import prepared, unshared
from mtetool.errors import OutputStalledError
from mtetool.guest import Guest

DEFAULT_SPOOL_BYTES = 1 << 30
"""The memory for a frozen guest's snapshot: for 32 GiB of random tags, or 300 GiB of a heap's."""

# The expected ratio of tags to bytes kept; room for these is made before the guest is stopped.
_EXPECTED_SHARE = 16
_MOST_EXPECTED_BYTES = 64 << 20

_LEAST_BYTES_PER_SECOND = 1 << 20

Thaw = Callable[[], float | None]


@contextmanager
def held_still(guest: Guest, *, wanted: bool) -> Iterator[Thaw]:
    """Stop the guest's vCPUs, if `wanted`, until the function that it yields is called.

    That function returns for how many seconds they stood still (None: not wanted).
    """
    if not wanted:
        yield lambda: None
        return
    unshared()  # the forked guard shares this memory
    guest.freeze()
    try:
        yield guest.thaw
    finally:
        guest.thaw()


class Spool:
    """A sink that keeps what is written to it in memory until it may pass it on to another.

    The guest must not wait for a slow disk, or for the reader at the other end of a pipe. What
    is kept is compressed: a few percent of the tags, which take `n_granules` bytes. Where it would
    exceed `limit_bytes`, it is passed on at once. From `hurry` to `let_through` a guest waits for
    that, but not for long: the sink raises OutputStalledError where `out` takes less than 1 MiB a
    second.
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
        self._hurried: Hurried | None = None
        self.overflowed = False
        """Whether the limit was exceeded, so the guest had to wait for `out`."""

    def hurry(self) -> None:
        """Note that a guest waits from now on."""
        self._hurried = Hurried(self._out)

    def write(self, data: bytes | memoryview) -> None:
        """See `Sink.write`."""
        if self._keeps and self._kept_bytes + len(data) > self._limit_bytes:
            self.overflowed = True
            self._pass_on_kept()
        if self._keeps:
            self._keep(data)
        else:
            self._pass_on(data)

    def _keep(self, data: bytes | memoryview) -> None:
        self._kept_bytes += len(data)
        end = self._used + len(data)
        if self._parts or end > len(self._room):
            self._parts.append(bytes(data))
            return
        self._room[self._used : end] = data
        self._used = end

    def let_through(self) -> None:
        """Write what was kept, and keep no more; no guest waits from now on."""
        self._hurried = None
        self._pass_on_kept()

    def _pass_on_kept(self) -> None:
        self._keeps = False
        kept: list[bytes | memoryview] = [self._room[: self._used], *self._parts]
        self._used, self._parts = 0, []
        for part in kept:
            self._pass_on(part)

    def _pass_on(self, data: bytes | memoryview) -> None:
        if self._hurried is not None:
            self._hurried.write(data)
        else:
            self._out.write(data)


class Hurried:
    """Writes that a guest waits for, in total only as long as the output's progress earns.

    A pipe is polled before each write, so that no write blocks in the kernel. (A disk cannot be
    polled.)
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._waited_seconds = 0.0
        self._written_bytes = 0
        self._poll: select.poll | None = None
        with suppress(OSError, AttributeError):  # a stream in memory
            if not stat.S_ISREG(os.fstat(out.fileno()).st_mode):
                self._poll = select.poll()
                self._poll.register(out.fileno(), select.POLLOUT)

    def write(self, data: bytes | memoryview) -> None:
        """See `Sink.write`. Raises OutputStalledError."""
        view = memoryview(data)
        piece_bytes = len(view) if self._poll is None else select.PIPE_BUF
        for at in range(0, len(view), max(piece_bytes, 1)):
            piece = view[at : at + piece_bytes]
            since = time.monotonic()
            if self._poll is not None and not self._poll.poll(self._patience() * 1000):
                raise self._stalled()
            self._out.write(piece)
            if self._poll is not None:
                self._out.flush()
            self._waited_seconds += time.monotonic() - since
            self._written_bytes += len(piece)
            if not self._patience():
                raise self._stalled()

    def _patience(self) -> float:
        """Return for how many more seconds the guest may wait."""
        earned = 1 + self._written_bytes / _LEAST_BYTES_PER_SECOND
        return max(earned - self._waited_seconds, 0)

    def _stalled(self) -> OutputStalledError:
        return OutputStalledError(
            "the frozen guest would have waited for the output, which takes less than 1 MiB a"
            f" second (or nothing): it took {self._written_bytes} bytes in"
            f" {self._waited_seconds:.1f} s; the guest is running again",
            hint="keep more in memory meanwhile: use a larger --spool",
            written_bytes=self._written_bytes,
        )
