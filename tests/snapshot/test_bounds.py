"""Sizes, frames and indexes that lie: noticed, in bounded memory and time."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from mtetool.errors import DamagedError, TruncatedError
from mtetool.guest import Extent, Missing
from mtetool.snapshot.coverage import Coverage, MissingMap, ScatteredError
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.summary import read_summary
from tests.snapshot.forge import (
    BASE,
    PAGE,
    PAGE_GRANULES,
    Forge,
    frame,
    random_tags,
    read_all,
    read_range,
    refused,
    small_forge,
)

# --- wrong sizes, wrong frames ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [b"TAGS", b"MISS", b"INDX", b"DONE", b"HEAD", b"note", b"XTRA"])
@pytest.mark.parametrize("sizes", [(1 << 21, 0), (0, 1 << 26), (0xFFFFFFFF, 0xFFFFFFFF)])
def test_lengths_are_bounded_before_anything_is_read(kind: bytes, sizes: tuple[int, int]) -> None:
    data = small_forge().record(kind, b"", b"", sizes=sizes).data
    tracemalloc.start()
    try:
        refused(data + bytes(1000), DamagedError, "declares")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_payload_is_read_in_portions() -> None:
    asked: list[int | None] = []

    class Recording(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            asked.append(size)
            return super().read(size)

    forge = small_forge(1 << 17, chunk_granules=32 << 20)
    forge.record(b"TAGS", b"", b"", sizes=(0, 16 << 20))
    with pytest.raises(TruncatedError):
        list(SnapshotReader(Recording(forge.data + bytes(1000)), "test"))
    # A pipe's buffer allocates room for all that a read asks for.
    assert all(size is not None and 0 < size <= 1 << 20 for size in asked)


def bombs() -> list[tuple[str, bytes]]:
    """Payloads for four pages that are not one frame of 512 bytes."""
    compress = zstandard.ZstdCompressor().compress
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress
    packed = bytes(4 * PAGE_GRANULES // 2)
    sound = compress(packed)
    return [
        ("256 MiB", compress(bytes(256 << 20))),
        ("no size", no_size(packed)),
        ("no size, 256 MiB", no_size(bytes(256 << 20))),
        ("short", compress(packed[:-1])),
        ("long", compress(packed + b"\0")),
        ("empty", compress(b"")),
        ("two frames", sound + sound),
        ("junk behind", sound + b"\0"),
        ("skippable frame", struct.pack("<II", 0x184D2A50, 4) + b"1234"),
        ("skippable frame before", struct.pack("<II", 0x184D2A50, 4) + b"1234" + sound),
        ("cut", sound[:-1]),
        ("no frame", b"1234567890"),
        ("raw", packed),
    ]


@pytest.mark.parametrize("payload", [p for _, p in bombs()], ids=[name for name, _ in bombs()])
def test_frames_that_are_not_what_the_head_says(payload: bytes) -> None:
    tags = np.zeros(4 * PAGE_GRANULES, dtype=np.uint8)
    data = small_forge(4, chunk_granules=1 << 18).tags(BASE, tags, payload).end()
    tracemalloc.start()
    try:
        with pytest.raises(DamagedError, match="frame"):
            read_all(data)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_payloads_where_none_belong() -> None:
    granules = 4 * PAGE_GRANULES
    fill = {"ipa": BASE, "granules": granules, "enc": 0, "tag": 0}
    refused(small_forge().record(b"TAGS", fill, b"x").end(), DamagedError, "payload")
    packed = {"ipa": BASE, "granules": granules, "enc": 1, "tagged": 0, "tagged_pages": 0}
    refused(small_forge().record(b"TAGS", packed).end(), DamagedError, "payload")


def test_more_tags_than_a_chunk() -> None:
    refused(small_forge(8).tags(BASE, random_tags(8)).end(), DamagedError, "payload")
    tags = np.tile(np.arange(16, dtype=np.uint8), PAGE_GRANULES // 2)
    refused(small_forge(8).tags(BASE, tags).end(), DamagedError, "'granules' is 2048")


# --- the index ----------------------------------------------------------------------------------


def test_an_index_that_lies(tmp_path: Path) -> None:
    forge = small_forge().tags(BASE, random_tags(2)).fill(BASE + 2 * PAGE, 2)
    entries = [forge.index[:32], forge.index[32:]]
    offset, ipa, granules, kind, length = struct.unpack("<QQQ4sI", entries[0])
    lies = {
        "nothing": b"",
        "one less": entries[0],
        "twice": forge.index + entries[1],
        "swapped": entries[1] + entries[0],
    }
    for name, changed in {
        "offset": (offset + 1, ipa, granules, kind, length),
        "far": (1 << 63, ipa, granules, kind, length),
        "ipa": (offset, ipa + PAGE, granules, kind, length),
        "granules": (offset, ipa, granules + PAGE_GRANULES, kind, length),
        "many": (offset, ipa, 1 << 63, kind, length),
        "kind": (offset, ipa, granules, b"MISS", length),
        "done": (offset, ipa, granules, b"DONE", length),
        "length": (offset, ipa, granules, kind, length - 1),
        "no length": (offset, ipa, granules, kind, 0),
        "all": (offset, ipa, granules, kind, 0xFFFFFFFF),
    }.items():
        lies[name] = struct.pack("<QQQ4sI", *changed) + entries[1]
    path = tmp_path / "lying"
    for name, index in lies.items():
        data = replace_index(forge, index)
        refused(data, DamagedError, "index")
        path.write_bytes(data)
        # A reader by index notices it at the latest when it reads the record. It cannot read a
        # record that is not in the index: then a page is left out, which the summary notices.
        with pytest.raises(DamagedError):  # noqa: PT012
            read_summary(str(path))
            list(read_range(str(path), [Extent(BASE, 4 * PAGE)]))
            pytest.fail(name)


def replace_index(forge: Forge, index: bytes) -> bytes:
    """The forged snapshot with another index, everything else right."""
    return replace_records(forge).end(index)


def replace_records(forge: Forge) -> Forge:
    """A copy to append to."""
    copy = small_forge()
    for name in vars(forge):
        setattr(copy, name, getattr(forge, name))
    return copy


def test_an_index_of_another_size() -> None:
    forge = small_forge().fill(BASE, 4)
    forge.record(b"INDX", {"entries": 2}, forge.index)
    refused(forge.data, DamagedError, "does not fit its 2 entries")


def test_nothing_comes_between_index_and_end() -> None:
    forge = small_forge().fill(BASE, 2)
    forge.record(b"INDX", {"entries": 1}, forge.index)
    refused(forge.fill(BASE + 2 * PAGE, 2).data, DamagedError, "after the index")


def test_not_even_what_may_be_ignored(tmp_path: Path) -> None:
    forge = small_forge().fill(BASE, 4)
    index_offset = len(forge.data)
    forge.record(b"INDX", {"entries": 1}, forge.index).record(b"note", {})
    forge.index = b""
    data = forge.end(index=index_offset, index_records=1)
    refused(data, DamagedError, "after the index")
    path = tmp_path / "between"
    path.write_bytes(data)
    with pytest.raises(DamagedError, match="index does not end"):
        read_summary(str(path))


# --- bounds of the bookkeeping -----------------------------------------------------------------


def test_scattered_ranges_end_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtetool.snapshot.coverage.MAX_FRAGMENTS", 100)
    monkeypatch.setattr("mtetool.snapshot.coverage._SORT_AT", 50)
    coverage = Coverage([Extent(0, 1 << 40)])
    with pytest.raises(ScatteredError):
        scatter(coverage.add)
    missing = MissingMap()
    with pytest.raises(ScatteredError):
        scatter(lambda start, end: missing.add(Missing(start, end - start, None, "")))
    holes = MissingMap()
    holes.add(Missing(0, 1 << 40, None, ""))
    with pytest.raises(ScatteredError):
        scatter(holes.remove)


def scatter(add: Callable[[int, int], None]) -> None:
    """Add many ranges that do not touch."""
    for i in range(1000):
        add(2 * i * PAGE, (2 * i + 1) * PAGE)


def test_the_worst_order_takes_seconds_not_hours() -> None:
    coverage, missing = Coverage([Extent(0, 1 << 40)]), MissingMap()
    # This process's CPU time: other tests may keep all CPUs busy.
    start = time.process_time()
    for i in range(50_000, 0, -1):
        missing.add(Missing(2 * i * PAGE, PAGE, None, ""))
        coverage.add(2 * i * PAGE, (2 * i + 1) * PAGE)
    assert coverage.first_gap() == (0, 2 * PAGE)
    assert time.process_time() - start < 10


def test_damage_names_the_place() -> None:
    tags = random_tags(4)
    broken = bytearray(frame(tags))
    broken[20] ^= 0xFF
    data = small_forge().tags(BASE, tags, bytes(broken[:-1])).end()
    reader = SnapshotReader(io.BytesIO(data), "some/file")
    (piece,) = reader
    assert isinstance(piece, Piece)
    with pytest.raises(DamagedError, match="some/file: record 1 at byte "):
        piece.tags()
