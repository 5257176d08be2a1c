"""A map of memory: cells of many granules, each with the tags that are in it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtetool.errors import UsageError
from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied
from mtetool.sources.layout import total_bytes
from mtetool.sources.source import TagSource
from mtetool.tags import as_array
from mtetool.uapi import GRANULE_BYTES
from mtetool.words import counted

SMALLEST_CELL_BYTES = 4096
MISSING = 16
"""The column of `TagMap.counts` for granules whose tags are missing."""

SHADES = 4
"""How many steps of a colour say how much of a cell has a tag."""

_MOST_EXTENTS = 256
_COLUMNS = 17
_BLOCK_GRANULES = 1 << 20


@dataclass
class TagMap:
    """Cells over extents, in order of address; the first of each extent begins where it does.

    `counts` has a row for each cell: the granules with each tag, and those that are missing.
    `cell_bytes` is a power of two.
    """

    extents: Sequence[Extent]
    cell_bytes: int
    counts: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.firsts = [0]
        for extent in self.extents:
            self.firsts.append(self.firsts[-1] + _cells_of(extent, self.cell_bytes))
        self.counts = np.zeros((self.firsts[-1], _COLUMNS), dtype=np.int64)
        self._starts = [extent.ipa for extent in self.extents]

    @property
    def n_cells(self) -> int:
        """How many cells there are."""
        return self.firsts[-1]

    def cell_at(self, ipa: int) -> int:
        """The cell of an address of the extents."""
        index = bisect_right(self._starts, ipa) - 1
        return self.firsts[index] + (ipa - self._starts[index]) // self.cell_bytes

    def spread(self, ipa: int, size_bytes: int) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """The cells of a range within one extent, and how many granules of it are in each."""
        start = self._starts[bisect_right(self._starts, ipa) - 1]
        first, last = self.cell_at(ipa), self.cell_at(ipa + size_bytes - 1)
        per_cell = np.full(last - first + 1, self.cell_bytes // GRANULE_BYTES, dtype=np.int64)
        per_cell[0] -= (ipa - start) % self.cell_bytes // GRANULE_BYTES
        after = -(ipa + size_bytes - start) % self.cell_bytes
        per_cell[-1] -= after // GRANULE_BYTES
        yield slice(first, last + 1), per_cell

    def within(self, part: Extent) -> Iterator[Extent]:
        """A range of the map, cut where its extents end: they may touch."""
        index = bisect_right(self._starts, part.ipa) - 1
        at = part.ipa
        while at < part.end:
            stop = min(part.end, self.extents[index].end)
            yield Extent.between(at, stop)
            at, index = stop, index + 1

    def add(self, ipa: int, size_bytes: int, tag: int) -> None:
        """Count a range of one tag, or of missing ones."""
        for cells, granules in self.spread(ipa, size_bytes):
            self.counts[cells, tag] += granules

    def add_tags(self, ipa: int, tags: Any) -> None:
        """Count tags, one byte each."""
        array = as_array(tags)
        for at in range(0, array.size, _BLOCK_GRANULES):
            block = array[at : at + _BLOCK_GRANULES]
            ((cells, granules),) = self.spread(ipa + at * GRANULE_BYTES, block.size * GRANULE_BYTES)
            keys = np.repeat(np.arange(granules.size, dtype=np.int64), granules) * _COLUMNS + block
            found = np.bincount(keys, minlength=granules.size * _COLUMNS)
            self.counts[cells] += found.reshape(-1, _COLUMNS)

    def codes(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """For each cell its most frequent tag (0 only without any), or MISSING; and a shade.

        The shade, 1 to SHADES, is how much of the cell has a tag; 0 where none has.
        """
        tagged = self.counts[:, 1:MISSING]
        sums = tagged.sum(axis=1)
        codes = np.where(sums > 0, tagged.argmax(axis=1) + 1, 0)
        known = sums + self.counts[:, 0]
        codes[known == 0] = MISSING
        shades = np.ceil(sums * SHADES / np.maximum(known, 1))
        return codes.astype(np.uint8), shades.astype(np.uint8)

    def histogram(self) -> NDArray[np.int64]:
        """The granules with each tag, and those that are missing."""
        result: NDArray[np.int64] = self.counts.sum(axis=0)
        return result


def cell_bytes_for(extents: Sequence[Extent], most_cells: int) -> int:
    """The smallest size of a cell with which a map has at most so many, where that is possible."""
    size = SMALLEST_CELL_BYTES
    # A cell for each extent is the least.
    while total_bytes(extents) // size + len(extents) > max(most_cells, 2 * len(extents)):
        size *= 2
    return size


def tag_map(source: TagSource, extents: Sequence[Extent], most_cells: int) -> TagMap:
    """Read extents into a map of at most so many cells, or of two for each extent.

    Raises UsageError for more extents than anybody can look at.
    """
    if len(extents) > _MOST_EXTENTS:
        raise UsageError(
            f"{source.name} has {counted(len(extents), 'separate range')} of memory, and a map can"
            f" show {_MOST_EXTENTS}",
            hint="choose some: --range IPA:SIZE",
        )
    found = TagMap(extents, cell_bytes_for(extents, most_cells))
    for extent in extents:
        for step in source.read([extent]):
            if isinstance(step, Copied):
                found.add_tags(step.ipa, step.tags)
            else:
                code = MISSING if isinstance(step, Missing) else step.tag
                found.add(step.ipa, step.size_bytes, code)
    return found


def _cells_of(extent: Extent, cell_bytes: int) -> int:
    return -(-extent.size_bytes // cell_bytes)
