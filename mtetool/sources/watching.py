"""A source that reports how far it was read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from mtetool.guest import Extent, Memslot
from mtetool.sources.copying import Step
from mtetool.sources.source import TagSource


class Watched:
    """Another source, with progress; a `TagSource`."""

    def __init__(self, source: TagSource, advance: Callable[[int], None]) -> None:
        """`advance` is called with the bytes of guest memory that were read since its last call."""
        self.name = source.name
        self.page_size_bytes = source.page_size_bytes
        self.memslots: Sequence[Memslot] = source.memslots
        self._source = source
        self._advance = advance

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return self._source.extents()

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`."""
        self._source.check(extents)

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        for step in self._source.read(extents):
            yield step
            self._advance(step.size_bytes)
