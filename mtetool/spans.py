"""Ranges of addresses of a process or a guest, by their two ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A range of addresses: the first one, and the first one after it."""

    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        """The length of the range."""
        return self.end - self.start


class Place(NamedTuple):
    """A range of guest memory, and where it is in the VMM's own memory."""

    ipa: int
    size_bytes: int
    address: int

    @property
    def end(self) -> int:
        """The first guest address after the range."""
        return self.ipa + self.size_bytes

    @property
    def shift(self) -> int:
        """The difference between the VMM's address and the guest's."""
        return self.address - self.ipa


def united(one: Iterator[Span], other: Iterator[Span]) -> Iterator[Span]:
    """The union of both, in order of address, without overlaps."""
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
