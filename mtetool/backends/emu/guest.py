"""Emulated guests, `emu:PATH`: tag memory in one sparse file, answering as the kernel does."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from mtetool.backends.emu.file import (
    Description,
    check_description,
    check_hugetlb,
    create,
    lock,
    open_file,
    read_header,
)
from mtetool.backends.emu.owner import Owner
from mtetool.backends.emu.tag_file import TagFile
from mtetool.buffers import as_bytes
from mtetool.emulator.behaviours import Behaviour
from mtetool.emulator.ioctl import CopyRequest, copy_tags
from mtetool.errors import NoSuchProcessError, SourceError, TooLateError, UsageError
from mtetool.guest import Extent, Guest, GuestInfo, Memslot
from mtetool.uapi import GRANULE_BYTES, KVM_ARM_TAGS_FROM_GUEST, KVM_ARM_TAGS_TO_GUEST

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer
    from mtetool.faults.model import Fault
    from mtetool.guest import GuestOptions

# Holes smaller than this much guest memory are read like data: half of what is read at once.
_SMALL_HOLE_BYTES = 32 << 20


def open_emulated(path: str, options: GuestOptions) -> EmulatedGuest:
    """Open the emulated guest kept in the file `path`, as its owner: no fault fires.

    Raises NoSuchFileError; EmulatorFileError for a file that is not a guest's or is damaged;
    BusyError while another process writes to it; PermissionRefusedError; SourceError for an empty
    path.
    """
    if not path:
        raise SourceError("emu: needs a path", hint="make a guest: mtetool emu create PATH")
    if any(slot.host_address is not None for slot in options.memslots):
        raise UsageError(
            f"emu:{path} has no process with addresses: --memslot with an address is for kvm:"
            " sources",
            hint="leave the address out: --memslot IPA:SIZE",
        )
    fd, writable = open_file(path)
    try:
        lock(fd, path, fcntl.LOCK_SH)
        described = read_header(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return EmulatedGuest(fd, path, described, writable=writable, told=options.memslots)


def open_with_faults(path: str, options: GuestOptions) -> Guest:
    """Open the emulated guest kept in the file `path`, with the faults that it was given.

    Raises NoSuchProcessError, as for a VMM that ended, once a fault has made it vanish; and what
    `open_emulated` raises.
    """
    with ExitStack() as stack:
        guest: Guest = stack.enter_context(emulated := open_emulated(path, options))
        kept = emulated.owner.kept_faults()
        if kept is not None:
            # Imported here: it needs numpy, and hardly any guest has faults.
            from mtetool.faults.guest import FaultyGuest

            guest = stack.enter_context(FaultyGuest(emulated, kept=kept))
            if kept.read().vanished:
                raise NoSuchProcessError(
                    f"the guest emu:{path} vanished (an injected fault)",
                    hint=f"bring it back: mtetool emu fault {path} --clear",
                )
        stack.pop_all()
        return guest


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
    fill: Callable[[Owner], None] | None = None,
    faults: Sequence[Fault] = (),
) -> None:
    """Make an emulated guest in the file `path`, all tags 0 or as `fill` sets them.

    `hugetlb` has the ids of memslots with hugetlb memory; a kernel without the behaviour
    HUGETLB_TAGS refuses those for a VM with MTE. The guest has `faults` from its first use on.

    The file appears once it is complete, with mode 0600. Raises UsageError, MisalignedError and
    RangeError for a layout that no guest can have; FileExistsAlreadyError without `force`;
    BusyError if it would replace a guest that is in use; NoSuchFileError if there is no such
    directory; PermissionRefusedError, DiskFullError, HostIoError.
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
                fill(guest.owner)
            if faults:
                guest.owner.set_faults(faults)

    create(path, described, force=force, fill=fill_file)


