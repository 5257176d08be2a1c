"""ELF core files of aarch64: their headers and notes, read and written.

Nothing here knows what a segment holds. The numbers are those of the ELF specification, and of
Linux (include/uapi/linux/elf.h).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

from mtetool.errors import BadFormatError
from mtetool.formats.bytesof import read_at, size_of

MAGIC = b"\x7fELF"
PT_LOAD, PT_NOTE = 1, 4
PT_AARCH64_MEMTAG_MTE = 0x7000_0002
NT_PRSTATUS, NT_PRPSINFO, NT_AUXV = 1, 3, 6
NT_ARM_TAGGED_ADDR_CTRL = 0x409

MOST_SEGMENTS = 0xFFFE
"""The most program headers that are read or written: more need an extension of the format."""

HEADER_BYTES = 64
PROGRAM_HEADER_BYTES = 56

_64_BIT, _LITTLE_ENDIAN, _ET_CORE, _EM_AARCH64 = 2, 1, 4, 183
_EXTENDED_COUNT = 0xFFFF
_HEADER = struct.Struct("<4s5B7xHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_NOTE = struct.Struct("<III")
_MOST_NOTE_BYTES = 16 << 20


class Segment(NamedTuple):
    """A program header: what it is, where it lies in the file, which memory it describes."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    file_bytes: int
    memory_bytes: int

    @property
    def end(self) -> int:
        """The first virtual address after the memory."""
        return self.vaddr + self.memory_bytes


class Note(NamedTuple):
    """A note: the name of its owner, its number there, and its contents."""

    owner: bytes
    kind: int
    contents: bytes


@dataclass(frozen=True)
class Elf:
    """A core file of aarch64 that is open; its segments are as they stand in the file."""

    stream: BinaryIO
    name: str
    segments: tuple[Segment, ...]
    file_bytes: int

    def loads(self) -> list[Segment]:
        """The segments that describe memory."""
        return [s for s in self.segments if s.kind == PT_LOAD and s.memory_bytes]

    def note_bytes(self) -> bytes:
        """The contents of all notes, as they stand in the file. Raises BadFormatError."""
        found = b""
        for segment in self.segments:
            if segment.kind != PT_NOTE:
                continue
            if len(found) + segment.file_bytes > _MOST_NOTE_BYTES:
                raise BadFormatError(f"{self.name}: its notes have more than 16 MiB")
            found += read_at(self.stream, segment.offset, segment.file_bytes, self.name)
        return found

    def notes(self) -> Iterator[Note]:
        """The notes, up to the first that is damaged: files that were cut end in one."""
        data, at = self.note_bytes(), 0
        while at + _NOTE.size <= len(data):
            name_bytes, n_bytes, kind = _NOTE.unpack_from(data, at)
            name_at = at + _NOTE.size
            contents_at = name_at + _padded(name_bytes)
            at = contents_at + _padded(n_bytes)
            if contents_at + n_bytes > len(data):
                return
            owner = data[name_at : name_at + name_bytes].rstrip(b"\0")
            yield Note(owner, kind, data[contents_at : contents_at + n_bytes])


def read_elf(stream: BinaryIO, name: str) -> Elf:
    """Read the headers of a core file. Raises BadFormatError for anything else, HostIoError."""
    head = read_at(stream, 0, HEADER_BYTES, name)
    if not head.startswith(MAGIC):
        raise BadFormatError(f"{name} is not an ELF file")
    _, width, order, *_, kind, machine, _, _, at, _, _, _, size, count, _, _, _ = _HEADER.unpack(
        head
    )
    if (width, order, kind, machine) != (_64_BIT, _LITTLE_ENDIAN, _ET_CORE, _EM_AARCH64):
        raise BadFormatError(
            f"{name} is an ELF file, but not a core of aarch64 (little-endian):"
            f" class {width}, byte order {order}, type {kind}, machine {machine}",
            hint="name a core file of an arm64 process, or QEMU's dump-guest-memory: file FILE",
        )
    if count == _EXTENDED_COUNT or size != PROGRAM_HEADER_BYTES:
        raise BadFormatError(f"{name} has too many segments, or program headers of {size} bytes")
    table = read_at(stream, at, count * size, name)
    segments = tuple(_segments(table))
    return Elf(stream, name, segments, size_of(stream, name))


def _segments(table: bytes) -> Iterator[Segment]:
    for kind, flags, offset, vaddr, paddr, n_file, n_memory, _ in _PROGRAM_HEADER.iter_unpack(
        table
    ):
        yield Segment(kind, flags, offset, vaddr, paddr, n_file, n_memory)


def encode_headers(segments: Sequence[Segment]) -> bytes:
    """The beginning of a core file: the header, and right after it the program headers."""
    head = _HEADER.pack(
        MAGIC,
        *(_64_BIT, _LITTLE_ENDIAN, 1, 0, 0),
        *(_ET_CORE, _EM_AARCH64, 1, 0, HEADER_BYTES, 0, 0),
        *(HEADER_BYTES, PROGRAM_HEADER_BYTES, len(segments), 0, 0, 0),
    )
    return head + b"".join(_PROGRAM_HEADER.pack(*segment, 1) for segment in segments)


def encode_notes(notes: Iterable[Note]) -> bytes:
    """Notes as they stand in a file."""
    parts = []
    for note in notes:
        owner = note.owner + b"\0"
        parts.append(_NOTE.pack(len(owner), len(note.contents), note.kind))
        parts += [_filled(owner), _filled(note.contents)]
    return b"".join(parts)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // 4) * 4


def _filled(data: bytes) -> bytes:
    return data.ljust(_padded(len(data)), b"\0")


def copy_bytes(elf: Elf, segment: Segment) -> Iterator[bytes]:
    """The contents of a segment, in pieces. Raises BadFormatError where the file ends before."""
    at, end = segment.offset, segment.offset + segment.file_bytes
    while at < end:
        piece = read_at(elf.stream, at, min(1 << 20, end - at), elf.name)
        yield piece
        at += len(piece)
