"""Where two sources of tags differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Copied, Fill, Step, cut
from mtetool.sources.layout import by_slot, check_aligned, check_inside, common, merged
from mtetool.sources.pieces import constant
from mtetool.sources.source import TagSource, clip
from mtetool.sources.tally import Tally
from mtetool.tags import as_array, differences, runs
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mtetool.flows.row_text import RowText
    from mtetool.tags import Tags

_BLOCK_GRANULES = 1 << 16


class Difference(NamedTuple):
    """Adjacent granules with one tag in A and another in B; None: absent there."""

    ipa: int
    size_bytes: int
    a: int | None
    b: int | None


class _Pair(NamedTuple):
    """A span of addresses as both sides have it; None where a side does not cover it."""

    ipa: int
    size_bytes: int
    a: Step | None
    b: Step | None


def diff(
    a: TagSource, b: TagSource, within: Sequence[Extent] | None = None
) -> Iterator[Difference | Missing]:
    """Yield the ranges where A and B differ or cannot be compared, in order of address.

    Ranges that only one side has are differences (the other side's tag is None); ranges that
    one side has but could not read are Missing. `within` limits both sides.
    """
    last: Difference | None = None
    for found in _differences(_side_by_side(a.read(clip(a, within)), b.read(clip(b, within)))):
        if (
            last is not None
            and isinstance(found, Difference)
            and (found.a, found.b) == (last.a, last.b)
            and last.ipa + last.size_bytes == found.ipa
        ):
            last = Difference(last.ipa, last.size_bytes + found.size_bytes, last.a, last.b)
            continue
        if last is not None:
            yield last
        if isinstance(found, Missing):
            last = None
            yield found
        else:
            last = found
    if last is not None:
        yield last


def diff_text(
    a: TagSource, b: TagSource, text: RowText, within: Sequence[Extent] | None = None
) -> Iterator[memoryview | Difference | Missing]:
    """Yield what `diff` yields; ranges that both sides have as rows of text, many at a time."""
    for pair in _side_by_side(a.read(clip(a, within)), b.read(clip(b, within))):
        ipa, size_bytes, left, right = pair
        if isinstance(left, Copied | Fill) and isinstance(right, Copied | Fill):
            yield from _compared(text, ipa, size_bytes, left, right)
        else:
            yield from text.end(two=True)
            yield from _differences(iter([pair]))
    yield from text.end(two=True)


def _compared(
    text: RowText, ipa: int, size_bytes: int, a: Copied | Fill, b: Copied | Fill
) -> Iterator[memoryview]:
    n_granules = size_bytes // GRANULE_BYTES
    if isinstance(a, Fill) and isinstance(b, Fill):
        yield from text.compare(ipa, bytes([a.tag]), bytes([b.tag]), n_granules)
        return
    left, right = (
        constant(step.tag, n_granules) if isinstance(step, Fill) else step.tags[:n_granules]
        for step in (a, b)
    )
    yield from text.compare(ipa, left, right)


# The row and the column of the tag of memory that a side does not have.
_ABSENT = 16


@dataclass
class Totals:
    """How much differs in some memory, and how.

    `granules[a, b]` counts granules with the tag `a` in A and `b` in B; 16 where the memory is
    absent. Of the diagonal only the sum counts. Ranges are counted as `diff` yields them;
    `missing_bytes` could not be compared.
    """

    granules: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros((_ABSENT + 1, _ABSENT + 1), dtype=np.int64)
    )
    n_ranges: int = 0
    missing_bytes: int = 0

    def _bytes(self, part: NDArray[np.int64]) -> int:
        return int(part.sum()) * GRANULE_BYTES

    @property
    def compared_bytes(self) -> int:
        """Memory that both sides have, and of which both are known."""
        return self._bytes(self.granules[:_ABSENT, :_ABSENT])

    @property
    def differing_bytes(self) -> int:
        """Memory with different tags, or that only one side has."""
        return self._bytes(self.granules) - self._bytes(np.diagonal(self.granules))

    @property
    def tagged_bytes(self) -> int:
        """Memory that is tagged in B only."""
        return self._bytes(self.granules[0, 1:_ABSENT])

    @property
    def untagged_bytes(self) -> int:
        """Memory that is tagged in A only."""
        return self._bytes(self.granules[1:_ABSENT, 0])

    @property
    def retagged_bytes(self) -> int:
        """Memory that is tagged in both, differently."""
        both = self.granules[1:_ABSENT, 1:_ABSENT]
        return self._bytes(both) - self._bytes(np.diagonal(both))

    @property
    def only_a_bytes(self) -> int:
        """Memory that only A has."""
        return self._bytes(self.granules[:_ABSENT, _ABSENT])

    @property
    def only_b_bytes(self) -> int:
        """Memory that only B has."""
        return self._bytes(self.granules[_ABSENT, :_ABSENT])

    def add(self, other: Totals) -> None:
        """Count what `other` counted, too."""
        self.granules += other.granules
        self.n_ranges += other.n_ranges
        self.missing_bytes += other.missing_bytes


@dataclass
class DiffTotals:
    """The totals of all, and of each slot (of A, or of B where A's are unknown)."""

    total: Totals
    slots: list[tuple[Memslot, Totals]]
    missing: Tally[Missing]


def totals(a: TagSource, b: TagSource, within: Sequence[Extent] | None = None) -> DiffTotals:
    """Count what `diff` yields, without a row for each range; ranges end where a slot ends."""
    result = DiffTotals(Totals(), [], Tally())
    slots = list(a.memslots) or list(b.memslots)
    for slot, parts in by_slot(slots, merged([*clip(a, within), *clip(b, within)])):
        counter = _TotalsCounter(result.missing)
        left, right = common(a.extents(), parts), common(b.extents(), parts)
        for pair in _side_by_side(a.read(left), b.read(right)):
            counter.add(pair)
        result.total.add(counter.totals)
        if slot is not None:
            result.slots.append((slot, counter.totals))
    return result


class _TotalsCounter:
    """Counts pairs that come in order of address."""

    def __init__(self, missing: Tally[Missing]) -> None:
        self.totals = Totals()
        self._missing = missing
        # Where the last range that differs ends, and its pair of tags.
        self._end = -1
        self._key = -1

    def add(self, pair: _Pair) -> None:
        ipa, size_bytes, a, b = pair
        missing = a if isinstance(a, Missing) else b if isinstance(b, Missing) else None
        if missing is not None:
            self._missing.add(Missing(ipa, size_bytes, missing.errno, missing.reason))
            self.totals.missing_bytes += size_bytes
            return
        n_granules = size_bytes // GRANULE_BYTES
        if not isinstance(a, Copied) and not isinstance(b, Copied):
            key = _tag(a) * (_ABSENT + 1) + _tag(b)
            self.totals.granules[divmod(key, _ABSENT + 1)] += n_granules
            if _tag(a) != _tag(b):
                self._count_ranges(np.array([0]), np.array([n_granules]), np.array([key]), ipa)
            return
        for block in range(0, n_granules, _BLOCK_GRANULES):
            n_here = min(_BLOCK_GRANULES, n_granules - block)
            tags = [_block(step, block, n_here) for step in (a, b)]
            if tags[0] is not None and tags[1] is not None and np.array_equal(tags[0], tags[1]):
                self.totals.granules[0, 0] += n_here
                continue
            left, right = (
                np.full(n_here, _ABSENT, dtype=np.uint8) if part is None else part for part in tags
            )
            self._add_block(left, right, ipa + block * GRANULE_BYTES)

    def _add_block(self, a: Tags, b: Tags, ipa: int) -> None:
        n_kinds = _ABSENT + 1
        keys = a.astype(np.uint16) * np.uint16(n_kinds) + b
        counts = np.bincount(keys, minlength=n_kinds * n_kinds).reshape(n_kinds, n_kinds)
        self.totals.granules += counts
        if counts.sum() == np.diagonal(counts).sum():
            return
        edges = np.concatenate(([0], np.flatnonzero(keys[1:] != keys[:-1]) + 1))
        lengths = np.diff(edges, append=keys.size)
        differ = a[edges] != b[edges]
        self._count_ranges(edges[differ], lengths[differ], keys[edges[differ]], ipa)

    def _count_ranges(
        self, starts: NDArray[np.intp], lengths: NDArray[np.intp], keys: NDArray[np.int_], ipa: int
    ) -> None:
        """Count ranges, of which the first may continue the last one."""
        joins = ipa + int(starts[0]) * GRANULE_BYTES == self._end and int(keys[0]) == self._key
        self.totals.n_ranges += starts.size - joins
        self._end = ipa + int(starts[-1] + lengths[-1]) * GRANULE_BYTES
        self._key = int(keys[-1])


def _tag(step: Step | None) -> int:
    return step.tag if isinstance(step, Fill) else _ABSENT


def check_ranges(ranges: Sequence[Extent], a: TagSource, b: TagSource) -> None:
    """Raise MisalignedError for parts of granules, RangeError for a range outside both.

    Also raises WouldAllocateError for what `diff` then reads: the ranges, or all if there are none.
    """
    check_aligned(ranges, GRANULE_BYTES, "granule")
    check_inside(ranges, [*a.extents(), *b.extents()], f"{a.name} and {b.name}")
    for source in (a, b):
        source.check(clip(source, ranges or None))


def _differences(pairs: Iterator[_Pair]) -> Iterator[Difference | Missing]:
    for ipa, size_bytes, a, b in pairs:
        missing = a if isinstance(a, Missing) else b if isinstance(b, Missing) else None
        if missing is not None:
            yield Missing(ipa, size_bytes, missing.errno, missing.reason)
            continue
        if not isinstance(a, Copied) and not isinstance(b, Copied):
            tag_a, tag_b = (step.tag if isinstance(step, Fill) else None for step in (a, b))
            if tag_a != tag_b:
                yield Difference(ipa, size_bytes, tag_a, tag_b)
            continue
        n_granules = size_bytes // GRANULE_BYTES
        for block in range(0, n_granules, _BLOCK_GRANULES):
            at = ipa + block * GRANULE_BYTES
            n_here = min(_BLOCK_GRANULES, n_granules - block)
            tags_a, tags_b = _block(a, block, n_here), _block(b, block, n_here)
            if tags_a is not None and tags_b is not None:
                yield from _both(at, tags_a, tags_b)
            elif tags_a is not None:
                yield from _alone(at, tags_a, in_a=True)
            elif tags_b is not None:
                yield from _alone(at, tags_b, in_a=False)


def _block(step: Step | None, first: int, n_granules: int) -> Tags | None:
    if isinstance(step, Fill):
        return np.full(n_granules, step.tag, dtype=np.uint8)
    if isinstance(step, Copied):
        return as_array(step.tags[first : first + n_granules])
    return None


def _both(ipa: int, a: Tags, b: Tags) -> Iterator[Difference]:
    indices = differences(a, b)
    if not indices.size:
        return
    keys = a[indices] << np.uint8(4) | b[indices]
    breaks = np.flatnonzero((np.diff(indices) > 1) | (keys[1:] != keys[:-1])) + 1
    firsts = np.concatenate(([0], breaks))
    lengths = np.diff(firsts, append=indices.size)
    rows = zip(indices[firsts].tolist(), lengths.tolist(), keys[firsts].tolist(), strict=True)
    for start, length, key in rows:
        yield Difference(ipa + start * GRANULE_BYTES, length * GRANULE_BYTES, key >> 4, key & 15)


def _alone(ipa: int, tags: Tags, *, in_a: bool) -> Iterator[Difference]:
    starts, lengths, values = runs(tags)
    for start, length, tag in zip(starts.tolist(), lengths.tolist(), values.tolist(), strict=True):
        at, size_bytes = ipa + start * GRANULE_BYTES, length * GRANULE_BYTES
        yield Difference(at, size_bytes, tag if in_a else None, None if in_a else tag)


def _side_by_side(a: Iterator[Step], b: Iterator[Step]) -> Iterator[_Pair]:
    """Cut two ascending streams so that each side covers a span entirely or not at all."""
    left, right = next(a, None), next(b, None)
    while left is not None or right is not None:
        start = min(step.ipa for step in (left, right) if step is not None)
        edges = [
            edge
            for step in (left, right)
            if step is not None
            for edge in (step.ipa, step.ipa + step.size_bytes)
            if edge > start
        ]
        size_bytes = min(edges) - start
        yield _Pair(
            start,
            size_bytes,
            left if left is not None and left.ipa == start else None,
            right if right is not None and right.ipa == start else None,
        )
        left = _behind(left, start + size_bytes, a)
        right = _behind(right, start + size_bytes, b)


def _behind(step: Step | None, ipa: int, rest: Iterator[Step]) -> Step | None:
    """Return what is left of a step from `ipa` on, or the next step."""
    if step is None or step.ipa >= ipa:
        return step
    left_bytes = step.ipa + step.size_bytes - ipa
    if left_bytes == 0:
        return next(rest, None)
    return cut(step, ipa, left_bytes)
