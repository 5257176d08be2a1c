"""A way for bytes in both directions.

asyncio's own streams copy what they read twice, and have buffers of their own. Here, a read is one
system call into the caller's object, and what is written goes to the kernel from the caller's
objects in one gathering call. Flow control needs nothing more: what was not read stays in the
kernel, and the sender waits.
"""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections import deque
from contextlib import suppress

from mtetool.errors import MtetoolError, RelayLostError, errno_name
from mtetool.relay.ends import End, SocketEnd, Waiter

Data = bytes | bytearray | memoryview

READ_BYTES = 1 << 20
"""What `Channel.read` asks the kernel for; it returns what is there."""

_MOST_PARTS = 256  # of one gathering write; the kernel takes 1024
_GOODBYE_SECONDS = 2.0


class Channel(ABC):
    """Bytes to and from one other end, which `name` names in messages.

    One task may read, and any number may write and drain at the same time. Every method that waits
    raises RelayLostError if the connection is lost, or is closed by `abort` or `close` meanwhile.
    """

    peer_socket: socket.socket | None = None
    """The connected socket, for finding the process at its other end; not for reading."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._parts: deque[memoryview] = deque()
        self._sending = asyncio.Lock()

    @abstractmethod
    async def read(self, n: int = READ_BYTES) -> bytes:
        """Return what is there, 1 to `n` bytes; b"" at the end."""

    @abstractmethod
    async def read_into(self, buffer: Data) -> int:
        """Read what is there into a writable buffer, at least one byte; 0 at the end."""

    def write(self, *parts: Data) -> None:
        """Queue bytes for `drain`, which must not change until it returns."""
        for part in parts:
            view = memoryview(part)
            if view.nbytes:
                self._parts.append(view if view.format == "B" else view.cast("B"))

    @property
    def queued_bytes(self) -> int:
        """How much was written and not yet given to the kernel."""
        return sum(part.nbytes for part in self._parts)

    @property
    def is_sending(self) -> bool:
        """Whether a task is in `drain`; it also sends what is written meanwhile."""
        return self._sending.locked()

    async def drain(self) -> None:
        """Give everything that was written to the kernel."""
        async with self._sending:
            while self._parts:
                await self._send_some()

    @abstractmethod
    async def _send_some(self) -> None:
        """Send the first of the queued parts."""

    @abstractmethod
    async def half_close(self) -> None:
        """Send what is queued, then let the other end read its end; reading goes on."""

    def abort(self) -> None:
        """Close at once, in the middle of anything; what is queued is not sent. Idempotent."""
        self._shut(abort=True)

    @abstractmethod
    def _shut(self, *, abort: bool) -> None:
        """Close everything; `abort` makes it an error for the other end. Idempotent."""

    async def close(self) -> None:
        """Send what is queued, wait shortly until the other end closes too, and close.

        A socket that is closed while it holds bytes that nobody read is reset, and the other end
        may lose the last that was sent to it. Raises nothing.
        """
        with suppress(MtetoolError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_SECONDS):
                await self.half_close()
                await self._linger()
        self._shut(abort=False)

    @abstractmethod
    async def _linger(self) -> None:
        """Let a task that reads fail, and wait for the other end's end."""

    async def epitaph(self) -> str | None:
        """What is known of the other end's end, such as "it ended with status 255"."""
        return None

    def lost(self, error: OSError) -> RelayLostError:
        """The error for a failed read or write."""
        name = errno_name(error.errno) if error.errno else None
        reason = f"{error.strerror} ({name})" if name else str(error)
        return RelayLostError(
            f"the connection to {self.name} was lost: {reason}",
            hint="look at what the other end reports",
            errno=name,
        )

    def _next_parts(self) -> list[memoryview]:
        return [self._parts[i] for i in range(min(len(self._parts), _MOST_PARTS))]

    def _sent(self, n: int) -> None:
        while n:
            first = self._parts[0]
            if n < first.nbytes:
                self._parts[0] = first[n:]
                return
            n -= first.nbytes
            self._parts.popleft()


class PlainChannel(Channel):
    """A channel over the ends themselves: a socket for both directions, or two pipes."""

    def __init__(self, name: str, incoming: End, outgoing: End) -> None:
        super().__init__(name)
        self._incoming, self._outgoing = incoming, outgoing
        self._reading = Waiter(incoming.fd, to_write=False)
        self._writing = Waiter(outgoing.fd, to_write=True)
        self._lingering = Waiter(incoming.fd, to_write=False)
        self._closed = False
        if isinstance(incoming, SocketEnd):
            self.peer_socket = incoming.socket

    async def read(self, n: int = READ_BYTES) -> bytes:
        try:
            return await self._reading.attempt(lambda: self._incoming.read(n))
        except OSError as error:
            raise self.lost(error) from error

    async def read_into(self, buffer: Data) -> int:
        try:
            return await self._reading.attempt(lambda: self._incoming.read_into(memoryview(buffer)))
        except OSError as error:
            raise self.lost(error) from error

    async def _send_some(self) -> None:
        parts = self._next_parts()
        try:
            self._sent(await self._writing.attempt(lambda: self._outgoing.send(parts)))
        except OSError as error:
            raise self.lost(error) from error

    async def half_close(self) -> None:
        await self.drain()
        if not self._closed:
            self._writing.stop()
            self._outgoing.finish()

    async def _linger(self) -> None:
        self._reading.stop()
        with suppress(OSError):
            while await self._lingering.attempt(lambda: self._incoming.read(READ_BYTES)):
                pass

    def _shut(self, *, abort: bool) -> None:
        self._closed = True
        self._parts.clear()
        for waiter in (self._reading, self._lingering, self._writing):
            waiter.stop()
        for end in (self._incoming, self._outgoing):
            end.close(abort=abort)


def of_socket(connection: socket.socket, name: str) -> PlainChannel:
    """The channel of a connected socket, which it owns from now on."""
    end = SocketEnd(connection)
    return PlainChannel(name, end, end)
