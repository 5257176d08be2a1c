"""Which pages of memory have tags at all, from the kernel's own mark on their frames.

The kernel marks a frame before tags are first set in it (PG_mte_tagged, which is PG_arch_2:
arch/arm64/include/asm/mte.h), and reads the tags of an unmarked one as zeros
(arch/arm64/kvm/guest.c, kvm_vm_ioctl_mte_copy_tags). With CAP_SYS_ADMIN /proc/PID/pagemap shows
frames and /proc/kpageflags their flags. Only clear answers are trusted:

- Flags of a compound page (transparent huge pages, hugetlb, large folios) are those of its first
  frame (fs/proc/page.c, stable_page_flags; measured on 6.12 and 7.3: a mark on a later frame does
  not show), so such a page may be tagged.
- A page may move during the check: its frame must be the same before and after.
- A page that is swapped, migrating or only in a file has no frame here, and may be tagged.
- Two pages of our own show whether this kernel reports the mark at all.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from array import array
from collections.abc import Iterator
from itertools import islice

from mtetool.loops import frame_run
from mtetool.spans import Span

_PAGE = mmap.PAGESIZE
_PROT_MTE = 0x20  # arch/arm64/include/uapi/asm/mman.h
# Documentation/admin-guide/mm/pagemap.rst: bit 63 present, bits 54:0 the frame's number, which
# reads as 0 without the privilege to see it.
_PRESENT = 1 << 63
_FRAME = (1 << 55) - 1

# Bit 41 of a frame's flags (KPF_ARCH_2, include/linux/kernel-page-flags.h), and those of compound
# pages and of frames without a page (KPF_COMPOUND_HEAD 15, KPF_COMPOUND_TAIL 16, KPF_HUGE 17,
# KPF_NOPAGE 20, KPF_THP 22, include/uapi/linux/kernel-page-flags.h), as bits of single bytes.
_TELLING = {5: 0x02, 1: 0x80, 2: 0x01 | 0x02 | 0x10 | 0x40}
_TABLES = {byte: bytes(bool(n & bits) for n in range(256)) for byte, bits in _TELLING.items()}

_CHUNK_PAGES = 1 << 12
# A copy has a fixed cost, that of this many pages: shorter gaps are read along.
_WORTH_PAGES = 512
_UNMARKED = re.compile(rb"\x00{%d,}" % _WORTH_PAGES)
# Scattered frames are looked up one by one, which costs as much as reading tags.
_RUN_PAGES = 16


class PageFlags:
    """The marks of this host's frames; must be closed. Raises OSError if they cannot be read."""

    def __init__(self) -> None:
        self._fd = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not self._are_meaningful():
                raise OSError("this kernel does not show which frames have tags")
        except (OSError, ValueError) as error:
            self.close()
            raise OSError(str(error)) from error

    def close(self) -> None:
        """Close the file. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def may_be_tagged(self, pagemap: int, start: int, end: int) -> Iterator[Span]:
        """The parts of a range of addresses that may have tags, in order.

        They may touch. `pagemap` is the open /proc/PID/pagemap of the process.
        """
        while start < end:
            stop = min(end, start + _CHUNK_PAGES * _PAGE)
            at = start
            if stop - start >= _WORTH_PAGES * _PAGE and self._is_worth_it(pagemap, start, stop):
                for match in _UNMARKED.finditer(self._marks(pagemap, start, stop)):
                    first, behind = (start + n * _PAGE for n in match.span())
                    if at < first:
                        yield Span(at, first)
                    at = behind
            if at < stop:
                yield Span(at, stop)
            start = stop

    def _is_worth_it(self, pagemap: int, start: int, end: int) -> bool:
        """Whether a few pages, close enough together to hit every long run, show one without tags.

        Checking every page of fully tagged memory costs more than copying its tags.
        """
        try:
            for page in range(start, end, _WORTH_PAGES * _PAGE):
                entry = int.from_bytes(_entries(pagemap, page, page + _PAGE), "little")
                if self._of_run(entry, 1) == b"\0":
                    return True
        except OSError:
            pass  # counts as marked
        return False

    def _marks(self, pagemap: int, start: int, end: int) -> bytes:
        """A byte for each page: 0 if it surely has no tags."""
        n_pages = (end - start) // _PAGE
        unknown = b"\1" * n_pages
        try:
            before = _entries(pagemap, start, end)
            runs = list(islice(_runs(before), n_pages // _RUN_PAGES + 1))
            if len(before) != n_pages * 8 or len(runs) > n_pages // _RUN_PAGES:
                return unknown
            marks = b"".join(self._of_run(*run) for run in runs)
            after = _entries(pagemap, start, end)
        except OSError:
            return unknown
        if before == after:
            return marks
        # A shorter answer leaves the rest unknown.
        pairs = zip(array("Q", before), array("Q", after), strict=False)
        same = (one == other for one, other in pairs)
        kept = bytes(mark if still else 1 for mark, still in zip(marks, same, strict=False))
        return kept + unknown[len(kept) :]

    def _of_run(self, entry: int, n_pages: int) -> bytes:
        frame = entry & _FRAME
        if not entry & _PRESENT or not frame:
            return b"\1" * n_pages
        flags = os.pread(self._fd, n_pages * 8, frame * 8)
        found = 0
        for byte, table in _TABLES.items():
            found |= int.from_bytes(flags[byte::8].translate(table), "little")
        return found.to_bytes(len(flags) // 8, "little").ljust(n_pages, b"\1")

    def _are_meaningful(self) -> bool:
        """Whether a page of ours with tags has the mark, and one without does not."""
        return (self._mark_of_own(_PROT_MTE), self._mark_of_own(0)) == (b"\1", b"\0")

    def _mark_of_own(self, protection: int) -> bytes:
        both = mmap.PROT_READ | mmap.PROT_WRITE | protection
        with mmap.mmap(-1, _PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, both) as page:
            page[0] = 1
            view = ctypes.c_char.from_buffer(page)
            address = ctypes.addressof(view)
            del view  # or the mapping could not be closed
            own = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            try:
                entry = int.from_bytes(_entries(own, address, address + _PAGE), "little")
            finally:
                os.close(own)
            flags = os.pread(self._fd, 8, (entry & _FRAME) * 8)
            compound = any(flags[byte] & _TELLING[byte] for byte in (1, 2))
            if not entry & _FRAME or compound:
                raise OSError("its frame is hidden or compound")
            return self._of_run(entry, 1)


def _entries(pagemap: int, start: int, end: int) -> bytes:
    raw = os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8)
    return raw[: len(raw) // 8 * 8]


def _runs(entries: bytes) -> Iterator[tuple[int, int]]:
    """(first entry, count) of runs of entries that differ only in their consecutive frames."""
    start, n_entries = 0, len(entries) // 8
    while start < n_entries:
        stop = frame_run(entries, start)
        yield int.from_bytes(entries[start * 8 : start * 8 + 8], "little"), stop - start
        start = stop
