"""Where two sources of tags differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill, Step, cut
from mtetool.sources.layout import check_aligned, check_inside
from mtetool.sources.source import TagSource, clip
from mtetool.tags import as_array, differences, runs
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
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
