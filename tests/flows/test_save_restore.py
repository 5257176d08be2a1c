"""Saved tags come back exactly; tags that do not are reported."""

from __future__ import annotations

import errno
import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.buffers import TagBuffer
from mtetool.errors import (
    DamagedError,
    GuestError,
    GuestLostError,
    LayoutError,
    LayoutUnknownError,
    MisalignedError,
    PartialError,
    RangeError,
    TruncatedError,
    UsageError,
)
from mtetool.flows.restore import RestoreOptions
from mtetool.flows.save import SaveOptions, save
from mtetool.flows.verify import verify, verify_against
from mtetool.guest import Extent, GuestInfo, Memslot
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.around import ONE_BY_ONE_PAGES
from mtetool.uapi import GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest
from tests.flows.saving import (
    BASE,
    ROM,
    SLOTS,
    guest_with_tags,
    restored,
    saved,
    scramble,
    writable_equal,
)


@pytest.mark.parametrize("again", [True, False])
def test_over_a_dirty_guest_it_is_exact(again: bool) -> None:
    source, target = guest_with_tags(1), guest_with_tags(2)
    source.memory[BASE][: 8 * 256] = 0
    target.memory[ROM][:] = source.memory[ROM]
    snapshot, result = saved(source)
    assert (result.status, result.consistent) == (0, True)
    assert result.saved_bytes == 64 * PAGE
    outcome = restored(snapshot, target, again=again)
    assert outcome.status == 0
    assert writable_equal(source, target)
    assert outcome.restored_bytes == outcome.verified_bytes == 48 * PAGE
    assert outcome.readonly_bytes == 16 * PAGE


SIZES = st.sampled_from([4096, 16384, 65536])


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    source_page=SIZES,
    target_page=SIZES,
    n_pages=st.integers(1, 4),
)
def test_any_tags_over_any_page_sizes(
    data: st.DataObject, source_page: int, target_page: int, n_pages: int
) -> None:
    slots = (Memslot(0, BASE, n_pages * 65536), Memslot(5, BASE * 2, 65536))
    source, target = FakeGuest(slots, source_page), FakeGuest(slots, target_page)
    for tags in source.memory.values():
        for _ in range(data.draw(st.integers(0, 4))):
            start = data.draw(st.integers(0, tags.size - 1))
            length = data.draw(st.integers(1, 3000))
            tags[start : start + length] = data.draw(st.integers(0, 15))
    for tags in target.memory.values():
        tags[:] = data.draw(st.integers(0, 15))
    snapshot, _ = saved(source)
    assert restored(snapshot, target, again=data.draw(st.booleans())).status == 0
    assert writable_equal(source, target)


@settings(max_examples=40, deadline=None)
@given(ranges=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 16)), min_size=1, max_size=4))
def test_ranges_touch_nothing_else(ranges: list[tuple[int, int]]) -> None:
    slots = (Memslot(0, BASE, 32 * PAGE),)
    source, target = guest_with_tags(1, slots), guest_with_tags(2, slots)
    before = target.memory[BASE].copy()
    asked = tuple(Extent(BASE + first * PAGE, n * PAGE) for first, n in ranges)
    snapshot, _ = saved(source, SaveOptions(ranges=asked, jobs=1))
    assert restored(snapshot, target).status == 0
    inside = np.zeros(32, dtype=bool)
    for first, n in ranges:
        inside[first : first + n] = True
    chosen = np.repeat(inside, 256)
    assert np.array_equal(target.memory[BASE][chosen], source.memory[BASE][chosen])
    assert np.array_equal(target.memory[BASE][~chosen], before[~chosen])


def with_holes(*holes: int) -> tuple[FakeGuest, bytes]:
    """A guest of two 64K pages, and its snapshot, which lacks some 4K pages."""
    bad = {BASE + n * PAGE for n in holes}
    source = FakeGuest((Memslot(0, BASE, 2 * 65536),), bad=bad.__contains__)
    scramble(source, 1)
    snapshot, result = saved(source)
    assert result.status == 3
    return source, snapshot


