"""What `--from` and `--to` of a relay may be: one grammar for QEMU's side and for the other relay.

`unix:`, `tcp:` and `fd:` are as in QEMU's `migrate`; `listen:` in front waits for the other end to
connect, where QEMU's word would be `-incoming`.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from mtetool.errors import BadNameError, SourceError
from mtetool.words import quoted

MAX_PATH_BYTES = 107
"""The longest path of a unix socket: 108 bytes with the byte that ends it (sun_path)."""

_MAX_FD = 1 << 20
_HOST_AND_PORT = re.compile(
    r"(?:\[(?P<inner>[0-9A-Fa-f:.]+(?:%\w+)?)\]|(?P<host>[^:\[\]]*)):(?P<port>\d+)"
)


class Side(Enum):
    """What is at the other end of an address."""

    QEMU = "QEMU"
    RELAY = "the other relay"


@dataclass(frozen=True, slots=True)
class Unix:
    """A unix socket at a path, to connect to or to make."""

    path: str
    listen: bool = False

    def __str__(self) -> str:
        return f"{_listening(self.listen)}unix:{self.path}"


@dataclass(frozen=True, slots=True)
class Tcp:
    """A host and a port, with nothing encrypted; an empty host is every address of this host."""

    host: str
    port: int
    listen: bool = False
    kind: str = "tcp"

    def __str__(self) -> str:
        return f"{_listening(self.listen)}{self.kind}:{_joined(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class Tls:
    """A host and a port, with TLS and certificates on both sides."""

    host: str
    port: int
    listen: bool = False

    def __str__(self) -> str:
        return f"{_listening(self.listen)}tls:{_joined(self.host, self.port)}"


@dataclass(frozen=True, slots=True)
class Inherited:
    """A socket that this process was started with, connected or listening."""

    fd: int
    side: Side = Side.QEMU

    def __str__(self) -> str:
        return f"fd:{self.fd}"


@dataclass(frozen=True, slots=True)
class Command:
    """A command whose standard input and output lead to the other relay."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"exec:{shlex.join(self.words)}"


@dataclass(frozen=True, slots=True)
class StandardStreams:
    """Our own standard input and output."""

    def __str__(self) -> str:
        return "-"


Address = Unix | Tcp | Tls | Inherited | Command | StandardStreams

_FORMS = {
    Side.QEMU: "unix:PATH, listen:unix:PATH, tcp:HOST:PORT, listen:tcp:[HOST]:PORT or fd:N",
    Side.RELAY: (
        "tls:HOST:PORT, listen:tls:[HOST]:PORT, exec:COMMAND, -, unix:PATH, listen:unix:PATH"
        " or fd:N"
    ),
}
_CLEAR = "tcp-plaintext"
_OTHER_WORDS = {
    "unix-connect": "unix:PATH",
    "unix-listen": "listen:unix:PATH",
    "unix-l": "listen:unix:PATH",
    "tcp-connect": "tcp:HOST:PORT",
    "tcp-listen": "listen:tcp:[HOST]:PORT",
    "tcp-l": "listen:tcp:[HOST]:PORT",
    "openssl": "tls:HOST:PORT",
    "openssl-listen": "listen:tls:[HOST]:PORT",
    "ssh": "exec:ssh HOST mtetool relay …",
    "stdio": "-",
}


def parse(text: str, side: Side) -> Address:
    """Parse an address, and check that it may be used on that side.

    Raises SourceError; BadNameError for a path that no unix socket can have.
    """
    if text == "-":
        return _for_relays(StandardStreams(), text, side)
    listen = text.startswith("listen:")
    kind, colon, rest = text.removeprefix("listen:").partition(":")
    if not colon or kind not in _KINDS or (listen and kind in _NEVER_LISTENING):
        raise _unknown(text, kind, side)
    return _KINDS[kind](text, rest, listen, side)


def _unix(text: str, rest: str, listen: bool, side: Side) -> Address:
    if not rest or "\0" in rest:
        raise SourceError(f"{quoted(text)} has no path", hint="write unix:PATH")
    if len(os.fsencode(rest)) > MAX_PATH_BYTES:
        raise BadNameError(
            f"{quoted(rest, 120)} is too long for a unix socket, whose path can have"
            f" {MAX_PATH_BYTES} bytes",
            hint="use a shorter path, or a relative one",
            path=rest,
        )
    return Unix(rest, listen)


