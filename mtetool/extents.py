"""Many extents of guest memory as an array, a row each: its address and its size in bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

# No extent crosses a multiple of that many pages, so none is longer.
_MOST_PAGES = 256


def of_pages(pages: NDArray[np.int64], page_bytes: int) -> NDArray[np.uint64]:
    """The extents of ascending pages, given by their numbers; each has at most 256 pages."""
    if not len(pages):
        return np.empty((0, 2), np.uint64)
    breaks = (np.diff(pages) != 1) | (pages[1:] % _MOST_PAGES == 0)
    first = np.flatnonzero(np.concatenate(([True], breaks)))
    n_pages = np.diff(np.concatenate((first, [len(pages)])))
    extents = np.empty((len(first), 2), np.uint64)
    extents[:, 0] = pages[first] * page_bytes
    extents[:, 1] = n_pages * page_bytes
    return extents


def pages_of(extents: NDArray[np.uint64], page_bytes: int) -> NDArray[np.int64]:
    """The numbers of the pages of extents, in their order."""
    first = (extents[:, 0] // np.uint64(page_bytes)).astype(np.int64)
    n_pages = (extents[:, 1] // np.uint64(page_bytes)).astype(np.int64)
    before = np.repeat(np.cumsum(n_pages) - n_pages, n_pages)
    return np.repeat(first, n_pages) + np.arange(int(n_pages.sum()), dtype=np.int64) - before


def n_granules_of(extents: NDArray[np.uint64]) -> int:
    """How many granules the extents have in all."""
    return int(extents[:, 1].sum()) // GRANULE_BYTES


def parts(
    extents: NDArray[np.uint64], most: int, most_granules: int
) -> Iterator[NDArray[np.uint64]]:
    """Cut the list into parts of at most `most` extents, and of at most `most_granules`.

    No single extent may have more granules than that.
    """
    sums = np.cumsum(extents[:, 1]) // np.uint64(GRANULE_BYTES)
    first = 0
    while first < len(extents):
        before = sums[first - 1] if first else np.uint64(0)
        fit = int(np.searchsorted(sums, before + np.uint64(most_granules), side="right"))
        stop = min(max(fit, first + 1), first + most)
        yield extents[first:stop]
        first = stop
