"""The loops over granules, and over records of pages: in C if that was compiled, else in numpy.

Both do the same, byte for byte; `mtetool.loops_numpy` describes it. The C version needs no numpy,
which takes longer to import than saving a small guest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "first_difference",
    "frame_run",
    "from_runs",
    "mask",
    "pack",
    "page_run",
    "ram_records",
    "rows",
    "scan",
    "tally",
    "to_runs",
    "unpack",
    "xor",
]

if TYPE_CHECKING:
    from mtetool.loops_numpy import (
        first_difference,
        frame_run,
        from_runs,
        mask,
        pack,
        page_run,
        ram_records,
        rows,
        scan,
        tally,
        to_runs,
        unpack,
        xor,
    )
else:
    try:
        from mtetool import _loops

        globals().update({name: getattr(_loops, name) for name in __all__})
    except (ImportError, AttributeError):  # the latter: one that was compiled from older code
        from mtetool import loops_numpy

        globals().update({name: getattr(loops_numpy, name) for name in __all__})
