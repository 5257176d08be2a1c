"""The kernel's flags of page frames: what follows from files that look like the kernel's."""

from __future__ import annotations

import mmap
import os
import re
import struct
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtetool.vmm import page_flags
from mtetool.vmm.page_flags import PageFlags

PAGE = mmap.PAGESIZE
PRESENT, SWAPPED, SHARED = 1 << 63, 1 << 62, 1 << 61
KINDS = [PRESENT, PRESENT | SHARED, SWAPPED, 0]
MARK = 1 << 41
COMPOUND = [1 << bit for bit in (15, 16, 17, 20, 22)]
# Uptodate, lru, mmap, anon, swapbacked, unevictable, soft-dirty, arch: none says anything on tags.
PLAIN = [0, 1 << 3, 1 << 5, 1 << 11 | 1 << 12, 1 << 14, 1 << 18, 1 << 40, 1 << 38, 1 << 42]
N = 600


class Host:
    """Page tables of one process, and the flags of the host's frames, as files."""

    def __init__(self, path: Path) -> None:
        self.pagemap = os.open(path / "pagemap", os.O_RDWR | os.O_CREAT)
        self.flags = os.open(path / "flags", os.O_RDWR | os.O_CREAT)
        self.frames = PageFlags.__new__(PageFlags)
        self.frames._fd = self.flags

    def hold(self, entries: list[int], flags: list[int]) -> None:
        os.pwrite(self.pagemap, struct.pack(f"<{len(entries)}Q", *entries), 0)
        os.ftruncate(self.flags, 0)
        os.pwrite(self.flags, struct.pack(f"<{len(flags)}Q", *flags), 0)

    def unmarked(self, start: int, end: int) -> set[int]:
        """The pages reported to have no tags."""
        pages = set(range(start, end))
        at = start * PAGE
        for first, stop in self.frames.may_be_tagged(self.pagemap, start * PAGE, end * PAGE):
            assert at <= first < stop <= end * PAGE
            pages -= set(range(first // PAGE, stop // PAGE))
            at = stop
        return pages


@pytest.fixture(autouse=True)
def _short_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_flags, "_WORTH_PAGES", 128)
    monkeypatch.setattr(page_flags, "_UNMARKED", re.compile(rb"\x00{128,}"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = Host(tmp_path)
    yield made
    os.close(made.pagemap)
    made.frames.close()


LENGTHS = st.sampled_from([1, 130, 300])
TELLING = st.sampled_from([*PLAIN, MARK, *COMPOUND])


def spread(pairs: list[tuple[int, int]]) -> list[int]:
    return [value for length, value in pairs for _ in range(length)]


@st.composite
def states(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Entries of pages and flags of frames, most of them like their neighbours."""
    kinds = spread(draw(st.lists(st.tuples(LENGTHS, st.sampled_from(KINDS)), max_size=6)))
    moves = spread(draw(st.lists(st.tuples(LENGTHS, st.sampled_from([1, 700])), max_size=6)))
    entries = [
        kind | (move + n if kind & PRESENT else 0)
        for n, (kind, move) in enumerate(zip(kinds, moves, strict=False))
    ]
    return entries, spread(draw(st.lists(st.tuples(LENGTHS, TELLING), max_size=8)))


@given(states())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_only_plain_pages_without_the_mark_are_left_out(
    host: Host, state: tuple[list[int], list[int]]
) -> None:
    entries, flags = state
    host.hold(entries, flags)
    surely = {
        page
        for page, entry in enumerate(entries)
        if entry & PRESENT
        and entry % (1 << 55) < len(flags)
        and not flags[entry % (1 << 55)] & (MARK | sum(COMPOUND))
    }
    assert host.unmarked(0, len(entries)) <= surely
    assert host.unmarked(len(entries) // 3, len(entries)) <= surely


@pytest.mark.parametrize("flag", [MARK, *COMPOUND])
def test_long_runs_are_left_out(host: Host, flag: int) -> None:
    flags = [8] * 1000
    flags[300 + 20] = flag
    flags[300 + 400] = flag
    host.hold([PRESENT | 300 + n for n in range(N)], flags)
    # The 20 pages before are too short a run to leave out; the 199 after are not.
    assert host.unmarked(0, N) == set(range(21, 400)) | set(range(401, N))
    assert host.unmarked(0, 100) == set()
    host.hold([PRESENT | 300 + n for n in range(N)], flags[: 300 + 200])
    assert host.unmarked(0, N) == set(range(21, 200))


def test_many_chunks(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_flags, "_CHUNK_PAGES", 130)
    host.hold([PRESENT | 1 + n for n in range(N)], [8] * (N + 1))
    assert host.unmarked(7, N) == set(range(7, 7 + 4 * 130))  # the rest is too short


def test_a_page_that_moved_meanwhile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its flags were those of a frame that may belong to another page by now."""
    answers = [array("Q", [PRESENT | 1 + n for n in range(N)]) for _ in range(3)]
    answers[1][200] = PRESENT | 1
    answers[2] = answers[2][:300]
    host.hold([], [8] * (N + 1))
    monkeypatch.setattr(PageFlags, "_is_worth_it", lambda *_: True)
    for second, left in ((1, set(range(N)) - {200}), (2, set(range(300)))):
        given_back = iter([answers[0].tobytes(), answers[second].tobytes()])
        monkeypatch.setattr(
            page_flags, "_entries", lambda *_, given_back=given_back: next(given_back)
        )
        assert host.unmarked(0, N) == left


def test_memory_with_tags_all_over_is_hardly_looked_at(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    entries = page_flags._entries

    def noting(pagemap: int, start: int, end: int) -> bytes:
        looked.append((end - start) // PAGE)
        return entries(pagemap, start, end)

    monkeypatch.setattr(page_flags, "_entries", noting)
    host.hold([PRESENT | 1 + n for n in range(N)], [MARK] * (N + 1))
    assert host.unmarked(0, N) == set()
    assert sum(looked) <= N // page_flags._WORTH_PAGES + 1


def test_scattered_frames_and_unknown_ones(host: Host) -> None:
    host.hold([PRESENT | 1 + n % 2 * 300 + n for n in range(N)], [8] * 2000)
    assert host.unmarked(0, N) == set()
    # Without permission, every entry shows frame 0 and is like the next.
    host.hold([PRESENT] * N, [8] * 2000)
    assert host.unmarked(0, N) == set()


def test_a_kernel_that_does_not_show_the_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    for marks in ((b"\0", b"\0"), (b"\1", b"\1")):
        answers = iter(marks)
        monkeypatch.setattr(
            PageFlags, "_mark_of_own", lambda self, _, answers=answers: next(answers)
        )
        monkeypatch.setattr("os.open", lambda path, flags: os.dup(0))
        with pytest.raises(OSError, match="does not show"):
            PageFlags()


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from([PRESENT, PRESENT | 1 << 55, 0]))))
def test_runs_of_frames(parts: list[tuple[int, int]]) -> None:
    entries: list[int] = []
    for length, base in parts:
        entries += range(base + 7, base + 7 + length)
    wanted: list[tuple[int, int]] = []
    for n, entry in enumerate(entries):
        if n and entry == entries[n - 1] + 1:
            first, length = wanted.pop()
            wanted.append((first, length + 1))
        else:
            wanted.append((entry, 1))
    assert list(page_flags._runs(array("Q", entries).tobytes())) == wanted
