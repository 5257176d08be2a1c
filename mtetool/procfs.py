"""What /proc says about processes and threads, parsed in one place.

Parts of these texts come from other people: names of programs, threads and files. The kernel
escapes newlines in them, but nothing else that Python takes for the end of a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path


def lines(path: Path | str) -> list[str]:
    """Return the lines of a file in /proc; only a newline ends a line. Raises OSError."""
    return os.fsdecode(Path(path).read_bytes()).split("\n")


def status_of(pid: int | str, proc: Path = Path("/proc")) -> dict[str, str]:
    """Return the fields of /proc/PID/status; empty where it cannot be read."""
    try:
        found = lines(proc / str(pid) / "status")
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in found)}


def stat_of(task: Path | str) -> list[str]:
    """Return the fields of a task's `stat` from the state on: index 0 is field 3 of proc(5).

    Raises OSError; ProcessLookupError where the task has ended meanwhile.
    """
    # The program's name is in parentheses, and can itself contain parentheses.
    text = os.fsdecode(Path(task, "stat").read_bytes())
    fields = text.rpartition(")")[2].split()
    if not fields:
        raise ProcessLookupError(f"{task} has an empty stat")
    return fields


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps: [start, end), `rwxp`; `inode` and `device` are 0 without a file."""

    start: int
    end: int
    flags: str
    inode: int
    name: str
    offset: int = 0
    device: int = 0


def mappings(pid: int) -> list[Mapping]:
    """Return the process's mappings in order of address. Raises OSError."""
    return parsed(lines(f"/proc/{pid}/maps"))


def parsed(texts: Iterable[str]) -> list[Mapping]:
    """Parse lines of the form of /proc/PID/maps; skip others."""
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