def _tcp(text: str, rest: str, listen: bool, side: Side) -> Address:
    if side is Side.RELAY:
        raise SourceError(
            f"{quoted(text)} would carry tags in clear text to the other relay",
            hint=f"use tls:HOST:PORT or exec:ssh …, or say that you want it so: {_CLEAR}:HOST:PORT",
        )
    return Tcp(*_host_and_port(text, rest, listen), listen)


def _tcp_plaintext(text: str, rest: str, listen: bool, side: Side) -> Address:
    if side is Side.QEMU:
        raise SourceError(
            f"{quoted(text)} is for the way between relays", hint="write tcp: for QEMU's side"
        )
    return Tcp(*_host_and_port(text, rest, listen), listen, _CLEAR)


def _tls(text: str, rest: str, listen: bool, side: Side) -> Address:
    if side is Side.QEMU:
        raise SourceError(
            f"{quoted(text)}: the relay cannot read a stream that QEMU encrypts",
            hint="unset tls-creds in QEMU's migration parameters, and use unix:PATH",
        )
    return Tls(*_host_and_port(text, rest, listen), listen)


def _inherited(text: str, rest: str, listen: bool, side: Side) -> Address:
    if not re.fullmatch(r"\d{1,7}", rest, re.ASCII) or int(rest) > _MAX_FD:
        raise SourceError(
            f"{quoted(text)} does not name a descriptor",
            hint="write its number; a service manager's first socket is fd:3",
        )
    return Inherited(int(rest), side)


def _command(text: str, rest: str, listen: bool, side: Side) -> Address:
    try:
        words = tuple(shlex.split(rest))
    except ValueError as error:
        raise SourceError(
            f"{quoted(text, 120)} cannot be split into words: {error}",
            hint="quote it as for a shell; none runs it, unless you write exec:sh -c '…'",
        ) from error
    if not words or not words[0] or "\0" in rest:
        raise SourceError(
            f"{quoted(text)} has no command",
            hint="write exec:ssh HOST mtetool relay destination --from - --to unix:PATH",
        )
    return _for_relays(Command(words), text, side)


def _for_relays(address: Address, text: str, side: Side) -> Address:
    """Refuse what has one stream for each direction: QEMU must be able to see both end at once."""
    if side is Side.QEMU:
        raise SourceError(
            f"{quoted(text)} is for the way between relays: QEMU needs a socket",
            hint=f"use {_FORMS[side]}",
        )
    return address


_KINDS: dict[str, Callable[[str, str, bool, Side], Address]] = {
    "unix": _unix,
    "tcp": _tcp,
    _CLEAR: _tcp_plaintext,
    "tls": _tls,
    "fd": _inherited,
    "exec": _command,
}
_NEVER_LISTENING = ("fd", "exec")


def _unknown(text: str, kind: str, side: Side) -> SourceError:
    instead = _OTHER_WORDS.get(kind.lower())
    if kind in _NEVER_LISTENING:
        instead = f"{kind}:… without listen:"
    elif text.startswith(("/", "./")):
        instead = f"unix:{text}"
    return SourceError(
        f"{quoted(text)} is not an address of {side.value}",
        hint=f"write {instead}" if instead else f"use {_FORMS[side]}",
    )


def _host_and_port(text: str, rest: str, listen: bool) -> tuple[str, int]:
    match = _HOST_AND_PORT.fullmatch(rest)
    if match is None:
        raise SourceError(
            f"{quoted(text)} is not a host and a port",
            hint="write HOST:PORT, and an IPv6 address in brackets: [::1]:4444",
        )
    host = match["inner"] or match["host"]
    port = int(match["port"]) if match["port"].isascii() and len(match["port"]) <= 5 else -1
    if not host and not listen:
        raise SourceError(f"{quoted(text)} names no host", hint="write HOST:PORT")
    if not (0 if listen else 1) <= port <= 65535:
        raise SourceError(
            f"{quoted(text)} has no port that exists", hint="use a port from 1 to 65535"
        )
    return host, port


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listening(listen: bool) -> str:
    return "listen:" if listen else ""
