"""ELF cores made by hand, with anything in them."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from mtetool.formats.elf import (
    HEADER_BYTES,
    NT_AUXV,
    NT_PRPSINFO,
    NT_PRSTATUS,
    PROGRAM_HEADER_BYTES,
    PT_AARCH64_MEMTAG_MTE,
    PT_LOAD,
    PT_NOTE,
    Note,
    Segment,
    encode_headers,
    encode_notes,
)

PAGE = 4096
PACKED_PAGE = PAGE // 32


def notes(page_bytes: int = PAGE, program: bytes = b"victim") -> bytes:
    """The notes that Linux writes, as far as anybody here reads them."""
    information = bytearray(136)
    information[40 : 40 + len(program)] = program
    status = bytearray(392)
    struct.pack_into("<i", status, 32, 1)
    auxv = struct.pack("<4Q", 6, page_bytes, 0, 0)
    return encode_notes(
        [
            Note(b"CORE", NT_PRSTATUS, bytes(status)),
            Note(b"CORE", NT_PRPSINFO, bytes(information)),
            Note(b"CORE", NT_AUXV, auxv),
        ]
    )


def core(
    tags: Sequence[tuple[int, int, bytes]] = (),
    memory: Sequence[tuple[int, int, bytes]] = (),
    note_bytes: bytes | None = None,
) -> bytes:
    """A core with segments of tags and of memory: virtual address, bytes of memory, contents."""
    note = notes() if note_bytes is None else note_bytes
    count = 1 + len(tags) + len(memory)
    at = HEADER_BYTES + count * PROGRAM_HEADER_BYTES
    segments, contents = [Segment(PT_NOTE, 0, at, 0, 0, len(note), 0)], note
    for kind, parts in ((PT_LOAD, memory), (PT_AARCH64_MEMTAG_MTE, tags)):
        for vaddr, size_bytes, data in parts:
            offset = at + len(contents)
            flags = 6 if kind == PT_LOAD else 0
            segments.append(Segment(kind, flags, offset, vaddr, vaddr, len(data), size_bytes))
            contents += data
    return encode_headers(segments) + contents
