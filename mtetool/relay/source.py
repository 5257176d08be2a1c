"""The relay at the source: it looks at QEMU's stream, and sends tags beside it.

Pages that pass are dirty ones: QEMU takes a page out of its dirty log before it sends the page, and
a guest that only changes tags dirties the page, too. So for each page that passes, the tags are
read after it passed; if they change later, the page comes again. When RAM's last section has
begun, the guest stands still, and the tags of all pages that are still marked, or yet to pass, can
be read at once, and each only once: QEMU still has to save its devices. Until the other relay has
all tags in place, this one sends nothing further.

Nothing here waits for tags but the stream's end; reading them happens in a thread of its own.
"""

from __future__ import annotations

import asyncio
import select
import time
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING

from mtetool.errors import (
    GuestLostError,
    MtetoolError,
    RelayLostError,
    RelayPeerError,
    StreamUnsupportedError,
)
from mtetool.relay import guests
from mtetool.relay.confirmation import Confirmation
from mtetool.relay.frames import Frame, Kind
from mtetool.relay.outgoing import Outgoing
from mtetool.relay.placing import place
from mtetool.relay.report import News, Report
from mtetool.relay.stream import RamStream
from mtetool.relay.together import Worker, all_of
from mtetool.words import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mtetool.guest import Extent, Guest
    from mtetool.relay.channel import Channel
    from mtetool.relay.wire import Wire

_READ_BYTES = 1 << 20
# While the guest runs, pages are collected for so long before their tags are read, and for longer
# if reading takes longer: then fewer chains of calls are needed, and the stream has the processor.
_COLLECTING_SECONDS = 0.05
_MOST_COLLECTING_SECONDS = 1.0
_COLLECTING_RATIO = 3
# So many pages may pass before their tags are read, and more in a large guest: looking for the
# marks takes longer there.
_LEAST_PASSED = 16384
# When the guest stops, tags that are just being read may have been changed since, so they are read
# again: no step may take long. The other relay writes those of one step while this one reads on.
_STEP_SECONDS = 0.1
_NEWS_SECONDS = 0.5


