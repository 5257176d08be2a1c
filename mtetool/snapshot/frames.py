"""Tags to and from the payload of a record: packed, then one zstd frame.

python-zstandard's streaming calls take a truncated frame in silence, and its one-shot call
ignores `max_output_size` where the frame declares a size itself; so a frame must declare
exactly the size that the record's head implies, before anything is decompressed.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from mtetool.tags import tagged_pages

Packed = NDArray[np.uint8]


class FrameError(Exception):
    """A payload that is not the one frame that it has to be; the text says why."""


class Compressor:
    """Compresses packed tags in any number of threads, with a context for each."""

    def __init__(self, level: int) -> None:
        self._level = level
        self._local = threading.local()

    def __call__(self, packed: Packed) -> bytes:
        """One frame that declares its size and has no checksum: the record has one."""
        context = getattr(self._local, "context", None)
        if context is None:
            context = zstandard.ZstdCompressor(
                level=self._level, write_checksum=False, write_content_size=True
            )
            self._local.context = context
        frame: bytes = context.compress(packed.data)
        return frame


def count_tagged(packed: Packed, page_granules: int) -> tuple[int, int]:
    """How many granules have a tag that is not 0, and how many pages have such a granule."""
    low = int(np.count_nonzero(packed & np.uint8(0x0F)))
    high = int(np.count_nonzero(packed & np.uint8(0xF0)))
    # A byte is not 0 where one of its two tags is not: pages need no unpacking.
    return low + high, tagged_pages(packed.view("<u8"), page_granules // 16)


def uniform_packed(packed: Packed) -> int | None:
    """The one tag that all granules have, or None."""
    first = int(packed[0])
    if first >> 4 != first & 15 or int(packed[-1]) != first or not bool((packed == first).all()):
        return None
    return first & 15


def decompress(payload: bytes, n_granules: int) -> Packed:
    """The packed tags of a frame, n_granules / 2 bytes. Raises FrameError."""
    expected = n_granules // 2
    try:
        parameters = zstandard.get_frame_parameters(payload)
        if parameters.content_size != expected:
            raise FrameError(f"its frame declares {parameters.content_size} bytes, not {expected}")
        data = zstandard.ZstdDecompressor().decompress(payload, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FrameError(f"its frame cannot be decompressed: {error}") from error
    if len(data) != expected:
        raise FrameError(f"its frame holds {len(data)} bytes, not {expected}")
    return np.frombuffer(data, dtype=np.uint8)
