"""The source's half of the tags, over a guest that says where it may have some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, repeat

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mtetool.buffers import TagBuffer, as_bytes
from mtetool.extents import pages_of
from mtetool.guest import Extent, Guest, GuestInfo
from mtetool.relay import payload
from mtetool.relay.outgoing import Outgoing
from mtetool.relay.placing import Placed

_PAGE, _N_PAGES, _BASE = 4096, 1536, 0x4000_0000
_NOT_ASKED = "the source's relay only reads"


class _Guest(Guest):
    """A guest whose pages exist or not; those that do not are not to be read in long runs."""

    page_size_bytes = _PAGE

    def __init__(self) -> None:
        self.tags = np.zeros((_N_PAGES, 256), np.uint8)
        self.exists = np.zeros(_N_PAGES, bool)
        self.n_read = 0

    def info(self) -> GuestInfo:
        raise AssertionError(_NOT_ASKED)

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        room = np.frombuffer(as_bytes(out), np.uint8)
        first, n_pages = (ipa - _BASE) // _PAGE, len(room) // 256
        room[:] = self.tags[first : first + n_pages].ravel()
        self.n_read += n_pages
        return len(room) * 16

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        raise AssertionError(_NOT_ASKED)

    def freeze(self) -> None:
        raise AssertionError(_NOT_ASKED)

    def thaw(self) -> float:
        raise AssertionError(_NOT_ASKED)

    def enable_mte(self) -> bool:
        raise AssertionError(_NOT_ASKED)

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        first = (extent.ipa - _BASE) // _PAGE
        here = np.flatnonzero(self.exists[first : first + extent.size_bytes // _PAGE]) + first
        if len(here):
            for run in np.split(here, np.flatnonzero(np.diff(here) != 1) + 1):
                yield Extent(_BASE + int(run[0]) * _PAGE, len(run) * _PAGE)

    def touch(self, first: int, n_pages: int, seed: int) -> None:
        """Make pages, and tag about half of them."""
        random = np.random.default_rng(seed)
        some = slice(first, first + n_pages)
        self.exists[some] = True
        made = self.tags[some]
        made[:] = random.integers(0, 16, made.shape) * random.integers(0, 2, (len(made), 1))

    def discard(self, first: int, n_pages: int) -> None:
        """Give pages back, as a balloon does."""
        self.exists[first : first + n_pages] = False
        self.tags[first : first + n_pages] = 0


def _outgoing(guest: Guest) -> Outgoing:
    placed = [Placed(0, 0, _BASE, _N_PAGES * _PAGE)]
    # Each step has as few pages as one may have.
    return Outgoing(guest, placed, _PAGE, step_seconds=1e-9)


def _after(n_steps: int) -> Callable[[], bool]:
    """What stops a round after so many steps."""
    answers = chain(repeat(False, n_steps), repeat(True))
    return lambda: next(answers)


_SPANS = st.tuples(st.integers(0, _N_PAGES - 1), st.integers(1, _N_PAGES))
_ACTIONS = st.tuples(st.booleans(), _SPANS, st.integers(0, 99))
_ROUNDS = st.tuples(st.lists(_ACTIONS, max_size=4), st.integers(0, 3))


@given(st.lists(_ROUNDS, min_size=1, max_size=5))
def test_what_goes_over_is_what_the_guest_has(
    rounds: list[tuple[list[tuple[bool, tuple[int, int], int]], int]],
) -> None:
    guest = _Guest()
    outgoing = _outgoing(guest)
    there = np.zeros_like(guest.tags)
    marks = np.ones(_N_PAGES, np.uint8)

    def arrive(packed: bytes) -> None:
        extents, tags = payload.unpack(packed, _PAGE)
        there[pages_of(extents, _PAGE) - _BASE // _PAGE] = tags.reshape(-1, 256)

    for actions, n_steps in rounds:
        for touches, (first, n_pages), seed in actions:
            if touches:
                guest.touch(first, n_pages, seed)
            else:
                guest.discard(first, n_pages)
            marks[first : first + n_pages] = 1
        outgoing.round([marks], arrive, _after(n_steps))
        marks[:] = 0
    outgoing.round([marks], arrive)
    assert np.array_equal(there, guest.tags)


def test_memory_that_was_never_touched_is_not_read() -> None:
    guest = _Guest()
    guest.touch(200, 100, 1)
    outgoing = _outgoing(guest)
    outgoing.round([np.ones(_N_PAGES, np.uint8)], lambda packed: None)
    assert guest.n_read == outgoing.sent.read_pages == 100


def test_pages_that_a_stopped_round_leaves_are_read_by_the_next() -> None:
    guest = _Guest()
    guest.touch(0, _N_PAGES, 1)
    outgoing = _outgoing(guest)
    every, none = np.ones(_N_PAGES, np.uint8), np.zeros(_N_PAGES, np.uint8)
    assert outgoing.round([every], lambda packed: None, _after(1)) == 512
    assert (guest.n_read, outgoing.n_left) == (512, 1024)
    every[1000:] = 0
    assert outgoing.round([every], lambda packed: None, _after(0)) == 0
    assert (guest.n_read, outgoing.n_left) == (512, _N_PAGES)
    assert outgoing.round([none], lambda packed: None) == _N_PAGES
    assert (guest.n_read, outgoing.n_left) == (512 + _N_PAGES, 0)


def test_steps_are_as_long_as_reading_is_fast() -> None:
    guest = _Guest()
    guest.touch(0, _N_PAGES, 1)
    marks = np.ones(_N_PAGES, np.uint8)
    n_frames = []
    for step_seconds in (None, 1e9, 1e-9):
        frames: list[bytes] = []
        placed = [Placed(0, 0, _BASE, _N_PAGES * _PAGE)]
        outgoing = Outgoing(guest, placed, _PAGE, step_seconds=step_seconds)
        outgoing.round([marks], frames.append)
        n_frames.append(len(frames))
    assert n_frames == [1, 2, 3]


def test_no_page_is_read_twice_once_the_guest_stands_still() -> None:
    guest = _Guest()
    guest.touch(0, _N_PAGES, 1)
    outgoing = _outgoing(guest)
    marks = np.zeros(_N_PAGES, np.uint8)
    marks[:700] = 1
    frames: list[bytes] = []
    assert outgoing.round([marks], frames.append, _after(1)) == 512
    assert outgoing.round([marks], frames.append, stands_still=True) == 700
    marks[600:800] = 1
    assert outgoing.round([marks], frames.append, stands_still=True) == 100
    assert guest.n_read == 512 + 700 + 100
