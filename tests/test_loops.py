"""The loops over granules, both of them, against the obvious way to do it."""

from __future__ import annotations

import itertools
import random
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool import _loops, loops, loops_numpy

BOTH = pytest.mark.parametrize("module", [_loops, loops_numpy], ids=["C", "numpy"])
PAGE = 256


def test_the_loops_in_c_are_the_ones_in_use() -> None:
    assert loops.scan is _loops.scan


def tags_of_runs(rng: random.Random, n: int, longest: int) -> bytes:
    out = bytearray()
    while len(out) < n:
        out += bytes([rng.randrange(16)]) * rng.randint(1, longest)
    return bytes(out[:n])


TAGS = st.builds(
    lambda seed, pages, longest: tags_of_runs(random.Random(seed), pages * PAGE, longest),  # noqa: S311
    st.integers(0, 1 << 30),
    st.integers(1, 20),
    st.sampled_from([1, 2, 5, 7, 16, 17, 63, 64, 65, 255, 256, 257, 300, 1000, 5000]),
)
BYTES = st.binary(max_size=200)


def runs_of(tags: bytes) -> list[tuple[int, int]]:
    return [(tag, len(list(group))) for tag, group in itertools.groupby(tags)]


def written_runs(tags: bytes) -> bytes:
    """As mtesnap(5) says, byte by byte."""
    runs = runs_of(tags)
    out = bytearray(0 if length > 255 else length for _, length in runs)
    values = [tag for tag, _ in runs] + [0] * (len(runs) % 2)
    out += bytes(low | high << 4 for low, high in zip(values[::2], values[1::2], strict=True))
    return bytes(out) + b"".join(leb128(length - 256) for _, length in runs if length > 255)


def leb128(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 127 | (128 if value > 127 else 0))
        value >>= 7
        if not value:
            return bytes(out)


@BOTH
@given(tags=TAGS)
def test_scan(module: ModuleType, tags: bytes) -> None:
    pages = [tags[at : at + PAGE] for at in range(0, len(tags), PAGE)]
    bits = 0
    for tag in tags:
        bits |= tag
    expected = (
        len(runs_of(tags)),
        sum(tag != 0 for tag in tags),
        sum(any(page) for page in pages),
        bits,
    )
    assert module.scan(tags, PAGE) == expected


@BOTH
@pytest.mark.parametrize("at", [0, 1, 127, 128, 255, 256, 511])
@pytest.mark.parametrize("value", [1, 15, 16, 255])
def test_scan_sees_every_granule(module: ModuleType, at: int, value: int) -> None:
    tags = bytearray(512)
    tags[at] = value
    assert module.scan(tags, PAGE) == (2 if at in (0, 511) else 3, 1, 1, value)


@BOTH
@given(tags=TAGS)
def test_runs_there_and_back(module: ModuleType, tags: bytes) -> None:
    n_runs = len(runs_of(tags))
    out = bytearray(len(tags))
    if n_runs > len(tags) // 4:
        with pytest.raises(ValueError, match="room"):
            module.to_runs(tags, n_runs, out)
        return
    size = module.to_runs(tags, n_runs, out)
    assert bytes(out[:size]) == written_runs(tags)
    back = bytearray(b"\xee") * len(tags)
    module.from_runs(out[:size], n_runs, back)
    assert back == tags


@BOTH
@given(tags=TAGS, wrong=st.integers(-3, 3).filter(bool))
def test_another_number_of_runs(module: ModuleType, tags: bytes, wrong: int) -> None:
    with pytest.raises(ValueError, match="runs"):
        module.to_runs(tags, len(runs_of(tags)) + wrong, bytearray(len(tags)))


def outcome(module: ModuleType, data: bytes, n_runs: int, n_granules: int) -> bytes | None:
    back = bytearray(n_granules)
    try:
        module.from_runs(data, n_runs, back)
    except ValueError:
        return None
    return bytes(back)


@given(BYTES, st.integers(-1, 150), st.integers(0, 3000))
def test_any_bytes_for_runs_end_alike(data: bytes, n_runs: int, n_granules: int) -> None:
    assert outcome(_loops, data, n_runs, n_granules) == outcome(
        loops_numpy, data, n_runs, n_granules
    )


@given(TAGS, st.data())
def test_changed_runs_end_alike(tags: bytes, data: st.DataObject) -> None:
    n_runs = len(runs_of(tags))
    written = bytearray(written_runs(tags))
    for _ in range(data.draw(st.integers(1, 3))):
        written[data.draw(st.integers(0, len(written) - 1))] = data.draw(
            st.sampled_from([0, 1, 127, 128, 129, 255])
        )
    n_runs += data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    changed = outcome(_loops, bytes(written), n_runs, len(tags))
    assert changed == outcome(loops_numpy, bytes(written), n_runs, len(tags))


