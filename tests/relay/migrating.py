"""A migration through both relays in one process: emulated guests, and QEMUs that tests script."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np

from mtetool.backends import open_guest
from mtetool.backends.emu.guest import create_emulated
from mtetool.errors import MtetoolError
from mtetool.guest import Guest, GuestOptions, Memslot
from mtetool.relay import guests
from mtetool.relay.address import Side, parse
from mtetool.relay.channels import Opening
from mtetool.relay.guests import Wanted
from mtetool.relay.report import News, Report
from mtetool.relay.running import Relay, Role
from mtetool.tags import Tags
from tests.relay import streams

BASE = 0x4000_0000
N_PAGES = 64
TAIL = b"device state, and its description"
CONFIRMED = bytes.fromhex("0002 0004 00000001 0001 0004 00000000")


@dataclass
class Side_:
    """One host: its guest, its relay, and what the relay said and returned."""

    role: Role
    path: Path
    page_bytes: int = 4096
    mte: bool = True
    n_pages: int = N_PAGES
    said: list[str] = field(default_factory=list)
    guest: Guest = field(init=False)
    task: asyncio.Task[Report] | None = None

    def make(self) -> None:
        size = self.n_pages * 4096
        create_emulated(
            str(self.path),
            page_size_bytes=self.page_bytes,
            memslots=(Memslot(0, BASE, size, False, "ram"),),
            mte=self.mte,
            vcpus=0,
        )
        self.guest = open_guest(f"emu:{self.path}")

    def tags(self) -> Tags:
        out = np.zeros(N_PAGES * 256, np.uint8)
        self.guest.read_tags(BASE, out)
        return out

    def tag(self, page: int, tags: Tags) -> None:
        """Set the tags of pages of 4 KiB, from one on."""
        unit = self.page_bytes // 4096
        whole = self.tags().reshape(-1, 256)
        whole[page : page + len(tags) // 256] = tags.reshape(-1, 256)
        first = page // unit * unit
        self.guest.write_tags(BASE + first * 4096, whole[first:].ravel())

    def start(self, qemu: str, peer: str) -> None:
        relay = Relay(
            self.role,
            parse(qemu, Side.QEMU),
            parse(peer, Side.RELAY),
            Wanted(f"emu:{self.path}", GuestOptions()),
            Opening(retry_seconds=5.0),
            News(self.said.append),
        )
        self.task = asyncio.create_task(relay.open_and_run())

    async def error(self) -> MtetoolError:
        """Wait for the relay to fail; return its error."""
        assert self.task
        try:
            report = await self.task
        except MtetoolError as error:
            return error
        raise AssertionError(f"the relay ended well: {report}")

    async def report(self) -> Report:
        assert self.task
        return await self.task


@dataclass
class Scene:
    """Both hosts, and the sockets of both QEMUs once they are connected."""

    directory: Path
    source: Side_
    destination: Side_
    out: socket.socket
    into: socket.socket

    async def write(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.out, data)

    async def passed(self, length: int) -> bytes:
        """Read that much at the destination."""
        data = b""
        while len(data) < length and (more := await self.arrived(length - len(data))):
            data += more
        return data

    async def arrived(self, most: int = 1 << 20) -> bytes:
        """Read what is there at the destination; b"" at the end."""
        with suppress(ConnectionResetError):
            return await asyncio.get_running_loop().sock_recv(self.into, most)
        return b""

    async def back(self) -> bytes:
        """Read what is there at the source; b"" at the end."""
        with suppress(ConnectionResetError):
            return await asyncio.get_running_loop().sock_recv(self.out, 1 << 20)
        return b""

    async def nothing_passes(self) -> None:
        """Check that the destination gets nothing, as long as it takes to be sure."""
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                raise AssertionError(f"passed: {await self.arrived()!r}")

    async def confirm(self) -> None:
        """Let the destination's QEMU report success, and both close."""
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self.into, CONFIRMED)
        data = b""
        while len(data) < len(CONFIRMED):
            data += await loop.sock_recv(self.out, 64)
        assert data == CONFIRMED
        self.into.close()
        self.out.close()


def beginning(*, return_path: bool = True, n_pages: int = N_PAGES) -> bytes:
    """A stream up to the first page."""
    return (
        streams.HEADER
        + streams.configuration(streams.page_bits(), machine="virt-11.1")
        + (streams.command(1) if return_path else b"")
        + streams.start(streams.block_list([(streams.RAM, n_pages * 4096)]) + streams.END_OF_DATA)
    )


def pages(numbers: Sequence[int], form: int = streams.ZERO) -> bytes:
    """The data of a section with those pages."""
    rows = [streams.Record(streams.RAM, number, form) for number in numbers]
    return streams.records([rows])[0]


@asynccontextmanager
async def scene(
    directory: Path,
    *,
    source_page: int = 4096,
    destination_page: int = 4096,
    destination_mte: bool = True,
    n_pages: int = N_PAGES,
    destination_pages: int | None = None,
    left: tuple[int, Tags] | None = None,
) -> AsyncIterator[Scene]:
    """Both relays, connected to QEMUs of the test; nothing has been sent yet.

    `left` are tags that the destination has from an earlier attempt, from a page on.
    """
    source = Side_("source", directory / "source", source_page, n_pages=n_pages)
    destination = Side_(
        "destination", directory / "destination", destination_page, destination_mte,
        destination_pages or n_pages,
    )  # fmt: skip
    source.make()
    destination.make()
    if left is not None:
        destination.tag(*left)
    opened = {f"emu:{side.path}": side.guest for side in (source, destination)}
    between, out, into = (directory / name for name in ("between", "out", "into"))
    with (
        # The relays and the test use one guest each: its file has one user at a time.
        patch.object(guests, "open_guest", lambda name, options: opened[name]),
        patch.object(type(source.guest), "close", lambda self: None),
        socket.socket(socket.AF_UNIX) as incoming,
        socket.socket(socket.AF_UNIX) as outgoing,
    ):
        incoming.bind(str(into))
        incoming.listen(1)
        incoming.setblocking(False)
        outgoing.setblocking(False)
        destination.start(f"unix:{into}", f"listen:unix:{between}")
        source.start(f"listen:unix:{out}", f"unix:{between}")
        loop = asyncio.get_running_loop()
        connected, _ = await loop.sock_accept(incoming)
        connected.setblocking(False)
        made = Scene(directory, source, destination, outgoing, connected)
        while not out.exists() and source.task and not source.task.done():
            await asyncio.sleep(0.01)
        if out.exists():
            await loop.sock_connect(outgoing, str(out))
        try:
            yield made
        finally:
            connected.close()
            for side in (source, destination):
                if side.task and not side.task.done():
                    side.task.cancel()
                with suppress(MtetoolError, asyncio.CancelledError):
                    if side.task:
                        await side.task
