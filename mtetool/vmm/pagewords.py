"""Which pages a process has in its page tables, from the words of /proc/PID/pagemap.

One word of 64 bits per page (Documentation/admin-guide/mm/pagemap.rst): bit 63 is set for a page in
memory, bit 62 for one on swap. Every kernel has them; PAGEMAP_SCAN (Linux 6.7) gives the same
answer faster, and leaves out the kernel's page of zeros, which counts as present here.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator

from mtetool.spans import Span

_PAGE = mmap.PAGESIZE
_WORD_BYTES = 8
# 512 KiB of words, 256 MiB of memory in small pages.
_BLOCK_PAGES = 1 << 16
# Both bits are in the last byte of a little-endian word.
_EXISTS = bytes(byte >= 0x40 for byte in range(256))
_RUN = re.compile(rb"\x01+")


def existing(pagemap: int, start: int, end: int) -> Iterator[Span]:
    """The parts of a range of addresses that are in memory or on swap, in order.

    Whole pages, like the range; parts may touch. `pagemap` is the open /proc/PID/pagemap. Raises
    OSError if the kernel returns no words, as for a process that is gone.
    """
    at = start
    while at < end:
        n_pages = min((end - at) // _PAGE, _BLOCK_PAGES)
        words = os.pread(pagemap, n_pages * _WORD_BYTES, at // _PAGE * _WORD_BYTES)
        n_read = len(words) // _WORD_BYTES
        if not n_read:
            raise OSError(f"no page tables at {at:#x}")
        for run in _RUN.finditer(words[_WORD_BYTES - 1 :: _WORD_BYTES].translate(_EXISTS)):
            yield Span(at + run.start() * _PAGE, at + run.end() * _PAGE)
        at += n_read * _PAGE
