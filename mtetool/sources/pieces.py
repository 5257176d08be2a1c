"""Pieces of a snapshot in bounded portions, decoded ahead of their use."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from mtetool.buffers import prepared
from mtetool.errors import no_thread
from mtetool.guest import Missing

if TYPE_CHECKING:
    from mtetool.snapshot.reader import Piece

Progress = Callable[[int, int], None]
"""Called with the bytes of guest memory that are done, and with their total."""

# More threads would only wait for the user of the tags.
_MOST_JOBS = 4


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """Report nothing."""


@lru_cache(maxsize=1)
def constant(tag: int, n_granules: int) -> memoryview:
    """That many granules of one tag; do not write to them."""
    return memoryview(bytes([tag]) * n_granules)


def decoded(
    pieces: Iterable[Piece | Missing],
    *,
    keep: int = 0,
) -> Iterator[tuple[Piece | Missing, memoryview | None]]:
    """The pieces in their order, with the tags of those that are not fills.

    Threads decode ahead, as far as there are buffers: one for each CPU and one more, at most
    five, each as large as the largest piece so far. The tags of `keep` pieces stay valid besides
    the last, in that many more buffers. Raises what `pieces` and `Piece.tags` raise, each in its
    turn.
    """
    jobs = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
    with ThreadPoolExecutor(jobs, thread_name_prefix="decode") as pool:
        yield from _decoded(iter(pieces), _Buffers(jobs + 1 + keep), pool, keep)


def _decoded(
    pieces: Iterator[Piece | Missing], buffers: _Buffers, pool: ThreadPoolExecutor, keep: int
) -> Iterator[tuple[Piece | Missing, memoryview | None]]:
    pending: deque[tuple[Piece | Missing, Future[memoryview] | None]] = deque()
    failed: Exception | None = None
    ended = False
    try:
        while pending or not ended:
            while not ended and buffers.free and len(pending) < _MOST_PENDING:
                try:
                    piece = next(pieces, None)
                except Exception as error:  # noqa: BLE001 - raised after the pieces before it
                    failed, piece = error, None
                if piece is None:
                    ended = True
                elif isinstance(piece, Missing) or piece.fill is not None:
                    pending.append((piece, None))
                else:
                    room = buffers.take(piece.n_granules)
                    pending.append((piece, _submit(pool, piece, room)))
            if not pending:
                break
            piece, future = pending.popleft()
            if future is None:
                yield piece, None
                continue
            tags = future.result()
            yield piece, tags
            if keep:
                keep -= 1
            else:
                buffers.give_back()
    finally:
        for _, future in pending:
            if future is not None:
                future.cancel()
    if failed is not None:
        raise failed


# Fills and missing ranges that wait after a piece; they are small, but must not pile up.
_MOST_PENDING = 1024


def _submit(pool: ThreadPoolExecutor, piece: Piece, room: memoryview) -> Future[memoryview]:
    try:
        return pool.submit(piece.tags, room)
    except RuntimeError as error:
        raise no_thread("decompressing", error) from error


class _Buffers:
    """Buffers that are taken and given back in turn, and grow to the requested size."""

    def __init__(self, count: int) -> None:
        self._rooms = [memoryview(b"") for _ in range(count)]
        self._next = 0
        self.free = count

    def take(self, n_bytes: int) -> memoryview:
        at = self._next % len(self._rooms)
        if len(self._rooms[at]) < n_bytes:
            self._rooms[at] = prepared(n_bytes)
        self._next += 1
        self.free -= 1
        return self._rooms[at][:n_bytes]

    def give_back(self) -> None:
        """Give back the one that was taken first."""
        self.free += 1
