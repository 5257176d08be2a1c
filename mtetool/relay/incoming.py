"""The destination's tags: written as they come, and read back."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtetool.errors import GuestError, errno_name
from mtetool.extents import of_pages, pages_of
from mtetool.guest import Missing
from mtetool.relay import payload
from mtetool.sources.around import raise_for_whole_vm
from mtetool.sources.copying import Copied, TagReader
from mtetool.sources.layout import Layout
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from mtetool.guest import Extent, Guest
    from mtetool.tags import Tags


@dataclass(slots=True)
class Applied:
    """What is in place so far."""

    frames: int = 0
    pages: int = 0
    """Pages of the sender's, written and read back."""
    write_seconds: float = 0.0


class Incoming:
    """Writes the tags of one frame after another; one thread at a time may use it.

    The sender's pages have `peer_page_bytes`. Nothing outside of `memory` is written. `otherwise`
    says what a failure means for the guest.
    """

    def __init__(
        self,
        guest: Guest,
        memory: Sequence[Extent],
        peer_page_bytes: int,
        *,
        otherwise: str = "the guest goes on at the source",
    ) -> None:
        self._guest = guest
        self._memory = memory
        self._peer_page_bytes = peer_page_bytes
        self._otherwise = otherwise
        self.applied = Applied()

    def clear(self) -> int:
        """Take away all tags that are there before the first frame; return of how many pages.

        A source does not send pages that never had tags, and a QEMU that survived a failed attempt
        has the tags of that one. Raises GuestError.
        """
        page = self._guest.page_size_bytes
        granules = page // GRANULE_BYTES
        reader = TagReader(
            self._guest, Layout((), page), chunk_granules=max(payload.MOST_GRANULES, granules)
        )
        n_cleared = 0
        for step in reader.read(self._memory):
            if isinstance(step, Missing):
                raise GuestError(
                    f"the tags of the page at {step.ipa:#x} cannot be read: {step.reason}",
                    hint=self._otherwise,
                    ipa=step.ipa,
                )
            if isinstance(step, Copied):
                tags = np.frombuffer(step.tags, np.uint8).reshape(-1, granules)
                tagged = np.flatnonzero(tags.any(axis=1)).astype(np.int64) + step.ipa // page
                self._write(tagged, np.zeros(len(tagged) * granules, np.uint8))
                n_cleared += len(tagged)
        return n_cleared

    def apply(self, received: bytes | bytearray) -> None:
        """Write the tags of a TAGS frame, and read them back.

        Raises RelayPeerError for a payload that makes no sense, GuestError if not all tags are in
        place afterwards.
        """
        started = time.perf_counter()
        extents, tags = payload.unpack(received, self._peer_page_bytes)
        payload.check_inside(extents, self._memory)
        pages = pages_of(extents, self._peer_page_bytes)
        n_pages = len(pages)
        page = self._guest.page_size_bytes
        if page > self._peer_page_bytes:
            pages, tags = self._widened(pages, tags)
        elif page < self._peer_page_bytes:
            pages = pages_of(extents, page)
        self._write(pages, tags)
        self.applied.frames += 1
        self.applied.pages += n_pages
        self.applied.write_seconds += time.perf_counter() - started

    def _widened(self, pages: NDArray[np.int64], tags: Tags) -> tuple[NDArray[np.int64], Tags]:
        """The larger pages of this host around them, with the tags that it has for the rest."""
        ratio = self._guest.page_size_bytes // self._peer_page_bytes
        large, place = np.unique(pages // ratio, return_inverse=True)
        granules = self._peer_page_bytes // GRANULE_BYTES
        room = np.empty((len(large), ratio, granules), np.uint8)
        flat = room.reshape(-1)
        done = 0
        while done < len(large):
            part = flat[done * ratio * granules :]
            done += self._copy(large[done:], part, writing=False)
        room[place, pages % ratio] = tags.reshape(-1, granules)
        return large, flat

    def _write(self, pages: NDArray[np.int64], tags: Tags) -> None:
        granules = self._guest.page_size_bytes // GRANULE_BYTES
        # A chain of writes has half the room of one of reads.
        most = max(payload.MOST_GRANULES // granules, 1)
        done = 0
        while done < len(pages):
            part = pages[done : done + most]
            part_tags = tags[done * granules : (done + len(part)) * granules]
            completed = self._copy(part, part_tags, writing=True)
            if not completed:
                ipa = int(part[0]) * self._guest.page_size_bytes
                raise GuestError(
                    f"the page at {ipa:#x} does not have the tags that were written to it",
                    hint="check whether something else runs or changes the guest at the"
                    " destination; it was not started",
                    ipa=ipa,
                )
            done += completed

    def _copy(self, pages: NDArray[np.int64], tags: Tags, *, writing: bool) -> int:
        """Copy the tags of pages; return how many of them, at least one unless a write differs."""
        page = self._guest.page_size_bytes
        extents = of_pages(pages, page)
        try:
            if writing:
                return self._guest.write_scattered(extents, tags) // page
            return self._guest.read_scattered(extents, tags) // page
        except OSError as error:
            number, ipa = error.errno or errno.EIO, int(extents[0, 0])
            raise_for_whole_vm(number, ipa, writing=writing)
            raise GuestError(
                f"the tags of the page at {ipa:#x} cannot be {'written' if writing else 'read'} at"
                f" the destination: {os.strerror(number)} ({errno_name(number)})",
                hint=self._otherwise,
                errno=errno_name(number),
                ipa=ipa,
            ) from error
