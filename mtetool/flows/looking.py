"""The tag at an address, what is around it, and whether a pointer to it has that tag."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from mtetool.flows.dump import OUTSIDE, RAW_MISSING, Run
from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.layout import Layout, common, merged
from mtetool.sources.source import TagSource
from mtetool.uapi import GRANULE_BYTES, TAG_MAX

# A pointer has its tag in bits 59 to 56, and with Top Byte Ignore bits 63 to 56 are no address.
_TAG_SHIFT = 56
_ADDRESS_MASK = (1 << _TAG_SHIFT) - 1
# Bit 55 says which half of the virtual address space: that of the kernel.
_KERNEL_HALF = 1 << 55


@dataclass(frozen=True, slots=True)
class Pointer:
    """An address as it was given; with anything in its top byte, it is a tagged pointer."""

    given: int

    @property
    def ipa(self) -> int:
        """The address without the top byte."""
        return self.given & _ADDRESS_MASK

    @property
    def tag(self) -> int | None:
        """The pointer's tag; None for an address whose top byte is 0."""
        return self.given >> _TAG_SHIFT & TAG_MAX if self.given >> _TAG_SHIFT else None

    @property
    def is_unchecked(self) -> bool:
        """Whether it may access memory of any tag."""
        return False

    @property
    def is_kernels(self) -> bool:
        """Whether it can only be a virtual address of a kernel."""
        return bool(self.given & _KERNEL_HALF)


@dataclass
class Look:
    """What is at an address.

    `tag` is None where there is none: then `missing` says why that could not be read, or there is
    no memory, and `nearest` is the memory next to it. `run` is the run of equal tags around, as far
    as the context shows it. The context has a byte for each granule: a tag, RAW_MISSING, or
    OUTSIDE where there is no memory.
    """

    pointer: Pointer
    slot: Memslot | None
    context_ipa: int
    context: bytes
    tag: int | None = None
    run: Run | None = None
    missing: Missing | None = None
    nearest: Extent | None = None

    @property
    def matches(self) -> bool | None:
        """Whether pointer and memory have the same tag; None where that does not count."""
        if self.tag is None or self.pointer.tag is None or self.pointer.is_unchecked:
            return None
        return self.tag == self.pointer.tag


@dataclass
class _Window:
    """What was read of some memory."""

    extent: Extent
    cells: bytearray
    missing: list[Missing] = field(default_factory=list)


def look(source: TagSource, pointers: Sequence[Pointer], n_context: int) -> list[Look]:
    """Look at addresses, with `n_context` granules before and after each; all are read in one go.

    Raises WouldAllocateError, and what reading raises.
    """
    held = merged(source.extents())
    around = [window_around(pointer, n_context) for pointer in pointers]
    windows = _read(source, common(around, held))
    layout = Layout(tuple(source.memslots), source.page_size_bytes)
    return [
        _look(pointer, extent, windows, layout, held)
        for pointer, extent in zip(pointers, around, strict=True)
    ]


def window_around(pointer: Pointer, n_context: int) -> Extent:
    """The granules at a pointer and around it."""
    granule = pointer.ipa // GRANULE_BYTES
    first = max(granule - n_context, 0)
    return Extent.between(first * GRANULE_BYTES, (granule + n_context + 1) * GRANULE_BYTES)


def _read(source: TagSource, extents: list[Extent]) -> list[_Window]:
    source.check(extents)
    windows = [_Window(extent, bytearray(extent.size_bytes // GRANULE_BYTES)) for extent in extents]
    n = 0
    for step in source.read(extents):
        while step.ipa >= windows[n].extent.end:
            n += 1
        window = windows[n]
        first = (step.ipa - window.extent.ipa) // GRANULE_BYTES
        n_granules = step.size_bytes // GRANULE_BYTES
        if isinstance(step, Copied):
            window.cells[first : first + n_granules] = step.tags
        else:
            tag = step.tag if isinstance(step, Fill) else RAW_MISSING
            window.cells[first : first + n_granules] = bytes([tag]) * n_granules
        if isinstance(step, Missing):
            window.missing.append(step)
    return windows


def _look(
    pointer: Pointer,
    around: Extent,
    windows: Sequence[_Window],
    layout: Layout,
    held: Sequence[Extent],
) -> Look:
    context = bytearray([OUTSIDE]) * (around.size_bytes // GRANULE_BYTES)
    missing = None
    for window in windows:
        for part in common([around], [window.extent]):
            to = (part.ipa - around.ipa) // GRANULE_BYTES
            at = (part.ipa - window.extent.ipa) // GRANULE_BYTES
            n_granules = part.size_bytes // GRANULE_BYTES
            context[to : to + n_granules] = window.cells[at : at + n_granules]
        for item in window.missing:
            missing = item if item.ipa <= pointer.ipa < item.end else missing
    found = Look(pointer, layout.slot_at(pointer.ipa), around.ipa, bytes(context), missing=missing)
    here = (pointer.ipa - around.ipa) // GRANULE_BYTES
    if context[here] == OUTSIDE:
        found.nearest = min(held, key=lambda extent: _distance(extent, pointer.ipa), default=None)
    elif context[here] != RAW_MISSING:
        found.tag = context[here]
        found.run = _run(around.ipa, bytes(context), here)
    return found


def _run(ipa: int, context: bytes, here: int) -> Run:
    def n_same(cells: bytes) -> int:
        return sum(1 for _ in takewhile(context[here].__eq__, cells))

    before, after = n_same(context[:here][::-1]), n_same(context[here:])
    at = ipa + (here - before) * GRANULE_BYTES
    return Run(at, (before + after) * GRANULE_BYTES, context[here])


def _distance(extent: Extent, ipa: int) -> int:
    return extent.ipa - ipa if ipa < extent.ipa else max(ipa - extent.end + 1, 0)
