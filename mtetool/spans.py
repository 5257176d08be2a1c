"""Ranges of addresses by their two ends, of a process or of a guest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A range of addresses: the first one, and the first one after it."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """How long it is."""
        return self.end - self.start


class Place(NamedTuple):
    """Memory of a guest, and where it is in the VMM's own."""

    ipa: int
    size_bytes: int
    address: int

    @property
    def end(self) -> int:
        """The first guest address after it."""
        return self.ipa + self.size_bytes

    @property
    def shift(self) -> int:
        """From an address of the guest to the VMM's."""
        return self.address - self.ipa


def united(one: Iterator[Span], other: Iterator[Span]) -> Iterator[Span]:
    """Both, in order of address, none twice."""
    sides = [one, other]
    heads = [next(side, None) for side in sides]
    done = 0
    while any(heads):
        _, which = min((head, n) for n, head in enumerate(heads) if head is not None)
        head = heads[which]
        assert head is not None
        start = max(head.start, done)
        if start < head.end:
            yield Span(start, head.end)
            done = head.end
        heads[which] = next(sides[which], None)
