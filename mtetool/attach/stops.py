"""Delay the terminal's stop signals (Ctrl-Z and its kin) while anything of a VMM is held.

SIGSTOP cannot be delayed; that is what `mtetool.attach.guard` is for.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

# A background process gets these when it reads from or writes to the terminal. Ignored, they let
# the write through; with a handler, the write would be retried without end.
_OF_THE_BACKGROUND = (signal.SIGTTIN, signal.SIGTTOU)


class Stops:
    """Makes stop signals between `begin` and `end` wait until `end`.

    Only the main thread can do that (signal(2) in Python); begun in another thread, nothing waits.
    A signal that is already ignored or handled is left alone.
    """

    def __init__(self) -> None:
        self._changed: list[signal.Signals] = []
        self._came = False

    def begin(self) -> None:
        """Make them wait from now on."""
        if self._changed or threading.current_thread() is not threading.main_thread():
            return
        self._came = False
        for number in (signal.SIGTSTP, *_OF_THE_BACKGROUND):
            if signal.getsignal(number) == signal.SIG_DFL:
                waits = number not in _OF_THE_BACKGROUND
                signal.signal(number, self._note if waits else signal.SIG_IGN)
                self._changed.append(number)

    def end(self) -> None:
        """Stop now if one came; return when the process is continued.

        But not if the process is about to end from another signal (Ctrl-Z, and then Ctrl-C).
        """
        if not self._changed or threading.current_thread() is not threading.main_thread():
            return
        for number in self._changed:
            if signal.getsignal(number) in (self._note, signal.SIG_IGN):
                signal.signal(number, signal.SIG_DFL)
        self._changed.clear()
        ending = sys.exception()
        if self._came and (ending is None or isinstance(ending, Exception)):
            signal.raise_signal(signal.SIGTSTP)

    def forget(self) -> None:
        """Forget all in a forked child: nothing is held there, and any signal was the parent's."""
        self._came = False
        self.end()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
