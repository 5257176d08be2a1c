"""Both implementations of the loops over granules, compared with the obvious one."""

from __future__ import annotations

import itertools
import json
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


def objects_of(tags: bytes) -> list[tuple[int, int]]:
    """Runs, except that each of several adjacent objects of one size is a run of its own."""
    starts = [0]
    for first in range(0, len(tags), 64):
        found = {at for at in range(first, first + 64) if at and tags[at] != tags[at - 1]}
        for size in (16, 8, 4, 2, 1):
            every = set(range(first, first + 64, size))
            if found <= every:
                found = every if len(found) >= 48 // size else found
                break
        starts += sorted(found - {0})
    return [(tags[at], end - at) for at, end in itertools.pairwise([*starts, len(tags)])]


Parts = tuple[bytes, bytes, bytes]


def written_runs(runs: list[tuple[int, int]]) -> Parts:
    """Write runs byte by byte, as mtesnap(5) says: lengths, tags, long lengths."""
    nothing = [(0, 0)] * (len(runs) % 2)
    pairs = [*((tag, length if length < 16 else 0) for tag, length in runs), *nothing]
    two = list(zip(pairs[::2], pairs[1::2], strict=True))
    lengths = bytes(low | high << 4 for (_, low), (_, high) in two)
    values = bytes(low | high << 4 for (low, _), (high, _) in two)
    return lengths, values, b"".join(leb128(length - 16) for _, length in runs if length > 15)


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
    runs = objects_of(tags)
    out = bytearray(len(tags))
    counted = module.scan(tags, PAGE)
    found = module.to_runs(tags, PAGE, out)
    if len(runs) > len(tags) // 4:
        assert found == (*counted, 0)
        return
    parts = written_runs(runs)
    assert found == (len(runs), *counted[1:], sum(map(len, parts)))
    assert bytes(out[: found[-1]]) == b"".join(parts)
    back = bytearray(b"\xee") * len(tags)
    module.from_runs(*parts, len(runs), back)
    assert back == tags


@BOTH
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 32])
@given(seed=st.integers(0, 1 << 30), pages=st.integers(4, 8))
def test_objects_of_one_size(module: ModuleType, size: int, seed: int, pages: int) -> None:
    """A slab: some adjacent objects share a tag, and the memory around has no pattern."""
    rng = random.Random(seed)  # noqa: S311
    slab = b"".join(bytes([rng.randrange(14)]) * size for _ in range(PAGE))[:PAGE]
    tags = tags_of_runs(rng, PAGE, 9) + slab + bytes((pages - 2) * PAGE)
    runs = objects_of(tags)
    out = bytearray(len(tags))
    found = module.to_runs(tags, PAGE, out)
    if len(runs) > len(tags) // 4:
        assert found[-1] == 0
        return
    assert bytes(out[: found[-1]]) == b"".join(written_runs(runs))


