"""How much of the stream may be on its way between the two QEMUs.

What lies in the buffers of sockets, ssh and relays when the guest stops has to be loaded before it
can start again, and while it is there, QEMU believes that the connection is faster than it is, and
stops the guest too early. So only as much is let in as QEMU at the destination takes in a few
hundredths of a second.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from mtetool.relay.channel import READ_BYTES

# A page without contents is some bytes in the stream; to load it costs QEMU as much as these.
_RECORD_BYTES = 256
# The time that QEMU at the destination needs for what is on its way, beside that of the way itself.
_SECONDS = 0.03
# Room to become faster: what is under way on an idle line says nothing of how much fits.
_GROWTH = 2
_LEAST = 256 << 10
# A rate counts less with each newer one; the rates vary, and the highest was possible.
_FADING = 0.9
_LEAST_READ_BYTES = 4096
_PARTS = 4  # So many pieces fill the window: while one is being loaded, others come.
# Until something has passed: as if all were pages without contents, of a flag and an address.
_DEAREST_BYTE = 1 + _RECORD_BYTES / 9


@dataclass(slots=True)
class _Piece:
    """A piece that is on its way."""

    end_bytes: int
    end_cost: int
    sent_at: float
    taken_then: int
    """The cost of all that QEMU had taken when this was sent."""


class Window:
    """What was sent and not yet taken, in bytes and by what it costs to load."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pieces: deque[_Piece] = deque()
        self._sent_bytes = self._sent_cost = 0
        self._taken_bytes = self._taken_cost = 0
        self._rate = 0.0
        self._shortest_seconds = float("inf")
        self._cost_of_byte = _DEAREST_BYTE

    def sent(self, n_bytes: int, n_records: int) -> None:
        """Note a piece that is being sent, in which so many records of pages begin."""
        cost = n_bytes + n_records * _RECORD_BYTES
        self._cost_of_byte = cost / n_bytes
        self._sent_bytes += n_bytes
        self._sent_cost += cost
        self._pieces.append(
            _Piece(self._sent_bytes, self._sent_cost, self._clock(), self._taken_cost)
        )

    def taken(self, total_bytes: int) -> bool:
        """Note how many bytes QEMU has taken so far; return whether that many can be."""
        if not self._taken_bytes <= total_bytes <= self._sent_bytes:
            return False
        self._taken_bytes = total_bytes
        last = None
        while self._pieces and self._pieces[0].end_bytes <= total_bytes:
            last = self._pieces.popleft()
        if last is not None:
            self._taken_cost = last.end_cost
            seconds = max(self._clock() - last.sent_at, 1e-6)
            self._shortest_seconds = min(self._shortest_seconds, seconds)
            rate = (self._taken_cost - last.taken_then) / seconds
            self._rate = max(rate, self._rate * _FADING)
        return True

    @property
    def size(self) -> float:
        """What may be on its way, by its cost."""
        if not self._rate:
            return _LEAST
        return max(_LEAST, self._rate * (_GROWTH * self._shortest_seconds + _SECONDS))

    @property
    def room_bytes(self) -> int:
        """How many bytes to read next, if they are like the last ones; 0 until more was taken."""
        part = self.size / _PARTS
        if self._sent_cost - self._taken_cost > self.size - part:
            return 0
        return min(max(int(part / self._cost_of_byte), _LEAST_READ_BYTES), READ_BYTES)
