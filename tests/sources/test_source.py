"""Reading tags from any source, also from a log whose later records replace earlier ones."""

from __future__ import annotations

import io
import os
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.flows.diff import Difference, diff
from mtetool.flows.dump import Run, tag_runs
from mtetool.guest import Extent, GuestInfo, Memslot, Missing
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.model import Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.opening import open_source
from mtetool.sources.source import GuestSource, SnapshotSource, asked
from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest
from tests.sources.test_copying import read_of

BASE = 0x4000_0000
N_PAGES = 16
SLOTS = (Memslot(0, BASE, N_PAGES * PAGE),)
MISSING = 255


def a_log(path: Path, steps: list[tuple[int, int, int]]) -> Tags:
    """Write records of (first page, pages, tag); return the tags that must count in the end.

    Tag 16 is a missing range, 17 random tags.
    """
    expected = np.zeros(N_PAGES * 256, dtype=np.uint8)
    info = GuestInfo("fake:1", True, PAGE, SLOTS)
    header = Header.for_guest(info, [Extent(BASE, N_PAGES * PAGE)])
    random = np.random.default_rng(1)
    with path.open("wb") as out, SnapshotWriter(out, header) as writer:
        writer.add_fill(BASE, N_PAGES * PAGE, 0)
        for first, n_pages, tag in steps:
            n_pages = min(n_pages, N_PAGES - first)
            ipa, part = BASE + first * PAGE, slice(first * 256, (first + n_pages) * 256)
            if tag == 16:
                writer.add_missing(Missing(ipa, n_pages * PAGE, 14, "a test"))
                expected[part] = MISSING
            elif tag == 17:
                expected[part] = random.integers(0, 16, n_pages * 256)
                writer.add_tags(ipa, expected[part].copy())
            else:
                expected[part] = tag
                writer.add_fill(ipa, n_pages * PAGE, tag)
        writer.finish(consistent=True)
    return expected


def read(source: SnapshotSource | GuestSource, extents: list[Extent]) -> Tags:
    parts = []
    at = None
    for step in source.read(extents):
        assert at is None or step.ipa >= at
        at = step.ipa + step.size_bytes
        n_granules = step.size_bytes // GRANULE_BYTES
        if isinstance(step, Missing):
            parts.append(np.full(n_granules, MISSING, np.uint8))
        else:
            parts.append(read_of(step))
    return np.concatenate(parts)


def snapshot_source(path: Path) -> SnapshotSource:
    indexed = IndexedSnapshot.of(io.FileIO(path), str(path))
    return SnapshotSource(indexed, str(path))


LOGS = st.lists(
    st.tuples(st.integers(0, N_PAGES - 1), st.integers(1, N_PAGES), st.integers(0, 17)), max_size=8
)
RANGE = st.tuples(st.integers(0, N_PAGES * 256 - 1), st.integers(1, N_PAGES * 256))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@settings(max_examples=60, deadline=None)
@given(log=LOGS, part=RANGE)
def test_later_records_replace_earlier_ones(
    directory: Path, log: list[tuple[int, int, int]], part: tuple[int, int]
) -> None:
    expected = a_log(directory / "s", log)
    source = snapshot_source(directory / "s")
    assert np.array_equal(read(source, [Extent(BASE, N_PAGES * PAGE)]), expected)
    first, stop = part[0], min(part[0] + part[1], N_PAGES * 256)
    extent = Extent(BASE + first * GRANULE_BYTES, (stop - first) * GRANULE_BYTES)
    assert np.array_equal(read(source, [extent]), expected[first:stop])


@settings(max_examples=40, deadline=None)
@given(a=LOGS, b=LOGS)
def test_differences_are_those_of_the_arrays(
    directory: Path, a: list[tuple[int, int, int]], b: list[tuple[int, int, int]]
) -> None:
    left, right = a_log(directory / "a", a), a_log(directory / "b", b)
    found = np.zeros(N_PAGES * 256, dtype=bool)
    unknown = np.zeros(N_PAGES * 256, dtype=bool)
    for row in diff(snapshot_source(directory / "a"), snapshot_source(directory / "b")):
        first = (row.ipa - BASE) // GRANULE_BYTES
        part = slice(first, first + row.size_bytes // GRANULE_BYTES)
        if isinstance(row, Difference):
            assert (left[part] == row.a).all()
            assert (right[part] == row.b).all()
            found[part] = True
        else:
            unknown[part] = True
    missing = (left == MISSING) | (right == MISSING)
    assert np.array_equal(unknown, missing)
    assert np.array_equal(found, (left != right) & ~missing)


@settings(max_examples=30, deadline=None)
@given(log=LOGS)
def test_runs_are_maximal(directory: Path, log: list[tuple[int, int, int]]) -> None:
    expected = a_log(directory / "s", log)
    source = snapshot_source(directory / "s")
    rows = list(tag_runs(source, source.extents()))
    parts = [
        np.full(row.size_bytes // 16, row.tag if isinstance(row, Run) else MISSING) for row in rows
    ]
    assert np.array_equal(np.concatenate(parts), expected)
    for before, after in pairwise(rows):
        if isinstance(before, Run) and isinstance(after, Run):
            assert before.tag != after.tag


def test_a_guest_and_ranges_of_it() -> None:
    guest = FakeGuest(SLOTS)
    guest.memory[BASE][:] = np.arange(N_PAGES * 256) % 16
    source = GuestSource(guest, "fake:1")
    extents = asked(source, [Extent(BASE + 0x30, 0x20), Extent(BASE + 0x40, 0x1000)])
    assert extents == [Extent(BASE + 0x30, 0x1010)]
    assert np.array_equal(read(source, extents), guest.memory[BASE][3 : 3 + 0x101])
    assert asked(source, []) == [Extent(BASE, N_PAGES * PAGE)]


def test_a_fifo_is_a_pipe_too(tmp_path: Path) -> None:
    expected = a_log(tmp_path / "s", [(3, 2, 17)])
    os.mkfifo(tmp_path / "f")
    data = (tmp_path / "s").read_bytes()
    writer = threading.Thread(target=(tmp_path / "f").write_bytes, args=(data,))
    writer.start()
    with open_source(str(tmp_path / "f")) as source:
        assert isinstance(source, SnapshotSource)
        assert np.array_equal(read(source, source.extents()), expected)
    writer.join()
