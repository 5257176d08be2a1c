"""Memslots that the user gave by hand, and where they are in the VMM's own memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from mtetool import procfs
from mtetool.attach.helper import PAGE_BYTES
from mtetool.errors import MisalignedError, RangeError, UsageError
from mtetool.guest import Memslot
from mtetool.spans import Place


def check_by_hand(pid: int, memslots: Sequence[Memslot]) -> None:
    """Check that process `pid` can have memslots given by hand on this host.

    Raises MisalignedError, RangeError.
    """
    end = 0
    for slot in sorted(memslots, key=lambda slot: slot.ipa):
        named = f"the memslot {slot.ipa:#x}:{slot.size_bytes:#x}"
        numbers = (slot.ipa, slot.size_bytes, slot.host_address or 0)
        if any(number % PAGE_BYTES for number in numbers):
            raise MisalignedError(
                f"{named} is not a multiple of the host's page size, {PAGE_BYTES} bytes",
                hint="memslots are whole pages: check the VMM's configuration",
            )
        if slot.ipa < end:
            raise RangeError(f"{named} overlaps the one before it, which ends at {end:#x}")
        end = slot.end
    for _, size_bytes, address in places_by_hand(memslots):
        _check_is_mapped(pid, address, size_bytes)


def _check_is_mapped(pid: int, address: int, size_bytes: int) -> None:
    at = address
    # If this user may not look there, the attach reports it.
    with suppress(OSError):
        for mapping in procfs.mappings(pid):
            if mapping.start <= at < mapping.end and "w" in mapping.flags:
                at = mapping.end
        if at < address + size_bytes:
            raise RangeError(
                f"process {pid} does not map {size_bytes} bytes of writable memory at {address:#x}:"
                f" there is none at {at:#x}",
                hint=f"find the guest's memory in /proc/{pid}/maps, or leave the address out",
                pid=pid,
            )


def places_by_hand(memslots: Sequence[Memslot]) -> list[Place]:
    """The places of the memslots that were given with an address."""
    return [
        Place(slot.ipa, slot.size_bytes, slot.host_address)
        for slot in memslots
        if slot.host_address is not None
    ]


def by_hand_and_proven(by_hand: Sequence[Place], proven: Sequence[Place]) -> list[Place]:
    """The proven places, and those given by hand where nothing is proven.

    Raises UsageError if they contradict each other.
    """
    found = list(proven)
    for told in by_hand:
        true = {place.shift for place in proven if place.ipa < told.end and told.ipa < place.end}
        if true and told.shift not in true:
            places = " or ".join(f"{told.ipa + shift:#x}" for shift in sorted(true))
            raise UsageError(
                f"the memslot {told.ipa:#x}:{told.size_bytes:#x} is not at {told.address:#x} in the"
                f" VMM's memory: the kernel says it is at {places}",
                hint="leave the address out: the kernel confirms where this memory is",
            )
        # A proven place may be part of one given by hand, or the other way round.
        found.append(told)
    return found
