"""The source's tags: those of the pages that passed in the stream."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtetool import loops
from mtetool.attach.chain_room import MOST_CALLS
from mtetool.errors import GuestError, errno_name
from mtetool.extents import n_granules_of, of_pages, pages_of, parts
from mtetool.guest import Extent
from mtetool.relay import payload
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mtetool.guest import Guest
    from mtetool.relay.placing import Placed

# Of shorter runs of pages, reading the tags takes no longer than asking whether there are any.
_WORTH_ASKING_PAGES = 64
# The steps of a round have no fewer pages: beginning one has its price, too.
_LEAST_STEP_PAGES = 512


@dataclass(slots=True)
class Sent:
    """What went over so far."""

    read_pages: int = 0
    pages: int = 0
    """Pages whose tags were sent, as often as they were."""
    bytes: int = 0
    """Bytes of TAGS frames."""
    read_seconds: float = 0.0


class Outgoing:
    """Reads tags and packs them; one thread at a time may use it.

    Pages that have no tags and never had any are not sent: a guest that is about to be migrated to
    has none. `placed` says where the stream's blocks are, in pages of `stream_page_bytes`. Tags are
    read and emitted in steps, each of about `step_seconds`, or as large as a frame may be.
    """

    def __init__(
        self,
        guest: Guest,
        placed: Sequence[Placed],
        stream_page_bytes: int,
        *,
        step_seconds: float | None = None,
    ) -> None:
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
        self._is_final = np.zeros_like(self._had_tags)
        self._any_had_tags = False
        self._room = np.empty(payload.MOST_GRANULES, np.uint8)
        self._step_seconds = step_seconds
        self._most_step_pages = payload.MOST_GRANULES // self._page_granules
        self._least_step_pages = min(_LEAST_STEP_PAGES, self._most_step_pages)
        self._step_pages = self._least_step_pages if step_seconds else self._most_step_pages
        self._left = np.empty(0, np.int64)

    def round(
        self,
        marks: Sequence[NDArray[np.uint8]],
        emit: Callable[[bytes], object],
        stop: Callable[[], bool] = lambda: False,
        *,
        stands_still: bool = False,
    ) -> int:
        """Read the tags of all marked pages; `emit` takes the payload of each frame that must go.

        `stop` is asked before each step; once it returns True, the pages whose tags were not read
        yet are left for the next round. While the guest `stands_still`, no page is read twice,
        however often it is marked. Returns how many pages this round had, without those that were
        left or known. Raises GuestError, for a page that cannot be read too.
        """
        marked = [self._marked(part, marks[part.block]) for part in self._placed]
        pages = np.concatenate(marked)
        if len(self._left):
            pages = np.union1d(pages, self._left)
            self._left = self._left[:0]
        if stands_still:
            pages = pages[~self._is_final[self._numbers(pages)]]
            self._is_final[self._numbers(pages)] = True
        may_have = self._may_have_tags(pages)
        self._emit_all(self._pack_untagged, pages[~may_have], emit)
        read = pages[may_have]
        done = 0
        while done < len(read):
            if stop():
                self._left = read[done:]
                break
            some = read[done : done + self._step_pages]
            done += len(some)
            self._emit_all(self._pack_read, some, emit)
        return len(pages) - len(self._left)

    @property
    def n_left(self) -> int:
        """How many pages were left for the next round."""
        return len(self._left)

    def _emit_all(
        self,
        pack: Callable[[NDArray[np.uint64]], bytes | None],
        pages: NDArray[np.int64],
        emit: Callable[[bytes], object],
    ) -> None:
        extents = of_pages(pages, self._page_bytes)
        for part in parts(extents, MOST_CALLS, payload.MOST_GRANULES):
            packed = pack(part)
            if packed is not None:
                emit(packed)

    def _may_have_tags(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the pages may have tags.

        Most of a guest's memory was often never touched, and QEMU sends it as zeros. A page that
        comes to have tags after this passes again in the stream.
        """
        may_have = np.ones(len(pages), bool)
        starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(pages))
        for run in np.flatnonzero(lengths >= _WORTH_ASKING_PAGES):
            start, n_pages = int(starts[run]), int(lengths[run])
            here = may_have[start : start + n_pages]
            here[:] = False
            ipa = int(pages[start]) * self._page_bytes
            for found in self._guest.may_be_tagged(Extent(ipa, n_pages * self._page_bytes)):
                first = (found.ipa - ipa) // self._page_bytes
                here[first : first + found.size_bytes // self._page_bytes] = True
        return may_have

    def _marked(self, part: Placed, marks: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The numbers of this host's pages that are marked, wholly or in part."""
        unit, page = self._stream_page_bytes, self._page_bytes
        n_pages = part.size_bytes // page
        here = marks[part.offset // unit :][: part.size_bytes // unit]
        found = np.flatnonzero(here.reshape(n_pages, -1).any(axis=1) if page > unit else here)
        if page < unit:
            found = (found[:, None] * (unit // page) + np.arange(unit // page)).ravel()
        return found.astype(np.int64) + part.ipa // page

    def _pack_untagged(self, extents: NDArray[np.uint64]) -> bytes | None:
        """The payload of pages known to have no tags: of those that had some before."""
        if not self._any_had_tags:
            return None
        tags = self._room[: n_granules_of(extents)]
        tags[:] = 0
        return self._pack(extents, tags)

    def _pack_read(self, extents: NDArray[np.uint64]) -> bytes | None:
        """The payload of pages whose tags are read now."""
        started = time.perf_counter()
        tags = self._room[: n_granules_of(extents)]
        self._read(extents, tags)
        n_pages = len(tags) // self._page_granules
        self._note_speed(n_pages, time.perf_counter() - started)
        _, _, n_tagged, _ = loops.scan(tags, self._page_granules)
        if not n_tagged and not self._any_had_tags:
            return None  # as for most of a guest's memory
        self._any_had_tags = True
        return self._pack(extents, tags)

    def _note_speed(self, n_pages: int, seconds: float) -> None:
        self.sent.read_seconds += seconds
        self.sent.read_pages += n_pages
        if self._step_seconds:
            fitting = int(n_pages * self._step_seconds / max(seconds, 1e-6))
            self._step_pages = min(max(fitting, self._least_step_pages), self._most_step_pages)

    def _pack(self, extents: NDArray[np.uint64], tags: NDArray[np.uint8]) -> bytes | None:
        pages = pages_of(extents, self._page_bytes)
        number = self._numbers(pages)
        by_page = tags.reshape(len(pages), -1)
        has_tags = by_page.any(axis=1)
        goes = has_tags | self._had_tags[number]
        self._had_tags[number] = has_tags
        if not goes.any():
            return None
        sent = of_pages(pages[goes], self._page_bytes)
        found = payload.pack(sent, by_page[goes].ravel())
        self.sent.pages += int(goes.sum())
        self.sent.bytes += len(found)
        return found

    def _numbers(self, pages: NDArray[np.int64]) -> NDArray[np.int64]:
        """The places of pages in the arrays that have one for each page of all parts."""
        part = np.searchsorted(self._starts, pages, side="right") - 1
        numbers: NDArray[np.int64] = pages - self._starts[part] + self._bases[part]
        return numbers

    def _read(self, extents: NDArray[np.uint64], tags: NDArray[np.uint8]) -> None:
        try:
            done = self._guest.read_scattered(extents, tags)
            if done == len(tags) * GRANULE_BYTES:
                return
            pages = pages_of(extents, self._page_bytes)[done // self._page_bytes :]
            # What failed in a chain is asked again, and says why.
            extents = of_pages(pages, self._page_bytes)
            self._read(extents, tags[done // GRANULE_BYTES :])
        except OSError as error:
            number, ipa = error.errno or errno.EIO, int(extents[0, 0])
            raise GuestError(
                f"the tags of the page at {ipa:#x} cannot be read: {os.strerror(number)}"
                f" ({errno_name(number)})",
                hint="the guest goes on at the source",
                errno=errno_name(number),
                ipa=ipa,
            ) from error
