"""Copies of tags by ptrace, on a simulated kernel: partial answers, and what is written."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.ptrace import PEEKMTETAGS, POKEMTETAGS, Tracee
from mtetool.backends.proc import requests
from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES

PAGE = PAGE_BYTES // GRANULE_BYTES
BASE = 0x4000_0000
N_PAGES = 12


class Played:
    """A process with tags from BASE on; `readonly` and `holes` are page numbers."""

    def __init__(self, tags: Tags, readonly: set[int], holes: set[int]) -> None:
        self.tags = tags.copy()
        self.readonly = readonly
        self.holes = holes
        self.written: set[int] = set()

    def copy_tags(self, request: int, address: int, local: int, n_bytes: int) -> int:
        """Copy as __access_remote_tags does."""
        first = (address - BASE) // GRANULE_BYTES
        done = 0
        while done < n_bytes:
            page = (first + done) // PAGE
            blocked = self.holes | (self.readonly if request == POKEMTETAGS else set())
            if page >= N_PAGES or page in blocked:
                break
            count = min(PAGE - (first + done) % PAGE, n_bytes - done)
            ours = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(local + done))
            theirs = self.tags[first + done : first + done + count]
            if request == POKEMTETAGS:
                theirs[:] = ours & 0xF
                self.written.add(page)
            else:
                assert request == PEEKMTETAGS
                ours[:] = theirs
            done += count
        if not done:
            raise OSError(errno.EIO, "played")
        return done


_pages = st.sets(st.integers(0, N_PAGES - 1), max_size=3)


def _tags(seed: int, changed: set[int]) -> Tags:
    tags = np.random.default_rng(7).integers(0, 16, N_PAGES * PAGE, dtype=np.uint8)
    for page in changed:
        at = page * PAGE + seed % PAGE
        tags[at] ^= 1 + seed % 15
    return tags


def _completed(copy: Callable[[], int]) -> int:
    """Return how many granules a copy completed; EIO means none."""
    try:
        done = copy()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return 0
    assert done
    return done


@given(
    changed=_pages,
    readonly=_pages,
    holes=_pages,
    start=st.integers(0, N_PAGES - 1),
    part=st.sampled_from([PAGE, 3 * PAGE, 64 * PAGE]),
    seed=st.integers(0, 10_000),
)
def test_poke_is_exact_up_to_what_is_in_the_way(
    changed: set[int], readonly: set[int], holes: set[int], start: int, part: int, seed: int
) -> None:
    before = _tags(0, set())
    wanted = _tags(seed, changed)
    played = Played(before, readonly, holes)
    stop = min((p for p in holes | (readonly & changed) if p >= start), default=N_PAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "_PART_GRANULES", part)
        given_tags = wanted[start * PAGE :] | np.uint8(0xA0)  # high bits are dropped
        done = _completed(
            lambda: requests.poke(cast(Tracee, played), BASE + start * PAGE_BYTES, given_tags)
        )
    assert done == (stop - start) * PAGE
    reached = {page for page in changed if start <= page < stop}
    assert reached <= played.written <= changed
    for page in range(start, stop):
        assert np.array_equal(played.tags[page * PAGE :][:PAGE], wanted[page * PAGE :][:PAGE])


@given(holes=_pages, start=st.integers(0, N_PAGES - 1), part=st.sampled_from([PAGE, 5 * PAGE]))
def test_peek_stops_at_the_first_hole(holes: set[int], start: int, part: int) -> None:
    tags = _tags(0, set())
    played = Played(tags, set(), holes)
    stop = min((page for page in holes if page >= start), default=N_PAGES)
    out = np.full((N_PAGES + 2 - start) * PAGE, 0xEE, dtype=np.uint8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "_PART_GRANULES", part)
        done = _completed(
            lambda: requests.peek(cast(Tracee, played), BASE + start * PAGE_BYTES, out)
        )
    assert done == (stop - start) * PAGE
    assert np.array_equal(out[:done], tags[start * PAGE : stop * PAGE])
    assert (out[done:] == 0xEE).all()


def test_another_error_is_no_end_of_memory() -> None:
    class Gone(Played):
        def copy_tags(self, request: int, address: int, local: int, n_bytes: int) -> int:
            raise ProcessLookupError(errno.ESRCH, "played")

    with pytest.raises(ProcessLookupError):
        requests.peek(cast(Tracee, Gone(_tags(0, set()), set(), set())), BASE, _tags(0, set()))
