"""The steps at which a campaign kills mtetool: all, or every few if time is short.

`MTETOOL_DEATH_STRIDE` is the number of steps from one death to the next; CI uses more than one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

_NAME = "MTETOOL_DEATH_STRIDE"
STRIDE = int(os.environ.get(_NAME, "1"))

ENVIRONMENT = {"PYTHONPATH": "/opt/mtetool", _NAME: str(STRIDE)}
"""The environment of a campaign in the lab."""


def turns(first: int = 1) -> Sequence[int]:
    """Return the steps to die at, until one is never reached."""
    return range(first, 100_000, STRIDE)


def deaths_before(step: int, first: int = 1) -> int:
    """Return how many deaths there were before a step's turn."""
    return (step - first) // STRIDE


def enough(deaths: int) -> int:
    """Return how many deaths there must have been, if every step would give that many."""
    return deaths // STRIDE
