"""Where guest memory is in the VMM's process, and which of it exists."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

from mtetool.guest import Extent
from mtetool.spans import Place, Span, united
from mtetool.vmm.pagemap import Pagemap


class HostMemory:
    """Where guest memory is in the VMM's process.

    If several places are given for some memory, it is in one of them; which one is unknown.
    """

    def __init__(self, pagemap: Pagemap, where: Sequence[Place]) -> None:
        self._pagemap = pagemap
        self._where = sorted(where)
        ends = {end for place in where for end in (place.ipa, place.end)}
        self._ends = sorted(ends)

    def with_place(self, place: Place) -> HostMemory:
        """The same with another place, which must not overlap those that are known."""
        return HostMemory(self._pagemap, [*self._where, place])

    def existing(self, extent: Extent) -> Iterator[Extent]:
        """The parts of guest memory whose pages exist or may exist.

        In order; no two of them touch.
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

    def addresses(self) -> list[Span]:
        """All ranges of addresses that were given."""
        return [Span(each.address, each.address + each.size_bytes) for each in self._where]

    def told(self, ipa: int, end: int) -> Iterator[tuple[int, int, list[int]]]:
        """(start, end, addresses) of each part of a range: where its start may be, if given."""
        inside = [at for at in self._ends if ipa < at < end]
        for at, stop in itertools.pairwise([ipa, *inside, end]):
            if at < stop:
                found = {
                    at + place.shift
                    for place in self._where
                    if place.ipa <= at and stop <= place.end
                }
                yield at, stop, sorted(found)

    def has_pages(self, start: int, end: int) -> bool:
        """Whether all of a range of addresses exists, as far as that is known."""
        return self._pagemap.has_pages(start, end)

    def existing_at(self, start: int, end: int) -> int:
        """How many bytes of a range of addresses exist."""
        return sum(part.size_bytes for part in self._pagemap.existing(start, end))

    def _parts(self, ipa: int, end: int) -> Iterator[Span]:
        for at, stop, addresses in self.told(ipa, end):
            yield from self._part(at, stop, {at - address for address in addresses})

    def _part(self, ipa: int, end: int, shifts: set[int]) -> Iterator[Span]:
        if not shifts:
            return iter([Span(ipa, end)])
        return functools.reduce(united, (self._at(ipa, end, shift) for shift in shifts))

    def _at(self, ipa: int, end: int, shift: int) -> Iterator[Span]:
        for first, behind in self._pagemap.existing(ipa - shift, end - shift):
            yield Span(first + shift, behind + shift)
