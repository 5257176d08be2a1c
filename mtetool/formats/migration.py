"""The tags of a guest that QEMU emulates, from the file of a migration (`migrate file:PATH`).

Without KVM, QEMU keeps tags in memory of its own, a RAM block of the machine type `virt` with two
tags a byte (hw/arm/virt.c, create_tag_ram), which a migration carries like any other block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO, cast

from mtetool.errors import BadFormatError, host_error
from mtetool.formats.parts import Part, PartSource
from mtetool.guest import GuestInfo, Memslot
from mtetool.relay.stream import RamStream
from mtetool.tags import runs
from mtetool.uapi import GRANULE_BYTES

MAGIC = b"QEVM"
TAG_BLOCK, RAM_BLOCK = "mach-virt.tag", "mach-virt.ram"
RAM_IPA = 0x4000_0000
"""Where the memory of the machine type `virt` begins."""

_PACKED_BYTES = 2 * GRANULE_BYTES
_HOST_PAGE_BYTES = 4096
_PIECE_BYTES = 1 << 20


def open_migration(stream: BinaryIO, name: str, slots: Sequence[Memslot] = ()) -> PartSource:
    """The tags in a migration's file; memory is where `virt` has it, or in `slots`.

    They are copied to a file without a name, sparse. Raises BadFormatError,
    StreamUnsupportedError and StreamDamagedError, HostIoError.
    """
    try:
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    except OSError as error:
        raise host_error(error, "no file for the tags of a migration can be made") from error
    pages = _Pages(spool)
    ram = RamStream(kept=TAG_BLOCK, keep=pages.keep)
    _feed(ram, stream, name)
    memory = _memory(ram, name, slots)
    info = GuestInfo(name, True, _HOST_PAGE_BYTES, tuple(memory), "qemu")
    parts = list(_parts(memory, ram))
    try:
        spool.truncate(sum(slot.size_bytes for slot in memory) // _PACKED_BYTES)
        spool.flush()
    except OSError as error:
        raise host_error(error, "the tags of a migration could not be kept") from error
    return PartSource(spool, name, info, parts)


class _Pages:
    """The pages of the block of tags in a sparse file: the last that came for each place."""

    def __init__(self, spool: BinaryIO) -> None:
        self._spool = spool
        self._written: set[int] = set()

    def keep(self, offset: int, contents: bytes) -> None:
        """Keep a page; one of zeros only in place of another."""
        if offset not in self._written:
            if not any(contents):
                return
            self._written.add(offset)
        try:
            self._spool.seek(offset)
            self._spool.write(contents)
        except OSError as error:
            raise host_error(error, "the tags of a migration could not be kept") from error


def _feed(ram: RamStream, stream: BinaryIO, name: str) -> None:
    while not ram.done:
        try:
            piece = stream.read(_PIECE_BYTES)
        except OSError as error:
            raise host_error(error, f"{name}: reading failed") from error
        if not piece:
            raise BadFormatError(
                f"{name} ends before the end of the guest's memory",
                hint="wait until QEMU reports the migration as completed: info migrate",
            )
        ram.feed(piece)


def _memory(ram: RamStream, name: str, slots: Sequence[Memslot]) -> list[Memslot]:
    sizes = {block.name: block.size_bytes for block in ram.blocks}
    if TAG_BLOCK not in sizes:
        raise BadFormatError(
            f"{name} has no block {TAG_BLOCK}: this guest has no tags that QEMU emulates",
            hint="that takes -M virt,mte=on without KVM; a guest of KVM is saved while it runs:"
            " mtetool save kvm:PID",
        )
    most = sizes[TAG_BLOCK] * _PACKED_BYTES
    memory = list(slots) or [Memslot(0, RAM_IPA, min(sizes.get(RAM_BLOCK, most), most))]
    if sum(slot.size_bytes for slot in memory) > most:
        raise BadFormatError(
            f"{name} has the tags of {most:#x} bytes of memory, less than the memslots given"
        )
    return memory


def _parts(memory: Sequence[Memslot], ram: RamStream) -> Iterator[Part]:
    """The memory whose tags came, and that whose tags did not, in order of address."""
    number = [block.name for block in ram.blocks].index(TAG_BLOCK)
    starts, lengths, came = runs(ram.marks[number])
    rows = list(zip(starts.tolist(), lengths.tolist(), came.tolist(), strict=True))
    at = 0
    found: list[Part] = []
    for slot in memory:
        start, end = at, at + slot.size_bytes // _PACKED_BYTES
        for first, n_pages, here in rows:
            low = max(first * ram.page_bytes, start)
            high = min((first + n_pages) * ram.page_bytes, end)
            if low < high:
                ipa = slot.ipa + (low - start) * _PACKED_BYTES
                reason = None if here else "the migration did not carry these tags"
                found.append(Part(ipa, (high - low) * _PACKED_BYTES, low, reason=reason))
        at = end
    yield from sorted(found)
