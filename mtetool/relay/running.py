"""One end of a relay, from opening its two channels to closing them."""

from __future__ import annotations

import asyncio
import gc
import mmap
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from mtetool.errors import MtetoolError
from mtetool.relay import guests
from mtetool.relay.address import Address
from mtetool.relay.channel import Channel
from mtetool.relay.channels import Opening, open_channel, turn_away
from mtetool.relay.destination import DestinationRelay
from mtetool.relay.report import News, Report
from mtetool.relay.source import SourceRelay
from mtetool.relay.wire import Hello, Wire

_T = TypeVar("_T")
Role = Literal["source", "destination"]


@dataclass(frozen=True, slots=True)
class Relay:
    """A relay that is to run: its role, QEMU's address and the other relay's, and its guest.

    The source's lets QEMU connect only when the destination is ready, so that nothing is started
    that cannot end well; with `listens_first`, before all else: libvirt starts the destination's
    QEMU itself, in the middle of a migration.
    """

    role: Role
    qemu: Address
    peer: Address
    wanted: guests.Wanted
    opening: Opening
    news: News
    listens_first: bool = False

    def run(self) -> Report:
        """Relay one migration. Raises MtetoolError."""
        # Nothing that was made until now is ever garbage, and looking through it would hold up the
        # stream, maybe while the guest is stopped.
        gc.freeze()
        return asyncio.run(self.open_and_run())

    async def open_and_run(self) -> Report:
        """As `run`, in a loop that runs already."""
        if not self.listens_first:
            return await self._with_qemu_last()
        opened = asyncio.ensure_future(open_channel(self.qemu, self.opening))
        try:
            await asyncio.sleep(0)  # it listens now, or has failed
            return await self._with_qemu(lambda: opened)
        finally:
            opened.cancel()
            with suppress(asyncio.CancelledError, MtetoolError):
                (await opened).abort()

    async def _with_qemu_last(self) -> Report:
        opened = False

        def opening() -> Awaitable[Channel]:
            nonlocal opened
            opened = True
            return open_channel(self.qemu, self.opening)

        try:
            return await self._with_qemu(opening)
        except BaseException:
            if not opened:
                turn_away(self.qemu)
            raise

    async def _with_qemu(self, opening: Callable[[], Awaitable[Channel]]) -> Report:
        wire = Wire(await open_channel(self.peer, self.opening))
        try:
            hello = Hello(self.role, mmap.PAGESIZE, socket.gethostname())
            there = await wire.hello(hello)
            work = self._source if self.role == "source" else self._destination
            report = await work(wire, opening)
            report.peer = there.host
        except MtetoolError as error:
            await wire.fail(error)
            raise
        except BaseException:
            wire.abort()
            raise
        await wire.close()
        return report

    async def _source(self, wire: Wire, opening: Callable[[], Awaitable[Channel]]) -> Report:
        # Only when the destination is ready is there a socket for QEMU.
        there = guests.Ready.of(await wire.receive())
        self.news.say("the destination is ready")
        qemu = await _while_connected(wire, opening())
        try:
            # libvirt connects, and passes the socket on: when something comes through, QEMU has it.
            first = await _while_connected(wire, qemu.read())
        except BaseException:
            qemu.abort()
            raise
        return await SourceRelay(wire, qemu, first, self.news).run(self.wanted, there)

    async def _destination(self, wire: Wire, opening: Callable[[], Awaitable[Channel]]) -> Report:
        qemu = await _while_connected(wire, opening())
        return await DestinationRelay(wire, qemu, self.news).run(self.wanted)


async def _while_connected(wire: Wire, waiting: Awaitable[_T]) -> _T:
    """Wait for QEMU, and notice if the other relay gives up meanwhile."""
    opened = asyncio.ensure_future(waiting)
    watching = asyncio.create_task(wire.receive())
    try:
        await asyncio.wait({opened, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            raise guests.unexpected(watching.result())
        return opened.result()
    finally:
        watching.cancel()
        if not opened.done():
            opened.cancel()
        with suppress(asyncio.CancelledError, MtetoolError):
            await watching
