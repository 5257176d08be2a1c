"""Channels through the standard streams: our own, or those of a command such as ssh."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress

from mtetool.errors import NoSuchFileError, SourceError, file_error
from mtetool.relay.address import Command
from mtetool.relay.channel import PlainChannel
from mtetool.relay.ends import End, PipeEnd, SocketEnd, pipe_opened_anew
from mtetool.words import printable

_END_SECONDS = 2.0
_LOOK_SECONDS = 0.02
_TEXT_LENGTH = 120


class CommandChannel(PlainChannel):
    """A channel to a command that was started for it; closing it ends the command."""

    def __init__(self, name: str, child: subprocess.Popen[bytes], ends: tuple[End, End]) -> None:
        super().__init__(name, *ends)
        self._child = child

    async def epitaph(self) -> str | None:
        """How the command ended, once it does; None if it runs on."""
        status = await self._ended(_END_SECONDS)
        if status is None:
            return None
        if status < 0:
            return f"the command was ended by signal {-status}"
        return f"the command ended with status {status}"

    async def close(self) -> None:
        await super().close()
        if await self._ended(_END_SECONDS) is None:
            self._child.kill()
            await self._ended(_END_SECONDS)

    def _shut(self, *, abort: bool) -> None:
        super()._shut(abort=abort)
        if abort:
            with suppress(OSError):
                self._child.terminate()
            self._child.poll()  # if it has not ended yet, subprocess reaps it later

    async def _ended(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while (status := self._child.poll()) is None and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        return status


def start(command: Command) -> CommandChannel:
    """Start the command; what it prints on standard error goes to ours.

    Raises NoSuchFileError, PermissionRefusedError, HostError.
    """
    try:
        child = subprocess.Popen(command.words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    except FileNotFoundError as error:
        raise NoSuchFileError(
            f"there is no command {printable(command.words[0])}",
            hint="write its whole path, or check PATH",
            path=command.words[0],
        ) from error
    except OSError as error:
        raise file_error(
            error, command.words[0], f"starting {printable(command.words[0])}"
        ) from error
    assert child.stdin is not None
    assert child.stdout is not None
    ends = []
    for pipe in (child.stdout, child.stdin):
        copy = os.dup(pipe.fileno())
        pipe.close()
        os.set_blocking(copy, False)  # our end of the pipe is ours alone
        ends.append(PipeEnd(copy))
    text = str(command)
    name = text if len(text) <= _TEXT_LENGTH else f"{text[:_TEXT_LENGTH]}…"
    return CommandChannel(printable(name), child, (ends[0], ends[1]))


def standard_streams() -> PlainChannel:
    """The channel of our own standard input and output.

    From now on nothing else may read or write them: what the program prints goes to standard
    error. Raises SourceError if they are not pipes or sockets.
    """
    sys.stdout.flush()
    incoming = _end(0, "standard input", os.O_RDONLY)
    try:
        outgoing = _end(1, "standard output", os.O_WRONLY)
    except BaseException:
        incoming.close()
        raise
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    try:
        os.dup2(2, 1)
    except OSError:  # standard error is closed
        os.dup2(nothing, 1)
    os.close(nothing)
    return PlainChannel("the other end of the standard streams", incoming, outgoing)


def _end(fd: int, what: str, flags: int) -> End:
    try:
        mode = os.fstat(fd).st_mode
    except OSError as error:
        raise SourceError(f"{what} is closed", hint="give it a pipe") from error
    if stat.S_ISSOCK(mode):
        return SocketEnd(socket.socket(fileno=os.dup(fd)))
    if stat.S_ISFIFO(mode):
        return PipeEnd(pipe_opened_anew(fd, flags))
    kind = "a terminal" if os.isatty(fd) else "a file"
    raise SourceError(
        f"{what} is {kind}, and two relays need a pipe or a socket to each other",
        hint="use - on the other side of exec:ssh …, where ssh makes the pipes",
    )