class EmulatedGuest(Guest):
    """A guest whose tags are in a file; `open_emulated` makes it.

    Readers share the file; the first write locks it for this process alone, until `close`.
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
        self._file = TagFile(fd, path, described, writable=writable)
        self.page_size_bytes = described.page_size_bytes
        self.owner = Owner(self._file)
        self._told = told

    @property
    def behaviours(self) -> frozenset[Behaviour]:
        """How its kernel differs from others."""
        return self._file.described.behaviours

    def info(self) -> GuestInfo:
        """See `Guest.info`; the memslots are those given with `--memslot`, if any."""
        described = self._file.described
        return GuestInfo(
            source=f"emu:{self._file.path}",
            mte=described.mte,
            page_size_bytes=self.page_size_bytes,
            memslots=self._told or described.memslots,
            vcpus=described.vcpus,
        )

    def paused(self) -> bool | None:
        """True: an emulated guest never runs."""
        return True

    def freeze(self) -> None:
        """Do nothing: an emulated guest never runs."""

    def thaw(self) -> float:
        """See `Guest.thaw`; 0.0, as it never ran."""
        return 0.0

    def any_thread_reads(self, extent: Extent) -> bool:
        """See `Guest.any_thread_reads`: an extent within one slot, whatever layout was given."""
        slot = self._file.slot_at(extent.ipa)
        if slot is None or not self._file.described.mte:
            return False
        return slot.kind != "device" and extent.end <= slot.end

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """See `Guest.may_be_tagged`: where the file has no holes, ignoring small ones."""
        self._file.check_open()
        at, end = extent.ipa, extent.end
        start = stop = at  # found but not yielded yet
        while at < end:
            first, behind = self._file.data_from(at, end)
            if first - stop >= _SMALL_HOLE_BYTES:
                if stop > start:
                    yield Extent.between(start, stop)
                start = first
            stop = at = behind
        if stop > start:
            yield Extent.between(start, stop)

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """See `Guest.read_tags`. Also raises EmulatorFileError, HostIoError."""
        return self._copy(ipa, as_bytes(out), KVM_ARM_TAGS_FROM_GUEST)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`. Also raises BusyError, PermissionRefusedError, DiskFullError."""
        return self._copy(ipa, as_bytes(tags), KVM_ARM_TAGS_TO_GUEST)

    def _copy(self, ipa: int, tags: memoryview, flags: int) -> int:
        file = self._file
        file.check_open()
        file.check_mte()
        request = CopyRequest(ipa, len(tags) * GRANULE_BYTES, flags=flags)
        copy = _FileCopy(file, ipa, tags)
        was_taken = file.is_taken
        answer = copy_tags(request, copy, mte=True, page_size_bytes=self.page_size_bytes)
        if file.is_taken and not tags and not was_taken:
            file.share()  # a write of nothing must not lock out readers
        if answer < 0:
            raise OSError(-answer, f"copying tags at {ipa:#x}: {os.strerror(-answer)}")
        return answer

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`. Refused if the guest has vCPUs (`vcpus`)."""
        file = self._file
        file.check_open()
        if file.described.mte:
            return False
        if file.described.vcpus:
            raise TooLateError(
                f"emu:{file.path} has vCPUs already: enable MTE before the first one",
                hint="create a guest without vCPUs: mtetool emu create --vcpus 0",
            )
        file.take_for_writing()
        file.describe(replace(file.described, mte=True))
        return True

    def close(self) -> None:
        """See `Guest.close`; ends the lock. Raises HostError if written data is lost."""
        self._file.close()


class _FileCopy:
    """The tags of a request, copied from or to the file; a `TagMemory`."""

    def __init__(self, file: TagFile, ipa: int, tags: memoryview) -> None:
        self._file = file
        self._ipa = ipa
        self._tags = tags
        self._is_short = False

    def begin(self, request: CopyRequest) -> int:
        """See `TagMemory.begin`: a writer has the file to itself."""
        if request.to_guest:
            self._file.take_for_writing()
        return 0

    def copy_some(self, request: CopyRequest, done: int) -> int:
        """See `TagMemory.copy_some`: up to the end of a slot, or as much as the disk takes."""
        ipa = self._ipa + done
        slot = self._file.slot_at(ipa)
        if self._is_short or slot is None or slot.kind == "device":
            return 0
        if request.to_guest and slot.readonly:
            return 0
        copy = self._file.write if request.to_guest else self._file.read
        part = self._tags[done // GRANULE_BYTES :][: (slot.end - ipa) // GRANULE_BYTES]
        n_granules = copy(ipa, part)
        self._is_short = n_granules < len(part)  # the next call from there says why
        return n_granules * GRANULE_BYTES
