"""Buffers that hold tags, one byte a granule: any contiguous object with the buffer protocol."""

from __future__ import annotations

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
