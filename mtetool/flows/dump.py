"""Tags as rows to read: runs of equal tags, single granules, or bare bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.pieces import constant
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.tags import as_array, runs
from mtetool.uapi import GRANULE_BYTES

RAW_MISSING = 0xFF
"""The byte for a granule whose tag could not be read: not a tag, as tags end at 15."""

# Granules to turn into rows at once: rows take 50 times the memory of tags.
_BLOCK_GRANULES = 1 << 16


class Run(NamedTuple):
    """Adjacent granules that have the same tag."""

    ipa: int
    size_bytes: int
    tag: int


def tag_runs(source: TagSource, extents: Sequence[Extent]) -> Iterator[Run | Missing]:
    """Yield maximal runs of equal tags, and ranges that cannot be read, in order of address."""
    last: Run | None = None
    for step in source.read(extents):
        if isinstance(step, Missing):
            if last:
                yield last
            last = None
            yield step
            continue
        for run in _runs_of(step):
            if last and last.tag == run.tag and last.ipa + last.size_bytes == run.ipa:
                last = Run(last.ipa, last.size_bytes + run.size_bytes, run.tag)
                continue
            if last:
                yield last
            last = run
    if last:
        yield last


def _runs_of(step: Copied | Fill) -> Iterator[Run]:
    if isinstance(step, Fill):
        yield Run(step.ipa, step.size_bytes, step.tag)
        return
    for block in range(0, len(step.tags), _BLOCK_GRANULES):
        ipa = step.ipa + block * GRANULE_BYTES
        starts, lengths, tags = runs(as_array(step.tags[block : block + _BLOCK_GRANULES]))
        for start, length, tag in zip(
            starts.tolist(), lengths.tolist(), tags.tolist(), strict=True
        ):
            yield Run(ipa + start * GRANULE_BYTES, length * GRANULE_BYTES, tag)


def granules(source: TagSource, extents: Sequence[Extent]) -> Iterator[Run | Missing]:
    """Yield each granule on its own, and ranges that cannot be read, in order of address."""
    for step in source.read(extents):
        if isinstance(step, Missing):
            yield step
            continue
        if isinstance(step, Fill):
            for ipa in range(step.ipa, step.ipa + step.size_bytes, GRANULE_BYTES):
                yield Run(ipa, GRANULE_BYTES, step.tag)
            continue
        for block in range(0, len(step.tags), _BLOCK_GRANULES):
            ipa = step.ipa + block * GRANULE_BYTES
            for tag in step.tags[block : block + _BLOCK_GRANULES].tolist():
                yield Run(ipa, GRANULE_BYTES, tag)
                ipa += GRANULE_BYTES


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
