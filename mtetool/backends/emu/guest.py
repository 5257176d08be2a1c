"""Emulated guests, `emu:PATH`: tag memory in one sparse file, answering as the kernel does.

The tags are read and written by pread and pwrite: a mapping would end the process with SIGBUS
where the disk is full or the file was truncated, and would allocate the holes of a tmpfs as it
reads them.
"""

from __future__ import annotations

import errno
import fcntl
import os
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from mtetool import loops
from mtetool.backends.emu.file import (
    Description,
    check_description,
    check_hugetlb,
    create,
    damaged,
    file_size,
    lock,
    offsets,
    open_file,
    read_header,
    refused,
    replace_header,
)
from mtetool.buffers import as_bytes
from mtetool.emulator.behaviours import Behaviour
from mtetool.emulator.ioctl import CopyRequest, check_request
from mtetool.errors import (
    BusyError,
    MisalignedError,
    MteOffError,
    MtetoolError,
    RangeError,
    SourceError,
    TooLateError,
    UsageError,
    file_error,
)
from mtetool.guest import Extent, Guest, GuestInfo, Memslot
from mtetool.uapi import GRANULE_BYTES, TAG_MAX

if TYPE_CHECKING:
    from mtetool.backends.emu.fault_block import FaultsInFile
    from mtetool.buffers import TagBuffer
    from mtetool.faults.model import Fault, Faults
    from mtetool.guest import GuestOptions

# What is compared and written at once; and the unit that is left alone where nothing in it
# changes, so that zeros onto a hole allocate nothing: a file system's block.
_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 4096

# What is read at once stays in the processor's cache until it was looked at.
_READ_BYTES = 256 << 10

# What file systems answer that do not know where a file has holes.
_NO_HOLES = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)

# After data, so many bytes of tags are taken for data: one look for each chunk at most.
_SEEK_STEP_BYTES = 1 << 20

# Guest memory whose tags are read although they are a hole: half as much as is read at once.
_SMALL_HOLE_BYTES = 32 << 20

Advance = Callable[[int], None]
"""Called with the bytes of guest memory that were done since the last call."""


