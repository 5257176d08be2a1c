"""Commands in QMP, and the answers of an untrusted peer.

The protocol is QEMU's docs/interop/qmp-spec.rst: JSON objects one after the other, each on one line
or, from a monitor that pretty-prints, on many. All input is bounded: the bytes and depth of a
message, the number of events, and the total time.
"""

from __future__ import annotations

import json
import re
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mtetool.closing import Closing
from mtetool.errors import LayoutUnknownError

# A monitor that another client holds accepts the connection and says nothing.
GREETING_SECONDS = 4.0
CONVERSATION_SECONDS = 24.0

# The longest answer is the text of `info mtree`: some hundred KiB for hundreds of devices.
MESSAGE_BYTES = 4 << 20
_DEPTH = 64
_EVENTS = 10_000
_PIECE_BYTES = 64 << 10

_MARK = re.compile(rb'["{}\[\]]')
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # a string, up to its end or the buffer's


class Patience:
    """The seconds that may still be spent waiting, by everything that shares them."""

    def __init__(self, seconds: float = CONVERSATION_SECONDS) -> None:
        self._left = seconds

    @contextmanager
    def spent(self, at_most: float = CONVERSATION_SECONDS) -> Iterator[float]:
        """Yield the time.monotonic() by which the caller must be done."""
        since = time.monotonic()
        try:
            yield since + min(self._left, at_most)
        finally:
            self._left -= time.monotonic() - since


class Messages:
    """Cuts a stream of bytes into JSON objects. Raises ValueError if that is impossible."""

    def __init__(self) -> None:
        self._buffer = b""
        self._seen = 0
        self._depth = 0
        self._quoted = False

    def feed(self, data: bytes) -> None:
        """Add more of the stream."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole object, unparsed; None if it has not arrived in full."""
        if not self._depth:
            self._buffer = self._buffer.lstrip()
            if self._buffer[:1] not in (b"", b"{"):
                raise ValueError("not an object")
        at = self._seen  # only new bytes are examined
        while at < len(self._buffer):
            if self._quoted:
                inside = _INSIDE.match(self._buffer, at)
                at = inside.end() if inside else at
                if self._buffer[at : at + 1] != b'"':
                    break  # incomplete, perhaps within an escape: wait for the rest
                at += 1
                self._quoted = False
            elif mark := _MARK.search(self._buffer, at):
                at = mark.end()
                self._look_at(mark[0])
                if not self._depth:
                    return self._cut(at)
            else:
                at = len(self._buffer)
        self._seen = at
        if at > MESSAGE_BYTES:
            raise ValueError("too long")
        return None

    def _look_at(self, mark: bytes) -> None:
        if mark == b'"':
            self._quoted = True
        else:
            self._depth += 1 if mark in b"{[" else -1
        if self._depth > _DEPTH:
            raise ValueError("too deep")

    def _cut(self, end: int) -> bytes:
        message, self._buffer = self._buffer[:end], self._buffer[end:]
        self._seen = 0
        return message


class Commands(Closing, ABC):
    """The commands of one monitor, whatever carries them there and the answers back.

    `where` names the monitor in messages. Every failure is a LayoutUnknownError.
    """

    def __init__(self, where: str) -> None:
        self.where = where

    @abstractmethod
    def execute(self, command: str, **arguments: object) -> object:
        """Run a command, and return its `return`."""

    def text(self, command_line: str) -> str:
        """What the human monitor prints for a command."""
        answer = self.execute("human-monitor-command", **{"command-line": command_line})
        if not isinstance(answer, str):
            raise self.error(f"its answer to {command_line!r} is not text")
        return answer

    def error(self, why: str) -> LayoutUnknownError:
        """The error for a monitor that answers, but not with what is needed."""
        return unusable(self.where, why)


class Conversation(Commands):
    """Commands and answers over a connected socket, which is closed with it.

    After a failure nothing more is sent, because a late answer would be taken for another
    command's.
    """

    def __init__(self, connection: socket.socket, where: str, patience: Patience) -> None:
        super().__init__(where)
        self._socket = connection
        self._patience = patience
        self._messages = Messages()
        self._failed: LayoutUnknownError | None = None

    def open(self) -> None:
        """Wait for the greeting, and leave the mode that only negotiates capabilities."""
        with self._patience.spent(GREETING_SECONDS) as deadline:
            if "QMP" not in self._receive(deadline):
                raise self._fail("it is not a QMP monitor")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> object:
        """Run a command, and return its `return`. Events that come between are skipped."""
        if self._failed is not None:
            raise self._failed
        with self._patience.spent() as deadline:
            self._send(request(command, arguments).encode() + b"\n", deadline)
            for _ in range(_EVENTS):
                answer = self._receive(deadline)
                if "return" in answer:
                    return answer["return"]
                if "error" in answer:
                    raise self.error(description(answer["error"], command))
        raise self._fail("it never stops sending events")

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._socket.close()

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            self._socket.sendall(data)
        except OSError as error:
            raise self._fail(error.strerror or "it does not read") from error

    def _receive(self, deadline: float) -> dict[str, object]:
        try:
            while (message := self._messages.take()) is None:
                if not (data := self._piece(deadline)):
                    raise self._fail("it hung up")
                self._messages.feed(data)
            answer = json.loads(message.decode())
        except (ValueError, RecursionError) as error:
            raise self._fail("it does not speak QMP") from error
        except OSError as error:
            why = "it does not answer; another client may be connected to it"
            raise self._fail(error.strerror or why) from error
        assert isinstance(answer, dict)  # it begins with a brace
        return answer

    def _piece(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket.recv(_PIECE_BYTES)

    def _fail(self, why: str) -> LayoutUnknownError:
        self._failed = unusable(self.where, why)
        return self._failed


def request(command: str, arguments: Mapping[str, object]) -> str:
    """A command as it is sent."""
    message: dict[str, object] = {"execute": command}
    if arguments:
        message["arguments"] = dict(arguments)
    return json.dumps(message)


def unusable(where: str, why: str) -> LayoutUnknownError:
    """The error for a monitor that cannot be used."""
    return LayoutUnknownError(
        f"QEMU's monitor at {where} cannot be used: {why}",
        hint="disconnect its other client, or give another monitor with --qmp SOCKET,"
        " or name the memory by hand: --memslot IPA:SIZE",
    )


def description(error: object, command: str) -> str:
    """What an answer's `error` says, in at most 500 characters."""
    text = error.get("desc") if isinstance(error, dict) else None
    return text[:500] if isinstance(text, str) else f"it refuses {command}"
