"""Extents as arrays: pages go there and back, and parts keep their bounds."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtetool.extents import n_granules_of, of_pages, pages_of, parts

_PAGES = st.lists(st.integers(0, 2000), max_size=400, unique=True).map(sorted)


@given(_PAGES, st.sampled_from([4096, 16384, 65536]))
def test_pages_come_back(numbers: list[int], page_bytes: int) -> None:
    pages = np.array(numbers, np.int64)
    extents = of_pages(pages, page_bytes)
    assert pages_of(extents, page_bytes).tolist() == numbers
    assert n_granules_of(extents) == len(numbers) * page_bytes // 16
    assert (extents[:, 1] <= 256 * page_bytes).all()
    # Neighbours are one extent, unless that would be too long.
    ends = (extents[:-1, 0] + extents[:-1, 1]).tolist()
    for end, start in zip(ends, extents[1:, 0].tolist(), strict=True):
        assert end < start or (end == start and start // page_bytes % 256 == 0)


@given(_PAGES, st.integers(1, 50), st.integers(256, 2000))
def test_parts_are_all_of_it_in_order(numbers: list[int], most: int, most_pages: int) -> None:
    extents = of_pages(np.array(numbers, np.int64), 4096)
    found = list(parts(extents, most, most_pages * 256))
    assert [row for part in found for row in part.tolist()] == extents.tolist()
    assert all(0 < len(part) <= most for part in found)
    assert all(n_granules_of(part) <= most_pages * 256 for part in found)
