"""The loop over records of pages: in C and in Python, compared with each other."""

from __future__ import annotations

import random
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool import _loops, loops, loops_numpy
from tests.relay.streams import FULL, PAGE, SAME, XBZRLE, ZERO, Record, name, number

BOTH = pytest.mark.parametrize("module", [_loops, loops_numpy], ids=["C", "Python"])
Outcome = tuple[tuple[int, int, int, int], bytes]


def run(module: ModuleType, data: bytes, at: int = 0, n_pages: int = 8, bits: int = 12) -> Outcome:
    marks = bytearray(n_pages)
    return module.ram_records(data, at, marks, bits), bytes(marks)


def written(*records: tuple[int, int, int]) -> bytes:
    """Records of one block: page, form, length."""
    return b"".join(Record("m", page, form, length).write("m") for page, form, length in records)


def test_the_loop_in_c_is_the_one_in_use() -> None:
    assert loops.ram_records is _loops.ram_records


@BOTH
def test_each_form(module: ModuleType) -> None:
    data = b"rest" + written((1, FULL, 0), (3, ZERO, 0), (7, XBZRLE, 5), (3, ZERO, 0)) + bytes(8)
    found, marks = run(module, data, 4)
    assert found == (len(data) - 8, 1, 2, 1)
    assert marks == bytes([0, 1, 0, 1, 0, 0, 0, 1])


@BOTH
@pytest.mark.parametrize(
    ("data", "end"),
    [
        (written((1, FULL, 0))[:7], 0),  # heads that are not complete
        (written((1, ZERO, 0))[:8], 0),
        (written((1, XBZRLE, 5))[:10], 0),
        (written((1, FULL, 0))[:8], 8 + PAGE),  # contents that are not
        (written((1, FULL, 0))[:9], 8 + PAGE),
        (written((1, XBZRLE, 5))[:11], 16),
        (written((1, XBZRLE, 0)), 11),
        (written((1, XBZRLE, PAGE)), 11 + PAGE),
        (number(SAME | XBZRLE, 8) + b"\1\x10\1", 0),  # too long
        (number(SAME | XBZRLE, 8) + b"\2\0\0", 0),  # another encoding
        (number(SAME | ZERO, 8) + b"\1", 0),  # not zeros
        (number(8 * PAGE | SAME | ZERO, 8) + b"\0", 0),  # beyond the block
        (number((1 << 64) - PAGE | SAME | ZERO, 8) + b"\0", 0),
        (number(ZERO, 8) + name("m") + b"\0", 0),  # another block
        (number(SAME | ZERO | FULL, 8) + b"\0", 0),  # no form
        (number(0x200 | SAME | ZERO, 8) + b"\0", 0),
        (number(0x10, 8), 0),
        (b"", 0),
    ],
)
def test_where_it_stops(module: ModuleType, data: bytes, end: int) -> None:
    before = written((0, ZERO, 0))
    found, marks = run(module, before + data)
    assert found[0] == len(before) + end
    assert marks[1:] == bytes([end > 0, *bytes(6)])
    assert sum(found[1:]) == 1 + (end > 0)


@given(st.integers(0, 1 << 30), st.sampled_from([10, 12, 14, 16]), st.booleans())
def test_both_end_alike(seed: int, bits: int, changed: bool) -> None:
    rng = random.Random(seed)  # noqa: S311
    page_bytes = 1 << bits
    data = bytearray()
    for _ in range(rng.randint(0, 6)):
        form, length = rng.choice((FULL, ZERO, XBZRLE)), rng.choice((0, 1, page_bytes))
        data += Record("m", rng.randrange(9), form, min(length, 65535)).write("m", page_bytes)
    for _ in range(3 if changed and data else 0):
        at = rng.randrange(len(data))
        data[at : at + 1] = rng.choice((b"", b"\0", b"\xff", rng.randbytes(2)))
    del data[rng.randint(0, len(data)) :]
    at = rng.choice((0, 0, rng.randint(0, len(data))))
    found = run(_loops, bytes(data), at, 8, bits)
    assert found == run(loops_numpy, bytes(data), at, 8, bits)
    assert at <= found[0][0] < len(data) + page_bytes + 12


@BOTH
def test_places_and_sizes_that_are_none(module: ModuleType) -> None:
    for at, bits in ((-1, 12), (3, 12), (0, 9), (0, 17), (0, -1), (0, 64)):
        with pytest.raises(ValueError, match=r"."):
            run(module, b"ab", at, 8, bits)
    with pytest.raises((TypeError, BufferError)):
        module.ram_records(number(SAME | FULL, 8), 0, bytes(8), 12)
    assert run(module, written((0, ZERO, 0)), n_pages=0) == ((0, 0, 0, 0), b"")
