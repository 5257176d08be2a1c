"""Buffers that hold tags, one byte per granule: any contiguous object with the buffer protocol.

One rule holds for all of them. A source of tags owns their buffer, and uses it again: the tags are
valid until the next ones are requested, and for as many more requests as the caller said to `keep`.
A function that is given a buffer to fill, or to copy from, has it until the call of its result has
returned.
"""

from __future__ import annotations

import mmap
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    # numpy declares its arrays as buffers from Python 3.12 on.
    TagBuffer = Buffer | NDArray[np.uint8]
else:
    TagBuffer = Any


def as_bytes(tags: TagBuffer) -> memoryview:
    """A view of the bytes of a buffer, without a copy. Its `len` is the number of granules."""
    return memoryview(tags)  # type: ignore[arg-type]


# include/uapi/asm-generic/mman-common.h: Linux 5.14.
_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 2 << 20
_PAGE_BYTES = 4096


def prepared(n_bytes: int) -> memoryview:
    """Allocate writable bytes of 0 that are already paged in: using them causes no page fault.

    They are in huge pages if the host has any: the kernel copies into those in two thirds of the
    time. Raises MemoryError.
    """
    if not n_bytes:
        return memoryview(bytearray())
    try:
        room = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes") from error
    view = memoryview(room)
    if n_bytes >= _HUGE_BYTES:
        with suppress(OSError):
            room.madvise(mmap.MADV_HUGEPAGE)
    try:
        room.madvise(_MADV_POPULATE_WRITE)
    except OSError:
        for at in range(0, n_bytes, _PAGE_BYTES):
            view[at] = 0
    return view


# A word of /proc/PID/pagemap has 64 bits; the highest says that the page is present.
_WORD_BYTES = 8
_PRESENT_PAGES = re.compile(rb"[\x80-\xff]+")


def unshared() -> None:
    """Copy the pages that this process still shares with a forked one, if the kernel can.

    Otherwise the first write to each is a page fault, whenever it comes.
    """
    import ctypes

    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with suppress(OSError), Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
        for line in Path("/proc/self/maps").read_bytes().splitlines():
            addresses, flags, *_ = line.split(None, 2)
            if flags != b"rw-p":
                continue
            start, end = (int(word, 16) for word in addresses.split(b"-"))
            pagemap.seek(start // mmap.PAGESIZE * _WORD_BYTES)
            words = pagemap.read((end - start) // mmap.PAGESIZE * _WORD_BYTES)
            # Little-endian: the last byte of each word has the bit.
            for run in _PRESENT_PAGES.finditer(words[_WORD_BYTES - 1 :: _WORD_BYTES]):
                n_bytes = (run.end() - run.start()) * mmap.PAGESIZE
                madvise(start + run.start() * mmap.PAGESIZE, n_bytes, _MADV_POPULATE_WRITE)
