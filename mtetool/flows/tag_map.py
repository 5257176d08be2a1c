"""A map of memory: how much of it is tagged, in cells of whole pages, at a chosen scale."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Fill, Step
from mtetool.sources.layout import merged
from mtetool.tags import as_array
from mtetool.uapi import GRANULE_BYTES


class Cell(NamedTuple):
    """What is known of the memory of a cell, in granules: all of it, tagged, and unreadable."""

    n_granules: int
    tagged: int
    missing: int


class Row(NamedTuple):
    """Cells from an address on; None where there is no memory."""

    ipa: int
    cells: list[Cell | None]


def cell_size(extents: Sequence[Extent], page_bytes: int, columns: int, lines: int) -> int:
    """The smallest cell, a power of two and at least a page, with which the map fits.

    Where even the largest does not (more separate ranges than lines), it is the first that does
    best.
    """
    sizes = [page_bytes << n for n in range(64) if page_bytes << n <= 1 << 60]
    n_rows = [len(_starts(extents, size, columns)) for size in sizes]
    fitting = [size for size, n in zip(sizes, n_rows, strict=True) if n <= lines]
    return fitting[0] if fitting else sizes[n_rows.index(min(n_rows))]


def _starts(extents: Sequence[Extent], cell_bytes: int, columns: int) -> range | list[int]:
    """Where rows begin, in cells; a row begins at the first memory that is not in the last."""
    starts: list[int] = []
    end = 0
    for extent in merged(extents):
        first, last = extent.ipa // cell_bytes, (extent.end - 1) // cell_bytes
        first = max(first, end)
        if last < first:
            continue
        n_rows = (last - first) // columns + 1
        if n_rows > 1 << 16:
            return range(1 << 16)  # far too many, whatever else comes
        starts += range(first, last + 1, columns)
        end = starts[-1] + columns
    return starts


class TagMap:
    """A map that is drawn from steps in order of address."""

    def __init__(self, extents: Sequence[Extent], cell_bytes: int, columns: int) -> None:
        self.cell_bytes = cell_bytes
        self.columns = columns
        self._starts = list(_starts(extents, cell_bytes, columns))
        n_cells = len(self._starts) * columns
        # A row for each cell: granules, tagged ones, unreadable ones.
        self._cells = np.zeros((n_cells, 3), dtype=np.int64)
        self._row = 0

    def add(self, step: Step) -> None:
        """Count a step's granules in its cells."""
        at, end = step.ipa, step.ipa + step.size_bytes
        while at < end:
            number = at // self.cell_bytes
            stop = min((number + 1) * self.cell_bytes, end)
            self._cells[self._index(number)] += self._counted(step, at, stop)
            at = stop

    def _counted(self, step: Step, at: int, stop: int) -> tuple[int, int, int]:
        n_granules = (stop - at) // GRANULE_BYTES
        if isinstance(step, Missing):
            return n_granules, 0, n_granules
        if isinstance(step, Fill):
            return n_granules, n_granules if step.tag else 0, 0
        first = (at - step.ipa) // GRANULE_BYTES
        tags = as_array(step.tags[first : first + n_granules])
        return n_granules, int(np.count_nonzero(tags)), 0

    def _index(self, number: int) -> int:
        """Where a cell of a row is; rows come in order."""
        while self._row + 1 < len(self._starts) and self._starts[self._row + 1] <= number:
            self._row += 1
        return self._row * self.columns + number - self._starts[self._row]

    def rows(self) -> Iterator[Row]:
        """The rows of the map, in order of address."""
        for n, start in enumerate(self._starts):
            counts = self._cells[n * self.columns : (n + 1) * self.columns].tolist()
            cells = [Cell(*count) if count[0] else None for count in counts]
            yield Row(start * self.cell_bytes, cells)
