"""Unix sockets as another process sees them, and the process at the other end of one."""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

# include/uapi/linux/openat2.h; the number of the call is the same on every 64-bit architecture.
_SYS_OPENAT2 = 437
_RESOLVE_IN_ROOT = 0x10
_ADDRESS_BYTES = 108  # sun_path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


@dataclass(frozen=True, slots=True)
class Peer:
    """The process that called listen(2), as seen from here; `pid` is 0 if it cannot be seen."""

    pid: int
    uid: int


def find(pid: int, path: str) -> int:
    """Open what the process finds at `path`, as an O_PATH descriptor. Raises OSError.

    /proc/PID/root leads into its mount namespace, but an absolute symbolic link in there would
    lead out again, to our own root: RESOLVE_IN_ROOT (Linux 5.6) keeps links and ".." inside, and
    follows no magic link. A relative path begins at the process's working directory.
    """
    process = Path(f"/proc/{pid}")
    if not path.startswith("/"):
        root, cwd = str((process / "root").readlink()), str((process / "cwd").readlink())
        path = f"{cwd.removeprefix(root.rstrip('/'))}/{path}"
    try:
        return open_in(process / "root", path)
    except FileNotFoundError:
        # QEMU's -chroot takes effect after its sockets are made, in the same mount namespace.
        if not (process / "ns/mnt").samefile("/proc/self/ns/mnt"):
            raise
        return open_in(Path("/"), path)


def open_in(root: Path, path: str) -> int:
    """Open `path` as an O_PATH descriptor, with the directory `root` as root. Raises OSError."""
    how = _OpenHow(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        name = os.fsencode(path)
        file = int(_libc.syscall(_SYS_OPENAT2, root_fd, name, ctypes.byref(how), size))
        number = ctypes.get_errno()
    finally:
        os.close(root_fd)
    if file < 0:
        raise OSError(number, os.strerror(number), path)
    return file


def read_regular(file: int, limit_bytes: int) -> bytes:
    """Read the regular file of an O_PATH descriptor; empty if it is not regular, or longer.

    Raises OSError. A device or a pipe is not even opened: that alone can have side effects.
    """
    info = os.fstat(file)
    if not stat.S_ISREG(info.st_mode) or info.st_size > limit_bytes:
        return b""
    with Path(f"/proc/self/fd/{file}").open("rb") as opened:
        content = opened.read(limit_bytes + 1)
    return content if len(content) <= limit_bytes else b""


def connect(file: int, timeout_seconds: float) -> socket.socket:
    """Connect to the socket of an O_PATH descriptor, however long its path is. Raises OSError."""
    if not stat.S_ISSOCK(os.fstat(file).st_mode):
        raise OSError(None, "it is not a socket")
    return _connected(f"/proc/self/fd/{file}", timeout_seconds)


def connect_abstract(name: bytes, timeout_seconds: float, *, padded: bool) -> socket.socket:
    """Connect to an abstract socket of our own network namespace. Raises OSError."""
    address = b"\0" + name
    return _connected(address.ljust(_ADDRESS_BYTES, b"\0") if padded else address, timeout_seconds)


def _connected(address: str | bytes, timeout_seconds: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def peer_of(connection: socket.socket) -> Peer:
    """The process that listens (or listened) at the other end. Raises OSError."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", raw)
    return Peer(pid, uid)
