"""What standard output is: its size, and whether it takes colours and more than ASCII."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass

from mtetool.uapi import TAG_MAX

# Of the 256 colours of terminals: no two neighbours alike, all of them readable on black and white.
_TAG_COLOURS = (244, 33, 160, 34, 172, 99, 37, 199, 70, 27, 166, 135, 30, 204, 106, 63)
_MARKED = "7"
PIPE_COLUMNS = 80


@dataclass(frozen=True, slots=True)
class Screen:
    """Where a report goes. A file or a pipe has 80 columns, no colours and ASCII only."""

    is_terminal: bool = False
    columns: int = PIPE_COLUMNS
    lines: int = 24
    colours: bool = False
    utf8: bool = False

    def tag(self, tag: int, *, marked: bool = False) -> str:
        """A tag as a hex digit, in its own colour; `marked` is inverted."""
        return self.painted(f"{tag:x}", _TAG_COLOURS[tag & TAG_MAX], marked=marked)

    def painted(self, text: str, colour: int, *, marked: bool = False) -> str:
        """A text in one of the 256 colours, where there are colours."""
        if not self.colours:
            return text
        return f"\x1b[{_MARKED + ';' if marked else ''}38;5;{colour}m{text}\x1b[0m"


def screen() -> Screen:
    """The standard output of this process."""
    if not sys.stdout.isatty():
        return Screen()
    size = shutil.get_terminal_size()
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb"
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return Screen(True, max(size.columns, 1), max(size.lines, 1), not plain, is_utf8)
