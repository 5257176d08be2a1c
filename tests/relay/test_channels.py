"""Channels: every kind carries bytes both ways, ends when it should, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtetool.errors import (
    BusyError,
    FileExistsAlreadyError,
    HostError,
    NoSuchFileError,
    RelayLostError,
    SourceError,
    UsageError,
)
from mtetool.relay.address import Inherited, Side
from mtetool.relay.channel import Channel, of_socket
from mtetool.relay.channels import Opening, open_channel
from tests.relay.opening import Waiting, all_of, opened, pair, run

_ROOT = Path(__file__).parent.parent.parent
_MUCH = bytes(range(256)) * (8 << 12)  # 8 MiB: more than the kernel holds


@pytest.fixture(params=["unix", "tcp", "tcp6"])
def listening(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address of each kind, to listen at."""
    return {
        "unix": f"listen:unix:{tmp_path}/s",
        "tcp": "listen:tcp:127.0.0.1:0",
        "tcp6": "listen:tcp:[::1]:0",
    }[str(request.param)]


def test_bytes_go_both_ways_and_each_way_ends(listening: str) -> None:
    async def test() -> None:
        here, there = await pair(listening)
        here.write(_MUCH[:100], memoryview(_MUCH)[100:], b"")
        there.write(b"back")
        sending = asyncio.create_task(here.half_close())
        assert await all_of(there) == _MUCH
        await sending
        await there.drain()
        assert await here.read() == b"back"
        there.write(bytearray(_MUCH))
        await asyncio.gather(there.half_close(), _expect(here, _MUCH))
        assert await here.read() == await there.read() == b""
        await asyncio.gather(here.close(), there.close())

    run(test())


async def _expect(channel: Channel, data: bytes) -> None:
    assert await all_of(channel) == data


def test_reading_into_a_buffer(tmp_path: Path) -> None:
    async def test() -> None:
        here, there = await pair(f"listen:unix:{tmp_path}/s")
        here.write(b"abcdef")
        await here.drain()
        buffer = bytearray(4)
        assert await there.read_into(memoryview(buffer)[1:]) == 3
        assert buffer == b"\0abc"
        assert await there.read(2) == b"de"
        await here.half_close()
        assert await there.read_into(buffer) == 1
        assert await there.read_into(buffer) == 0
        here.abort()
        there.abort()

    run(test())


def test_a_slow_reader_holds_the_writer_back(listening: str) -> None:
    async def test() -> None:
        here, there = await pair(listening)
        here.write(_MUCH)
        draining = asyncio.create_task(here.drain())
        await asyncio.sleep(0.2)
        assert not draining.done()
        reading = asyncio.create_task(all_of(there))
        await draining
        await here.half_close()
        assert len(await reading) == len(_MUCH)
        here.abort()
        there.abort()

    run(test())


def test_several_tasks_may_write(tmp_path: Path) -> None:
    async def test() -> None:
        here, there = await pair(f"listen:unix:{tmp_path}/s")

        async def write(letter: bytes) -> None:
            for _ in range(50):
                here.write(letter * 10_000)
                await here.drain()

        reading = asyncio.create_task(all_of(there))
        await asyncio.gather(write(b"a"), write(b"b"), write(b"c"))
        await here.half_close()
        data = await reading
        assert {data[i : i + 10_000] for i in range(0, len(data), 10_000)} == {
            letter * 10_000 for letter in (b"a", b"b", b"c")
        }
        assert len(data) == 1_500_000
        here.abort()
        there.abort()

    run(test())


def test_a_channel_that_never_waits_lets_others_run(tmp_path: Path) -> None:
    async def test() -> None:
        here, there = await pair(f"listen:unix:{tmp_path}/s")
        here.write(b"x" * 100)
        await here.drain()
        ran = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(ran.set_result, None)
        for _ in range(20):
            await there.read(1)
        assert ran.done()
        here.abort()
        there.abort()

    run(test())


def test_abort_is_noticed_at_both_ends(listening: str) -> None:
    async def test() -> None:
        here, there = await pair(listening)
        reading = asyncio.create_task(here.read())
        writing = asyncio.create_task(_write_on(here))
        await asyncio.sleep(0.05)
        here.abort()
        here.abort()
        for task in (reading, writing):
            with pytest.raises(RelayLostError, match="it was closed at this end"):
                await task
        with pytest.raises(RelayLostError):
            await _write_on(there)
        there.abort()

    run(test())


