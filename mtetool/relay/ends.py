"""Ends of sockets and pipes: calls that never wait, and waiting until one need not.

Descriptors may be shared with other processes (standard streams, sockets that were handed over), so
none is switched to non-blocking mode, which would change it for all of them. Each call on a socket
says MSG_DONTWAIT; a pipe is opened anew, which gives it flags of its own.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")

# An attempt that need not wait does not let other tasks run. After so many of them, it does.
_TURNS = 8
_PIPE_BYTES = 1 << 20  # what an ordinary user may ask for: fs.pipe-max-size
# A unix socket's buffer never grows by itself, and each time that it is full costs two changes of
# process. Beyond net.core.wmem_max only root may go.
_UNIX_BYTES = 1 << 20
_SO_SNDBUFFORCE = 32
_DONT_WAIT = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # struct linger


class End(ABC):
    """A descriptor, read or written by calls that raise BlockingIOError instead of waiting."""

    fd: int

    @abstractmethod
    def read(self, n: int) -> bytes:
        """Return 1 to `n` bytes, or b"" at the end. Raises OSError."""

    @abstractmethod
    def read_into(self, buffer: memoryview) -> int:
        """Read at least one byte, 0 at the end. Raises OSError."""

    @abstractmethod
    def send(self, parts: Sequence[memoryview]) -> int:
        """Send the first bytes of the parts, and return how many. Raises OSError."""

    @abstractmethod
    def finish(self) -> None:
        """Let the other end read its end."""

    @abstractmethod
    def close(self, *, abort: bool = False) -> None:
        """Close it; `abort` makes that an error for the other end, where possible. Idempotent."""


class SocketEnd(End):
    """A connected stream socket; closing the end closes it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.fd = connection.fileno()
        with suppress(OSError):
            if connection.family in (socket.AF_INET, socket.AF_INET6):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                _keep_alive(connection)
            else:
                connection.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _UNIX_BYTES)

    def read(self, n: int) -> bytes:
        return self.socket.recv(n, _DONT_WAIT)

    def read_into(self, buffer: memoryview) -> int:
        return self.socket.recv_into(buffer, 0, _DONT_WAIT)

    def send(self, parts: Sequence[memoryview]) -> int:
        return self.socket.sendmsg(parts, (), _DONT_WAIT)

    def finish(self) -> None:
        with suppress(OSError):  # the other end may be gone, which the next read reports
            self.socket.shutdown(socket.SHUT_WR)

    def close(self, *, abort: bool = False) -> None:
        if abort and self.socket.family in (socket.AF_INET, socket.AF_INET6):
            with suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        with suppress(OSError):
            self.socket.close()


class PipeEnd(End):
    """One end of a pipe, whose non-blocking descriptor it owns."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def read(self, n: int) -> bytes:
        return os.read(self.fd, n)

    def read_into(self, buffer: memoryview) -> int:
        return os.readv(self.fd, [buffer])

    def send(self, parts: Sequence[memoryview]) -> int:
        return os.writev(self.fd, parts)

    def finish(self) -> None:
        self.close()

    def close(self, *, abort: bool = False) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)


class Waiter:
    """Attempts on one descriptor, in one direction, by one task at a time."""

    def __init__(self, fd: int, *, to_write: bool) -> None:
        loop = asyncio.get_running_loop()
        self._fd = fd
        self._loop = loop
        self._add: Callable[..., object] = loop.add_writer if to_write else loop.add_reader
        self._remove = loop.remove_writer if to_write else loop.remove_reader
        self._future: asyncio.Future[None] | None = None
        self._turns = 0
        self._closed = False

    async def attempt(self, call: Callable[[], _T]) -> _T:
        """Make the call again and again until it need not wait. Raises OSError.

        A task that is cancelled here has lost nothing: there is no wait after a call that worked.
        """
        self._turns += 1
        if self._turns % _TURNS == 0:
            await asyncio.sleep(0)
        while not self._closed:
            try:
                return call()
            except (BlockingIOError, InterruptedError):
                await self._ready()
        raise OSError(errno.ESHUTDOWN, "it was closed at this end")

    def stop(self) -> None:
        """Let the task that waits fail, and all later ones. Must precede the end's closing."""
        self._closed = True
        if self._future is not None:
            self._wake(self._future)

    async def _ready(self) -> None:
        if self._future is not None:
            raise RuntimeError("two tasks wait for the same end")
        self._future = self._loop.create_future()
        self._add(self._fd, self._wake, self._future)
        try:
            await self._future
        finally:
            self._future = None
            if not self._closed:
                self._remove(self._fd)

    def _wake(self, future: asyncio.Future[None]) -> None:
        if self._closed:
            # Before the number of the descriptor can be another one's.
            self._remove(self._fd)
        if not future.done():
            future.set_result(None)


def pipe_opened_anew(fd: int, flags: int) -> int:
    """Open the pipe of a descriptor again, with flags of its own. Raises OSError.

    A pipe that another user made cannot be opened; its descriptor becomes non-blocking for all.
    """
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        copy = os.dup(fd)
        os.set_blocking(copy, False)
        return copy


def _keep_alive(connection: socket.socket) -> None:
    """Notice within a minute that the other host is gone, even when there is nothing to send."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
