"""Reading that would allocate guest memory is refused at the start, in each way of reading."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from mtetool.errors import STATUS_GUEST, WouldAllocateError
from mtetool.flows.diff import check_ranges, diff
from mtetool.flows.restore import RestoreOptions, restore
from mtetool.flows.save import SaveOptions, save
from mtetool.flows.verify import verify_against
from mtetool.guest import Extent, Memslot
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.source import GuestSource, asked
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
MIB = 1 << 20
SLOTS = (Memslot(0, BASE, 16 * MIB),)


def snapshot() -> bytes:
    out = io.BytesIO()
    save(FakeGuest(SLOTS), out, SaveOptions())
    return out.getvalue()


SNAPSHOT = snapshot()


def reader() -> SnapshotReader:
    return SnapshotReader(io.BytesIO(SNAPSHOT), "test")


def save_it(guest: FakeGuest, every_page: bool) -> None:
    save(guest, io.BytesIO(), SaveOptions(every_page=every_page))


def restore_it(guest: FakeGuest, every_page: bool) -> None:
    restore(reader, guest, RestoreOptions(every_page=every_page), again=True)


def rehearse_it(guest: FakeGuest, every_page: bool) -> None:
    options = RestoreOptions(every_page=every_page, dry_run=True)
    restore(reader, guest, options, again=False)


def verify_it(guest: FakeGuest, every_page: bool) -> None:
    verify_against(reader(), guest, "fake:1", every_page=every_page)


def dump_it(guest: FakeGuest, every_page: bool) -> None:
    source = GuestSource(guest, "fake:1", every_page=every_page)
    list(source.read(asked(source, [])))


def diff_it(guest: FakeGuest, every_page: bool) -> None:
    one = GuestSource(FakeGuest(SLOTS), "fake:2")
    other = GuestSource(guest, "fake:1", every_page=every_page)
    check_ranges([], one, other)
    list(diff(one, other))


WAYS = (save_it, restore_it, rehearse_it, verify_it, dump_it, diff_it)


@pytest.mark.parametrize("work", WAYS)
def test_refused_unless_it_is_wanted(work: Callable[[FakeGuest, bool], None]) -> None:
    guest = FakeGuest(SLOTS, would_make_bytes=9 * MIB)
    with pytest.raises(WouldAllocateError) as caught:
        work(guest, False)
    assert caught.value.status == STATUS_GUEST
    assert caught.value.details["would_allocate_bytes"] == 9 * MIB
    assert f"up to {9 * MIB} bytes" in caught.value.message
    assert (guest.reads, guest.writes) == (0, 0)
    work(guest, True)
    assert guest.reads


@pytest.mark.parametrize("work", WAYS)
def test_a_little_is_no_matter(work: Callable[[FakeGuest, bool], None]) -> None:
    guest = FakeGuest(SLOTS, would_make_bytes=MIB)
    work(guest, False)
    assert guest.reads


def test_what_is_not_read_does_not_count(tmp_path: Path) -> None:
    guest = FakeGuest(SLOTS, would_make_bytes=16 * MIB)
    save(guest, io.BytesIO(), SaveOptions(ranges=(Extent(BASE, MIB),)))
    source = GuestSource(guest, "fake:1")
    # The whole pages around the range count.
    assert asked(source, [Extent(BASE + 16, 32)]) == [Extent(BASE + 16, 32)]
    assert asked(source, [Extent(BASE + PAGE - 16, 32)])
    with pytest.raises(WouldAllocateError):
        asked(source, [Extent(BASE + 16, 8 * MIB)])
