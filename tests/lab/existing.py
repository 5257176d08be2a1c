"""Run in the lab: find exactly the pages of a guest's memory that exist.

`python3 -m tests.lab.existing PID ADDRESS SIZE` prints JSON: the extents that exist in the
process's memory at that address, and the blocks of the file that backs it. For shared memory the
extents are the file's; for private memory, the file's and the process's own copies.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_ENTRY_BYTES = 8  # of /proc/PID/pagemap: Documentation/admin-guide/mm/pagemap.rst
_PRESENT, _SWAPPED, _OF_A_FILE = (1 << bit for bit in (63, 62, 61))
_AT_ONCE = 1 << 16
_LARGE_BYTES = 32 << 20

Extents = list[tuple[int, int]]


def own_pages(pid: int, address: int, size_bytes: int) -> Extents:
    """Return the process's pages in memory or on swap that are not pages of a file."""
    page = os.sysconf("SC_PAGE_SIZE")
    first, count = address // page, size_bytes // page
    starts: list[int] = []
    ends: list[int] = []
    before = False
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for number in range(0, count, _AT_ONCE):
            wanted = min(_AT_ONCE, count - number)
            data = os.pread(
                pagemap.fileno(), wanted * _ENTRY_BYTES, (first + number) * _ENTRY_BYTES
            )
            entries = np.frombuffer(data, dtype=np.uint64)
            exists = (entries & np.uint64(_PRESENT | _SWAPPED)) != 0
            exists &= (entries & np.uint64(_OF_A_FILE)) == 0
            changes = np.flatnonzero(np.diff(exists, prepend=before)) + number
            for at in changes:
                (ends if len(starts) > len(ends) else starts).append(int(at) * page)
            before = bool(exists[-1])
    if len(starts) > len(ends):
        ends.append(size_bytes)
    return list(zip(starts, ends, strict=True))


def data_of(fd: int) -> Iterator[tuple[int, int]]:
    """Yield the extents of a file that are not holes."""
    size, end = os.fstat(fd).st_size, 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end


def existing(pid: int, line: str, within: range | None = None) -> tuple[Extents, Extents, int]:
    """Return what exists of a mapping, a line of maps: own pages, the file's, its blocks."""
    where, mode, _, _, inode, *_ = line.split()
    there = within or _range(line)
    own = [] if "s" in mode else own_pages(pid, there.start, len(there))
    if inode == "0":
        return own, [], 0
    fd = os.open(f"/proc/{pid}/map_files/{where}", os.O_RDONLY)
    try:
        return own, list(data_of(fd)), os.fstat(fd).st_blocks
    finally:
        os.close(fd)


def large_memory(pid: int) -> list[tuple[Extents, Extents, int]]:
    """Return what exists of all mappings so large that they can only be a guest's memory."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    found = [line for line in lines if " rw" in line and len(_range(line)) >= _LARGE_BYTES]
    return [existing(pid, line) for line in found]


def _range(line: str) -> range:
    return range(*(int(number, 16) for number in line.split()[0].split("-")))


def main() -> None:
    """Print what exists."""
    pid, address, size_bytes = map(int, sys.argv[1:4])
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    (line,) = [line for line in lines if address in _range(line)]
    print(json.dumps(existing(pid, line, range(address, address + size_bytes))))


if __name__ == "__main__":
    main()
