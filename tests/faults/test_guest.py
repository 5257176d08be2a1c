"""Faults in front of a guest: where they fire, what they answer, and what was done before."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.errors import GuestLostError
from mtetool.faults.guest import Delay, Fail, Fault, FaultyGuest, Rate, Vanish
from mtetool.faults.model import Effect
from mtetool.guest import Memslot
from mtetool.tags import Tags
from mtetool.uapi import COPY_LENGTH_MAX, GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
N_PAGES = 32
SLOTS = (Memslot(0, BASE, N_PAGES * PAGE),)
MASK = (1 << 64) - 1


def faulty(*faults: Fault, guest: FakeGuest | None = None) -> FaultyGuest:
    return FaultyGuest(guest or FakeGuest(SLOTS), faults, sleep=lambda seconds: None)


def tags(n_pages: int, tag: int = 7) -> Tags:
    return np.full(n_pages * PAGE // GRANULE_BYTES, tag, dtype=np.uint8)


def answer(guest: FaultyGuest, direction: str, page: int, n_pages: int) -> int | str:
    """Copy pages; return how many were copied, the errno's name, or "lost"."""
    copy = guest.read_tags if direction == "read" else guest.write_tags
    try:
        return copy(BASE + page * PAGE, tags(n_pages)) // PAGE
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except GuestLostError:
        return "lost"


# --- against a second implementation, page by page ----------------------------------------


@dataclass
class Seen:
    fault: Fault
    copies: int = 0
    pages: int = 0
    fired: int = 0

    def covers(self, direction: str, ipa: int) -> bool:
        if self.fault.on not in (None, direction):
            return False
        if self.fault.times is not None and self.fired >= self.fault.times:
            return False
        at = self.fault.at
        return at is None or (at[0] < ipa + PAGE and ipa < at[0] + at[1])

    def fires(self, *, due: bool) -> bool:
        if self.pages < self.fault.after or not due:
            return False
        return drawn(self.fault.seed, self.pages) < self.fault.chance


