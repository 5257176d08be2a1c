"""Tags that are stored as runs: what is chosen, and what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from mtetool.errors import DamagedError
from mtetool.snapshot.frames import Encoder, decode
from mtetool.snapshot.reader import Piece
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.tags import Tags, as_array
from tests.snapshot.forge import BASE, PAGE_GRANULES, Forge, head_map, header, read_all

N = 4 * PAGE_GRANULES


def tags_with_runs(n_runs: int) -> Tags:
    """N granules with so many runs, all but the last of one granule."""
    tags = np.zeros(N, dtype=np.uint8)
    tags[: n_runs - 1] = np.arange(n_runs - 1) % 2 + 1
    return tags


@pytest.mark.parametrize(
    ("n_runs", "stored"), [(1, "fill"), (2, 2), (N // 4, N // 4), (N // 4 + 1, "packed")]
)
def test_what_is_chosen(n_runs: int, stored: int | str) -> None:
    tags = tags_with_runs(n_runs)
    encoded = Encoder(1, N)(tags, PAGE_GRANULES)
    if stored == "fill":
        assert (encoded.fill, encoded.frame) == (0, b"")
        return
    assert encoded.runs == (None if stored == "packed" else stored)
    back = memoryview(bytearray(N))
    decode(encoded.frame, back, runs=encoded.runs, split=encoded.split)
    assert np.array_equal(as_array(back), tags)


@given(
    st.lists(st.tuples(st.integers(1, 700), st.integers(0, 15)), min_size=1, max_size=60),
    st.sampled_from([1, 3]),
)
def test_any_runs_come_back(runs: list[tuple[int, int]], level: int) -> None:
    tags = np.concatenate([np.full(n, tag, dtype=np.uint8) for n, tag in runs])
    tags = np.resize(tags, N)
    out = io.BytesIO()
    with SnapshotWriter(out, header(4), level=level) as writer:
        writer.add_tags(BASE, tags)
        writer.finish(consistent=None)
    (piece,) = read_all(out.getvalue())[1]
    assert isinstance(piece, Piece)
    assert np.array_equal(as_array(piece.tags()), tags)


def forged(
    lengths: bytes, rest: bytes, n_runs: int, tagged: int, pages: int, wrong: int = 0
) -> bytes:
    head = {"ipa": BASE, "granules": N, "enc": 2, "runs": n_runs, "split": len(lengths) + wrong}
    forge = Forge(head_map(header(4)))
    forge.granules, forge.tagged, forge.tagged_pages = N, tagged, pages
    return forge.indexed(
        b"TAGS", {**head, "tagged": tagged, "tagged_pages": pages}, lengths + rest, BASE, N
    ).end()


def frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=False).compress(content)


# A run of 1 (tag 5) and one of 1023 (tag 0): 1023 - 256 is 767, 0x5ff as LEB128.
LENGTHS, REST = bytes([1, 0]), bytes([0x05, 0xFF, 0x05])


def test_by_hand() -> None:
    (piece,) = read_all(forged(frame(LENGTHS), frame(REST), 2, 1, 1))[1]
    assert isinstance(piece, Piece)
    assert piece.tags().tobytes() == bytes([5]) + bytes(N - 1)


@pytest.mark.parametrize(
    ("lengths", "rest", "n_runs", "tagged"),
    [
        (LENGTHS, REST + b"\0", 2, 1),
        (LENGTHS, REST[:-1], 2, 1),
        (LENGTHS + b"\0", REST, 2, 1),
        (LENGTHS[:1], REST, 2, 1),
        (bytes([2, 0]), REST, 2, 1),
        (LENGTHS, bytes([0x05, 0xFF, 0x06]), 2, 1),
        (LENGTHS, REST, 3, 1),
        (LENGTHS, REST, 1, 1),
        (LENGTHS, REST, 2, 2),
        (LENGTHS, REST, 0, 1),
        (LENGTHS, REST, N // 4 + 1, 1),
        (b"", REST, 2, 1),
        (LENGTHS, b"", 2, 1),
        (LENGTHS, REST + bytes(N), 2, 1),
    ],
)
def test_runs_that_are_not_those_of_the_record(
    lengths: bytes, rest: bytes, n_runs: int, tagged: int
) -> None:
    with pytest.raises(DamagedError):
        read_all(forged(frame(lengths), frame(rest), n_runs, tagged, 1))


@pytest.mark.parametrize("wrong", [-100, -1, 1, 100, 1 << 20])
def test_frames_that_are_split_elsewhere(wrong: int) -> None:
    with pytest.raises(DamagedError):
        read_all(forged(frame(LENGTHS), frame(REST), 2, 1, 1, wrong))


@pytest.mark.parametrize("first", [True, False])
def test_a_frame_that_would_become_large_is_not_decompressed(first: bool) -> None:
    bomb = frame(bytes(32 << 20))
    assert len(bomb) < 1 << 11
    payload = (bomb[:400], frame(REST)) if first else (frame(LENGTHS), bomb[:400])
    with pytest.raises(DamagedError, match="declares 33554432 bytes"):
        read_all(forged(*payload, 2, 1, 1))


def test_bytes_that_are_no_tags_are_not_saved() -> None:
    tags = np.full(N, 16, dtype=np.uint8)

    def write() -> None:
        with SnapshotWriter(io.BytesIO(), header(4)) as writer:
            writer.add_tags(BASE, tags)
            writer.finish(consistent=None)

    with pytest.raises(ValueError, match="no tags"):
        write()
