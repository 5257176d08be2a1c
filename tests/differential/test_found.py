"""Cases in which the emulated kernel once answered unlike a real one, one test each.

They run on the emulator and, in the lab, on real kernels.
"""

from __future__ import annotations

import errno

import pytest

from mtetool import uapi
from mtetool.emulator import Behaviour, Host
from tests.differential.making import FROM_GUEST, IPA, TO_GUEST, buffer_of, guest, read, write
from tests.differential.sides import ARENA, HUGE_ARENA, Side, pattern


def test_cutting_a_file_drops_private_copies_of_it(side: Side) -> None:
    guest(side, "file-private")
    write(side, IPA, 5)
    assert side.truncate(0, 0) == 0
    answer = side.copy_tags(0, IPA, side.page_size_bytes, buffer_of(side), FROM_GUEST, [0, 0])
    assert answer == -errno.EFAULT


def test_a_hole_in_a_file_leaves_private_copies_of_it(side: Side) -> None:
    guest(side, "file-private")
    tags = write(side, IPA, 5)
    assert side.punch(0, 0, side.page_size_bytes) == 0
    assert read(side, IPA) == tags


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("room", [3, 20, 64])
def test_zeros_of_an_untagged_page_up_to_the_end_of_the_buffer(
    side: Side, host: Host, touched: bool, room: int
) -> None:
    guest(side)
    page = side.page_size_bytes
    if touched:
        side.fill(ARENA, page, 1)
    end = buffer_of(side) + 2 * page
    answer = side.copy_tags(0, IPA, page, end - room, FROM_GUEST, [0, 0])
    assert answer == -errno.EFAULT
    zeros = room if host.has(Behaviour.CLEAR_USER_EXACT) else room // 8 * 8
    assert side.contents(end - room, room) == bytes(zeros) + pattern(room - zeros, 0)


def test_tags_of_a_tagged_page_up_to_the_end_of_the_buffer(side: Side) -> None:
    guest(side)
    page = side.page_size_bytes
    tags = write(side, IPA, 9)
    end = buffer_of(side) + 2 * page
    assert side.copy_tags(0, IPA, page, end - 20, FROM_GUEST, [0, 0]) == -errno.EFAULT
    assert side.contents(end - 20, 20) == tags[:20]


def test_a_buffer_that_ends_leaves_no_stale_tags(side: Side) -> None:
    guest(side)
    page = side.page_size_bytes
    write(side, IPA, 9)
    end = buffer_of(side) + 2 * page
    assert side.copy_tags(0, IPA, page, end - 20, TO_GUEST, [0, 0]) == -errno.EFAULT
    assert read(side, IPA) == bytes(page // 16)


def test_a_tagged_pointer_is_taken_for_tagged_pages_only(side: Side) -> None:
    guest(side)
    page, tagged = side.page_size_bytes, buffer_of(side) | 5 << 56
    assert side.copy_tags(0, IPA, page, tagged, FROM_GUEST, [0, 0]) == -errno.EFAULT
    assert side.copy_tags(0, IPA, page, tagged, TO_GUEST, [0, 0]) == page
    assert side.copy_tags(0, IPA, page, tagged, FROM_GUEST, [0, 0]) == page


def test_memory_that_cannot_have_tags_is_looked_at_with_the_memslot_only(side: Side) -> None:
    page = side.page_size_bytes
    assert side.create_vm(0, 0) == 0
    assert side.create_file(0, "disk", 4 * page) == 0
    assert side.map(ARENA, 4 * page, "disk", "rw", 0, 0) == 0
    assert side.map(buffer_of(side), page, "private", "rw", -1, 0) == 0
    assert side.set_memslot(0, 0, 0, IPA, 4 * page, ARENA) == 0
    assert side.enable_cap(0, uapi.KVM_CAP_ARM_MTE, 0, 0) == 0
    assert read(side, IPA + page) == bytes(page // 16)
    tags = write(side, IPA, 3)
    assert read(side, IPA) == tags
    # From now on, a change of the slot is refused; its removal is not.
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES
    assert side.set_memslot(0, 0, flags, IPA, 4 * page, ARENA) == -errno.EINVAL
    assert side.set_memslot(0, 0, 0, IPA, 0, ARENA) == 0


def test_hugetlb_memory_in_a_vm_with_mte(side: Side, host: Host) -> None:
    size = side.hugepage_bytes
    assert size, "this kernel was built or booted without huge pages to try"
    guest(side)
    assert side.map(HUGE_ARENA, size, "huge", "rw", -1, 0) == 0
    answer = side.set_memslot(0, 1, 0, 1 << 34, size, HUGE_ARENA)
    if not host.has(Behaviour.HUGETLB_TAGS):
        assert answer == -errno.EINVAL
        return
    assert answer == 0
    tags = write(side, 1 << 34, 3)
    assert read(side, 1 << 34) == tags
    assert not any(read(side, (1 << 34) + side.page_size_bytes))
