"""Another process's standard error, held only as long as it takes to write a few lines to it.

A reader of a process's output waits until every holder has closed it, so we must not keep it open.
It is duplicated out of the process (pidfd_getfd(2)). If it were opened anew by its name in /proc, a
file would start again at its beginning, another user's pipe would be refused, and a socket could
not be opened.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

_NR_PIDFD_GETFD = 438  # include/uapi/asm-generic/unistd.h
_STDERR = 2
# A reader that does not read is not waited for.
_PATIENCE_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@contextmanager
def stderr_of(processes: Iterable[int]) -> Iterator[int | None]:
    """Yield a descriptor of the first standard error that can be had; None if there is none.

    Needs the right to trace the process.
    """
    fd = next((fd for fd in map(_duplicate, processes) if fd is not None), None)
    try:
        yield fd
    finally:
        if fd is not None:
            os.close(fd)


def write_briefly(fd: int, data: bytes) -> None:
    """Write a few lines; what cannot be written within two seconds is dropped.

    This uses SIGALRM; an alarm that was set comes later. The file's own flags are shared with the
    process, so it cannot be made non-blocking.
    """
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(_PATIENCE_SECONDS * 1000):
        return
    before = signal.signal(signal.SIGALRM, _too_long)
    left = 0.0
    try:
        left, _ = signal.setitimer(signal.ITIMER_REAL, _PATIENCE_SECONDS)
        os.write(fd, data)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except OSError:
        pass  # there is nowhere left to report that
    signal.signal(signal.SIGALRM, before)
    signal.setitimer(signal.ITIMER_REAL, left)


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
