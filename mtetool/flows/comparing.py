"""Where a guest's tags differ from those it should have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mtetool import loops
from mtetool.buffers import as_bytes
from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill, TagReader
from mtetool.sources.pieces import constant
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer


class Comparer:
    """Compares a guest's tags with expected ones, and keeps the tally."""

    def __init__(self, reader: TagReader) -> None:
        self._reader = reader
        self.compared_bytes = 0

    def compare(
        self,
        ipa: int,
        expected: TagBuffer,
        differing: Tally[Extent],
        unreadable: Tally[Missing],
        *,
        every_page: bool = False,
    ) -> None:
        """Compare the guest's tags from `ipa` on with `expected` (one byte per granule).

        With `every_page` the guest is not asked first which pages may have tags.
        """
        view = as_bytes(expected)
        extent = Extent(ipa, len(view) * GRANULE_BYTES)
        for step in self._reader.read_granules([extent], every_page=every_page):
            if isinstance(step, Missing):
                unreadable.add(step)
                continue
            first = (step.ipa - ipa) // GRANULE_BYTES
            wanted = view[first : first + step.size_bytes // GRANULE_BYTES]
            n_granules = step.size_bytes // GRANULE_BYTES
            tags = step.tags if isinstance(step, Copied) else constant(step.tag, n_granules)
            add_differences(differing, step.ipa, tags, wanted)
            self.compared_bytes += step.size_bytes

    def compare_fill(
        self,
        fill: Fill,
        differing: Tally[Extent],
        unreadable: Tally[Missing],
        *,
        every_page: bool = False,
    ) -> None:
        """Compare the guest's tags with one tag, over any length; `every_page` as `compare`."""
        extent = Extent(fill.ipa, fill.size_bytes)
        for step in self._reader.read_granules([extent], every_page=every_page):
            if isinstance(step, Missing):
                unreadable.add(step)
                continue
            if isinstance(step, Copied):
                wanted = constant(fill.tag, len(step.tags))
                add_differences(differing, step.ipa, step.tags, wanted)
            elif step.tag != fill.tag:
                differing.add(Extent(step.ipa, step.size_bytes))
            self.compared_bytes += step.size_bytes


def add_differences(tally: Tally[Extent], ipa: int, a: TagBuffer, b: TagBuffer) -> None:
    """Add the ranges in which the tags of `a` and `b`, both from `ipa` on, differ."""
    if loops.first_difference(a, b) == len(as_bytes(a)):
        return
    # Imported here: mostly nothing differs, and it is not needed.
    from mtetool.tags import as_array, difference_ranges

    starts, lengths = difference_ranges(as_array(a), as_array(b))
    tally.extend(Extent(0, GRANULE_BYTES), ipa + starts * GRANULE_BYTES, lengths * GRANULE_BYTES)
