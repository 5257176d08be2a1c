"""A fault on request answers like the real thing: missing or read-only memory."""

from __future__ import annotations

import errno
from itertools import product

import numpy as np
import pytest

from mtetool.faults.guest import Fail, Fault, FaultyGuest
from mtetool.guest import Guest
from mtetool.uapi import GRANULE_BYTES
from tests.conformance.guests import Factory

BASE = 0x4000_0000
N_PAGES = 8
BAD = 4


def answers(guest: Guest, direction: str, page: int) -> list[object]:
    """Return what copies around the bad page give: bytes and tags, or an errno."""
    found: list[object] = []
    for start, n_pages in product((0, BAD - 1, BAD, BAD + 1), (1, 2, N_PAGES)):
        n_pages = min(n_pages, N_PAGES - start)
        tags = np.full(n_pages * page // GRANULE_BYTES, 1 + start, dtype=np.uint8)
        copy = guest.read_tags if direction == "read" else guest.write_tags
        try:
            found.append((copy(BASE + start * page, tags), tags.tobytes()))
        except OSError as error:
            found.append(error.errno)
    return found


def both(real: Guest, rehearsed: Guest, page: int) -> None:
    for direction in ("write", "read"):
        expected = answers(real, direction, page)
        assert errno.EFAULT in expected or direction == "read"
        assert answers(rehearsed, direction, page) == expected


@pytest.mark.parametrize("direction", [None, "write"], ids=["hole", "read-only"])
def test_a_fault_answers_as_the_real_thing(
    make_guest: Factory, page: int, direction: str | None
) -> None:
    if direction is None:
        lower, upper = BAD * page, (N_PAGES - BAD - 1) * page
        real = make_guest([(BASE, lower, False), (BASE + lower + page, upper, False)])
    else:
        real = make_guest([(BASE, BAD * page, False), (BASE + BAD * page, 4 * page, True)])
    whole = make_guest([(BASE, N_PAGES * page, False)])
    size = page if direction is None else 4 * page
    fault = Fault(
        Fail(errno.EFAULT), on="write" if direction else None, at=(BASE + BAD * page, size)
    )
    both(real, FaultyGuest(whole, [fault]), page)
