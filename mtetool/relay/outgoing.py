"""The source's tags: those of the pages that passed in the stream."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtetool.attach.chain_room import MOST_CALLS
from mtetool.errors import GuestError, errno_name
from mtetool.relay import payload
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mtetool.guest import Guest
    from mtetool.relay.placing import Placed

# No extent crosses a multiple of that many pages, so none is longer.
_EXTENT_PAGES = 256


@dataclass(slots=True)
class Sent:
    """What went over so far."""

    read_pages: int = 0
    pages: int = 0
    """Pages whose tags were sent, some of them several times."""
    bytes: int = 0
    """Bytes of TAGS frames."""
    read_seconds: float = 0.0


class Outgoing:
    """Reads tags and packs them, a group of pages at a time; one thread at a time may use it.

    Pages that have no tags and never had any are not sent: a guest that is about to be migrated to
    has none. `placed` says where the stream's blocks are, in pages of `stream_page_bytes`.
    """

    def __init__(self, guest: Guest, placed: Sequence[Placed], stream_page_bytes: int) -> None:
        self._guest = guest
        self._placed = placed
        self._stream_page_bytes = stream_page_bytes
        page = guest.page_size_bytes
        self._page_bytes = page
        self._page_granules = page // GRANULE_BYTES
        self.sent = Sent()
        # Pages are also numbered without the gaps between the parts.
        self._starts = np.array([part.ipa // page for part in placed], np.int64)
        n_pages = np.array([part.size_bytes // page for part in placed], np.int64)
        self._bases = np.cumsum(n_pages) - n_pages
        self._had_tags = np.zeros(int(n_pages.sum()), bool)
        self._room = np.empty(payload.MOST_GRANULES, np.uint8)

    def groups(self, marks: Sequence[NDArray[np.uint8]]) -> Iterator[NDArray[np.int64]]:
        """The marked pages, by their numbers, in groups for `packed`; ascending."""
        pages = np.concatenate([self._marked(part, marks[part.block]) for part in self._placed])
        most = min(payload.MOST_GRANULES // self._page_granules, MOST_CALLS)
        for first in range(0, len(pages), most):
            yield pages[first : first + most]

    def _marked(self, part: Placed, marks: NDArray[np.uint8]) -> NDArray[np.int64]:
        unit, page = self._stream_page_bytes, self._page_bytes
        # A block may end in the middle of a page of this host, and never begins in one.
        n_pages = part.size_bytes // page
        here = marks[part.offset // unit :][: n_pages * max(page // unit, 1)]
        found = np.flatnonzero(here.reshape(n_pages, -1).any(axis=1) if page > unit else here)
        if page < unit:
            found = (found[:, None] * (unit // page) + np.arange(unit // page)).ravel()
        return found.astype(np.int64) + part.ipa // page

    def packed(self, pages: NDArray[np.int64]) -> bytes | None:
        """Read the tags of a group; return the payload of a frame, None if none needs to go.

        Raises GuestError, for a page that cannot be read too.
        """
        started = time.perf_counter()
        tags = self._room[: len(pages) * self._page_granules]
        self._read(pages, tags)
        self.sent.read_seconds += time.perf_counter() - started
        self.sent.read_pages += len(pages)
        by_page = tags.reshape(len(pages), -1)
        has_tags = by_page.any(axis=1)
        number = np.searchsorted(self._starts, pages, side="right") - 1
        number = pages - self._starts[number] + self._bases[number]
        goes = has_tags | self._had_tags[number]
        self._had_tags[number] = has_tags
        if not goes.any():
            return None
        pages = pages[goes]
        found = payload.pack(extents_of(pages, self._page_bytes), by_page[goes].ravel())
        self.sent.pages += len(pages)
        self.sent.bytes += len(found)
        return found

    def _read(self, pages: NDArray[np.int64], tags: NDArray[np.uint8]) -> None:
        done = 0
        while done < len(pages):
            extents = extents_of(pages[done:], self._page_bytes)
            try:
                completed = self._guest.read_scattered(extents, tags[done * self._page_granules :])
            except OSError as error:
                number, ipa = error.errno or errno.EIO, int(extents[0, 0])
                raise GuestError(
                    f"the tags of the page at {ipa:#x} cannot be read: {os.strerror(number)}"
                    f" ({errno_name(number)})",
                    hint="the guest goes on at the source",
                    errno=errno_name(number),
                    ipa=ipa,
                ) from error
            done += completed // self._page_bytes


def extents_of(pages: NDArray[np.int64], page_bytes: int) -> NDArray[np.uint64]:
    """The extents of ascending pages, a row each: address, size in bytes."""
    breaks = (np.diff(pages) != 1) | (pages[1:] % _EXTENT_PAGES == 0)
    first = np.flatnonzero(np.concatenate(([True], breaks)))
    n_pages = np.diff(np.concatenate((first, [len(pages)])))
    extents = np.empty((len(first), 2), np.uint64)
    extents[:, 0] = pages[first] * page_bytes
    extents[:, 1] = n_pages * page_bytes
    return extents
