"""Arithmetic on extents, against sets of addresses; relocation; what does not fit."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import LayoutError, MisalignedError, RangeError, UsageError
from mtetool.flows.relocation import Relocation, check_fit
from mtetool.guest import Extent, Memslot
from mtetool.sources.layout import (
    Layout,
    check_aligned,
    check_inside,
    common,
    merged,
    total_bytes,
    without,
)

extents = st.lists(
    st.builds(Extent, ipa=st.integers(0, 60), size_bytes=st.integers(1, 12)), max_size=6
)


def addresses(parts: list[Extent]) -> set[int]:
    return {ipa for part in parts for ipa in range(part.ipa, part.ipa + part.size_bytes)}


def is_tidy(parts: list[Extent]) -> bool:
    return all(a.ipa + a.size_bytes < b.ipa for a, b in pairwise(parts))


@given(extents)
def test_merged_holds_the_same_addresses(parts: list[Extent]) -> None:
    assert addresses(merged(parts)) == addresses(parts)
    assert is_tidy(merged(parts))
    assert total_bytes(merged(parts)) == len(addresses(parts))


@given(extents, extents)
def test_common_is_the_intersection(a: list[Extent], b: list[Extent]) -> None:
    assert addresses(common(a, b)) == addresses(a) & addresses(b)


@given(extents, extents)
def test_without_is_the_difference(a: list[Extent], b: list[Extent]) -> None:
    assert addresses(without(a, b)) == addresses(a) - addresses(b)


def test_slots_are_found_by_address() -> None:
    low, high = Memslot(1, 0x1000, 0x1000), Memslot(0, 0x4000, 0x2000)
    layout = Layout((high, low), 4096)
    assert [layout.slot_at(ipa) for ipa in (0, 0x1000, 0x1FFF, 0x2000, 0x4000, 0x6000)] == [
        None,
        low,
        low,
        None,
        high,
        None,
    ]
    assert [layout.next_start(ipa) for ipa in (0, 0x1000, 0x4000)] == [0x1000, 0x4000, None]


def test_a_misaligned_range_names_the_range_around_it() -> None:
    with pytest.raises(MisalignedError) as caught:
        check_aligned([Extent(0x1010, 0x20)], 4096, "page size")
    assert caught.value.hint is not None
    assert "0x1000:0x1000" in caught.value.hint


def test_an_empty_range_and_one_outside() -> None:
    with pytest.raises(RangeError):
        check_aligned([Extent(0x1000, 0)], 4096, "page size")
    with pytest.raises(RangeError, match="0x9000:0x1000"):
        check_inside([Extent(0x9000, 0x1000)], [Extent(0, 0x9000)], "emu:x")


SLOTS = (Memslot(0, 0x1000, 0x2000), Memslot(1, 0x8000, 0x1000))


def test_relocation_splits_at_slots() -> None:
    move = Relocation([(0x1000, 0x5000)], SLOTS)
    assert list(move(Extent(0x0, 0x9000))) == [
        (0, Extent(0, 0x1000)),
        (0x1000, Extent(0x5000, 0x2000)),
        (0x3000, Extent(0x3000, 0x6000)),
    ]


def test_relocation_of_what_is_no_slot() -> None:
    with pytest.raises(UsageError, match="0x2000"):
        Relocation([(0x2000, 0x5000)], SLOTS)
    with pytest.raises(UsageError, match="twice"):
        Relocation([(0x1000, 0x5000), (0x1000, 0x6000)], SLOTS)


def test_relocation_to_no_page() -> None:
    with pytest.raises(MisalignedError):
        Relocation([(0x1000, 0x5010)], SLOTS).check_targets(4096)


def test_two_slots_to_one_place() -> None:
    move = Relocation([(0x1000, 0x7000)], SLOTS)
    with pytest.raises(LayoutError, match="0x8000"):
        move.moved([Extent(s.ipa, s.size_bytes) for s in SLOTS])


def test_swapping_two_slots() -> None:
    slots = (Memslot(0, 0x1000, 0x1000), Memslot(1, 0x2000, 0x1000))
    move = Relocation([(0x1000, 0x2000), (0x2000, 0x1000)], slots)
    assert move.moved([Extent(0x1000, 0x2000)]) == [Extent(0x1000, 0x2000)]


def test_what_does_not_fit() -> None:
    layout = Layout((Memslot(0, 0x10000, 0x10000), Memslot(1, 0x20000, 0x10000)), 0x10000)
    check_fit([Extent(0x10000, 0x20000)], layout, [Extent(0x10000, 0x20000)])
    with pytest.raises(LayoutError, match="pages of the guest"):
        check_fit([], layout, [Extent(0x10000, 0x1000)])
    with pytest.raises(LayoutError, match="0x30000:0x10000"):
        check_fit([Extent(0x20000, 0x20000)], layout, [])


def test_device_memory_takes_no_tags() -> None:
    layout = Layout((Memslot(0, 0x1000, 0x1000, kind="device"),), 0x1000)
    with pytest.raises(LayoutError):
        check_fit([Extent(0x1000, 0x1000)], layout, [])
