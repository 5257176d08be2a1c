"""The service's socket: handed over by a service manager, or made at a path."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from mtetool.errors import UsageError, host_error
from mtetool.files.sockets import SocketFile

_FIRST_FD = 3  # sd_listen_fds(3)


def listener(path: Path) -> socket.socket:
    """The socket that a service manager handed over; otherwise a new one at `path`.

    Raises UsageError (what was handed over is no such socket), BusyError (another service answers
    at the path), FileExistsAlreadyError (something else is there), HostError.
    """
    found = _handed_over()
    if found is None:
        try:
            path.parent.mkdir(mode=0o755, exist_ok=True)
        except OSError as error:
            raise host_error(error, f"making the socket {path}") from error
        # Whoever asks is served, see mtetool-companion(1).
        found = SocketFile(path, socket.SOCK_SEQPACKET, 0o666, elsewhere="--socket PATH").socket
    found.setblocking(False)
    return found


def _handed_over() -> socket.socket | None:
    """The socket of sd_listen_fds(3); None if nothing was handed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    if count != "1":
        raise _unusable(f"{count or 'no'} descriptors instead of one")
    os.set_inheritable(_FIRST_FD, False)
    try:
        found = socket.socket(fileno=_FIRST_FD)
        kind = found.family, found.type
        listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise _unusable(f"a descriptor that is not a socket ({error.strerror})") from error
    if kind != (socket.AF_UNIX, socket.SOCK_SEQPACKET) or not listens:
        raise _unusable("another kind of socket")
    return found


def _unusable(what: str) -> UsageError:
    return UsageError(
        f"the service manager handed over {what}",
        hint="the unit needs one ListenSequentialPacket=: mtetool companion --show socket",
    )
