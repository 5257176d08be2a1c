"""The loops over each granule, in numpy: the reference for those in C (`_loops.c`).

Tags are buffers of one byte a granule, C-contiguous; where nothing else is said, bits 7:4 are
zero. What a function writes to is named `out`, `into` or `tags`, and is as long as it says. All
raise ValueError for lengths that do not fit, and for nothing else.

Runs are written so (mtesnap(5), enc 2): a byte for each run with its length, 0 for one above 255;
then the tags of the runs, two a byte, the first in the low nibble, the last odd one with 0 above
it; then for each run above 255, in order, its length less 256 as LEB128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mtetool.buffers import as_bytes

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

    Bytes = NDArray[np.uint8]

# What a long length may be at most: 2^35 granules, half a TiB of guest memory.
_LEB128_MAX_BYTES = 6


def scan(tags: TagBuffer, page_granules: int) -> tuple[int, int, int, int]:
    """Runs, granules whose tag is not 0, pages that have such, and all bits that occur.

    `tags` are whole pages of `page_granules` (a multiple of 128), at least one.
    """
    array = _bytes(tags)
    if page_granules <= 0 or page_granules % 128 or not array.size or array.size % page_granules:
        raise ValueError("tags that are not whole pages")
    per_page = np.count_nonzero(array.reshape(-1, page_granules), axis=1)
    n_runs = 1 + int(np.count_nonzero(array[1:] != array[:-1]))
    bits = int(np.bitwise_or.reduce(array))
    return n_runs, int(per_page.sum()), int(np.count_nonzero(per_page)), bits


def to_runs(tags: TagBuffer, n_runs: int, out: TagBuffer) -> int:
    """Write the runs of `tags` to `out`; how many bytes that takes.

    `n_runs` is what `scan` says, at most a quarter of the granules (64 or more); `out` is as
    long as `tags`, and all of it may be written to.
    """
    array, room = _bytes(tags), _bytes(out)
    if not 64 <= array.size < 1 << 35 or not 0 < n_runs <= array.size // 4:
        raise ValueError("too many runs for the room there is")
    if room.size < array.size:
        raise ValueError("too many runs for the room there is")
    starts = np.concatenate(([0], np.flatnonzero(array[1:] != array[:-1]) + 1))
    if starts.size != n_runs:
        raise ValueError("not as many runs as announced")
    lengths = np.diff(starts, append=array.size)
    values = np.zeros(n_runs + n_runs % 2, dtype=np.uint8)
    values[:n_runs] = array[starts]
    longs = b"".join(_leb128(length - 256) for length in lengths[lengths > 255].tolist())
    parts = (
        np.where(lengths > 255, 0, lengths).astype(np.uint8),
        values[::2] | values[1::2] << np.uint8(4),
        np.frombuffer(longs, dtype=np.uint8),
    )
    written = np.concatenate(parts)
    room[: written.size] = written
    return int(written.size)


def from_runs(data: TagBuffer, n_runs: int, tags: TagBuffer) -> None:
    """The reverse of `to_runs`: fill `tags` from all of `data`.

    Neighbouring runs may have one tag; anything else that `to_runs` would not have written
    raises ValueError.
    """
    source, out = _bytes(data), _bytes(tags)
    n_packed = (n_runs + 1) // 2
    if n_runs < 0 or n_runs + n_packed > source.size:
        raise ValueError("fewer runs than announced")
    packed = source[n_runs : n_runs + n_packed]
    values = np.empty(2 * n_packed, dtype=np.uint8)
    values[::2], values[1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    lengths = source[:n_runs].astype(np.int64)
    is_long = lengths == 0
    longs = _from_leb128(source[n_runs + n_packed :].tobytes(), int(is_long.sum()), out.size)
    if longs is None or values[n_runs:].any():
        raise ValueError("runs that are not those of so many granules")
    lengths[is_long] = longs
    if int(lengths.sum()) != out.size:
        raise ValueError("runs that are not those of so many granules")
    out[:] = np.repeat(values[:n_runs], lengths)


def page_run(tags: TagBuffer, page_granules: int, first: int) -> tuple[bool, int]:
    """Whether the page `first` of `tags` has a tag that is not 0, and where that changes.

    That is the number of the next page of which the contrary is true, or of pages in all.
    `tags` are whole pages of `page_granules`, a multiple of 8.
    """
    array = _bytes(tags)
    n_pages = array.size // page_granules if page_granules > 0 else 0
    if page_granules <= 0 or page_granules % 8 or array.size % page_granules:
        raise ValueError("tags that are not whole pages")
    if not 0 <= first < n_pages:
        raise ValueError("no such page")
    pages = array[first * page_granules :].reshape(-1, page_granules)
    is_tagged: NDArray[np.bool_] = np.logical_or.reduce(pages, axis=1)
    changes = np.flatnonzero(is_tagged != is_tagged[0])
    return bool(is_tagged[0]), first + int(changes[0]) if changes.size else n_pages


def frame_run(entries: bytes, first: int) -> int:
    """Where a run of page table entries, words of 64 bits, that begins at number `first` ends.

    In a run each is the one before plus 1: pages alike, their frames one behind the other.
    """
    if len(entries) % 8:
        raise ValueError("entries that are not whole")
    if not 0 <= first < len(entries) // 8:
        raise ValueError("no such page")
    words = np.frombuffer(entries, np.uint64)[first:]
    breaks = np.flatnonzero(words[1:] != words[:-1] + np.uint64(1))
    return first + 1 + (int(breaks[0]) if breaks.size else words.size - 1)


def pack(tags: TagBuffer, out: TagBuffer) -> None:
    """Two tags in a byte, the lower address in the low nibble; `out` is half as long.

    The nibble order is that of the kernel's core dumps (PT_AARCH64_MEMTAG_MTE) and of QEMU's tag
    memory.
    """
    array, packed = _bytes(tags), _bytes(out)
    if array.size % 2 or packed.size != array.size // 2:
        raise ValueError("two tags a byte need half the room")
    packed[:] = array[::2] | array[1::2] << np.uint8(4)


def unpack(packed: TagBuffer, tags: TagBuffer) -> None:
    """The reverse of `pack`."""
    array, out = _bytes(packed), _bytes(tags)
    if out.size % 2 or array.size != out.size // 2:
        raise ValueError("two tags a byte need twice the room")
    out[::2], out[1::2] = array & np.uint8(15), array >> np.uint8(4)


def first_difference(a: TagBuffer, b: TagBuffer) -> int:
    """The index of the first byte in which two buffers of one length differ; else the length."""
    left, right = _bytes(a), _bytes(b)
    if left.size != right.size:
        raise ValueError("tags of different lengths")
    if np.array_equal(left, right):
        return int(left.size)
    return int(np.argmax(left != right))


def xor(into: TagBuffer, other: TagBuffer) -> None:
    """Each byte of `into` exclusive-or that of `other`, which is as long."""
    left, right = _bytes(into), _bytes(other)
    if left.size != right.size:
        raise ValueError("tags of different lengths")
    np.bitwise_xor(left, right, out=left)


def mask(tags: TagBuffer) -> None:
    """Clear bits 7:4 of each byte."""
    array = _bytes(tags)
    np.bitwise_and(array, np.uint8(15), out=array)


def _bytes(buffer: TagBuffer) -> Bytes:
    return np.frombuffer(as_bytes(buffer), dtype=np.uint8)


def _leb128(value: int) -> bytes:
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _from_leb128(data: bytes, count: int, most: int) -> list[int] | None:
    """All of `data` as `count` lengths above 255, none above `most`; None if it is not that."""
    values: list[int] = []
    at = 0
    for _ in range(count):
        value = shift = 0
        while True:
            if at == len(data) or shift >= 7 * _LEB128_MAX_BYTES:
                return None
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if not byte & 128:
                break
        if value + 256 > most:
            return None
        values.append(value + 256)
    return values if at == len(data) else None
