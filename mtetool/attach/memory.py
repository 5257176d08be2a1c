"""Copy from and to another process's memory without stopping it.

Copies use process_vm_readv(2) and process_vm_writev(2), which respect the pages' protection, so
nothing read-only is ever written by mistake.
"""

from __future__ import annotations

import ctypes
import os

from mtetool.attach import steps


class Iovec(ctypes.Structure):
    """struct iovec: a piece of memory."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
for _function in (_libc.process_vm_readv, _libc.process_vm_writev):
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(Iovec),
        ctypes.c_ulong,
        ctypes.POINTER(Iovec),
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


def _transfer(write: bool, pid: int, address: int, local: int, length: int) -> None:
    function = _libc.process_vm_writev if write else _libc.process_vm_readv
    done = 0
    steps.reach("writev" if write else "readv")
    while done < length:
        ours = Iovec(local + done, length - done)
        theirs = Iovec(address + done, length - done)
        count = int(function(pid, ctypes.byref(ours), 1, ctypes.byref(theirs), 1, 0))
        if count <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{os.strerror(number)} at {address + done:#x} of process {pid}")
        done += count


def read(pid: int, address: int, length: int) -> bytes:
    """Read `length` bytes from `address` of the process. Raises OSError."""
    buffer = ctypes.create_string_buffer(length)
    _transfer(False, pid, address, ctypes.addressof(buffer), length)
    return buffer.raw


def write(pid: int, address: int, data: bytes) -> None:
    """Write all of `data` to `address` of the process. Raises OSError."""
    buffer = ctypes.create_string_buffer(data, len(data))
    _transfer(True, pid, address, ctypes.addressof(buffer), len(data))


def read_into(pid: int, address: int, out: memoryview) -> None:
    """Fill `out` (writable) from `address` of the process. Raises OSError."""
    if out:
        _transfer(False, pid, address, ctypes.addressof(ctypes.c_char.from_buffer(out)), len(out))


def write_from(pid: int, address: int, data: memoryview) -> None:
    """Copy `data` to `address` of the process. Raises OSError."""
    if not data:
        return
    # ctypes gives the address of writable buffers only.
    ours = bytearray(data) if data.readonly else data
    _transfer(True, pid, address, ctypes.addressof(ctypes.c_char.from_buffer(ours)), len(data))
