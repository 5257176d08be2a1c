"""What goes in comes out: through files and pipes, in order, in bounded memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.buffers import TagBuffer
from mtetool.errors import LayoutError, RangeError, SnapshotError, TruncatedError
from mtetool.guest import Extent, GuestInfo, Memslot, Missing
from mtetool.snapshot.frames import Encoded, Encoder
from mtetool.snapshot.model import Footer, Header
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.summary import read_summary
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.tags import Tags
from tests.snapshot.forge import (
    BASE,
    HEADER,
    PAGE,
    PAGE_GRANULES,
    Forge,
    frame,
    head_map,
    header,
    random_tags,
    read_all,
    read_range,
    small_forge,
    small_snapshot,
)

Op = tuple[str, int, int, int]


def final_state(pieces: list[Piece | Missing], base: int, n_pages: int) -> tuple[Tags, list[int]]:
    """The tags of each granule (255: missing), and how many records cover each page."""
    tags = np.full(n_pages * PAGE_GRANULES, 254, dtype=np.uint8)
    times = [0] * n_pages
    for piece in pieces:
        first = (piece.ipa - base) // 16
        n_granules = piece.size_bytes // 16
        if isinstance(piece, Missing):
            tags[first : first + n_granules] = 255
        else:
            tags[first : first + n_granules] = piece.tags() if piece.fill is None else piece.fill
        for page in range(first // PAGE_GRANULES, (first + n_granules) // PAGE_GRANULES):
            times[page] += 1
    return tags, times


def test_the_small_snapshot_says_what_was_written() -> None:
    reader, pieces = read_all(small_snapshot())
    assert reader.header == HEADER
    described = [
        (p.ipa, p.size_bytes // PAGE, "missing" if isinstance(p, Missing) else p.fill)
        for p in pieces
    ]
    assert described == [
        (0, 4, 0),
        (BASE, 2, None),
        (BASE + 2 * PAGE, 3, 5),
        (BASE + 5 * PAGE, 3, "missing"),
        (BASE + 5 * PAGE, 1, None),
    ]
    expected = Footer(
        records=7,  # a header, five of these, an index
        granules=10 * PAGE_GRANULES,
        tagged_granules=3 * PAGE_GRANULES + 7 + 7,
        tagged_pages=3 + 1 + 1,
        missing_bytes=2 * PAGE,
        consistent=True,
    )
    assert reader.footer == expected
    assert reader.missing == (Missing(BASE + 6 * PAGE, 2 * PAGE, 14, "no memory"),)


def test_what_the_manual_page_describes_is_what_the_writer_writes() -> None:
    """The forge is a second writer, made from the manual page: both write the same bytes."""
    tags = random_tags(4)
    forged = Forge(head_map(header(8)))
    forged.fill(BASE, 2, 7).tags(BASE + 2 * PAGE, tags, frame(tags)).miss(BASE + 6 * PAGE, 2)
    out = io.BytesIO()
    with SnapshotWriter(out, header(8), level=3) as writer:
        writer.add_fill(BASE, 2 * PAGE, 7)
        writer.add_tags(BASE + 2 * PAGE, tags)
        writer.add_missing(Missing(BASE + 6 * PAGE, 2 * PAGE, 14, "x"))
        writer.finish(consistent=None)
    assert out.getvalue() == forged.end()


@pytest.mark.parametrize("jobs", [1, 3, None])
def test_order_is_kept_whatever_the_number_of_threads(jobs: int | None) -> None:
    n_pages = 400
    out = io.BytesIO()
    with SnapshotWriter(out, header(n_pages), jobs=jobs) as writer:
        for page in range(n_pages):
            at = BASE + page * PAGE
            if page % 7 == 3:
                writer.add_fill(at, PAGE, page % 16)
            else:
                writer.add_tags(at, random_tags(1, seed=page))
        writer.finish(consistent=False)
    _, pieces = read_all(out.getvalue())
    assert [piece.ipa for piece in pieces] == [BASE + page * PAGE for page in range(n_pages)]
    for page, piece in enumerate(pieces):
        assert isinstance(piece, Piece)
        if page % 7 == 3:
            assert piece.fill == page % 16
        else:
            assert np.array_equal(piece.tags(), random_tags(1, seed=page))


@pytest.mark.parametrize("jobs", [1, 2])
def test_as_many_buffers_as_the_writer_says_are_enough(jobs: int) -> None:
    out = io.BytesIO()
    with SnapshotWriter(out, header(50), jobs=jobs) as writer:
        buffers = [np.zeros(PAGE_GRANULES, dtype=np.uint8) for _ in range(writer.keeps + 1)]
        for page in range(50):
            buffer = buffers[page % len(buffers)]
            buffer[:] = random_tags(1, seed=page)
            writer.add_tags(BASE + page * PAGE, buffer)
        writer.finish(consistent=True)
    for page, piece in enumerate(read_all(out.getvalue())[1]):
        assert isinstance(piece, Piece)
        assert np.array_equal(piece.tags(), random_tags(1, seed=page))


def test_a_terabyte_of_nothing_is_one_record() -> None:
    out = io.BytesIO()
    n_pages = (1 << 40) // PAGE
    chunk = np.zeros(4 * PAGE_GRANULES, dtype=np.uint8)
    with SnapshotWriter(out, header(n_pages)) as writer:
        writer.add_tags(BASE, chunk)
        writer.add_fill(BASE + 4 * PAGE, (1 << 39) - 4 * PAGE, 0)
        writer.add_fill(BASE + (1 << 39), 1 << 39, 0)
        assert writer.finish(consistent=True).records == 3
    _, (piece,) = read_all(out.getvalue())
    assert isinstance(piece, Piece)
    assert (piece.fill, piece.size_bytes) == (0, 1 << 40)
    assert len(out.getvalue()) < 1000
    with pytest.raises(ValueError, match="at once"):
        piece.tags()


def test_a_fill_is_not_continued_with_another_tag_or_over_a_gap() -> None:
    out = io.BytesIO()
    scope = (Extent(BASE, 4 * PAGE), Extent(BASE + 8 * PAGE, PAGE))
    with SnapshotWriter(out, header(16, scope=scope)) as writer:
        writer.add_fill(BASE, PAGE, 1)
        writer.add_fill(BASE + PAGE, PAGE, 1)
        writer.add_fill(BASE + 2 * PAGE, 2 * PAGE, 2)
        writer.add_fill(BASE + 8 * PAGE, PAGE, 2)
        writer.finish(consistent=True)
    pieces = read_all(out.getvalue())[1]
    assert [(p.ipa - BASE) // PAGE for p in pieces] == [0, 2, 8]


def test_touching_ranges_of_the_scope_are_one_place() -> None:
    out = io.BytesIO()
    scope = (Extent(BASE, 2 * PAGE), Extent(BASE + 2 * PAGE, 2 * PAGE))
    with SnapshotWriter(out, header(4, scope=scope)) as writer:
        writer.add_fill(BASE, 4 * PAGE, 1)
        writer.finish(consistent=True)
    assert len(read_all(out.getvalue())[1]) == 1


def test_an_empty_scope_is_a_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    with path.open("wb") as out, SnapshotWriter(out, header(4, scope=())) as writer:
        footer = writer.finish(consistent=None)
    assert read_summary(str(path)).footer == footer
    assert read_all(path.read_bytes())[1] == []


PAGES = 12
OPS = st.lists(
    st.tuples(
        st.sampled_from(["tags", "fill", "miss"]),
        st.integers(0, PAGES - 1),
        st.integers(1, 4),
        st.integers(0, 15),
    ),
    max_size=12,
)


def apply(ops: list[Op]) -> tuple[bytes, Tags, Footer]:
    """A snapshot of these records, after one that makes it complete, and its final state."""
    out = io.BytesIO()
    state = np.zeros(PAGES * PAGE_GRANULES, dtype=np.uint8)
    with SnapshotWriter(out, header(PAGES), jobs=2) as writer:
        writer.add_fill(BASE, PAGES * PAGE, 0)
        for kind, page, count, value in ops:
            n_pages = min(count, PAGES - page)
            ipa, size_bytes = BASE + page * PAGE, n_pages * PAGE
            part = state[page * PAGE_GRANULES : (page + n_pages) * PAGE_GRANULES]
            if kind == "tags":
                part[:] = random_tags(n_pages, seed=value)
                writer.add_tags(ipa, part.copy())
            elif kind == "fill":
                part[:] = value
                writer.add_fill(ipa, size_bytes, value)
            else:
                part[:] = 255
                writer.add_missing(Missing(ipa, size_bytes, value or None, f"reason {value % 2}"))
        footer = writer.finish(consistent=None)
    return out.getvalue(), state, footer


@settings(max_examples=150, deadline=None)
@given(OPS)
def test_later_records_replace_earlier_ones(ops: list[Op]) -> None:
    data, state, footer = apply(ops)
    reader, pieces = read_all(data)
    tags, _ = final_state(pieces, BASE, PAGES)
    assert np.array_equal(tags, state)
    assert reader.footer == footer
    assert footer.missing_bytes == int((state == 255).sum()) * 16
    missing = np.zeros_like(state)
    behind = 0
    for item in reader.missing:
        assert item.ipa >= behind
        behind = item.end
        missing[(item.ipa - BASE) // 16 : (item.end - BASE) // 16] = 1
    assert np.array_equal(missing == 1, state == 255)


@settings(max_examples=60, deadline=None)
@given(OPS, st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 4)), max_size=3))
def test_ranges_equal_what_a_sequential_read_gives(
    tmp_path_factory: pytest.TempPathFactory, ops: list[Op], ranges: list[tuple[int, int]]
) -> None:
    data, *_ = apply(ops)
    path = tmp_path_factory.getbasetemp() / "range.mtesnap"
    path.write_bytes(data)
    extents = [Extent(BASE + page * PAGE, count * PAGE) for page, count in ranges]
    reader, pieces = read_all(data)
    expected = [
        piece
        for piece in pieces
        if any(piece.ipa < e.end and e.ipa < piece.ipa + piece.size_bytes for e in extents)
    ]
    assert list(read_range(str(path), extents)) == expected
    summary = read_summary(str(path))
    assert (summary.header, summary.footer) == (reader.header, reader.footer)
    assert (summary.missing, summary.file_bytes) == (reader.missing, len(data))


def test_through_a_pipe_with_short_reads() -> None:
    read_end, write_end = os.pipe()
    n_pages = 4 * 64

    def write() -> None:
        with (
            os.fdopen(write_end, "wb", buffering=0) as out,
            SnapshotWriter(out, header(n_pages), jobs=2) as writer,
        ):
            for page in range(0, n_pages, 4):
                writer.add_tags(BASE + page * PAGE, random_tags(4, seed=page))
            writer.finish(consistent=True)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with os.fdopen(read_end, "rb", buffering=0) as stream:
            reader = SnapshotReader(stream, "pipe")
            for page, piece in zip(range(0, n_pages, 4), reader, strict=True):
                assert isinstance(piece, Piece)
                assert np.array_equal(piece.tags(), random_tags(4, seed=page))
            assert reader.footer.granules == n_pages * PAGE_GRANULES
    finally:
        thread.join()


def test_a_pipe_can_be_named(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    data = small_snapshot()
    thread = threading.Thread(target=fifo.write_bytes, args=(data,))
    thread.start()
    summary = read_summary(str(fifo))
    thread.join()
    assert summary.file_bytes is None
    (tmp_path / "file").write_bytes(data)
    assert replace(summary, file_bytes=len(data)) == read_summary(str(tmp_path / "file"))


_BOUNDED = """
import os, sys, threading
import numpy as np
from mtetool.snapshot.model import Extent, Missing
from mtetool.snapshot.reader import SnapshotReader
from mtetool.snapshot.writer import SnapshotWriter
from tests.snapshot.forge import BASE, PAGE, header

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))

