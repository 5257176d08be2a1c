"""Where bytes are written to: one contract for everything between a snapshot and its file."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """Takes bytes, front to back. `output_file` yields one; buffered files and BytesIO are too."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take all of `data`. Raises HostError; BrokenPipeError passes through."""
        ...
