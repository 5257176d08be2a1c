"""The process that serves one client: proves who asks, attaches to it, attends the start."""

from __future__ import annotations

import os
import re
import resource
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from mtetool.attach.guard import become_guarded
from mtetool.attach.stderr import stderr_of, write_briefly
from mtetool.backends.kvm import starting
from mtetool.backends.kvm.starting import Wish
from mtetool.companion import client
from mtetool.errors import AttachRefusedError, MtetoolError
from mtetool.permission import refusal
from mtetool.procfs import status_of
from mtetool.vmm import proc
from mtetool.vmm.mte_limits import qemu
from mtetool.vmm.mte_warnings import warnings

_HANDSHAKE_SECONDS = 5.0
_MOST_SECONDS = 600.0
_FILES_SECONDS = 3.0
# A client may start as many processes as it likes, and all are followed. When this is used up, the
# kernel ends us, which harms nobody.
_CPU_SECONDS = 60
_WISH = re.compile(
    rb"(?P<version>[ -~]{1,64}?) vm=(?P<vm>[1-9][0-9]{0,4}) wait=(?P<wait>[0-9]{1,7}\.[0-9]{3})"
    rb" require=(?P<require>[01]) every-call=(?P<every>[01])"
)
_CUT = socket.MSG_TRUNC | socket.MSG_CTRUNC
_CREDENTIALS = struct.Struct("3i")

Text = Callable[[MtetoolError], str]
Attach = Callable[[int, Wish], Callable[[], bool]]


@dataclass(frozen=True, slots=True)
class Client:
    """A process that was proven to be the one that asked, and has not ended."""

    pid: int
    uid: int
    gid: int
    pidfd: int

    @property
    def groups(self) -> list[int]:
        """Its supplementary groups."""
        return [int(group) for group in status_of(self.pid).get("Groups", "").split()]

    def lives(self) -> bool:
        """Whether it has not ended: its PID is its own until then."""
        return not select.select([self.pidfd], [], [], 0)[0]


