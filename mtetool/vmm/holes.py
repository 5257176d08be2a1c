"""How much memory reading a guest's memory would newly allocate in its VMM.

Untouched anonymous private memory reads as the kernel's one page of zeros, and costs nothing. A
hole of a file in memory (memfd, tmpfs, hugetlbfs) gets a page of its own as soon as it is read; the
page stays, and is charged to the VMM's cgroup, because a thread of the VMM reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from mtetool import procfs
from mtetool.guest import Extent
from mtetool.spans import Span
from mtetool.vmm import pagewords
from mtetool.vmm.hostmemory import HostMemory
from mtetool.vmm.pagemap import (
    HUGETLBFS,
    TMPFS,
    UnknownError,
    file_system,
    open_mapped,
)

# The unit of st_blocks, whatever the file system's own unit is.
_BLOCK_BYTES = 512
# Smaller memory is not searched for: a VMM has many mappings of such a size.
_WORTH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Window:
    """A part of a mapping of a file in memory; `hole_bytes` are those of the whole file."""

    pid: int
    start: int
    end: int
    file: tuple[int, int]
    hole_bytes: int
    is_huge: bool


def bytes_to_be_made(pid: int, known: HostMemory | None, extents: Iterable[Extent]) -> int:
    """The most bytes that reading guest memory would newly allocate in process `pid`.

    Pages of `extents` that are `known` not to exist are not read.
    """
    unplaced: list[int] = []
    made = 0
    windows = list(_windows(pid))
    for each in extents:
        ends = each.ipa, each.end
        for at, stop, addresses in known.told(*ends) if known else [(*ends, [])]:
            if addresses:
                assert known is not None
                made += _made_of(windows, known, at, stop, addresses)
            elif stop - at >= _WORTH_BYTES:
                unplaced.append(stop - at)
    if unplaced:
        free = _without(windows, known.addresses() if known else [])
        # Memory larger than all such files together is not in them.
        if sum(window.end - window.start for window in free) >= min(unplaced):
            made += min(sum(unplaced), _holes(free))
    return made


def _made_of(
    windows: Sequence[_Window], known: HostMemory, at: int, stop: int, addresses: Sequence[int]
) -> int:
    """The same for memory that is at one of several addresses."""
    size = stop - at
    here = [list(_within(windows, address, address + size)) for address in addresses]
    # Which huge pages exist is unknown, so all are read.
    made = max(_holes([each for each in some if each.is_huge]) for some in here)
    if len(addresses) < 2 or not any(_holes(some) for some in here):
        return made
    # Pages that exist at any of the addresses are read, whichever is the right one.
    read = sum(part.size_bytes for part in known.existing(Extent(at, size)))
    for some, address in zip(here, addresses, strict=True):
        made = max(made, min(_holes(some), read - known.existing_at(address, address + size)))
    return made


def _holes(windows: Iterable[_Window]) -> int:
    """How many bytes of windows may be holes; several windows may show the same file."""
    of_files: dict[tuple[int, int], tuple[int, int]] = {}
    for window in windows:
        if window.hole_bytes:
            absent, _ = of_files.get(window.file, (0, 0))
            # Pages in the page tables exist; private huge pages are nowhere else.
            absent += window.end - window.start - _present(window.pid, window.start, window.end)
            of_files[window.file] = absent, window.hole_bytes
    return sum(min(absent, holes) for absent, holes in of_files.values())


def _windows(pid: int) -> Iterator[_Window]:
    """The mappings of files in memory that may be a guest's memory."""
    with suppress(OSError):
        for mapping in procfs.mappings(pid):
            start, end = mapping.start, mapping.end
            if not mapping.inode or mapping.flags[1] != "w" or end - start < _WORTH_BYTES:
                continue
            file = mapping.device, mapping.inode
            try:
                fd = open_mapped(pid, mapping, os.O_PATH)
            except UnknownError:
                # It may be memory. We cannot see its pages beyond the VMM's own page tables.
                yield _Window(pid, start, end, file, end - start, False)
                continue
            try:
                kind, status = file_system(fd), os.fstat(fd)
            finally:
                os.close(fd)
            holes = status.st_size - status.st_blocks * _BLOCK_BYTES
            if kind in (TMPFS, HUGETLBFS):
                yield _Window(pid, start, end, file, max(holes, 0), kind == HUGETLBFS)


def _present(pid: int, start: int, end: int) -> int:
    """How many bytes of a range of addresses are in the process's page tables."""
    with suppress(OSError):
        fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return sum(part.size_bytes for part in pagewords.existing(fd, start, end))
        finally:
            os.close(fd)
    return 0


def _within(windows: Iterable[_Window], start: int, end: int) -> Iterator[_Window]:
    for window in windows:
        first, stop = max(window.start, start), min(window.end, end)
        if first < stop:
            yield replace(window, start=first, end=stop)


def _without(windows: Iterable[_Window], ranges: Iterable[Span]) -> list[_Window]:
    left = list(windows)
    for start, end in ranges:
        left = [
            part
            for window in left
            for part in (*_within([window], 0, start), *_within([window], end, 1 << 64))
        ]
    return left
