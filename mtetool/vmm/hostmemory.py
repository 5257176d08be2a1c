"""Where in a VMM's process the memory of its guest is, and which of it exists."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from mtetool.guest import Extent
from mtetool.vmm.pagemap import Pagemap, united


class HostMemory:
    """Where in a VMM's process the memory of its guest is: (ipa, size, address) of each slot.

    Where several are told for some memory, it is one of them, nobody knows which.
    """

    def __init__(self, pagemap: Pagemap, where: Sequence[tuple[int, int, int]]) -> None:
        self._pagemap = pagemap
        self._where = sorted(where)
        ends = {end for ipa, size, _ in where for end in (ipa, ipa + size)}
        self._ends = sorted(ends)

    def existing(self, extent: Extent) -> Iterator[Extent]:
        """The parts of guest memory whose pages exist, or of which that is unknown.

        In order, no two of them touching.
        """
        start = stop = extent.ipa
        for first, behind in self._parts(extent.ipa, extent.end):
            if first > stop:
                if stop > start:
                    yield Extent.between(start, stop)
                start = first
            stop = behind
        if stop > start:
            yield Extent.between(start, stop)

    def addresses(self) -> list[tuple[int, int]]:
        """All ranges (start, end) of addresses that were told."""
        return [(address, address + size_bytes) for _, size_bytes, address in self._where]

    def told(self, ipa: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
        """(start, end, addresses) of each part of a range: where its start may be, if told."""
        inside = [at for at in self._ends if ipa < at < end]
        for at, stop in itertools.pairwise([ipa, *inside, end]):
            if at < stop:
                found = {
                    at - slot + address
                    for slot, size_bytes, address in self._where
                    if slot <= at and stop <= slot + size_bytes
                }
                yield at, stop, sorted(found)

    def existing_at(self, start: int, end: int) -> int:
        """How many bytes of a range of addresses exist."""
        return sum(stop - first for first, stop in self._pagemap.existing(start, end))

    def _parts(self, ipa: int, end: int) -> Iterator[tuple[int, int]]:
        for at, stop, addresses in self.told(ipa, end):
            yield from self._part(at, stop, {at - address for address in addresses})

    def _part(self, ipa: int, end: int, shifts: set[int]) -> Iterator[tuple[int, int]]:
        if not shifts:
            return iter([(ipa, end)])
        return functools.reduce(united, (self._at(ipa, end, shift) for shift in shifts))

    def _at(self, ipa: int, end: int, shift: int) -> Iterator[tuple[int, int]]:
        for first, behind in self._pagemap.existing(ipa - shift, end - shift):
            yield first + shift, behind + shift

    def close(self) -> None:
        """Let go of the process. Idempotent."""
        self._pagemap.close()
