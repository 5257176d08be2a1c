"""Five patterns of tags, for the guests that mtetool is measured with.

Each is a function of the pattern, a seed and the address of the memory, made in blocks of
bounded size. The patterns look like those of real allocators: scudo (a header granule, neighbours
of different parity) and the kernel's slab and page allocators with KASAN in its hardware tag-based
mode (0xe for freed objects).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtetool.errors import UsageError

if TYPE_CHECKING:
    from mtetool.tags import Tags

# Bounds the memory that a pattern takes. A multiple of every page size; clusters of pages
# end where a block ends.
_BLOCK_GRANULES = 2 << 20

_HEAP_MEAN_GRANULES = 6
_HEAP_MAX_GRANULES = 64
_HEAP_FREE = 0.15

_SLAB_OBJECT_GRANULES = np.array(
    [1, 1, 2, 2, 4, 4, 4, 6, 8, 8, 12, 16, 16, 32, 64, 128, 256], dtype=np.intp
)
_SLAB_FREE = 0.15
_SLAB_FREE_TAG = 14
_KERNEL_BLOCK_PAGES = np.array([1, 2, 4, 8], dtype=np.intp)
_KERNEL_SLAB, _KERNEL_WHOLE = 0.35, 0.50


def pattern_tags(
    name: str, seed: int, ipa: int, n_granules: int, granules_per_page: int
) -> Iterator[Tags]:
    """The tags of `n_granules` from `ipa` on, whole pages, in arrays of at most 2 Mi granules.

    `name` is one of PATTERNS. The same arguments give the same tags (with the same numpy:
    its distributions may change between releases). The arrays are only valid until the next
    step. Raises UsageError for an unknown name.
    """
    if name not in _MAKERS:
        raise UsageError(f"{name!r} is not a pattern; the patterns are {', '.join(PATTERNS)}")
    make = _MAKERS[name]
    for number, first in enumerate(range(0, n_granules, _BLOCK_GRANULES)):
        n_pages = min(_BLOCK_GRANULES, n_granules - first) // granules_per_page
        # Each block has its own stream, so it could be made without those before it.
        random = np.random.Generator(np.random.PCG64([seed, ipa, number]))
        yield make(random, n_pages, granules_per_page)


def _zero(random: np.random.Generator, n_pages: int, per_page: int) -> Tags:
    return np.zeros(n_pages * per_page, dtype=np.uint8)


def _random(random: np.random.Generator, n_pages: int, per_page: int) -> Tags:
    return random.integers(0, 16, n_pages * per_page, dtype=np.uint8)


def _heap(random: np.random.Generator, n_pages: int, per_page: int) -> Tags:
    return _clustered(random, n_pages, per_page, share=0.30, mean_pages=64)


def _sparse(random: np.random.Generator, n_pages: int, per_page: int) -> Tags:
    return _clustered(random, n_pages, per_page, share=0.05, mean_pages=48)


def _clustered(
    random: np.random.Generator, n_pages: int, per_page: int, *, share: float, mean_pages: int
) -> Tags:
    """Heap pages in clusters of geometric length, exactly `share` of all pages (at least one)."""
    n_heap = max(1, round(n_pages * share))
    lengths = _drawn_until(n_heap, lambda n: random.geometric(1 / mean_pages, n), mean_pages)
    # The gaps between the clusters: sorted cuts divide the rest of the pages at random.
    cuts = np.sort(random.integers(0, n_pages - n_heap + 1, lengths.size))
    starts = cuts + np.cumsum(lengths) - lengths
    pages = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(n_heap)
    tags = np.zeros((n_pages, per_page), dtype=np.uint8)
    tags[pages] = _heap_granules(random, n_heap * per_page).reshape(n_heap, per_page)
    return tags.reshape(-1)


def _heap_granules(random: np.random.Generator, n_granules: int) -> Tags:
    """Headers of one granule, each before an allocation with one tag."""

    def draw(n: int) -> NDArray[np.intp]:
        sizes = random.geometric(1 / _HEAP_MEAN_GRANULES, n)
        return np.asarray(np.minimum(sizes, _HEAP_MAX_GRANULES) + 1, dtype=np.intp)

    lengths = _drawn_until(n_granules, draw, _HEAP_MEAN_GRANULES + 1)
    parity = np.arange(lengths.size, dtype=np.uint8) & 1
    values = random.integers(0, 8, lengths.size, dtype=np.uint8) * 2 + parity
    # 0 is the header's tag; an allocation in use never has it.
    values[values == 0] = 2
    values[random.random(lengths.size, dtype=np.float32) < _HEAP_FREE] = 0
    tags = np.repeat(values, lengths)
    tags[np.cumsum(lengths) - lengths] = 0
    return tags


def _kernel(random: np.random.Generator, n_pages: int, per_page: int) -> Tags:
    lengths = _drawn_until(n_pages, lambda n: random.choice(_KERNEL_BLOCK_PAGES, n), 3)
    kind = random.random(lengths.size)
    slab = kind < _KERNEL_SLAB
    whole = random.integers(0, 14, lengths.size, dtype=np.uint8)
    whole[slab | (kind >= _KERNEL_SLAB + _KERNEL_WHOLE)] = 0
    tags = np.empty((n_pages, per_page), dtype=np.uint8)
    tags[:] = np.repeat(whole, lengths)[:, np.newaxis]
    objects = _slab_granules(random, lengths[slab] * per_page)
    tags[np.repeat(slab, lengths)] = objects.reshape(-1, per_page)
    return tags.reshape(-1)


def _slab_granules(random: np.random.Generator, block_granules: NDArray[np.intp]) -> Tags:
    """Blocks of objects, one size per block, one tag per object; the last object is cut off."""
    sizes = random.choice(_SLAB_OBJECT_GRANULES, block_granules.size)
    counts = -(-block_granules // sizes)
    lengths = np.repeat(sizes, counts)
    lengths[np.cumsum(counts) - 1] = block_granules - (counts - 1) * sizes
    values = random.integers(0, 14, lengths.size, dtype=np.uint8)
    values[random.random(lengths.size, dtype=np.float32) < _SLAB_FREE] = _SLAB_FREE_TAG
    return np.repeat(values, lengths)


def _drawn_until(
    total: int, draw: Callable[[int], NDArray[np.intp]], mean: int
) -> NDArray[np.intp]:
    """Lengths that add up to `total`: as many as `draw` gives, the last one cut off."""
    drawn = [draw(total // mean + 16)]
    missing = total - int(drawn[0].sum())
    while missing > 0:
        drawn.append(draw(missing // mean + 16))
        missing -= int(drawn[-1].sum())
    lengths = np.concatenate(drawn)
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, total))
    lengths = lengths[: last + 1]
    lengths[last] -= ends[last] - total
    return lengths


_Maker = Callable[[np.random.Generator, int, int], "Tags"]
_MAKERS: dict[str, _Maker] = {
    "zero": _zero,
    "sparse": _sparse,
    "heap": _heap,
    "kernel": _kernel,
    "random": _random,
}

PATTERNS = tuple(_MAKERS)
"""The names of the patterns."""
