"""The tags of a guest that QEMU emulates, asked of its gdb stub (QEMU 9.2 and later).

The packet qMemTags (GDB's manual, "General Query Packets") answers for one granule at a time, and
at a virtual address: the stub translates it as the processor would that it has stopped
(target/arm/gdbstub64.c). So this is for a few pages, and a migration's file for a whole guest.
A connection stops the guest; when it ends, the guest goes on.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mtetool.errors import GuestError, GuestLostError, RangeError
from mtetool.guest import Extent, GuestInfo, Memslot, Missing
from mtetool.sources.copying import Copied, Step
from mtetool.sources.layout import total_bytes
from mtetool.uapi import GRANULE_BYTES, TAG_MAX
from mtetool.words import quoted

MOST_BYTES = 16 << 20
"""The most memory that is asked for: a million packets, a minute or two."""

_ALLOCATION_TAG = 1
_TIMEOUT_SECONDS = 30.0
_MOST_ANSWER_BYTES = 1 << 16
_PIECE_GRANULES = 4096


class _Remote:
    """A connection to a gdb stub: packets out, answers in."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self._connection = connection
        self._name = name
        self._unread = b""

    def ask(self, packet: str) -> str:
        """Send a packet and return its answer. Raises GuestLostError, GuestError."""
        body = packet.encode()
        try:
            self._connection.sendall(b"$%b#%02x" % (body, sum(body) % 256))
            answer = self._answer()
            self._connection.sendall(b"+")
        except OSError as error:
            raise GuestLostError(f"{self._name}: the gdb stub does not answer: {error}") from error
        return answer.decode("ascii", "replace")

    def _answer(self) -> bytes:
        while True:
            start = self._unread.find(b"$")
            end = self._unread.find(b"#", start)
            if 0 <= start < end <= len(self._unread) - 3:
                answer = self._unread[start + 1 : end]
                self._unread = self._unread[end + 3 :]
                return answer
            if len(self._unread) > _MOST_ANSWER_BYTES:
                raise GuestError(f"{self._name} does not speak the protocol of a gdb stub")
            received = self._connection.recv(1 << 16)
            if not received:
                raise GuestLostError(f"{self._name}: the gdb stub closed the connection")
            self._unread += received


class GdbSource:
    """The tags of some virtual memory of a guest that is stopped by its gdb stub."""

    def __init__(self, remote: _Remote, name: str, places: Sequence[Extent], page: int) -> None:
        self.name = name
        self.page_size_bytes = page
        slots = tuple(Memslot(n, p.ipa, p.size_bytes, None) for n, p in enumerate(places))
        self.info = GuestInfo(f"gdb:{name}", True, page, slots)
        self.memslots = slots
        self._remote = remote

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return [Extent(slot.ipa, slot.size_bytes) for slot in self.info.memslots]

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`: the stub allocates nothing."""

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        for extent in extents:
            tags = bytearray()
            at = extent.ipa
            for ipa in range(extent.ipa, extent.end, GRANULE_BYTES):
                tag = self._tag(ipa)
                if tag is None or len(tags) == _PIECE_GRANULES:
                    if tags:
                        yield Copied(at, memoryview(tags))
                    at, tags = ipa, bytearray()
                if tag is None:
                    reason = "the stub has no tag: no such page, or not one of tagged memory"
                    yield Missing(ipa, GRANULE_BYTES, None, reason)
                    at = ipa + GRANULE_BYTES
                else:
                    tags.append(tag)
            if tags:
                yield Copied(at, memoryview(tags))

    def _tag(self, address: int) -> int | None:
        answer = self._remote.ask(f"qMemTags:{address:x},1:{_ALLOCATION_TAG:x}")
        if answer.startswith("E"):
            return None
        try:
            tag = int(answer.removeprefix("m"), 16)
        except ValueError:
            tag = TAG_MAX + 1
        if not answer.startswith("m") or tag > TAG_MAX:
            raise GuestError(f"{self.name}: the gdb stub answers {quoted(answer)} for a tag")
        return tag


@contextmanager
def open_gdb(name: str, places: Sequence[Extent], page_bytes: int) -> Iterator[GdbSource]:
    """Connect to a gdb stub at HOST:PORT or at the path of a unix socket; the guest stops.

    Raises GuestError, RangeError for more memory than is worth asking for in this way.
    """
    if total_bytes(places) > MOST_BYTES:
        raise RangeError(
            f"a gdb stub is asked for each granule: {total_bytes(places):,} bytes take too long,"
            f" and at most {MOST_BYTES:,} are accepted",
            hint="use a smaller range, or a migration's file: migrate file:PATH in QEMU's monitor",
        )
    connection = _connected(name)
    with connection:
        remote = _Remote(connection, name)
        if "memory-tagging+" not in remote.ask("qSupported:multiprocess+;memory-tagging+"):
            raise GuestError(
                f"the gdb stub at {name} does not offer memory tags",
                hint="it takes QEMU 9.2 or later without KVM (for user programs, qemu-aarch64"
                " 9.1), and a processor with MTE: -M virt,mte=on -cpu max",
            )
        try:
            yield GdbSource(remote, name, places, page_bytes)
        finally:
            # Otherwise QEMU leaves the guest stopped.
            with suppress(GuestError):
                remote.ask("D;1")


def _connected(name: str) -> socket.socket:
    host, colon, port = name.rpartition(":")
    try:
        if colon and port.isdecimal() and int(port) < 1 << 16:
            return socket.create_connection((host or "localhost", int(port)), _TIMEOUT_SECONDS)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(_TIMEOUT_SECONDS)
        connection.connect(name)
    except (OSError, ValueError) as error:
        raise GuestError(
            f"no gdb stub can be reached at {name}: {error}",
            hint="start QEMU with -gdb tcp:localhost:1234 or -gdb unix:PATH,server=on,wait=off",
        ) from error
    return connection
