"""Which pages of the scope the records cover, and which are missing in the end."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace

from mtetool.guest import Extent, Missing

MAX_FRAGMENTS = 1 << 18
"""The most separate ranges that are tracked: bounds memory and time for hostile files."""

_SORT_AT = 1 << 16


class ScatteredError(ValueError):
    """A snapshot covers more separate ranges than are tracked."""


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses as ascending pairs (start, end) that neither overlap nor touch."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            if end > result[-1][1]:
                result[-1] = (result[-1][0], end)
        else:
            result.append((start, end))
    return result


class Coverage:
    """Collects ranges in any order, to find in the end which pages were left out.

    Ranges that follow each other are joined at once; others are sorted now and then, so even a
    hostile order costs n log n.
    """

    def __init__(self, scope: Iterable[Extent]) -> None:
        self._scope = _merged((extent.ipa, extent.end) for extent in scope)
        self._starts = [start for start, _ in self._scope]
        self._ranges: list[tuple[int, int]] = []
        self._sort_at = _SORT_AT

    def holds(self, start: int, end: int) -> bool:
        """Whether a range is inside the scope."""
        index = bisect_right(self._starts, start) - 1
        return index >= 0 and end <= self._scope[index][1]

    def add(self, start: int, end: int) -> None:
        """Add a range that a record covers. Raises ScatteredError."""
        if self._ranges and self._ranges[-1][1] == start:
            self._ranges[-1] = (self._ranges[-1][0], end)
            return
        self._ranges.append((start, end))
        if len(self._ranges) > self._sort_at:
            self._ranges = _merged(self._ranges)
            if len(self._ranges) > MAX_FRAGMENTS:
                raise ScatteredError(f"more than {MAX_FRAGMENTS} separate ranges")
            self._sort_at = max(_SORT_AT, 2 * len(self._ranges))

    def first_gap(self) -> tuple[int, int] | None:
        """The first (start, end) of the scope that no record covers; None if complete."""
        self._ranges = _merged(self._ranges)
        at = 0
        for start, end in self._scope:
            while at < len(self._ranges) and self._ranges[at][1] <= start:
                at += 1
            behind = at
            if at < len(self._ranges) and self._ranges[at][0] <= start:
                start = self._ranges[at][1]
                behind += 1
            # Ranges neither overlap nor touch by now: between any two there is a gap.
            if start < end:
                more = self._ranges[behind : behind + 1]
                return start, min(end, more[0][0]) if more else end
        return None


class MissingMap:
    """The missing ranges, as later records add to them and take from them."""

    def __init__(self) -> None:
        self._items: list[Missing] = []
        self._starts: list[int] = []

    def add(self, missing: Missing) -> None:
        """Add a range that is missing. Raises ScatteredError."""
        at = self._cut(missing.ipa, missing.end)
        if at and _continues(self._items[at - 1], missing):
            before = self._items[at - 1]
            size_bytes = before.size_bytes + missing.size_bytes
            self._items[at - 1] = replace(before, size_bytes=size_bytes)
            return
        if len(self._items) >= MAX_FRAGMENTS:
            raise ScatteredError(f"more than {MAX_FRAGMENTS} separate missing ranges")
        self._items.insert(at, missing)
        self._starts.insert(at, missing.ipa)

    def remove(self, start: int, end: int) -> None:
        """Remove a range that has tags now. Raises ScatteredError."""
        self._cut(start, end)

    def _cut(self, start: int, end: int) -> int:
        """Take a range out; return the place in the list where it was."""
        if not self._items or self._items[-1].end <= start:
            return len(self._items)
        low = bisect_right(self._starts, start)
        if low and self._items[low - 1].end > start:
            low -= 1
        high = low
        while high < len(self._items) and self._items[high].ipa < end:
            high += 1
        kept: list[Missing] = []
        place = low
        if high > low:
            first, last = self._items[low], self._items[high - 1]
            if first.ipa < start:
                kept.append(replace(first, size_bytes=start - first.ipa))
                place += 1
            if last.end > end:
                kept.append(replace(last, ipa=end, size_bytes=last.end - end))
            if len(self._items) - (high - low) + len(kept) > MAX_FRAGMENTS:
                raise ScatteredError(f"more than {MAX_FRAGMENTS} separate missing ranges")
            self._items[low:high] = kept
            self._starts[low:high] = [item.ipa for item in kept]
        return place

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory that are missing."""
        return sum(item.size_bytes for item in self._items)

    def ranges(self) -> tuple[Missing, ...]:
        """The missing ranges, ascending; neighbours with one cause are joined."""
        return tuple(_joined(self._items))


def _continues(before: Missing, after: Missing) -> bool:
    same = (before.errno, before.reason) == (after.errno, after.reason)
    return same and before.end == after.ipa


def _joined(items: Iterable[Missing]) -> Iterator[Missing]:
    last: Missing | None = None
    for item in items:
        if last is not None and _continues(last, item):
            last = replace(last, size_bytes=last.size_bytes + item.size_bytes)
            continue
        if last is not None:
            yield last
        last = item
    if last is not None:
        yield last