class SourceRelay:
    """One migration, from the first byte of QEMU's stream to its last."""

    def __init__(self, wire: Wire, qemu: Channel, first: bytes, news: News) -> None:
        """`first` are the first bytes of QEMU's stream."""
        self._wire = wire
        self._qemu = qemu
        self._news = news
        self._stream = RamStream()
        self._marked = asyncio.Event()
        self._room = asyncio.Event()
        self._passed_before = self._most_passed = 0
        self._collecting_seconds = _COLLECTING_SECONDS
        self._in_place = asyncio.Event()
        self._stopping = self._ram_ended = False
        self._sending: Future[None] | None = None
        self._all_sent = self._tail_sent = self._qemu_ended = False
        self._outgoing: Outgoing | None = None
        self._confirmation = Confirmation()
        self._worker = Worker("tags")
        self._first = first
        self.report = Report("source")

    async def run(self, wanted: guests.Wanted, there: guests.Ready) -> Report:
        """Relay the migration to a destination that is ready; then QEMU's connection is closed.

        Raises MtetoolError: then the guest goes on at the source, or the error says where it is.
        """
        started = time.monotonic()
        try:
            name, guest = await self._worker.run(guests.open_for, wanted, self._qemu)
            self.report.guest = name
            try:
                here = await self._worker.run(guests.ready, guest, name)
                guests.check_same_memory(here.memory, there.memory)
                self._wire.send_map(Kind.READY, here.fields())
                await self._relay(guest, here.memory)
            finally:
                self._qemu.abort()  # first of all: QEMU does not wait for what follows
                await self._worker.run(guest.close)
        finally:
            self._qemu.abort()
            self._worker.close()
            self.report.elapsed_seconds = time.monotonic() - started
        return self.report

    async def _relay(self, guest: Guest, memory: list[Extent]) -> None:
        telling = asyncio.create_task(self._tell())
        try:
            await all_of(
                self._forward(),
                self._backward(),
                self._tags(guest, memory),
                beside=[self._wire.stay_alive()],
            )
            self._confirmation.check()
        except MtetoolError as error:
            if self._tail_sent and not self._qemu_ended:
                await self._stay_paused(error)
            raise
        finally:
            # The thread that reads tags must not wait for a relay that does not listen.
            self._stopping = True
            if self._sending is not None:
                self._sending.cancel()
            telling.cancel()
            self._count()
            self._news.update(self.report)

    # --- towards the destination ----------------------------------------------------------

    async def _forward(self) -> None:
        while data := self._first or await self._qemu.read(_READ_BYTES):
            self._first = b""
            self.report.stream_bytes += len(data)
            at = self._stream.feed(data)
            self._check_return_path()
            if at is None:
                self._wire.send(Kind.DATA, data)
                await self._wire.drain()
                self._marked.set()
                await self._wait_for_tags()
                continue
            self._wire.send(Kind.DATA, memoryview(data)[:at])
            self._wire.send(Kind.END_OF_RAM)
            self._ram_ended = True
            self._marked.set()
            await self._wire.drain()
            await self._hold()
            self._check_qemu_waits()
            # From here on, the destination may start at any time.
            self._tail_sent = True
            self._wire.send(Kind.DATA, memoryview(data)[at:])
            await self._wire.drain()
            await self._forward_tail()
            return
        raise GuestLostError(
            "QEMU ended its stream before all memory had passed",
            hint="see why at the source: query-migrate, virsh domjobinfo; the guest goes on there",
        )

    async def _wait_for_tags(self) -> None:
        """Let the stream wait if tags fall behind: not all of them may be left for the end.

        The guest goes on meanwhile. What has no contents passes much faster than tags are read.
        """
        if self._stream.blocks and not self._most_passed:
            n_pages = sum(len(marks) for marks in self._stream.marks)
            self._most_passed = max(_LEAST_PASSED, n_pages // 256)
        while not self._stream.in_ram_end and self._n_passed() > self._most_passed:
            self._room.clear()
            await self._room.wait()

    async def _hold(self) -> None:
        started = time.monotonic()
        self._news.say("the guest has stopped; the end of the stream waits for the last tags")
        await self._in_place.wait()
        self.report.held_seconds = time.monotonic() - started

    def _check_qemu_waits(self) -> None:
        """Check that QEMU did not close the connection while it was not read.

        If the migration was cancelled meanwhile, the guest runs at the source, and the end of the
        stream, which QEMU had written before, must not start it at the destination.
        """
        poll = select.poll()
        if self._qemu.peer_socket is not None:
            poll.register(self._qemu.peer_socket, select.POLLRDHUP)
        if poll.poll(0):
            raise GuestLostError(
                "QEMU ended the migration while the end of its stream waited for tags",
                hint="it was probably cancelled; the guest goes on at the source",
            )

    async def _forward_tail(self) -> None:
        while data := await self._qemu.read(_READ_BYTES):
            self.report.stream_bytes += len(data)
            self._wire.send(Kind.DATA, data)
            await self._wire.drain()
        self._qemu_ended = True
        self._wire.send(Kind.EOF_DATA)
        await self._wire.drain()

    def _check_return_path(self) -> None:
        if self._stream.blocks and not self._stream.return_path:
            raise StreamUnsupportedError(
                "return-path is off in QEMU: it would report the migration as completed while the"
                " tags of the last pages are still on their way",
                hint="switch it on at both ends: migrate_set_capability return-path on",
            )

    # --- tags --------------------------------------------------------------------------------

    async def _tags(self, guest: Guest, memory: list[Extent]) -> None:
        while not self._stream.blocks:
            await self._next_marks()
        regions = await self._worker.run(guest.regions)
        placed = place(self._stream.blocks, memory, regions, self._stream.machine)
        self._outgoing = Outgoing(
            guest, placed, self._stream.page_bytes, step_seconds=_STEP_SECONDS
        )
        while True:
            is_last = self._ram_ended
            await self._round(self._outgoing)
            if is_last:
                break
            await self._next_marks()
        self._all_sent = True
        self._wire.send_map(Kind.ALL_TAGS, {"pages": self._outgoing.sent.pages})
        await self._wire.drain()

    async def _next_marks(self) -> None:
        """Wait for marks; while the guest runs, for more than a few."""
        await self._marked.wait()
        self._marked.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._collecting_seconds):
                while not self._stream.in_ram_end and self._n_passed() < self._most_passed // 2:
                    await self._marked.wait()
                    self._marked.clear()

    async def _round(self, outgoing: Outgoing) -> None:
        """Send the tags of all pages that are marked now; of fewer if the guest stops meanwhile."""
        stands_still = self._stream.in_ram_end
        n_pages = 0
        if self._n_passed() or outgoing.n_left:
            self._passed_before = self._stream.n_records
            taken = self._stream.take_marks()
            self._room.set()
            self.report.rounds += 1
            n_pages = await self._send_tags_of(outgoing, taken, stands_still=stands_still)
        if stands_still:
            self.report.last_pages = (self.report.last_pages or 0) + n_pages

    async def _send_tags_of(
        self, outgoing: Outgoing, marks: list[NDArray[np.uint8]], *, stands_still: bool
    ) -> int:
        """Send the tags of pages with a mark; return how many these were."""
        loop = asyncio.get_running_loop()

        def emit(packed: bytes) -> None:
            if self._stopping:
                raise asyncio.CancelledError
            self._sending = asyncio.run_coroutine_threadsafe(self._send_tags(packed), loop)
            self._sending.result()

        def has_stopped() -> bool:
            return self._stream.in_ram_end and not stands_still

        started = loop.time()
        n_pages = await self._worker.run(
            outgoing.round, marks, emit, has_stopped, stands_still=stands_still
        )
        seconds = (loop.time() - started) * _COLLECTING_RATIO
        self._collecting_seconds = min(max(seconds, _COLLECTING_SECONDS), _MOST_COLLECTING_SECONDS)
        return n_pages

    async def _send_tags(self, packed: bytes) -> None:
        self._wire.send(Kind.TAGS, packed)
        await self._wire.drain()

    def _n_passed(self) -> int:
        """How many records of pages have passed since marks were last taken."""
        return self._stream.n_records - self._passed_before

    # --- from the destination ----------------------------------------------------------------

    async def _backward(self) -> None:
        while True:
            frame = await self._wire.receive()
            if frame.kind is Kind.BACK:
                self.report.back_bytes += len(frame.payload)
                self._confirmation.take(frame.payload)
                with suppress(RelayLostError):  # QEMU may have what it needs, and be gone
                    self._qemu.write(frame.payload)
                    await self._qemu.drain()
            elif frame.kind is Kind.EOF_BACK:
                await self._qemu.half_close()
            elif frame.kind is Kind.APPLIED and self._all_sent:
                self._check_applied(frame)
                self._in_place.set()
            elif frame.kind is Kind.BYE:
                self.report.finished = True
                return
            else:
                raise guests.unexpected(frame)

    def _check_applied(self, frame: Frame) -> None:
        with frame.fields() as fields:
            pages = fields.integer("pages", 0, 1 << 63)
        if self._outgoing is None or pages != self._outgoing.sent.pages:
            raise RelayPeerError(
                f"the destination's relay has put the tags of {counted(pages, 'page')} in place,"
                " which are not all",
                hint="the guest goes on at the source",
            )

    async def _stay_paused(self, error: MtetoolError) -> None:
        """Keep QEMU from going on: the guest may run at the destination by now.

        If QEMU's connection ended, the source would resume the guest.
        """
        self._news.say(
            f"{error.message}, after the end of the stream was sent: the guest may run at the"
            " destination, so it stays paused here. If it runs there, end QEMU at the source; if"
            " not, cancel the migration at the source (migrate_cancel, virsh domjobabort), and it"
            " goes on there. Do not end this relay before: it ends with the migration"
        )
        while await self._qemu.read(_READ_BYTES):
            pass

    # --- for the user --------------------------------------------------------------------------

    async def _tell(self) -> None:
        while True:
            self._count()
            self._news.update(self.report)
            await asyncio.sleep(_NEWS_SECONDS)

    def _stage(self) -> str:
        if self._tail_sent:
            return "the guest is handed over"
        if self._ram_ended:
            return "the guest has stopped, its last tags are on their way"
        return f"round {self.report.rounds}"

    def _count(self) -> None:
        stream, report = self._stream, self.report
        report.stage = self._stage()
        report.machine = stream.machine
        report.stream_pages = stream.n_records
        total = sum(block.size_bytes for block in stream.blocks)
        report.memory_pages = total // stream.page_bytes if total else None
        if self._outgoing is not None:
            sent = self._outgoing.sent
            report.read_pages = sent.read_pages
            report.tag_pages, report.tag_bytes = sent.pages, sent.bytes
            report.copy_seconds = sent.read_seconds
