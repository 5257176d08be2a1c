"""The relay at the destination: it passes QEMU's stream on, and puts tags in place.

Before the end of the stream passes, every tag that the source sent is written and was read back.
QEMU then starts the guest by itself. On any doubt the connection to QEMU is closed before: a guest
that did not get the end of its stream is never started.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from mtetool.errors import RelayLostError, RelayPeerError
from mtetool.relay import guests
from mtetool.relay.confirmation import Confirmation
from mtetool.relay.frames import Frame, Kind
from mtetool.relay.incoming import Incoming
from mtetool.relay.report import News, Report
from mtetool.relay.stream import BEGINNING
from mtetool.relay.together import Worker, all_of
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.guest import Guest
    from mtetool.relay.channel import Channel
    from mtetool.relay.wire import Wire

_READ_BYTES = 1 << 20
# Frames that wait for the writing thread; each is at most some MiB, and usually a few KiB.
_MOST_WAITING = 16
# What waits for QEMU here lengthens the downtime, if QEMU is slow, by the time it takes to read it.
_MOST_QUEUED_BYTES = 2 << 20
_NEWS_SECONDS = 0.5


class DestinationRelay:
    """One migration, from the source's relay to QEMU."""

    def __init__(self, wire: Wire, qemu: Channel, news: News) -> None:
        self._wire = wire
        self._qemu = qemu
        self._news = news
        self._waiting: asyncio.Queue[bytes | bytearray | None] = asyncio.Queue(_MOST_WAITING)
        self._queued = asyncio.Event()
        self._sent_ahead = BEGINNING
        self._ram_ended = False
        self._in_place = False
        self._incoming: Incoming | None = None
        self._confirmation = Confirmation()
        self._worker = Worker("tags")
        self.report = Report("destination")

    async def run(self, wanted: guests.Wanted) -> Report:
        """Relay the migration; then QEMU's connection is closed.

        Raises MtetoolError: then the guest was not started here, unless the error says so.
        """
        started = time.monotonic()
        try:
            # QEMU 11.1 (10.0 does not) waits for these bytes in its main thread, and its monitor
            # answers nobody meanwhile, neither mtetool nor a libvirt that has disks to copy first:
            # so they do not wait for the source's QEMU. (migration_ioc_process_incoming in QEMU's
            # migration/migration.c)
            self._qemu.write(BEGINNING)
            await self._qemu.drain()
            name, guest = await self._worker.run(guests.open_for, wanted, self._qemu)
            self.report.guest = name
            try:
                await self._relay(guest, name)
            finally:
                self._qemu.abort()
                await self._worker.run(guest.close)
        finally:
            self._qemu.abort()
            self._worker.close()
            self.report.elapsed_seconds = time.monotonic() - started
        self._wire.send(Kind.BYE)
        await self._wire.drain()
        self._confirmation.check()
        self.report.finished = True
        return self.report

    async def _relay(self, guest: Guest, name: str) -> None:
        here = await self._worker.run(guests.ready, guest, name)
        await self._clear(Incoming(guest, here.memory, here.page_size_bytes))
        self._wire.send_map(Kind.READY, here.fields())
        await self._wire.drain()
        there = guests.Ready.of(await self._wire.receive())
        guests.check_same_memory(there.memory, here.memory)
        self._incoming = Incoming(guest, here.memory, there.page_size_bytes)
        telling = asyncio.create_task(self._tell())
        try:
            await all_of(
                self._forward(),
                self._backward(),
                self._tags(),
                beside=[self._wire.stay_alive(), self._keep_flushing()],
            )
        finally:
            telling.cancel()
            self._count()
            self._news.update(self.report)

    async def _clear(self, incoming: Incoming) -> None:
        """Clear what an earlier attempt left, before the source's QEMU can connect."""
        n_cleared = await self._worker.run(incoming.clear)
        if n_cleared:
            self._news.say(f"cleared the tags of {counted(n_cleared, 'page')} that had some before")

    # --- from the source -----------------------------------------------------------------------

    async def _forward(self) -> None:
        while True:
            frame = await self._wire.receive()
            if frame.kind is Kind.DATA:
                if self._ram_ended and not self._in_place:
                    raise RelayPeerError("the source's relay sent the end of the stream too early")
                self.report.stream_bytes += len(frame.payload)
                await self._pass_on(frame.payload)
            elif frame.kind is Kind.TAGS and not self._in_place:
                self.report.tag_bytes += len(frame.payload)
                await self._waiting.put(frame.payload)
            elif frame.kind is Kind.END_OF_RAM:
                self._ram_ended = True
            elif frame.kind is Kind.ALL_TAGS and self._ram_ended:
                await self._finish_tags(frame)
            elif frame.kind is Kind.EOF_DATA and self._in_place:
                with suppress(RelayLostError):
                    await self._qemu.half_close()
                return
            else:
                raise guests.unexpected(frame)

    async def _pass_on(self, data: bytes | bytearray) -> None:
        """Queue bytes for QEMU: the tags that follow need not wait until it has read them."""
        if self._sent_ahead:
            data = self._after_beginning(data)
        self._qemu.write(data)
        self._queued.set()
        if self._qemu.queued_bytes > _MOST_QUEUED_BYTES:
            await self._flush()

    def _after_beginning(self, data: bytes | bytearray) -> bytes | bytearray:
        """Return what comes after the bytes that QEMU has already."""
        length = min(len(data), len(self._sent_ahead))
        if data[:length] != self._sent_ahead[:length]:
            raise RelayPeerError("the source's relay sent a stream that does not begin with QEVM")
        self._sent_ahead = self._sent_ahead[length:]
        return data[length:]

    async def _keep_flushing(self) -> None:
        while True:
            await self._queued.wait()
            self._queued.clear()
            await self._flush()

    async def _flush(self) -> None:
        try:
            await self._qemu.drain()
        except RelayLostError:
            # Once it has all memory, QEMU at the source must learn of this as without relays: by
            # the end of the return path.
            if not self._in_place:
                raise

    async def _finish_tags(self, frame: Frame) -> None:
        started = time.monotonic()
        await self._waiting.join()
        assert self._incoming
        with frame.fields() as fields:
            wanted = fields.integer("pages", 0, 1 << 63)
        if self._incoming.applied.pages != wanted:
            raise RelayPeerError(
                f"the tags of {counted(self._incoming.applied.pages, 'page')} are in place, and"
                f" the source sent {wanted:,}",
                hint="the guest was not started; it goes on at the source",
            )
        self._in_place = True
        self.report.held_seconds = time.monotonic() - started
        self._wire.send_map(Kind.APPLIED, {"pages": wanted})
        await self._wire.drain()
        await self._waiting.put(None)
        self._news.say("all tags are in place and were read back: the guest may start")

    async def _tags(self) -> None:
        assert self._incoming
        while (received := await self._waiting.get()) is not None:
            await self._worker.run(self._incoming.apply, received)
            self._waiting.task_done()

    # --- from QEMU -------------------------------------------------------------------------------

    async def _backward(self) -> None:
        while data := await self._read_back():
            self.report.back_bytes += len(data)
            self._confirmation.take(data)
            self._wire.send(Kind.BACK, data)
            await self._wire.drain()
        if not self._in_place:
            raise RelayLostError(
                "QEMU at the destination closed the connection before all memory had come",
                hint="see why in QEMU's log; the guest goes on at the source",
            )
        self._wire.send(Kind.EOF_BACK)
        await self._wire.drain()

    async def _read_back(self) -> bytes:
        try:
            return await self._qemu.read(_READ_BYTES)
        except RelayLostError:
            if not self._in_place:
                raise
            return b""

    async def _tell(self) -> None:
        while True:
            self._count()
            self._news.update(self.report)
            await asyncio.sleep(_NEWS_SECONDS)

    def _count(self) -> None:
        ending = "the last tags are put in place" if self._ram_ended else "taking memory"
        self.report.stage = "the guest may start" if self._in_place else ending
        if self._incoming is not None:
            self.report.tag_pages = self._incoming.applied.pages
            self.report.rounds = self._incoming.applied.frames
            self.report.copy_seconds = self._incoming.applied.write_seconds
