"""Run in the lab: a VMM whose guest memory is huge pages with tags of earlier users.

    python3 -m tests.lab.hugetlb

It prints the sizes of the memory and of a huge page, how many tags of the rest of a huge page are
not 0 after a copy to one of its pages, and `ready`; then it runs until its standard input ends.
"""

from __future__ import annotations

import sys

from mtetool import uapi
from tests.differential.real import RealSide
from tests.differential.sides import ARENA, HUGE_ARENA, HUGE_PAGES, Side

IPA = 1 << 30


def _vm(side: Side, vm: int) -> int:
    """Create a VM of huge pages only; return its size in bytes."""
    size = HUGE_PAGES * side.hugepage_bytes
    side.create_vm(vm, 0)
    assert side.enable_cap(vm, uapi.KVM_CAP_ARM_MTE, 0, 0) == 0
    assert side.map(HUGE_ARENA, size, "huge", "rw", -1, 0) == 0
    assert side.set_memslot(vm, 0, 0, IPA, size, HUGE_ARENA) == 0
    return size


def main() -> None:
    """Prepare the huge pages, print what is left in them, and wait."""
    side = RealSide(scrub=False)
    page = side.page_size_bytes
    size = _vm(side, 0)
    side.map(ARENA, size // 16, "private", "rw", -1, 0)
    side.fill(ARENA, size // 16, 9)
    assert side.copy_tags(0, IPA, size, ARENA, uapi.KVM_ARM_TAGS_TO_GUEST, [0, 0]) == size
    side.close_vm(0)
    side.unmap(HUGE_ARENA, size)
    _vm(side, 1)
    assert side.copy_tags(1, IPA, page, ARENA, uapi.KVM_ARM_TAGS_TO_GUEST, [0, 0]) == page
    rest = (IPA + page, side.hugepage_bytes - page, ARENA, uapi.KVM_ARM_TAGS_FROM_GUEST)
    assert side.copy_tags(1, *rest, [0, 0]) == rest[1]
    stale = sum(1 for tag in side.contents(ARENA, rest[1] // 16) if tag)
    print(size, side.hugepage_bytes, stale)
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
