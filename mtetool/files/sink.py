"""What bytes are written to: one contract for whoever is between a snapshot and its file."""

from __future__ import annotations

from typing import Protocol


class Sink(Protocol):
    """Takes bytes, front to back. `output_file` gives one; so are buffered files, and BytesIO."""

    def write(self, data: bytes | memoryview, /) -> object:
        """Take all of it. Raises HostError; BrokenPipeError passes."""
        ...
