"""Guests with tags for the tests of save and restore, and both flows in memory."""

from __future__ import annotations

import io

import numpy as np

from mtetool.flows.restore import RestoreOptions, RestoreResult, restore
from mtetool.flows.save import SaveOptions, SaveResult, save
from mtetool.guest import Memslot
from mtetool.snapshot.reader import SnapshotReader
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
ROM = 0x1000_0000
SLOTS = (
    Memslot(0, BASE, 32 * PAGE),
    Memslot(1, ROM, 16 * PAGE, readonly=True, kind="rom"),
    Memslot(2, BASE + 64 * PAGE, 16 * PAGE),
)


def guest_with_tags(
    seed: int = 1, slots: tuple[Memslot, ...] = SLOTS, page_size_bytes: int = PAGE
) -> FakeGuest:
    guest = FakeGuest(slots, page_size_bytes)
    scramble(guest, seed)
    return guest


def scramble(guest: FakeGuest, seed: int) -> None:
    """Set random tags in every second page, one tag in the others."""
    random = np.random.default_rng(seed)
    for tags in guest.memory.values():
        pages = tags.reshape(-1, 256)
        pages[::2] = random.integers(0, 16, pages[::2].shape, dtype=np.uint8)
        pages[1::2] = random.integers(0, 16, (pages[1::2].shape[0], 1), dtype=np.uint8)


def saved(guest: FakeGuest, options: SaveOptions | None = None) -> tuple[bytes, SaveResult]:
    out = io.BytesIO()
    result = save(guest, out, options or SaveOptions(jobs=1))
    return out.getvalue(), result


def restored(
    snapshot: bytes,
    guest: FakeGuest,
    options: RestoreOptions | None = None,
    *,
    again: bool = True,
) -> RestoreResult:
    def open_reader() -> SnapshotReader:
        return SnapshotReader(io.BytesIO(snapshot), "snapshot")

    return restore(open_reader, guest, options or RestoreOptions(), again=again)


def writable_equal(a: FakeGuest, b: FakeGuest) -> bool:
    return all(
        np.array_equal(a.memory[slot.ipa], b.memory[slot.ipa])
        for slot in a.slots
        if not slot.readonly
    )
