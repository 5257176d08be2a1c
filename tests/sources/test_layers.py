"""Deltas: what is saved since a base, and what a base and its deltas are together."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import BaseNeededError, DamagedError, UsageError
from mtetool.flows.merge import merge
from mtetool.flows.restore import RestoreOptions, restore
from mtetool.flows.save import SaveOptions, SaveResult, save
from mtetool.flows.verify import verify_against
from mtetool.guest import Extent, Memslot, Missing
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.reader import SnapshotReader
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.layers import Layers, open_layers
from mtetool.tags import Tags
from tests.flows.fakes import PAGE, FakeGuest

BASE = 0x4000_0000
N_PAGES = 64
SLOTS = (Memslot(0, BASE, N_PAGES * PAGE),)

CHANGE = st.tuples(
    st.sampled_from(["fill", "random", "granule", "clear"]),
    st.integers(0, N_PAGES - 1),
    st.integers(1, 30),
    st.integers(0, 1 << 20),
)
ROUNDS = st.lists(st.lists(CHANGE, max_size=4), min_size=1, max_size=3)


def apply(tags: Tags, change: tuple[str, int, int, int]) -> None:
    kind, first, count, value = change
    pages = tags.reshape(-1, 256)[first : first + count]
    if kind == "fill":
        pages[:] = value % 16
    elif kind == "random":
        pages[:] = np.random.default_rng(value).integers(0, 16, pages.shape)
    elif kind == "granule":
        pages[0, value % 256] ^= value % 15 + 1
    else:
        pages[:] = 0


def saved(guest: FakeGuest, path: Path, *bases: Path, **options: object) -> SaveResult:
    with path.open("wb") as out:
        wanted = SaveOptions(**options)  # type: ignore[arg-type]
        if not bases:
            return save(guest, out, wanted)
        with open_layers([str(base) for base in bases]) as layers:
            return save(guest, out, wanted, base=layers)


@contextmanager
def layered(*paths: Path) -> Iterator[Layers]:
    with open_layers([str(path) for path in paths]) as layers:
        yield layers


def restored(*paths: Path, slots: tuple[Memslot, ...] = SLOTS) -> FakeGuest:
    target = FakeGuest(slots)
    target.memory[BASE][:] = 9
    with layered(*paths) as layers:
        result = restore(lambda: layers, target, RestoreOptions(), again=True)
    assert result.status == 0
    return target


def reader_of(data: bytes) -> SnapshotReader:
    return SnapshotReader(io.BytesIO(data), "it")


def guest_with(seed: int) -> FakeGuest:
    guest = FakeGuest(SLOTS, knows_untagged=True)
    tags = guest.memory[BASE]
    tags[: 20 * 256] = np.random.default_rng(seed).integers(0, 16, 20 * 256)
    tags[30 * 256 : 40 * 256] = 7
    return guest


@given(ROUNDS, st.booleans())
def test_a_base_with_its_deltas_is_the_guest(
    tmp_path_factory: pytest.TempPathFactory,
    rounds: list[list[tuple[str, int, int, int]]],
    knows: bool,
) -> None:
    """Restored, verified and merged, all together, and the deltas alone."""
    here = tmp_path_factory.mktemp("deltas")
    guest = guest_with(1)
    guest.knows_untagged = knows
    files = [here / "0"]
    saved(guest, files[0])
    for number, changes in enumerate(rounds, 1):
        for change in changes:
            apply(guest.memory[BASE], change)
        files.append(here / str(number))
        saved(guest, files[-1], *files[:-1])
    wanted = guest.memory[BASE].tobytes()
    assert restored(*files).memory[BASE].tobytes() == wanted
    with layered(*files) as layers:
        assert verify_against(layers, guest, "it").status == 0
        whole = here / "whole"
        with whole.open("wb") as out:
            assert merge(layers, out).status == 0
    assert restored(whole).memory[BASE].tobytes() == wanted
    with layered(*files[1:]) as layers, (here / "delta").open("wb") as out:
        merge(layers, out)
    assert restored(files[0], here / "delta").memory[BASE].tobytes() == wanted
    # A merged snapshot takes the place of those it was made from.
    guest.memory[BASE][5] ^= 3
    saved(guest, here / "next", *files)
    assert restored(whole, here / "next").memory[BASE].tobytes() == guest.memory[BASE].tobytes()


def test_a_delta_is_as_large_as_the_change(tmp_path: Path) -> None:
    guest = guest_with(1)
    full, same, little = (tmp_path / name for name in ("full", "same", "little"))
    saved(guest, full)
    saved(guest, same, full)
    guest.memory[BASE][17 * 256 + 3] ^= 1
    saved(guest, little, full, same)
    sizes = [path.stat().st_size for path in (full, same, little)]
    assert sizes[0] > 2500
    assert sizes[1] < sizes[2] < 1000
    with little.open("rb") as stream:
        records = list(SnapshotReader(stream, "x"))
    assert any(getattr(record, "over_base", False) for record in records)


def test_the_header_names_the_base(tmp_path: Path) -> None:
    guest = guest_with(1)
    first = saved(guest, tmp_path / "a")
    second = saved(guest, tmp_path / "b", tmp_path / "a")
    third = saved(guest, tmp_path / "c", tmp_path / "a", tmp_path / "b")
    assert second.header.base_id == first.header.snapshot_id
    assert third.header.base_id == second.header.snapshot_id


def test_what_the_base_does_not_have_is_saved_whole(tmp_path: Path) -> None:
    guest = guest_with(1)
    bad = {BASE + 3 * PAGE}
    guest.bad = bad.__contains__
    assert saved(guest, tmp_path / "a", ranges=(Extent(BASE, 50 * PAGE),)).status == 3
    guest.bad = lambda ipa: False
    saved(guest, tmp_path / "b", tmp_path / "a")
    assert np.array_equal(restored(tmp_path / "a", tmp_path / "b").memory[BASE], guest.memory[BASE])


def test_what_a_delta_does_not_speak_of_is_as_in_the_base(tmp_path: Path) -> None:
    guest = guest_with(1)
    before = guest.memory[BASE].copy()
    saved(guest, tmp_path / "a")
    guest.memory[BASE][:] = 3
    saved(guest, tmp_path / "b", tmp_path / "a", ranges=(Extent(BASE + 8 * PAGE, 4 * PAGE),))
    before[8 * 256 : 12 * 256] = 3
    assert np.array_equal(restored(tmp_path / "a", tmp_path / "b").memory[BASE], before)


def test_what_is_missing_in_a_delta_is_missing(tmp_path: Path) -> None:
    guest = guest_with(1)
    saved(guest, tmp_path / "a")
    guest.bad = {BASE + 5 * PAGE}.__contains__
    assert saved(guest, tmp_path / "b", tmp_path / "a").status == 3
    target = FakeGuest(SLOTS)
    with layered(tmp_path / "a", tmp_path / "b") as layers:
        result = restore(lambda: layers, target, RestoreOptions(), again=True)
    assert [(m.ipa, m.size_bytes, m.errno) for m in result.missing.items] == [
        (BASE + 5 * PAGE, PAGE, errno.EFAULT)
    ]


def test_a_delta_alone_says_nothing(tmp_path: Path) -> None:
    guest = guest_with(1)
    saved(guest, tmp_path / "a")
    saved(guest, tmp_path / "b", tmp_path / "a")
    data = (tmp_path / "b").read_bytes()
    target = FakeGuest(SLOTS)
    for again in (True, False):
        with pytest.raises(BaseNeededError, match="delta"):
            restore(lambda: reader_of(data), target, RestoreOptions(), again=again)
    with layered(tmp_path / "b") as layers, pytest.raises(BaseNeededError, match="not here"):
        restore(lambda: layers, target, RestoreOptions(), again=True)
    with pytest.raises(BaseNeededError):
        verify_against(reader_of(data), target, "it")
    assert target.writes == 0


def test_snapshots_that_do_not_belong_together(tmp_path: Path) -> None:
    guest = guest_with(1)
    a, b, c, other = (tmp_path / name for name in ("a", "b", "c", "other"))
    saved(guest, a)
    saved(guest, b, a)
    saved(guest, c, a, b)
    saved(guest, other)
    for paths, error, words in (
        ((other, b), BaseNeededError, "is a delta to the snapshot"),
        ((a, c), BaseNeededError, "is a delta to the snapshot"),
        ((a, other), UsageError, "whole snapshot"),
        ((b, a), UsageError, "whole snapshot"),
    ):
        with pytest.raises(error, match=words), layered(*paths):
            pass
    with pytest.raises(BaseNeededError, match="not here"):
        saved(guest, tmp_path / "d", b)
    assert (tmp_path / "d").stat().st_size == 0
    with layered(b, c) as layers:
        merge(layers, io.BytesIO())  # deltas alone are fine


def test_a_base_of_other_pages(tmp_path: Path) -> None:
    saved(guest_with(1), tmp_path / "a")
    other = FakeGuest((Memslot(0, BASE, 64 << 14),), page_size_bytes=16 << 10)
    with pytest.raises(UsageError, match="pages"):
        saved(other, tmp_path / "b", tmp_path / "a")


def test_a_base_that_is_damaged_is_found_out_before_the_guest_is_frozen(tmp_path: Path) -> None:
    guest = guest_with(1)
    saved(guest, tmp_path / "a")
    with (tmp_path / "a").open("rb") as stream:
        offset = next(iter(IndexedSnapshot.of(stream, "a").entries())).offset
    data = bytearray((tmp_path / "a").read_bytes())
    data[offset + 90] ^= 1
    (tmp_path / "a").write_bytes(data)
    reads = guest.reads
    with pytest.raises(DamagedError):
        saved(guest, tmp_path / "b", tmp_path / "a", freeze=True)
    assert (guest.freezes, guest.reads) == (0, reads)


def test_changes_of_what_the_base_does_not_have(tmp_path: Path) -> None:
    """mtetool never writes this: it is damage, though each file is sound."""
    guest = guest_with(1)
    saved(guest, tmp_path / "a")
    guest.memory[BASE][17 * 256 + 3] ^= 1
    saved(guest, tmp_path / "b", tmp_path / "a")
    guest.bad = {BASE + 17 * PAGE}.__contains__
    with layered(tmp_path / "a") as layers, (tmp_path / "c").open("wb") as out:
        header = layers.header
        with SnapshotWriter(out, header) as writer:
            writer.add_missing(Missing(BASE, N_PAGES * PAGE, errno.EFAULT, "gone"))
            writer.finish(consistent=None)
    with layered(tmp_path / "c", tmp_path / "b") as layers:
        with pytest.raises(DamagedError, match="does not have"):
            restore(lambda: layers, FakeGuest(SLOTS), RestoreOptions(), again=True)
        with pytest.raises(DamagedError, match="does not have"):
            merge(layers, io.BytesIO())
