"""Arrays of tags, pure: packing, runs, page classes. One byte a granule, bits 7:4 zero.

Nothing here reads or writes anything; shapes are one-dimensional and C-contiguous.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tags = NDArray[np.uint8]


def pack(tags: Tags) -> NDArray[np.uint8]:
    """Two tags in a byte, the lower address in the low nibble; n granules become n / 2 bytes.

    `tags` is C-contiguous, its length a multiple of 8. The nibble order is that of the
    kernel's core dumps (PT_AARCH64_MEMTAG_MTE) and of QEMU's tag memory.
    """
    # As little-endian words, tag 2i is at bit 0 and tag 2i+1 at bit 8 of each 16-bit lane:
    # v | v >> 4 puts both into the lane's low byte, and the narrowing cast keeps that byte.
    words = tags.view("<u8")
    lanes: NDArray[np.uint16] = (words | words >> np.uint64(4)).view("<u2")
    return lanes.astype(np.uint8)


def unpack(packed: NDArray[np.uint8]) -> Tags:
    """The reverse of `pack`: n bytes become 2 * n granules."""
    lanes = packed.astype("<u2")
    lanes |= lanes << np.uint16(4)
    lanes &= np.uint16(0x0F0F)
    return lanes.view(np.uint8)


def uniform(tags: Tags) -> int | None:
    """The one tag that all granules have, or None. `tags` is not empty."""
    first = int(tags[0])
    # The last granule first: most mixed chunks are found out without reading them.
    if int(tags[-1]) != first or not bool((tags == first).all()):
        return None
    return first


def runs(tags: Tags) -> tuple[NDArray[np.intp], NDArray[np.intp], Tags]:
    """Maximal runs of equal tags: their starts and lengths in granules, and their tags."""
    if tags.size == 0:
        empty = np.empty(0, dtype=np.intp)
        return empty, empty, tags
    starts = np.concatenate(([0], np.flatnonzero(tags[1:] != tags[:-1]) + 1))
    lengths = np.diff(starts, append=tags.size)
    return starts, lengths, tags[starts]


def differences(a: Tags, b: Tags) -> NDArray[np.intp]:
    """The indices of granules whose tags differ, ascending. Shapes must be equal."""
    if np.array_equal(a, b):
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(a != b)


def tagged_pages(tags: Tags, granules_per_page: int) -> int:
    """How many pages have a granule whose tag is not 0."""
    return int(np.count_nonzero(tags.reshape(-1, granules_per_page).any(axis=1)))