def test_pieces_cut_inside_a_page_of_the_target() -> None:
    """From a pipe, this is not known before: where tags are missing, the page keeps the guest's."""
    holes = (0, 5, 15, 16, 20)
    source, snapshot = with_holes(*holes)
    target = FakeGuest(source.slots, 65536)
    scramble(target, 2)
    before = target.memory[BASE].copy()
    outcome = restored(snapshot, target, again=False)
    assert outcome.status == 3
    assert outcome.missing.size_bytes == len(holes) * PAGE
    gone = np.repeat([n in holes for n in range(32)], 256)
    assert np.array_equal(target.memory[BASE][~gone], source.memory[BASE][~gone])
    assert np.array_equal(target.memory[BASE][gone], before[gone])


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("holes", [(5,), (0,), (31,), (*range(16), 17), range(2, 18)])
def test_what_is_missing_inside_a_page_is_refused_untouched(
    holes: tuple[int, ...], dry_run: bool
) -> None:
    source, snapshot = with_holes(*holes)
    target = FakeGuest(source.slots, 65536)
    with pytest.raises(LayoutError, match=r"missing, .* pages of the guest"):
        restored(snapshot, target, RestoreOptions(dry_run=dry_run))
    assert target.writes == 0


def test_whole_pages_may_be_missing() -> None:
    source, snapshot = with_holes(*range(16, 32))
    target = FakeGuest(source.slots, 65536)
    scramble(target, 2)
    before = target.memory[BASE].copy()
    assert restored(snapshot, target).status == 3
    half = 16 * 256
    assert np.array_equal(target.memory[BASE][:half], source.memory[BASE][:half])
    assert np.array_equal(target.memory[BASE][half:], before[half:])


def test_a_snapshot_that_ends_inside_a_page_is_refused_untouched() -> None:
    slots = (Memslot(0, BASE, 4 * 65536),)
    source, target = guest_with_tags(1, slots), guest_with_tags(2, slots, 65536)
    asked = (Extent(BASE, 65536 + PAGE),)
    snapshot, _ = saved(source, SaveOptions(ranges=asked, jobs=1))
    for again in (True, False):
        with pytest.raises(LayoutError, match="pages of the guest"):
            restored(snapshot, target, again=again)
    assert target.writes == 0


@pytest.mark.parametrize("again", [True, False])
def test_a_layout_that_does_not_fit_writes_nothing(again: bool) -> None:
    snapshot, _ = saved(guest_with_tags())
    target = guest_with_tags(2, (SLOTS[0],))
    with pytest.raises(LayoutError, match=f"{ROM:#x}"):
        restored(snapshot, target, again=again)
    assert target.writes == 0


def test_an_unknown_layout_is_that_of_the_snapshot() -> None:
    source = guest_with_tags()
    target = FakeGuest(SLOTS, layout_known=False)
    target.memory[ROM][:] = source.memory[ROM]
    snapshot, _ = saved(source)
    assert restored(snapshot, target).status == 0
    assert writable_equal(source, target)
    with pytest.raises(LayoutUnknownError):
        saved(target)


def test_a_layout_that_nobody_knew_then_or_now() -> None:
    slots = (Memslot(0, BASE, 8 * PAGE),)
    info = GuestInfo("fake:1", True, PAGE, ())
    header = Header.for_guest(info, [Extent(BASE, 8 * PAGE)])
    out = io.BytesIO()
    with SnapshotWriter(out, header) as writer:
        writer.add_fill(BASE, 8 * PAGE, 6)
        writer.finish(consistent=None)
    target = FakeGuest(slots, layout_known=False)
    assert restored(out.getvalue(), target).status == 0
    assert (target.memory[BASE] == 6).all()