def open_emulated(path: str, options: GuestOptions) -> EmulatedGuest:
    """Open the emulated guest kept in the file `path`, as its owner: no fault fires.

    Raises NoSuchFileError; EmulatorFileError for what is no such file or is damaged;
    BusyError while somebody writes to it; PermissionRefusedError; SourceError for no path.
    """
    if not path:
        raise SourceError("emu: needs a path", hint="mtetool emu create PATH makes a guest")
    if any(slot.host_address is not None for slot in options.memslots):
        raise UsageError(
            f"emu:{path} has no process that its memory could be in: --memslot with an address"
            " is for kvm: sources",
            hint="--memslot IPA:SIZE",
        )
    fd, writable = open_file(path)
    try:
        lock(fd, path, fcntl.LOCK_SH)
        described = read_header(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return EmulatedGuest(fd, path, described, writable=writable, told=options.memslots)


def create_emulated(
    path: str,
    *,
    page_size_bytes: int = 4096,
    memslots: Sequence[Memslot],
    mte: bool = True,
    vcpus: int = 1,
    hugetlb: Collection[int] = (),
    behaviours: Collection[Behaviour] = (),
    force: bool = False,
    fill: Callable[[EmulatedGuest], None] | None = None,
    faults: Sequence[Fault] = (),
) -> None:
    """Make an emulated guest in the file `path`, all tags 0 or as `fill` sets them.

    `hugetlb` names memslots, by id, whose memory is hugetlb; a kernel without the behaviour
    HUGETLB_TAGS refuses those for a VM with MTE. It has
    `faults` from the first use on.

    The file appears when it is whole, with mode 0600. Raises UsageError, MisalignedError and
    RangeError for a layout that no guest has; FileExistsAlreadyError without `force`;
    BusyError when it would replace a guest that is in use; NoSuchFileError where there is no
    such directory; PermissionRefusedError, DiskFullError, HostIoError.
    """
    slots = tuple(sorted(memslots, key=lambda slot: slot.ipa))
    described = Description(
        page_size_bytes, mte, vcpus, slots, frozenset(hugetlb), frozenset(behaviours)
    )
    check_description(described)
    check_hugetlb(described)

    def fill_file(fd: int) -> None:
        with EmulatedGuest(os.dup(fd), path, described, writable=True, told=()) as guest:
            if fill is not None:
                fill(guest)
            if faults:
                guest.set_faults(faults)

    create(path, described, force=force, fill=fill_file)


class EmulatedGuest(Guest):
    """A guest whose tags are in a file; `open_emulated` makes it.

    Readers share the file; the first write takes it for this process alone, until `close`.
    """

    makes_pages = False  # a hole in the file stays one

    def __init__(
        self,
        fd: int,
        path: str,
        described: Description,
        *,
        writable: bool,
        told: tuple[Memslot, ...],
    ) -> None:
        self._fd = fd
        self._path = path
        self._described = described
        self.page_size_bytes = described.page_size_bytes
        self._writable = writable
        self._exclusive = False
        self._told = told
        self._starts = [slot.ipa for slot in described.memslots]
        self._offsets = list(offsets(described))
        self._scratch: memoryview | None = None

    @property
    def behaviours(self) -> frozenset[Behaviour]:
        """What its kernel does differently from others."""
        return self._described.behaviours

    def any_thread_reads(self, extent: Extent) -> bool:
        """See `Guest.any_thread_reads`: what lies in one slot, whatever layout was given."""
        index = self._slot_index(extent.ipa)
        if index is None or not self._described.mte:
            return False
        slot = self._described.memslots[index]
        return slot.kind != "device" and extent.end <= slot.end

    def info(self) -> GuestInfo:
        """See `Guest.info`; the memslots are those told with `--memslot`, if any were."""
        return GuestInfo(
            source=f"emu:{self._path}",
            mte=self._described.mte,
            page_size_bytes=self.page_size_bytes,
            memslots=self._told or self._described.memslots,
            vcpus=self._described.vcpus,
        )

    def paused(self) -> bool | None:
        """True: nobody runs an emulated guest."""
        return True

    def freeze(self) -> None:
        """Nothing: an emulated guest always stands still."""

    def thaw(self) -> float:
        """See `Guest.thaw`; 0.0, as it never ran."""
        return 0.0

    # --- as the kernel --------------------------------------------------------------------

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """See `Guest.read_tags`. Raises also EmulatorFileError, HostIoError."""
        view = as_bytes(out)
        self._check_copy(ipa, len(view))
        return self._copied(ipa, view, self._read_span, writing=False)

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """See `Guest.may_be_tagged`: where the file has no holes, small ones left aside."""
        self._check_open()
        at, end = extent.ipa, extent.end
        start = stop = at  # what was found and not given yet
        while at < end:
            first, behind = self._data_from(at, end)
            if first - stop >= _SMALL_HOLE_BYTES:
                if stop > start:
                    yield Extent.between(start, stop)
                start = first
            stop = at = behind
        if stop > start:
            yield Extent.between(start, stop)

    def _data_from(self, ipa: int, end: int) -> tuple[int, int]:
        """The next stretch without a hole: where it begins, `end` if nowhere, and ends."""
        index = self._slot_index(ipa)
        if index is None:
            behind = next((start for start in self._starts if start > ipa), end)
            return ipa, min(behind, end)
        slot, base = self._described.memslots[index], self._offsets[index]
        end = min(end, slot.end)
        if slot.kind == "device":
            return ipa, end
        offset = base + (ipa - slot.ipa) // GRANULE_BYTES
        limit = base + (end - slot.ipa) // GRANULE_BYTES
        try:
            data = min(os.lseek(self._fd, offset, os.SEEK_DATA), limit)
            # No need to know small holes: what follows is looked at from behind the next step on.
            hole = min(data + _SEEK_STEP_BYTES, limit)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return end, end
            if error.errno in _NO_HOLES:
                return ipa, end
            raise refused(error, self._path) from error
        per_page = self.page_size_bytes // GRANULE_BYTES
        first = slot.ipa + (data - base) // per_page * self.page_size_bytes
        behind = slot.ipa + -(-(hole - base) // per_page) * self.page_size_bytes
        return max(first, ipa), min(behind, end)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`. Raises also BusyError, PermissionRefusedError, DiskFullError."""
        view = as_bytes(tags)
        self._check_copy(ipa, len(view))
        was_taken = self._exclusive
        self._take_for_writing()
        if not view:
            if not was_taken:
                self._share()  # whoever only asks keeps nobody from reading
            return 0
        return self._copied(ipa, view, self._write_span, writing=True)

    def _check_copy(self, ipa: int, n_granules: int) -> None:
        self._check_open()
        self._check_mte()
        request = CopyRequest(ipa, n_granules * GRANULE_BYTES)
        if check_request(request, mte=True, page_size_bytes=self.page_size_bytes):
            raise OSError(errno.EINVAL, "not aligned to the page size, or too long for one copy")

    def _copied(
        self, ipa: int, tags: memoryview, copy: Callable[[int, memoryview], int], *, writing: bool
    ) -> int:
        """Copy slot by slot up to the first page that cannot be; the bytes completed."""
        done = 0
        while done < len(tags):
            at = ipa + done * GRANULE_BYTES
            index = self._slot_index(at)
            slot = self._described.memslots[index] if index is not None else None
            if slot is None or slot.kind == "device" or (writing and slot.readonly):
                if done:
                    break
                raise OSError(errno.EFAULT, "no memory there that can be copied")
            part = tags[done : done + (slot.end - at) // GRANULE_BYTES]
            copied = copy(self._offset(at), part)
            done += copied
            if copied < len(part):
                break  # the next call there says why
        return done * GRANULE_BYTES

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`. A guest with vCPUs, what `vcpus` says, refuses."""
        self._check_open()
        if self._described.mte:
            return False
        if self._described.vcpus:
            raise TooLateError(
                f"emu:{self._path} has vCPUs already: MTE can only be enabled before",
                hint="mtetool emu create --vcpus 0 makes a guest without",
            )
        self._take_for_writing()
        enabled = replace(self._described, mte=True)
        try:
            replace_header(self._fd, self._described, enabled)
        except OSError as error:
            raise refused(error, self._path) from error
        self._described = enabled
        return True

    # --- as its owner ---------------------------------------------------------------------

    def set_tag(
        self, ipa: int, size_bytes: int, tag: int, *, advance: Advance | None = None
    ) -> None:
        """Give the granules of a range one tag, in read-only memory too.

        Raises MisalignedError for what is not whole granules, RangeError where not all of it
        is memory, MteOffError, BusyError; nothing is changed then.
        """
        if not 0 <= tag <= TAG_MAX:
            raise UsageError(f"{tag} is not a tag: tags go from 0 to {TAG_MAX}")
        self._check_owned(ipa, size_bytes)
        n_granules = size_bytes // GRANULE_BYTES
        constant = memoryview(bytes([tag]) * min(n_granules, _CHUNK_BYTES))
        for first in range(0, n_granules, _CHUNK_BYTES):
            part = constant[: min(_CHUNK_BYTES, n_granules - first)]
            self._poke(ipa + first * GRANULE_BYTES, part)
            if advance is not None:
                advance(len(part) * GRANULE_BYTES)

    def fill(
        self,
        pattern: str,
        seed: int,
        slots: Sequence[int] | None = None,
        *,
        ranges: Sequence[Extent] = (),
        advance: Advance | None = None,
    ) -> None:
        """Give memslots (by id; None: all) the tags of a pattern, see `patterns`.

        Device memory is left out. `ranges` are filled
        instead of memslots, each with a pattern of its own. Raises UsageError for unknown slots
        and patterns, MisalignedError for a range that is not whole pages, RangeError where not
        all of it is memory, MteOffError, BusyError; nothing is changed then.
        """
        from mtetool.backends.emu.patterns import pattern_tags

        for extent in ranges:
            self._check_pages(extent.ipa, extent.size_bytes)
        chosen = ranges or [Extent(slot.ipa, slot.size_bytes) for slot in self._chosen(slots)]
        self._check_mte()
        self._take_for_writing()
        per_page = self.page_size_bytes // GRANULE_BYTES
        for extent in chosen:
            ipa, n_granules = extent.ipa, extent.size_bytes // GRANULE_BYTES
            for tags in pattern_tags(pattern, seed, ipa, n_granules, per_page):
                self._poke(ipa, as_bytes(tags))
                ipa += tags.size * GRANULE_BYTES
                if advance is not None:
                    advance(tags.size * GRANULE_BYTES)

    def faults(self) -> Faults:
        """The faults it has for others, and what they have seen."""
        from mtetool.faults.model import Faults

        kept = self.kept_faults()
        if kept is None:
            return Faults()
        with closing(kept):
            return kept.read()

    def set_faults(self, faults: Iterable[Fault]) -> None:
        """Give it these faults in place of those before, or none; one that vanished is back.

        Raises UsageError for too many of them, BusyError, PermissionRefusedError, DiskFullError.
        """
        ordered = tuple(faults)
        self._take_for_writing()
        at = file_size(self._described)
        try:
            if not ordered:
                os.ftruncate(self._fd, at)
                return
            from mtetool.backends.emu.fault_block import FaultsInFile

            with closing(FaultsInFile(self._fd, self._path, at, writable=True)) as kept:
                kept.replace(ordered)
        except OSError as error:
            raise refused(error, self._path) from error

    def kept_faults(self) -> FaultsInFile | None:
        """Where its faults are kept, if it has any; to be closed by the caller."""
        self._check_open()
        at = file_size(self._described)
        try:
            if os.fstat(self._fd).st_size == at:
                return None
            from mtetool.backends.emu.fault_block import FaultsInFile

            return FaultsInFile(self._fd, self._path, at, writable=self._writable)
        except OSError as error:
            raise refused(error, self._path) from error

    def _chosen(self, slots: Sequence[int] | None) -> list[Memslot]:
        known = {slot.id: slot for slot in self._described.memslots if slot.kind != "device"}
        if slots is None:
            return list(known.values())
        for slot_id in slots:
            if slot_id not in known:
                ids = ", ".join(str(known_id) for known_id in sorted(known))
                raise UsageError(f"{self._path} has no memslot {slot_id}; it has {ids}")
        return [known[slot_id] for slot_id in dict.fromkeys(slots)]

    def _check_pages(self, ipa: int, size_bytes: int) -> None:
        page = self.page_size_bytes
        if ipa % page or size_bytes % page:
            raise MisalignedError(
                f"{ipa:#x}:{size_bytes:#x} is not made of whole pages of {page} bytes", ipa=ipa
            )
        self._check_owned(ipa, size_bytes)

    def _check_owned(self, ipa: int, size_bytes: int) -> None:
        if ipa % GRANULE_BYTES or size_bytes % GRANULE_BYTES or size_bytes <= 0:
            raise MisalignedError(
                f"{ipa:#x}:{size_bytes:#x} is not made of whole granules of 16 bytes", ipa=ipa
            )
        at, end = ipa, ipa + size_bytes
        while at < end:
            index = self._slot_index(at)
            if index is None or self._described.memslots[index].kind == "device":
                raise RangeError(
                    f"{ipa:#x}:{size_bytes:#x} is not all memory: there is none at {at:#x}",
                    hint=f"the memslots: mtetool emu show {self._path}",
                    ipa=at,
                )
            at = self._described.memslots[index].end
        self._check_mte()
        self._take_for_writing()

    def _poke(self, ipa: int, tags: memoryview) -> None:
        """Write to memory that is known to be there; it may cross from slot to slot."""
        done = 0
        while done < len(tags):
            at = ipa + done * GRANULE_BYTES
            index = self._slot_index(at)
            if index is None:
                raise RangeError(f"no memory at {at:#x}", ipa=at)
            end = self._described.memslots[index].end
            part = tags[done : done + (end - at) // GRANULE_BYTES]
            done += self._write_span(self._offset(at), part)

    # --- the tags in the file -------------------------------------------------------------

    def _slot_index(self, ipa: int) -> int | None:
        index = bisect_right(self._starts, ipa) - 1
        if index < 0 or self._described.memslots[index].end <= ipa:
            return None
        return index

    def _offset(self, ipa: int) -> int:
        index = bisect_right(self._starts, ipa) - 1
        return self._offsets[index] + (ipa - self._starts[index]) // GRANULE_BYTES

    def _read_span(self, offset: int, out: memoryview) -> int:
        done = 0
        while done < len(out):
            try:
                part = out[done : done + _READ_BYTES]
                n_bytes = os.preadv(self._fd, [part], offset + done)
            except OSError as error:
                raise refused(error, self._path) from error
            if n_bytes == 0:
                raise damaged(self._path, "it was truncated while it was open")
            # The kernel gives bits 7:4 as 0, whatever became of the file.
            loops.mask(part[:n_bytes])
            done += n_bytes
        return done

    def _write_span(self, offset: int, tags: memoryview) -> int:
        """How many were written: whole pages, short where the disk is full; raises for none."""
        if self._scratch is None:
            self._scratch = memoryview(bytearray(2 * _CHUNK_BYTES))
        done = 0
        while done < len(tags):
            # Up to a multiple of the chunk in the file, so that blocks are the file's own.
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
                        at += os.pwrite(self._fd, wanted[at:last], offset + done + at)
                except OSError as error:
                    per_page = self.page_size_bytes // GRANULE_BYTES
                    if whole := (done + at) // per_page * per_page:
                        return whole
                    raise refused(error, self._path) from error
            done += len(part)
        return done

    # --- its life -------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._fd < 0:
            raise ValueError(f"emu:{self._path} is closed")

    def _check_mte(self) -> None:
        if not self._described.mte:
            raise MteOffError(
                f"MTE is off in emu:{self._path}, so that it has no tags",
                hint=f"mtetool enable emu:{self._path} before it has vCPUs, or emu create again",
            )

    def _unwritable(self) -> MtetoolError:
        read_only = os.fstatvfs(self._fd).f_flag & os.ST_RDONLY
        number = errno.EROFS if read_only else errno.EACCES
        what = f"{self._path} cannot be written by this user"
        return file_error(OSError(number, os.strerror(number)), self._path, what)

    def _take_for_writing(self) -> None:
        self._check_open()
        if self._exclusive:
            return
        if not self._writable:
            raise self._unwritable()
        try:
            lock(self._fd, self._path, fcntl.LOCK_EX)
        except BusyError:
            # A conversion that fails has lost the lock that was held (flock(2)).
            with suppress(BusyError):
                lock(self._fd, self._path, fcntl.LOCK_SH)
            raise
        self._exclusive = True

    def _share(self) -> None:
        self._exclusive = False
        lock(self._fd, self._path, fcntl.LOCK_SH)

    def close(self) -> None:
        """See `Guest.close`; ends the lock. Raises HostError where what was written is lost."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            try:
                os.close(fd)
            except OSError as error:
                # Network file systems tell of a full disk only here.
                if self._exclusive and error.errno != errno.EINTR:
                    raise refused(error, self._path) from error


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
