"""The words of /proc/PID/pagemap, on real memory of this process."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.vmm import pagemap, pagewords
from mtetool.vmm.pagemap import Pagemap

PAGE = mmap.PAGESIZE
N_PAGES = 64


@contextmanager
def mapped(kind: str) -> Iterator[tuple[mmap.mmap, int]]:
    """Untouched memory and its address, without huge pages."""
    if kind == "private":
        memory = mmap.mmap(-1, N_PAGES * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    elif kind == "device":
        fd = os.open("/dev/zero", os.O_RDWR)
        memory = mmap.mmap(fd, N_PAGES * PAGE, mmap.MAP_PRIVATE)
        os.close(fd)
    else:
        fd = os.memfd_create("guest")
        os.ftruncate(fd, N_PAGES * PAGE)
        memory = mmap.mmap(fd, N_PAGES * PAGE, mmap.MAP_SHARED)
        os.close(fd)
    with memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        del first
        yield memory, address


def runs(pages: set[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, end)."""
    found: list[tuple[int, int]] = []
    for page in sorted(pages):
        start = found.pop()[0] if found and found[-1][1] == page else page
        found.append((start, page + 1))
    return found


@pytest.fixture
def no_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behave as on a kernel before 6.7, which does not know the ioctl's number."""
    monkeypatch.setattr(pagemap, "_PAGEMAP_SCAN", 0xC060_6600 | 200)


PAGES = st.sets(st.integers(0, N_PAGES - 1))


@settings(deadline=None)
@given(PAGES, st.sampled_from(["private", "memfd"]), st.sampled_from([1, 7, N_PAGES, 1 << 16]))
def test_what_was_touched_exists(pages: set[int], kind: str, block: int) -> None:
    with mapped(kind) as (memory, address), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pagewords, "_BLOCK_PAGES", block)
        for page in pages:
            memory[page * PAGE + 5] = 1
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
        try:
            found = list(pagewords.existing(fd, address, address + N_PAGES * PAGE))
        finally:
            os.close(fd)
        seen = {(at - address) // PAGE for first, stop in found for at in range(first, stop, PAGE)}
        assert seen == pages
        assert [first for first, _ in found] == sorted(first for first, _ in found)


@pytest.mark.parametrize("kind", ["private", "memfd"])
def test_a_kernel_without_the_scan(no_scan: None, kind: str) -> None:
    with mapped(kind) as (memory, address):
        for page in (3, 4, 40):
            memory[page * PAGE] = 1
        known = Pagemap(os.getpid())
        known._flags = None
        found = list(known.existing(address, address + N_PAGES * PAGE))
        known.close()
    wanted = [(3, 5), (40, 41)]
    assert found == [(address + a * PAGE, address + b * PAGE) for a, b in wanted]


def test_as_many_regions_as_fit_into_one_answer() -> None:
    """The scan then ends before the last region, which must not come twice."""
    n_pages = 2 * pagemap._REGIONS
    with mmap.mmap(-1, n_pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        first = ctypes.c_char.from_buffer(memory)
        address = ctypes.addressof(first)
        del first
        for page in range(0, n_pages, 2):
            memory[page * PAGE] = 1
        known = Pagemap(os.getpid())
        known._flags = None
        found = list(known.existing(address, address + n_pages * PAGE))
        known.close()
    pages = range(address, address + n_pages * PAGE, 2 * PAGE)
    assert found == [(at, at + PAGE) for at in pages]


def test_what_was_only_read_counts_as_present(no_scan: None) -> None:
    with mapped("private") as (memory, address):
        assert memory[9 * PAGE] == 0
        known = Pagemap(os.getpid())
        found = list(known.existing(address, address + N_PAGES * PAGE))
        known.close()
    assert found == [(address + 9 * PAGE, address + 10 * PAGE)]


def test_a_device_is_never_asked_for_its_holes() -> None:
    """/dev/zero answers 0 to every seek: the search would never end."""
    with mapped("device") as (_, address):
        known = Pagemap(os.getpid())
        known._flags = None
        found = list(known.existing(address, address + N_PAGES * PAGE))
        known.close()
    assert found == [(address, address + N_PAGES * PAGE)]


def test_a_process_without_page_tables() -> None:
    """A kernel thread, or a process that ends while it is examined."""
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="no page tables"):
            list(pagewords.existing(fd, 0, PAGE))
    finally:
        os.close(fd)


def test_swapped_pages_exist_and_an_answer_may_be_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words in a file: pages in memory, on swap, in neither, shared and in neither, in memory."""
    words = [1 << 63, 1 << 62, 0, 1 << 61, 1 << 63]
    (tmp_path / "pagemap").write_bytes(b"".join(word.to_bytes(8, "little") for word in words))
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n_bytes, at: pread(fd, min(n_bytes, 12), at))
    with (tmp_path / "pagemap").open("rb") as file:
        found = list(pagewords.existing(file.fileno(), 0, len(words) * PAGE))
    assert found == [(0, PAGE), (PAGE, 2 * PAGE), (4 * PAGE, 5 * PAGE)]
