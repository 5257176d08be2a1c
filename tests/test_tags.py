"""Arrays of tags against the obvious way to do it, granule by granule."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.tags import Tags, differences, pack, runs, tagged_pages, uniform, unpack

TAG = st.integers(0, 15)


def array(values: list[int]) -> Tags:
    return np.array(values, dtype=np.uint8)


EIGHTS = st.lists(st.lists(TAG, min_size=8, max_size=8), max_size=20).map(
    lambda parts: array([tag for part in parts for tag in part])
)
ANY = st.lists(st.integers(0, 3), max_size=60).map(array)


def test_the_lower_address_is_in_the_low_nibble() -> None:
    assert pack(array([1, 2, 3, 4, 5, 6, 7, 8])).tobytes() == b"\x21\x43\x65\x87"
    assert unpack(array([0x21, 0xF0])).tolist() == [1, 2, 0, 15]


@given(EIGHTS)
def test_packing(tags: Tags) -> None:
    packed = pack(tags)
    assert packed.dtype == np.uint8
    assert packed.tolist() == [low | high << 4 for low, high in zip(tags[::2], tags[1::2])]  # noqa: B905
    assert np.array_equal(unpack(packed), tags)


@given(st.binary(max_size=100))
def test_unpacking(data: bytes) -> None:
    packed = np.frombuffer(data, dtype=np.uint8)
    tags = unpack(packed)
    assert tags.tolist() == [tag for byte in data for tag in (byte & 15, byte >> 4)]
    assert tags.dtype == np.uint8
    assert tags.flags.c_contiguous


def test_neither_changes_its_argument() -> None:
    tags = array([1, 2, 3, 4, 5, 6, 7, 8])
    packed = pack(tags)
    unpack(packed)
    assert tags.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert packed.tobytes() == b"\x21\x43\x65\x87"


@given(ANY)
def test_runs(tags: Tags) -> None:
    expected = [(tag, len(list(group))) for tag, group in itertools.groupby(tags.tolist())]
    starts, lengths, of = runs(tags)
    assert list(zip(of.tolist(), lengths.tolist(), strict=True)) == expected
    assert starts.tolist() == [0, *itertools.accumulate(n for _, n in expected)][: len(expected)]


@given(ANY.filter(len))
def test_uniform(tags: Tags) -> None:
    assert uniform(tags) == (int(tags[0]) if len(set(tags.tolist())) == 1 else None)


@pytest.mark.parametrize("at", [0, 1, 127, 254, 255])
def test_one_other_granule_is_not_uniform(at: int) -> None:
    tags = np.full(256, 5, dtype=np.uint8)
    assert uniform(tags) == 5
    tags[at] = 4
    assert uniform(tags) is None


@given(st.lists(st.tuples(TAG, TAG), max_size=60))
def test_differences(pairs: list[tuple[int, int]]) -> None:
    a, b = array([x for x, _ in pairs]), array([y for _, y in pairs])
    assert differences(a, b).tolist() == [i for i, (x, y) in enumerate(pairs) if x != y]


@given(st.lists(st.lists(st.sampled_from([0, 0, 0, 7]), min_size=4, max_size=4), max_size=20))
def test_tagged_pages(pages: list[list[int]]) -> None:
    tags = array([tag for page in pages for tag in page])
    assert tagged_pages(tags, 4) == sum(any(page) for page in pages)
