"""The newc cpio archive that the kernel accepts as its first root file system.

Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. We write it
ourselves because an archive without devices, owned by root, then needs neither the cpio tool nor
root.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a directory of the archive: its path, mode and content."""

    path: str
    mode: int
    data: bytes = b""

    @classmethod
    def directory(cls, path: str) -> Entry:
        """A directory that every user can enter."""
        return cls(path, stat.S_IFDIR | 0o755)

    @classmethod
    def program(cls, path: str, data: bytes) -> Entry:
        """An executable file."""
        return cls(path, stat.S_IFREG | 0o755, data)

    @classmethod
    def file(cls, path: str, data: bytes) -> Entry:
        """A plain file."""
        return cls(path, stat.S_IFREG | 0o644, data)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of all entries, ended by its trailer."""
    listed = [*entries, Entry(_TRAILER, 0)]
    return b"".join(_member(number, entry) for number, entry in enumerate(listed, 1))


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
