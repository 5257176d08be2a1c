"""The loops in numpy and Python, the reference for those in C (`_loops.c`).

Tags are C-contiguous buffers of one byte per granule; bits 7:4 are zero unless stated otherwise. A
function writes to `out`, `into` or `tags`, whose length it documents. All raise ValueError for
lengths that do not fit, and for nothing else.

Runs are written as follows (mtesnap(5), enc 2): their lengths, two per byte, packed like tags, 0
for a run of 16 or more; their tags, two per byte; and for each run of 16 or more, in order, its
length minus 16 as LEB128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mtetool.buffers import as_bytes

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

    Bytes = NDArray[np.uint8]

_LONG = 16
_LEB128_MAX_BYTES = 6

# Where objects of 1, 2, 4, 8 or 16 granules begin in 64, as the bits of a word; and how many of
# those must be set for the others to be added.
_OBJECTS = (
    (0xFFFF_FFFF_FFFF_FFFF, 48),
    (0x5555_5555_5555_5555, 24),
    (0x1111_1111_1111_1111, 12),
    (0x0101_0101_0101_0101, 6),
    (0x0001_0001_0001_0001, 3),
)

# In QEMU's migration stream (migration/ram.c): the flags of records of the block of the record
# before, and the only encoding that XBZRLE has.
_RAM_ZERO, _RAM_PAGE, _RAM_XBZRLE = 0x20 | 0x02, 0x20 | 0x08, 0x20 | 0x40
_XBZRLE_ENCODING = 1
_RAM_PAGE_BITS = range(10, 17)


def scan(tags: TagBuffer, page_granules: int) -> tuple[int, int, int, int]:
    """Count runs, granules with a tag other than 0, and pages with any; collect all bits set.

    `tags` are whole pages of `page_granules` (a multiple of 128), at least one.
    """
    array = _bytes(tags)
    if page_granules <= 0 or page_granules % 128 or not array.size or array.size % page_granules:
        raise ValueError("tags that are not whole pages")
    per_page = np.count_nonzero(array.reshape(-1, page_granules), axis=1)
    n_runs = 1 + int(np.count_nonzero(array[1:] != array[:-1]))
    bits = int(np.bitwise_or.reduce(array))
    return n_runs, int(per_page.sum()), int(np.count_nonzero(per_page)), bits


def to_runs(tags: TagBuffer, page_granules: int, out: TagBuffer) -> tuple[int, int, int, int, int]:
    """Count like `scan`, and write the runs to `out`; the last number is their length in bytes.

    There are more runs than `scan` counts where objects of one size lie side by side, as in a slab,
    and some neighbours have the same tag by chance: those stay separate runs, because equal lengths
    compress to next to nothing. (Decided for each 64 granules: sizes of 1, 2, 4, 8 and 16, if three
    quarters of the boundaries are there.) If there are more than a quarter as many runs as
    granules, nothing is written (0 bytes), and the counts are those of `scan`.

    `out` is as long as `tags`, and all of it may be overwritten.
    """
    array, room = _bytes(tags), _bytes(out)
    counted = scan(array, page_granules)
    if array.size >= 1 << 35 or room.size < array.size:
        raise ValueError("too little room for the runs")
    starts = _boundaries(array)
    if starts.size > array.size // 4:
        return *counted, 0
    lengths = np.diff(starts, append=array.size)
    is_long = lengths >= _LONG
    longs = b"".join(_leb128(length - _LONG) for length in lengths[is_long].tolist())
    parts = (
        _packed(np.where(is_long, 0, lengths).astype(np.uint8)),
        _packed(array[starts]),
        np.frombuffer(longs, dtype=np.uint8),
    )
    written = np.concatenate(parts)
    room[: written.size] = written
    return int(starts.size), *counted[1:], int(written.size)


def _boundaries(array: Bytes) -> NDArray[np.intp]:
    """Where runs begin, including those of objects."""
    changes = np.zeros(array.size, dtype=np.uint8)
    changes[1:] = array[1:] != array[:-1]
    words = np.packbits(changes, bitorder="little").view("<u8")
    counts = changes.reshape(-1, 64).sum(axis=1)
    unsettled = np.ones(words.size, dtype=np.bool_)
    for every, enough in reversed(_OBJECTS):
        fits = unsettled & ((words & ~np.uint64(every)) == 0)
        words[fits & (counts >= enough)] = every
        unsettled &= ~fits
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    bits[0] = 1
    return np.flatnonzero(bits)


def _packed(values: Bytes) -> Bytes:
    even = np.zeros(values.size + values.size % 2, dtype=np.uint8)
    even[: values.size] = values
    return even[::2] | even[1::2] << np.uint8(4)


def from_runs(
    lengths: TagBuffer, values: TagBuffer, longs: TagBuffer, n_runs: int, tags: TagBuffer
) -> None:
    """The reverse of `to_runs`: fill `tags` from the three parts that it wrote.

    Neighbouring runs may have the same tag; anything else that `to_runs` would not have written
    raises ValueError.
    """
    packed, of, out = _bytes(lengths), _bytes(values), _bytes(tags)
    n_packed = n_runs // 2 + n_runs % 2
    if n_runs < 0 or packed.size != n_packed or of.size != n_packed:
        raise ValueError("runs that are not those of so many granules")
    every, tag = np.empty(2 * n_packed, dtype=np.int64), np.empty(2 * n_packed, dtype=np.uint8)
    every[::2], every[1::2] = packed & np.uint8(15), packed >> np.uint8(4)
    tag[::2], tag[1::2] = of & np.uint8(15), of >> np.uint8(4)
    odd_is_clear = not every[n_runs:].any() and not tag[n_runs:].any()
    every = every[:n_runs]
    is_long = every == 0
    long = _from_leb128(_bytes(longs).tobytes(), int(is_long.sum()), out.size)
    if long is None or not odd_is_clear:
        raise ValueError("runs that are not those of so many granules")
    every[is_long] = long
    if int(every.sum()) != out.size:
        raise ValueError("runs that are not those of so many granules")
    out[:] = np.repeat(tag[:n_runs], every)


def page_run(tags: TagBuffer, page_granules: int, first: int) -> tuple[bool, int]:
    """Whether the page `first` of `tags` has a tag that is not 0, and where that changes.

    That is the number of the next page for which the opposite holds, or the number of pages. `tags`
    are whole pages of `page_granules`, a multiple of 8.
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
    """The end of the run of page table entries (words of 64 bits) that begins at `first`.

    In a run each entry is the one before plus 1: equal flags, consecutive frames.
    """
    if len(entries) % 8:
        raise ValueError("entries that are not whole")
    if not 0 <= first < len(entries) // 8:
        raise ValueError("no such page")
    words = np.frombuffer(entries, np.uint64)[first:]
    breaks = np.flatnonzero(words[1:] != words[:-1] + np.uint64(1))
    return first + 1 + (int(breaks[0]) if breaks.size else words.size - 1)


