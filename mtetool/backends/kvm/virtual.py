"""The virtual addresses of a guest: its page tables, walked in the VMM's memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mtetool.attach import memory
from mtetool.backends.kvm.page_tables import (
    PageTables,
    Read,
    Registers,
    half_of,
    without_top_byte,
)
from mtetool.errors import MtetoolError, NotMappedError, PageTableError
from mtetool.guest import Mapped, Memslot, Unmapped, Virtual
from mtetool.uapi import TAG_MAX
from mtetool.vmm.hostmemory import HostMemory

_TAG_SHIFT = 56


@dataclass(eq=False)
class VcpuAddresses:
    """The virtual addresses of one vCPU, by the registers that it had when it was asked."""

    vcpu: int
    registers: Registers
    read: Read
    _tables: dict[int, PageTables] = field(default_factory=dict)

    @property
    def is_on(self) -> bool:
        """See `AddressSpace.is_on`."""
        return self.registers.is_on

    def pointer(self, given: int) -> Virtual:
        """See `AddressSpace.pointer`: the top byte counts only where the guest has it ignored."""
        half = half_of(given)
        if not self.is_on:
            return Virtual(given, None, is_unchecked=False, half=half)
        if self.registers.ignores_top_byte(half):
            tag = given >> _TAG_SHIFT & TAG_MAX
            address = without_top_byte(given)
            is_unchecked = self.registers.is_unchecked(half, tag)
            # A lower address without a top byte is just an address, as elsewhere.
            plain = given >> _TAG_SHIFT == 0 or (is_unchecked and address == given)
            pointer = Virtual(address, None if plain else tag, is_unchecked, half)
        else:
            pointer = Virtual(given, None, is_unchecked=False, half=half)
        if not self._of(half).is_canonical(pointer.address):
            raise NotMappedError(
                f"{given:#x} is no virtual address of this guest: its bits above the highest of the"
                " address are neither all 0 nor all 1"
            )
        return pointer

    def parts(self, start: int, end: int) -> Iterator[Mapped | Unmapped]:
        """See `AddressSpace.parts`."""
        if not self.is_on:
            yield Mapped(start, end - start, start, 0)
            return
        try:
            tables = self._of(half_of(start))
        except MtetoolError as error:
            yield Unmapped(start, end - start, error)
            return
        yield from tables.parts(start, end)

    def _of(self, half: int) -> PageTables:
        if half not in self._tables:
            self._tables[half] = PageTables(self.registers, half, self.read)
        return self._tables[half]


class GuestMemory:
    """Memory of a guest, read in its VMM; nothing is allocated by that."""

    def __init__(self, pid: int, slots: Sequence[Memslot], host: HostMemory) -> None:
        self._pid = pid
        self._slots = slots
        self._host = host

    def read(self, ipa: int, length: int) -> bytes:
        """Return so many bytes from an IPA on. Raises PageTableError."""
        if not any(slot.ipa <= ipa and ipa + length <= slot.end for slot in self._slots):
            raise PageTableError(f"{ipa:#x} is not in the guest's memory")
        told = list(self._host.told(ipa, ipa + length))
        if len(told) != 1 or len(told[0][2]) != 1:
            raise PageTableError(
                f"it is unknown where in the VMM the guest's memory at {ipa:#x} is",
                hint="say where it is: --memslot IPA:SIZE@ADDRESS",
            )
        ((_, _, (address,)),) = told
        if not self._host.has_pages(address, address + length):
            raise PageTableError(f"the guest has never written to its memory at {ipa:#x}")
        try:
            return memory.read(self._pid, address, length)
        except OSError as error:
            raise PageTableError(
                f"the guest's memory at {ipa:#x} cannot be read: {error.strerror}"
            ) from error
