"""What /proc says of processes and threads, parsed once for everybody.

Parts of these texts are other people's: names of programs, threads and files. The kernel escapes a
newline in them, and nothing else that Python takes for the end of a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def lines(path: Path | str) -> list[str]:
    """The lines of a text of the kernel's; only a newline ends one. Raises OSError."""
    return os.fsdecode(Path(path).read_bytes()).split("\n")


def status_of(pid: int | str, proc: Path = Path("/proc")) -> dict[str, str]:
    """The fields of /proc/PID/status; empty where it cannot be read."""
    try:
        found = lines(proc / str(pid) / "status")
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in found)}


def stat_of(task: Path | str) -> list[str]:
    """The fields of /proc/PID/stat or of a thread's, from the state on: proc(5)'s number less 3.

    Raises OSError; ProcessLookupError where the task ended meanwhile.
    """
    # The name of the program is in parentheses, and may have any of its own.
    text = os.fsdecode(Path(task, "stat").read_bytes())
    fields = text.rpartition(")")[2].split()
    if not fields:
        raise ProcessLookupError(f"{task} says nothing")
    return fields


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps: [start, end), `rwxp` flags; `inode` and `device` 0 of no file."""

    start: int
    end: int
    flags: str
    inode: int
    name: str
    offset: int = 0
    device: int = 0


def mappings(pid: int) -> list[Mapping]:
    """The process's mappings in order of address. Raises OSError."""
    return parsed(lines(f"/proc/{pid}/maps"))


def parsed(texts: Iterable[str]) -> list[Mapping]:
    """The mappings in lines as those of /proc/PID/maps; other lines are left out."""
    result = []
    for line in texts:
        with suppress(ValueError):
            addresses, flags, offset, device, inode, *name = line.split(None, 5)
            start, end = (int(word, 16) for word in addresses.split("-"))
            major, minor = (int(word, 16) for word in device.split(":"))
            where = os.makedev(major, minor)
            text = name[0] if name else ""
            result.append(Mapping(start, end, flags, int(inode), text, int(offset, 16), where))
    return result
