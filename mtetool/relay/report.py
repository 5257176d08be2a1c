"""What a relay did, for its report and for progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """One relay's part in a migration; numbers that its side does not know are None."""

    role: str
    guest: str = ""
    peer: str = ""
    machine: str = ""
    stream_bytes: int = 0
    """QEMU's stream, towards the destination."""
    back_bytes: int = 0
    """QEMU's return path."""
    stream_pages: int | None = None
    """Records of pages that passed, a page as often as it was sent."""
    memory_pages: int | None = None
    """Pages of the stream's size in the guest's memory."""
    read_pages: int | None = None
    """Pages of this host whose tags were read, as often as they were."""
    tag_pages: int = 0
    """Pages whose tags went over, as often as they did."""
    tag_bytes: int = 0
    """Bytes of tags between the relays, compressed."""
    rounds: int = 0
    """How often tags were read."""
    copy_seconds: float = 0.0
    """How long reading, or writing and reading back, took."""
    last_pages: int | None = None
    """Pages whose tags were read once the guest had stopped."""
    held_seconds: float | None = None
    """How long the end of the stream was held back for tags."""
    file_bytes: int | None = None
    """Bytes of the file with stream and tags."""
    elapsed_seconds: float = 0.0
    finished: bool = False
    stage: str = ""
    """What it does now, for progress."""


@dataclass(slots=True)
class News:
    """Whom to tell: of steps in words, and of progress in the report's numbers."""

    say: Callable[[str], None] = field(default=lambda text: None)
    update: Callable[[Report], None] = field(default=lambda report: None)
