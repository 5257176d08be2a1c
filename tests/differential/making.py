"""Short ways to make VMs and copies, for tests that run on both sides."""

from __future__ import annotations

from mtetool import uapi
from tests.differential.sides import ARENA, Kind, Side, pattern

IPA = 1 << 30
TO_GUEST, FROM_GUEST = uapi.KVM_ARM_TAGS_TO_GUEST, uapi.KVM_ARM_TAGS_FROM_GUEST


def buffer_of(side: Side) -> int:
    """Return where the buffers for tags are: two pages, with nothing mapped after them."""
    return ARENA + 64 * side.page_size_bytes


def guest(side: Side, kind: Kind = "private", n_pages: int = 4) -> None:
    """Make VM 0 with MTE and memory of a kind (file 0), and a buffer with seed 0's bytes."""
    page = side.page_size_bytes
    assert side.create_vm(0, 0) == 0
    assert side.enable_cap(0, uapi.KVM_CAP_ARM_MTE, 0, 0) == 0
    if kind.startswith("file"):
        assert side.create_file(0, "memory", n_pages * page) == 0
    assert side.map(ARENA, n_pages * page, kind, "rw", 0, 0) == 0
    assert side.set_memslot(0, 0, 0, IPA, n_pages * page, ARENA) == 0
    assert side.map(buffer_of(side), 2 * page, "private", "rw", -1, 0) == 0
    assert side.unmap(buffer_of(side) + 2 * page, page) == 0
    assert side.fill(buffer_of(side), 2 * page, 0) == 2 * page


def read(side: Side, ipa: int) -> bytes:
    """Read the tags of one page."""
    page, buffer = side.page_size_bytes, buffer_of(side)
    assert side.copy_tags(0, ipa, page, buffer, FROM_GUEST, [0, 0]) == page
    return side.contents(buffer, page // 16)


def write(side: Side, ipa: int, seed: int) -> bytes:
    """Write the tags of a seed to one page; return them as they must read back."""
    page, buffer = side.page_size_bytes, buffer_of(side)
    assert side.fill(buffer, page // 16, seed) == page // 16
    assert side.copy_tags(0, ipa, page, buffer, TO_GUEST, [0, 0]) == page
    return bytes(tag & 0xF for tag in pattern(page // 16, seed))