async def _write_on(channel: Channel) -> None:
    while True:
        channel.write(_MUCH)
        await channel.drain()


def test_an_aborted_tcp_connection_is_no_clean_end() -> None:
    async def test() -> None:
        here, there = await pair("listen:tcp:127.0.0.1:0")
        here.abort()
        with pytest.raises(RelayLostError, match=r"ECONNRESET") as caught:
            await there.read()
        assert caught.value.details["errno"] == "ECONNRESET"
        there.abort()

    run(test())


def test_what_was_written_last_arrives_although_we_did_not_read(listening: str) -> None:
    """Close waits for the other end, so bytes that nobody read do not reset the connection."""

    async def test() -> None:
        here, there = await pair(listening)
        there.write(b"never read" * 1000)
        await there.drain()
        here.write(b"last words")
        closing = asyncio.create_task(here.close())
        await asyncio.sleep(0.1)
        assert await all_of(there) == b"last words"
        await there.close()
        await closing

    run(test())


def test_a_channel_may_be_closed_while_a_task_reads(listening: str) -> None:
    async def test() -> None:
        here, there = await pair(listening)
        reading = asyncio.create_task(here.read())
        await asyncio.sleep(0.01)
        here.write(b"last words")
        closing = asyncio.create_task(here.close())
        with pytest.raises(RelayLostError, match="it was closed at this end"):
            await reading
        with pytest.raises(RelayLostError, match="it was closed at this end"):
            await here.read()
        assert await all_of(there) == b"last words"
        await asyncio.gather(there.close(), closing)

    run(test())


def test_a_cancelled_read_loses_nothing(tmp_path: Path) -> None:
    async def test() -> None:
        here, there = await pair(f"listen:unix:{tmp_path}/s")
        reading = asyncio.create_task(there.read())
        await asyncio.sleep(0.01)
        reading.cancel()
        here.write(b"all")
        await here.drain()
        await asyncio.gather(reading, return_exceptions=True)
        assert await there.read() == b"all"
        reading = asyncio.create_task(there.read())  # waits, as the first one did
        await asyncio.sleep(0.01)
        here.write(b"of it")
        await here.drain()
        assert await reading == b"of it"
        here.abort()
        there.abort()

    run(test())


# --- listening and connecting


