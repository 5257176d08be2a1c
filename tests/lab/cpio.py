"""Archives in the kernel's initramfs format ("newc" cpio), written without tools or privileges.

The format: Documentation/driver-api/early-userspace/buffer-format.rst. The kernel unpacks any number
of them one after the other, so a fixed archive and a per-run one are simply concatenated.
"""

from __future__ import annotations

import stat
from pathlib import Path, PurePosixPath


class Archive:
    """Collects entries, all owned by root; parents are made as they are needed."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._seen: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        if self._name(path) not in self._seen:
            self._add(path, stat.S_IFDIR | mode, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, data)

    def link(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device, such as the console that the first program's output needs."""
        self._add(path, stat.S_IFCHR | mode, b"", (major, minor))

    def tree(self, path: str, source: Path, *, suffixes: tuple[str, ...] = ()) -> None:
        """Everything below SOURCE with its modes; SUFFIXES narrows the files taken."""
        self.directory(path, stat.S_IMODE(source.stat().st_mode))
        for item in sorted(source.iterdir()):
            inside = f"{path}/{item.name}"
            mode = item.lstat().st_mode
            if stat.S_ISLNK(mode):
                self.link(inside, str(item.readlink()))
            elif stat.S_ISDIR(mode):
                if item.name != "__pycache__" or not suffixes:
                    self.tree(inside, item, suffixes=suffixes)
            elif stat.S_ISREG(mode) and (not suffixes or item.suffix in suffixes):
                self.file(inside, item.read_bytes(), stat.S_IMODE(mode))

    def finish(self) -> bytes:
        """The whole archive, padded so that another one may follow."""
        return _padded(b"".join([*self._parts, _entry("TRAILER!!!", 0, 0, b"", (0, 0))]), 512)

    @staticmethod
    def _name(path: str) -> str:
        return path.strip("/")

    def _add(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = self._name(path)
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self.directory(parent)
        self._seen.add(name)
        self._inode += 1
        self._parts.append(_entry(name, self._inode, mode, data, device))


def _entry(name: str, inode: int, mode: int, data: bytes, device: tuple[int, int]) -> bytes:
    raw_name = name.encode() + b"\0"
    # inode, mode, uid, gid, nlink, mtime, size, dev major/minor, rdev major/minor, name size, check
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(raw_name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + raw_name, 4) + _padded(data, 4)


def _padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)
