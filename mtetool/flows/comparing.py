"""Where the tags that a guest has differ from those it should have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mtetool.flows.copying import TagReader
from mtetool.flows.tally import Tally
from mtetool.snapshot.model import Extent, Missing
from mtetool.tags import differences
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags


class Comparer:
    """Compares a guest's tags with expected ones, and keeps the tally."""

    def __init__(self, reader: TagReader) -> None:
        self._reader = reader
        self.compared_bytes = 0

    def compare(
        self, ipa: int, expected: Tags, differing: Tally[Extent], unreadable: Tally[Missing]
    ) -> None:
        """Compare the guest's tags from `ipa` on with `expected` (one byte a granule)."""
        extent = Extent(ipa, int(expected.size) * GRANULE_BYTES)
        for step in self._reader.read_granules([extent]):
            if isinstance(step, Missing):
                unreadable.add(step)
                continue
            first = (step.ipa - ipa) // GRANULE_BYTES
            wanted = expected[first : first + step.tags.size]
            add_differences(differing, step.ipa, step.tags, wanted)
            self.compared_bytes += step.size_bytes


def add_differences(tally: Tally[Extent], ipa: int, a: Tags, b: Tags) -> None:
    """Add the ranges in which the tags of `a` and `b`, both from `ipa` on, differ."""
    starts, lengths = _ranges(differences(a, b))
    for listed, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if tally.full:
            rest = lengths[listed:]
            tally.count_only(int(rest.size), int(rest.sum()) * GRANULE_BYTES)
            return
        tally.add(Extent(ipa + start * GRANULE_BYTES, length * GRANULE_BYTES))


def _ranges(
    indices: np.ndarray[tuple[int], np.dtype[np.intp]],
) -> tuple[np.ndarray[tuple[int], np.dtype[np.intp]], np.ndarray[tuple[int], np.dtype[np.intp]]]:
    """Ascending indices as starts and lengths of their unbroken runs."""
    if indices.size == 0:
        return indices, indices
    breaks = np.flatnonzero(np.diff(indices) > 1) + 1
    firsts = np.concatenate(([0], breaks))
    lengths = np.diff(firsts, append=indices.size)
    return indices[firsts], lengths
