"""Stop signals of the terminal (Ctrl-Z and its kin), which wait while something of a VMM is held.

SIGSTOP waits for nobody; that is what `mtetool.attach.guard` is for.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

# What reading from or writing to the terminal brings a background process. Ignored, they let the
# write through; a handler would let it be tried again without end.
_OF_THE_BACKGROUND = (signal.SIGTTIN, signal.SIGTTOU)


class Stops:
    """Stop signals between `begin` and `end` wait until `end`.

    Only the main thread can see to that (signal(2) in Python); begun in another, nothing waits. A
    signal that somebody else ignores or handles is left alone.
    """

    def __init__(self) -> None:
        self._changed: list[signal.Signals] = []
        self._came = False

    def begin(self) -> None:
        """From now on they wait."""
        if self._changed or threading.current_thread() is not threading.main_thread():
            return
        self._came = False
        for number in (signal.SIGTSTP, *_OF_THE_BACKGROUND):
            if signal.getsignal(number) == signal.SIG_DFL:
                waits = number not in _OF_THE_BACKGROUND
                signal.signal(number, self._note if waits else signal.SIG_IGN)
                self._changed.append(number)

    def end(self) -> None:
        """Stop now where one came; comes back when the process is continued.

        Not where the process is about to end by another signal (Ctrl-Z, and then Ctrl-C).
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
        """In a forked child: nothing is held there, and what came was for its parent."""
        self._came = False
        self.end()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
