"""Where a snapshot's memory goes: slots that are at other addresses now."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from mtetool.errors import LayoutError, MisalignedError, UsageError
from mtetool.guest import Extent, Memslot
from mtetool.sources.copying import Step
from mtetool.sources.layout import Layout, hex_range, merged, without
from mtetool.sources.source import TagSource


class Relocation:
    """Maps addresses of a snapshot to addresses of a guest, whole slots at a time."""

    def __init__(self, moves: Iterable[tuple[int, int]], slots: Sequence[Memslot]) -> None:
        """`moves` are pairs of a slot's IPA in the snapshot and its IPA in the guest.

        Raises UsageError for an IPA that is not a slot of the snapshot, or is named twice.
        """
        by_ipa = {slot.ipa: slot for slot in slots}
        self._moved: list[tuple[Extent, int]] = []
        seen: set[int] = set()
        for old, new in moves:
            if old not in by_ipa:
                known = ", ".join(f"{ipa:#x}" for ipa in sorted(by_ipa))
                raise UsageError(
                    f"--map {old:#x}={new:#x}: no slot of the snapshot starts at {old:#x}",
                    hint=f"use an address at which a slot starts: {known}",
                )
            if old in seen:
                raise UsageError(f"--map: the slot at {old:#x} is mapped twice")
            seen.add(old)
            self._moved.append((Extent(old, by_ipa[old].size_bytes), new - old))
        self._moved.sort(key=lambda move: move[0].ipa)

    def __call__(self, extent: Extent) -> Iterator[tuple[int, Extent]]:
        """Split an extent of the snapshot: yield each piece's offset in bytes and its target."""
        at, stop = extent.ipa, extent.ipa + extent.size_bytes
        for moved, distance in self._moved:
            first = max(at, moved.ipa)
            last = min(stop, moved.ipa + moved.size_bytes)
            if first >= last:
                continue
            if at < first:
                yield at - extent.ipa, Extent(at, first - at)
            yield first - extent.ipa, Extent(first + distance, last - first)
            at = last
        if at < stop:
            yield at - extent.ipa, Extent(at, stop - at)

    def moved(self, extents: Iterable[Extent]) -> list[Extent]:
        """Return where extents go, merged. Raises LayoutError where two would overlap."""
        targets = [target for extent in extents for _, target in self(extent)]
        targets.sort(key=lambda target: target.ipa)
        for before, after in pairwise(targets):
            if before.ipa + before.size_bytes > after.ipa:
                raise LayoutError(
                    f"two parts of the snapshot would go to {after.ipa:#x} in the guest",
                    hint="check --map: each slot needs a place of its own",
                    ipa=after.ipa,
                )
        return merged(targets)

    def check_targets(self, page_size_bytes: int) -> None:
        """Raise MisalignedError for a target that does not start at a page of the guest."""
        for moved, distance in self._moved:
            new = moved.ipa + distance
            if new % page_size_bytes:
                raise MisalignedError(
                    f"--map {moved.ipa:#x}={new:#x}: {new:#x} is not a multiple of the guest's"
                    f" page size, {page_size_bytes} bytes",
                    ipa=new,
                )


def moved_slots(slots: Iterable[Memslot], relocation: Relocation) -> tuple[Memslot, ...]:
    """Slots at their new addresses, in the order of these."""
    moved = [
        replace(slot, ipa=target.ipa)
        for slot in slots
        for _, target in relocation(Extent(slot.ipa, slot.size_bytes))
    ]
    return tuple(sorted(moved, key=lambda slot: slot.ipa))


class MovedSource:
    """Another source, whose slots are at other addresses now; a `TagSource`."""

    def __init__(self, source: TagSource, relocation: Relocation) -> None:
        """Raises LayoutError where two parts would be at one address."""
        self.name = source.name
        self.page_size_bytes = source.page_size_bytes
        self._source = source
        held = merged(source.extents())
        self._extents = relocation.moved(held)
        # Where each part is now, and where it was.
        self._parts = sorted(
            (target.ipa, target.size_bytes, extent.ipa + offset)
            for extent in held
            for offset, target in relocation(extent)
        )
        self.memslots = moved_slots(source.memslots, relocation)

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return list(self._extents)

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`."""
        self._source.check([old for _, old in self._old(extents)])

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        for distance, old in self._old(extents):
            for step in self._source.read([old]):
                yield replace(step, ipa=step.ipa + distance)

    def _old(self, extents: Sequence[Extent]) -> Iterator[tuple[int, Extent]]:
        """The parts of extents, as the source has them, and how far each has moved."""
        for extent in extents:
            for new, size_bytes, old in self._parts:
                at, stop = max(extent.ipa, new), min(extent.end, new + size_bytes)
                if at < stop:
                    yield new - old, Extent.between(at - new + old, stop - new + old)


def check_fit(
    extents: Sequence[Extent],
    layout: Layout,
    scope: Sequence[Extent],
    missing: Sequence[Extent] = (),
) -> None:
    """Raise LayoutError unless the guest can take `extents` (addresses in the guest).

    `scope` is all memory that the snapshot covers, `missing` the part of it that it lacks: the
    edges of both must be page boundaries of the guest, because the kernel copies whole pages.
    """
    page = layout.page_size_bytes
    whole = f"whole pages of {page // 1024} KiB"
    for extent in scope:
        _check_pages(
            extent,
            f"the snapshot's memory {hex_range(extent)}",
            page,
            f"save only slots or ranges that are {whole} (save --slot, --range), or restore on"
            " a host with the snapshot's page size",
        )
    for extent in missing:
        _check_pages(
            extent,
            f"what the snapshot is missing, {hex_range(extent)},",
            page,
            f"save ranges of {whole} without it (save --range), or restore on a host with the"
            " snapshot's page size",
        )
    outside = without(extents, layout.taggable)
    if outside:
        known = ", ".join(hex_range(extent) for extent in layout.taggable[:8]) or "none"
        raise LayoutError(
            f"the snapshot holds tags of {hex_range(outside[0])}, where the guest has no"
            " memory that takes tags",
            hint=f"the guest's memory: {known}; if a slot has moved, map it: --map OLD=NEW",
            ipa=outside[0].ipa,
            size_bytes=outside[0].size_bytes,
        )


def _check_pages(extent: Extent, what: str, page: int, hint: str) -> None:
    for edge in (extent.ipa, extent.end):
        if edge % page:
            raise LayoutError(
                f"{what} does not start and end on pages of the guest, which have {page} bytes",
                hint=hint,
                ipa=edge,
                page_size_bytes=page,
            )
