"""The walker of page tables, against tables that are built by the manual's figures."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.backends.kvm.page_tables import PageTables, Registers
from mtetool.backends.kvm.virtual import VcpuAddresses
from mtetool.errors import GuestError, NotMappedError, PageTableError
from mtetool.guest import Mapped, Unmapped, Virtual
from tests.backends.kvm.tables import BLOCKS, LEVELS, Tables

_PAGES = (4096, 16384, 65536)
_SIZES = {
    (4096, False): (25, 48),
    (4096, True): (25, 52),
    (16384, False): (25, 48),
    (16384, True): (25, 52),
    (65536, False): (25, 52),
    (65536, True): (25, 52),
}
KINDS = [(page, wide) for page in _PAGES for wide in (False, True)]


def walker(tables: Tables, **changes: Any) -> PageTables:
    return PageTables(registers(tables, **changes), tables.half, tables.read)


def registers(tables: Tables, **changes: Any) -> Registers:
    ttbr = {f"ttbr{tables.half}": tables.ttbr(), f"ttbr{1 - tables.half}": 0xDEAD_0000}
    sctlr = 1 | (1 << 25 if tables.big_endian else 0)
    return Registers(**{"sctlr": sctlr, "tcr": tables.tcr(), **ttbr, **changes})


def one(found: PageTables, address: int) -> Mapped | Unmapped:
    (part,) = found.parts(address, address + 1)
    return part


@st.composite
def spaces(draw: st.DrawFn) -> tuple[Tables, dict[int, tuple[int, int]]]:
    """Tables with some pages and blocks: offset -> (IPA, size)."""
    page, wide = draw(st.sampled_from(KINDS))
    low, high = _SIZES[page, wide]
    tables = Tables(
        page,
        draw(st.integers(low, high)),
        wide,
        draw(st.integers(0, 1)),
        draw(st.booleans()),
        # Tables beyond 48 bits, too.
        draw(st.sampled_from([0x4000_0000, *([0x9_0000_4000_0000] if wide else [])])),
    )
    kinds = [level for level in (*BLOCKS[page, wide], 3) if level in tables.levels]
    mapped: dict[int, tuple[int, int]] = {}
    for _ in range(draw(st.integers(1, 12))):
        level = draw(st.sampled_from(kinds))
        size = 1 << LEVELS[page][level][1]
        offset = draw(st.integers(0, (1 << tables.va_bits) - 1)) // size * size
        ipa = draw(st.integers(0, (1 << (52 if wide else 48)) - 1)) // size * size
        if any(offset < at + n and at < offset + size for at, (_, n) in mapped.items()):
            continue
        tables.map(offset, ipa, level)
        mapped[offset] = (ipa, size)
    return tables, mapped


@given(spaces(), st.data())
def test_all_that_was_mapped_is_found_and_nothing_else(
    made: tuple[Tables, dict[int, tuple[int, int]]], data: st.DataObject
) -> None:
    tables, mapped = made
    found = walker(tables)
    for offset, (ipa, size) in mapped.items():
        inside = data.draw(st.integers(0, size - 1))
        address = tables.whole(offset + inside)
        assert one(found, address) == Mapped(address, 1, ipa + inside, size)
    elsewhere = data.draw(st.integers(0, (1 << tables.va_bits) - 1))
    if not any(at <= elsewhere < at + size for at, (_, size) in mapped.items()):
        part = one(found, tables.whole(elsewhere))
        assert isinstance(part, Unmapped)
        assert isinstance(part.error, NotMappedError)


@given(spaces(), st.data())
def test_a_range_is_what_its_addresses_are(
    made: tuple[Tables, dict[int, tuple[int, int]]], data: st.DataObject
) -> None:
    tables, mapped = made
    offset = data.draw(st.sampled_from(sorted(mapped)))
    start = max(offset - data.draw(st.integers(0, 3 * tables.page)), 0)
    end = min(offset + data.draw(st.integers(1, 8 * tables.page)), 1 << tables.va_bits)
    at = tables.whole(start)
    found = walker(tables)
    for part in found.parts(tables.whole(start), tables.whole(start) + end - start):
        assert part.address == at
        at += part.size_bytes
        for address in (part.address, at - 1):
            single = one(found, address)
            assert isinstance(single, type(part))
            if isinstance(part, Mapped) and isinstance(single, Mapped):
                assert single.ipa == part.ipa + address - part.address
    assert at == tables.whole(start) + end - start


@given(
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
    st.randoms(use_true_random=False),
)
def test_garbage_ends_in_messages(
    sctlr: int, tcr: int, ttbr: int, address: int, random: Any
) -> None:
    """Registers and tables may hold anything: each answer is a mapping or one of ours."""

    def read(ipa: int, length: int) -> bytes:
        assert 0 <= ipa < 1 << 52
        assert ipa % 8 == 0
        if random.random() < 0.2:
            raise PageTableError(f"{ipa:#x} is not in the guest's memory")
        return bytes(random.randbytes(length))

    space = VcpuAddresses(0, Registers(sctlr, tcr, ttbr, ttbr), read)
    try:
        pointer = space.pointer(address)
    except GuestError:
        return
    (part,) = space.parts(pointer.address, pointer.address + 1)
    assert isinstance(part, Mapped) or isinstance(part.error, GuestError)


def _mapped_tables(page: int = 4096, half: int = 1) -> Tables:
    tables = Tables(page, 48, wide=False, half=half)
    tables.map(0x1234_5678_0000, 0x4567_0000, 3)
    return tables


def _taken(address: int, tag: int | None, is_unchecked: bool, half: int) -> Virtual:
    return Virtual(address, tag, is_unchecked=is_unchecked, half=half)


def test_a_kernel_pointer_of_kasan() -> None:
    """`FF_0x1234…` with the tag 3 in its top byte, as a report names it."""
    tables = _mapped_tables()
    space = VcpuAddresses(2, registers(tables), tables.read)
    pointer = space.pointer(0xF3FF_1234_5678_0128)
    assert pointer == _taken(0xFFFF_1234_5678_0128, 3, False, 1)
    part = next(iter(space.parts(pointer.address, pointer.address + 1)))
    assert part == Mapped(0xFFFF_1234_5678_0128, 1, 0x4567_0128, 4096)
    # The kernel's own tag is not checked (TCMA1); without that, it is a tag like any other.
    assert space.pointer(0xFFFF_1234_5678_0128) == Virtual(
        0xFFFF_1234_5678_0128, None, is_unchecked=True, half=1
    )
    assert space.pointer(0x0FFF_1234_5678_0128) == Virtual(
        0xFFFF_1234_5678_0128, 15, is_unchecked=True, half=1
    )
    checked = VcpuAddresses(2, registers(tables, tcr=tables.tcr() & ~(3 << 57)), tables.read)
    assert checked.pointer(0xFFFF_1234_5678_0128) == Virtual(
        0xFFFF_1234_5678_0128, 15, is_unchecked=False, half=1
    )


def test_a_pointer_of_the_lower_half() -> None:
    tables = _mapped_tables(half=0)
    space = VcpuAddresses(0, registers(tables), tables.read)
    assert space.pointer(0x1234_5678_0128) == Virtual(
        0x1234_5678_0128, None, is_unchecked=True, half=0
    )
    assert space.pointer(0x0700_1234_5678_0128) == Virtual(
        0x1234_5678_0128, 7, is_unchecked=False, half=0
    )
    assert space.pointer(0xF000_1234_5678_0128) == Virtual(
        0x1234_5678_0128, 0, is_unchecked=True, half=0
    )


def test_without_top_byte_ignore_a_tag_is_no_address() -> None:
    tables = _mapped_tables()
    plain = registers(tables, tcr=tables.tcr() & ~(3 << 37))
    space = VcpuAddresses(0, plain, tables.read)
    assert space.pointer(0xFFFF_1234_5678_0128).tag is None
    with pytest.raises(NotMappedError, match="no virtual address of this guest"):
        space.pointer(0xF3FF_1234_5678_0128)


def test_addresses_between_the_halves() -> None:
    tables = _mapped_tables()
    space = VcpuAddresses(0, registers(tables), tables.read)
    with pytest.raises(NotMappedError, match="neither all 0 nor all 1"):
        space.pointer(0xFF80_1234_5678_0000)
    below, _ = walker(tables).parts(0xFFFE_FFFF_FFFF_F000, 0xFFFF_0000_0000_0010)
    assert isinstance(below, Unmapped)
    assert below.size_bytes == 0x1000
    *_, beyond = walker(tables).parts(0xFFFF_FFFF_FFFF_FFF0, (1 << 64) + 16)
    assert (beyond.address, beyond.size_bytes) == (1 << 64, 16)


def test_the_mmu_is_off() -> None:
    space = VcpuAddresses(0, Registers(0x30D0_0800, 0, 0, 0), lambda ipa, length: b"")
    assert not space.is_on
    assert space.pointer(0x4000_0010) == _taken(0x4000_0010, None, False, 0)
    assert list(space.parts(0x4000_0000, 0x4000_0100)) == [Mapped(0x4000_0000, 256, 0x4000_0000, 0)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tcr": 0}, "TG1 is reserved"),
        ({"tcr": 0b10 << 30 | 5 << 16 | 5 << 32}, "T1SZ is 5"),
        ({"tcr": 0b10 << 30 | 52 << 16 | 5 << 32}, "T1SZ is 52"),
        ({"tcr": 0b10 << 30 | 16 << 16, "ttbr1": 0x1_4000_0000}, "an address of 32 bits"),
        ({"tcr2": 1 << 5}, "128 bits"),
    ],
)
def test_registers_without_a_sense(changes: dict[str, int], message: str) -> None:
    with pytest.raises(PageTableError, match=message):
        walker(_mapped_tables(), **changes)


def test_a_half_that_is_switched_off() -> None:
    tables = _mapped_tables()
    with pytest.raises(NotMappedError, match="EPD1"):
        walker(tables, tcr=tables.tcr() | 1 << 23)


def test_a_table_outside_of_memory() -> None:
    tables = _mapped_tables()

    def read(ipa: int, length: int) -> bytes:
        if ipa // 0x10_0000 == (tables.root + 0x10_0000) // 0x10_0000:
            raise PageTableError(f"{ipa:#x} is not in the guest's memory")
        return tables.read(ipa, length)

    part = one(PageTables(registers(tables), 1, read), 0xFFFF_1234_5678_0000)
    assert isinstance(part, Unmapped)
    assert isinstance(part.error, PageTableError)
    assert part.error.message.startswith("a table of level 1: 0x4010")


@pytest.mark.parametrize(
    ("descriptor", "level", "message"),
    [
        (0, 2, "level 2, 0x0 at 0x[0-9a-f]+, is not valid"),
        (0x4567_0001, 3, "is reserved"),
        (0x4567_0001, 0, "is reserved"),
        (0x0000_8000_4567_0003, 3, "address size fault"),
    ],
)
def test_descriptors_that_map_nothing(descriptor: int, level: int, message: str) -> None:
    tables = _mapped_tables()
    tables.memory[tables.slot(0x1234_5678_0000, level)] = descriptor
    part = one(walker(tables, tcr=tables.tcr(pa_bits=44)), 0xFFFF_1234_5678_0000)
    assert isinstance(part, Unmapped)
    assert isinstance(part.error, NotMappedError)
    assert re.search(message, part.error.message), part.error.message


@pytest.mark.parametrize(("page", "wide"), KINDS)
def test_blocks_only_where_the_manual_has_them(page: int, wide: bool) -> None:
    tables = Tables(page, 52 if wide else 48, wide, 0)
    for level in tables.levels:
        if level == 3:
            continue
        tables.memory.clear()
        tables.map(0, 0, level)
        part = one(walker(tables), 0)
        assert isinstance(part, Mapped) == (level in BLOCKS[page, wide]), (page, wide, level)


def test_a_table_that_names_itself_ends() -> None:
    tables = Tables(4096, 48, wide=False, half=0)
    tables.memory[tables.root] = tables.root | 3
    part = one(walker(tables), 0x123)
    assert isinstance(part, Mapped)
    assert part.ipa == tables.root + 0x123


def test_a_first_table_that_is_smaller_than_a_page() -> None:
    """With pages of 16 KiB and 48 bits it has two entries, and 16 bytes of alignment are enough."""
    tables = Tables(16384, 48, wide=False, half=0, next_table=0x4000_0010)
    tables.next_table = 0x5000_0000
    tables.map(0x8000_0000_0000, 0x4567_0000 // 16384 * 16384, 3)
    part = one(walker(tables), 0x8000_0000_0000)
    assert isinstance(part, Mapped)