@BOTH
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_neighbours_of_one_tag_stay_two_objects(module: ModuleType, size: int) -> None:
    slab = bytearray(b"".join(bytes([n % 3 + 1]) * size for n in range(64 // size)))
    slab[size : 2 * size] = slab[:size]
    tags = bytes(64) + slab + bytes(15 * PAGE - 128)
    found = module.to_runs(tags, PAGE, bytearray(len(tags)))
    assert (found[0], len(runs_of(tags))) == (64 // size + 2, 64 // size + 1)


def outcome(module: ModuleType, parts: Parts, n_runs: int, n_granules: int) -> bytes | None:
    back = bytearray(n_granules)
    try:
        module.from_runs(*parts, n_runs, back)
    except ValueError:
        return None
    return bytes(back)


@given(BYTES, BYTES, BYTES, st.integers(-1, 150), st.integers(0, 3000), st.booleans())
def test_any_bytes_for_runs_end_alike(
    lengths: bytes, values: bytes, longs: bytes, n_runs: int, n_granules: int, right: bool
) -> None:
    if right:  # as many runs as there are bytes for
        n_runs = 2 * min(len(lengths), len(values))
        lengths, values = lengths[: n_runs // 2], values[: n_runs // 2]
    parts = (lengths, values, longs)
    assert outcome(_loops, parts, n_runs, n_granules) == outcome(
        loops_numpy, parts, n_runs, n_granules
    )


@given(TAGS, st.data())
def test_changed_runs_end_alike(tags: bytes, data: st.DataObject) -> None:
    runs = runs_of(tags)
    written = [bytearray(part) for part in written_runs(runs)]
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([part for part in written if part]))
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(
            st.sampled_from([0, 1, 16, 127, 128, 129, 255])
        )
    n_runs = len(runs) + data.draw(st.sampled_from([0, 0, 0, 1, -1]))
    parts = (bytes(written[0]), bytes(written[1]), bytes(written[2]))
    changed = outcome(_loops, parts, n_runs, len(tags))
    assert changed == outcome(loops_numpy, parts, n_runs, len(tags))


@BOTH
@pytest.mark.parametrize(
    ("parts", "n_runs", "n_granules"),
    [
        ((b"", b"", b""), 0, 1),  # no runs for a granule
        ((b"\x02", b"\x01", b""), 1, 1),  # longer than the room
        ((b"\x02", b"\x01", b""), 1, 3),  # shorter
        ((b"\x02", b"\x11", b""), 1, 2),  # a tag above the last odd one
        ((b"\x12", b"\x01", b""), 1, 2),  # a length above the last odd one
        ((b"\x02", b"\x01", b"\x00"), 1, 2),  # a long length too many
        ((b"\x02\x00", b"\x01", b""), 1, 2),  # more lengths than runs
        ((b"\x02", b"\x01\x00", b""), 1, 2),  # more tags than runs
        ((b"\x00", b"\x01", b""), 1, 16),  # a long length is missing
        ((b"\x00", b"\x01", b"\x80"), 1, 16),  # a long length that is cut off
        ((b"\x00", b"\x01", b"\x80" * 6 + b"\x01"), 1, 16),  # a long length that never ends
        ((b"\x00", b"\x01", b"\xff\xff\xff\xff\xff\x7f"), 1, 16),  # a long length beyond all memory
    ],
)
def test_runs_that_nobody_wrote(
    module: ModuleType, parts: Parts, n_runs: int, n_granules: int
) -> None:
    assert outcome(module, parts, n_runs, n_granules) is None


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


PIECES = st.lists(
    st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.sampled_from([1, 1, 1, 5])),
    max_size=8,
)


@BOTH
@given(pieces=PIECES)
def test_tallies(module: ModuleType, pieces: list[tuple[list[int], int]]) -> None:
    counts = np.zeros(160, dtype=np.int64)
    counts[[157, 158]] = -1
    for tags, repeat in pieces:
        assert module.tally(bytes(tags), repeat, counts.view(np.uint8)) is None
    whole = bytes(tag for tags, repeat in pieces for tag in tags for _ in range(repeat))
    every = runs_of(whole)
    closed, expected = every[:-1], np.zeros(157, dtype=np.int64)
    for tag, length in closed:
        expected[tag] += length
        expected[16 + tag] += 1
        if tag:
            expected[32 + length.bit_length() - 1] += 1
            expected[93 + length.bit_length() - 1] += length
            expected[154] = max(expected[154], length)
    triples = [(a, c) for (a, _), (c, _) in zip(every, every[2:], strict=False) if a]
    expected[155], expected[156] = len(triples), sum(a == c for a, c in triples)
    assert np.array_equal(counts[:157], expected)
    if every:
        assert (counts[157], counts[159]) == every[-1]


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
        lambda: module.to_runs(bytes(256), PAGE, bytearray(256 - 1)),
        lambda: module.to_runs(bytes(255), PAGE, bytearray(512)),
        lambda: module.to_runs(b"", PAGE, bytearray(512)),
        lambda: module.to_runs(bytes(256), 64, bytearray(512)),
        lambda: module.pack(bytes(3), bytearray(1)),
        lambda: module.pack(bytes(4), bytearray(1)),
        lambda: module.unpack(bytes(2), bytearray(3)),
        lambda: module.first_difference(b"a", b"ab"),
        lambda: module.xor(bytearray(1), b"ab"),
        lambda: module.tally(b"a", 1, bytearray(1279)),
        lambda: module.tally(b"a", 0, bytearray(1280)),
        lambda: module.tally(b"a", 1, bytearray(b"\x11" * 1280)),
        lambda: module.tally(b"a", 1, bytearray(1280)),
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
    # A type error in C, a value error in numpy.
    with pytest.raises((TypeError, ValueError, BufferError)):
        module.mask(bytes(4))


# --- rows -------------------------------------------------------------------------------------


def _all_rows(
    module: ModuleType, a: bytes, b: bytes, cuts: list[int], room: int, **how: int
) -> tuple[bytes, list[int]]:
    """All rows of tags that are given in pieces, with little room, and the words of the run."""
    run, out, text = bytearray(40), bytearray(room), b""
    repeat = how.get("repeat", 1)
    ipa = how.get("ipa", 0x4000_0000)
    for start, stop in itertools.pairwise([0, *sorted(cuts), len(a)]):
        at = start
        while at < stop:
            taken, written = module.rows(
                a[at:stop],
                b[at:stop],
                repeat,
                ipa + at * repeat * 16,
                how.get("form", 0),
                how.get("each", 0),
                how.get("wanted", 0xFFFF),
                run,
                out,
            )
            assert taken or written
            text += out[:written]
            at += taken
    return text, np.frombuffer(run, dtype=np.uint64).tolist()


def _obvious_rows(a: bytes, b: bytes, **how: int) -> list[tuple[int, int, int]]:
    """(address, size, tag or both tags) of all runs."""
    repeat, ipa, found = how.get("repeat", 1), how.get("ipa", 0x4000_0000), []
    keys = [x << 4 | y for x, y in zip(a, b, strict=True)] if b else list(a)
    at = 0
    for key, group in itertools.groupby(keys):
        n = len(list(group))
        differs = key >> 4 != key & 15 if b else bool(how.get("wanted", 0xFFFF) >> key & 1)
        if differs:
            if how.get("each"):
                found += [(ipa + (at + i) * 16, 16, key) for i in range(n)]
            else:
                found.append((ipa + at * repeat * 16, n * repeat * 16, key))
        at += n
    return found


def _obvious_line(ipa: int, size: int, key: int, two: bool, form: int, each: int) -> str:
    if form:
        both = {"a": key >> 4, "b": key & 15} if two else {"tag": key}
        return json.dumps({"ipa": ipa, **({} if each else {"size_bytes": size}), **both}) + "\n"
    shown = "" if each else "  " + hex(size).rjust(12)
    tags = f"{key >> 4:x}  {key & 15:x}" if two else f"{key:x}"
    return f"{hex(ipa):>14}{shown}  {tags}\n"


SPARSE = st.lists(st.tuples(st.integers(0, 15), st.integers(1, 40)), max_size=20).map(
    lambda runs: b"".join(bytes([tag]) * n for tag, n in runs)
)


@BOTH
@given(
    SPARSE,
    st.lists(st.integers(0, 300), max_size=4),
    st.integers(0, 1),
    st.integers(0, 0xFFFF),
    st.sampled_from([0, 0x4000_0000, 0xFFFF_FFFF_F000, 1 << 51]),
    st.integers(128, 600),
)
def test_rows_of_runs_and_granules(
    module: ModuleType, a: bytes, cuts: list[int], form: int, wanted: int, ipa: int, room: int
) -> None:
    cuts = [min(cut, len(a)) for cut in cuts]
    for each, repeat in ((0, 1), (0, 1000), (1, 1)):
        how = {"form": form, "wanted": wanted, "ipa": ipa, "each": each, "repeat": repeat}
        text, run = _all_rows(module, a, b"", cuts, room, **how)
        rows = _obvious_rows(a, b"", **how)
        if not each and run[1] and wanted >> run[2] & 1:
            assert tuple(run[:3]) == rows.pop()  # the last may go on
        expected = [_obvious_line(*row, False, form, each) for row in rows]
        assert text.decode() == "".join(expected)
        assert run[3:] == [len(rows), sum(size for _, size, _ in rows)]


@BOTH
@given(SPARSE, SPARSE, st.integers(0, 1), st.integers(128, 600), st.integers(0, 300))
def test_rows_of_differences(
    module: ModuleType, a: bytes, b: bytes, form: int, room: int, cut: int
) -> None:
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    text, run = _all_rows(module, a, b, [min(cut, n)], room, form=form)
    rows = _obvious_rows(a, b)
    if run[1]:
        assert tuple(run[:3]) == rows.pop()
    assert text.decode() == "".join(_obvious_line(*row, True, form, 0) for row in rows)
    assert run[3:] == [len(rows), sum(size for _, size, _ in rows)]


@BOTH
def test_rows_that_cannot_be(module: ModuleType) -> None:
    run, out = bytearray(40), bytearray(128)
    good = (b"\0" * 4, b"", 1, 0, 0, 0, 0xFFFF, run, out)
    assert module.rows(*good) == (4, 0)
    for at, bad in (
        (1, b"\0"),
        (2, 0),
        (2, 1 << 56),
        (4, 2),
        (4, -1),
        (7, bytearray(39)),
        (8, bytearray(127)),
    ):
        with pytest.raises(ValueError, match="rows that cannot be"):
            module.rows(*(bad if n == at else value for n, value in enumerate(good)))
    for each_with in ((b"\0" * 4, 1), (b"", 2)):
        with pytest.raises(ValueError, match="rows that cannot be"):
            module.rows(b"\0" * 4, *each_with, 0, 0, 1, 0xFFFF, run, out)
