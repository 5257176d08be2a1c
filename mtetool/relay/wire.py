"""The conversation of two relays over a channel, in frames."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict, dataclass

from mtetool import __version__
from mtetool.errors import (
    MtetoolError,
    RelayFailedError,
    RelayLostError,
    RelayPeerError,
)
from mtetool.files.fields import pack_map, storable_text
from mtetool.relay.channel import Channel, Data
from mtetool.relay.frames import (
    HEADER,
    MAGIC,
    PROLOGUE,
    VERSION,
    Frame,
    Header,
    Kind,
    check,
    header,
    parse_header,
)
from mtetool.words import printable, quoted

ROLES = ("source", "destination")
HELLO_SECONDS = 60.0  # ssh may ask for a passphrase, and the other host may be slow
_FAIL_SECONDS = 2.0
_BEAT_SECONDS = 1.0
SILENCE_SECONDS = 20.0
"""So long a silence of the other relay ends the migration; its guest may be stopped meanwhile."""
_EXCERPT_BYTES = 80
_EXCERPT_SECONDS = 0.3
_MAX_PAGE_BYTES = 1 << 20
_STRANGERS = {
    b"QEVM": "this is QEMU's own stream: swap --from and --to, or put a relay in between",
    b"\x16\x03": "this is TLS: use tls: on both sides",
    b"SSH-": "this is an SSH server: use exec:ssh HOST mtetool relay …",
    b"HTTP/": "this is a web server: check the host and the port",
}
_NOT_A_RELAY = "check the address; and a command after exec: must print nothing of its own"
_VERSIONS = "install the same version of mtetool on both hosts"


@dataclass(frozen=True, slots=True)
class Hello:
    """What a relay says of itself; `role` is one of `ROLES`."""

    role: str
    page_size_bytes: int
    host: str
    mtetool: str = __version__


class Wire:
    """Frames over a channel, which the wire owns.

    One task may receive, and any number may send and drain at the same time. Errors of the channel
    come through: RelayLostError, TlsError.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.peer: Hello | None = None
        self._sent_frames = 0
        self._received_frames = 0
        # What has arrived of the header or the payload that is being read. A task that is
        # cancelled in the middle of a frame loses nothing.
        self._head: Header | None = None
        self._arrived = bytearray(HEADER.size)
        self._filled = 0
        self._waiting_since: float | None = None

    # --- sending

    def send(self, kind: Kind, *parts: Data) -> None:
        """Queue a frame; its parts must not change until `drain` returns."""
        self.channel.write(header(self._sent_frames, kind, parts), *parts)
        self._sent_frames += 1

    def send_map(self, kind: Kind, values: dict[str, object]) -> None:
        """Queue a frame whose payload is a map."""
        self.send(kind, pack_map(values))

    async def drain(self) -> None:
        """Give all queued frames to the kernel; waits while the other relay is slower."""
        await self.channel.drain()

    async def stay_alive(self) -> None:
        """Until cancelled, give signs of life, and look for those of the other relay.

        A network that drops everything ends no connection for minutes, and the guest may be waiting
        for what the other relay says. Raises RelayLostError.
        """
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(self._beat())
            try:
                await self._watch()
            finally:
                beating.cancel()

    async def _beat(self) -> None:
        while True:
            self.send(Kind.ALIVE)
            await self.drain()
            await asyncio.sleep(_BEAT_SECONDS)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_BEAT_SECONDS)
            since = self._waiting_since
            if since is not None and loop.time() - since > SILENCE_SECONDS:
                raise RelayLostError(
                    f"{self._whose} ({self.channel.name}) has said nothing for"
                    f" {SILENCE_SECONDS:.0f} seconds",
                    hint="check the network between the hosts, and whether that relay still runs",
                )

    async def fail(self, error: MtetoolError) -> None:
        """Report our error to the other relay, if it listens, and close. Raises nothing."""
        said = {
            "id": error.id,
            "message": storable_text(error.message),
            "hint": None if error.hint is None else storable_text(error.hint),
        }
        with suppress(MtetoolError, TimeoutError):
            async with asyncio.timeout(_FAIL_SECONDS):
                self.send_map(Kind.FAIL, dict(said))
                await self.drain()
        await self.channel.close()

    async def close(self) -> None:
        """Send what is queued, and close; `BYE` is for the caller to send. Raises nothing."""
        await self.channel.close()

    def abort(self) -> None:
        """Close at once."""
        self.channel.abort()

    # --- receiving

    async def receive(self) -> Frame:
        """Return the next frame but signs of life; may be cancelled, and called again.

        Raises RelayPeerError (no frame of a relay), RelayLostError (the connection ended),
        RelayFailedError (the other relay reports its error).
        """
        while (frame := await self._next()).kind is Kind.ALIVE:
            pass
        return frame

    async def _next(self) -> Frame:
        if self._head is None:
            await self._fill()
            self._head = parse_header(self._arrived)
            self._expect(self._head.length)
        await self._fill()
        head, payload = self._head, self._arrived
        check(self._received_frames, head, payload)
        self._received_frames += 1
        self._head = None
        self._expect(HEADER.size)
        frame = Frame(head.kind, payload)
        if frame.kind is Kind.FAIL:
            raise self._failure(frame)
        return frame

    def _expect(self, n: int) -> None:
        self._arrived, self._filled = bytearray(n), 0

    async def _fill(self) -> None:
        view = memoryview(self._arrived)
        loop = asyncio.get_running_loop()
        while self._filled < len(view):
            self._waiting_since = loop.time()
            try:
                n = await self.channel.read_into(view[self._filled :])
            finally:
                self._waiting_since = None
            if not n:
                within = self._head is not None or self._filled
                where = "within a frame" if within else "between two frames"
                raise await self._ended(f"ended the connection {where}")
            self._filled += n

    async def _ended(self, what: str) -> RelayLostError:
        epitaph = await self.channel.epitaph()
        return RelayLostError(
            f"{self._whose} ({self.channel.name}) {what}" + (f"; {epitaph}" if epitaph else ""),
            hint="look at what it reports",
        )

    def _failure(self, frame: Frame) -> RelayFailedError:
        with frame.fields() as fields:
            reason = fields.text("id")
            message, hint = fields.text("message"), fields.text_or_none("hint")
        return RelayFailedError(
            f"{self._whose}: {printable(message)}",
            hint=None if hint is None else printable(hint),
            reason=printable(reason),
        )

    @property
    def _whose(self) -> str:
        return "the other relay" if self.peer is None else f"the {self.peer.role}'s relay"

    # --- the beginning

    async def hello(self, mine: Hello, seconds: float = HELLO_SECONDS) -> Hello:
        """Introduce both relays to each other, and return what the other one says of itself.

        Raises RelayPeerError if it is not a relay, of another version, or has our own role;
        RelayLostError, TlsError, RelayFailedError.
        """
        self.channel.write(PROLOGUE.pack(MAGIC, VERSION, 0))
        self.send_map(Kind.HELLO, asdict(mine))
        try:
            async with asyncio.timeout(seconds):
                # One that is not a relay may have gone; what it said is still to be read.
                with suppress(RelayLostError):
                    await self.drain()
                await self._prologue()
                frame = await self.receive()
        except TimeoutError as error:
            raise RelayPeerError(
                f"{self.channel.name} said nothing that a relay says within {seconds:g} seconds",
                hint="check that a relay of mtetool runs at the other end",
            ) from error
        self.peer = _peer(frame)
        if self.peer.role == mine.role:
            raise RelayPeerError(
                f"both relays are the {mine.role}'s",
                hint="start one as mtetool relay source and one as mtetool relay destination",
            )
        return self.peer

    async def _prologue(self) -> None:
        data = b""
        while len(data) < PROLOGUE.size:
            more = await self.channel.read(PROLOGUE.size - len(data))
            if not more:
                said = "in the middle of its first words" if data else "before it said anything"
                raise await self._ended(f"ended the connection {said}")
            data += more
            if not data.startswith(MAGIC) and not MAGIC.startswith(data):
                raise await self._stranger(data)
        _, version, flags = PROLOGUE.unpack(data)
        if version != VERSION or flags:
            raise RelayPeerError(
                f"the other relay speaks version {version} of the relays' protocol"
                f"{f' with the flags {flags:#x}' if flags else ''}, and this one version {VERSION}",
                hint=_VERSIONS,
                version=version,
            )

    async def _stranger(self, data: bytes) -> RelayPeerError:
        """The error for another end that said `data` first, and maybe more since."""
        with suppress(MtetoolError, TimeoutError):
            async with asyncio.timeout(_EXCERPT_SECONDS):
                while len(data) < _EXCERPT_BYTES and (
                    more := await self.channel.read(_EXCERPT_BYTES)
                ):
                    data += more
        hints = (hint for start, hint in _STRANGERS.items() if data.startswith(start))
        text = data[: _EXCERPT_BYTES + 1].decode(errors="backslashreplace")
        return RelayPeerError(
            f"{self.channel.name} is not a relay of mtetool: it began with"
            f" {quoted(text, _EXCERPT_BYTES)}",
            hint=next(hints, _NOT_A_RELAY),
        )


def _peer(frame: Frame) -> Hello:
    if frame.kind is not Kind.HELLO:
        raise RelayPeerError(
            f"the other relay began with a {frame.kind.name} frame", hint=_VERSIONS
        )
    with frame.fields() as fields:
        found = Hello(
            fields.text("role"),
            fields.integer("page_size_bytes", 1, _MAX_PAGE_BYTES),
            printable(fields.text("host")),
            printable(fields.text("mtetool")),
        )
        if found.role not in ROLES:
            raise fields.wrong(f"the role {quoted(found.role)} is unknown")
    return found
