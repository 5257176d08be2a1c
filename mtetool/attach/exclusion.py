"""One mtetool at a time where two would get in each other's way."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mtetool.errors import BusyError

_PATIENCE_SECONDS = 10.0


@contextmanager
def alone(pid: int) -> Iterator[None]:
    """Keep every other mtetool from mapping memory in the process or stopping its threads.

    The lock is on a file of the process in /proc, so the death of the holder frees it. Where
    another mount of /proc hides two runs from each other, the kernel (a thread has one tracer) and
    the marks in the memory itself (`helper.remove_leftovers`) must suffice. Raises BusyError.
    """
    file = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _locked(file):
            if time.monotonic() > deadline:
                raise BusyError(
                    f"another mtetool is attaching to process {pid} and makes no progress",
                    hint="check what it waits for; ending it is safe",
                    pid=pid,
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(file)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
