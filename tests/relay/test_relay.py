"""Both relays: tags come before the end of the stream, or the end does not come."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest

from mtetool.errors import (
    GuestLostError,
    LayoutError,
    MteOffError,
    RelayFailedError,
    RelayLostError,
    RelayPeerError,
    StreamDamagedError,
    StreamUnsupportedError,
)
from mtetool.guest import GuestOptions
from mtetool.relay import source
from mtetool.relay.address import Side, parse
from mtetool.relay.channels import Opening
from mtetool.relay.destination import DestinationRelay
from mtetool.relay.guests import Wanted
from mtetool.relay.incoming import Incoming
from mtetool.relay.report import News
from mtetool.relay.running import Relay
from tests.relay import streams
from tests.relay.migrating import (
    N_PAGES,
    TAIL,
    Scene,
    beginning,
    pages,
    scene,
)
from tests.relay.opening import run


def _random(n_pages: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(1, 16, n_pages * 256, dtype=np.uint8)


async def _all_but_the_end(made: Scene) -> bytes:
    """Send all pages, let the guest change some tags, send these again; the tail comes too."""
    made.source.tag(3, _random(20, 1))
    sent = beginning() + streams.part(pages(range(N_PAGES)))
    await made.write(sent)
    assert await made.passed(len(sent)) == sent
    made.source.tag(5, _random(2, 2))
    made.source.tag(9, np.zeros(256, np.uint8))
    last = streams.command(11) + streams.end(pages([5, 6, 9]))
    await made.write(last + TAIL)
    assert await made.passed(len(last)) == last
    return TAIL


@pytest.mark.parametrize(
    ("source_page", "destination_page"), [(4096, 4096), (4096, 16384), (16384, 4096)]
)
def test_every_tag_is_there_before_the_end_of_the_stream(
    tmp_path: Path, source_page: int, destination_page: int
) -> None:
    async def test() -> None:
        async with scene(
            tmp_path, source_page=source_page, destination_page=destination_page
        ) as made:
            tail = await _all_but_the_end(made)
            assert await made.passed(len(tail)) == tail
            assert np.array_equal(made.destination.tags(), made.source.tags())
            assert made.destination.tags().any()
            await made.confirm()
            source, destination = await made.source.report(), await made.destination.report()
            assert source.finished
            assert destination.finished
            assert source.tag_pages * source_page == destination.tag_pages * source_page > 0
            assert source.held_seconds is not None

    run(test())


def test_destination_gets_the_beginning_before_the_source_connects(tmp_path: Path) -> None:
    """QEMU 11.1 answers its monitor only then; see test_qemu."""

    async def test() -> None:
        async with scene(tmp_path) as made:
            assert await made.passed(4) == b"QEVM"
            sent = beginning() + streams.part(pages(range(N_PAGES)))
            for cut in (sent[:1], sent[1:6], sent[6:]):
                await made.write(cut)
            assert await made.passed(len(sent) - 4) == sent[4:]

    run(test())


def test_destination_takes_no_stream_with_another_beginning() -> None:
    relay = DestinationRelay(Mock(), Mock(), Mock())
    assert relay._after_beginning(b"QE") == b""
    with pytest.raises(RelayPeerError, match="QEVM"):
        relay._after_beginning(b"VX and more")


def test_tags_do_not_wait_until_qemu_has_read_its_memory(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as made:
            made.source.tag(3, _random(20, 1))
            # More than a socket holds.
            again = b"".join(streams.part(pages(range(N_PAGES), streams.FULL)) for _ in range(8))
            sent = beginning() + again + streams.command(11) + streams.end(pages([3])) + TAIL
            writing = asyncio.create_task(made.write(sent))
            while not any("all tags are in place" in text for text in made.destination.said):
                await asyncio.sleep(0.01)
            assert np.array_equal(made.destination.tags(), made.source.tags())
            assert await made.passed(len(sent)) == sent
            await writing
            await made.confirm()
            assert (await made.source.report()).finished

    run(test())


def test_last_tags_are_read_while_qemu_saves_its_devices(tmp_path: Path) -> None:
    """QEMU keeps the last bytes of RAM until then, and the guest stands still already."""

    async def test() -> None:
        with patch.multiple(source, _COLLECTING_SECONDS=1e3, _MOST_COLLECTING_SECONDS=1e3):
            async with scene(tmp_path) as made:
                sent = beginning() + streams.part(pages(range(N_PAGES)))
                await made.write(sent)
                assert await made.passed(len(sent)) == sent
                made.source.tag(3, _random(20, 1))
                end = streams.end(pages(range(3, 23)))
                await made.write(end[:-1])
                while not np.array_equal(made.destination.tags(), made.source.tags()):
                    await asyncio.sleep(0.01)
                await made.write(end[-1:] + TAIL)
                assert await made.passed(len(end + TAIL)) == end + TAIL
                await made.confirm()
                last = (await made.source.report()).last_pages
                assert last is not None
                assert last >= 20

    run(test())


def test_tags_of_an_earlier_attempt_do_not_stay(tmp_path: Path) -> None:
    """QEMU may wait for another migration after one that failed."""

    async def test() -> None:
        async with scene(tmp_path, left=(40, _random(8, 5))) as made:
            tail = await _all_but_the_end(made)
            assert await made.passed(len(tail)) == tail
            assert np.array_equal(made.destination.tags(), made.source.tags())
            assert "cleared the tags of 8 pages that had some before" in made.destination.said

    run(test())


def test_return_path_is_required(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as made:
            await made.write(beginning(return_path=False))
            assert isinstance(error := await made.source.error(), StreamUnsupportedError)
            assert "return-path" in error.message
            assert isinstance(await made.destination.error(), RelayFailedError)
            assert await made.back() == b""
            while await made.arrived():
                pass

    run(test())


def test_destination_without_mte_is_said_before_qemu_can_connect(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, destination_mte=False) as made:
            assert isinstance(await made.destination.error(), MteOffError)
            error = await made.source.error()
            assert isinstance(error, RelayFailedError)
            assert error.message.startswith("the destination's relay: MTE is off")
            assert not (tmp_path / "out").exists()

    run(test())


def test_guest_of_another_size_is_refused(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path, destination_pages=N_PAGES // 2) as made:
            await made.write(beginning())
            assert isinstance(await made.source.error(), LayoutError)
            assert isinstance(await made.destination.error(), RelayFailedError)
            assert await made.back() == b""
            assert await made.arrived() == b"QEVM"

    run(test())


def test_destination_that_is_lost_before_qemu_says_anything(tmp_path: Path) -> None:
    """libvirt may hold the connection for a while before QEMU gets it."""

    async def test() -> None:
        async with scene(tmp_path) as made:
            assert made.destination.task
            made.destination.task.cancel()
            assert isinstance(await made.source.error(), RelayLostError)
            assert await made.back() == b""

    run(test())


@pytest.mark.parametrize("end", ["source", "destination"])
def test_qemu_that_gives_up_before_the_end(tmp_path: Path, end: str) -> None:
    async def test() -> None:
        async with scene(tmp_path) as made:
            sent = beginning() + streams.part(pages(range(N_PAGES)))
            await made.write(sent)
            assert await made.passed(len(sent)) == sent
            if end == "source":
                made.out.close()
                assert isinstance(await made.source.error(), GuestLostError)
                assert isinstance(await made.destination.error(), RelayFailedError)
                assert await made.arrived() == b""
            else:
                made.into.close()
                assert isinstance(await made.destination.error(), RelayLostError)
                assert isinstance(await made.source.error(), RelayFailedError)
                assert await made.back() == b""

    run(test())


@pytest.mark.parametrize("end", ["source", "destination"])
def test_relay_that_ends_before_the_tags_are_in_place(tmp_path: Path, end: str) -> None:
    """As at its death: its sockets close."""

    async def test() -> None:
        async with scene(tmp_path) as made:
            sent = beginning() + streams.part(pages(range(N_PAGES)))
            await made.write(sent)
            assert await made.passed(len(sent)) == sent
            ended, other = made.source, made.destination
            if end == "destination":
                ended, other = other, ended
            assert ended.task
            ended.task.cancel()
            assert isinstance(await other.error(), RelayLostError)
            assert await made.back() == b""
            assert await made.arrived() == b""

    run(test())


def test_stream_that_makes_no_sense_goes_no_further(tmp_path: Path) -> None:
    async def test() -> None:
        async with scene(tmp_path) as made:
            await made.write(b"QEVM" + bytes(100))
            assert isinstance(
                await made.source.error(), StreamDamagedError | StreamUnsupportedError
            )
            assert await made.arrived() == b"QEVM"

    run(test())


def test_lost_destination_after_the_end_leaves_the_source_paused(tmp_path: Path) -> None:
    """The guest may run there: QEMU's connection stays open until somebody cancels."""

    async def test() -> None:
        async with scene(tmp_path) as made:
            tail = await _all_but_the_end(made)
            assert await made.passed(len(tail)) == tail
            assert made.destination.task
            made.destination.task.cancel()
            while not any("stays paused" in said for said in made.source.said):
                assert made.source.task
                assert not made.source.task.done()
                await asyncio.sleep(0.01)
            assert made.source.task
            assert not made.source.task.done()
            made.out.close()
            assert isinstance(await made.source.error(), RelayLostError)

    run(test())


