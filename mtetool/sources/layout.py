"""Where a guest's memory is: memslots looked up by address, and arithmetic on extents."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mtetool.errors import LayoutUnknownError, MisalignedError, RangeError, UsageError
from mtetool.guest import Extent, Guest, Memslot
from mtetool.snapshot.model import Header

UNREACHABLE = "a device's memory, or memory protected from its own program"
"""What a slot of the kind "device" is."""


@dataclass(frozen=True)
class Layout:
    """Memslots in order of address, and the page size that copies are aligned to.

    Without slots, the layout is unknown: every address may hold memory.
    """

    slots: tuple[Memslot, ...]
    page_size_bytes: int
    _starts: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "slots", tuple(sorted(self.slots, key=lambda slot: slot.ipa)))
        object.__setattr__(self, "_starts", tuple(slot.ipa for slot in self.slots))

    def slot_at(self, ipa: int) -> Memslot | None:
        """The slot that holds an address."""
        index = bisect_right(self._starts, ipa) - 1
        if index < 0 or self.slots[index].end <= ipa:
            return None
        return self.slots[index]

    def next_start(self, ipa: int) -> int | None:
        """Where the first slot after an address starts."""
        index = bisect_right(self._starts, ipa)
        return self._starts[index] if index < len(self._starts) else None

    @property
    def taggable(self) -> list[Extent]:
        """The memory that can carry tags: that of all slots but the devices'."""
        return [Extent(s.ipa, s.size_bytes) for s in self.slots if s.kind != "device"]

    @property
    def writable(self) -> list[Extent]:
        """The part of `taggable` that takes tags, as far as is known."""
        return [
            Extent(s.ipa, s.size_bytes) for s in self.slots if s.kind == "ram" and not s.readonly
        ]


def layout_of(guest: Guest, otherwise: Sequence[Memslot] | None = None) -> Layout:
    """The layout of a guest; that of `otherwise` (a snapshot's memslots) where it is unknown.

    Raises LayoutUnknownError if it is unknown and `otherwise` is None.
    """
    try:
        slots = guest.info().memslots
    except LayoutUnknownError:
        if otherwise is None:
            raise
        slots = tuple(otherwise)
    return Layout(slots, guest.page_size_bytes)


def slots_of(header: Header) -> tuple[Memslot, ...]:
    """A snapshot's memslots; its scope, where they were unknown at its save."""
    if header.memslots:
        return header.memslots
    scope = enumerate(merged(header.scope))
    return tuple(Memslot(n, extent.ipa, extent.size_bytes, None) for n, extent in scope)


def slot_extents(slots: Sequence[Memslot], ids: Iterable[int], whose: str) -> list[Extent]:
    """The memory of the slots with these ids, in order of address.

    Raises UsageError for one that is not there, or whose tags cannot be reached.
    """
    by_id = {slot.id: slot for slot in slots}
    for slot_id in ids:
        if slot_id not in by_id:
            known = ", ".join(str(slot.id) for slot in slots[:16]) or "none"
            more = ", …" if len(slots) > 16 else ""
            raise UsageError(f"{whose} has no slot {slot_id}", hint=f"its slots: {known}{more}")
        if by_id[slot_id].kind == "device":
            raise UsageError(f"the tags of slot {slot_id} cannot be reached: {UNREACHABLE}")
    chosen = [by_id[slot_id] for slot_id in set(ids)]
    return sorted(
        (Extent(slot.ipa, slot.size_bytes) for slot in chosen), key=lambda extent: extent.ipa
    )


def merged(extents: Iterable[Extent]) -> list[Extent]:
    """The same addresses in ascending extents that neither overlap nor touch."""
    result: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: extent.ipa):
        if result and extent.ipa <= result[-1].end:
            last = result.pop()
            stop = max(last.end, extent.end)
            result.append(Extent(last.ipa, stop - last.ipa))
        else:
            result.append(extent)
    return result


def common(a: Iterable[Extent], b: Iterable[Extent]) -> list[Extent]:
    """The addresses that are in both `a` and `b`."""
    left, right = merged(a), merged(b)
    result: list[Extent] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start = max(left[i].ipa, right[j].ipa)
        stop = min(left[i].end, right[j].end)
        if start < stop:
            result.append(Extent(start, stop - start))
        if left[i].end <= right[j].end:
            i += 1
        else:
            j += 1
    return result


def without(a: Iterable[Extent], b: Iterable[Extent]) -> list[Extent]:
    """The addresses that are in `a` and not in `b`."""
    holes = merged(b)
    result: list[Extent] = []
    first = 0
    for extent in merged(a):
        at, stop = extent.ipa, extent.end
        while first < len(holes) and holes[first].end <= at:
            first += 1
        index = first
        while index < len(holes) and holes[index].ipa < stop:
            if holes[index].ipa > at:
                result.append(Extent(at, holes[index].ipa - at))
            at = holes[index].end
            index += 1
        if at < stop:
            result.append(Extent(at, stop - at))
    return result


def by_slot(
    slots: Sequence[Memslot], extents: Sequence[Extent]
) -> Iterator[tuple[Memslot | None, list[Extent]]]:
    """The parts of extents in each slot, and between slots, in order of address."""
    whole = [Extent(slot.ipa, slot.size_bytes) for slot in slots]
    parts: list[tuple[Memslot | None, list[Extent]]] = [
        (slot, common(extents, [extent])) for slot, extent in zip(slots, whole, strict=True)
    ]
    parts += [(None, [part]) for part in without(extents, whole)]
    yield from sorted((part for part in parts if part[1]), key=lambda part: part[1][0].ipa)


def total_bytes(extents: Iterable[Extent]) -> int:
    """The bytes of guest memory in extents."""
    return sum(extent.size_bytes for extent in extents)


def check_aligned(ranges: Iterable[Extent], unit_bytes: int, unit: str) -> None:
    """Raise MisalignedError for the first range that is not made of whole units."""
    for asked in ranges:
        if asked.size_bytes <= 0:
            raise RangeError(f"the range {hex_range(asked)} is empty", ipa=asked.ipa)
        for name, value in (("start", asked.ipa), ("size", asked.size_bytes)):
            if value % unit_bytes:
                start = asked.ipa // unit_bytes * unit_bytes
                size = -(-asked.end // unit_bytes) * unit_bytes - start
                raise MisalignedError(
                    f"the {name} of the range {hex_range(asked)} is not a multiple of the"
                    f" {unit}, {unit_bytes} bytes",
                    hint=f"the smallest range of whole units around it is {start:#x}:{size:#x}",
                    ipa=asked.ipa,
                    size_bytes=asked.size_bytes,
                )


def check_inside(ranges: Iterable[Extent], held: Sequence[Extent], whose: str) -> None:
    """Raise RangeError for the first range that has no address in common with `held`."""
    for asked in ranges:
        if not common([asked], held):
            known = ", ".join(hex_range(extent) for extent in held[:8]) or "none"
            raise RangeError(
                f"the range {hex_range(asked)} is outside the memory of {whose}",
                hint=f"its memory: {known}{', …' if len(held) > 8 else ''}",
                ipa=asked.ipa,
                size_bytes=asked.size_bytes,
            )


def hex_range(extent: Extent) -> str:
    """`0x40000000:0x10000`, as --range takes it."""
    return f"{extent.ipa:#x}:{extent.size_bytes:#x}"
