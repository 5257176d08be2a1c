"""Tags as rows to read: runs of equal tags, single granules, or bare bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.pieces import constant
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.tags import as_array, runs
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Wanted = NDArray[np.bool_]

RAW_MISSING = 0xFF
"""The byte for a granule whose tag could not be read: not a tag, as tags end at 15."""

# Granules to turn into rows at once: rows take 50 times the memory of tags.
_BLOCK_GRANULES = 1 << 16


OUTSIDE = 0xFE
"""In a `Line`, a granule that was not asked for."""


class Run(NamedTuple):
    """Adjacent granules that have the same tag."""

    ipa: int
    size_bytes: int
    tag: int


class Line(NamedTuple):
    """Granules side by side, a byte each: its tag, RAW_MISSING or OUTSIDE; that many equal lines.

    The address of the first is a multiple of the line's length.
    """

    ipa: int
    cells: bytes
    n_lines: int = 1


def wanted_tags(tags: Sequence[int], *, only_tagged: bool) -> Wanted | None:
    """For each of the 16 tags, whether its rows are wanted; None where all are."""
    if not tags and not only_tagged:
        return None
    wanted = np.isin(np.arange(16), tags) if tags else np.ones(16, dtype=np.bool_)
    if only_tagged:
        wanted[0] = False
    return wanted


def tag_runs(
    source: TagSource, extents: Sequence[Extent], wanted: Wanted | None = None
) -> Iterator[Run | Missing]:
    """Yield maximal runs of equal tags, and ranges that cannot be read, in order of address.

    Only runs of `wanted` tags, see `wanted_tags`.
    """
    last: Run | None = None
    for step in source.read(extents):
        if isinstance(step, Missing):
            if last:
                yield last
            last = None
            yield step
            continue
        for run in _runs_of(step, wanted):
            if last and last.tag == run.tag and last.ipa + last.size_bytes == run.ipa:
                last = Run(last.ipa, last.size_bytes + run.size_bytes, run.tag)
                continue
            if last:
                yield last
            last = run
    if last:
        yield last


def _runs_of(step: Copied | Fill, wanted: Wanted | None) -> Iterator[Run]:
    if isinstance(step, Fill):
        if wanted is None or wanted[step.tag]:
            yield Run(step.ipa, step.size_bytes, step.tag)
        return
    for block in range(0, len(step.tags), _BLOCK_GRANULES):
        ipa = step.ipa + block * GRANULE_BYTES
        starts, lengths, tags = runs(as_array(step.tags[block : block + _BLOCK_GRANULES]))
        if wanted is not None:
            keep = wanted[tags]
            starts, lengths, tags = starts[keep], lengths[keep], tags[keep]
        for start, length, tag in zip(
            starts.tolist(), lengths.tolist(), tags.tolist(), strict=True
        ):
            yield Run(ipa + start * GRANULE_BYTES, length * GRANULE_BYTES, tag)


def granules(
    source: TagSource, extents: Sequence[Extent], wanted: Wanted | None = None
) -> Iterator[Run | Missing]:
    """Yield each granule on its own, and ranges that cannot be read, in order of address.

    Only granules with `wanted` tags, see `wanted_tags`.
    """
    for step in source.read(extents):
        if isinstance(step, Missing):
            yield step
            continue
        for run in _runs_of(step, wanted):
            for ipa in range(run.ipa, run.ipa + run.size_bytes, GRANULE_BYTES):
                yield Run(ipa, GRANULE_BYTES, run.tag)


def lines(
    source: TagSource, extents: Sequence[Extent], n_granules: int, missing: Tally[Missing]
) -> Iterator[Line]:
    """Yield lines of `n_granules`, in order of address; add what cannot be read to `missing`."""
    open_line: _OpenLine | None = None
    length_bytes = n_granules * GRANULE_BYTES
    for step in source.read(extents):
        if isinstance(step, Missing):
            missing.add(step)
        at, end = step.ipa, step.ipa + step.size_bytes
        while at < end:
            start = at // length_bytes * length_bytes
            if open_line is None or open_line.ipa != start:
                if open_line is not None:
                    yield open_line.line()
                open_line = _OpenLine(start, bytearray([OUTSIDE]) * n_granules)
            stop = min(start + length_bytes, end)
            open_line.put(at, _cells(step, at, stop))
            at = stop
            n_lines = (end - at) // length_bytes
            if n_lines and at == start + length_bytes and not isinstance(step, Copied):
                # A range with one tag can be a terabyte long.
                yield open_line.line()
                open_line = None
                yield Line(at, _cells(step, at, at + length_bytes), n_lines)
                at += n_lines * length_bytes
    if open_line is not None:
        yield open_line.line()


class _OpenLine(NamedTuple):
    ipa: int
    cells: bytearray

    def put(self, ipa: int, cells: bytes) -> None:
        first = (ipa - self.ipa) // GRANULE_BYTES
        self.cells[first : first + len(cells)] = cells

    def line(self) -> Line:
        return Line(self.ipa, bytes(self.cells))


def _cells(step: Copied | Fill | Missing, at: int, stop: int) -> bytes:
    n_granules = (stop - at) // GRANULE_BYTES
    if isinstance(step, Copied):
        first = (at - step.ipa) // GRANULE_BYTES
        return bytes(step.tags[first : first + n_granules])
    return bytes([RAW_MISSING if isinstance(step, Missing) else step.tag]) * n_granules


def write_raw(source: TagSource, extents: Sequence[Extent], out: BinaryIO) -> Tally[Missing]:
    """Write one byte per granule, RAW_MISSING where it cannot be read; return those ranges."""
    missing: Tally[Missing] = Tally()
    for step in source.read(extents):
        if isinstance(step, Copied):
            out.write(step.tags)
            continue
        if isinstance(step, Missing):
            missing.add(step)
        filler = constant(RAW_MISSING if isinstance(step, Missing) else step.tag, _BLOCK_GRANULES)
        left = step.size_bytes // GRANULE_BYTES
        while left:
            left -= out.write(filler[: min(left, _BLOCK_GRANULES)])
    return missing
