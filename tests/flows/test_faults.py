"""Whatever faults a guest has, tags are exact or reported, and the status says so."""

from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtetool.errors import GuestError, MtetoolError
from mtetool.faults.guest import Delay, Fail, Fault, FaultyGuest, Rate, Vanish
from mtetool.flows.diff import Difference, diff
from mtetool.flows.restore import RestoreOptions, RestoreResult, restore
from mtetool.flows.save import SaveOptions, SaveResult, save
from mtetool.guest import Extent, Memslot, Missing
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.source import GuestSource, SnapshotSource
from mtetool.streaming import Rows
from mtetool.uapi import GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
SLOTS = (
    Memslot(0, BASE, 24 * PAGE),
    Memslot(1, BASE + 32 * PAGE, 16 * PAGE),
    Memslot(2, BASE + 48 * PAGE, 8 * PAGE, readonly=None),
)
END = SLOTS[-1].end
# Errnos of a page, of the whole VM, transient ones, and one that no kernel gives here.
ERRNOS = (
    errno.EFAULT,
    errno.EBUSY,
    errno.EIO,
    errno.EINVAL,
    errno.EINTR,
    errno.EAGAIN,
    errno.ENOMEM,
    errno.EPERM,
    errno.EBADF,
    errno.ENOSPC,
)

effects = st.one_of(
    st.sampled_from(ERRNOS).map(Fail), st.just(Vanish()), st.just(Delay(5)), st.just(Rate(1 << 20))
)
places = st.builds(
    lambda page, n_pages: (BASE + page * PAGE, n_pages * PAGE),
    st.integers(0, 56),
    st.integers(1, 20),
)


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    effect = draw(effects)
    chance = draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.1, 0.02]))
    return Fault(
        effect,
        on=draw(st.sampled_from([None, "read", "write"])),
        at=draw(st.none() | places),
        after=draw(st.just(0) | st.integers(0, 80)),
        every=draw(st.just(1) | st.integers(1, 4)),
        chance=chance,
        seed=draw(st.integers(0, 9)) if chance < 1 else 0,
        times=None if isinstance(effect, Vanish) else draw(st.none() | st.integers(1, 5)),
    )


some_faults = st.lists(faults(), max_size=4)


