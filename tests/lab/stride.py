"""Which steps of many a campaign of deaths dies at: all, or every few where time is short.

`MTETOOL_DEATH_STRIDE` says how many steps lie between two deaths; CI has more than one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_NAME = "MTETOOL_DEATH_STRIDE"
STRIDE = int(os.environ.get(_NAME, "1"))

ENVIRONMENT = {"PYTHONPATH": "/opt/mtetool", _NAME: str(STRIDE)}
"""What a campaign in the lab is started with."""


def turns(first: int = 1) -> Sequence[int]:
    """The steps to die at, until one is never reached."""
    return range(first, 100_000, STRIDE)


def deaths_before(step: int, first: int = 1) -> int:
    """How many there were before the turn of a step."""
    return (step - first) // STRIDE


def enough(deaths: int) -> int:
    """How many deaths must have been, where so many would have been at every step."""
    return deaths // STRIDE
