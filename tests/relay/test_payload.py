"""Tags between relays: what comes in is what went out, or it is refused."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import RelayPeerError
from mtetool.extents import of_pages
from mtetool.guest import Extent
from mtetool.relay import payload

_PAGES = st.lists(st.integers(0, 3000), min_size=1, max_size=60, unique=True).map(sorted)


def _tags(n_pages: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 16, n_pages * 256, dtype=np.uint8)


@given(_PAGES, st.integers(0, 9))
def test_what_was_packed_comes_out(numbers: list[int], seed: int) -> None:
    extents = of_pages(np.array(numbers, np.int64), 4096)
    tags = _tags(len(numbers), seed)
    found, back = payload.unpack(payload.pack(extents, tags), 4096)
    assert np.array_equal(found, extents)
    assert np.array_equal(back, tags)


@given(_PAGES, st.data())
def test_nothing_else_is_believed(numbers: list[int], data: st.DataObject) -> None:
    extents = of_pages(np.array(numbers, np.int64), 4096)
    packed = bytearray(payload.pack(extents, _tags(len(numbers), 1)))
    if data.draw(st.booleans()):
        del packed[data.draw(st.integers(0, len(packed) - 1)) :]
    else:
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= data.draw(st.integers(1, 255))
    with suppress(RelayPeerError):
        found, tags = payload.unpack(packed, 4096)
        assert len(tags) * 16 == found[:, 1].sum() <= payload.MOST_GRANULES * 16
        assert tags.max(initial=0) < 16


@given(st.binary(max_size=200))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(RelayPeerError):
        payload.unpack(data, 4096)


def test_extents_outside_the_memory_are_refused() -> None:
    memory = [Extent(0x4000_0000, 1 << 20), Extent(0x5000_0000, 4096)]
    inside = np.array([[0x4000_0000, 1 << 20], [0x5000_0000, 4096]], np.uint64)
    payload.check_inside(inside, memory)
    for ipa, size in ((0x4000_0000 - 4096, 8192), (0x5000_0000, 8192), (0, 4096)):
        with pytest.raises(RelayPeerError, match="no memory that takes tags"):
            payload.check_inside(np.array([[ipa, size]], np.uint64), memory)


def test_large_numbers_do_not_wrap() -> None:
    for ipa, size in ((1 << 63, 4096), ((1 << 64) - 4096, 4096), (0, (1 << 64) - 4096)):
        rows = np.array([[ipa, size]], np.uint64)
        with pytest.raises(RelayPeerError):
            payload.unpack(payload.pack(rows, _tags(1, 1)), 4096)
