"""The signals that end mtetool are raised as exceptions, so that what it holds is let go."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import CO_COROUTINE
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from mtetool.errors import SignalError

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# A terminal that closes, or `timeout`, sends several signals at once: the later ones must
# not interrupt the unwinding that the first began. After this time they count again.
_UNWINDING_SECONDS = 2.0

# Python calls a handler between any two instructions of the main thread, also of the library's own
# code. There an exception can leave a lock taken, which other threads then wait for without end
# (threading), be printed and dropped (a callback of importlib's locks), or leave a process running
# that nobody knows (subprocess).
_DELICATE = ("threading", "queue", "importlib._bootstrap", "concurrent.futures.thread")
# What waits there may be interrupted, and must be.
_JOINING = ("join", "_wait_for_tstate_lock")
_AGAIN_SECONDS = 0.002
_LONGEST_DELAY_SECONDS = 1.0


class _Ending:
    """What became of the signals so far."""

    def __init__(self) -> None:
        self._raised_at: float | None = None
        self._delayed_at = 0.0
        self.delayed: int | None = None
        """The signal that waits for a better moment."""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle that signal: raise SignalError, unless an unwinding or a delay forbids it."""
        now = time.monotonic()
        if self._raised_at is not None and now - self._raised_at < _UNWINDING_SECONDS:
            return
        if _is_delicate(frame) and self._delay(number, now):
            return
        self._raise(number)

    def raise_delayed(self) -> None:
        """Raise SignalError if a signal waits."""
        if self.delayed is not None:
            self._raise(self.delayed)

    def _raise(self, number: int) -> NoReturn:
        self._raised_at, self.delayed = time.monotonic(), None
        raise SignalError(number)

    def lost(self, number: int) -> None:
        """Note that the exception was dropped: the signal comes again."""
        self._raised_at = None
        self._delay(number, time.monotonic())

    def _delay(self, number: int, now: float) -> bool:
        if self.delayed is not None:
            return now - self._delayed_at < _LONGEST_DELAY_SECONDS
        self.delayed, self._delayed_at = number, now
        try:
            # Not `threading.Thread`: its own locks may be what was interrupted.
            _thread.start_new_thread(self._send_again, ())
        except RuntimeError:
            self.delayed = None
        return self.delayed is not None

    def _send_again(self) -> None:
        # A timer would do without a thread, but its signal would outlive an exec, and kill a VMM.
        # Once is not enough: what comes just before a system call that waits does not end it.
        while True:
            time.sleep(_AGAIN_SECONDS)
            number = self.delayed
            if number is None:
                return
            signal.pthread_kill(_thread_of_signals(), number)


def _thread_of_signals() -> int:
    return threading.main_thread().ident or 0


_ending = _Ending()


@contextmanager
def raising() -> Iterator[None]:
    """Turn the signals that end mtetool into a SignalError, except ignored ones (nohup).

    A program that calls this from another thread than its main one keeps its signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _ending
    ending = _ending = _Ending()
    before = {number: signal.getsignal(number) for number in ENDING}
    caught = [number for number in ENDING if before[number] != signal.SIG_IGN]
    hook = sys.unraisablehook

    def unraisable(args: UnraisableHookArgs, /) -> None:
        if isinstance(args.exc_value, SignalError):
            ending.lost(args.exc_value.number)
        else:
            hook(args)

    try:
        sys.unraisablehook = unraisable
        for number in caught:
            signal.signal(number, ending.handle)
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
        sys.unraisablehook = hook
        ending.delayed = None


def raise_delayed() -> None:
    """Raise SignalError if a signal waits for a better moment: this is the last one."""
    _ending.raise_delayed()


def _is_delicate(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    if frame.f_globals.get("__name__") in _DELICATE and frame.f_code.co_name not in _JOINING:
        # `Condition.wait` sets this once it has let go of its lock and is ready to take it again.
        return "gotit" not in frame.f_locals
    return _is_within_delicate(frame)


def _is_within_delicate(frame: FrameType) -> bool:
    """Return whether a process is being started, or an event loop runs a callback and no task.

    The loop would only log the error.
    """
    in_task = False
    outer: FrameType | None = frame
    while outer is not None:
        place = outer.f_globals.get("__name__"), outer.f_code.co_name
        if place == ("subprocess", "__init__"):
            return True
        if place == ("asyncio.events", "_run"):
            return not in_task
        in_task = bool(outer.f_code.co_flags & CO_COROUTINE)
        outer = outer.f_back
    return False
