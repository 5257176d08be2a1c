"""The five patterns: their contents, that a seed reproduces them, and their speed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mtetool.backends.emu.patterns import PATTERNS, pattern_tags
from mtetool.errors import UsageError
from mtetool.tags import Tags, runs

PAGE = 256  # granules
GIB = 1 << 26  # granules


def tags_of(name: str, n_granules: int = 1 << 22, seed: int = 1, per_page: int = PAGE) -> Tags:
    return np.concatenate(
        [part.copy() for part in pattern_tags(name, seed, 0, n_granules, per_page)]
    )


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("per_page", [256, 1024, 4096])
def test_any_number_of_pages(name: str, per_page: int) -> None:
    for n_pages in (1, 2, 3, 7, 100, 513):
        for seed in range(5):
            tags = tags_of(name, n_pages * per_page, seed, per_page)
            assert tags.size == n_pages * per_page
            assert tags.dtype == np.uint8
            assert int(tags.max()) <= 15


@pytest.mark.parametrize("name", PATTERNS)
def test_the_seed_decides(name: str) -> None:
    assert np.array_equal(tags_of(name), tags_of(name))
    if name != "zero":
        assert not np.array_equal(tags_of(name), tags_of(name, seed=2))
        here, there = (next(pattern_tags(name, 1, ipa, 1 << 20, PAGE)) for ipa in (0, 1 << 30))
        assert not np.array_equal(here, there)
        first, second = (part.copy() for part in pattern_tags(name, 1, 0, 4 << 20, PAGE))
        assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", PATTERNS)
def test_bounded_blocks(name: str) -> None:
    sizes = [part.size for part in pattern_tags(name, 1, 0, (5 << 20) + PAGE, PAGE)]
    assert sum(sizes) == (5 << 20) + PAGE
    assert max(sizes) <= 2 << 20


def test_nothing() -> None:
    assert list(pattern_tags("heap", 1, 0, 0, PAGE)) == []


def test_unknown() -> None:
    with pytest.raises(UsageError, match="zero, sparse, heap, kernel, random"):
        next(pattern_tags("nix", 1, 0, PAGE, PAGE))


def test_zero() -> None:
    assert not tags_of("zero").any()


def test_random_is_uniform() -> None:
    tags = tags_of("random")
    shares = np.bincount(tags, minlength=16) / tags.size
    assert np.allclose(shares, 1 / 16, atol=0.002)


@pytest.mark.parametrize(("name", "share", "mean"), [("heap", 0.30, 64), ("sparse", 0.05, 48)])
def test_share_and_clusters(name: str, share: float, mean: int) -> None:
    pages = np.asarray(tags_of(name, 1 << 25).reshape(-1, PAGE).max(axis=1) > 0)
    assert abs(pages.mean() - share) < 0.002
    # Clusters that touch by chance count as one, and the end of a block cuts clusters off.
    _, lengths, values = runs(pages.astype(np.uint8))
    assert 0.75 * mean < lengths[values == 1].mean() < 1.25 * mean


def test_heap_pages() -> None:
    pages = tags_of("heap", 1 << 25).reshape(-1, PAGE)
    heap = pages[pages.any(axis=1)].reshape(-1)
    assert set(np.unique(heap).tolist()) == set(range(16))
    _, lengths, values = runs(heap)
    used = values != 0
    # An allocation is at most 64 granules, and neighbours have a header between them.
    assert int(lengths[used].max()) <= 64
    assert 5 < lengths[used].mean() < 6.5
    assert not (used[1:] & used[:-1]).any()
    # Even and odd in turn; with 15% freed in between, neighbours in use mostly differ in parity.
    single = used[:-2] & used[2:] & ~used[1:-1] & (lengths[1:-1] == 1)
    differ = (values[:-2] ^ values[2:])[single] & 1
    assert differ.mean() > 0.99
    # Headers and freed allocations: 1/7 + 6/7 * 0.15.
    assert abs((heap == 0).mean() - 0.27) < 0.02
    # 2 also has the share of 0, which became 2.
    counts = np.bincount(heap, minlength=16)
    assert 1.8 < counts[2] / counts[4] < 2.2


def test_kernel_pages() -> None:
    tags = tags_of("kernel", 1 << 25)
    pages = tags.reshape(-1, PAGE)
    assert set(np.unique(tags).tolist()) == set(range(15))
    same = (pages == pages[:, :1]).all(axis=1)
    # Slab pages are mixed, except the few whose objects are as large as a page.
    assert abs((~same).mean() - 0.35 * 16 / 17) < 0.03
    whole = pages[same][:, 0]
    assert abs((whole == 0).mean() - (0.15 + 0.5 / 14) / 0.67) < 0.05
    # Blocks of one tag have 2, 4 and 8 pages equally often, except next to a block of the same
    # tag. (A single page can also be a slab's object of that size.)
    _, lengths, values = runs(np.where(same, pages[:, 0], 15).astype(np.uint8))
    shares = np.bincount(lengths[(values > 0) & (values < 14)], minlength=9)[[2, 4, 8]]
    assert shares.min() > 0.8 * shares.max()
    slab = pages[~same]
    assert 0.10 < (slab == 14).mean() < 0.20


def test_heap_of_a_gibibyte_in_three_seconds() -> None:
    started = time.process_time()
    total = sum(part.size for part in pattern_tags("heap", 1, 0, GIB, PAGE))
    assert total == GIB
    assert time.process_time() - started < 3
