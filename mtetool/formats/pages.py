"""Tags in whole pages, as a snapshot stores them, from a source whose gaps are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill, Step, cut
from mtetool.sources.source import TagSource
from mtetool.uapi import GRANULE_BYTES


def whole_pages(source: TagSource, extents: Sequence[Extent], page_bytes: int) -> Iterator[Step]:
    """Read ascending extents of whole pages; a page with a gap is missing as a whole.

    Tags stay valid as long as those of the source do, or have a buffer of their own.
    """
    page = _Page(page_bytes)
    for step in source.read(extents):
        end = step.ipa + step.size_bytes
        # Up to the page's end, whole pages, and the beginning of the next page.
        first = min(-(-step.ipa // page_bytes) * page_bytes, end)
        last = max(end // page_bytes * page_bytes, first)
        if first > step.ipa:
            yield from page.add(cut(step, step.ipa, first - step.ipa))
        if last > first:
            yield cut(step, first, last - first)
        if end > last:
            yield from page.add(cut(step, last, end - last))


class _Page:
    """A page that comes in parts, of which none is whole."""

    def __init__(self, page_bytes: int) -> None:
        self._n_granules = page_bytes // GRANULE_BYTES
        self._tags = bytearray()
        self._gap: Missing | None = None

    def add(self, part: Step) -> Iterator[Step]:
        """Add the next part; yield the page if that completes it."""
        n_granules = part.size_bytes // GRANULE_BYTES
        if isinstance(part, Copied):
            self._tags += part.tags
        else:
            self._tags += bytes([part.tag if isinstance(part, Fill) else 0]) * n_granules
            self._gap = part if isinstance(part, Missing) else self._gap
        if len(self._tags) < self._n_granules:
            return
        size_bytes = self._n_granules * GRANULE_BYTES
        ipa = part.ipa + part.size_bytes - size_bytes
        if self._gap is None:
            yield Copied(ipa, memoryview(self._tags))
        else:
            yield Missing(ipa, size_bytes, self._gap.errno, self._gap.reason)
        self._tags, self._gap = bytearray(), None
