"""Buffers that hold tags, one byte a granule: any contiguous object with the buffer protocol."""

from __future__ import annotations

import mmap
from contextlib import suppress
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
    """A view of the bytes of a buffer, without a copy. `len` is how many granules there are."""
    return memoryview(tags)  # type: ignore[arg-type]


# include/uapi/asm-generic/mman-common.h: Linux 5.14.
_MADV_POPULATE_WRITE = 23
_HUGE_BYTES = 2 << 20
_PAGE_BYTES = 4096


def prepared(n_bytes: int) -> memoryview:
    """So many writable bytes, 0, that are there already: using them faults no page in.

    In huge pages, where the host gives such: the kernel copies into them in two thirds of the time.
    Raises MemoryError.
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
