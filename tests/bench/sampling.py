"""Where CPU time goes in this process, by the Python line that each thread is at.

Each sample takes the time that every thread spent on a CPU since the last one and adds it to
the line where the thread is now, or was then, if it now waits for another thread. What a C
function does without the interpreter's lock is seen at the line that calls it; what it does
holding the lock, at the first line after it.
"""

from __future__ import annotations

import linecache
import os
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import NamedTuple, Self

_INTERVAL_SECONDS = 0.001


class Line(NamedTuple):
    """A line of Python in a function."""

    module: str
    function: str
    number: int
    text: str


Stack = tuple[Line, ...]
"""The innermost line first; empty for threads that Python did not start."""


_WAITING_IN = ("concurrent.futures.thread", "concurrent.futures._base", "threading", "queue")


def waits(stack: Stack) -> bool:
    """Whether a thread waits for another one, or has nothing to do."""
    return bool(stack) and stack[0].module in _WAITING_IN


@dataclass
class Sampler:
    """Samples while it is entered; `spent` then has seconds of CPU time for each stack.

    Entering it again adds to them.
    """

    spent: dict[Stack, float] = field(default_factory=lambda: defaultdict(float))
    sampling_seconds: float = 0.0
    _done: threading.Event = field(default_factory=threading.Event)
    _before: dict[int, float] = field(default_factory=dict)
    _stacks: dict[int, Stack] = field(default_factory=dict)

    def __enter__(self) -> Self:
        self._done.clear()
        self._before = _clocks()
        self._thread = threading.Thread(target=self._run, name="sampler")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._done.wait(_INTERVAL_SECONDS):
            self._sample()
        self._sample()
        self.sampling_seconds += time.thread_time()

    def _sample(self) -> None:
        me = threading.get_native_id()
        idents = {t.native_id: t.ident for t in threading.enumerate()}
        frames = sys._current_frames()
        now = _clocks()
        for tid, seconds in now.items():
            spent = seconds - self._before.get(tid, 0.0)
            if tid != me and spent > 0:
                ident = idents.get(tid)
                frame = frames.get(ident) if ident is not None else None
                stack, before = _stack(frame), self._stacks.get(tid, ())
                if waits(stack) and before and not waits(before):
                    self.spent[before] += spent
                else:
                    self.spent[stack] += spent
                self._stacks[tid] = stack
        self._before = now


def _clocks() -> dict[int, float]:
    """The CPU seconds of each thread, by its ID in the kernel."""
    clocks = {}
    for entry in Path("/proc/self/task").iterdir():
        tid = int(entry.name)
        try:
            # A thread's CPU clock has this number (include/linux/posix-timers_types.h:
            # CPUCLOCK_PERTHREAD_MASK | CPUCLOCK_SCHED below the inverted thread number).
            clocks[tid] = time.clock_gettime(~tid << 3 | 4 | 2)
        except OSError:
            continue  # The thread has ended.
    return clocks


def _stack(frame: FrameType | None) -> Stack:
    lines = []
    while frame is not None:
        code = frame.f_code
        text = linecache.getline(code.co_filename, frame.f_lineno).strip()
        module = str(frame.f_globals.get("__name__", ""))
        lines.append(Line(module, code.co_qualname, frame.f_lineno, text))
        frame = frame.f_back
    return tuple(lines)


def cpu_seconds() -> float:
    """The CPU seconds of all threads of this process so far, ended ones too."""
    times = os.times()
    return times.user + times.system