chunk = 2 << 20
tags = np.random.default_rng(1).integers(0, 16, chunk, dtype=np.uint8)
n_chunks = 200
read_end, write_end = os.pipe()

def write():
    head = header(n_chunks * chunk * 16 // PAGE, chunk_granules=chunk)
    with os.fdopen(write_end, "wb") as out, SnapshotWriter(out, head, jobs=2) as writer:
        for i in range(n_chunks):
            writer.add_tags(BASE + i * chunk * 16, tags)
        writer.finish(consistent=None)

before = peak()
thread = threading.Thread(target=write)
thread.start()
n = 0
with os.fdopen(read_end, "rb") as stream:
    for piece in SnapshotReader(stream, "pipe"):
        n += len(piece.tags())
thread.join()
assert n == n_chunks * chunk, n
print((peak() - before) // 1024)
"""


def test_memory_is_bounded_by_a_few_chunks() -> None:
    """400 MiB of tag bytes, 200 MiB of file, written and read at once in one process."""
    done = subprocess.run(
        [sys.executable, "-c", _BOUNDED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


@pytest.mark.parametrize("jobs", [1, 3])
def test_chunks_that_wait_for_the_compressor_are_few(
    monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    under_way: list[int] = []
    lock = threading.Lock()

    class Slow(Encoder):
        def __call__(self, tags: TagBuffer, page_granules: int) -> Encoded:
            time.sleep(0.005)
            with lock:
                under_way.append(-1)
            return super().__call__(tags, page_granules)

    monkeypatch.setattr("mtetool.snapshot.writer.Encoder", Slow)
    most = 0
    with SnapshotWriter(io.BytesIO(), header(40), jobs=jobs) as writer:
        for page in range(40):
            with lock:
                under_way.append(1)
            writer.add_tags(BASE + page * PAGE, random_tags(1))
            with lock:
                most = max(most, sum(under_way))
        writer.finish(consistent=None)
    assert jobs < most <= 2 * jobs


def test_many_records_make_several_parts_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("writer", "records", "heads"):
        monkeypatch.setattr(f"mtetool.snapshot.{module}.MAX_INDEX_ENTRIES", 16)
    path = tmp_path / "many"
    with path.open("wb") as out, SnapshotWriter(out, header(100)) as writer:
        for page in range(100):
            writer.add_fill(BASE + page * PAGE, PAGE, page % 2)
        footer = writer.finish(consistent=True)
    assert footer.records == 1 + 100 + 7
    assert read_all(path.read_bytes())[0].footer == footer
    assert read_summary(str(path)).footer == footer
    (piece,) = read_range(str(path), [Extent(BASE + 99 * PAGE, PAGE)])
    assert piece.ipa == BASE + 99 * PAGE


def test_the_footer_is_not_known_before_the_end() -> None:
    reader = SnapshotReader(io.BytesIO(small_snapshot()), "test")
    next(iter(reader))
    with pytest.raises(RuntimeError):
        _ = reader.footer


def test_odd_texts_are_stored_readably() -> None:
    out = io.BytesIO()
    odd = header(1, source="emu:/tmp/\udcff", name="n" * 10_000)
    with SnapshotWriter(out, odd) as writer:
        writer.add_missing(Missing(BASE, PAGE, None, "\udc80" + "é" * 5000))
        writer.finish(consistent=None)
    reader, (missing,) = read_all(out.getvalue())
    assert reader.header.source == "emu:/tmp/\\xff"
    assert reader.header.name == "n" * 4096
    assert isinstance(missing, Missing)
    assert missing.reason.startswith("\\x80é")
    assert len(missing.reason.encode()) <= 4096


def test_for_guest_describes_guest_and_host() -> None:
    slots = (Memslot(1, 2 * BASE, PAGE), Memslot(0, BASE, PAGE))
    info = GuestInfo("emu:x", True, PAGE, slots, vmm="qemu", name="g")
    made = Header.for_guest(info, [Extent(BASE, PAGE)], paused=False)
    assert [slot.id for slot in made.memslots] == [0, 1]
    assert (made.source, made.vmm, made.name, made.paused) == ("emu:x", "qemu", "g", False)
    assert made.snapshot_id != Header.for_guest(info, []).snapshot_id
    out = io.BytesIO()
    with SnapshotWriter(out, made) as writer:
        writer.add_fill(BASE, PAGE, 0)
        writer.finish(consistent=True)
    assert read_all(out.getvalue())[0].header == made


# --- what the writer refuses ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ipa", "n_granules"),
    [
        (BASE + 16, PAGE_GRANULES),
        (BASE, 8),
        (BASE, 0),
        (BASE, 5 * PAGE_GRANULES),
        (BASE - PAGE, PAGE_GRANULES),
        (BASE + 7 * PAGE, 2 * PAGE_GRANULES),
    ],
)
def test_the_writer_refuses_ranges(ipa: int, n_granules: int) -> None:
    with SnapshotWriter(io.BytesIO(), header(8)) as writer:
        with pytest.raises(RangeError):
            writer.add_tags(ipa, np.ones(n_granules, dtype=np.uint8))
        writer.add_fill(BASE, 8 * PAGE, 0)
        writer.finish(consistent=None)


def test_the_writer_refuses_an_incomplete_snapshot() -> None:
    writer = SnapshotWriter(io.BytesIO(), header(8))
    writer.add_fill(BASE, 7 * PAGE, 0)
    with pytest.raises(RangeError, match="no record"):
        writer.finish(consistent=None)
    writer.abort()


@pytest.mark.parametrize(
    "changes",
    [
        {"page_size_bytes": 8192},
        {"chunk_granules": 100},
        {"chunk_granules": 64 << 20},
        {"scope": (Extent(BASE, PAGE), Extent(BASE, PAGE))},
        {"scope": (Extent(BASE + 1, PAGE),)},
        {"memslots": (Memslot(0, BASE, PAGE), Memslot(1, 0, PAGE))},
        {"memslots": (Memslot(0, (1 << 64) - PAGE, 2 * PAGE),)},
        {"memslots": tuple(Memslot(i, i * PAGE, PAGE) for i in range(30_000))},
        {"snapshot_id": "xyz"},
    ],
)
def test_the_writer_refuses_headers(changes: dict[str, object]) -> None:
    with pytest.raises(LayoutError):
        SnapshotWriter(io.BytesIO(), header(8, **changes))


def test_leaving_without_finish_is_an_error_and_leaves_no_snapshot() -> None:
    out = io.BytesIO()
    with pytest.raises(RuntimeError, match="finish"), SnapshotWriter(out, header(8)) as writer:
        writer.add_fill(BASE, 8 * PAGE, 0)
    with pytest.raises(TruncatedError):
        read_all(out.getvalue())


def test_an_exception_aborts_and_stops_the_threads() -> None:
    out = io.BytesIO()
    writer = SnapshotWriter(out, header(64), jobs=4)

    def body() -> None:
        with writer:
            for page in range(20):
                writer.add_tags(BASE + page * PAGE, random_tags(1, seed=page))
            raise KeyError

    with pytest.raises(KeyError):
        body()
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]
    with pytest.raises(RuntimeError):
        writer.add_fill(BASE, PAGE, 0)
    with pytest.raises(SnapshotError):
        read_all(out.getvalue())


def test_forged_snapshots_are_sound_unless_broken() -> None:
    forged = small_forge().fill(BASE, 2, 3).miss(BASE + 2 * PAGE, 2).end()
    reader, pieces = read_all(forged)
    assert len(pieces) == 2
    assert reader.footer.missing_bytes == 2 * PAGE


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import mtetool.snapshot.model", {"numpy", "zstandard", "xxhash", "msgpack"}),
        ("import mtetool.files.output", {"numpy", "zstandard", "xxhash", "msgpack"}),
        (
            "from mtetool.snapshot.summary import read_summary as r; import sys; r(sys.argv[1])",
            {"numpy", "zstandard"},
        ),
        (
            "from mtetool.snapshot.summary import read_summary as r; r('-')",
            {"numpy", "zstandard"},
        ),
    ],
)
def test_a_description_needs_no_heavy_library(tmp_path: Path, code: str, absent: set[str]) -> None:
    path = tmp_path / "x.mtesnap"
    path.write_bytes(small_snapshot())
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)", str(path)],
        input=small_snapshot(),
        capture_output=True,
        check=True,
    )
    assert not absent & set(done.stdout.decode().split())


def test_threads_that_cannot_be_made_ready_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def warm_up(self: Encoder) -> None:
        if threading.current_thread().name.endswith("_1"):
            raise MemoryError

    monkeypatch.setattr(Encoder, "warm_up", warm_up)
    writer = SnapshotWriter(io.BytesIO(), header(4), jobs=3)
    with pytest.raises(MemoryError):
        writer.warm_up()
    writer.abort()
