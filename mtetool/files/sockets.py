"""Unix sockets at paths: made with their mode from the start, in the place of dead ones only."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from mtetool.errors import BusyError, FileExistsAlreadyError, host_error

BACKLOG = 128


class SocketFile:
    """A listening socket at a path, which `remove` removes if it is still the one made here."""

    def __init__(self, path: Path, kind: socket.SocketKind, mode: int, *, elsewhere: str) -> None:
        """Listen at `path`; `elsewhere` is the hint for where else that could be done.

        Raises BusyError (another process answers there), FileExistsAlreadyError (something else is
        there), HostError.
        """
        _check_free(path, kind, elsewhere)
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, kind)
        try:
            self._identity = self._bind(mode)
        except OSError as error:
            self.socket.close()
            raise host_error(error, f"making the socket {path}") from error

    def _bind(self, mode: int) -> tuple[int, int]:
        with suppress(FileNotFoundError):
            self.path.unlink()
        # The file gets what the mode of the unbound socket and the umask have in common. Nobody
        # can connect before listen(), so a mode that the umask has cut can still be made right.
        os.fchmod(self.socket.fileno(), mode)
        self.socket.bind(str(self.path))
        self.path.chmod(mode)
        info = self.path.lstat()
        self.socket.listen(BACKLOG)
        return info.st_dev, info.st_ino

    def remove(self) -> None:
        """Remove the file, unless another one has its name by now. Idempotent."""
        with suppress(OSError):
            info = self.path.lstat()
            if (info.st_dev, info.st_ino) == self._identity:
                self.path.unlink()


def _check_free(path: Path, kind: socket.SocketKind, elsewhere: str) -> None:
    try:
        found = path.lstat()
    except OSError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsAlreadyError(
            f"{path} exists and is not a socket",
            hint=f"remove it, or choose another place: {elsewhere}",
            path=str(path),
        )
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return  # left over: nobody listens
        except BlockingIOError:
            pass  # somebody does, and has clients waiting
        except OSError as error:
            raise host_error(error, f"looking at the socket {path}") from error
    raise BusyError(
        f"another process serves {path}",
        hint=f"find it: ss -xlp src {path}; or choose another place: {elsewhere}",
        path=str(path),
    )