def test_migration_that_is_cancelled_while_its_end_waits(tmp_path: Path) -> None:
    """QEMU has written the end, and the guest runs at the source: it must not start elsewhere."""
    may_apply = threading.Event()
    apply = Incoming.apply

    def late(self: Incoming, received: bytes) -> None:
        may_apply.wait(20)
        apply(self, received)

    async def test() -> None:
        with patch.object(Incoming, "apply", late):
            async with scene(tmp_path) as made:
                await _all_but_the_end(made)
                made.out.close()
                may_apply.set()
                assert isinstance(error := await made.source.error(), GuestLostError)
                assert "cancelled" in (error.hint or "")
                assert isinstance(await made.destination.error(), RelayFailedError)
                assert await made.arrived() == b""

    run(test())


def test_destination_that_confirms_nothing(tmp_path: Path) -> None:
    """QEMU could not load the end: the return path ends, as without relays."""

    async def test() -> None:
        async with scene(tmp_path) as made:
            tail = await _all_but_the_end(made)
            assert await made.passed(len(tail)) == tail
            made.into.close()
            assert await made.back() == b""
            made.out.close()
            assert isinstance(await made.source.error(), GuestLostError)
            assert isinstance(await made.destination.error(), GuestLostError)

    run(test())


@pytest.mark.parametrize("listens_first", [False, True])
def test_whoever_waits_at_an_inherited_socket_is_turned_away(
    tmp_path: Path, listens_first: bool
) -> None:
    """Otherwise systemd would start the relay for the same connection again and again."""

    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as managers, socket.socket(socket.AF_UNIX) as qemu:
            managers.bind(f"{tmp_path}/s")
            managers.listen()
            qemu.connect(f"{tmp_path}/s")
            relay = Relay(
                "source",
                parse(f"fd:{os.dup(managers.fileno())}", Side.QEMU),
                parse("exec:true", Side.RELAY),
                Wanted(None, GuestOptions()),
                Opening(),
                News(lambda text: None),
                listens_first,
            )
            with pytest.raises(RelayLostError):
                await relay.open_and_run()
            qemu.setblocking(False)
            assert qemu.recv(1) == b""
            managers.setblocking(False)
            with pytest.raises(BlockingIOError):
                managers.accept()

    run(test())