def mixed(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def drawn(seed: int, number: int) -> float:
    return (mixed((mixed(seed) + (number + 1) * 0x9E3779B97F4A7C15) & MASK) >> 11) / (1 << 53)


def expected(seen: list[Seen], direction: str, page: int, n_pages: int) -> int | str:
    first = [one for one in seen if one.covers(direction, BASE + page * PAGE)]
    for one in first:
        one.copies += 1
    for done in range(n_pages):
        here = [one for one in seen if one.covers(direction, BASE + (page + done) * PAGE)]
        firing = []
        for one in here:
            at_start = done == 0 and one.copies % one.fault.every == 0
            if one.fires(due=one.fault.every == 1 or at_start):
                firing.append(one)
        stopping = next((o for o in firing if isinstance(o.fault.effect, Fail | Vanish)), None)
        if stopping is not None and isinstance(stopping.fault.effect, Vanish):
            stopping.fired += 1
            return "lost"
        if stopping is not None and done:
            return done
        for one in here:
            one.pages += 1
        if stopping is not None:
            stopping.fired += 1
            assert isinstance(stopping.fault.effect, Fail)
            return errno.errorcode[stopping.fault.effect.errno]
        for one in firing:
            one.fired += 1
    return n_pages


@st.composite
def any_faults(draw: st.DrawFn) -> Fault:
    kinds: list[Effect] = [Fail(errno.EFAULT), Fail(errno.EBUSY), Delay(3), Rate(1 << 20), Vanish()]
    effect = draw(st.sampled_from(kinds))
    chance = draw(st.sampled_from([1.0, 0.9, 0.3, 0.05]))
    return Fault(
        effect,
        on=draw(st.sampled_from([None, "read", "write"])),
        at=draw(
            st.none()
            | st.tuples(st.integers(BASE - PAGE, BASE + 40 * PAGE), st.integers(1, 9 * PAGE))
        ),
        after=draw(st.integers(0, 60)),
        every=draw(st.integers(1, 3)),
        chance=chance,
        seed=draw(st.integers(0, MASK)) if chance < 1 else 0,
        times=None if isinstance(effect, Vanish) else draw(st.none() | st.integers(1, 9)),
    )


copies = st.tuples(
    st.sampled_from(["read", "write"]), st.integers(0, N_PAGES - 1), st.integers(1, N_PAGES)
)


@settings(max_examples=300, deadline=None)
@given(st.lists(any_faults(), max_size=4), st.lists(copies, min_size=1, max_size=25))
def test_copies_go_as_page_by_page(faults: list[Fault], asked: list[tuple[str, int, int]]) -> None:
    guest, seen = faulty(*faults), [Seen(fault) for fault in faults]
    for direction, page, n_pages in asked:
        n_pages = min(n_pages, N_PAGES - page)
        wanted = expected(seen, direction, page, n_pages)
        assert answer(guest, direction, page, n_pages) == wanted
        assert [counted.fired for counted in guest.faults().counted] == [one.fired for one in seen]
        if wanted == "lost":
            return


# --- what an answer is --------------------------------------------------------------------


def test_what_was_completed_before_a_fault_counts() -> None:
    inner = FakeGuest(SLOTS)
    guest = faulty(Fault(Fail(errno.ENOMEM), on="write", at=(BASE + 5 * PAGE, 1)), guest=inner)
    assert answer(guest, "write", 2, 8) == 3
    assert answer(guest, "write", 5, 1) == "ENOMEM"
    assert answer(guest, "write", 6, 4) == 4
    pages = inner.memory[BASE].reshape(N_PAGES, -1)
    assert [page for page in range(N_PAGES) if pages[page].all()] == [2, 3, 4, 6, 7, 8, 9]
    assert answer(guest, "read", 0, 12) == 12


def test_an_errno_heals_once_it_was_given() -> None:
    guest = faulty(Fault(Fail(errno.EFAULT), after=4, times=1))
    # The short copy is not the fault yet: the next copy there must show the errno.
    assert [answer(guest, "read", 0, 8), answer(guest, "read", 4, 4)] == [4, "EFAULT"]
    assert answer(guest, "read", 4, 4) == 4


def test_a_dead_vm_is_told_as_the_real_backend_tells_it() -> None:
    guest = faulty(Fault(Fail(errno.EIO), after=2, times=1))
    assert [answer(guest, "read", 0, 4), answer(guest, "read", 2, 1)] == [2, "lost"]
    assert answer(guest, "read", 2, 1) == 1


def test_a_guest_that_vanished_is_gone() -> None:
    inner = FakeGuest(SLOTS)
    guest = faulty(Fault(Vanish(), on="write", after=3), guest=inner)
    assert answer(guest, "write", 0, 8) == "lost"
    # The tags written before are in the memory of a VM that is gone.
    assert np.count_nonzero(inner.memory[BASE]) == 3 * PAGE // GRANULE_BYTES
    assert answer(guest, "read", 0, 1) == "lost"
    for call in (guest.info, guest.paused, guest.freeze, guest.enable_mte):
        with pytest.raises(GuestLostError):
            call()
    with pytest.raises(GuestLostError):
        guest.read_tags(BASE + 1, tags(1))
    guest.thaw()
    guest.close()


def test_the_guests_own_answers_come_first() -> None:
    inner = FakeGuest(SLOTS)
    guest = faulty(Fault(Fail(errno.EBUSY)), guest=inner)
    with pytest.raises(OSError, match="misaligned"):
        guest.read_tags(BASE + 1, tags(1))
    assert guest.read_tags(BASE, tags(0)) == 0
    inner.lost_after_reads = 0
    assert answer(guest, "read", 0, 1) == "lost"
    huge = np.broadcast_to(np.uint8(0), (COPY_LENGTH_MAX // GRANULE_BYTES + 1,))
    # This guest takes any length, and its answer is the one that counts.
    assert guest.write_tags(BASE, huge) == N_PAGES * PAGE


@pytest.mark.parametrize(
    ("fault", "number"),
    [
        (Fault(Fail(errno.EBUSY)), errno.EBUSY),
        (Fault(Fail(errno.EBUSY), on="write", times=1), errno.EBUSY),
        (Fault(Fail(errno.EACCES), on="write"), errno.EACCES),
        (Fault(Fail(errno.EBUSY), on="read"), None),
        (Fault(Fail(errno.EBUSY), on="write", after=1), None),
        (Fault(Fail(errno.EBUSY), on="write", chance=0.5), None),
        (Fault(Fail(errno.EBUSY), at=(BASE, PAGE)), None),
        (Fault(Fail(errno.EFAULT), on="write"), None),
    ],
)
def test_a_write_of_nothing_is_refused_where_every_write_is(
    fault: Fault, number: int | None
) -> None:
    """It does not count as a write: asking changes nothing."""
    guest = faulty(fault)
    for _ in range(2):
        if number is None:
            assert guest.write_tags(BASE, tags(0)) == 0
        else:
            with pytest.raises(OSError, match=errno.errorcode[number]):
                guest.write_tags(BASE, tags(0))
    (counted,) = guest.faults().counted
    assert (counted.copies, counted.pages, counted.fired) == (0, 0, 0)


def test_where_the_guest_itself_fails_nothing_fires() -> None:
    guest = faulty(Fault(Fail(errno.EBUSY), after=8, times=1))
    guest_end = N_PAGES - 4
    assert answer(guest, "read", guest_end, 8) == 4
    assert answer(guest, "read", N_PAGES, 8) == "EFAULT"
    assert answer(guest, "read", 0, 8) == 4
    assert answer(guest, "read", 4, 1) == "EBUSY"


def test_slow_copies_take_their_time() -> None:
    slept: list[float] = []
    faults: Iterable[Fault] = [
        Fault(Delay(1_000_000), on="read"),
        Fault(Rate(PAGE * 4), at=(BASE, 2 * PAGE)),
    ]
    guest = FaultyGuest(FakeGuest(SLOTS), faults, sleep=slept.append)
    assert answer(guest, "read", 0, 8) == 8
    assert answer(guest, "write", 1, 8) == 8
    assert answer(guest, "write", 2, 8) == 8
    assert slept == pytest.approx([0.008 + 0.5, 0.25])


def test_closing_closes_the_guest() -> None:
    closed = []

    class Closing(FakeGuest):
        def close(self) -> None:
            closed.append(True)

    with faulty(Fault(Vanish()), guest=Closing(SLOTS)):
        pass
    assert closed


@pytest.mark.parametrize(
    "wrong",
    [
        {"on": "both"},
        {"at": (BASE, 0)},
        {"at": ((1 << 64) - 1, 2)},
        {"at": (-1, 2)},
        {"after": -1},
        {"every": 0},
        {"chance": 0.0},
        {"chance": 1.1},
        {"chance": float("nan")},
        {"seed": 1},
        {"times": 0},
        {"effect": Vanish(), "times": 1},
    ],
)
def test_faults_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Fault(**{"effect": Fail(errno.EFAULT), **wrong})


def test_effects_that_make_no_sense() -> None:
    for make in (lambda: Fail(0), lambda: Fail(5000), lambda: Delay(0), lambda: Rate(0)):
        with pytest.raises(ValueError, match=r"\w"):
            make()
