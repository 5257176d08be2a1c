"""Run in the lab: swap out memory of a process, and report which of it is really on swap.

`python3 -m tests.lab.swapping PID SIZE [ENOUGH]` takes all mappings of that size of a process in
its own control group, and ends when ENOUGH pages of each are swapped out (by default, all that
were in memory: a page that was only read may be the page of zeros, which is never swapped out).
It prints JSON, a list with one object per mapping: its pages, how many of them are now on swap and
in memory, and how many pages on swap have a copy in memory. The process does not take part:
MADV_PAGEOUT by process_madvise.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time
from array import array
from contextlib import suppress
from pathlib import Path

_PROCESS_MADVISE = 440
_MADV_PAGEOUT = 21
_PRESENT_BIT = 63
_SWAPPED_BIT = 62
_TRIES = 50
_PAUSE_SECONDS = 0.1
_GROUPS = Path("/sys/fs/cgroup")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def mappings(pid: int, size: int) -> list[int]:
    """The addresses of the mappings of that size."""
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if end - start == size:
            found.append(start)
    return found


def page_out(pid: int, address: int, size: int) -> None:
    """Ask the kernel to reclaim the range at once. Raises OSError."""
    done = 0
    pidfd = os.pidfd_open(pid)
    try:
        while done < size:
            vector = (ctypes.c_ulong * 2)(address + done, size - done)
            words = (_PROCESS_MADVISE, pidfd, vector, ctypes.c_ulong(1), _MADV_PAGEOUT)
            answer = _libc.syscall(*words, ctypes.c_ulong(0))
            if answer <= 0:
                raise OSError(ctypes.get_errno(), "process_madvise")
            done += answer
    finally:
        os.close(pidfd)


def drop_copies(pid: int) -> int:
    """Drop the copies in memory of pages on swap; return how many are left."""
    name = Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition(":")[2]
    group = _GROUPS / name.lstrip("/")
    with suppress(BlockingIOError):  # there was less than that
        (group / "memory.reclaim").write_text(str(1 << 30))
    for line in (group / "memory.stat").read_text().splitlines():
        if line.startswith("swapcached "):
            return int(line.split()[1]) // mmap.PAGESIZE
    raise LookupError("memory.stat does not show swapcached")


def look(pid: int, address: int, size: int) -> dict[str, int]:
    """Count the mapping's pages that are on swap and in memory.

    For private memory, the page tables show both. For shared memory, they do not show the pages
    on swap, but smaps does.
    """
    entries = array("Q")
    with Path(f"/proc/{pid}/pagemap").open("rb") as pagemap:
        pagemap.seek(address // mmap.PAGESIZE * 8)
        entries.frombytes(pagemap.read(size // mmap.PAGESIZE * 8))
    present = sum(entry >> _PRESENT_BIT for entry in entries)
    swapped = sum(entry >> _SWAPPED_BIT & 1 for entry in entries)
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0]:
            inside = words[0].startswith(f"{address:08x}-") and words[1].endswith("s")
        elif inside and words[0] == "Swap:":
            swapped = int(words[1]) * 1024 // mmap.PAGESIZE
    return {"pages": len(entries), "present": present, "swapped": swapped}


def main() -> None:
    """Page out until everything that was in memory is on swap only, or the tries run out."""
    pid, size = int(sys.argv[1]), int(sys.argv[2])
    enough = int(sys.argv[3]) if len(sys.argv) > 3 else size
    for _ in range(_TRIES):
        addresses = mappings(pid, size)
        for address in addresses:
            page_out(pid, address, size)
        copies = drop_copies(pid)
        found = [{**look(pid, address, size), "copies": copies} for address in addresses]
        out = all(not each["present"] or each["swapped"] >= enough for each in found)
        if out and not copies:
            break
        # A page stays while something holds it for a moment, or while it is being written.
        time.sleep(_PAUSE_SECONDS)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
