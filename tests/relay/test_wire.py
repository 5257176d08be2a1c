"""Frames and the conversation of two relays: what arrives is what was sent, or an error."""

from __future__ import annotations

import asyncio
import resource
import socket
import struct

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.errors import (
    MtetoolError,
    RelayFailedError,
    RelayLostError,
    RelayPeerError,
    UsageError,
)
from mtetool.files.fields import pack_map
from mtetool.relay.address import Side
from mtetool.relay.channel import of_socket
from mtetool.relay.frames import HEADER, MAGIC, MAX_BULK_BYTES, PROLOGUE, VERSION, Kind, header
from mtetool.relay.together import all_of as all_tasks
from mtetool.relay.wire import Hello, Wire
from tests.relay.opening import opened, run

_SOURCE = Hello("source", 4096, "there", "9.9")
_DESTINATION = Hello("destination", 65536, "here")
_BULK = (Kind.DATA, Kind.BACK, Kind.TAGS)
_PROLOGUE = PROLOGUE.pack(MAGIC, VERSION, 0)


def _wires() -> tuple[Wire, Wire]:
    ours, theirs = socket.socketpair()
    return Wire(of_socket(ours, "ours")), Wire(of_socket(theirs, "theirs"))


async def _said(data: bytes, *, ends: bool = True) -> tuple[Wire, socket.socket]:
    """A wire at whose other end these bytes were written."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    await asyncio.get_running_loop().sock_sendall(theirs, data)
    if ends:
        theirs.shutdown(socket.SHUT_WR)
    return Wire(of_socket(ours, "theirs")), theirs


def _frames(*frames: tuple[Kind, bytes], first: int = 0) -> bytes:
    return b"".join(
        header(number, kind, (data,)) + data for number, (kind, data) in enumerate(frames, first)
    )


def _hello(role: str = "source", **more: object) -> bytes:
    fields = {"role": role, "page_size_bytes": 4096, "host": "h", "mtetool": "1", **more}
    return _frames((Kind.HELLO, pack_map(fields)))


async def _all(wire: Wire) -> list[tuple[Kind, bytes]]:
    result: list[tuple[Kind, bytes]] = []
    while not result or result[-1][0] is not Kind.BYE:
        frame = await wire.receive()
        result.append((frame.kind, bytes(frame.payload)))
    return result


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(_BULK),
            st.lists(st.binary(max_size=300) | st.just(b"x" * 300_000), max_size=4),
        ),
        max_size=8,
    )
)
def test_frames_arrive_as_they_were_sent(frames: list[tuple[Kind, list[bytes]]]) -> None:
    async def test() -> None:
        ours, theirs = _wires()
        said, heard = await asyncio.gather(ours.hello(_SOURCE), theirs.hello(_DESTINATION))
        assert (said, heard) == (_DESTINATION, _SOURCE)
        receiving = asyncio.create_task(_all(theirs))
        for kind, parts in frames:
            ours.send(kind, *parts)
            await ours.drain()
        ours.send(Kind.BYE)
        await ours.drain()
        assert (await receiving)[:-1] == [(kind, b"".join(parts)) for kind, parts in frames]
        await asyncio.gather(ours.close(), theirs.close())

    run(test())


def test_parts_of_other_types() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        words = memoryview(struct.pack("=4I", 1, 2, 3, 4)).cast("I")
        ours.send(Kind.TAGS, bytearray(b"abc"), words)
        await ours.drain()
        assert (await theirs.receive()).payload == b"abc" + words.tobytes()
        ours.abort()
        theirs.abort()

    run(test())


def test_a_frame_that_is_too_long_is_not_sent() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        with pytest.raises(ValueError, match="a DATA frame of"):
            ours.send(Kind.DATA, bytes(MAX_BULK_BYTES), bytes(70_000))
        ours.send(Kind.DATA, b"x")
        await ours.drain()
        assert (await theirs.receive()).payload == b"x"
        ours.abort()
        theirs.abort()

    run(test())


def test_a_receive_that_is_cancelled_within_a_frame() -> None:
    data = _frames((Kind.DATA, b"0123456789"), (Kind.BYE, b""))

    async def test() -> None:
        for cut in range(len(data)):
            wire, theirs = await _said(data[:cut], ends=False)
            received = []
            while True:
                try:
                    async with asyncio.timeout(0.002):
                        received.append(await wire.receive())
                except TimeoutError:
                    break
            theirs.send(data[cut:])
            while len(received) < 2:
                received.append(await wire.receive())
            assert [(frame.kind, frame.payload) for frame in received] == [
                (Kind.DATA, b"0123456789"),
                (Kind.BYE, b""),
            ]
            wire.abort()
            theirs.close()

    run(test())


# --- what is no frame

_SOME = _frames((Kind.DATA, b"some data"), (Kind.APPLIED, pack_map({"pages": 7})), (Kind.BYE, b""))


def test_frames_that_are_cut_anywhere() -> None:
    async def test() -> None:
        for cut in range(len(_SOME)):
            wire, theirs = await _said(_SOME[:cut])
            with pytest.raises(RelayLostError, match="ended the connection"):
                await _all(wire)
            wire.abort()
            theirs.close()

    run(test())


def test_every_byte_matters() -> None:
    async def test() -> None:
        for place in range(len(_SOME)):
            for change in (0x01, 0x80, 0xFF):
                data = bytearray(_SOME)
                data[place] ^= change
                wire, theirs = await _said(bytes(data))
                with pytest.raises((RelayPeerError, RelayLostError)):
                    await _all(wire)
                wire.abort()
                theirs.close()

    run(test())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_frames((Kind.DATA, b"a"), first=1), "a DATA frame, number 0, with a wrong checksum"),
        (_frames((Kind.DATA, b"a")) * 2, "number 1, with a wrong checksum"),
        (HEADER.pack(0, 0, 0), "a frame of the unknown kind 0"),
        (HEADER.pack(99, 0, 0), "a frame of the unknown kind 99"),
        (HEADER.pack(Kind.DATA, 0xFFFF_FFFF, 0), "a DATA frame of 4,294,967,295 bytes"),
        (HEADER.pack(Kind.HELLO, 0x1_0001, 0), "a HELLO frame of 65,537 bytes"),
        (HEADER.pack(Kind.BYE, 1, 0), "a BYE frame of 1 bytes"),
    ],
)
def test_frames_that_cannot_be(data: bytes, message: str) -> None:
    async def test() -> None:
        wire, theirs = await _said(data)
        with pytest.raises(RelayPeerError, match=message):
            await _all(wire)
        wire.abort()
        theirs.close()

    run(test())


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_anything_else_is_an_error(data: bytes, after_the_prologue: bool) -> None:
    async def test() -> None:
        wire, theirs = await _said(_PROLOGUE + data if after_the_prologue else data)
        with pytest.raises((RelayPeerError, RelayLostError)):
            await wire.hello(_DESTINATION, 5)
        wire.abort()
        theirs.close()

    run(test())


def test_memory_is_bounded_while_nobody_receives() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data = bytes(1 << 20)

        async def send() -> None:
            while True:
                ours.send(Kind.DATA, data)
                await ours.drain()

        sending = asyncio.create_task(send())
        await asyncio.sleep(0.3)
        sending.cancel()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10
        ours.abort()
        theirs.abort()

    run(test())


# --- maps


def test_the_fields_of_a_frame() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        for values in ({"pages": 7}, {"pages": -1}, {"pages": 1, "odd": 2}, {}):
            ours.send_map(Kind.APPLIED, dict(values))
        ours.send(Kind.APPLIED, b"\xc1")
        ours.send(Kind.APPLIED, b"\x91" * 60_000 + b"\x00")
        await ours.drain()
        with (await theirs.receive()).fields() as fields:
            assert fields.integer("pages", 0, 10) == 7
        for _ in range(5):
            frame = await theirs.receive()
            message = "the other relay's APPLIED frame"
            with pytest.raises(RelayPeerError, match=message), frame.fields() as fields:
                fields.integer("pages", 0, 10)
        ours.abort()
        theirs.abort()

    run(test())


def test_the_error_of_the_other_relay_is_shown_as_its_own() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        await asyncio.gather(ours.hello(_SOURCE), theirs.hello(_DESTINATION))
        theirs.send(Kind.DATA, b"never read")
        await theirs.drain()
        failing = asyncio.create_task(
            ours.fail(UsageError("it \x1b[31m went wrong" + "!" * 9000, hint="do better\n"))
        )
        with pytest.raises(RelayFailedError) as caught:
            await theirs.receive()
        assert caught.value.message.startswith("the source's relay: it \\x1b[31m went wrong!!!")
        assert len(caught.value.message) < 5000
        assert caught.value.hint == "do better\\n"
        assert caught.value.details == {"reason": "usage"}
        await theirs.close()
        await failing

    run(test())


def test_failing_does_not_wait_for_one_who_does_not_listen() -> None:
    async def test() -> None:
        ours, theirs = _wires()
        ours.send(Kind.DATA, bytes(MAX_BULK_BYTES))
        await ours.fail(UsageError("x"))
        with pytest.raises(RelayLostError):
            await ours.receive()
        theirs.abort()

    run(test(), 15)


# --- the beginning


@pytest.mark.parametrize(
    ("data", "message", "hint"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", r"it began with 'HTTP/1.1 400 Bad Request\\r\\n'", "web"),
        (b"SSH-2.0-OpenSSH_10\r\n", "it began with 'SSH-2.0", "SSH server"),
        (b"QEVM\x00\x00\x00\x03", "it began with 'QEVM", "QEMU's own stream"),
        (b"\x16\x03\x01\x02", "it began with", "this is TLS"),
        (b"Welcome to \x1b[1mDebian", r"it began with 'Welcome to \\x1b\[1mDebian'", "exec:"),
        (b"\xff" * 300, "it began with", "exec:"),
        (b"mterelaX", "it began with 'mterelaX'", "exec:"),
        (MAGIC + struct.pack("<HH", 2, 0), "speaks version 2 .* and this one version 1", "same"),
        (MAGIC + struct.pack("<HH", 1, 4), "with the flags 0x4", "same"),
        (_PROLOGUE + _frames((Kind.DATA, b"x")), "began with a DATA frame", "same"),
        (_PROLOGUE + _hello("destination"), "both relays are the destination's", "start one"),
        (_PROLOGUE + _hello("king"), "the role 'king' is unknown", "same"),
        (_PROLOGUE + _hello(page_size_bytes=0), "'page_size_bytes' is 0", "same"),
        (_PROLOGUE + _hello(page_size_bytes="4K"), "'page_size_bytes' is '4K'", "same"),
        (_PROLOGUE + _hello(odd=1), "uses a feature", "same"),
        (_PROLOGUE + _frames((Kind.HELLO, msgpack.packb([1]))), "is not a map", "same"),
    ],
)
def test_one_who_is_no_relay_is_told_at_once(data: bytes, message: str, hint: str) -> None:
    async def test() -> None:
        wire, theirs = await _said(data, ends=False)
        with pytest.raises(RelayPeerError, match=message) as caught:
            await wire.hello(_DESTINATION)
        assert len(caught.value.message) < 500
        assert caught.value.message.isprintable()
        assert hint in (caught.value.hint or "")
        wire.abort()
        theirs.close()

    run(test(), 5)


def test_one_who_says_nothing() -> None:
    async def test() -> None:
        for data in (b"", b"mte", _PROLOGUE, _PROLOGUE + _hello()[:-1]):
            wire, theirs = await _said(data, ends=False)
            with pytest.raises(RelayPeerError, match=r"within 0\.1 seconds"):
                await wire.hello(_DESTINATION, 0.1)
            wire.abort()
            theirs.close()

    run(test(), 5)


def test_one_who_closes_at_once() -> None:
    async def test() -> None:
        for data, message in (
            (b"", "before it said anything"),
            (b"mterel", "in the middle of its first words"),
            (_PROLOGUE, "between two frames"),
            (_PROLOGUE + b"\x01", "within a frame"),
        ):
            wire, theirs = await _said(data)
            with pytest.raises(RelayLostError, match=message):
                await wire.hello(_DESTINATION)
            wire.abort()
            theirs.close()

    run(test(), 5)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo sorry; exit 1", "it began with 'sorry"),
        ("exit 127", "ended the connection .*; the command ended with status 127"),
        ("sleep 0.2; kill -9 $$", "the command was ended by signal 9"),
    ],
)
def test_a_command_that_starts_no_relay(command: str, message: str) -> None:
    async def test() -> None:
        wire = Wire(await opened(f"exec:sh -c '{command}'", Side.RELAY))
        with pytest.raises(MtetoolError, match=message):
            await wire.hello(_SOURCE)
        await wire.close()

    run(test())


def test_commands_are_relays_too() -> None:
    """What we say ourselves comes back from cat: a relay of our own role."""

    async def test() -> None:
        wire = Wire(await opened("exec:cat", Side.RELAY))
        with pytest.raises(RelayPeerError, match="both relays are the source's"):
            await wire.hello(_SOURCE)
        await wire.close()

    run(test())


def _brisk(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr("mtetool.relay.wire._BEAT_SECONDS", 0.02)
    monkeypatch.setattr("mtetool.relay.wire.SILENCE_SECONDS", seconds)


def test_silence_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that the network drops everything: the kernel would try for a quarter hour."""
    _brisk(monkeypatch, 0.3)

    async def test() -> None:
        ours, theirs = socket.socketpair()
        wire = Wire(of_socket(ours, "theirs"))
        with theirs, pytest.raises(RelayLostError, match="has said nothing for"):
            await all_tasks(wire.receive(), beside=[wire.stay_alive()])

    run(test())


def test_signs_of_life_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    _brisk(monkeypatch, 1.5)

    async def test() -> None:
        one, other = _wires()
        beating = asyncio.create_task(other.stay_alive())
        hearing = asyncio.create_task(other.receive())

        async def wait_long() -> None:
            receiving = asyncio.create_task(one.receive())
            await asyncio.sleep(2.5)
            assert not receiving.done()
            other.send(Kind.BYE)
            await other.drain()
            assert (await receiving).kind is Kind.BYE

        await all_tasks(wait_long(), beside=[one.stay_alive()])
        beating.cancel()
        hearing.cancel()

    run(test())