def test_the_socket_is_private_and_goes_when_somebody_has_connected(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def test() -> None:
        before = os.umask(0)
        try:
            waiting = Waiting(f"listen:unix:{path}")
            await waiting.where
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        finally:
            os.umask(before)
        there = await opened(f"unix:{path}")
        here = await waiting.task
        assert not path.exists()
        assert here.peer_socket is not None
        assert here.peer_socket.family == socket.AF_UNIX
        here.abort()
        there.abort()

    run(test())


def test_a_cancelled_wait_leaves_no_socket(tmp_path: Path) -> None:
    async def test() -> None:
        waiting = Waiting(f"listen:unix:{tmp_path}/s")
        await waiting.where
        waiting.task.cancel()
        await asyncio.gather(waiting.task, return_exceptions=True)
        assert list(tmp_path.iterdir()) == []

    run(test())


def test_only_our_own_socket_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def test() -> None:
        waiting = Waiting(f"listen:unix:{path}")
        await waiting.where
        path.unlink()
        path.write_text("precious")
        waiting.task.cancel()
        await asyncio.gather(waiting.task, return_exceptions=True)
        assert path.read_text() == "precious"

    run(test())


def test_a_dead_socket_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s"

    async def test() -> None:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        here, there = await pair(f"listen:unix:{path}")
        here.abort()
        there.abort()
        waiting = Waiting(f"listen:unix:{path}")
        await waiting.where
        with pytest.raises(BusyError, match="another process serves"):
            await opened(f"listen:unix:{path}")
        assert path.exists()
        waiting.task.cancel()
        await asyncio.gather(waiting.task, return_exceptions=True)
        path.write_text("precious")
        with pytest.raises(FileExistsAlreadyError, match="is not a socket"):
            await opened(f"listen:unix:{path}")
        assert path.read_text() == "precious"
        with pytest.raises(HostError, match="ENOENT"):
            await opened(f"listen:unix:{tmp_path}/no/such/directory")

    run(test())


def test_a_port_that_is_taken_or_of_another_host() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with pytest.raises(
                BusyError, match=f"another process uses listen:tcp:127.0.0.1:{port}"
            ):
                await opened(f"listen:tcp:127.0.0.1:{port}")
        with pytest.raises(UsageError, match="is not an address of this host"):
            await opened("listen:tcp:192.0.2.1:4444")

    run(test())


def test_every_address_of_the_host() -> None:
    async def test() -> None:
        waiting = Waiting("listen:tcp::0")
        port = (await waiting.where).rpartition(":")[2]
        there = await opened(f"tcp:127.0.0.1:{port}")
        (await waiting.task).abort()
        there.abort()

    run(test())


def test_connecting_is_retried_until_somebody_listens(tmp_path: Path) -> None:
    async def test() -> None:
        path = f"{tmp_path}/s"
        early = asyncio.create_task(opened(f"unix:{path}", opening=Opening(retry_seconds=20)))
        await asyncio.sleep(0.15)
        waiting = Waiting(f"listen:unix:{path}")
        here, there = await asyncio.gather(waiting.task, early)
        here.abort()
        there.abort()

    run(test())


@pytest.mark.parametrize("kind", ["unix", "full", "tcp"])
def test_nobody_listens(tmp_path: Path, kind: str) -> None:
    async def test() -> None:
        began = time.monotonic()
        with socket.socket(socket.AF_UNIX) as full, socket.create_server(("127.0.0.1", 0)) as free:
            text, number = f"unix:{tmp_path}/none", "ENOENT"
            if kind == "full":  # connecting to it would wait
                full.bind(f"{tmp_path}/s")
                full.listen(0)
                text, number = f"unix:{tmp_path}/s", "EAGAIN"
                (await opened(text)).abort()
            elif kind == "tcp":
                text, number = f"tcp:127.0.0.1:{free.getsockname()[1]}", "ECONNREFUSED"
                free.close()
            with pytest.raises(RelayLostError, match=f"tried for 0.3 seconds: .*{number}"):
                await opened(text, opening=Opening(retry_seconds=0.3))
        assert 0.3 <= time.monotonic() - began < 5

    run(test())


def test_a_name_that_nobody_has() -> None:
    async def test() -> None:
        with pytest.raises(RelayLostError, match=r"cannot connect to tcp:no-such-host\.invalid:1"):
            await opened("tcp:no-such-host.invalid:1")

    run(test())


# --- inherited sockets


def test_an_inherited_connected_socket_keeps_its_mode() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            shared = theirs.dup()
            here, there = of_socket(ours, "ours"), await opened(f"fd:{theirs.detach()}")
            there.write(b"x")
            await there.drain()
            assert await here.read() == b"x"
            assert os.get_blocking(shared.fileno())
            assert there.peer_socket is not None
            assert not there.peer_socket.get_inheritable()
            here.abort()
            there.abort()
            shared.close()

    run(test())


def test_an_inherited_listening_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "1")

    async def test() -> None:
        made = socket.socket(socket.AF_UNIX)
        made.bind(f"{tmp_path}/s")
        made.listen()
        waiting = Waiting(f"fd:{made.detach()}")
        await waiting.where
        there = await opened(f"unix:{tmp_path}/s")
        here = await waiting.task
        assert (tmp_path / "s").exists()  # it belongs to whoever made it
        assert "LISTEN_FDS" not in os.environ
        with pytest.raises(RelayLostError, match="ECONNREFUSED"):
            await opened(f"unix:{tmp_path}/s")
        here.abort()
        there.abort()

    run(test())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("file", "ENOTSOCK"),
        ("closed", "EBADF"),
        ("datagram", "another kind of socket"),
        ("unconnected", "it is not connected and does not listen"),
        ("tcp", "tags would travel in clear text"),
    ],
)
def test_what_cannot_be_inherited(kind: str, message: str) -> None:
    made: dict[str, socket.socket] = {
        "datagram": socket.socketpair(type=socket.SOCK_DGRAM)[0],
        "unconnected": socket.socket(socket.AF_UNIX),
        "tcp": socket.create_server(("127.0.0.1", 0)),
    }
    file = os.open(os.devnull, os.O_RDONLY)
    fd = {"file": file, "closed": 1 << 20}.get(kind) or made[kind].fileno()

    async def test() -> None:
        with pytest.raises(SourceError, match=message):
            await open_channel(Inherited(fd, Side.RELAY if kind == "tcp" else Side.QEMU))

    run(test())
    if kind in made:
        os.fstat(fd)  # it is still open
    for each in made.values():
        each.close()
    os.close(file)


