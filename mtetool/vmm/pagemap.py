"""Which pages of a process's memory exist, found without touching them.

The page tables show it for private memory (/proc/PID/pagemap, PAGEMAP_SCAN of Linux 6.7:
Documentation/admin-guide/mm/pagemap.rst; before that, `vmm.pagewords`). A page of a shared file can
exist without being in them, so the file's own holes are looked up too (SEEK_DATA, which counts
pages on swap as data: mm/filemap.c, folio_seek_hole_data). Anything that is not clearly one of
these is assumed to exist. Pages that the kernel shows to have no tags are left out, too
(`vmm.page_flags`).
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mtetool import procfs
from mtetool.procfs import Mapping
from mtetool.spans import Span, united
from mtetool.vmm import pagewords
from mtetool.vmm.page_flags import PageFlags

# include/uapi/linux/fs.h: struct pm_scan_arg and struct page_region.
_ARGUMENT = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
_PAGEMAP_SCAN = 0xC0000000 | _ARGUMENT.size << 16 | ord("f") << 8 | 16
_IS_PRESENT, _IS_SWAPPED, _IS_ZERO_PAGE = 1 << 3, 1 << 4, 1 << 5
_REGIONS = 1024
# struct procmap_query, with a name of at most _NAME_BYTES.
_QUERY = struct.Struct("<9Q4I2Q")
_FLAGS = ("r-", "w-", "x-", "sp")  # by bit: PROCMAP_QUERY_VMA_FLAGS
_PROCMAP_QUERY = 0xC0000000 | _QUERY.size << 16 | ord("f") << 8 | 17
_NAME_BYTES = 4096

# File systems whose pages are memory and nothing else: TMPFS_MAGIC, HUGETLBFS_MAGIC of
# include/uapi/linux/magic.h.
TMPFS, HUGETLBFS = 0x01021994, 0x958458F6


class UnknownError(Exception):
    """It is unknown which pages of some memory exist."""


class Mappings:
    """The mappings of process `pid` as they are now; it must be closed.

    PROCMAP_QUERY asks for one (Linux 6.11: include/uapi/linux/fs.h); otherwise all are read, which
    for a VMM's hundreds of them takes as long as the tags of some MiB.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._name = bytearray(_NAME_BYTES)
        self._fd = -1
        with suppress(OSError):
            self._fd = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)

    def at(self, address: int) -> Mapping | None:
        """The mapping at that address; None if there is none, or the process is gone."""
        try:
            return self._asked(address)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESRCH):
                return None
        try:
            every = procfs.mappings(self._pid)
        except OSError:
            return None
        return next((found for found in every if found.start <= address < found.end), None)

    def _asked(self, address: int) -> Mapping:
        """Ask the kernel. Raises OSError: ENOENT for no mapping, ENOTTY for an older kernel."""
        if self._fd < 0:
            raise OSError(errno.EBADF, "it could not be opened")
        name = _address_of(self._name)
        words = (0, address, 0, 0, 0, 0, 0, 0, 0, 0, _NAME_BYTES, 0, name, 0)
        argument = bytearray(_QUERY.pack(_QUERY.size, *words))
        fcntl.ioctl(self._fd, _PROCMAP_QUERY, argument)
        _, _, _, start, end, bits, _, *of_file, size, _, _, _ = _QUERY.unpack(argument)
        offset, inode, major, minor = of_file
        text = os.fsdecode(bytes(self._name[: max(size - 1, 0)]))
        flags = "".join(letters[not bits >> bit & 1] for bit, letters in enumerate(_FLAGS))
        return Mapping(start, end, flags, inode, text, offset, os.makedev(major, minor))

    def close(self) -> None:
        """Close its files. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Pagemap:
    """The memory of process `pid` as it is now. Raises UnknownError if it cannot be examined.

    It must be closed.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._files: dict[tuple[int, int], int] = {}
        self._mappings = Mappings(pid)
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UnknownError(str(error)) from error
        self._vector = bytearray(_REGIONS * _REGION.size)
        self._flags: PageFlags | None = None
        with suppress(OSError):
            self._flags = PageFlags()
        self._scans = self._kernel_scans()
        try:
            # The process that serves its page faults may still bring in pages.
            if _has_userfaultfd(pid):
                raise UnknownError("another process may serve its page faults (userfaultfd)")
        except (OSError, UnknownError) as error:
            self.close()
            raise UnknownError(str(error)) from error

    def existing(self, start: int, end: int) -> Iterator[Span]:
        """The parts of a range of addresses that may have tags, in order.

        They are whole pages that exist, and may touch. Where existence is unknown, it is assumed.
        The process keeps running: pages made after the search has passed them are missed.
        """
        at = start
        while at < end and (mapping := self._mappings.at(at)) is not None:
            stop = min(mapping.end, end)
            for first, behind in self._of_mapping(mapping, at, stop):
                yield from self._with_tags(first, behind)
            at = stop
        if at < end:
            yield Span(at, end)  # not mapped, or not as we were told: a copy will show

    def has_pages(self, start: int, end: int) -> bool:
        """Whether all pages of a mapped range of addresses exist, tagged or not.

        Where existence is unknown, it is assumed.
        """
        page = os.sysconf("SC_PAGE_SIZE")
        at, end = start // page * page, -(-end // page) * page
        while at < end:
            mapping = self._mappings.at(at)
            if mapping is None or not mapping.start <= at < mapping.end:
                return False
            stop = min(mapping.end, end)
            for first, behind in self._of_mapping(mapping, at, stop):
                if first > at:
                    return False
                at = max(at, behind)
            if at < stop:
                return False
        return True

    def _with_tags(self, start: int, end: int) -> Iterator[Span]:
        if self._flags is None:
            yield Span(start, end)
        else:
            yield from self._flags.may_be_tagged(self._fd, start, end)

    def close(self) -> None:
        """Close its files. Idempotent."""
        for fd in [self._fd, *self._files.values()]:
            if fd >= 0:
                os.close(fd)
        self._fd = -1
        self._files = {}
        self._mappings.close()
        if self._flags is not None:
            self._flags.close()

    def _of_mapping(self, mapping: Mapping, start: int, end: int) -> Iterator[Span]:
        at = start
        try:
            for first, stop in self._known(mapping, start, end):
                yield Span(first, stop)
                at = stop
        except UnknownError:
            yield Span(at, end)  # what was not examined yet

    def _known(self, mapping: Mapping, start: int, end: int) -> Iterator[Span]:
        if mapping.inode == 0:
            yield from self._in_page_tables(start, end)
        else:
            tables = self._in_page_tables(start, end)
            yield from united(tables, self._in_file(mapping, start, end))

    def _kernel_scans(self) -> bool:
        """Whether the kernel has PAGEMAP_SCAN: on older ones any ioctl there is ENOTTY."""
        try:
            self._scan(0, 0, _address_of(self._vector))
        except OSError:
            return False
        return True

    def _in_page_tables(self, start: int, end: int) -> Iterator[Span]:
        try:
            if self._scans:
                yield from self._scanned(start, end)
            else:
                yield from pagewords.existing(self._fd, start, end)
        except OSError as error:
            raise UnknownError(str(error)) from error

    def _scanned(self, start: int, end: int) -> Iterator[Span]:
        at = done = start
        while at < end:
            n_regions, behind = self._scan(at, end, _address_of(self._vector))
            # A copy, because the caller may scan other memory meanwhile, into the same vector.
            regions = bytes(self._vector[: n_regions * _REGION.size])
            for first, stop, _ in _REGION.iter_unpack(regions):
                if stop > done:
                    yield Span(max(first, done), stop)
                    done = stop
            # If the vector is full at the end of the range, this may be before the last regions
            # (seen on 6.18): they come again.
            if behind <= at:
                break
            at = behind

    def _scan(self, start: int, end: int, vector: int) -> tuple[int, int]:
        """How many regions were found, and where the scan stopped."""
        either = _IS_PRESENT | _IS_SWAPPED
        # The kernel's page of zeros stands for memory that was only read: all its tags are 0.
        zero = _IS_ZERO_PAGE
        words = (start, end, 0, vector, _REGIONS, 0, zero, zero, either, either)
        argument = bytearray(_ARGUMENT.pack(_ARGUMENT.size, 0, *words))
        found = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
        return found, _ARGUMENT.unpack(argument)[4]

    def _in_file(self, mapping: Mapping, start: int, end: int) -> Iterator[Span]:
        fd = self._open(mapping)
        shift = mapping.offset - mapping.start
        page = os.sysconf("SC_PAGE_SIZE")
        at, limit = start + shift, end + shift
        while at < limit:
            try:
                data = os.lseek(fd, at, os.SEEK_DATA)
                hole = min(os.lseek(fd, data, os.SEEK_HOLE), limit) if data < limit else limit
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return  # only a hole is left
                raise UnknownError(str(error)) from error
            if data >= limit:
                return
            at = -(-hole // page) * page
            yield Span(data // page * page - shift, at - shift)

    def _open(self, mapping: Mapping) -> int:
        key = (mapping.device, mapping.inode)
        if key not in self._files:
            self._files[key] = _open_file(self._pid, mapping)
        return self._files[key]


def _open_file(pid: int, mapping: Mapping) -> int:
    """Open the file of a mapping, if it is small pages of memory. Raises UnknownError."""
    fd = open_mapped(pid, mapping, os.O_RDONLY | os.O_NONBLOCK)
    if file_system(fd) == TMPFS:
        return fd
    # hugetlbfs: it does not report holes, and tags of its pages have rules of their own.
    os.close(fd)
    raise UnknownError(f"{mapping.name} is not a file in memory")


def open_mapped(pid: int, mapping: Mapping, flags: int) -> int:
    """Open the regular file of a mapping. Raises UnknownError.

    Devices are never opened: that could have side effects, and /dev/zero is one.
    """
    ways = [Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")]
    with suppress(OSError):
        ways += Path(f"/proc/{pid}/fd").iterdir()
    for path in ways:
        with suppress(OSError):
            status = path.stat()
            if (status.st_dev, status.st_ino) == (
                mapping.device,
                mapping.inode,
            ) and stat.S_ISREG(status.st_mode):
                return os.open(path, flags | os.O_CLOEXEC)
    raise UnknownError(f"{mapping.name} cannot be opened")


def file_system(fd: int) -> int:
    """The file system's type. (tmpfs with huge pages has hugetlbfs's large st_blksize, too.)"""
    import ctypes

    # struct statfs, of which f_type is the first word (include/uapi/asm-generic/statfs.h).
    found = (ctypes.c_ulong * 32)()
    if ctypes.CDLL(None).fstatfs(fd, found):
        return 0
    return int(found[0])


def _has_userfaultfd(pid: int) -> bool:
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            if str(path.readlink()).startswith("anon_inode:[userfaultfd]"):
                return True
    return False


def _address_of(buffer: bytearray) -> int:
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