def pack(tags: TagBuffer, out: TagBuffer) -> None:
    """Pack two tags per byte, the lower address in the low nibble; `out` is half as long.

    The nibble order is that of the kernel's core dumps (PT_AARCH64_MEMTAG_MTE) and of QEMU's tag
    memory.
    """
    array, packed = _bytes(tags), _bytes(out)
    if array.size % 2 or packed.size != array.size // 2:
        raise ValueError("two tags a byte need half the room")
    packed[:] = _packed(array)


def unpack(packed: TagBuffer, tags: TagBuffer) -> None:
    """The reverse of `pack`."""
    array, out = _bytes(packed), _bytes(tags)
    if out.size % 2 or array.size != out.size // 2:
        raise ValueError("two tags a byte need twice the room")
    out[::2], out[1::2] = array & np.uint8(15), array >> np.uint8(4)


def first_difference(a: TagBuffer, b: TagBuffer) -> int:
    """The index of the first byte in which two equally long buffers differ; else their length."""
    left, right = _bytes(a), _bytes(b)
    if left.size != right.size:
        raise ValueError("tags of different lengths")
    if np.array_equal(left, right):
        return int(left.size)
    return int(np.argmax(left != right))


def xor(into: TagBuffer, other: TagBuffer) -> None:
    """XOR each byte of `other` into `into`, which is as long."""
    left, right = _bytes(into), _bytes(other)
    if left.size != right.size:
        raise ValueError("tags of different lengths")
    np.bitwise_xor(left, right, out=left)


def mask(tags: TagBuffer) -> None:
    """Clear bits 7:4 of each byte."""
    array = _bytes(tags)
    np.bitwise_and(array, np.uint8(15), out=array)


# What `tally` counts, see there; then the run that may go on: its tag, the one before, its length.
_N_TAGS, _N_LENGTHS = 16, 61
_LENGTHS = 2 * _N_TAGS
_LONGEST = _LENGTHS + 2 * _N_LENGTHS
_NEXT_BUT_ONE, _SAME, _TAG, _BEFORE, _LENGTH = range(_LONGEST + 1, _LONGEST + 6)
_N_NUMBERS = _LENGTH + 1


