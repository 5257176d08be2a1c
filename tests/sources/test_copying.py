"""Copying around pages that fail: nothing is lost or counted twice, and few calls are made."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.buffers import TagBuffer
from mtetool.errors import BusyError, GuestError, GuestLostError
from mtetool.guest import Extent, Memslot, Missing, Pending
from mtetool.sources.around import ONE_BY_ONE_PAGES
from mtetool.sources.copying import Copied, Fill, TagReader, write_extent
from mtetool.sources.layout import UNREACHABLE, Layout
from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest, told_later

BASE = 0x4000_0000


def one_slot(n_pages: int) -> tuple[Memslot, ...]:
    return (Memslot(0, BASE, n_pages * PAGE),)


def read_of(step: Copied | Fill) -> Tags:
    """A copy of a step's tags."""
    if isinstance(step, Fill):
        return np.full(step.size_bytes // 16, step.tag, dtype=np.uint8)
    return np.array(step.tags)


def read_all(
    guest: FakeGuest,
    extents: list[Extent],
    *,
    chunk_pages: int = 4,
    known: bool = True,
    insist: bool = False,
) -> tuple[dict[int, Tags], list[Missing]]:
    """Return the pages read, by address, and the missing ranges; no address may come twice."""
    layout = Layout(guest.slots if known else (), guest.page_size_bytes)
    chunk = chunk_pages * guest.page_granules
    pages: dict[int, Tags] = {}
    missing: list[Missing] = []
    at = extents[0].ipa
    for step in TagReader(guest, layout, chunk_granules=chunk, insist=insist).read(extents):
        assert step.ipa >= at
        at = step.ipa + step.size_bytes
        if isinstance(step, Missing):
            missing.append(step)
            continue
        tags = read_of(step)
        for n in range(step.size_bytes // guest.page_size_bytes):
            first = n * guest.page_granules
            pages[step.ipa + n * guest.page_size_bytes] = tags[first : first + guest.page_granules]
    return pages, missing


def test_all_of_a_slot_in_chunks() -> None:
    guest = FakeGuest(one_slot(10))
    guest.memory[BASE][:] = np.arange(10 * 256) % 16
    pages, missing = read_all(guest, [Extent(BASE, 10 * PAGE)])
    assert not missing
    assert np.array_equal(np.concatenate(list(pages.values())), guest.memory[BASE])
    assert guest.reads == 3


def test_a_hole_is_skipped_without_probing() -> None:
    slots = (Memslot(0, BASE, PAGE), Memslot(1, BASE + 1000 * PAGE, PAGE))
    guest = FakeGuest(slots, depth=1)
    pages, missing = read_all(guest, [Extent(BASE, 1001 * PAGE)])
    assert sorted(pages) == [BASE, BASE + 1000 * PAGE]
    assert missing == [Missing(BASE + PAGE, 999 * PAGE, errno.EFAULT, "no memslot there")]
    assert guest.reads == 3


def test_device_memory_is_skipped_whole() -> None:
    slots = (Memslot(0, BASE, 50 * PAGE, kind="device"), Memslot(1, BASE + 50 * PAGE, PAGE))
    guest = FakeGuest(slots)
    pages, missing = read_all(guest, [Extent(BASE, 51 * PAGE)])
    assert sorted(pages) == [BASE + 50 * PAGE]
    assert [(m.size_bytes, m.reason) for m in missing] == [
        (50 * PAGE, f"tags that cannot be reached: {UNREACHABLE}")
    ]


def test_single_bad_pages_cost_no_good_ones() -> None:
    bad = {BASE + n * PAGE for n in (0, 3, 5, 9)}
    guest = FakeGuest(one_slot(10), bad=bad.__contains__)
    pages, missing = read_all(guest, [Extent(BASE, 10 * PAGE)])
    assert {m.ipa for m in missing} == bad
    assert all(m.size_bytes == PAGE and m.errno == errno.EFAULT for m in missing)
    assert set(pages) == {BASE + n * PAGE for n in range(10)} - bad


def test_a_slot_that_ends_early_takes_few_calls_and_says_so() -> None:
    n_pages = 1 << 18
    guest = FakeGuest(one_slot(n_pages), bad=lambda ipa: ipa >= BASE + 7 * PAGE)
    _, missing = read_all(guest, [Extent(BASE, n_pages * PAGE)], chunk_pages=512)
    (gap,) = missing
    assert (gap.ipa, gap.size_bytes) == (BASE + 7 * PAGE, (n_pages - 7) * PAGE)
    assert guest.reads < ONE_BY_ONE_PAGES + 32
    assert "of these 262,137 pages were tried" in gap.reason


def test_behind_a_long_gap_the_first_good_page_is_found() -> None:
    first, last = 7, 100_003
    guest = FakeGuest(one_slot(1 << 17), bad=lambda ipa: first <= (ipa - BASE) // PAGE < last)
    pages, missing = read_all(guest, [Extent(BASE, PAGE << 17)], chunk_pages=1 << 17)
    (gap,) = missing
    assert (gap.ipa, gap.ipa + gap.size_bytes) == (BASE + first * PAGE, BASE + last * PAGE)
    assert len(pages) == (1 << 17) - (last - first)
    assert guest.reads < ONE_BY_ONE_PAGES + 48


def test_only_good_page_is_the_last() -> None:
    guest = FakeGuest(one_slot(1000), bad=lambda ipa: ipa < BASE + 999 * PAGE)
    pages, (gap,) = read_all(guest, [Extent(BASE, 1000 * PAGE)])
    assert list(pages) == [BASE + 999 * PAGE]
    assert gap.size_bytes == 999 * PAGE


def test_an_unknown_layout_is_probed() -> None:
    guest = FakeGuest((Memslot(0, BASE + 40 * PAGE, 20 * PAGE),))
    pages, missing = read_all(guest, [Extent(BASE, 60 * PAGE)], known=False)
    assert sorted(pages) == [BASE + n * PAGE for n in range(40, 60)]
    assert sum(m.size_bytes for m in missing) == 40 * PAGE


@settings(max_examples=60, deadline=None)
@given(
    bad=st.sets(st.integers(0, 63)),
    chunk_pages=st.integers(1, 20),
    first=st.integers(0, 30),
    n_pages=st.integers(1, 33),
)
def test_every_page_is_read_or_missing_once(
    bad: set[int], chunk_pages: int, first: int, n_pages: int
) -> None:
    guest = FakeGuest(one_slot(64), bad=lambda ipa: (ipa - BASE) // PAGE in bad)
    guest.memory[BASE][:] = np.arange(64 * 256) % 16
    extent = Extent(BASE + first * PAGE, n_pages * PAGE)
    pages, missing = read_all(guest, [extent], chunk_pages=chunk_pages)
    lost = {ipa for m in missing for ipa in range(m.ipa, m.ipa + m.size_bytes, PAGE)}
    assert sum(m.size_bytes for m in missing) == len(lost) * PAGE
    assert not lost & set(pages)
    assert lost | set(pages) == set(range(extent.ipa, extent.ipa + extent.size_bytes, PAGE))
    assert not {BASE + n * PAGE for n in bad} & set(pages)
    for ipa, tags in pages.items():
        at = (ipa - BASE) // GRANULE_BYTES
        assert np.array_equal(tags, guest.memory[BASE][at : at + 256])


# Stretches of readable and of unreadable pages, in turn.
_READABLE = st.integers(1, 3)
_SHORT = st.integers(1, 9) | st.integers(ONE_BY_ONE_PAGES - 1, ONE_BY_ONE_PAGES)
_LONG = st.integers(ONE_BY_ONE_PAGES + 1, 2 * ONE_BY_ONE_PAGES)


@settings(max_examples=20, deadline=None)
@given(
    stretches=st.lists(st.tuples(_SHORT, _READABLE), min_size=1, max_size=3),
    long_ones=st.lists(st.tuples(_LONG, _READABLE), max_size=1),
    insist=st.booleans(),
    chunk_pages=st.sampled_from([1, 7, 512]),
)
def test_every_page_that_can_be_read_is_read(
    stretches: list[tuple[int, int]],
    long_ones: list[tuple[int, int]],
    insist: bool,
    chunk_pages: int,
) -> None:
    """Between short unreadable stretches always; between long ones if every page is insisted on."""
    bad: set[int] = set()
    n_pages = 0
    for unreadable, readable in stretches + (long_ones if insist else []):
        bad |= set(range(n_pages, n_pages + unreadable))
        n_pages += unreadable + readable
    guest = FakeGuest(one_slot(n_pages), bad=lambda ipa: (ipa - BASE) // PAGE in bad)
    whole = [Extent(BASE, n_pages * PAGE)]
    pages, missing = read_all(guest, whole, chunk_pages=chunk_pages, insist=insist)
    assert {(ipa - BASE) // PAGE for ipa in pages} == set(range(n_pages)) - bad
    assert not any("tried" in gap.reason for gap in missing)


@settings(max_examples=10, deadline=None)
@given(stretches=st.lists(st.tuples(_SHORT | _LONG, _READABLE), min_size=1, max_size=2))
def test_every_page_that_can_be_written_is_written(stretches: list[tuple[int, int]]) -> None:
    bad: set[int] = set()
    n_pages = 0
    for refused, writable in stretches:
        bad |= set(range(n_pages, n_pages + refused))
        n_pages += refused + writable
    guest = FakeGuest(one_slot(n_pages), bad_write=lambda ipa: (ipa - BASE) // PAGE in bad)
    tags = np.full(n_pages * 256, 5, dtype=np.uint8)
    list(write_extent(guest, BASE, tags.data, Layout(guest.slots, PAGE), insist=True))
    written = guest.memory[BASE].reshape(n_pages, 256).all(axis=1)
    assert set(np.flatnonzero(~written).tolist()) == bad


def test_who_insists_on_every_page_gets_it_by_steps() -> None:
    """A long stretch comes in steps, so the user sees progress."""
    n_pages = (1 << 15) + 3
    guest = FakeGuest(one_slot(n_pages), bad=lambda ipa: ipa < BASE + (n_pages - 1) * PAGE)
    whole = [Extent(BASE, n_pages * PAGE)]
    pages, missing = read_all(guest, whole, insist=True)
    assert list(pages) == [BASE + (n_pages - 1) * PAGE]
    assert [gap.size_bytes // PAGE for gap in missing] == [1 << 14, 1 << 14, 2]
    assert len({gap.reason for gap in missing}) == 1


@dataclass
class Ahead(FakeGuest):
    """Copies as late as it may: when one begun after it is called, or anything else is asked."""

    in_flight: list[tuple[Callable[[], int], list[Pending]]] = field(default_factory=list)

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        answer: list[Pending] = []
        self.in_flight.append((partial(FakeGuest.read_tags, self, ipa, out), answer))

        def call() -> int:
            while not answer:
                self._complete()
            return answer[0]()

        return call

    def _complete(self) -> None:
        copy, answer = self.in_flight.pop(0)
        answer.append(told_later(copy))

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        while self.in_flight:
            self._complete()
        return super().read_tags(ipa, out)


def test_a_copy_begun_in_vain_spoils_no_chunk() -> None:
    """A chunk that begins with untouched memory, after one that stopped before its end.

    Its layout leaves out memory that the guest has, so nothing is tried in between.
    """
    guest = Ahead(one_slot(16), knows_untagged=True, bad=lambda ipa: ipa == BASE + 2 * PAGE)
    guest.memory[BASE].reshape(16, 256)[:8] = 9
    guest.memory[BASE].reshape(16, 256)[9:] = 3
    layout = Layout((Memslot(0, BASE, PAGE), Memslot(1, BASE + 8 * PAGE, 8 * PAGE)), PAGE)
    reader = TagReader(guest, layout, chunk_granules=4 * 256)
    for step in reader.read([Extent(BASE, 16 * PAGE)]):
        if not isinstance(step, Missing):
            first = (step.ipa - BASE) // GRANULE_BYTES
            assert np.array_equal(read_of(step), guest.memory[BASE][first:][: len(read_of(step))])


def test_a_read_that_was_given_up_spoils_no_later_one() -> None:
    guest = Ahead(one_slot(16), knows_untagged=True)
    guest.memory[BASE].reshape(16, 256)[:9] = 9
    guest.memory[BASE].reshape(16, 256)[12:] = 3
    reader = TagReader(guest, Layout(guest.slots, PAGE), chunk_granules=4 * 256)
    next(reader.read([Extent(BASE, 16 * PAGE)]))
    (step,) = reader.read([Extent(BASE + 10 * PAGE, 4 * PAGE)])
    assert isinstance(step, Copied)
    assert np.array_equal(read_of(step), guest.memory[BASE][10 * 256 : 14 * 256])


def test_a_lost_guest_is_no_missing_page() -> None:
    guest = FakeGuest(one_slot(10), lost_after_reads=1)
    with pytest.raises(GuestLostError):
        read_all(guest, [Extent(BASE, 10 * PAGE)])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_what_is_wrong_with_the_whole_vm_is_no_missing_page(number: int) -> None:
    guest = FakeGuest(one_slot(10), bad=lambda ipa: True, bad_errno=number, depth=1)
    with pytest.raises(GuestError, match=errno.errorcode[number]):
        read_all(guest, [Extent(BASE, 10 * PAGE)])
    assert guest.reads == 1


def test_granules_inside_pages() -> None:
    guest = FakeGuest(one_slot(10))
    guest.memory[BASE][:] = np.arange(10 * 256) % 16
    reader = TagReader(guest, Layout(guest.slots, PAGE), chunk_granules=512)
    extent = Extent(BASE + 0xFF0, 3 * PAGE + 0x20)
    found = [
        np.array(step.tags) for step in reader.read_granules([extent]) if isinstance(step, Copied)
    ]
    assert np.array_equal(np.concatenate(found), guest.memory[BASE][255 : 255 + 768 + 2])


def test_writing_goes_around_what_fails() -> None:
    bad = {BASE + 2 * PAGE, BASE + 3 * PAGE}
    guest = FakeGuest(one_slot(8), bad_write=bad.__contains__)
    tags = np.full(8 * 256, 5, dtype=np.uint8)
    steps = list(write_extent(guest, BASE, tags.data, Layout(guest.slots, PAGE)))
    missing = [step for step in steps if isinstance(step, Missing)]
    assert [(m.ipa, m.size_bytes) for m in missing] == [(BASE + 2 * PAGE, 2 * PAGE)]
    written = guest.memory[BASE].reshape(8, 256)
    assert (written[[0, 1, 4, 5, 6, 7]] == 5).all()
    assert (written[[2, 3]] == 0).all()


def test_dirty_logging_is_told_apart() -> None:
    guest = FakeGuest(one_slot(8), busy_after_writes=0)
    tags = np.zeros(8 * 256, dtype=np.uint8)
    with pytest.raises(BusyError, match="EBUSY"):
        list(write_extent(guest, BASE, tags.data, Layout(guest.slots, PAGE)))


# --- what cannot be tagged is not read --------------------------------------------------------


def steps_of(guest: FakeGuest, *, every_page: bool) -> list[tuple[int, int, bytes | Missing]]:
    """Address, size, and copies of the tags, of each step."""
    reader = TagReader(guest, Layout(guest.slots, PAGE), chunk_granules=4 * 256)
    extents = [Extent(slot.ipa, slot.size_bytes) for slot in guest.slots]
    return [
        (step.ipa, step.size_bytes, step if isinstance(step, Missing) else read_of(step).tobytes())
        for step in reader.read(extents, every_page=every_page)
    ]


def joined(
    steps: list[tuple[int, int, bytes | Missing]],
) -> list[tuple[int, int, bytes | Missing]]:
    """Join neighbouring steps without any tags, as the writer of a snapshot does."""
    result: list[tuple[int, int, bytes | Missing]] = []
    for ipa, size_bytes, tags in steps:
        if result and isinstance(tags, bytes) and not any(tags):
            at, before, last = result[-1]
            if isinstance(last, bytes) and not any(last) and at + before == ipa:
                result[-1] = (at, before + size_bytes, last + tags)
                continue
        result.append((ipa, size_bytes, tags))
    return result


@given(st.lists(st.sampled_from("..............tttb"), min_size=30, max_size=60))
def test_the_same_is_read_either_way(kinds: list[str]) -> None:
    guest = FakeGuest(one_slot(len(kinds)), knows_untagged=True)
    bad = {BASE + n * PAGE for n, kind in enumerate(kinds) if kind == "b"}
    guest.bad = bad.__contains__
    pages = guest.memory[BASE].reshape(-1, 256)
    for n, kind in enumerate(kinds):
        if kind == "t":
            pages[n, n % 256] = n % 15 + 1
    assert joined(steps_of(guest, every_page=False)) == joined(steps_of(guest, every_page=True))


def test_what_cannot_be_tagged_is_not_read() -> None:
    guest = FakeGuest(one_slot(1000), knows_untagged=True)
    guest.memory[BASE][500 * 256] = 3
    steps = steps_of(guest, every_page=False)
    assert guest.reads == 1
    first, middle, last = steps
    assert (first[:2], last[:2]) == (
        (BASE, 500 * PAGE),
        (BASE + 504 * PAGE, 496 * PAGE),
    )
    assert middle[:2] == (BASE + 500 * PAGE, 4 * PAGE)
    assert isinstance(middle[2], bytes)
    assert middle[2] == bytes([3]) + bytes(4 * 256 - 1)


def test_pages_side_by_side_with_untagged_ones_do_not_show_older_chunks() -> None:
    guest = FakeGuest(one_slot(16), knows_untagged=True)
    guest.memory[BASE][: 4 * 256] = 9
    guest.memory[BASE][5 * 256] = 4
    tags = b"".join(
        tags for _, _, tags in steps_of(guest, every_page=False) if isinstance(tags, bytes)
    )
    assert tags == guest.memory[BASE].tobytes()
