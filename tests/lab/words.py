"""Run in the lab: find a VMM's existing pages by PAGEMAP_SCAN and by the words of pagemap.

`python3 -m tests.lab.words PID` examines all memory of a paused VMM both ways and prints JSON: the
number of pages that each finds, those that only the scan finds, before and after (there must be
none), and those that only the words show and that are not the kernel's page of zeros (also none).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import time

from mtetool import procfs
from mtetool.spans import Span
from mtetool.vmm import pagewords
from mtetool.vmm.pagemap import Pagemap

PAGE = mmap.PAGESIZE
# include/uapi/linux/kernel-page-flags.h: KPF_ZERO_PAGE, and KPF_THP for the huge one.
_ZERO = 1 << 24
_FRAME = (1 << 55) - 1


def is_of_zeros(pagemap: int, flags: int, address: int) -> bool:
    """Return whether the kernel's page of zeros is at an address."""
    (word,) = struct.unpack("<Q", os.pread(pagemap, 8, address // PAGE * 8))
    (found,) = struct.unpack("<Q", os.pread(flags, 8, (word & _FRAME) * 8))
    return bool(found & _ZERO)


def pages(ranges: list[Span]) -> set[int]:
    """Return the addresses of all pages in ranges."""
    return {at for start, end in ranges for at in range(start, end, PAGE)}


def main() -> None:
    """Examine the memory both ways."""
    pid = int(sys.argv[1])
    known = Pagemap(pid)
    assert known._scans
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    flags = os.open("/proc/kpageflags", os.O_RDONLY)
    result = {"scanned": 0, "words": 0, "lost": 0, "not_zeros": 0}
    seconds = [0.0, 0.0]
    for mapping in procfs.mappings(pid):
        # Skip mappings of a device or of the kernel's own pages, which the scan does not show.
        if mapping.flags[1] != "w" or mapping.name.startswith("anon_inode:"):
            continue
        began = time.monotonic()
        scanned = list(known._scanned(mapping.start, mapping.end))
        between = time.monotonic()
        words = list(pagewords.existing(pagemap, mapping.start, mapping.end))
        seconds[0] += between - began
        seconds[1] += time.monotonic() - between
        # The VMM's own threads run on, and now and then touch one of their pages.
        before, other = pages(scanned), pages(words)
        after = pages(list(known._scanned(mapping.start, mapping.end)))
        result["scanned"] += len(before)
        result["words"] += len(other)
        result["lost"] += len((before & after) - other)
        more = other - (before | after)
        result["not_zeros"] += sum(not is_of_zeros(pagemap, flags, at) for at in more)
    known.close()
    print(json.dumps({**result, "seconds": [round(each, 3) for each in seconds]}))


if __name__ == "__main__":
    main()
