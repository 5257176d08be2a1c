"""Guests that answer late, that do not do what they say, or that log dirty pages."""

from __future__ import annotations

import errno
import io
import signal
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest

from mtetool.buffers import TagBuffer, as_bytes
from mtetool.errors import BusyError, SignalError
from mtetool.flows.restore import RestoreOptions
from mtetool.guest import Extent, Memslot, Pending
from mtetool.snapshot.model import Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.uapi import GRANULE_BYTES
from tests.flows.fakes import PAGE, FakeGuest
from tests.flows.saving import BASE, ROM, SLOTS, guest_with_tags, restored, saved


@dataclass
class Late(FakeGuest):
    """Copies only when the result is waited for."""

    depth: int = 1

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        return partial(self.read_tags, ipa, out)

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        return partial(self.write_tags, ipa, tags)


@pytest.mark.parametrize("kind", [FakeGuest, Late])
@pytest.mark.parametrize("makes_pages", [True, False])
@pytest.mark.parametrize("n_zeros", [1, 3, 8])
def test_a_later_record_counts_while_an_earlier_one_is_still_written(
    kind: type[FakeGuest], makes_pages: bool, n_zeros: int
) -> None:
    """No page of the guest had a tag when the later record, of zeros, came."""
    slots = (Memslot(0, BASE, 8 * PAGE),)
    out = io.BytesIO()
    info = FakeGuest(slots).info()
    header = Header.for_guest(info, [Extent(BASE, 8 * PAGE)], paused=True)
    nothing = np.zeros(n_zeros * 256, dtype=np.uint8)
    with SnapshotWriter(out, header) as writer:
        writer.add_tags(BASE, np.arange(8 * 256, dtype=np.uint8) % 15 + 1)
        if n_zeros == 3:
            nothing[5] = 9
            writer.add_tags(BASE + PAGE, nothing)
        else:
            writer.add_fill(BASE + PAGE * (n_zeros == 1), n_zeros * PAGE, 0)
        writer.finish(consistent=True)
    target = kind(slots, knows_untagged=True, makes_pages=makes_pages)
    outcome = restored(out.getvalue(), target)
    assert (outcome.status, outcome.verify_differing.items) == (0, [])
    first = BASE + PAGE * (n_zeros != 8)
    there = target.memory[BASE][(first - BASE) // 16 :][: nothing.size]
    assert there.tobytes() == nothing.tobytes()


class Signalled(FakeGuest):
    """Gets a signal as soon as its first write was begun, while the kernel is copying."""

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        super().begin_write(ipa, tags)
        raise SignalError(signal.SIGTERM)


def test_a_signal_right_after_the_first_write_was_begun() -> None:
    snapshot, _ = saved(guest_with_tags())
    with pytest.raises(SignalError) as caught:
        restored(snapshot, Signalled(SLOTS))
    assert caught.value.word is not None
    assert "the first write had begun, and may have changed tags" in caught.value.word.message


class BusyAtFirst(FakeGuest):
    """Logs dirty pages during the first write only."""

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        if len(as_bytes(tags)) and not self.writes:
            self.writes += 1
            raise OSError(errno.EBUSY, "dirty logging")
        return super().write_tags(ipa, tags)


def test_a_busy_guest_that_took_a_later_write() -> None:
    """Two writes are in flight: the second one changed tags, so the restore did begin."""
    source = FakeGuest((Memslot(0, BASE, 8 * PAGE),), max_copy_granules=256)
    source.memory[BASE][:] = 3
    snapshot, _ = saved(source)
    target = BusyAtFirst(source.slots, max_copy_granules=256)
    outcome = restored(snapshot, target)
    assert (outcome.status, outcome.restored_bytes) == (3, 0)
    assert outcome.stopped is not None
    assert "EBUSY" in outcome.stopped


class Forgetful(FakeGuest):
    """Claims to have written, and did not."""

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        return len(as_bytes(tags)) * GRANULE_BYTES


def test_reading_back_finds_what_was_not_written() -> None:
    slots = (Memslot(0, BASE, 8 * PAGE),)
    source = FakeGuest(slots)
    source.memory[BASE][256:300] = 3
    snapshot, _ = saved(source)
    outcome = restored(snapshot, Forgetful(slots))
    assert outcome.status == 3
    assert outcome.verify_differing.items == [Extent(BASE + PAGE, 44 * GRANULE_BYTES)]
    assert restored(snapshot, Forgetful(slots), RestoreOptions(verify=False)).status == 0


def test_a_dry_run_tells_and_writes_nothing() -> None:
    slots = (Memslot(0, BASE, 8 * PAGE),)
    source, target = FakeGuest(slots), FakeGuest(slots)
    source.memory[BASE][256:300] = 3
    snapshot, _ = saved(source)
    outcome = restored(snapshot, target, RestoreOptions(dry_run=True))
    assert (outcome.status, outcome.restored_bytes, target.writes) == (0, 0, 0)
    assert outcome.changes.items == [Extent(BASE + PAGE, 44 * GRANULE_BYTES)]


def test_dirty_logging_before_anything_was_written() -> None:
    snapshot, _ = saved(guest_with_tags())
    with pytest.raises(BusyError):
        restored(snapshot, FakeGuest(SLOTS, busy_after_writes=0))


def test_dirty_logging_that_starts_half_way() -> None:
    source, target = guest_with_tags(), FakeGuest(SLOTS, busy_after_writes=1)
    target.memory[ROM][:] = source.memory[ROM]
    snapshot, _ = saved(source)
    outcome = restored(snapshot, target)
    assert outcome.status == 3
    assert outcome.stopped is not None
    assert "EBUSY" in outcome.stopped
    assert outcome.restored_bytes == 32 * PAGE
