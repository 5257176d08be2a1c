"""Who holds the other end of a socket: found although somebody else made the connection."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool.vmm.socket_holders import holders


def _connected(kind: str, tmp_path: Path) -> tuple[socket.socket, socket.socket]:
    if kind == "pair":
        return socket.socketpair()
    if kind == "unix":
        server = socket.socket(socket.AF_UNIX)
        server.bind(f"{tmp_path}/s")
        server.listen()
        client = socket.socket(socket.AF_UNIX)
        client.connect(f"{tmp_path}/s")
    elif kind == "tcp":
        server = socket.create_server(("127.0.0.1", 0))
        client = socket.create_connection(server.getsockname())
    else:
        server = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        host = {"tcp6": "::1", "mapped": "127.0.0.1"}[kind]
        client = socket.create_connection((host, server.getsockname()[1]))
    with server:
        return server.accept()[0], client


@pytest.fixture(params=["pair", "unix", "tcp", "tcp6", "mapped"])
def ends(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[socket.socket]]:
    made = list(_connected(str(request.param), tmp_path))
    yield made
    for end in made:
        end.close()


def _child(end: socket.socket) -> subprocess.Popen[bytes]:
    """A process that inherits an end, and holds it until its standard input ends."""
    words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    return subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=[end.fileno()])


@pytest.mark.parametrize("whose", [0, 1])
def test_those_who_inherited_it(ends: list[socket.socket], whose: int) -> None:
    ours, theirs = ends[whose], ends[1 - whose]
    assert holders(ours) == [os.getpid()]
    children = [_child(theirs) for _ in range(2)]
    theirs.close()
    assert holders(ours) == sorted(child.pid for child in children)
    for child in children:
        child.communicate()
    assert holders(ours) == []


def test_sockets_without_another_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        assert holders(unix) == []
        assert holders(tcp) == []
        unix.bind(f"{tmp_path}/s")
        unix.listen()
        assert holders(unix) == []
    assert holders(tcp) == []  # closed


def test_tables_that_make_no_sense(tmp_path: Path) -> None:
    """A made-up /proc: odd rows, processes without descriptors, and one that holds the socket."""
    server, client = _connected("tcp", tmp_path)
    with server, client:
        ours, theirs = (f"0100007F:{end.getsockname()[1]:04X}" for end in (client, server))
        net = tmp_path / "self" / "net"
        net.mkdir(parents=True)
        tail = "01 00000000:00000000 00:00000000 00000000     0        0 {} 1 0\n"
        (net / "tcp").write_bytes(
            b"  sl  local_address rem_address\n\xff\xff\n"
            + f"   0: {theirs} 0200007F:0001 {tail.format(1)}".encode()
            + f"   0: {theirs} {ours} {tail.format('9' * 99)}".encode()
            + f"   0: {theirs} {ours} {tail.format(4711)}".encode()
        )
        for pid, link in (("7", "socket:[4711]"), ("8", "socket:[1]"), ("self2", "socket:[4711]")):
            (tmp_path / pid / "fd").mkdir(parents=True)
            (tmp_path / pid / "fd" / "3").symlink_to(link)
        (tmp_path / "9").mkdir()
        (tmp_path / "10" / "fd").mkdir(parents=True)
        (tmp_path / "10" / "fd" / "0").write_text("not a link")
        expected = [7] if sys.byteorder == "little" else []
        assert holders(client, tmp_path) == expected
