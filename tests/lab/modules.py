"""The kernel modules that a first root needs, found in a kernel package and put in order.

Debian's packages hold no `modules.dep`: the package's script makes it. Each module lists its own
needs (in its `.modinfo` section: `depends`, `softdep`, `alias`), and `modules.builtin` and
`modules.builtin.modinfo` list the built-in ones; depmod reads the same files.
"""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from pathlib import Path

_FIELD = re.compile(rb"(?<=\0)(depends|softdep|alias)=([^\0]*)\0")
_BUILTIN_FIELD = re.compile(rb"[^\0]*\.alias=([^\0]*)\0")


class Modules:
    """The modules of one kernel: `directory` is its `lib/modules/VERSION`."""

    def __init__(self, directory: Path) -> None:
        self._files = {_name(path): path for path in directory.rglob("*.ko*")}
        builtin = (directory / "modules.builtin").read_text().split()
        self._builtin = {_name(Path(line)) for line in builtin}
        info = (directory / "modules.builtin.modinfo").read_bytes()
        self._builtin |= {alias.decode() for alias in _BUILTIN_FIELD.findall(info)}

    def content(self, name: str) -> bytes:
        """Return a module as insmod takes it."""
        path = self._files[name]
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data

    def in_order(self, *wanted: str) -> list[str]:
        """Return the modules to load for `wanted`, each after those it needs, none built in.

        Raises KeyError if the kernel has a module in neither way.
        """
        ordered: list[str] = []
        for name in wanted:
            self._append(name, ordered)
        return ordered

    def _append(self, name: str, ordered: list[str]) -> None:
        if name in self._builtin or name in ordered:
            return
        for needed in self._needs(name):
            self._append(needed, ordered)
        ordered.append(name)

    def _needs(self, name: str) -> Iterator[str]:
        for field, value in _FIELD.findall(self.content(name)):
            if field == b"depends":
                yield from (_plain(word) for word in value.decode().split(",") if word)
            elif field == b"softdep":
                before = value.decode().partition("pre:")[2].partition("post:")[0]
                for word in before.split():
                    if (found := self._of_alias(word)) is not None:
                        yield found

    def _of_alias(self, alias: str) -> str | None:
        """Return the module that a soft dependency stands for, or None if it is built in."""
        if alias in self._builtin or _plain(alias) in self._builtin:
            return None
        if _plain(alias) in self._files:
            return _plain(alias)
        wanted = (b"alias", alias.encode())
        for name in sorted(self._files):
            if wanted in _FIELD.findall(self.content(name)):
                return name
        raise KeyError(alias)


def _name(path: Path) -> str:
    return _plain(path.name.partition(".")[0])


def _plain(name: str) -> str:
    # The kernel treats - and _ as the same.
    return name.replace("-", "_")
