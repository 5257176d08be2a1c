"""Totals and lists cover all ranges, in bounded memory."""

from __future__ import annotations

import resource
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.flows.comparing import add_differences
from mtetool.guest import Extent, Missing
from mtetool.sources import tally as tally_module
from mtetool.sources.tally import Tally


def _laid_out(shapes: list[tuple[int, int, str]]) -> list[Missing]:
    """Ranges one after the other, by the gap before each, their sizes and their reasons."""
    items: list[Missing] = []
    at = 0
    for gap, size, reason in shapes:
        at += 16 * gap
        items.append(Missing(at, 16 * size, 14, reason))
        at += 16 * size
    return items


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


ranges_in_order = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 3), st.sampled_from("ab")), max_size=40
).map(_laid_out)


@given(
    batches=st.lists(ranges_in_order, max_size=6),
    listed=st.none() | st.integers(0, 12),
    rows=st.integers(1, 9),
)
def test_all_are_listed_whatever_is_kept_in_memory(
    batches: list[list[Missing]], listed: int | None, rows: int
) -> None:
    """Compared with a slow model: a list in memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally_module, "IN_MEMORY_ROWS", rows)
        patch.setattr(tally_module, "_READ_ROWS", 4)
        tally: Tally[Missing] = Tally(listed)
        model: list[Missing] = []
        for items in batches:
            for item in items:
                tally.add(item)
                last = model[-1] if model else None
                if last and last.end == item.ipa and last.reason == item.reason:
                    model[-1] = replace(last, size_bytes=last.size_bytes + item.size_bytes)
                else:
                    model.append(item)
        assert tally.items == model[:listed]
        assert tally.items == model[:listed]  # and once more
        assert tally.first(3) == model[:listed][:3]
        assert (tally.count, tally.size_bytes) == (
            len(model), sum(item.size_bytes for item in model)
        )  # fmt: skip
        assert bool(tally) == bool(model)


@given(
    tags=st.lists(st.booleans(), min_size=1, max_size=60),
    cuts=st.sets(st.integers(1, 59)),
    listed=st.none() | st.integers(0, 12),
    rows=st.integers(1, 9),
)
def test_differences_in_any_chunks_are_listed(
    tags: list[bool], cuts: set[int], listed: int | None, rows: int
) -> None:
    wanted = np.zeros(len(tags), dtype=np.uint8)
    found = np.array(tags, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tally_module, "IN_MEMORY_ROWS", rows)
        tally: Tally[Extent] = Tally(listed)
        one_by_one: Tally[Extent] = Tally(listed)
        edges = [0, *sorted(cut for cut in cuts if cut < len(tags)), len(tags)]
        for first, stop in pairwise(edges):
            add_differences(tally, 0x1000 + first * 16, found[first:stop], wanted[first:stop])
        for n in np.flatnonzero(found).tolist():
            one_by_one.add(Extent(0x1000 + n * 16, 16))
        assert tally.items == one_by_one.items
        assert (tally.count, tally.size_bytes) == (one_by_one.count, one_by_one.size_bytes)


def test_many_ranges_are_listed_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "IN_MEMORY_ROWS", 1024)
    n_ranges = 1 << 16
    starts = np.arange(n_ranges, dtype=np.int64) * 32
    tally: Tally[Extent] = Tally()
    tally.extend(Extent(0, 16), starts[:2000], np.full(2000, 16))  # not counted: what this imports
    tracemalloc.start()
    try:
        tally.extend(Extent(0, 16), starts[2000:], np.full(n_ranges - 2000, 16))
        count = sum(1 for _ in tally)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == tally.count == n_ranges
    # A list of them takes at least as much, and their numbers as much again.
    assert peak < 24 * n_ranges // 2


def test_a_full_disk_ends_the_list_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally_module, "IN_MEMORY_ROWS", 8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    tally: Tally[Extent] = Tally()
    resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 24, limits[1]))
    try:
        for n in range(100):
            tally.add(Extent(n * 32, 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert tally.truncated
    assert (tally.count, tally.size_bytes) == (100, 1600)
    listed = tally.items
    assert listed == [Extent(n * 32, 16) for n in range(len(listed))]
    assert len(listed) >= 24


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
