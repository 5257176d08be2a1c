"""The service itself: accepts clients, and forks a process for each."""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from mtetool.companion import client

# How many clients are served at a time; a client is served for as long as its VMM takes to make its
# VM, a second or two.
_MOST = 128
_MOST_OF_A_USER = 64
_PAUSE_SECONDS = 0.2  # after accept(2) failed for want of something

_CREDENTIALS = struct.Struct("3i")

Serve = Callable[[socket.socket], object]


class Service:
    """Accepts clients on a listening socket, and calls `serve` in a new process for each.

    This process traces nobody, so its death harms none of those that it forked.
    """

    def __init__(self, listener: socket.socket, serve: Serve) -> None:
        self._listener = listener
        self._serve = serve
        self._users: dict[int, int] = {}
        """The user that each child serves, by the child's pidfd."""

    def run(self) -> NoReturn:
        """Serve until a signal ends this process."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Wait until something happens, and handle it."""
        listener = self._listener.fileno()
        ready, _, _ = select.select([listener, *self._users], [], [])
        for fd in ready:
            if fd == listener:
                self._accept()
            else:
                self._forget(fd)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # the client has gone again
        except OSError:
            select.select([*self._users], [], [], _PAUSE_SECONDS)
            return
        with connection:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            _, uid, _ = _CREDENTIALS.unpack(credentials)
            if (
                len(self._users) >= _MOST
                or Counter(self._users.values())[uid] >= _MOST_OF_A_USER
                or not self._forked(connection, uid)
            ):
                connection.setblocking(False)
                with suppress(OSError):
                    connection.send(client.REFUSED + b"the companion service has too many clients")

    def _forked(self, connection: socket.socket, uid: int) -> bool:
        try:
            pid = os.fork()
        except OSError:
            return False
        if pid == 0:
            self._be_child(connection)
        self._users[os.pidfd_open(pid)] = uid
        return True

    def _be_child(self, connection: socket.socket) -> NoReturn:
        try:
            # Not raised within what the parent was doing.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            self._listener.close()
            for pidfd in self._users:
                os.close(pidfd)
            connection.setblocking(True)
            self._serve(connection)
        except Exception as error:  # noqa: BLE001 - it must not become the parent
            with suppress(OSError, AttributeError):
                sys.stderr.write(f"mtetool companion: this should not happen: {error!r}\n")
                sys.stderr.flush()
        finally:
            os._exit(0)

    def _forget(self, pidfd: int) -> None:
        del self._users[pidfd]
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)
