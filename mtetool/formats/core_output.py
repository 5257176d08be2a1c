"""Write tags as an ELF core that debuggers open, alone or with the memory of QEMU's dump.

gdb takes the tags from segments PT_AARCH64_MEMTAG_MTE, if the note NT_AUXV says that the processor
has MTE (AT_HWCAP2, bit 18), and wants a thread (NT_PRSTATUS). lldb also needs a note whose owner is
LINUX, and a PT_LOAD around every tag.
There is none without a dump: to gdb, a segment of memory without contents is memory full of zeros.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import BinaryIO, NamedTuple

from mtetool.errors import BadFormatError, LayoutError
from mtetool.files.sink import Sink
from mtetool.formats.elf import (
    HEADER_BYTES,
    MOST_SEGMENTS,
    NT_ARM_TAGGED_ADDR_CTRL,
    NT_AUXV,
    NT_PRSTATUS,
    PROGRAM_HEADER_BYTES,
    PT_AARCH64_MEMTAG_MTE,
    PT_NOTE,
    Elf,
    Note,
    Segment,
    copy_bytes,
    encode_headers,
    encode_notes,
    read_elf,
)
from mtetool.formats.packing import Packer
from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.layout import common, total_bytes, without
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.source import TagSource
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES

_PACKED_BYTES = 2 * GRANULE_BYTES
_AT_PAGESZ, _AT_HWCAP2, _HWCAP2_MTE = 6, 26, 1 << 18
_PR_TAGGED_ADDR_ENABLE = 1
# struct elf_prstatus of arm64; pr_pid is at 32. A debugger ignores threads without a number.
_PRSTATUS_BYTES, _PID_AT = 392, 32
_READ, _WRITE = 4, 2


class Place(NamedTuple):
    """Memory whose tags are known by `ipa`, at its virtual address."""

    vaddr: int
    ipa: int
    size_bytes: int


def open_dump(stream: BinaryIO, name: str) -> Elf:
    """QEMU's dump-guest-memory file, or any core with physical addresses.

    Raises BadFormatError, also where its memory is not all in the file.
    """
    elf = read_elf(stream, name)
    loads = elf.loads()
    if not loads:
        raise BadFormatError(f"{name} holds no memory", hint="write one: dump-guest-memory FILE")
    for load in loads:
        if load.offset + load.file_bytes > elf.file_bytes:
            raise BadFormatError(
                f"{name} ends at byte {elf.file_bytes:,}, in the middle of the memory at"
                f" {load.paddr:#x}",
                hint="write it again: the disk was full, or it was not copied whole",
                offset=elf.file_bytes,
            )
    return elf


def write_core(
    source: TagSource,
    extents: Sequence[Extent],
    out: Sink,
    *,
    dump: Elf | None = None,
    progress: Progress = no_progress,
) -> Tally[Missing]:
    """Write the tags of ascending extents of whole pages; return what was missing.

    The source is read twice: first for what is missing. A virtual address is that of the dump's
    segment, by its physical address; elsewhere it is the IPA itself. Raises LayoutError where
    there are more pieces than program headers.
    """
    missing = survey(source, extents)
    held = without(extents, _whole_pairs(missing))
    places = list(_places(extents, dump))
    notes = _notes(source.page_size_bytes, dump)
    segments = _layout(places, held, extents, len(notes), dump)
    out.write(encode_headers(segments))
    out.write(notes)
    _write_tags(source, extents, out, progress)
    if dump is not None:
        for load in dump.loads():
            for piece in copy_bytes(dump, load):
                out.write(piece)
    return missing


def survey(source: TagSource, extents: Sequence[Extent]) -> Tally[Missing]:
    """Read everything once, and return what is missing."""
    missing: Tally[Missing] = Tally()
    for step in source.read(extents):
        if isinstance(step, Missing):
            missing.add(step)
    return missing


def _whole_pairs(missing: Iterable[Missing]) -> Iterator[Extent]:
    """Missing ranges, made of whole bytes of packed tags."""
    for item in missing:
        start = item.ipa // _PACKED_BYTES * _PACKED_BYTES
        yield Extent.between(start, -(-item.end // _PACKED_BYTES) * _PACKED_BYTES)


def _places(extents: Sequence[Extent], dump: Elf | None) -> Iterator[Place]:
    mapped: list[Extent] = []
    for load in dump.loads() if dump is not None else ():
        memory = Extent(load.paddr, load.memory_bytes)
        mapped.append(memory)
        for part in common([memory], extents):
            yield Place(_virtual(load) + part.ipa - load.paddr, part.ipa, part.size_bytes)
    for part in without(extents, mapped):
        yield Place(part.ipa, part.ipa, part.size_bytes)


def _virtual(load: Segment) -> int:
    """QEMU writes 0 for a virtual address that it does not know."""
    return load.vaddr or load.paddr


def _layout(
    places: Sequence[Place],
    held: Sequence[Extent],
    extents: Sequence[Extent],
    n_note_bytes: int,
    dump: Elf | None,
) -> list[Segment]:
    loads = dump.loads() if dump is not None else []
    pieces = [piece for place in places for piece in _pieces(place, held)]
    count = 1 + len(pieces) + len(loads)
    if count > MOST_SEGMENTS:
        raise LayoutError(
            f"a core of {count:,} segments would be needed, and {MOST_SEGMENTS:,} are possible:"
            " the memory has too many holes",
            hint="convert a part: --range IPA:SIZE",
        )
    at = HEADER_BYTES + count * PROGRAM_HEADER_BYTES
    segments = [Segment(PT_NOTE, 0, at, 0, 0, n_note_bytes, 0)]
    at += n_note_bytes
    tags_at = _offsets(extents)
    for piece, is_held in pieces:
        offset = at + tags_at(piece.ipa)
        n_tags = piece.size_bytes // _PACKED_BYTES if is_held else 0
        segments.append(
            Segment(PT_AARCH64_MEMTAG_MTE, 0, offset, piece.vaddr, 0, n_tags, piece.size_bytes)
        )
    at += total_bytes(extents) // _PACKED_BYTES
    for load in loads:
        flags = load.flags or _READ | _WRITE
        segments.append(load._replace(offset=at, vaddr=_virtual(load), flags=flags))
        at += load.file_bytes
    return segments


def _pieces(place: Place, held: Sequence[Extent]) -> Iterator[tuple[Place, bool]]:
    """A place in parts whose tags are all here, or all missing."""
    whole = [Extent(place.ipa, place.size_bytes)]
    here = common(whole, held)
    for is_held, parts in ((True, here), (False, without(whole, here))):
        for part in parts:
            shift = part.ipa - place.ipa
            yield Place(place.vaddr + shift, part.ipa, part.size_bytes), is_held


def _offsets(extents: Sequence[Extent]) -> Callable[[int], int]:
    """Where the tags of an address are among those of all extents, in bytes."""
    starts = [extent.ipa for extent in extents]
    sums = [0, *accumulate(extent.size_bytes for extent in extents)]

    def offset(ipa: int) -> int:
        index = bisect_right(starts, ipa) - 1
        return (sums[index] + ipa - starts[index]) // _PACKED_BYTES

    return offset


def _write_tags(
    source: TagSource, extents: Sequence[Extent], out: Sink, progress: Progress
) -> None:
    packer = Packer(out)
    total, done = total_bytes(extents), 0
    for step in source.read(extents):
        if isinstance(step, Copied):
            packer.put(step.tags)
        else:
            # No segment points to the zeros in place of tags that are missing.
            tag = step.tag if isinstance(step, Fill) else 0
            packer.fill(tag, step.size_bytes // GRANULE_BYTES)
        done += step.size_bytes
        progress(done, total)
    packer.finish()


def _notes(page_bytes: int, dump: Elf | None) -> bytes:
    """The notes of a dump (its processors' registers), or one thread without any; and ours."""
    auxv = struct.pack("<6Q", _AT_HWCAP2, _HWCAP2_MTE, _AT_PAGESZ, page_bytes, 0, 0)
    control = struct.pack("<Q", _PR_TAGGED_ADDR_ENABLE)
    ours = [Note(b"CORE", NT_AUXV, auxv)]
    # Of two notes NT_AUXV, debuggers believe the first.
    notes = [note for note in dump.notes() if note.kind != NT_AUXV] if dump is not None else []
    if not any(note.kind == NT_PRSTATUS for note in notes):
        status = bytearray(_PRSTATUS_BYTES)
        struct.pack_into("<i", status, _PID_AT, 1)
        notes.insert(0, Note(b"CORE", NT_PRSTATUS, bytes(status)))
    ours.append(Note(b"LINUX", NT_ARM_TAGGED_ADDR_CTRL, control))
    return encode_notes([*notes, *ours])
