"""Tags stored as runs: when they are chosen, and when they are refused."""

from __future__ import annotations

import io
from collections.abc import Sequence

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
    """N granules in `n_runs` runs, all but the last of one granule."""
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
    frames: Sequence[bytes], n_runs: int, tagged: int, pages: int, wrong: tuple[int, int] = (0, 0)
) -> bytes:
    head = {
        "ipa": BASE,
        "granules": N,
        "enc": 2,
        "runs": n_runs,
        "lengths": len(frames[0]) + wrong[0],
        "values": len(frames[1]) + wrong[1],
    }
    forge = Forge(head_map(header(4)))
    forge.granules, forge.tagged, forge.tagged_pages = N, tagged, pages
    return forge.indexed(
        b"TAGS", {**head, "tagged": tagged, "tagged_pages": pages}, b"".join(frames), BASE, N
    ).end()


def frame(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=False).compress(content)


# A run of 1 (tag 5) and one of 1023 (tag 0): 1023 - 16 is 1007, 0x3ef, as LEB128.
LENGTHS, VALUES, LONGS = bytes([0x01]), bytes([0x05]), bytes([0xEF, 0x07])


def test_by_hand() -> None:
    frames = [frame(LENGTHS), frame(VALUES), frame(LONGS)]
    (piece,) = read_all(forged(frames, 2, 1, 1))[1]
    assert isinstance(piece, Piece)
    assert piece.tags().tobytes() == bytes([5]) + bytes(N - 1)


def test_nothing_long() -> None:
    """There is no third frame."""
    frames = [frame(bytes([0x88] * (N // 16))), frame(bytes([0x50] * (N // 16)))]
    (piece,) = read_all(forged(frames, N // 8, N // 2, 4))[1]
    assert isinstance(piece, Piece)
    assert piece.tags().tobytes() == (bytes(8) + bytes([5]) * 8) * (N // 16)


@pytest.mark.parametrize(
    ("contents", "n_runs", "tagged"),
    [
        ((LENGTHS, VALUES, LONGS + b"\0"), 2, 1),
        ((LENGTHS, VALUES, LONGS[:-1]), 2, 1),
        ((LENGTHS, VALUES), 2, 1),
        ((LENGTHS, VALUES, b""), 2, 1),
        ((LENGTHS + b"\0", VALUES, LONGS), 2, 1),
        ((LENGTHS, VALUES + b"\0", LONGS), 2, 1),
        ((b"\x02", VALUES, LONGS), 2, 1),
        ((LENGTHS, VALUES, bytes([0xEF, 0x08])), 2, 1),
        ((LENGTHS, VALUES, LONGS), 3, 1),
        ((LENGTHS, VALUES, LONGS), 1, 1),
        ((LENGTHS, VALUES, LONGS), 2, 2),
        ((LENGTHS, VALUES, LONGS), 0, 1),
        ((LENGTHS, VALUES, LONGS), N // 4 + 1, 1),
        ((b"", VALUES, LONGS), 2, 1),
        ((LENGTHS, b"", LONGS), 2, 1),
        ((LENGTHS, VALUES, LONGS + bytes(N)), 2, 1),
        ((bytes([0x88] * (N // 16)), bytes([0x50] * (N // 16)), b""), N // 8, N // 2),
    ],
)
def test_runs_that_are_not_those_of_the_record(
    contents: tuple[bytes, ...], n_runs: int, tagged: int
) -> None:
    with pytest.raises(DamagedError):
        read_all(forged([frame(content) for content in contents], n_runs, tagged, 1))


@pytest.mark.parametrize("wrong", [-100, -1, 1, 100, 1 << 20])
@pytest.mark.parametrize("which", [0, 1])
def test_frames_that_are_split_elsewhere(wrong: int, which: int) -> None:
    frames = [frame(LENGTHS), frame(VALUES), frame(LONGS)]
    with pytest.raises(DamagedError):
        read_all(forged(frames, 2, 1, 1, (0, wrong) if which else (wrong, 0)))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_frame_that_would_become_large_is_not_decompressed(which: int) -> None:
    bomb = frame(bytes(32 << 20))
    assert len(bomb) < 1 << 11
    frames = [frame(LENGTHS), frame(VALUES), frame(LONGS)]
    frames[which] = bomb[:60]
    with pytest.raises(DamagedError, match="declares 33554432 bytes"):
        read_all(forged(frames, 2, 1, 1))


def test_bytes_that_are_no_tags_are_not_saved() -> None:
    tags = np.full(N, 16, dtype=np.uint8)

    def write() -> None:
        with SnapshotWriter(io.BytesIO(), header(4)) as writer:
            writer.add_tags(BASE, tags)
            writer.finish(consistent=None)

    with pytest.raises(ValueError, match="not tags"):
        write()
