"""Which pages exist: how ranges are united, and the answers when that is unknown."""

from __future__ import annotations

import mmap
import os
import tempfile
from itertools import compress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool import procfs
from mtetool.procfs import Mapping
from mtetool.spans import Span, united
from mtetool.vmm import pagemap
from mtetool.vmm.pagemap import Mappings, Pagemap, UnknownError

PAGE = mmap.PAGESIZE

RANGES = st.lists(st.integers(0, 60), max_size=12, unique=True).map(
    lambda edges: [Span(*pair) for pair in zip(*[iter(sorted(edges))] * 2, strict=False)]
)


@given(RANGES, RANGES)
def test_united(one: list[Span], other: list[Span]) -> None:
    found = list(united(iter(one), iter(other)))
    covered = [at for start, end in found for at in range(start, end)]
    wanted = {at for ranges in (one, other) for start, end in ranges for at in range(start, end)}
    assert covered == sorted(wanted)


def test_what_fails_half_way_is_taken_to_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """From there on; what was reported before stays, and nothing is reported twice."""
    answers = iter([(2, 100 * PAGE)])

    def scan(self: Pagemap, start: int, end: int, vector: int) -> tuple[int, int]:
        if start == end == 0:
            return 0, 0
        try:
            found = next(answers)
        except StopIteration:
            raise OSError(3, "gone") from None
        for number, page in enumerate((3, 50)):
            pagemap._REGION.pack_into(self._vector, 24 * number, page * PAGE, (page + 1) * PAGE, 0)
        return found

    monkeypatch.setattr(Pagemap, "_scan", scan)
    memory = Pagemap(os.getpid())
    whole = Mapping(0, 1000 * PAGE, "rw-p", 0, "")
    monkeypatch.setattr(Mappings, "at", lambda self, address: whole)
    found = list(memory.existing(0, 1000 * PAGE))
    assert found == [(3 * PAGE, 4 * PAGE), (50 * PAGE, 51 * PAGE), (51 * PAGE, 1000 * PAGE)]
    memory.close()


def test_a_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pagemap, "_scan", lambda self, start, end, vector: (0, 0))
    memory = Pagemap(os.getpid())
    memory._mappings.close()
    memory._mappings = Mappings(1 << 30)
    assert list(memory.existing(PAGE, 9 * PAGE)) == [(PAGE, 9 * PAGE)]
    memory.close()


@pytest.mark.parametrize("asks", [True, False])
def test_mappings(asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of our own, by its first and last page, queried or read; and unmapped memory."""
    mappings = Mappings(os.getpid())
    if not asks:
        monkeypatch.setattr(pagemap, "_PROCMAP_QUERY", 0xC068_6600 | 200)
    with tempfile.TemporaryFile() as file, mmap.mmap(-1, 2 * PAGE):
        file.write(bytes(4 * PAGE))
        with mmap.mmap(file.fileno(), PAGE, offset=2 * PAGE):
            before = procfs.mappings(os.getpid())
            found = [(mappings.at(each.start), mappings.at(each.end - 1)) for each in before]
            after = procfs.mappings(os.getpid())
    # Except those that grew meanwhile; [vsyscall] is not memory of the process.
    stayed = [each.name != "[vsyscall]" and each in after for each in before]
    assert sum(stayed) > 20
    wanted = list(compress(before, stayed))
    assert list(compress(found, stayed)) == [(each, each) for each in wanted]
    assert any(mapping.offset == 2 * PAGE and mapping.inode for mapping in wanted)
    assert mappings.at(0) is None
    mappings.close()
    mappings.close()


def test_nobody_may_look() -> None:
    with pytest.raises(UnknownError):
        Pagemap(1 << 30)


def test_pages_that_exist_tagged_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [(2, 4), (6, 7)]

    def known(self: Pagemap, mapping: Mapping, start: int, end: int) -> list[Span]:
        parts = [(max(a * PAGE, start), min(b * PAGE, end)) for a, b in there]
        return [Span(a, b) for a, b in parts if a < b]

    monkeypatch.setattr(Pagemap, "_scan", lambda self, start, end, vector: (0, 0))
    monkeypatch.setattr(Pagemap, "_known", known)
    mappings = [Mapping(0, 3 * PAGE, "rw-p", 0, ""), Mapping(3 * PAGE, 9 * PAGE, "rw-p", 0, "")]
    monkeypatch.setattr(
        Mappings,
        "at",
        lambda self, address: next((each for each in mappings if address < each.end), None),
    )
    memory = Pagemap(os.getpid())
    assert memory.has_pages(2 * PAGE, 4 * PAGE)
    assert memory.has_pages(2 * PAGE + 8, 2 * PAGE + 16)
    assert memory.has_pages(6 * PAGE, 7 * PAGE)
    for start, end in ((0, 1), (1, 3), (3, 5), (3, 7), (6, 8), (8, 10), (20, 21)):
        assert not memory.has_pages(start * PAGE, end * PAGE), (start, end)
    memory.close()
