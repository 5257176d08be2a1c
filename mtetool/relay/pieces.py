"""A stream that arrives in pieces, for a parser that is written as if all of it were there.

Such a parser is a generator: `head = yield from pieces.take(8)`. It yields, once or many times,
while bytes are missing, and whoever drives it puts in the next piece before it goes on.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


class Pieces:
    """The piece at hand; `at` is how much of it was taken."""

    def __init__(self) -> None:
        self.piece = memoryview(b"")
        self.at = 0
        self._before = 0

    @property
    def position(self) -> int:
        """How many bytes of the stream were taken so far."""
        return self._before + self.at

    def put(self, piece: memoryview) -> None:
        """Go on with the next piece; nothing of the one before is kept."""
        self._before += self.at
        self.piece, self.at = piece, 0

    def take(self, n: int) -> Steps[bytes]:
        """Return the next n bytes, copied. They are all that is kept while bytes are missing."""
        taken = b""
        while True:
            start, self.at = self.at, min(self.at + n - len(taken), len(self.piece))
            taken += bytes(self.piece[start : self.at])
            if len(taken) == n:
                return taken
            yield

    def number(self, n: int) -> Steps[int]:
        """Return the next n bytes as a big-endian number."""
        taken = yield from self.take(n)
        return int.from_bytes(taken, "big")

    def skip(self, n: int) -> Steps[None]:
        """Leave out the next n bytes, which are counted and never copied."""
        while n > (left := len(self.piece) - self.at):
            n -= left
            self.at += left
            yield
        self.at += n