def test_a_slot_that_moved() -> None:
    source = guest_with_tags(1, (Memslot(0, BASE, 32 * PAGE), Memslot(1, ROM, 16 * PAGE)))
    target = FakeGuest((Memslot(7, 2 * BASE, 64 * PAGE), Memslot(1, ROM, 16 * PAGE)))
    snapshot, _ = saved(source)
    moves = ((BASE, 2 * BASE + 8 * PAGE),)
    assert restored(snapshot, target, RestoreOptions(moves=moves)).status == 0
    moved = target.memory[2 * BASE][8 * 256 : 40 * 256]
    assert np.array_equal(moved, source.memory[BASE])
    assert np.array_equal(target.memory[ROM], source.memory[ROM])
    with pytest.raises(MisalignedError):
        restored(snapshot, target, RestoreOptions(moves=((BASE, 2 * BASE + 8),)))


def test_read_only_slots_are_compared() -> None:
    source, target = guest_with_tags(1), guest_with_tags(1)
    target.memory[ROM][3] ^= 1
    snapshot, _ = saved(source)
    outcome = restored(snapshot, target)
    assert outcome.status == 3
    assert outcome.readonly_differing.items == [Extent(ROM + 3 * GRANULE_BYTES, GRANULE_BYTES)]


def test_a_slot_of_which_nobody_knew_that_it_is_read_only() -> None:
    slots = (Memslot(0, BASE, 8 * PAGE, readonly=None),)
    source = guest_with_tags(1, slots)
    target = FakeGuest(slots, bad_write=lambda ipa: True)
    target.memory[BASE][:] = source.memory[BASE]
    snapshot, _ = saved(source)
    outcome = restored(snapshot, target)
    assert (outcome.status, outcome.readonly_bytes) == (0, 8 * PAGE)
    target.memory[BASE][5] ^= 1
    assert restored(snapshot, target).status == 3


def test_what_cannot_be_written_is_reported() -> None:
    source = guest_with_tags()
    target = FakeGuest(SLOTS, bad=lambda ipa: ipa == BASE + 5 * PAGE)
    target.memory[ROM][:] = source.memory[ROM]
    snapshot, _ = saved(source)
    outcome = restored(snapshot, target)
    assert outcome.status == 3
    assert [(m.ipa, m.size_bytes, m.errno) for m in outcome.refused.items] == [
        (BASE + 5 * PAGE, PAGE, errno.EFAULT)
    ]


@pytest.mark.parametrize("again", [True, False])
def test_a_cut_snapshot(again: bool) -> None:
    source, target = guest_with_tags(), guest_with_tags(2)
    snapshot, _ = saved(source)
    with pytest.raises(TruncatedError) as caught:
        restored(snapshot[:-40], target, again=again)
    assert (target.writes > 0) is not again
    assert ("restored_bytes" in caught.value.details) is not again
    assert ("written" in caught.value.message) is not again


