"""Pure functions on arrays of tags, for showing them: one byte per granule, bits 7:4 zero.

Nothing here does any I/O; arrays are one-dimensional and C-contiguous. The work on every chunk of a
save or restore is in `mtetool.loops`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtetool.buffers import as_bytes

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

Tags = NDArray[np.uint8]
Indices = NDArray[np.intp]


def as_array(tags: TagBuffer) -> Tags:
    """View the tags in any buffer as an array over the same bytes; do not write to it."""
    return np.frombuffer(as_bytes(tags), dtype=np.uint8)


def runs(tags: Tags) -> tuple[Indices, Indices, Tags]:
    """Maximal runs of equal tags: their starts and lengths in granules, and their tags."""
    if tags.size == 0:
        empty = np.empty(0, dtype=np.intp)
        return empty, empty, tags
    starts = np.concatenate(([0], np.flatnonzero(tags[1:] != tags[:-1]) + 1))
    lengths = np.diff(starts, append=tags.size)
    return starts, lengths, tags[starts]


def differences(a: Tags, b: Tags) -> Indices:
    """The indices of granules whose tags differ, ascending. Shapes must be equal."""
    if np.array_equal(a, b):
        return np.empty(0, dtype=np.intp)
    return np.flatnonzero(a != b)


def difference_ranges(a: Tags, b: Tags) -> tuple[Indices, Indices]:
    """Where `a` and `b` differ, as starts and lengths of unbroken ranges, ascending."""
    indices = differences(a, b)
    if indices.size == 0:
        return indices, indices
    breaks = np.flatnonzero(np.diff(indices) > 1) + 1
    firsts = np.concatenate(([0], breaks))
    return indices[firsts], np.diff(firsts, append=indices.size)
