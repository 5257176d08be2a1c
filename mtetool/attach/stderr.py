"""Another process's standard error, held for as long as it takes to write a few lines to it.

Whoever reads a process's output to its end waits for all who hold it, so nobody else may keep it
open. It is duplicated out of the process (pidfd_getfd(2)): opened anew by its name in /proc, a
file would begin at its start again, another user's pipe be refused, and a socket not be there.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_NR_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h
_STDERR = 2
# Who does not read is not waited for.
_PATIENCE_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@contextmanager
def stderr_of(processes: Iterable[int]) -> Iterator[int | None]:
    """A descriptor of the first such process's standard error that can be had; None: there is none.

    Needs the right to trace the process.
    """
    fd = next((fd for fd in map(_duplicate, processes) if fd is not None), None)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def write_briefly(fd: int, data: bytes) -> None:
    """Write a few lines; what cannot be written within two seconds is dropped. Uses SIGALRM.

    The file's own flags are shared with the process, so that it cannot be made non-blocking.
    """
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(_PATIENCE_SECONDS * 1000):
        return
    signal.signal(signal.SIGALRM, _too_long)
    with suppress(OSError):
        signal.setitimer(signal.ITIMER_REAL, _PATIENCE_SECONDS)
        os.write(fd, data)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TimeoutError


def _duplicate(pid: int) -> int | None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return None
    try:
        fd = int(_libc.syscall(_NR_PIDFD_GETFD, pidfd, _STDERR, 0))
    finally:
        os.close(pidfd)
    return fd if fd >= 0 else None
