"""The page tables of an arm64 guest, walked as its processor walks them. Pure.

Stage 1 at EL1, as the Arm Architecture Reference Manual describes it for VMSAv8-64: granules of 4,
16 and 64 KiB, addresses of up to 48 bits, and of up to 52 with FEAT_LVA, FEAT_LPA and FEAT_LPA2. It
answers where an address is mapped, not who may use it: neither permissions nor the access flag
count.

The guest runs meanwhile, and its registers may hold anything. So nothing here trusts what it reads:
a walk has at most five levels, whatever the tables say, and every table is read by `read`, which
refuses what is not guest memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mtetool.errors import MtetoolError, NotMappedError, PageTableError
from mtetool.guest import Mapped, Unmapped

Read = Callable[[int, int], bytes]
"""Returns so many bytes of guest memory, from an IPA on. Raises PageTableError."""

_SCTLR_M, _SCTLR_EE = 1 << 0, 1 << 25
_TCR_DS = 1 << 59
_TCR2_D128 = 1 << 5
# TCR_EL1.TG0 and TG1 mean the same by different numbers: the granule's size, in bits.
_GRANULES = ({0: 12, 1: 16, 2: 14}, {1: 14, 2: 12, 3: 16})
_OUTPUT_BITS = (32, 36, 40, 42, 44, 48, 52, 52)
_TOP_BYTE = 0xFF << 56
_HALF = 1 << 55
_ALL = (1 << 64) - 1
_LAST_LEVEL = 3
_DESCRIPTOR_BYTES = 8


@dataclass(frozen=True, slots=True)
class Registers:
    """What a vCPU translates addresses with, as KVM_GET_ONE_REG reports it."""

    sctlr: int
    tcr: int
    ttbr0: int
    ttbr1: int
    tcr2: int = 0

    @property
    def is_on(self) -> bool:
        """Whether the MMU is on; if not, a virtual address is a physical one."""
        return bool(self.sctlr & _SCTLR_M)

    def ignores_top_byte(self, half: int) -> bool:
        """Whether addresses of that half have a tag in their top byte (TBI)."""
        return bool(self.tcr >> (37 + half) & 1)

    def is_unchecked(self, half: int, tag: int) -> bool:
        """Whether pointers with that tag may access any memory there (TCMA)."""
        return bool(self.tcr >> (57 + half) & 1) and tag == (15 if half else 0)


def half_of(address: int) -> int:
    """Which half of the address space an address is in: 0 the lower (TTBR0), 1 the upper one."""
    return address >> 55 & 1


def without_top_byte(address: int) -> int:
    """The address with bit 55 in its top byte, as the processor sees it with Top Byte Ignore."""
    return address | _TOP_BYTE if address & _HALF else address & ~_TOP_BYTE


class PageTables:
    """The tables of one half of a vCPU's address space, with its MMU on.

    Raises PageTableError for registers that make no sense, and NotMappedError for a half that is
    switched off.
    """

    def __init__(self, registers: Registers, half: int, read: Read) -> None:
        tcr = registers.tcr
        self._read = read
        self._half = half
        self._order = ">" if registers.sctlr & _SCTLR_EE else "<"
        if registers.tcr2 & _TCR2_D128:
            raise PageTableError("its page tables have descriptors of 128 bits (FEAT_D128)")
        if tcr >> (23 if half else 7) & 1:
            raise NotMappedError(f"this half of the address space is switched off (EPD{half})")
        number = tcr >> (30 if half else 14) & 3
        if number not in _GRANULES[half]:
            raise PageTableError(f"TCR_EL1 is {tcr:#x}: its TG{half} is reserved")
        self.granule_bits = _GRANULES[half][number]
        size = tcr >> (16 if half else 0) & 0x3F
        self._va_bits = 64 - size
        self._ds = bool(tcr & _TCR_DS) and self.granule_bits != 16
        large = self._ds or self.granule_bits == 16
        if not self.granule_bits < self._va_bits <= (52 if large else 48):
            raise PageTableError(
                f"TCR_EL1 is {tcr:#x}: T{half}SZ is {size}, which no address space has"
            )
        self._pa_bits = min(_OUTPUT_BITS[tcr >> 32 & 7], 52 if large else 48)
        self._stride = self.granule_bits - 3
        # Rounded up: the first table may be smaller than the others.
        n_levels = -(-(self._va_bits - self.granule_bits) // self._stride)
        self._first_level = _LAST_LEVEL + 1 - n_levels
        self._root = self._root_of(registers.ttbr1 if half else registers.ttbr0)

    def _root_of(self, ttbr: int) -> int:
        n_bits = self._va_bits - self._shift(self._first_level) + 3
        base = ttbr & ((1 << 48) - 1)
        if self._pa_bits == 52:
            base = base & ~0x3F | (ttbr >> 2 & 0xF) << 48
        base &= ~((1 << n_bits) - 1)
        if base >> self._pa_bits:
            raise PageTableError(
                f"TTBR{self._half}_EL1 is {ttbr:#x}: more than an address of {self._pa_bits} bits"
            )
        return base

    def _shift(self, level: int) -> int:
        return self.granule_bits + (_LAST_LEVEL - level) * self._stride

    def is_canonical(self, address: int) -> bool:
        """Whether an address, without a tag, is in this half as far as it reaches."""
        above = address >> self._va_bits
        return above == (_ALL >> self._va_bits if self._half else 0)

    def parts(self, start: int, end: int) -> Iterator[Mapped | Unmapped]:
        """All of a range of addresses without tags: its mapped parts, and the others.

        In order, without gaps; adjacent parts are not joined. A table that cannot be read is
        reported as what it would map.
        """
        bottom = (_ALL + 1 - (1 << self._va_bits)) if self._half else 0
        top = bottom + (1 << self._va_bits)
        if start < min(bottom, end):
            yield self._beyond(start, min(bottom, end))
        if max(start, bottom) < min(end, top):
            at, stop = max(start, bottom), min(end, top)
            yield from self._table(self._root, self._first_level, bottom, at, stop)
        if max(start, top) < end:
            yield self._beyond(max(start, top), end)

    def _beyond(self, start: int, end: int) -> Unmapped:
        error = NotMappedError(
            f"virtual addresses have {self._va_bits} bits in this half of the address space"
        )
        return Unmapped(start, end - start, error)

    def _table(
        self, table: int, level: int, bottom: int, start: int, end: int
    ) -> Iterator[Mapped | Unmapped]:
        """What a table says about a range within the memory from `bottom` on that it maps."""
        shift = self._shift(level)
        first, last = (start - bottom) >> shift, (end - 1 - bottom) >> shift
        at = table + first * _DESCRIPTOR_BYTES
        n_entries = last - first + 1
        try:
            data = self._read(at, n_entries * _DESCRIPTOR_BYTES)
        except PageTableError as error:
            error.message = f"a table of level {level}: {error.message}"
            error.args = (error.message,)
            yield Unmapped(start, end - start, error)
            return
        for n, descriptor in enumerate(struct.unpack(f"{self._order}{n_entries}Q", data)):
            here = bottom + ((first + n) << shift)
            low, high = max(start, here), min(end, here + (1 << shift))
            where = at + n * _DESCRIPTOR_BYTES
            yield from self._entry(descriptor, where, level, here, low, high)

    def _entry(
        self, descriptor: int, where: int, level: int, here: int, low: int, high: int
    ) -> Iterator[Mapped | Unmapped]:
        try:
            is_table, address = self._decoded(descriptor, where, level)
        except MtetoolError as error:
            yield Unmapped(low, high - low, error)
            return
        if is_table:
            yield from self._table(address, level + 1, here, low, high)
        else:
            block_bytes = 1 << self._shift(level)
            yield Mapped(low, high - low, address + low - here, block_bytes)

    def _decoded(self, descriptor: int, where: int, level: int) -> tuple[bool, int]:
        """Whether a descriptor names a table, and the address in it. Raises NotMappedError."""
        is_last = level == _LAST_LEVEL
        named = f"its descriptor of level {level}, {descriptor:#x} at {where:#x},"
        if not descriptor & 1:
            raise NotMappedError(f"{named} is not valid")
        is_block = not descriptor & 2
        if is_block and (is_last or not self._has_blocks(level)):
            raise NotMappedError(f"{named} is reserved")
        is_table = not is_block and not is_last
        low_bit = self.granule_bits if is_table else self._shift(level)
        address = self._output(descriptor, low_bit)
        if address >> self._pa_bits:
            raise NotMappedError(
                f"{named} has an address of more than {self._pa_bits} bits (address size fault)"
            )
        return is_table, address

    def _has_blocks(self, level: int) -> bool:
        if self.granule_bits == 12:
            return level in ((0, 1, 2) if self._ds else (1, 2))
        large = self._ds or (self.granule_bits == 16 and self._pa_bits == 52)
        return level in ((1, 2) if large else (2,))

    def _output(self, descriptor: int, low_bit: int) -> int:
        bits = 50 if self._ds else 48
        address = descriptor & ((1 << bits) - 1) & ~((1 << low_bit) - 1)
        if self._ds:
            return address | (descriptor >> 8 & 3) << 50
        if self.granule_bits == 16 and self._pa_bits == 52:
            return address | (descriptor >> 12 & 0xF) << 48
        return address
