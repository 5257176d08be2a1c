"""One file with its tags: all of it comes back, or QEMU does not get the end of its stream."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import (
    STATUS_SNAPSHOT,
    DamagedError,
    GuestError,
    GuestLostError,
    LayoutError,
    MteOffError,
    MtetoolError,
    NotASnapshotError,
    StreamDamagedError,
    StreamUnsupportedError,
    TruncatedError,
    UnknownVersionError,
)
from mtetool.relay import loading
from mtetool.relay.frames import HEADER, PROLOGUE, Kind, header, parse_header
from mtetool.relay.incoming import Incoming
from mtetool.relay.report import News
from mtetool.relay.saved import MAGIC, SavedReader
from tests.relay import streams
from tests.relay.migrating import N_PAGES
from tests.relay.saving import MEMORY, STREAM, Loaded, guest, loaded, saved, some_tags, tags, wanted


@pytest.mark.parametrize(("page", "there"), [(4096, 4096), (4096, 16384), (16384, 4096)])
@pytest.mark.parametrize("before", [0, 8])
def test_everything_comes_back(tmp_path: Path, page: int, there: int, before: int) -> None:
    source = guest(tmp_path / "source", some_tags(), page=page)
    # It has tags where the source has none.
    other = guest(tmp_path / "other", np.full(N_PAGES * 256, 9, np.uint8), page=there)
    found = loaded(other, saved(source), before)
    assert found.error is None
    assert found.passed == STREAM
    assert np.array_equal(tags(other), some_tags())
    assert found.report
    assert found.report.finished
    assert found.report.tag_pages * page <= N_PAGES * 4096


def test_guest_without_mte_is_saved_with_a_note_and_needs_none_to_load(tmp_path: Path) -> None:
    said: list[str] = []
    data = saved(guest(tmp_path / "source", mte=False), said=said)
    assert "without tags" in said[0]
    found = loaded(guest(tmp_path / "other", mte=False), data)
    assert (found.error, bytes(found.passed)) == (None, STREAM)


@pytest.mark.parametrize(
    ("stream", "kind"),
    [
        (MEMORY[:-5], GuestLostError),
        (MEMORY, GuestLostError),
        (b"", GuestLostError),
        (b"GET / HTTP/1.0\r\n\r\n", StreamDamagedError),
        (streams.HEADER + streams.configuration(streams.capabilities("multifd")),
         StreamUnsupportedError),
    ],
)  # fmt: skip
def test_stream_that_is_not_whole_leaves_no_whole_file(
    tmp_path: Path, stream: bytes, kind: type[MtetoolError]
) -> None:
    with pytest.raises(kind):
        saved(guest(tmp_path / "source", some_tags()), stream)


def test_tags_that_cannot_be_read_leave_no_whole_file(tmp_path: Path) -> None:
    source = guest(tmp_path / "source", some_tags())
    with (
        patch("mtetool.relay.saving.Outgoing.round", side_effect=GuestError("no")),
        pytest.raises(GuestError),
    ):
        saved(source)


# --- when QEMU gets the end ---------------------------------------------------------------------


def test_end_is_held_until_all_tags_are_in_and_the_file_is_sound(tmp_path: Path) -> None:
    source = guest(tmp_path / "source", some_tags())
    other = guest(tmp_path / "other")
    found, seen = Loaded(), []
    keep = loading._Loading._keep_tail

    def kept(self: loading._Loading, tail: object) -> None:
        keep(self, tail)  # type: ignore[arg-type]
        seen.append((bytes(found.passed), np.array_equal(tags(other), some_tags())))

    with patch.object(loading._Loading, "_keep_tail", kept):
        loaded(other, saved(source), into=found)
    assert seen == [(MEMORY, True)]
    assert found.passed == STREAM


def test_tags_that_do_not_stay_keep_the_end_back(tmp_path: Path) -> None:
    data = saved(guest(tmp_path / "source", some_tags()))
    other = guest(tmp_path / "other")
    with patch.object(Incoming, "_copy", return_value=0):
        found = loaded(other, data)
    assert isinstance(found.error, GuestError)
    assert found.passed == MEMORY


def test_guest_without_mte_does_not_start_with_a_file_that_has_tags(tmp_path: Path) -> None:
    data = saved(guest(tmp_path / "source", some_tags()))
    found = loaded(guest(tmp_path / "other", mte=False), data)
    assert isinstance(found.error, MteOffError)
    assert found.passed == MEMORY


def test_smaller_guest_is_refused(tmp_path: Path) -> None:
    data = saved(guest(tmp_path / "source", some_tags()))
    found = loaded(guest(tmp_path / "other", n_pages=N_PAGES // 2), data)
    assert isinstance(found.error, LayoutError)
    assert found.passed == MEMORY


def test_qemu_that_is_gone_is_noticed(tmp_path: Path) -> None:
    data = saved(guest(tmp_path / "source", some_tags()))
    other = guest(tmp_path / "other")
    (tmp_path / "file").write_bytes(data)
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "file").open("rb") as file, os.fdopen(writing, "wb"):
        reader = SavedReader(file.fileno(), "it")
        with pytest.raises(GuestLostError, match="closed the pipe"):
            loading.load(reader, writing, wanted(other), News())
    assert not tags(other).any()


# --- files that are not as they were ------------------------------------------------------------


@cache
def _file() -> bytes:
    """A small file with records of each kind."""
    with tempfile.TemporaryDirectory() as directory:
        return saved(guest(Path(directory) / "source", some_tags()))


def _cuts(data: bytes) -> Iterator[int]:
    """Where the records begin, and the end."""
    at = PROLOGUE.size
    while at < len(data):
        yield at
        at += HEADER.size + parse_header(data[at : at + HEADER.size]).length
    yield at


def _fails(directory: Path, data: bytes) -> MtetoolError:
    """Load it; QEMU gets no byte of the end, whatever it got before. Return the error."""
    other = guest(directory / "other")
    try:
        found = loaded(other, data)
    finally:
        other.unlink()
    assert MEMORY.startswith(found.passed)
    assert found.error
    assert found.error.exit_status == STATUS_SNAPSHOT, found.error
    return found.error


def test_file_cut_at_every_record_and_inside_of_it(tmp_path: Path) -> None:
    data = _file()
    cuts = list(_cuts(data))
    assert cuts[-1] == len(data)
    for cut in cuts[:-1]:
        for at in (cut, cut + 1, cut + HEADER.size):
            if at < len(data):
                assert isinstance(_fails(tmp_path, data[:at]), TruncatedError)


def test_records_that_are_missing_twice_or_swapped(tmp_path: Path) -> None:
    data = _file()
    cuts = list(_cuts(data))
    rows = [data[a:b] for a, b in pairwise(cuts)]
    for i in range(len(rows)):
        for changed in (
            [*rows[:i], *rows[i + 1 :]],
            [*rows[: i + 1], *rows[i:]],
            [*rows[:i], *rows[i : i + 2][::-1], *rows[i + 2 :]],
        ):
            if changed != rows:
                _fails(tmp_path, data[: PROLOGUE.size] + b"".join(changed))


@given(st.data())
def test_a_flipped_bit_anywhere(draw: st.DataObject) -> None:
    data = bytearray(_file())
    at = draw.draw(st.integers(0, len(data) - 1))
    data[at] ^= 1 << draw.draw(st.integers(0, 7))
    with tempfile.TemporaryDirectory() as directory:
        _fails(Path(directory), bytes(data))


def test_a_flipped_bit_in_the_head_of_each_record(tmp_path: Path) -> None:
    data = _file()
    for cut in [0, *list(_cuts(data))[:-1]]:
        for at in range(cut, min(cut + HEADER.size + 2, len(data))):
            changed = bytearray(data)
            changed[at] ^= 1
            _fails(tmp_path, bytes(changed))


@pytest.mark.parametrize(
    ("data", "kind", "said"),
    [
        (b"", NotASnapshotError, "not a file that mtetool relay save has written"),
        (STREAM, NotASnapshotError, "not a file"),
        (b"\x28\xb5\x2f\xfd" + bytes(90), NotASnapshotError, "not a file"),
        (b"LibvirtQemudSave" + bytes(90), NotASnapshotError, "not a file"),
        (MAGIC[:5], TruncatedError, "byte 5"),
        (PROLOGUE.pack(MAGIC, 2, 0), UnknownVersionError, "version 2"),
        (PROLOGUE.pack(MAGIC, 1, 1), UnknownVersionError, "flags 0x1"),
        (_file() + b"x", DamagedError, "bytes after its end"),
    ],
)
def test_foreign_and_newer_files(
    tmp_path: Path, data: bytes, kind: type[MtetoolError], said: str
) -> None:
    error = _fails(tmp_path, data)
    assert isinstance(error, kind)
    assert said in error.message


def _forged(*records: tuple[Kind, bytes]) -> bytes:
    """A file whose checksums are right."""
    rows = [header(n, kind, [payload]) + payload for n, (kind, payload) in enumerate(records)]
    return PROLOGUE.pack(MAGIC, 1, 0) + b"".join(rows)


def test_nonsense_with_right_checksums(tmp_path: Path) -> None:
    data = _file()
    parts = [data[a:b] for a, b in pairwise(_cuts(data))]
    rows = [(parse_header(part[: HEADER.size]).kind, part[HEADER.size :]) for part in parts]
    assert _forged(*rows) == data
    nonsense = (b"", b"\x80", b"\xc1", bytes(4), b"\xff" * 40)
    for i, (kind, payload) in enumerate(rows):
        if payload:
            for other in nonsense:
                _fails(tmp_path, _forged(*rows[:i], (kind, other), *rows[i + 1 :]))
        _fails(tmp_path, _forged(*rows[:i], *rows[i + 1 :]))
