"""Text of /proc, of which parts are other people's: names of programs, threads and files."""

from __future__ import annotations

import os
from pathlib import Path


def lines(path: Path | str) -> list[str]:
    """The lines of a text of the kernel's. Raises OSError.

    Only a newline ends one, and the kernel escapes those in names; whatever else Python takes for
    the end of a line (a carriage return, a form feed, U+2028) may stand in a name.
    """
    return os.fsdecode(Path(path).read_bytes()).split("\n")