def tally(tags: TagBuffer, repeat: int, counts: TagBuffer) -> None:
    """Count runs of equal tags, each tag for `repeat` granules, in `counts`; a run may go on.

    `counts` are 160 words of 64 bits: the granules by tag (16), and the runs (16); the runs of tags
    other than 0 by length (61; number n: 2^n to 2^(n+1) - 1 granules), and their granules (61); the
    longest of them; how many of them have a run after the next one, and how many of those the same
    tag as that; then the tag of the last run and of the one before it, or -1, and the last run's
    length so far. That one is not counted yet.
    """
    array = _bytes(tags) & np.uint8(15)
    room = as_bytes(counts)
    if not 0 < repeat < 1 << 60 or room.nbytes != _N_NUMBERS * 8:
        raise ValueError("no room for these counts")
    now = np.frombuffer(room, dtype=np.int64)
    last, before, length = (int(now[n]) for n in (_TAG, _BEFORE, _LENGTH))
    if not (-1 <= last <= 15 and -1 <= before <= 15 and (last < 0 or 0 < length < 1 << 61)):
        raise ValueError("counts that are none")
    if not array.size:
        return
    starts = np.concatenate(([0], np.flatnonzero(array[1:] != array[:-1]) + 1))
    lengths = np.diff(starts, append=array.size) * repeat
    values = array[starts].astype(np.int64)
    known = [tag for tag in (before, last) if tag >= 0]
    if last >= 0:
        if values[0] == last:
            lengths[0] += length
            known.pop()
        else:
            lengths = np.concatenate(([length], lengths))
    every = np.concatenate((np.array(known, dtype=np.int64), values))
    now[_TAG], now[_LENGTH] = every[-1], lengths[-1]
    now[_BEFORE] = every[-2] if every.size > 1 else before
    # What is new here: the third of each three runs, except where it was the last one already.
    n_new = values.size - int(values[0] == last)
    first, third = every[:-2][-n_new:], every[2:][-n_new:]
    if n_new and first.size:
        now[_NEXT_BUT_ONE] += np.count_nonzero(first)
        now[_SAME] += np.count_nonzero((first == third) & (first != 0))
    _count_runs(every[-lengths.size : -1], lengths[:-1], now)


def _count_runs(values: NDArray[np.int64], lengths: NDArray[np.int64], now: Any) -> None:
    now[:_N_TAGS] += np.bincount(values, lengths, _N_TAGS).astype(np.int64)
    now[_N_TAGS:_LENGTHS] += np.bincount(values, minlength=_N_TAGS)
    tagged = lengths[values != 0]
    if tagged.size:
        exponents = np.frexp(tagged)[1] - 1
        now[_LENGTHS : _LENGTHS + _N_LENGTHS] += np.bincount(exponents, minlength=_N_LENGTHS)
        sums = np.bincount(exponents, tagged, _N_LENGTHS).astype(np.int64)
        now[_LENGTHS + _N_LENGTHS : _LONGEST] += sums
        now[_LONGEST] = max(int(now[_LONGEST]), int(tagged.max()))


ROW_MAX_BYTES = 128
"""No row of `rows` is longer."""
ROWS_TEXT, ROWS_JSON = 0, 1
_RUN_WORDS = 5