def serve(connection: socket.socket, text: Text, attach: Attach = starting.attach) -> None:
    """Serve the client at the other end, from first to last; `text` formats errors for its VM.

    For a process of its own, which has only one thread and ends afterwards.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    become_guarded()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    said: list[str] = []

    def noted(error: MtetoolError) -> str:
        said.append(error.message)
        return text(error)

    with connection:
        try:
            asker, words = _proven(connection)
        except AttachRefusedError as error:
            _refuse(connection, error)
            return _log(f"a client was refused: {error.message}")
        who = f"process {asker.pid} of user {asker.uid}"
        try:
            _warn(asker, text)
            work = _attached(asker, _wish(words, asker, noted), attach)
        except MtetoolError as error:
            _refuse(connection, error)
            return _log(f"{who} was refused: {error.message}")
        with suppress(OSError):
            connection.send(client.ATTACHED)
    # Nothing is written to our own log while a thread of the client is held.
    enabled = work()
    return _log(f"{who}: {'; '.join(said) or ('MTE is on' if enabled else 'it made no VM')}")


def _proven(connection: socket.socket) -> tuple[Client, bytes]:
    """Who is at the other end, and its first message. Raises AttachRefusedError.

    The credentials of a connection are of the process that made it, whose PID may be another
    process's by now. Those that the kernel adds to a message are the sender's at that moment. So if
    one process, pinned by a pidfd, is the sender of a message that cannot have been written before
    we had its pidfd, and lives when we have read it, it is the one that asks.
    """
    deadline = time.monotonic() + _HANDSHAKE_SECONDS
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    words, _ = _message(connection, deadline)
    made_by = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(made_by)
    if pid <= 0:
        raise AttachRefusedError("the client is in a PID namespace that this service cannot see")
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise AttachRefusedError(f"process {pid} has ended") from error
    nonce = secrets.token_hex().encode()
    _send(connection, client.PROVE + nonce)
    answer, sender = _message(connection, deadline)
    if sender is None or (answer, sender[0]) != (client.HERE + nonce, pid):
        raise AttachRefusedError("the client is not the process that connected")
    found = Client(*sender, pidfd)
    if not found.lives():
        raise AttachRefusedError("the client ended")
    return found, words


def _message(
    connection: socket.socket, deadline: float
) -> tuple[bytes, tuple[int, int, int] | None]:
    """The next message, and the PID, user and group of its sender, if the kernel says them."""
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    room = socket.CMSG_SPACE(_CREDENTIALS.size)
    try:
        data, extra, flags, _ = connection.recvmsg(client.MESSAGE_BYTES, room)
    except OSError as error:
        raise AttachRefusedError("the client says nothing") from error
    if not data or flags & _CUT:
        raise AttachRefusedError("the client hung up, or sent too much")
    for level, kind, content in extra:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            pid, uid, gid = _CREDENTIALS.unpack(content)
            return data, (pid, uid, gid)
    return data, None


def _wish(words: bytes, asker: Client, text: Text) -> Wish:
    match = _WISH.fullmatch(words)
    if match is None or match["version"] != client.VERSION:
        spoken = client.VERSION.decode()
        raise AttachRefusedError(
            f"the companion service did not understand the request: it speaks {spoken}",
            hint="use the wrapper of this version: mtetool companion --show wrapper",
        )
    return Wish(
        vm=int(match["vm"]),
        seconds=min(float(match["wait"]), _MOST_SECONDS),
        required=match["require"] == b"1",
        every_call=match["every"] == b"1",
        text=text,
        user=asker.uid,
        write=lambda fd, data: _as_client(asker, lambda: write_briefly(fd, data)),
    )


def _attached(asker: Client, wish: Wish, attach: Attach) -> Callable[[], bool]:
    try:
        work = attach(asker.pid, wish)
    except OSError as error:
        raise refusal(asker.pid, error) from error
    if not asker.lives():  # so what we trace may be another process; our end lets go of it
        raise AttachRefusedError("the client ended")
    return work


def _warn(asker: Client, text: Text) -> None:
    """Report what MTE will break of the VMM that the client is about to become."""
    words = proc.command_line(asker.pid)
    with stderr_of([asker.pid]) as stderr:
        if stderr is None or not asker.lives():
            return

        def warn() -> None:
            found = warnings(words, lambda path: "")
            if found:
                write_briefly(stderr, "".join(map(text, found)).encode(errors="replace"))

        if qemu(words):
            _as_client(asker, warn)


def _as_client(asker: Client, run: Callable[[], object]) -> None:
    """Run something that touches files of the client's choice as its user, for a bounded time.

    Some files do more for root than for the process that named or opened them, and some hang.
    """
    pid = os.fork()
    if pid == 0:
        try:
            if os.getuid() == 0:
                os.setgroups(asker.groups)
                os.setresgid(asker.gid, asker.gid, asker.gid)
                os.setresuid(asker.uid, asker.uid, asker.uid)
            run()
        finally:
            os._exit(0)
    pidfd = os.pidfd_open(pid)
    if not select.select([pidfd], [], [], _FILES_SECONDS)[0]:
        os.kill(pid, signal.SIGKILL)
    os.close(pidfd)
    os.waitpid(pid, 0)


def _refuse(connection: socket.socket, error: MtetoolError) -> None:
    text = error.message.encode(errors="replace")
    with suppress(OSError):
        connection.send((client.REFUSED + text)[: client.MESSAGE_BYTES])


def _send(connection: socket.socket, message: bytes) -> None:
    try:
        connection.send(message)
    except OSError as error:
        raise AttachRefusedError("the client hung up") from error


def _log(line: str) -> None:
    with suppress(OSError, AttributeError):
        sys.stderr.write(f"mtetool companion: {line}\n")
        sys.stderr.flush()
