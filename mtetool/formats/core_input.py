"""Tags in the core file of a process (Linux 5.18 and later), or in one that mtetool wrote.

Documentation/arch/arm64/memory-tagging-extension.rst: there is a segment PT_AARCH64_MEMTAG_MTE for
each mapping with PROT_MTE; `p_vaddr` and `p_memsz` are the memory, `p_filesz` the tags, two a byte.
A segment with fewer tags than memory (mappings that are not dumped have none) has no tags there:
they are missing, not 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO

from mtetool.errors import BadFormatError
from mtetool.formats.elf import (
    NT_AUXV,
    NT_PRPSINFO,
    PT_AARCH64_MEMTAG_MTE,
    Elf,
    Segment,
    read_elf,
)
from mtetool.formats.parts import Part, PartSource
from mtetool.guest import Extent, GuestInfo, Memslot, SlotKind
from mtetool.sources.layout import merged, without
from mtetool.uapi import GRANULE_BYTES, PAGE_SIZES

_PACKED_BYTES = 2 * GRANULE_BYTES
_ADDRESS_LIMIT = 1 << 64
# The addresses of a process have 52 bits at most.
_MOST_BYTES = 1 << 52
_AT_PAGESZ = 6
_AUXV_PAIR = struct.Struct("<QQ")
# struct elf_prpsinfo of 64 bits: the name of the program, 16 bytes.
_PROGRAM_NAME = slice(40, 56)


def open_core(stream: BinaryIO, name: str) -> PartSource:
    """The tags of a core file. Raises BadFormatError where it has none."""
    elf = read_elf(stream, name)
    page_bytes = _page_bytes(elf)
    segments = [s for s in elf.segments if s.kind == PT_AARCH64_MEMTAG_MTE and s.memory_bytes]
    segments.sort(key=lambda segment: segment.vaddr)
    if not segments:
        raise BadFormatError(
            f"{name} has no tags: no segment PT_AARCH64_MEMTAG_MTE",
            hint="the process had no memory with PROT_MTE, or Linux was older than 5.18; in"
            " QEMU's dumps there are never any",
        )
    _check(segments, page_bytes, name)
    parts = [part for segment in segments for part in _parts(segment, elf)]
    slots = _slots(elf, [Extent(s.vaddr, s.memory_bytes) for s in segments], page_bytes)
    info = GuestInfo(name, True, page_bytes, tuple(slots), name=_program(elf))
    return PartSource(stream, name, info, parts)


def _check(segments: list[Segment], page_bytes: int, name: str) -> None:
    end = 0
    for segment in segments:
        where = f"{name}: the segment of tags for {segment.vaddr:#x}:{segment.memory_bytes:#x}"
        if segment.vaddr % page_bytes or segment.memory_bytes % page_bytes:
            raise BadFormatError(f"{where} is not made of whole pages of {page_bytes} bytes")
        if segment.end > _ADDRESS_LIMIT or segment.memory_bytes >= _ADDRESS_LIMIT:
            raise BadFormatError(f"{where} ends beyond the address space")
        if segment.vaddr < end:
            raise BadFormatError(f"{where} overlaps another")
        if segment.file_bytes > segment.memory_bytes // _PACKED_BYTES:
            raise BadFormatError(f"{where} has {segment.file_bytes:,} bytes of tags: too many")
        end = segment.end
    total = sum(segment.memory_bytes for segment in segments)
    if total > _MOST_BYTES:
        raise BadFormatError(f"{name} says that a process had {total:,} bytes of tagged memory")


def _parts(segment: Segment, elf: Elf) -> Iterator[Part]:
    """The tags that the file has; where it was cut (by a limit, a full disk), the rest is lost."""
    here = min(segment.file_bytes, max(elf.file_bytes - segment.offset, 0))
    held_bytes = here * _PACKED_BYTES
    if held_bytes:
        yield Part(segment.vaddr, held_bytes, segment.offset)
    stored = segment.file_bytes * _PACKED_BYTES
    if held_bytes < stored:
        why = "the core was cut before these tags"
        yield Part(segment.vaddr + held_bytes, stored - held_bytes, reason=why)
    if stored < segment.memory_bytes:
        why = "the core has no tags for this memory"
        yield Part(segment.vaddr + stored, segment.memory_bytes - stored, reason=why)


def _slots(elf: Elf, tagged: list[Extent], page_bytes: int) -> Iterator[Memslot]:
    """The tagged mappings, and the others as memory that has no tags."""
    loads = [
        Extent(load.vaddr, load.memory_bytes)
        for load in elf.loads()
        if not (load.vaddr % page_bytes or load.memory_bytes % page_bytes)
        and load.end <= _ADDRESS_LIMIT
    ]
    plain = without(loads, tagged)
    others = {extent.ipa for extent in plain}
    every = sorted([*merged(tagged), *plain], key=lambda extent: extent.ipa)
    for number, extent in enumerate(every):
        kind: SlotKind = "device" if extent.ipa in others else "ram"
        yield Memslot(number, extent.ipa, extent.size_bytes, None, kind)


def _page_bytes(elf: Elf) -> int:
    for note in elf.notes():
        if note.owner == b"CORE" and note.kind == NT_AUXV:
            whole = len(note.contents) // _AUXV_PAIR.size * _AUXV_PAIR.size
            for kind, value in _AUXV_PAIR.iter_unpack(note.contents[:whole]):
                if kind == _AT_PAGESZ and value in PAGE_SIZES:
                    return int(value)
    return PAGE_SIZES[0]


def _program(elf: Elf) -> str | None:
    for note in elf.notes():
        if note.owner == b"CORE" and note.kind == NT_PRPSINFO:
            name = note.contents[_PROGRAM_NAME].split(b"\0")[0]
            return name.decode(errors="replace") or None
    return None
