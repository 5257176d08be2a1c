"""Migration streams of a guest that QEMU emulates, made by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence

TAG_PAGE_BYTES = 4096


def migration(
    n_pages: int, pages: Sequence[tuple[int, bytes | None]], name: str = "mach-virt.tag"
) -> bytes:
    """A stream with `n_pages` pages of tags, of which some are sent: number, contents or zeros."""
    block = name.encode()
    size = n_pages * TAG_PAGE_BYTES
    listed = struct.pack(">QB", size | 0x04, len(block)) + block + struct.pack(">Q", size)
    start = b"\x01" + struct.pack(">IB", 1, 3) + b"ram" + struct.pack(">II", 0, 4)
    records = b""
    for index, (number, contents) in enumerate(pages):
        again = 0x20 if index else 0
        kind = 0x02 if contents is None else 0x08
        records += struct.pack(">Q", number * TAG_PAGE_BYTES | kind | again)
        if not index:
            records += bytes([len(block)]) + block
        records += b"\0" if contents is None else contents
    end_of_data, footer = struct.pack(">Q", 0x10), b"\x7e" + struct.pack(">I", 1)
    end = b"\x03" + struct.pack(">I", 1) + records + end_of_data + footer
    return (
        b"QEVM"
        + struct.pack(">I", 3)
        + start
        + listed
        + end_of_data
        + footer
        + end
        + b"the state of devices"
    )
