"""Memslots given by hand, with addresses in this process, whose mappings are known."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from mtetool import procfs
from mtetool.attach.helper import PAGE_BYTES
from mtetool.backends.kvm.by_hand import by_hand_and_proven, check_by_hand, places_by_hand
from mtetool.errors import MisalignedError, RangeError, UsageError
from mtetool.guest import Memslot
from mtetool.spans import Place

BASE = 0x4000_0000
SIZE = 16 * PAGE_BYTES


def told(address: int, size: int = SIZE, ipa: int = BASE) -> Memslot:
    return Memslot(0, ipa, size, None, host_address=address)


def test_it_must_be_memory_of_the_process() -> None:
    with mmap.mmap(-1, SIZE) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.addressof(first)
        del first
        check_by_hand(os.getpid(), [told(address), Memslot(0, 0, PAGE_BYTES)])
        with pytest.raises(RangeError, match="does not map"):
            check_by_hand(os.getpid(), [told(address, 1 << 40)])
        with pytest.raises(MisalignedError):
            check_by_hand(os.getpid(), [told(address + 8)])
    for nothing in (0, PAGE_BYTES, (1 << 64) - SIZE):
        with pytest.raises(RangeError, match="does not map"):
            check_by_hand(os.getpid(), [told(nothing)])


def test_what_may_not_be_written_is_no_guest_s() -> None:
    maps = procfs.mappings(os.getpid())
    readonly = next(m.start for m in maps if m.flags == "r--p" and m.inode)
    with pytest.raises(RangeError):
        check_by_hand(os.getpid(), [told(readonly, PAGE_BYTES)])


def test_a_process_that_nobody_may_look_at_is_told_by_the_attach() -> None:
    check_by_hand(1 << 30, [told(PAGE_BYTES)])


def test_the_kernel_has_the_last_word() -> None:
    by_hand = places_by_hand([told(0x7000_0000), Memslot(1, 0, SIZE)])
    assert by_hand == [(BASE, SIZE, 0x7000_0000)]
    assert by_hand_and_proven(by_hand, []) == by_hand
    # One of the two places is a part of the other.
    whole = Place(BASE - SIZE, 4 * SIZE, 0x7000_0000 - SIZE)
    assert by_hand_and_proven(by_hand, [whole]) == [whole, *by_hand]
    assert by_hand_and_proven([whole], by_hand) == [*by_hand, whole]
    elsewhere = [Place(BASE, SIZE, 0x6000_0000)]
    with pytest.raises(UsageError, match="the kernel says it is at 0x60000000"):
        by_hand_and_proven(by_hand, elsewhere)
    # One of several possible places can be the one given by hand.
    assert by_hand_and_proven(by_hand, [*elsewhere, *by_hand])
    assert by_hand_and_proven(by_hand, [Place(0, SIZE, 0x6000_0000)])
