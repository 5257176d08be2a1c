"""Connected sockets: by connecting, by waiting for somebody who connects, or inherited."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mtetool.errors import (
    BusyError,
    MtetoolError,
    RelayLostError,
    SourceError,
    UsageError,
    errno_name,
    file_error,
    host_error,
)
from mtetool.files.sockets import SocketFile
from mtetool.relay.address import Inherited, Side, Tcp, Tls, Unix
from mtetool.relay.ends import Waiter

_ATTEMPT_SECONDS = 10.0
_PAUSE_SECONDS = 0.1
_INTERNET = (socket.AF_INET, socket.AF_INET6)


async def connected(address: Unix | Tcp | Tls, retry_seconds: float) -> socket.socket:
    """Connect; where nobody listens, retry until `retry_seconds` have passed.

    Raises RelayLostError, PermissionRefusedError.
    """
    deadline = time.monotonic() + retry_seconds
    while True:
        try:
            if isinstance(address, Unix):
                return _connected_unix(address.path)
            async with asyncio.timeout(_ATTEMPT_SECONDS):
                return await _connected_internet(address)
        except PermissionError as error:
            raise file_error(error, str(address), f"connecting to {address}") from error
        except OSError as error:  # TimeoutError is one
            if time.monotonic() >= deadline:
                raise _unreachable(address, error, retry_seconds) from error
        await asyncio.sleep(_PAUSE_SECONDS)


def _connected_unix(path: str) -> socket.socket:
    """Connect to a unix socket, which never waits: EAGAIN says that too many others do."""
    # The event loop's sock_connect takes EAGAIN for a connection under way.
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    try:
        made.connect(path)
    except BaseException:
        made.close()
        raise
    return made


async def _connected_internet(address: Tcp | Tls) -> socket.socket:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failure = OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    for family, kind, protocol, _, where in found:
        made = socket.socket(family, kind, protocol)
        try:
            made.setblocking(False)
            await loop.sock_connect(made, where)
        except OSError as error:
            made.close()
            failure = error
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise failure


def _unreachable(address: object, error: OSError, waited: float) -> RelayLostError:
    if isinstance(error, TimeoutError) and not error.errno:
        error = TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    name = None
    if isinstance(error, socket.gaierror):
        reason = error.strerror or "the name is unknown"
    else:
        name = errno_name(error.errno or 0)
        reason = f"{error.strerror} ({name})"
    tried = f" for {waited:g} seconds" if waited else ""
    return RelayLostError(
        f"cannot connect to {address}, tried{tried or ' once'}: {reason}",
        hint="start what listens there first, and check the address",
        errno=name,
    )


class Listener:
    """A listening socket that is good for one connection."""

    def __init__(self, made: socket.socket, name: str, file: SocketFile | None = None) -> None:
        self._socket = made
        self._file = file
        self._waiter = Waiter(made.fileno(), to_write=False)
        self.name = name
        made.setblocking(False)

    async def accept(self) -> socket.socket:
        """Wait for a connection. Raises HostError."""
        while True:
            try:
                return (await self._waiter.attempt(self._socket.accept))[0]
            except ConnectionAbortedError:
                continue  # whoever connected is gone already
            except OSError as error:
                raise host_error(error, f"waiting at {self.name}") from error

    def turn_away(self) -> None:
        """Close the connections that wait already, which nobody else answers. Raises nothing.

        A service manager would start the next relay for them, at once, and again and again.
        """
        with suppress(OSError):
            while True:
                self._socket.accept()[0].close()

    def close(self) -> None:
        """Close it, and remove its file. Idempotent."""
        if self._file is not None:
            self._file.remove()
        self._waiter.stop()
        self._socket.close()


@contextmanager
def listening(address: Unix | Tcp | Tls) -> Iterator[Listener]:
    """Listen at an address until the block ends.

    Raises BusyError, FileExistsAlreadyError, UsageError (no address of this host), HostError.
    """
    if isinstance(address, Unix):
        file = SocketFile(
            Path(address.path), socket.SOCK_STREAM, 0o600, elsewhere="listen:unix:PATH"
        )
        listener = Listener(file.socket, str(address), file)
    else:
        made = _listening_internet(address)
        port = made.getsockname()[1]
        listener = Listener(made, str(replace(address, port=port)))
    try:
        yield listener
    finally:
        listener.close()


def _listening_internet(address: Tcp | Tls) -> socket.socket:
    try:
        if not address.host:
            both = socket.has_dualstack_ipv6()
            return socket.create_server(
                ("", address.port),
                family=socket.AF_INET6 if both else socket.AF_INET,
                dualstack_ipv6=both,
                backlog=1,
            )
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        return socket.create_server(found[0][4][:2], family=found[0][0], backlog=1)
    except socket.gaierror as error:
        raise UsageError(
            f"{address}: {error.strerror}", hint="name an address of this host, or none for all"
        ) from error
    except OSError as error:
        raise _cannot_listen(address, error) from error


def _cannot_listen(address: Tcp | Tls, error: OSError) -> MtetoolError:
    if error.errno == errno.EADDRINUSE:
        return BusyError(
            f"another process uses {address}",
            hint=f"find it: ss -tlnp sport = :{address.port}; or choose another port",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return UsageError(
            f"{address} is not an address of this host",
            hint="name one of its own, or none for all: ip address",
        )
    return host_error(error, f"listening at {address}")


def inherited(address: Inherited) -> tuple[socket.socket, bool]:
    """Take over an inherited socket, and tell whether it listens. Raises SourceError."""
    try:
        taken = socket.socket(fileno=address.fd)
        listens = bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        raise _unusable(address, f"{error.strerror} ({errno_name(error.errno or 0)})") from error
    taken.set_inheritable(False)
    problem = None
    if taken.type != socket.SOCK_STREAM or taken.family not in (socket.AF_UNIX, *_INTERNET):
        problem = "it is another kind of socket"
    elif address.side is Side.RELAY and taken.family in _INTERNET:
        problem = "over TCP, tags would travel in clear text"
    elif not listens:
        try:
            taken.getpeername()
        except OSError:
            problem = "it is not connected and does not listen"
    if problem is not None:
        taken.detach()
        raise _unusable(address, problem)
    _forget_handed_over()
    return taken, listens


def _forget_handed_over() -> None:
    """Keep our own children from taking a service manager's sockets for theirs."""
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)


def _unusable(address: Inherited, what: str) -> SourceError:
    return SourceError(
        f"descriptor {address.fd} cannot be used: {what}",
        hint="start mtetool with a connected or listening stream socket at that number",
    )
