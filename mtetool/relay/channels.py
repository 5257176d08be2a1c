"""Opening the channel of an address, whichever kind it is."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mtetool.errors import MtetoolError, RelayLostError, SourceError, TlsError
from mtetool.relay import certificates, commands, sockets
from mtetool.relay.address import Address, Command, Inherited, StandardStreams, Tls
from mtetool.relay.channel import Channel, of_socket
from mtetool.relay.tls import HANDSHAKE_SECONDS, TlsChannel


def _nothing(_: object) -> None:
    """For those who want no news."""


@dataclass(frozen=True, slots=True)
class Opening:
    """How to open a channel."""

    retry_seconds: float = 0.0
    """How long to retry to connect where nobody listens yet."""
    tls_creds: Path | None = None
    """The directory of the certificates; by default the first of `certificates.DEFAULT_STORES`."""
    tls_hostname: str | None = None
    """The name that the other end's certificate must have, instead of the address's host."""
    handshake_seconds: float = HANDSHAKE_SECONDS
    on_listening: Callable[[str], None] = _nothing
    """Is called with the address, its port filled in, when others can connect to it."""
    on_refused: Callable[[MtetoolError], None] | None = None
    """Is called when TLS refuses somebody who connected, and waiting goes on; None: that raises."""


DEFAULT = Opening()


async def open_channel(address: Address, opening: Opening = DEFAULT) -> Channel:
    """Connect, or wait until somebody has connected, and return the channel.

    An address that listens takes one connection, then the listening socket is closed and its file
    removed; so they are if the task is cancelled. Raises RelayLostError, TlsError, BusyError,
    FileExistsAlreadyError, PermissionRefusedError, UsageError, HostError.
    """
    if isinstance(address, StandardStreams):
        return commands.standard_streams()
    if isinstance(address, Command):
        return commands.start(address)
    if isinstance(address, Inherited):
        return await _inherited(address, opening)
    if isinstance(address, Tls):
        return await _tls(address, opening)
    if address.listen:
        with sockets.listening(address) as listener:
            opening.on_listening(listener.name)
            return of_socket(await listener.accept(), listener.name)
    return of_socket(await sockets.connected(address, opening.retry_seconds), str(address))


async def _inherited(address: Inherited, opening: Opening) -> Channel:
    taken, listens = sockets.inherited(address)
    if not listens:
        return of_socket(taken, str(address))
    listener = sockets.Listener(taken, str(address))
    try:
        opening.on_listening(listener.name)
        return of_socket(await listener.accept(), listener.name)
    except BaseException:
        listener.turn_away()
        raise
    finally:
        listener.close()


def turn_away(address: Address) -> None:
    """Let whoever waits at an inherited socket know that it is not going to be opened."""
    if isinstance(address, Inherited):
        with suppress(SourceError):
            taken, listens = sockets.inherited(address)
            if listens:
                sockets.Listener(taken, str(address)).turn_away()
            taken.close()


async def _tls(address: Tls, opening: Opening) -> Channel:
    context = certificates.context(opening.tls_creds, listen=address.listen)
    if not address.listen:
        made = await sockets.connected(address, opening.retry_seconds)
        return await _secured(made, address, context, opening)
    with sockets.listening(address) as listener:
        opening.on_listening(listener.name)
        while True:
            made = await listener.accept()
            try:
                return await _secured(made, address, context, opening)
            except (TlsError, RelayLostError) as error:
                # A port scanner, or a host with the wrong certificates, does not end the wait.
                if opening.on_refused is None:
                    raise
                opening.on_refused(error)


async def _secured(
    made: socket.socket, address: Tls, context: ssl.SSLContext, opening: Opening
) -> Channel:
    hostname = None if address.listen else opening.tls_hostname or address.host
    name = f"the peer of {address}" if address.listen else str(address)
    channel = TlsChannel(of_socket(made, name), context, listen=address.listen, hostname=hostname)
    await channel.handshake(opening.handshake_seconds)
    return channel
