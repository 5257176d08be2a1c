"""The tags of guest memory by virtual addresses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mtetool.guest import AddressSpace, Extent, Mapped, Memslot
from mtetool.sources.copying import Step, moved
from mtetool.sources.layout import common, merged
from mtetool.sources.source import TagSource


class VirtualSource:
    """A source whose addresses are those of a vCPU: windows of them, as far as they are mapped.

    An `ipa` of its extents and steps is a virtual address. It has no memslots. The mapping is as it
    was when this was made; memory outside of the guest's memslots is left out.
    """

    memslots: Sequence[Memslot] = ()

    def __init__(self, source: TagSource, space: AddressSpace, windows: Sequence[Extent]) -> None:
        self.name = source.name
        self.page_size_bytes = source.page_size_bytes
        self._source = source
        held = merged(source.extents())
        self.parts: list[tuple[int, Extent]] = []
        """Virtual addresses, and the guest memory that each is mapped to."""
        for window in merged(windows):
            for part in space.parts(window.ipa, window.end):
                if isinstance(part, Mapped):
                    for here in common([Extent(part.ipa, part.size_bytes)], held):
                        self._add(part.address + here.ipa - part.ipa, here)

    def _add(self, address: int, memory: Extent) -> None:
        """Add a part; one that continues the last one there and here becomes a part of that."""
        if self.parts:
            last_address, last = self.parts[-1]
            if last.end == memory.ipa and last_address + last.size_bytes == address:
                self.parts[-1] = last_address, Extent.between(last.ipa, memory.end)
                return
        self.parts.append((address, memory))

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return [Extent(address, memory.size_bytes) for address, memory in self.parts]

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`."""
        self._source.check(merged(self._memory(extents)))

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        for address, memory in self.parts:
            for part in common([Extent(address, memory.size_bytes)], extents):
                shift = memory.ipa - address
                for step in self._source.read([Extent(part.ipa + shift, part.size_bytes)]):
                    yield moved(step, -shift)

    def _memory(self, extents: Sequence[Extent]) -> Iterator[Extent]:
        for address, memory in self.parts:
            for part in common([Extent(address, memory.size_bytes)], extents):
                yield Extent(part.ipa - address + memory.ipa, part.size_bytes)
