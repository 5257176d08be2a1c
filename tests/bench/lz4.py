"""LZ4 frames by liblz4, as the program lz4 writes them, for a long-running process.

See lz4frame.h for the structs, their fields and the arguments of calls.
"""

from __future__ import annotations

import ctypes
from typing import Any


class _FrameInfo(ctypes.Structure):
    _fields_ = (
        ("block_size_id", ctypes.c_int),
        ("block_mode", ctypes.c_int),
        ("content_checksum", ctypes.c_int),
        ("frame_type", ctypes.c_int),
        ("content_size", ctypes.c_ulonglong),
        ("dict_id", ctypes.c_uint),
        ("block_checksum", ctypes.c_int),
    )


class _Preferences(ctypes.Structure):
    _fields_ = (
        ("frame_info", _FrameInfo),
        ("level", ctypes.c_int),
        ("auto_flush", ctypes.c_uint),
        ("favor_decoding", ctypes.c_uint),
        ("reserved", ctypes.c_uint * 3),
    )


_VERSION = 100  # LZ4F_VERSION
# What lz4 -1 does: independent blocks of 4 MiB, one checksum of all content.
_PREFERENCES = _Preferences(_FrameInfo(7, 1, 1, 0, 0, 0, 0), 1, 0, 0)


def load() -> ctypes.CDLL:
    """Load the library. Raises OSError."""
    library = ctypes.CDLL("liblz4.so.1")
    for name in ("LZ4F_compressFrameBound", "LZ4F_compressFrame", "LZ4F_decompress"):
        getattr(library, name).restype = ctypes.c_size_t
    return library


def bound(library: ctypes.CDLL, n_bytes: int) -> int:
    """Return the largest size that a frame of `n_bytes` can have."""
    call = library.LZ4F_compressFrameBound
    return int(call(ctypes.c_size_t(n_bytes), ctypes.byref(_PREFERENCES)))


def compress(library: ctypes.CDLL, data: bytearray, out: bytearray) -> int:
    """Write a frame to `out`, which has `bound` bytes; return its length. Raises ValueError."""
    length = library.LZ4F_compressFrame(
        _pointer(out),
        ctypes.c_size_t(len(out)),
        _pointer(data),
        ctypes.c_size_t(len(data)),
        ctypes.byref(_PREFERENCES),
    )
    return _checked(library, length)


def decompress(library: ctypes.CDLL, data: bytearray, out: bytearray) -> int:
    """Decompress a frame to `out`, which is large enough; return the length. Raises ValueError."""
    context = ctypes.c_void_p()
    _checked(library, library.LZ4F_createDecompressionContext(ctypes.byref(context), _VERSION))
    read, written, more = 0, 0, 1
    try:
        while more and read < len(data):
            n_out = ctypes.c_size_t(len(out) - written)
            n_in = ctypes.c_size_t(len(data) - read)
            more = _checked(
                library,
                library.LZ4F_decompress(
                    context,
                    _pointer(out, written),
                    ctypes.byref(n_out),
                    _pointer(data, read),
                    ctypes.byref(n_in),
                    None,
                ),
            )
            read, written = read + n_in.value, written + n_out.value
    finally:
        library.LZ4F_freeDecompressionContext(context)
    if more:
        raise ValueError("the frame has no end")
    return written


def _pointer(data: bytearray, offset: int = 0) -> Any:
    return ctypes.byref((ctypes.c_char * len(data)).from_buffer(data), offset)


def _checked(library: ctypes.CDLL, result: int) -> int:
    if library.LZ4F_isError(ctypes.c_size_t(result)):
        raise ValueError("liblz4 reports an error")
    return int(result)
