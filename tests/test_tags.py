"""Arrays of tags, compared with the obvious implementation, granule by granule."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtetool.tags import Tags, difference_ranges, differences, runs

TAG = st.integers(0, 15)


def array(values: list[int]) -> Tags:
    return np.array(values, dtype=np.uint8)


ANY = st.lists(st.integers(0, 3), max_size=60).map(array)


@given(ANY)
def test_runs(tags: Tags) -> None:
    expected = [(tag, len(list(group))) for tag, group in itertools.groupby(tags.tolist())]
    starts, lengths, of = runs(tags)
    assert list(zip(of.tolist(), lengths.tolist(), strict=True)) == expected
    assert starts.tolist() == [0, *itertools.accumulate(n for _, n in expected)][: len(expected)]


@given(st.lists(st.tuples(TAG, TAG), max_size=60))
def test_differences(pairs: list[tuple[int, int]]) -> None:
    a, b = array([x for x, _ in pairs]), array([y for _, y in pairs])
    assert differences(a, b).tolist() == [i for i, (x, y) in enumerate(pairs) if x != y]


@given(st.lists(st.tuples(TAG, TAG), max_size=60))
def test_difference_ranges(pairs: list[tuple[int, int]]) -> None:
    a, b = array([x for x, _ in pairs]), array([y for _, y in pairs])
    starts, lengths = difference_ranges(a, b)
    covered = [
        at
        for start, length in zip(starts, lengths, strict=True)
        for at in range(start, start + length)
    ]
    assert covered == differences(a, b).tolist()
    assert all(start - 1 not in covered for start in starts)
