"""The memory of an emulated process: mappings, files in memory, pages with their tags.

Only what decides an answer is kept: whether a page exists, its data (buffers for tags lie in it),
its tags, and whether the kernel has marked it as tagged.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from mtetool.emulator.behaviours import Behaviour, Host
from mtetool.uapi import TAG_MAX

Protection = Literal["none", "r", "rw", "rw-mte"]
"""What a mapping allows: nothing, reading, reading and writing, or tags of its own as well."""

_ADDRESS_BITS = (1 << 56) - 1


@dataclass(slots=True)
class Page:
    """A page of memory. `tags` is None if the kernel has not marked it as tagged.

    The pages of a huge page that is marked as a whole are one `Page`.
    """

    data: bytearray
    tags: bytearray | None = None

    def mark(self) -> bytearray:
        """Mark it as tagged, all tags 0 at first; return the tags."""
        if self.tags is None:
            self.tags = bytearray(len(self.data) // 16)
        return self.tags

    def copy(self) -> Page:
        """The result of copy-on-write: the tags are copied, too (copy_highpage)."""
        tags = None if self.tags is None else bytearray(self.tags)
        return Page(bytearray(self.data), tags)


@dataclass
class MemoryFile:
    """A file in memory, by its pages; missing ones are holes.

    `tags_allowed` is false for files on disk; `unit_bytes` is the size of its pages: huge ones for
    hugetlbfs.
    """

    size_bytes: int
    unit_bytes: int
    tags_allowed: bool = True
    pages: dict[int, Page] = field(default_factory=dict)

    def truncate(self, size_bytes: int) -> None:
        """Shrink or grow the file; what is cut off loses its tags."""
        self.size_bytes = size_bytes
        for index in [i for i in self.pages if i * self.unit_bytes >= size_bytes]:
            del self.pages[index]

    def punch(self, offset: int, size_bytes: int) -> None:
        """Make a hole of whole pages."""
        first, last = -(-offset // self.unit_bytes), (offset + size_bytes) // self.unit_bytes
        for index in range(first, last):
            self.pages.pop(index, None)

    def page(self, index: int) -> Page | None:
        """The page at an index, made if it is a hole; None beyond the end."""
        if index * self.unit_bytes >= self.size_bytes:
            return None
        return self.pages.setdefault(index, Page(bytearray(self.unit_bytes)))


@dataclass
class Mapping:
    """A range of addresses with one kind of memory behind it.

    `file` is None for anonymous private memory. `own` has the pages that are this mapping's alone,
    by address.
    """

    start: int
    end: int
    protection: Protection
    file: MemoryFile | None
    file_offset: int
    shared: bool
    unit_bytes: int
    tags_allowed: bool
    own: dict[int, Page] = field(default_factory=dict)

    def part(self, start: int, end: int) -> Mapping:
        """The same mapping for a part of its addresses, with the pages there."""
        own = {at: page for at, page in self.own.items() if start <= at < end}
        offset = self.file_offset + (start - self.start)
        return replace(self, start=start, end=end, file_offset=offset, own=own)


@dataclass(frozen=True, slots=True)
class Found:
    """A page, and where in it an address lies; `page` is None for the page of zeros."""

    page: Page | None
    offset: int


class AddressSpace:
    """The addresses of one process. Answers are those of system calls: 0 or more, or -errno."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._mappings: list[Mapping] = []

    # --- system calls ---------------------------------------------------------------------

    def map(
        self,
        address: int,
        size_bytes: int,
        protection: Protection,
        *,
        file: MemoryFile | None = None,
        offset: int = 0,
        shared: bool = False,
        huge: bool = False,
    ) -> int:
        """mmap with MAP_FIXED; `huge` is MAP_HUGETLB memory, anonymous and private."""
        unit = self.host.hugepage_bytes if huge else self.host.page_size_bytes
        if file is not None:
            unit = file.unit_bytes
        if address % unit or size_bytes % unit or size_bytes <= 0:
            return -errno.EINVAL
        if shared and file is None:
            file, offset = MemoryFile(size_bytes, unit), 0
        allowed = file.tags_allowed if file is not None else True
        if huge:
            allowed = self.host.has(Behaviour.HUGETLB_TAGS)
        if protection == "rw-mte" and not allowed:
            return -errno.EINVAL
        end = address + size_bytes
        self.unmap(address, size_bytes)
        self._mappings.append(
            Mapping(address, end, protection, file, offset, shared, unit, allowed)
        )
        self._mappings.sort(key=lambda mapping: mapping.start)
        return 0

    def unmap(self, address: int, size_bytes: int) -> int:
        """munmap; the mapping's own pages are gone with their tags."""
        self._split(address, size_bytes)
        self._mappings = [m for m in self._mappings if not self._inside(m, address, size_bytes)]
        return 0

    def protect(self, address: int, size_bytes: int, protection: Protection) -> int:
        """mprotect; ENOMEM if not all of it is mapped."""
        at = address
        self._split(address, size_bytes)
        for mapping in self._mappings:
            if self._inside(mapping, address, size_bytes):
                if mapping.start != at:
                    return -errno.ENOMEM
                mapping.protection = protection
                at = mapping.end
        return 0 if at == address + size_bytes else -errno.ENOMEM

    def discard(self, address: int, size_bytes: int) -> int:
        """madvise with MADV_DONTNEED: private pages are dropped, files keep theirs."""
        at, end = address, address + size_bytes
        for mapping in self.crossing(address, size_bytes):
            first, last = max(mapping.start, address), min(mapping.end, end)
            for page_address in [a for a in mapping.own if first <= a < last]:
                del mapping.own[page_address]
            if mapping.start <= at:
                at = last
        return 0 if at == end else -errno.ENOMEM

    def page_out(self, address: int, size_bytes: int) -> int:
        """madvise with MADV_PAGEOUT on private memory; return how many pages are then on swap.

        This loses nothing, not even tags (mte_prepare_to_swap), so nothing is done.
        """
        return sum(
            address <= at < address + size_bytes
            for mapping in self.crossing(address, size_bytes)
            for at in mapping.own
        )

    def peek_tags(self, address: int, n_tags: int) -> bytes:
        """Tags as PTRACE_PEEKMTETAGS gives them, up to the first page that has none to give."""
        out = bytearray()
        for found, first, n in self._tagged(address, n_tags, write=False):
            tags = None if found.page is None else found.page.tags
            out += bytes(n) if tags is None else tags[first : first + n]
        return bytes(out)

    def poke_tags(self, address: int, tags: bytes) -> int:
        """Set tags as PTRACE_POKEMTETAGS does; return how many."""
        done = 0
        for found, first, n in self._tagged(address, len(tags), write=True):
            assert found.page is not None
            new = bytes(tag & TAG_MAX for tag in tags[done : done + n])
            found.page.mark()[first : first + n] = new
            done += n
        return done

    def _tagged(
        self, address: int, n_tags: int, *, write: bool
    ) -> Iterator[tuple[Found, int, int]]:
        """The pages of a range mapped for tags: each page, its first tag there, and how many."""
        for at, n_bytes in self._pieces(address - address % 16, n_tags * 16):
            mapping = next(self.crossing(at, 1), None)
            if mapping is None or mapping.protection != "rw-mte":
                return
            found = self.fault_in(at, write=write)
            if found is None:
                return
            yield found, found.offset // 16, n_bytes // 16

    def truncate(self, file: MemoryFile, size_bytes: int) -> int:
        """ftruncate: private copies of the pages cut off are gone, too."""
        file.truncate(size_bytes)
        for mapping in self._mappings:
            if mapping.file is file:
                for at in list(mapping.own):
                    if mapping.file_offset + at - mapping.start >= size_bytes:
                        del mapping.own[at]
        return 0

    def write(self, address: int, data: bytes) -> int:
        """process_vm_writev onto itself: the bytes written before the first bad page."""
        done = self.store(address, data)
        return done or -errno.EFAULT

    def read(self, address: int, size_bytes: int) -> bytes | int:
        """process_vm_readv from itself: the bytes before the first bad page."""
        return self.load(address, size_bytes) or -errno.EFAULT

    # --- as the kernel reaches it ---------------------------------------------------------

    def crossing(self, address: int, size_bytes: int) -> Iterator[Mapping]:
        """The mappings that a range of addresses touches, in order."""
        end = address + size_bytes
        return (m for m in self._mappings if m.start < end and m.end > address)

    def fault_in(self, address: int, *, write: bool) -> Found | None:
        """The page at an address, made if needed; None if an access would fault."""
        mapping = next(self.crossing(address, 1), None)
        if mapping is None or mapping.protection == "none":
            return None
        if write and mapping.protection == "r":
            return None
        found = self._page_of(mapping, address, write=write)
        if mapping.protection == "rw-mte" and found is not None and found.page is not None:
            found.page.mark()
        return found

    def _page_of(self, mapping: Mapping, address: int, *, write: bool) -> Found | None:
        unit = mapping.unit_bytes
        if mapping.file is not None:
            return self._file_page(mapping, mapping.file, address, write=write)
        start = address - (address - mapping.start) % unit
        if start not in mapping.own:
            # hugetlb has no shared page of zeros.
            if not write and unit == self.host.page_size_bytes:
                return Found(None, address - start)
            mapping.own[start] = Page(bytearray(unit), self._first_tags(unit))
        return Found(mapping.own[start], address - start)

    def load(self, address: int, size_bytes: int) -> bytes:
        """What an unprivileged load gets, up to the first byte that faults."""
        out = bytearray()
        for at, n_bytes in self._pieces(address, size_bytes):
            found = self.fault_in(at, write=False)
            if found is None:
                break
            if found.page is None:
                out += bytes(n_bytes)
            else:
                out += found.page.data[found.offset : found.offset + n_bytes]
        return bytes(out)

    def store(self, address: int, data: bytes) -> int:
        """Store bytes one after the other; return how many before the first that faults."""
        done = 0
        for at, n_bytes in self._pieces(address, len(data)):
            found = self.fault_in(at, write=True)
            if found is None or found.page is None:
                break
            found.page.data[found.offset : found.offset + n_bytes] = data[done : done + n_bytes]
            done += n_bytes
        return done

    # --- inside ---------------------------------------------------------------------------

    def _first_tags(self, unit_bytes: int) -> bytearray | None:
        """Huge pages that a kernel does not mark as a whole keep the marks of their last use."""
        huge = unit_bytes != self.host.page_size_bytes
        marked = huge and not self.host.has(Behaviour.HUGETLB_TAGS)
        return bytearray(unit_bytes // 16) if marked else None

    def _file_page(
        self, mapping: Mapping, file: MemoryFile, address: int, *, write: bool
    ) -> Found | None:
        unit = mapping.unit_bytes
        start = address - (address - mapping.start) % unit
        if start in mapping.own:
            return Found(mapping.own[start], address - start)
        page = file.page((mapping.file_offset + start - mapping.start) // unit)
        if page is None:
            return None
        if write and not mapping.shared:
            page = mapping.own[start] = page.copy()
        return Found(page, address - start)

    def _pieces(self, address: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """A range in pieces within one page each, without the tag of the address."""
        page = self.host.page_size_bytes
        done = 0
        while done < size_bytes:
            at = address + done
            n_bytes = min(size_bytes - done, page - at % page)
            yield at & _ADDRESS_BITS, n_bytes
            done += n_bytes

    def _split(self, address: int, size_bytes: int) -> None:
        """Cut mappings in two where the range begins and ends."""
        for edge in (address, address + size_bytes):
            for number, mapping in enumerate(self._mappings):
                if mapping.start < edge < mapping.end:
                    left = mapping.part(mapping.start, edge)
                    right = mapping.part(edge, mapping.end)
                    self._mappings[number : number + 1] = [left, right]
                    break

    @staticmethod
    def _inside(mapping: Mapping, address: int, size_bytes: int) -> bool:
        return address <= mapping.start and mapping.end <= address + size_bytes
