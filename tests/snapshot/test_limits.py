"""The writer refuses what a reader would refuse; a reader checks what it prints."""

from __future__ import annotations

import io
import tracemalloc

import msgpack  # type: ignore[import-untyped]
import numpy as np
import pytest

from mtetool.errors import DamagedError, LayoutError, RangeError
from mtetool.guest import Extent, Memslot, Missing
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.writer import SnapshotWriter
from tests.snapshot.forge import (
    BASE,
    PAGE,
    PAGE_GRANULES,
    header,
    random_tags,
    read_all,
    small_forge,
)


@pytest.mark.parametrize(
    "changes",
    [
        {"memslots": (Memslot(-1, BASE, PAGE),)},
        {"memslots": (Memslot(1 << 32, BASE, PAGE),)},
        {"memslots": (Memslot(0, 0, 1 << 64),)},
        {"scope": (Extent(0, 1 << 64),)},
    ],
)
def test_headers_that_no_reader_takes(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        SnapshotWriter(io.BytesIO(), header(8, **changes))


def test_the_largest_slot_number() -> None:
    out = io.BytesIO()
    with SnapshotWriter(out, header(1, memslots=(Memslot((1 << 32) - 1, BASE, PAGE),))) as writer:
        writer.add_fill(BASE, PAGE, 0)
        writer.finish(consistent=None)
    assert read_all(out.getvalue())[0].header.memslots[0].id == (1 << 32) - 1


@pytest.mark.parametrize("errno", [-14, 1 << 31])
def test_errnos_that_no_reader_takes(errno: int) -> None:
    with SnapshotWriter(io.BytesIO(), header(1)) as writer:
        with pytest.raises(RangeError, match="errno"):
            writer.add_missing(Missing(BASE, PAGE, errno, "x"))
        writer.add_fill(BASE, PAGE, 0)
        writer.finish(consistent=None)


def test_all_of_the_address_space_is_not_missing_at_once() -> None:
    half = 1 << 63
    scope = (Extent(0, half), Extent(half, half))
    out = io.BytesIO()
    with SnapshotWriter(out, header(1, scope=scope)) as writer:
        with pytest.raises(RangeError, match="address space"):
            writer.add_missing(Missing(0, 2 * half, None, "x"))
        writer.add_missing(Missing(0, half, None, "x"))
        writer.add_fill(half, half, 3)
        writer.finish(consistent=None)
    assert read_all(out.getvalue())[0].footer.missing_bytes == half


@pytest.mark.parametrize("depth", [900, 1000, 1022])
@pytest.mark.parametrize("key", ["ipa", "granules", "enc", "tag"])
def test_values_nested_deeper_than_python_prints(key: str, depth: int) -> None:
    packer = msgpack.Packer()
    head = packer.pack_map_header(4)
    for name, value in {"ipa": BASE, "granules": PAGE_GRANULES, "enc": 0, "tag": 0}.items():
        nested = b"\x91" * depth + b"\0"
        head += packer.pack(name) + (nested if name == key else packer.pack(value))
    with pytest.raises(DamagedError, match=key):
        read_all(small_forge().record(b"TAGS", head).data)


@pytest.mark.parametrize("key", ["tagged", "tagged_pages"])
@pytest.mark.parametrize("more", [-1, 1])
def test_counts_that_are_not_those_of_the_tags(key: str, more: int) -> None:
    """Totals, index and checksums are right: only the tags themselves show it."""
    tags = random_tags(4)
    tags[:PAGE_GRANULES] = tags[::2] = 0  # so another count is still a possible one
    counted = getattr(small_forge().tags(BASE, tags), key)
    forge = small_forge().tags(BASE, tags, None, **{key: counted + more})
    with pytest.raises(DamagedError, match="do not match its head"):
        read_all(forge.end(**{key: counted + more}))


@pytest.mark.parametrize("chunk_granules", [1 << 12, 1 << 16, 1 << 20])
def test_memory_is_that_of_the_declared_chunk_whatever_the_guests_size(chunk_granules: int) -> None:
    out = io.BytesIO()
    n_pages = 64 * chunk_granules // PAGE_GRANULES
    tags = np.zeros(chunk_granules, dtype=np.uint8)
    tags[::PAGE_GRANULES] = 5
    with SnapshotWriter(out, header(n_pages, chunk_granules=chunk_granules)) as writer:
        for number in range(64):
            writer.add_tags(BASE + number * chunk_granules * 16, tags)
        writer.finish(consistent=True)
    read_all(out.getvalue())  # do not count what this imports and caches
    tracemalloc.start()
    try:
        for piece in SnapshotReader(io.BytesIO(out.getvalue()), "test"):
            assert isinstance(piece, Piece)
            piece.tags()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < (2 << 20) + 5 * chunk_granules
