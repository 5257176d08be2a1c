"""The file of an emulated guest: its description, and one byte for each granule of its memory.

The tags are read and written with pread and pwrite: a mapping would kill the process with SIGBUS if
the disk is full or the file was truncated, and reading it would allocate the holes of a tmpfs.
"""

from __future__ import annotations

import errno
import fcntl
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from mtetool import loops
from mtetool.backends.emu.file import damaged, file_size, lock, offsets, refused, replace_header
from mtetool.errors import BusyError, MteOffError, MtetoolError, file_error
from mtetool.guest import Memslot
from mtetool.spans import Span
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.backends.emu.file import Description

# The most that is compared and written at once; and the unit that is skipped if nothing in it
# changes, so that zeros onto a hole allocate nothing: a file system's block.
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4096

# The most that is read at once: it stays in the processor's cache until it is examined.
_READ_BYTES = 256 << 10

# The errors of file systems that do not know where a file has holes.
_NO_HOLES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

# After data, this many bytes of tags count as data: at most one lookup per chunk.
_SEEK_STEP_BYTES = 1 << 20


class TagFile:
    """The open file `fd` of a guest at `path`; it owns the descriptor.

    Readers share the file; `take_for_writing` locks it for this process alone, until `share` or
    `close`. Reads and writes are by guest address, which must exist, and stay within its slot.
    """

    def __init__(self, fd: int, path: str, described: Description, *, writable: bool) -> None:
        self.fd = fd
        self.path = path
        self.described = described
        self.writable = writable
        self.is_taken = False
        self._starts = [slot.ipa for slot in described.memslots]
        self._offsets = list(offsets(described))
        self._scratch: memoryview | None = None

    @property
    def tags_end(self) -> int:
        """Where the tags end in the file; faults may follow."""
        return file_size(self.described)

    def slot_at(self, ipa: int) -> Memslot | None:
        """The slot at that address, if any."""
        index = bisect_right(self._starts, ipa) - 1
        if index < 0 or self.described.memslots[index].end <= ipa:
            return None
        return self.described.memslots[index]

    def _offset(self, ipa: int) -> int:
        index = bisect_right(self._starts, ipa) - 1
        return self._offsets[index] + (ipa - self._starts[index]) // GRANULE_BYTES

    def read(self, ipa: int, out: memoryview) -> int:
        """Fill `out`; return how many granules. Raises EmulatorFileError, HostIoError."""
        return self._read_span(self._offset(ipa), out)

    def _read_span(self, offset: int, out: memoryview) -> int:
        done = 0
        while done < len(out):
            try:
                part = out[done : done + _READ_BYTES]
                n_bytes = os.preadv(self.fd, [part], offset + done)
            except OSError as error:
                raise refused(error, self.path) from error
            if n_bytes == 0:
                raise damaged(self.path, "it was truncated while it was open")
            # The kernel returns bits 7:4 as 0, whatever is in the file.
            loops.mask(part[:n_bytes])
            done += n_bytes
        return done

    def write(self, ipa: int, tags: memoryview) -> int:
        """Write tags; return how many granules: whole pages, fewer if the disk is full.

        Raises DiskFullError, HostIoError if none could be written.
        """
        offset = self._offset(ipa)
        if self._scratch is None:
            self._scratch = memoryview(bytearray(2 * _CHUNK_BYTES))
        done = 0
        while done < len(tags):
            # Up to a multiple of the chunk size in the file, to keep to the file's own blocks.
            room = _CHUNK_BYTES - (offset + done) % _CHUNK_BYTES
            part = tags[done : done + room]
            wanted = self._scratch[: len(part)]
            wanted[:] = part
            loops.mask(wanted)
            current = self._scratch[_CHUNK_BYTES : _CHUNK_BYTES + len(part)]
            self._read_span(offset + done, current)
            for first, last in _differing(wanted, current, (offset + done) % _BLOCK_BYTES):
                at = first
                try:
                    while at < last:
                        at += os.pwrite(self.fd, wanted[at:last], offset + done + at)
                except OSError as error:
                    per_page = self.described.page_size_bytes // GRANULE_BYTES
                    if whole := (done + at) // per_page * per_page:
                        return whole
                    raise refused(error, self.path) from error
            done += len(part)
        return done

    def data_from(self, ipa: int, end: int) -> Span:
        """The next stretch without a hole; empty, at `end`, if there is none.

        Addresses without tags count as data: no holes are known there.
        """
        slot = self.slot_at(ipa)
        if slot is None:
            behind = next((start for start in self._starts if start > ipa), end)
            return Span(ipa, min(behind, end))
        end = min(end, slot.end)
        if slot.kind == "device":
            return Span(ipa, end)
        base, offset = self._offset(slot.ipa), self._offset(ipa)
        limit = base + (end - slot.ipa) // GRANULE_BYTES
        try:
            data = min(os.lseek(self.fd, offset, os.SEEK_DATA), limit)
            # Small holes do not matter: the next lookup starts after this step.
            hole = min(data + _SEEK_STEP_BYTES, limit)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return Span(end, end)
            if error.errno in _NO_HOLES:
                return Span(ipa, end)
            raise refused(error, self.path) from error
        page = self.described.page_size_bytes
        per_page = page // GRANULE_BYTES
        first = slot.ipa + (data - base) // per_page * page
        behind = slot.ipa + -(-(hole - base) // per_page) * page
        return Span(max(first, ipa), min(behind, end))

    def describe(self, described: Description) -> None:
        """Replace the description, for the same memory. Raises DiskFullError, HostIoError."""
        try:
            replace_header(self.fd, self.described, described)
        except OSError as error:
            raise refused(error, self.path) from error
        self.described = described

    def check_open(self) -> None:
        """Raise ValueError once it is closed."""
        if self.fd < 0:
            raise ValueError(f"emu:{self.path} is closed")

    def check_mte(self) -> None:
        """Raise MteOffError for a guest without tags."""
        if not self.described.mte:
            raise MteOffError(
                f"MTE is off in emu:{self.path}, so it has no tags",
                hint="create it again with MTE; or, while it has no vCPUs:"
                f" mtetool enable emu:{self.path}",
            )

    def _unwritable(self) -> MtetoolError:
        read_only = os.fstatvfs(self.fd).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        what = f"{self.path} cannot be written by this user"
        return file_error(OSError(number, os.strerror(number)), self.path, what)

    def take_for_writing(self) -> None:
        """Lock it for this process alone. Raises BusyError, PermissionRefusedError, HostIoError."""
        self.check_open()
        if self.is_taken:
            return
        if not self.writable:
            raise self._unwritable()
        try:
            lock(self.fd, self.path, fcntl.LOCK_EX)
        except BusyError:
            # A failed conversion loses the lock that was held (flock(2)).
            with suppress(BusyError):
                lock(self.fd, self.path, fcntl.LOCK_SH)
            raise
        self.is_taken = True

    def share(self) -> None:
        """Let others read again."""
        self.is_taken = False
        lock(self.fd, self.path, fcntl.LOCK_SH)

    def close(self) -> None:
        """Close it, which ends the lock. Raises HostError if written data is lost."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            try:
                os.close(fd)
            except OSError as error:
                # Network file systems report a full disk only here.
                if self.is_taken and error.errno != errno.EINTR:
                    raise refused(error, self.path) from error


def _differing(a: memoryview, b: memoryview, phase: int) -> Iterator[tuple[int, int]]:
    """Runs of blocks in which `a` and `b` differ, as first and last index.

    `phase` is how far into a block the buffers begin.
    """

    def next_block(at: int) -> int:
        return min(at + _BLOCK_BYTES - (at + phase) % _BLOCK_BYTES, len(a))

    at = 0
    while at < len(a):
        at += loops.first_difference(a[at:], b[at:])
        if at == len(a):
            return
        first = max(at - (at + phase) % _BLOCK_BYTES, 0)
        at = next_block(at)
        while at < len(a):
            behind = next_block(at)
            if loops.first_difference(a[at:behind], b[at:behind]) == behind - at:
                break
            at = behind
        yield first, at
