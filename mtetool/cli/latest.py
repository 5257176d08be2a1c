"""Progress without waiting: a thread shows it, however slow its reader is.

A guest may stand still while its tags are read. A terminal that was stopped by Ctrl-S, or a program
that does not read its end of the pipe, must not keep the guest stopped for longer.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtetool.errors import no_thread

Show = Callable[[int, int | None], None]
"""Called with the bytes done and the total."""

_INTERVAL_SECONDS = 0.1
# Time for the thread to return from its write; a thread that is stuck in it is abandoned.
_PATIENCE_SECONDS = 1.0


@contextmanager
def never_waiting(show: Show) -> Iterator[Show]:
    """Yield a function like `show` that returns at once; a thread shows its latest arguments.

    What `show` raises is raised by the next call, or at the end. After success, the end waits
    until the last call was shown. Raises HostError where no thread can be started.
    """
    slot = _Slot(show)
    try:
        slot.thread.start()
    except RuntimeError as error:
        raise no_thread("showing progress (--progress none avoids this)", error) from error
    try:
        yield slot.put
    except BaseException:
        slot.end(_PATIENCE_SECONDS)
        raise
    slot.end(None)
    slot.check()


class _Slot:
    """The latest progress to show, and the thread that shows it."""

    def __init__(self, show: Show) -> None:
        self._show = show
        self._latest: tuple[int, int | None] | None = None
        self._error: Exception | None = None
        self._new = threading.Event()
        self._ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def put(self, done_bytes: int, total_bytes: int | None) -> None:
        self._latest = (done_bytes, total_bytes)
        self._new.set()
        self.check()

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def end(self, patience: float | None) -> None:
        self._ending.set()
        self._new.set()
        self.thread.join(patience)

    def _run(self) -> None:
        try:
            while not self._ending.wait(_INTERVAL_SECONDS):
                self._new.wait()
                self._show_latest()
            self._show_latest()
        except Exception as error:  # noqa: BLE001 - the caller's thread raises it
            self._error = error

    def _show_latest(self) -> None:
        self._new.clear()
        latest, self._latest = self._latest, None
        if latest is not None:
            self._show(*latest)


def write_line(text: str) -> None:
    """Write a line past the buffer of standard error: a stuck thread must not hold its lock."""
    data = (text + "\n").encode()
    try:
        fd = sys.stderr.fileno()
    except (OSError, ValueError):
        # A program has replaced standard error with a stream of its own.
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
        return
    while data:
        data = data[os.write(fd, data) :]