@pytest.mark.parametrize("again", [True, False])
def test_tags_that_cannot_be_decompressed(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """The checksum is right, and the data under it is not."""
    snapshot, _ = saved(guest_with_tags())

    def tags(self: Piece, out: TagBuffer | None = None) -> memoryview:
        if self.ipa < BASE + 64 * PAGE:
            return real(self, out)
        raise DamagedError("no tags")

    real = Piece.tags
    monkeypatch.setattr(Piece, "tags", tags)
    with pytest.raises(DamagedError):
        verify(SnapshotReader(io.BytesIO(snapshot), "s"))
    target = guest_with_tags(2)
    with pytest.raises(DamagedError):
        restored(snapshot, target, again=again)
    assert (target.writes > 0) is not again


def test_a_guest_that_ran_is_not_consistent() -> None:
    for answers, expected in (
        ([True, True], True),
        ([True, False], False),
        ([False, True], False),
        ([True, None], None),
        ([None, None], None),
    ):
        guest = guest_with_tags()
        guest.paused_answers = list(answers)
        assert saved(guest)[1].consistent is expected


class WatchfulStream(io.BytesIO):
    """Notes whether its guest was ever frozen while it was written to."""

    def __init__(self, guest: FakeGuest) -> None:
        super().__init__()
        self.guest = guest
        self.written_while_frozen = 0

    def write(self, data: Any) -> int:
        self.written_while_frozen += self.guest.frozen
        return super().write(data)


def test_frozen_guest_stands_still_for_the_reading_and_not_for_the_writing() -> None:
    guest = guest_with_tags()
    guest.paused_answers = [False]
    out = WatchfulStream(guest)
    result = save(guest, out, SaveOptions(freeze=True))
    assert (result.consistent, result.frozen_seconds) == (True, 2.5)
    assert (guest.freezes, guest.frozen, guest.reads_while_running) == (1, False, 0)
    assert out.written_while_frozen == 0
    plain = guest_with_tags()
    assert result.saved_bytes == saved(plain)[1].saved_bytes
    reader = SnapshotReader(io.BytesIO(out.getvalue()), "s")
    verify(reader)
    assert reader.header.paused is True


def test_nothing_was_read_and_not_all_was_tried() -> None:
    """The error claims no more than was tried; --every-page tries every page."""
    n_pages = 4 * ONE_BY_ONE_PAGES
    good = BASE + (2 * ONE_BY_ONE_PAGES + 5) * PAGE
    guest = FakeGuest((Memslot(0, BASE, n_pages * PAGE),), bad=lambda ipa: ipa != good)
    with pytest.raises(GuestError, match=r"of 4,096 pages were tried, and none") as caught:
        save(guest, io.BytesIO(), SaveOptions())
    tried = caught.value.details["tried_pages"]
    assert isinstance(tried, int)
    assert ONE_BY_ONE_PAGES < tried < ONE_BY_ONE_PAGES + 32
    assert f"{tried:,} of 4,096 pages" in caught.value.message
    assert "at all" not in caught.value.message
    assert caught.value.hint is not None
    assert "--every-page" in caught.value.hint
    result = save(guest, io.BytesIO(), SaveOptions(every_page=True))
    assert (result.status, result.saved_bytes) == (3, PAGE)


def test_nothing_can_be_read_and_all_was_tried() -> None:
    guest = FakeGuest((Memslot(0, BASE, 100 * PAGE),), bad=lambda ipa: True)
    with pytest.raises(GuestError, match="no tags at all can be read") as caught:
        save(guest, io.BytesIO(), SaveOptions())
    assert (caught.value.details["tried_pages"], caught.value.details["untried_pages"]) == (100, 0)


def test_guest_runs_on_when_a_frozen_save_fails() -> None:
    guest = guest_with_tags()
    guest.lost_after_reads = 1
    with pytest.raises(GuestLostError):
        save(guest, io.BytesIO(), SaveOptions(freeze=True))
    assert (guest.freezes, guest.frozen) == (1, False)
    guest.lost_after_reads = None
    with pytest.raises(RangeError):
        save(guest, io.BytesIO(), SaveOptions(freeze=True, ranges=(Extent(1 << 50, PAGE),)))
    assert guest.freezes == 1


def test_uniform_memory_costs_nothing() -> None:
    slots = (Memslot(0, BASE, 8192 * PAGE),)
    guest = FakeGuest(slots)
    guest.memory[BASE][:] = 7
    snapshot, result = saved(guest)
    assert result.uniform_bytes == 8192 * PAGE
    assert len(snapshot) < 4096


def test_a_range_across_a_hole() -> None:
    asked = (Extent(BASE + 30 * PAGE, 40 * PAGE),)
    snapshot, result = saved(guest_with_tags(), SaveOptions(ranges=asked, jobs=1))
    assert result.status == 3
    assert [(m.ipa, m.size_bytes) for m in result.missing.items] == [(BASE + 32 * PAGE, 32 * PAGE)]
    assert result.saved_bytes == 8 * PAGE
    checked = verify(SnapshotReader(io.BytesIO(snapshot), "s"))
    assert checked.status == 3
    assert checked.checked.held_bytes == 8 * PAGE
    assert restored(snapshot, FakeGuest(SLOTS)).missing.size_bytes == 32 * PAGE


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (SaveOptions(ranges=(Extent(BASE + 16, PAGE),)), MisalignedError),
        (SaveOptions(ranges=(Extent(BASE, PAGE + 16),)), MisalignedError),
        (SaveOptions(ranges=(Extent(BASE, 0),)), RangeError),
        (SaveOptions(ranges=(Extent(0, PAGE),)), RangeError),
        (SaveOptions(ranges=(Extent(BASE, PAGE), Extent(0, PAGE))), RangeError),
        (SaveOptions(slots=(9,)), UsageError),
        (SaveOptions(slots=(1,), ranges=(Extent(BASE, PAGE),)), UsageError),
    ],
)
def test_what_cannot_be_asked_reads_nothing(options: SaveOptions, error: type[Exception]) -> None:
    guest = guest_with_tags()
    with pytest.raises(error):
        saved(guest, options)
    assert guest.reads == 0


