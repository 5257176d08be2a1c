"""A monitor that answers what a test wants it to, over a real socket."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Answer = Callable[[str], Iterator[bytes]]
"""What is sent for a command (its name, or "" for the greeting), piece by piece."""


@contextmanager
def monitor(path: Path, answer: Answer, *, clients: int = 1) -> Iterator[Path]:
    """Serve a monitor to that many clients, one after the other, until each hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(clients)
        thread = threading.Thread(target=_serve, args=(server, answer, clients))
        thread.start()
        try:
            yield path
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def answers(**returned: object) -> Answer:
    """Answers by command, with "_" for "-"; bytes are sent as they are, others as a `return`."""

    def answer(command: str) -> Iterator[bytes]:
        given = returned.get(command.replace("-", "_"), {})
        if not command:
            yield b'{"QMP": {"version": {}, "capabilities": []}}\r\n'
        elif isinstance(given, bytes):
            yield given
        else:
            yield json.dumps({"return": given}).encode() + b"\r\n"

    return answer


def _serve(server: socket.socket, answer: Answer, clients: int) -> None:
    for _ in range(clients):
        with suppress(OSError):
            connection, _ = server.accept()
            with connection, connection.makefile("rb") as requests:
                _send(connection, answer(""))
                for request in requests:
                    _send(connection, answer(json.loads(request)["execute"]))


def _send(connection: socket.socket, pieces: Iterator[bytes]) -> None:
    for piece in pieces:
        connection.sendall(piece)