def rows(
    a: TagBuffer,
    b: TagBuffer,
    repeat: int,
    ipa: int,
    form: int,
    each: int,
    wanted: int,
    run: TagBuffer,
    out: TagBuffer,
) -> tuple[int, int]:
    """Write rows about tags to `out`; return how many tags were used up, and the bytes written.

    The tags `a`, each for `repeat` granules, are from `ipa` on. Rows are runs of equal tags, or
    with `each` single granules; of tags whose bit in `wanted` is set. If there is `b` (as long as
    `a`, or empty), they are runs that differ, with both tags. `form` is text or lines of JSON.

    `run` is five words of 64 bits: where the last run begins, its size in bytes (0: there is none),
    its tag (with `b`, that of `a` times 16 plus that of `b`), and how many rows, of how many bytes
    of memory, were written. The last run may go on, so its row is not written yet. It stops where
    fewer than `ROW_MAX_BYTES` of `out` are left.
    """
    left, right, room = _bytes(a) & np.uint8(15), _bytes(b) & np.uint8(15), as_bytes(out)
    two = bool(right.size)
    if (
        (two and left.size != right.size)
        or as_bytes(run).nbytes != _RUN_WORDS * 8
        or len(room) < ROW_MAX_BYTES
        or not 0 < repeat < 1 << 56
        or (each and (two or repeat != 1))
        or form not in (ROWS_TEXT, ROWS_JSON)
    ):
        raise ValueError("rows that cannot be")
    words = np.frombuffer(as_bytes(run), dtype=np.uint64)
    start, size, key, n_rows, n_bytes = (int(word) for word in words)
    key &= 255 if two else 15
    keys = left.astype(int) << 4 | right if two else left.astype(int)
    at = written = 0

    def put(ipa: int, size_bytes: int, key: int) -> bool:
        nonlocal written, n_rows, n_bytes
        if not two and not wanted >> key & 1:
            return True
        if len(room) - written < ROW_MAX_BYTES:
            return False
        row = row_text(ipa, 0 if each else size_bytes, key, form, two=two)
        room[written : written + len(row)] = row
        written, n_rows, n_bytes = written + len(row), n_rows + 1, n_bytes + size_bytes
        return True

    while at < keys.size:
        here, length = int(keys[at]), 1
        if each:
            if len(room) - written < ROW_MAX_BYTES or not put(ipa + at * 16, 16, here):
                break
        elif not two or here >> 4 != here & 15:
            while at + length < keys.size and keys[at + length] == here:
                length += 1
            place, part = ipa + at * repeat * 16, length * repeat * 16
            if size and key == here and start + size == place:
                size += part
            elif not size or put(start, size, key):
                start, size, key = place, part, here
            else:
                break
        at += length
    words[:] = start, size, key, n_rows, n_bytes
    return at, written


def row_text(ipa: int, size_bytes: int, key: int, form: int, *, two: bool) -> bytes:
    """A row of `rows`; of a granule if the size is 0."""
    a, b = key >> 4, key & 15
    if form == ROWS_TEXT:
        size = f"  {size_bytes:>#12x}" if size_bytes else ""
        tags = f"{a:x}  {b:x}" if two else f"{b:x}"
        return f"{ipa:>#14x}{size}  {tags}\n".encode()
    size = f', "size_bytes": {size_bytes}' if size_bytes else ""
    tags = f'"a": {a}, "b": {b}' if two else f'"tag": {b}'
    return f'{{"ipa": {ipa}{size}, {tags}}}\n'.encode()


def ram_records(
    data: TagBuffer, at: int, marks: TagBuffer, page_bits: int
) -> tuple[int, int, int, int]:
    """Mark the pages that QEMU's migration stream carries from `data[at]` on, in one block.

    `marks` has a byte for each page of that block, which is set to 1 when a record of the page
    passes. A record is a big-endian word, a multiple of the page size plus flags, and the contents.
    Return where the loop stopped, and how many full, zero and XBZRLE pages passed. It stops before
    the first record that is incomplete or is anything but such a page of the same block, within
    it; contents may end beyond `data`, and then the place where it stopped lies there too.
    """
    view, marked = as_bytes(data), as_bytes(marks)
    if not 0 <= at <= len(view) or page_bits not in _RAM_PAGE_BITS:
        raise ValueError("no such place, or no such page size")
    page_bytes, n_bytes = 1 << page_bits, len(view)
    n_pages = n_zero_pages = n_xbzrle_pages = 0
    while at + 8 <= n_bytes:
        head = int.from_bytes(view[at : at + 8], "big")
        number, flags = head >> page_bits, head & page_bytes - 1
        if number >= len(marked):
            break
        if flags == _RAM_PAGE:
            at += 8 + page_bytes
            n_pages += 1
        elif flags == _RAM_ZERO and at + 9 <= n_bytes and not view[at + 8]:
            at += 9
            n_zero_pages += 1
        elif flags == _RAM_XBZRLE and at + 11 <= n_bytes and view[at + 8] == _XBZRLE_ENCODING:
            length = int.from_bytes(view[at + 9 : at + 11], "big")
            if length > page_bytes:
                break
            at += 11 + length
            n_xbzrle_pages += 1
        else:
            break
        marked[number] = 1
    return at, n_pages, n_zero_pages, n_xbzrle_pages


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
    """Decode `data` as exactly `count` lengths of 16 to `most`; None if it is anything else."""
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
        if value + _LONG > most:
            return None
        values.append(value + _LONG)
    return values if at == len(data) else None