def test_slots_by_id_and_device_slots() -> None:
    slots = (*SLOTS, Memslot(9, 0x900_0000, 4 * PAGE, kind="device"))
    guest = guest_with_tags(1, SLOTS)
    guest.slots = slots
    _, result = saved(guest, SaveOptions(slots=(2, 0), jobs=1))
    assert result.scope == (Extent(BASE, 32 * PAGE), Extent(BASE + 64 * PAGE, 16 * PAGE))
    _, everything = saved(guest)
    assert [slot.id for slot in everything.skipped] == [9]
    assert everything.status == 0
    with pytest.raises(UsageError, match="device"):
        saved(guest, SaveOptions(slots=(9,)))


def test_all_or_nothing() -> None:
    guest = guest_with_tags()
    guest.bad = lambda ipa: ipa == BASE + 7 * PAGE
    with pytest.raises(PartialError, match=f"{BASE + 7 * PAGE:#x}"):
        saved(guest, SaveOptions(partial="fail", jobs=1))
    assert saved(guest)[1].status == 3


def test_nothing_at_all_is_no_snapshot() -> None:
    with pytest.raises(GuestError, match="no tags at all"):
        saved(FakeGuest(SLOTS, bad=lambda ipa: True))


def test_a_guest_lost_half_way() -> None:
    guest = guest_with_tags()
    guest.lost_after_reads = 1
    with pytest.raises(GuestLostError, match=f"up to {ROM + 16 * PAGE:#x}"):
        saved(guest)
    guest.reads = 0
    snapshot, result = saved(guest, SaveOptions(partial="keep", jobs=1))
    assert result.status == 4
    assert result.lost is not None
    assert result.saved_bytes == 16 * PAGE
    assert result.missing.size_bytes == 48 * PAGE
    assert verify(SnapshotReader(io.BytesIO(snapshot), "s")).status == 3


def test_verify_against_a_guest() -> None:
    source = guest_with_tags()
    snapshot, _ = saved(source)

    def against(guest: FakeGuest) -> tuple[int, list[Extent]]:
        reader = SnapshotReader(io.BytesIO(snapshot), "s")
        result = verify_against(reader, guest, "fake:1")
        return result.status, result.differing.items

    assert against(source) == (0, [])
    source.memory[BASE][17] ^= 4
    assert against(source) == (1, [Extent(BASE + 17 * GRANULE_BYTES, GRANULE_BYTES)])
    source.memory[BASE][17] ^= 4
    source.bad = lambda ipa: ipa == BASE
    assert against(source) == (3, [])
    source.bad = lambda ipa: False
    source.layout_known = False
    assert against(source) == (0, [])
