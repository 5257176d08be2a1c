"""The processes that have something open, by the links in /proc/PID/fd."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

# Tables of other people's making: longer ones are not read to their end.
_MOST_FDS = 1 << 16


def who_has(link: str, proc: Path = Path("/proc"), *, mode: int = 0) -> list[int]:
    """Return the PIDs of all processes with a descriptor that leads to `link`, ascending.

    With stat.S_IRUSR or S_IWUSR as `mode`, it must be open for that. The list lacks processes that
    this user may not look at.
    """
    pids = (int(path.name) for path in proc.iterdir() if path.name.isdecimal())
    return sorted(pid for pid in pids if link in _links(proc / str(pid) / "fd", mode))


def pipe_holders(fd: int, *, writers: bool, proc: Path = Path("/proc")) -> list[int]:
    """Return the PIDs of the other processes that write to, or read from, the pipe of `fd`.

    The list is ascending, lacks processes that this user may not look at, and is empty if it is
    not a pipe.
    """
    found = os.fstat(fd)
    if not stat.S_ISFIFO(found.st_mode):
        return []
    # A named pipe is not found: its link is its name. QEMU and libvirt use none.
    mode = stat.S_IWUSR if writers else stat.S_IRUSR
    return [pid for pid in who_has(f"pipe:[{found.st_ino}]", proc, mode=mode) if pid != os.getpid()]


def _links(directory: Path, mode: int) -> Iterator[str]:
    """What the descriptors of a process lead to; nothing where it may not be seen, or has ended."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in islice(entries, _MOST_FDS):
            with suppress(OSError):
                # The permissions of such a link are what the descriptor is open for.
                if not mode or entry.stat(follow_symlinks=False).st_mode & mode:
                    yield str(Path(entry.path).readlink())
