"""Page tables as the Arm Architecture Reference Manual draws them, for tests of the walker.

Independent of the walker: where it computes, this has the manual's fields as literals. `LEVELS` are
the bits of an address that index the table of each level (figures "Translation of a … granule"),
`BLOCKS` the levels that may have blocks; both with and without addresses of 52 bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

LEVELS: dict[int, dict[int, tuple[int, int]]] = {
    4096: {-1: (51, 48), 0: (47, 39), 1: (38, 30), 2: (29, 21), 3: (20, 12)},
    16384: {0: (51, 47), 1: (46, 36), 2: (35, 25), 3: (24, 14)},
    65536: {1: (51, 42), 2: (41, 29), 3: (28, 16)},
}
BLOCKS = {
    (4096, False): (1, 2),
    (4096, True): (0, 1, 2),
    (16384, False): (2,),
    (16384, True): (1, 2),
    (65536, False): (2,),
    (65536, True): (1, 2),
}
TG0 = {4096: 0b00, 65536: 0b01, 16384: 0b10}
TG1 = {16384: 0b01, 4096: 0b10, 65536: 0b11}
IPS = {32: 0, 36: 1, 40: 2, 42: 3, 44: 4, 48: 5, 52: 6}


@dataclass
class Tables:
    """The tables of one half of an address space, in a memory of their own.

    `wide` has addresses of 52 bits: FEAT_LPA with pages of 64 KiB, FEAT_LPA2 (TCR_EL1.DS) else.
    """

    page: int
    va_bits: int
    wide: bool
    half: int
    big_endian: bool = False
    next_table: int = 0x4000_0000
    memory: dict[int, int] = field(default_factory=dict)
    tables: dict[tuple[int, int], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.levels = {
            level: (min(high, self.va_bits - 1), low)
            for level, (high, low) in LEVELS[self.page].items()
            if low < self.va_bits
        }
        self.first = min(self.levels)
        self.root = self._table(self.first, 0)

    def _table(self, level: int, prefix: int) -> int:
        key = (level, prefix)
        if key not in self.tables:
            self.tables[key] = self.next_table
            self.next_table += 0x10_0000
        return self.tables[key]

    def slot(self, address: int, level: int) -> int:
        """The address of the descriptor of that level for an address; makes the table."""
        high, low = self.levels[level]
        table = self._table(level, address >> (high + 1))
        return table + 8 * (address >> low & ((1 << (high - low + 1)) - 1))

    def map(self, address: int, ipa: int, level: int) -> None:
        """Map the page or block of that level around an address to an IPA."""
        offset = address & ((1 << self.va_bits) - 1)
        for above in range(self.first, level):
            high = self.levels[above + 1][0]
            table = self._table(above + 1, offset >> (high + 1))
            self.memory[self.slot(offset, above)] = self._address(table) | 0b11
        attributes = 0x0060_0000_0000_0000 | 1 << 10
        kind = 0b11 if level == 3 else 0b01
        self.memory[self.slot(offset, level)] = self._address(ipa) | attributes | kind

    def _address(self, address: int) -> int:
        if not self.wide:
            assert address < 1 << 48
            return address
        if self.page == 65536:
            return (address & 0x0000_FFFF_FFFF_0000) | (address >> 48 & 0xF) << 12
        return (address & 0x0003_FFFF_FFFF_F000) | (address >> 50 & 0x3) << 8

    def tcr(self, pa_bits: int | None = None) -> int:
        """TCR_EL1 with this half; the other one is switched off. TBI and TCMA are on for both."""
        value = IPS[pa_bits or (52 if self.wide else 48)] << 32 | 0b11 << 37 | 0b11 << 57
        if self.wide and self.page != 65536:
            value |= 1 << 59
        size = 64 - self.va_bits
        if self.half:
            return value | size << 16 | TG1[self.page] << 30 | 1 << 7
        return value | size | TG0[self.page] << 14 | 1 << 23

    def ttbr(self) -> int:
        """TTBR0_EL1 or TTBR1_EL1, with an ASID and CnP."""
        base = self.root
        if self.wide:
            base = (base & 0x0000_FFFF_FFFF_FFC0) | (base >> 48 & 0xF) << 2
        return 0x1234 << 48 | base | 1

    def read(self, ipa: int, length: int) -> bytes:
        """Read the memory: all that was not written is 0."""
        order = "big" if self.big_endian else "little"
        words = (self.memory.get(at, 0) for at in range(ipa, ipa + length, 8))
        return b"".join(word.to_bytes(8, order) for word in words)  # type: ignore[arg-type]

    def whole(self, offset: int) -> int:
        """The virtual address of an offset in this half."""
        return offset | ((1 << 64) - (1 << self.va_bits) if self.half else 0)