@BOTH
@pytest.mark.parametrize(
    ("data", "n_runs", "n_granules"),
    [
        (b"", 0, 1),  # nothing for something
        (b"\x02\x01", 1, 1),  # longer than there is room
        (b"\x02\x01", 1, 3),  # shorter
        (b"\x02\x11", 1, 2),  # something above the last odd tag
        (b"\x02\x01\x00", 1, 2),  # something behind
        (b"\x00\x01", 1, 256),  # no long length
        (b"\x00\x01\x80", 1, 256),  # one that is cut off
        (b"\x00\x01" + b"\x80" * 6 + b"\x01", 1, 256),  # one that goes on for ever
        (b"\x00\x01\xff\xff\xff\xff\xff\x7f", 1, 256),  # one beyond all memory
    ],
)
def test_runs_that_nobody_wrote(
    module: ModuleType, data: bytes, n_runs: int, n_granules: int
) -> None:
    assert outcome(module, data, n_runs, n_granules) is None


@BOTH
@given(pages=st.lists(st.sampled_from([0, 0, 1, 128, 255]), min_size=1, max_size=12))
def test_page_runs(module: ModuleType, pages: list[int]) -> None:
    tags = bytearray(len(pages) * PAGE)
    for number, at in enumerate(pages):
        tags[number * PAGE + at] = 4 if at else 0
    found, first = [], 0
    while first < len(pages):
        tagged, behind = module.page_run(tags, PAGE, first)
        found += [tagged] * (behind - first)
        assert behind == len(pages) or bool(pages[behind]) is not tagged
        first = behind
    assert found == [bool(at) for at in pages]


@BOTH
@given(
    starts=st.lists(st.tuples(st.integers(0, 2**64 - 9), st.integers(1, 9)), min_size=1, max_size=9)
)
def test_frame_runs(module: ModuleType, starts: list[tuple[int, int]]) -> None:
    entries = [start + n for start, length in starts for n in range(length)]
    data = b"".join(entry.to_bytes(8, "little") for entry in entries)
    first = 0
    while first < len(entries):
        behind = module.frame_run(data, first)
        assert entries[first:behind] == list(range(entries[first], entries[first] + behind - first))
        assert behind == len(entries) or entries[behind] != entries[behind - 1] + 1
        first = behind


@BOTH
@given(tags=TAGS)
def test_packing(module: ModuleType, tags: bytes) -> None:
    packed, back = bytearray(len(tags) // 2), bytearray(len(tags))
    module.pack(tags, packed)
    assert bytes(packed) == bytes(low | high << 4 for low, high in zip(tags[::2], tags[1::2]))  # noqa: B905
    module.unpack(packed, back)
    assert back == tags


@BOTH
@given(tags=TAGS, at=st.integers(0, 5119))
def test_first_difference(module: ModuleType, tags: bytes, at: int) -> None:
    other = bytearray(tags * 3)
    assert module.first_difference(tags * 3, other) == len(other)
    at %= len(other)
    other[at] ^= 8
    assert module.first_difference(tags * 3, other) == at


@BOTH
@given(a=BYTES, data=st.data())
def test_xor_and_mask(module: ModuleType, a: bytes, data: st.DataObject) -> None:
    b = data.draw(st.binary(min_size=len(a), max_size=len(a)))
    into = bytearray(a)
    module.xor(into, b)
    assert bytes(into) == bytes(x ^ y for x, y in zip(a, b, strict=True))
    masked = bytearray(a)
    module.mask(masked)
    assert bytes(masked) == bytes(x & 15 for x in a)


@BOTH
def test_lengths_that_do_not_fit(module: ModuleType) -> None:
    for call in (
        lambda: module.scan(b"", PAGE),
        lambda: module.scan(bytes(255), PAGE),
        lambda: module.scan(bytes(256), 0),
        lambda: module.scan(bytes(256), -256),
        lambda: module.scan(bytes(256), 64),
        lambda: module.page_run(bytes(255), PAGE, 0),
        lambda: module.page_run(bytes(256), 0, 0),
        lambda: module.page_run(bytes(256), PAGE, 1),
        lambda: module.page_run(bytes(256), PAGE, -1),
        lambda: module.frame_run(bytes(15), 0),
        lambda: module.frame_run(bytes(16), 2),
        lambda: module.frame_run(bytes(16), -1),
        lambda: module.to_runs(bytes(256), 1, bytearray(255)),
        lambda: module.to_runs(bytes(256), 0, bytearray(256)),
        lambda: module.to_runs(bytes(60), 1, bytearray(60)),
        lambda: module.pack(bytes(3), bytearray(1)),
        lambda: module.pack(bytes(4), bytearray(1)),
        lambda: module.unpack(bytes(2), bytearray(3)),
        lambda: module.first_difference(b"a", b"ab"),
        lambda: module.xor(bytearray(1), b"ab"),
    ):
        with pytest.raises(ValueError, match=r"."):
            call()  # type: ignore[no-untyped-call]


@BOTH
def test_what_is_not_to_be_written_to(module: ModuleType) -> None:
    array = np.arange(256, dtype=np.uint8) % 16
    before = array.tobytes()
    module.pack(array, bytearray(128))
    module.scan(array, PAGE)
    assert array.tobytes() == before
    # An error of the types in C, of the values in numpy.
    with pytest.raises((TypeError, ValueError, BufferError)):
        module.mask(bytes(4))
