"""Frames between two relays: how they are cut, numbered, checked and bounded.

Each direction of a connection is `PROLOGUE`, then frames: `HEADER`, then the payload. The checksum
covers the frame's number in its direction, so that a frame that is missing, twice, or in another's
place is found as well as a flipped bit. It is no protection against people: TLS and ssh are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

from xxhash import xxh3_64

from mtetool.errors import DamagedError, RelayPeerError, UnknownVersionError
from mtetool.files.fields import Fields, unpack_map

MAGIC = b"mterelay"
VERSION = 1
PROLOGUE = Struct("<8sHH")  # magic, version, flags (none is defined: 0)
HEADER = Struct("<BIQ")  # kind, length of the payload, checksum
_NUMBER_AND_KIND = Struct("<QB")

MAX_BULK_BYTES = 4 << 20
"""The most bytes of DATA, BACK and TAGS; senders may keep below it."""
_BULK_BYTES = MAX_BULK_BYTES + (64 << 10)
_MAP_BYTES = 64 << 10


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1
    """Who speaks: a map, the first frame of each direction."""
    DATA = 2
    """Bytes of QEMU's stream, towards the destination."""
    BACK = 3
    """Bytes of QEMU's return path, towards the source."""
    TAGS = 4
    """Tags of pages."""
    END_OF_RAM = 5
    """The memory's last section has just passed."""
    ALL_TAGS = 6
    """No more tags follow: a map."""
    APPLIED = 7
    """How much is in place and was read back: a map."""
    ALIVE = 8
    """The sender is still there; see `Wire.stay_alive`."""
    FAIL = 9
    """Why the sender gives up: a map."""
    EOF_DATA = 10
    """QEMU's stream has ended."""
    EOF_BACK = 11
    """QEMU's return path has ended."""
    BYE = 12
    """All is done; the connection ends here."""
    READY = 13
    """The sender's guest was found, and its tags can be copied: a map."""


_MOST_BYTES = {
    **dict.fromkeys((Kind.DATA, Kind.BACK, Kind.TAGS), _BULK_BYTES),
    **dict.fromkeys((Kind.HELLO, Kind.ALL_TAGS, Kind.APPLIED, Kind.FAIL, Kind.READY), _MAP_BYTES),
    **dict.fromkeys((Kind.ALIVE, Kind.END_OF_RAM, Kind.EOF_DATA, Kind.EOF_BACK, Kind.BYE), 0),
}

_UPDATE = "install the same version of mtetool on both hosts"


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame that was received, and whose checksum was right."""

    kind: Kind
    payload: bytes | bytearray

    @contextmanager
    def fields(self) -> Iterator[Fields]:
        """The payload's map, for a block that reads all of its keys.

        Raises RelayPeerError for whatever is wrong, in the block too.
        """
        try:
            fields = unpack_map(bytes(self.payload), f"the other relay's {self.kind.name} frame")
            yield fields
            fields.end()
        except DamagedError as error:
            raise RelayPeerError(error.message, hint=_UPDATE) from error
        except UnknownVersionError as error:
            raise RelayPeerError(error.message, hint=_UPDATE) from error


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a frame whose payload is to come."""

    kind: Kind
    length: int
    checksum: int


def header(number: int, kind: Kind, parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
    """Return the header of a frame with these parts. Raises ValueError if they are too long."""
    digest = xxh3_64(_NUMBER_AND_KIND.pack(number, kind))
    length = 0
    for part in parts:
        digest.update(part)
        length += memoryview(part).nbytes
    if length > _MOST_BYTES[kind]:
        raise ValueError(f"a {kind.name} frame of {length} bytes")
    return HEADER.pack(kind, length, digest.intdigest())


def parse_header(data: bytes | bytearray) -> Header:
    """Parse a header; its length is within its kind's bound. Raises RelayPeerError."""
    number, length, checksum = HEADER.unpack(data)
    try:
        kind = Kind(number)
    except ValueError:
        raise broken(f"a frame of the unknown kind {number}") from None
    if length > _MOST_BYTES[kind]:
        raise broken(f"a {kind.name} frame of {length:,} bytes")
    return Header(kind, length, checksum)


def check(number: int, head: Header, payload: bytes | bytearray) -> None:
    """Compare the checksum of a whole frame. Raises RelayPeerError."""
    digest = xxh3_64(_NUMBER_AND_KIND.pack(number, head.kind))
    digest.update(payload)
    if digest.intdigest() != head.checksum:
        raise broken(f"a {head.kind.name} frame, number {number}, with a wrong checksum")


def broken(what: str) -> RelayPeerError:
    """The error for a frame that cannot be believed."""
    return RelayPeerError(
        f"the other relay sent {what}",
        hint=f"something on the way changes the bytes; or {_UPDATE}",
        reason=what,
    )
