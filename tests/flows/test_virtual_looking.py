"""Tags by virtual addresses: which vCPU counts, and what its pages hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest

from mtetool.errors import (
    AmbiguousAddressError,
    BusyError,
    GuestError,
    NotMappedError,
    PageTableError,
)
from mtetool.flows.dump import OUTSIDE
from mtetool.flows.virtual_looking import VirtualLook, look_at_virtual
from mtetool.guest import AddressSpace, Extent, Mapped, Memslot, Unmapped, Virtual
from mtetool.sources.copying import Copied, Step

PAGE = 4096
BASE = 0x4000_0000
KERNEL = 0xFFFF_0000_0000_0000


class Memory:
    """A source of 16 pages; a granule's tag is the number of its page, the first one's 15."""

    name = "kvm:1"
    page_size_bytes = PAGE
    memslots: Sequence[Memslot] = (Memslot(0, BASE, 16 * PAGE),)

    def extents(self) -> list[Extent]:
        return [Extent(BASE, 16 * PAGE)]

    def check(self, extents: Sequence[Extent]) -> None:
        pass

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        for extent in extents:
            granules = range((extent.ipa - BASE) // 16, (extent.end - BASE) // 16)
            tags = bytearray(15 if n % 256 == 0 else n // 256 for n in granules)
            yield Copied(extent.ipa, memoryview(tags))


@dataclass(eq=False)
class Space:
    """Maps pages by a table; `changing` are later tables, one for each look at an address."""

    vcpu: int
    pages: dict[int, int]
    is_on: bool = True
    error: type[GuestError] = NotMappedError
    changing: list[dict[int, int]] = field(default_factory=list)

    def pointer(self, given: int) -> Virtual:
        if self.changing:
            self.pages = self.changing.pop(0)
        half = given >> 55 & 1
        address = given | 0xFF << 56 if half else given & ~(0xFF << 56)
        tag = given >> 56 & 15
        return Virtual(address, tag or None, half == 1 and tag == 15, half)

    def parts(self, start: int, end: int) -> Iterator[Mapped | Unmapped]:
        for page in range(start // PAGE, -(-end // PAGE)):
            low, high = max(start, page * PAGE), min(end, (page + 1) * PAGE)
            ipa = self.pages.get(page * PAGE)
            if ipa is None:
                yield Unmapped(low, high - low, self.error("nothing there"))
            else:
                yield Mapped(low, high - low, ipa + low % PAGE, PAGE)


def one(address: int, *spaces: AddressSpace, n_context: int = 4) -> VirtualLook:
    (found,) = look_at_virtual(Memory(), spaces, [address], n_context)
    return found


def test_neighbours_are_those_in_virtual_memory() -> None:
    space = Space(0, {KERNEL: BASE + 7 * PAGE, KERNEL + PAGE: BASE + 2 * PAGE})
    found = one(0xF7FF_0000_0000_0FF0, space)
    assert found.found
    assert found.look
    assert (found.found.ipa, found.look.tag, found.look.matches) == (BASE + 8 * PAGE - 16, 7, True)
    assert found.slot == Memory.memslots[0]
    assert found.look.context == bytes([7, 7, 7, 7, 7, 15, 2, 2, 2])
    edge = one(KERNEL + 2 * PAGE - 16, space)
    assert edge.look
    assert edge.look.context == bytes([2] * 5 + [OUTSIDE] * 4)


def test_a_tag_that_the_guest_does_not_check_is_no_mismatch() -> None:
    found = one(KERNEL, Space(0, {KERNEL: BASE + 7 * PAGE}))
    assert found.look
    assert (found.look.tag, found.look.matches) == (15, None)
    other = one(KERNEL + 16, Space(0, {KERNEL: BASE + 7 * PAGE}))
    assert other.look
    assert other.look.matches is None


def test_mapped_to_what_is_not_memory() -> None:
    found = one(KERNEL, Space(0, {KERNEL: 0x900_0000}))
    assert found.found
    assert found.look
    assert (found.found.ipa, found.slot, found.look.tag) == (0x900_0000, None, None)


def test_the_first_vcpu_that_maps_a_kernels_address() -> None:
    off, trampoline = Space(0, {KERNEL: BASE + 5 * PAGE}, is_on=False), Space(1, {})
    found = one(KERNEL, off, trampoline, Space(2, {KERNEL: BASE}), Space(3, {KERNEL: BASE + PAGE}))
    assert found.found
    assert (found.found.space.vcpu, found.found.ipa) == (2, BASE)
    alone = one(KERNEL, off, Space(1, {KERNEL: BASE}, is_on=False))
    assert alone.found
    assert alone.found.ipa == BASE + 5 * PAGE


def test_a_programs_address_on_several_vcpus() -> None:
    a, b, same = Space(0, {0x1000: BASE}), Space(1, {0x1000: BASE + PAGE}), Space(2, {0x1000: BASE})
    found = one(0x1000, a, b)
    assert isinstance(found.error, AmbiguousAddressError)
    assert "vCPU 0: 0x40000000, vCPU 1: 0x40001000" in found.error.message
    assert found.error.hint == "choose a vCPU: --vcpu 0"
    agreed = one(0x1000, a, same)
    assert agreed.found
    assert agreed.found.ipa == BASE


def test_an_address_that_nobody_maps() -> None:
    found = one(0x5000, Space(0, {}), Space(1, {}))
    assert isinstance(found.error, NotMappedError)
    assert found.error.message == "0x5000 is not mapped on vCPU 0: nothing there"
    broken = one(0x5000, Space(3, {}, error=PageTableError))
    assert isinstance(broken.error, PageTableError)
    assert broken.error.message == "0x5000 on vCPU 3: nothing there"


def test_tables_that_change_while_they_are_read() -> None:
    """Each try looks twice: the first finds the page moved, the second gone, the third stays."""
    before, after = {KERNEL: BASE}, {KERNEL: BASE + PAGE}
    found = one(KERNEL, Space(0, {}, changing=[before, after, after, {}, after, after]))
    assert found.found
    assert found.found.ipa == BASE + PAGE
    always = Space(0, {}, changing=[before, after] * 20)
    with pytest.raises(BusyError, match="faster than they can be read"):
        one(KERNEL, always)


def test_several_addresses_and_one_twice() -> None:
    space = Space(0, {KERNEL: BASE + 3 * PAGE})
    found = look_at_virtual(Memory(), [space], [KERNEL + 16, 0x10, KERNEL + 16], 0)
    assert [item.look.tag if item.look else None for item in found] == [3, None, 3]
