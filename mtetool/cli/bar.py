"""A progress bar in one line of the terminal, however narrow.

rich measures and colours the line. Its own live display is not used, because it hides the cursor,
and mtetool must leave the terminal intact however it is ended or stopped. A terminal shows one bar
at a time: of the two processes of `mtetool save ... | mtetool restore ...`, the one that holds a
lock on the terminal draws, and the other draws after the first has ended. A process in the
background draws nothing.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from mtetool.words import printable

_INTERVAL_SECONDS = 0.1
_COLUMNS = 80  # for a terminal that does not report its width
_BAR_COLUMNS = (30, 10)
_LABEL_COLUMNS = 12
# Parts of a line, with rich's styles for them.
_STYLES = {
    r"\[#+": "bar.complete",
    r"-+\]": "bar.back",
    r"\d+%": "progress.percentage",
    r"[\d.]+ \w+/s": "progress.data.speed",
    r"\d+:\d\d$": "progress.remaining",
}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1))


class Bar:
    """The bar of one task on standard error, which is a terminal; it is erased at the end.

    `stage` returns what is being done now, if there is more to say than the label.
    """

    def __init__(self, label: str, stage: Callable[[], str] = str) -> None:
        self._label = printable(label)
        self._stage = stage
        self._started = time.monotonic()
        self._due = 0.0
        self._drawn_columns = 0
        self._fd = sys.stderr.fileno()
        self._console = Console(stderr=True, highlight=False)
        self._terminal: int | None = None
        self._mine = False

    def __enter__(self) -> Self:
        # Opened again: a lock belongs to an open file, and a pipeline shares the shell's.
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC
            self._terminal = os.open(os.ttyname(self._fd), flags)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._drawn_columns and self._in_foreground():
            self._write("\r" + " " * self._drawn_columns + "\r")
        if self._terminal is not None:
            os.close(self._terminal)

    def update(self, done_bytes: int, total_bytes: int | None) -> None:
        """Draw the progress, unless it was drawn just now."""
        now = time.monotonic()
        if now < self._due or not self._in_foreground() or not self._take_terminal():
            return
        self._due = now + _INTERVAL_SECONDS
        # The last column stays free: some terminals wrap the line after it.
        columns = (os.get_terminal_size(self._fd).columns or _COLUMNS) - 1
        stage = self._stage()
        label = f"{self._label}: {stage}" if stage else self._label
        text = line(label, done_bytes, total_bytes, now - self._started, columns)
        drawn = cell_len(text)
        rest = " " * min(self._drawn_columns - drawn, columns - drawn)
        self._write(f"\r{self._coloured(text)}{rest}")
        self._drawn_columns = drawn

    def _coloured(self, text: str) -> str:
        coloured = Text(text)
        for pattern, style in _STYLES.items():
            coloured.highlight_regex(pattern, style)
        with self._console.capture() as captured:
            self._console.print(coloured, end="", soft_wrap=True)
        return captured.get()

    def _take_terminal(self) -> bool:
        if self._mine or self._terminal is None:
            return True
        try:
            fcntl.flock(self._terminal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # Draw even on a terminal that cannot be locked.
        self._mine = True
        return True

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # Not this process's controlling terminal: it has no jobs.

    def _write(self, text: str) -> None:
        # Past the buffer of standard error: a thread stuck here must not hold its lock.
        os.write(self._fd, text.encode(errors="backslashreplace"))


def line(
    label: str, done_bytes: int, total_bytes: int | None, elapsed_seconds: float, columns: int
) -> str:
    """Return what fits into `columns`: label, bar, percentage, sizes, rate and the time left."""
    if total_bytes is None:
        bars, share = [""], ""
    else:
        done = min(done_bytes / total_bytes, 1.0) if total_bytes else 1.0
        bars = [*(_bar(done, width) for width in _BAR_COLUMNS), ""]
        share = f"{int(done * 100):3d}%"
    sizes, rate, left = _numbers(done_bytes, total_bytes, elapsed_seconds)
    # From everything down to the percentage alone: take the first that leaves room for the label,
    # or for enough of it to be recognised.
    tails = [
        *(_joined(bar, share, sizes, rate, left) for bar in bars),
        _joined(bars[-1], share, sizes, rate),
        _joined(bars[-1], share, sizes),
        share or sizes,
    ]
    for enough in (cell_len(label), min(cell_len(label), _LABEL_COLUMNS)):
        for tail in tails:
            if enough + 1 + len(tail) <= columns:
                return f"{_cut(label, columns - 1 - len(tail))} {tail}"
    tail = tails[-1].strip()
    room = columns - 1 - len(tail)
    return f"{_cut(label, room)} {tail}" if room > 0 else tail[: max(columns, 0)]


def _cut(text: str, columns: int) -> str:
    if cell_len(text) <= columns:
        return text
    dots = "..."[: max(columns, 0)]
    return set_cell_size(text, columns - len(dots)).rstrip() + dots


def _bar(done: float, columns: int) -> str:
    full = int(done * columns)
    return f"[{'#' * full}{'-' * (columns - full)}]"


def _numbers(
    done_bytes: int, total_bytes: int | None, elapsed_seconds: float
) -> tuple[str, str, str]:
    """Return the sizes and the rate in one unit, and the time left."""
    largest = done_bytes if total_bytes is None else total_bytes
    unit, unit_bytes = next(u for u in _UNITS if largest >= u[1] or u[1] == 1)
    rate = done_bytes / max(elapsed_seconds, 1e-6)
    shown = [f"{n_bytes / unit_bytes:.1f}" for n_bytes in (done_bytes, largest, rate)]
    sizes = f"{shown[0]} {unit}" if total_bytes is None else f"{shown[0]}/{shown[1]} {unit}"
    if total_bytes is None or not done_bytes:
        return sizes, f"{shown[2]} {unit}/s", ""
    minutes, seconds = divmod(int(max(total_bytes - done_bytes, 0) / rate), 60)
    return sizes, f"{shown[2]} {unit}/s", f"{minutes}:{seconds:02d}"


def _joined(*parts: str) -> str:
    return " ".join(part for part in parts if part)
