"""Many small extents of a guest are read together, where that pays; nothing else changes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mtetool.buffers import TagBuffer
from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Copied, Fill, TagReader
from mtetool.sources.layout import Layout
from mtetool.tags import Tags
from tests.flows.fakes import PAGE, FakeGuest, nowhere

BASE = 0x4000_0000
N_PAGES = 64
SLOTS = (Memslot(0, BASE, N_PAGES * PAGE),)


@dataclass
class BurstGuest(FakeGuest):
    """A guest whose small copies are worth making together; counts those calls."""

    burst: int = 512
    bursts: list[int] = field(default_factory=list)

    def read_scattered(self, extents: NDArray[np.uint64], out: TagBuffer) -> int:
        self.bursts.append(len(extents))
        return super().read_scattered(extents, out)


def made(seed: int = 1, *, burst: int = 512) -> BurstGuest:
    guest = BurstGuest(SLOTS, burst=burst, knows_untagged=True)
    random = np.random.default_rng(seed)
    tags = random.integers(0, 16, N_PAGES * 256, dtype=np.uint8)
    tags.reshape(N_PAGES, 256)[random.integers(0, 2, N_PAGES) == 0] = 0
    guest.memory[BASE][:] = tags
    return guest


def steps(guest: FakeGuest, extents: list[Extent]) -> list[tuple[int, int, object]]:
    """Each step's address, size, and tags, or why they are missing."""
    reader = TagReader(guest, Layout(guest.slots, PAGE), chunk_granules=N_PAGES * 256)
    return [(step.ipa, step.size_bytes, _content(step)) for step in reader.read_granules(extents)]


def _content(step: Copied | Fill | Missing) -> object:
    if isinstance(step, Copied):
        return bytes(step.tags)
    return step.tag if isinstance(step, Fill) else step.reason


def test_a_hundred_ranges_are_one_call() -> None:
    guest = made()
    ranges = [Extent(BASE + n * 2 * PAGE + 32, 64) for n in range(30)]
    tags: Tags = guest.memory[BASE]
    for (ipa, size_bytes, found), extent in zip(steps(guest, ranges), ranges, strict=True):
        assert (ipa, size_bytes) == (extent.ipa, extent.size_bytes)
        first = (ipa - BASE) // 16
        wanted = tags[first : first + 4]
        assert found == (wanted.tobytes() if isinstance(found, bytes) else int(wanted.max()))
    assert len(guest.bursts) == 1
    assert guest.bursts[0] == np.count_nonzero(tags.reshape(N_PAGES, 256)[:60:2].any(axis=1))


@pytest.mark.parametrize("burst", [1, 512])
def test_large_ranges_and_single_ones_are_read_as_ever(burst: int) -> None:
    guest = made(burst=burst)
    steps(guest, [Extent(BASE, 64)])
    steps(guest, [Extent(BASE, N_PAGES * PAGE)])
    assert guest.bursts == []


def test_a_bad_range_names_itself_and_costs_the_others_nothing() -> None:
    guest = made()
    guest.bad = (BASE + 20 * PAGE).__eq__
    found = steps(guest, [Extent(BASE + n * PAGE, 16) for n in range(0, 60, 2)])
    missing = [(ipa, size) for ipa, size, what in found if isinstance(what, str)]
    assert missing == [(BASE + 20 * PAGE, 16)]
    assert len(found) == 30


def test_where_all_fail_few_bursts_are_wasted() -> None:
    guest = made()
    guest.bad = lambda ipa: True
    found = steps(guest, [Extent(BASE + n * PAGE, 16) for n in range(0, 60, 2)])
    assert all(isinstance(what, str) for _, _, what in found)
    assert sum(guest.bursts) < 80


@settings(max_examples=60, deadline=None)
@given(
    ranges=st.lists(
        st.tuples(st.integers(0, N_PAGES * 256 - 1), st.integers(1, 40 * 256)), max_size=12
    ),
    bad=st.frozensets(st.integers(0, N_PAGES - 1), max_size=6),
)
def test_the_same_steps_with_and_without(
    ranges: list[tuple[int, int]], bad: frozenset[int]
) -> None:
    extents = [Extent(BASE + first * 16, min(n, N_PAGES * 256 - first) * 16) for first, n in ranges]
    together, alone = made(), made(burst=1)
    for guest in (together, alone):
        guest.bad = {BASE + n * PAGE for n in bad}.__contains__ if bad else nowhere
    assert steps(together, extents) == steps(alone, extents)