# --- commands and standard streams


def test_a_command_carries_bytes_and_is_gone_afterwards() -> None:
    async def test() -> None:
        channel = await opened("exec:cat", Side.RELAY)
        assert channel.peer_socket is None
        channel.write(_MUCH)
        _, data = await asyncio.gather(channel.half_close(), all_of(channel))
        assert data == _MUCH
        assert await channel.epitaph() == "the command ended with status 0"
        await channel.close()

    run(test())


@pytest.mark.parametrize(
    ("command", "epitaph"),
    [("exit 7", "with status 7"), ("kill -9 $$", "by signal 9"), ("exec >&-; sleep 9", None)],
)
def test_a_command_that_ends(command: str, epitaph: str | None) -> None:
    async def test() -> None:
        channel = await opened(f"exec:sh -c '{command}'", Side.RELAY)
        assert await channel.read() == b""
        said = await channel.epitaph()
        assert said is None if epitaph is None else said is not None and epitaph in said
        with pytest.raises(RelayLostError):
            await _write_on(channel) if epitaph else await _write_to_closed(channel)
        channel.abort()

    run(test())


async def _write_to_closed(channel: Channel) -> None:
    channel.abort()
    channel.write(b"x")
    await channel.drain()


@pytest.mark.parametrize("how", ["abort", "close"])
def test_no_command_outlives_its_channel(tmp_path: Path, how: str) -> None:
    async def test() -> None:
        pid_file = tmp_path / "pid"
        command = f"exec:sh -c 'echo $$ > {pid_file}; exec sleep 60'"
        channel = await opened(command, Side.RELAY)
        while not pid_file.exists() or not pid_file.read_text().endswith("\n"):
            await asyncio.sleep(0.01)
        if how == "abort":
            channel.abort()
            assert await channel.epitaph() == f"the command was ended by signal {signal.SIGTERM:d}"
        else:
            await channel.close()
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)

    run(test())


def test_a_command_that_is_not_there() -> None:
    async def test() -> None:
        with pytest.raises(NoSuchFileError, match="there is no command no-such-command"):
            await opened("exec:no-such-command x", Side.RELAY)

    run(test())


_ECHO = """
import asyncio, os
from mtetool.relay.address import Side, parse
from mtetool.relay.channels import open_channel
async def main():
    channel = await open_channel(parse("-", Side.RELAY))
    print("printed", flush=True)
    while data := await channel.read():
        channel.write(data)
        await channel.drain()
    channel.write(b"end")
    await channel.half_close()
    await channel.close()
asyncio.run(main())
"""


def test_standard_streams_that_are_pipes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ECHO], input=b"x" * 50_000, capture_output=True, cwd=_ROOT
    )
    assert (done.stdout, done.stderr) == (b"x" * 50_000 + b"end", b"printed\n")
    assert done.returncode == 0


def test_standard_streams_that_are_one_socket() -> None:
    ours, theirs = socket.socketpair()
    words = [sys.executable, "-c", _ECHO]
    with (
        subprocess.Popen(
            words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.PIPE, cwd=_ROOT
        ) as child,
        ours,
    ):
        theirs.close()
        ours.sendall(b"x" * 50_000)
        ours.shutdown(socket.SHUT_WR)
        with ours.makefile("rb") as file:
            assert file.read() == b"x" * 50_000 + b"end"
        assert child.communicate()[1] == b"printed\n"
    assert child.returncode == 0


def test_standard_streams_that_are_files() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ECHO],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=_ROOT,
    )
    assert "SourceError: standard input is a file, and two relays need a pipe" in done.stderr
    assert done.stdout == ""