def guest_with_tags(seed: int) -> FakeGuest:
    # Four pages per copy, so a small guest takes many copies.
    guest = FakeGuest(SLOTS, max_copy_granules=4 * PAGE // GRANULE_BYTES)
    random = np.random.default_rng(seed)
    for tags in guest.memory.values():
        pages = tags.reshape(-1, PAGE // GRANULE_BYTES)
        pages[:] = random.integers(0, 16, pages.shape, dtype=np.uint8)
        pages[1::3] = seed % 16
    return guest


def faulty(guest: FakeGuest, ordered: Iterable[Fault]) -> FaultyGuest:
    return FaultyGuest(guest, ordered, sleep=lambda seconds: None)


def saved(guest: FakeGuest | FaultyGuest, **options: Any) -> tuple[bytes, SaveResult]:
    out = io.BytesIO()
    result = save(guest, out, SaveOptions(jobs=1, **options))
    return out.getvalue(), result


def restored(snapshot: bytes, guest: FakeGuest | FaultyGuest, **options: Any) -> RestoreResult:
    def open_reader() -> SnapshotReader:
        return SnapshotReader(io.BytesIO(snapshot), "snapshot")

    return restore(open_reader, guest, RestoreOptions(**options), again=True)


R = TypeVar("R")


def tried(work: Callable[[], R]) -> R | MtetoolError:
    """Return the result of `work`, or the error that ended it."""
    try:
        return work()
    except MtetoolError as error:
        return error


def differing_pages(a: FakeGuest, b: FakeGuest) -> set[int]:
    found = set()
    for slot in SLOTS:
        unequal = (a.memory[slot.ipa] != b.memory[slot.ipa]).reshape(-1, PAGE // GRANULE_BYTES)
        found |= {slot.ipa + int(page) * PAGE for page in np.flatnonzero(unequal.any(axis=1))}
    return found


def compared(snapshot: bytes, guest: FakeGuest) -> list[Difference | Missing]:
    with tempfile.TemporaryFile() as file:
        file.write(snapshot)
        file.seek(0)
        indexed = IndexedSnapshot.of(cast(BinaryIO, file), "snapshot")
        return list(diff(SnapshotSource(indexed, "snapshot"), GuestSource(guest, "guest")))


def pages_of(ranges: Iterable[Any]) -> set[int]:
    return {
        at
        for found in ranges
        for at in range(found.ipa // PAGE * PAGE, found.ipa + found.size_bytes, PAGE)
    }


@settings(max_examples=150, deadline=None)
@given(ordered=some_faults, partial=st.sampled_from([None, "keep", "fail"]))
def test_a_save_is_exact_or_says_what_is_missing(ordered: list[Fault], partial: str | None) -> None:
    truth = guest_with_tags(1)
    outcome = tried(lambda: saved(faulty(truth, ordered), partial=partial))
    if isinstance(outcome, MtetoolError):
        assert outcome.status in (3, 4)
        return
    snapshot, result = outcome
    rows = compared(snapshot, truth)
    assert not [row for row in rows if isinstance(row, Difference)]
    missing = pages_of(row for row in rows if isinstance(row, Missing))
    assert missing == pages_of(result.missing.items)
    assert result.saved_bytes + len(missing) * PAGE == sum(slot.size_bytes for slot in SLOTS)
    assert result.status == (4 if result.lost else 3 if missing else 0)
    assert partial != "fail" or not missing


@settings(max_examples=150, deadline=None)
@given(ordered=some_faults, verify=st.booleans())
@example(
    ordered=[
        Fault(Fail(errno.EFAULT), on="write", at=(BASE + 3 * PAGE, 1)),
        Fault(Vanish(), on="write", after=10),
    ],
    verify=False,
)
def test_a_restore_is_exact_or_reports_and_is_exact_when_run_again(
    ordered: list[Fault], verify: bool
) -> None:
    source, target = guest_with_tags(1), guest_with_tags(2)
    snapshot, _ = saved(source)
    outcome = tried(lambda: restored(snapshot, faulty(target, ordered), verify=verify))
    if isinstance(outcome, MtetoolError):
        assert outcome.status == 4
        details: dict[str, Any] = outcome.details
        up_to = details.get("restored_up_to") or BASE
        told = [Extent(**row) for row in details.get("not_restored", [])]
    else:
        up_to = outcome.restored_up_to or BASE if outcome.stopped else END
        told = list(outcome.not_as_wanted())
        assert outcome.status == (3 if outcome.stopped or told else 0)
    wrong = differing_pages(source, target)
    assert {page for page in wrong if page < up_to} <= pages_of(told)
    again = restored(snapshot, target, verify=verify)
    assert again.status == 0
    assert not differing_pages(source, target)


def test_an_early_end_tells_what_was_left_out_before_it() -> None:
    target = guest_with_tags(2)
    ordered = [
        Fault(Fail(errno.ENOMEM), on="write", at=(BASE + 3 * PAGE, 2 * PAGE)),
        Fault(Fail(errno.EPERM), on="write", at=(BASE + 9 * PAGE, 1)),
    ]
    snapshot, _ = saved(guest_with_tags(1))
    with pytest.raises(
        GuestError, match=f"8192 bytes .* the first at {BASE + 3 * PAGE:#x}"
    ) as told:
        restored(snapshot, faulty(target, ordered))
    assert list(cast(Rows, told.value.details["not_restored"])) == [
        {"ipa": BASE + 3 * PAGE, "size_bytes": 2 * PAGE}
    ]
    assert told.value.details["restored_up_to"] == BASE + 9 * PAGE


def test_only_what_the_kernel_says_of_it_makes_memory_read_only() -> None:
    target, snapshot = guest_with_tags(2), saved(guest_with_tags(1))[0]
    unknown = SLOTS[2]
    assert unknown.readonly is None
    for number, differing_count in ((errno.ENOMEM, 0), (errno.EFAULT, 1)):
        fault = Fault(Fail(number), on="write", at=(unknown.ipa, unknown.size_bytes))
        result = restored(snapshot, faulty(target, [fault]))
        assert bool(result.readonly_differing) == differing_count
        assert [item.errno for item in result.refused.items] == [number][differing_count:]
