"""Totals speak of all ranges, the list of the first thousand."""

from __future__ import annotations

import numpy as np

from mtetool.flows.comparing import add_differences
from mtetool.flows.tally import LISTED_MAX, Tally
from mtetool.snapshot.model import Extent, Missing


def test_ranges_that_touch_are_joined() -> None:
    tally: Tally[Extent] = Tally()
    for ipa in (0, 16, 32, 64):
        tally.add(Extent(ipa, 16))
    assert tally.items == [Extent(0, 48), Extent(64, 16)]
    assert (tally.count, tally.size_bytes) == (2, 64)


def test_other_reasons_are_kept_apart() -> None:
    tally: Tally[Missing] = Tally()
    tally.add(Missing(0, 16, 14, "a"))
    tally.add(Missing(16, 16, 14, "b"))
    assert tally.count == 2


def test_the_list_is_bounded_and_the_totals_are_not() -> None:
    tally: Tally[Extent] = Tally()
    for n in range(LISTED_MAX * 3):
        tally.add(Extent(n * 32, 16))
    assert len(tally.items) == LISTED_MAX
    assert (tally.count, tally.size_bytes) == (LISTED_MAX * 3, LISTED_MAX * 3 * 16)


def test_joining_across_the_bound_keeps_the_list() -> None:
    tally: Tally[Extent] = Tally()
    for n in range(LISTED_MAX):
        tally.add(Extent(n * 32, 16))
    tally.add(Extent(LISTED_MAX * 32, 16))
    tally.add(Extent(LISTED_MAX * 32 + 16, 16))
    assert len(tally.items) == LISTED_MAX
    assert tally.items[-1] == Extent((LISTED_MAX - 1) * 32, 16)
    assert tally.count == LISTED_MAX + 1


def test_differences_of_a_random_guest_are_counted_in_full() -> None:
    a = np.zeros(10_000, dtype=np.uint8)
    b = a.copy()
    b[::2] = 3
    tally: Tally[Extent] = Tally()
    add_differences(tally, 0x1000, a, b)
    assert (tally.count, tally.size_bytes) == (5000, 5000 * 16)
    assert tally.items[0] == Extent(0x1000, 16)


def test_differences_join_across_chunks() -> None:
    a, b = np.zeros(8, dtype=np.uint8), np.ones(8, dtype=np.uint8)
    tally: Tally[Extent] = Tally()
    add_differences(tally, 0, a, b)
    add_differences(tally, 128, a, b)
    assert tally.items == [Extent(0, 256)]
