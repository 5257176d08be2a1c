"""Context managers that close themselves."""

from __future__ import annotations

from typing import Self


class Closing:
    """Calls its `close` when a `with` ends, however it ends."""

    def close(self) -> None:
        """Let go of everything. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
