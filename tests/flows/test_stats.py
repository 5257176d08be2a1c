"""Statistics, maps, lines and totals, compared with what is plainly counted, granule by granule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtetool.flows.diff import Difference, diff, totals
from mtetool.flows.dump import OUTSIDE, RAW_MISSING, lines, tag_runs, wanted_tags
from mtetool.flows.looking import Pointer, look
from mtetool.flows.relocation import MovedSource, Relocation
from mtetool.flows.stats import TagCounts, statistics
from mtetool.flows.tag_map import TagMap, cell_size
from mtetool.guest import Extent, Memslot, Missing
from mtetool.sources.copying import Copied, Fill, Step
from mtetool.sources.tally import Tally

BASE, PAGE = 0x4000_0000, 4096
N = 4 * 256
# Two slots that touch, and one apart; the map of granules has gaps between.
SLOTS = (
    Memslot(0, BASE, 2 * PAGE),
    Memslot(1, BASE + 2 * PAGE, PAGE),
    Memslot(2, BASE + 8 * PAGE, PAGE),
)
MISSING = 255


@dataclass
class Drawn:
    """A source whose tags are known: a byte a granule for each slot, MISSING for none."""

    tags: dict[int, bytes]
    cut: int = 37
    """Steps are as long, so that runs go across them."""
    name: str = "drawn"
    page_size_bytes: int = PAGE
    memslots: Sequence[Memslot] = SLOTS

    def extents(self) -> list[Extent]:
        return [Extent(slot.ipa, slot.size_bytes) for slot in SLOTS if slot.ipa in self.tags]

    def check(self, extents: Sequence[Extent]) -> None:
        pass

    def granules(self, extent: Extent) -> list[int]:
        found = []
        for ipa in range(extent.ipa, extent.end, 16):
            for slot in SLOTS:
                if slot.ipa <= ipa < slot.end:
                    found.append(self.tags[slot.ipa][(ipa - slot.ipa) // 16])
        return found

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        for extent in extents:
            granules = self.granules(extent)
            at = 0
            while at < len(granules):
                here = granules[at : at + self.cut]
                ipa, same = extent.ipa + at * 16, len(set(here)) == 1
                if here[0] == MISSING:
                    n = len(list(itertools.takewhile(MISSING.__eq__, here)))
                    yield Missing(ipa, n * 16, 14, "a test")
                elif same:
                    n = len(here)
                    yield Fill(ipa, n * 16, here[0])
                else:
                    n = len(list(itertools.takewhile(lambda tag: tag != MISSING, here)))
                    yield Copied(ipa, memoryview(bytes(here[:n])))
                at += n


def _expanded(runs: list[tuple[int, int]], n: int) -> bytes:
    out = b"".join(bytes([tag]) * length for tag, length in runs)
    return (out * (n // len(out) + 1))[:n]


TAGS = st.lists(
    st.tuples(st.sampled_from([0, 0, 1, 2, 3, 15, MISSING]), st.integers(1, 90)),
    min_size=1,
    max_size=20,
)
DRAWN = st.builds(
    lambda a, b, c, cut: Drawn(
        {
            SLOTS[0].ipa: _expanded(a, 512),
            SLOTS[1].ipa: _expanded(b, 256),
            SLOTS[2].ipa: _expanded(c, 256),
        },
        cut,
    ),
    TAGS,
    TAGS,
    TAGS,
    st.sampled_from([1, 7, 64, 256]),
)


def plainly(granules: bytes) -> dict[str, object]:
    """Everything that is counted, by the obvious way."""
    runs = [(tag, len(list(group))) for tag, group in itertools.groupby(granules)]
    tagged = [(tag, n) for tag, n in runs if tag not in (0, MISSING)]
    triples = [
        (a, c)
        for (a, _), (b, _), (c, _) in zip(runs, runs[1:], runs[2:], strict=False)
        if a and MISSING not in (a, b, c)
    ]
    nexts = [
        (a, b) for a, b in itertools.pairwise(granules) if a not in (0, MISSING) and b != MISSING
    ]
    total = sum(n for _, n in tagged)
    shares = [sum(n for tag, n in tagged if tag == t) / total for t in range(16)] if total else []
    return {
        "granules": [granules.count(tag) for tag in range(16)],
        "runs": [sum(t == tag for t, _ in runs) for tag in range(16)],
        "longest": max((n for _, n in tagged), default=0),
        "same_next": sum(a == b for a, b in nexts) / len(nexts) if nexts else None,
        "skip_one": sum(a == c for a, c in triples) / len(triples) if triples else None,
        "collision": sum(share**2 for share in shares) if total else None,
        "entropy": -sum(p * math.log2(p) for p in shares if p) if total else None,
        "missing": granules.count(MISSING) * 16,
        "lengths": sorted(n.bit_length() - 1 for _, n in tagged),
    }


def counted(counts: TagCounts) -> dict[str, object]:
    return {
        "granules": counts.granules.tolist(),
        "runs": counts.runs.tolist(),
        "longest": counts.longest,
        "same_next": counts.same_next_share,
        "skip_one": counts.skip_one_share,
        "collision": counts.collision_share,
        "entropy": counts.entropy_bits,
        "missing": counts.missing_bytes,
        "lengths": [n for n, many in enumerate(counts.lengths.tolist()) for _ in range(many)],
    }


@settings(max_examples=80, deadline=None)
@given(source=DRAWN)
def test_statistics_are_what_is_plainly_counted(source: Drawn) -> None:
    found = statistics(source, source.extents())
    assert [slot for slot, _ in found.slots] == list(SLOTS)
    for slot, counts in found.slots:
        found_here, wanted = counted(counts), plainly(source.tags[slot.ipa])
        assert found_here.keys() == wanted.keys()
        for key, value in wanted.items():
            is_float = isinstance(value, float)
            assert found_here[key] == (pytest.approx(value) if is_float else value), key
    whole = b"".join(source.tags.values())
    assert found.total.granules.tolist() == [whole.count(tag) for tag in range(16)]
    assert found.total.longest == max(counts.longest for _, counts in found.slots)
    assert found.missing.size_bytes == found.total.missing_bytes


def test_a_terabyte_with_one_tag_takes_no_time() -> None:
    slot = Memslot(0, BASE, 1 << 40)

    class Big(Drawn):
        def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
            yield Fill(BASE, 1 << 40, 5)

    found = statistics(Big({}, memslots=(slot,)), [Extent(BASE, 1 << 40)])
    assert found.total.longest == 1 << 36
    assert found.total.run_entropy_bits == 0


@settings(max_examples=60, deadline=None)
@given(source=DRAWN, columns=st.sampled_from([1, 2, 8, 64]), n_lines=st.integers(1, 12))
def test_a_map_is_what_is_in_its_cells(source: Drawn, columns: int, n_lines: int) -> None:
    cell_bytes = cell_size(source.extents(), PAGE, columns, n_lines)
    drawn = TagMap(source.extents(), cell_bytes, columns)
    for step in source.read(source.extents()):
        drawn.add(step)
    rows = list(drawn.rows())
    assert len(rows) <= max(n_lines, 2)
    seen = 0
    for row in rows:
        for n, cell in enumerate(row.cells):
            here = Extent(row.ipa + n * cell_bytes, cell_bytes)
            granules = source.granules(here)
            tagged = sum(tag not in (0, MISSING) for tag in granules)
            wanted = (len(granules), tagged, granules.count(MISSING)) if granules else None
            assert cell == wanted
            seen += len(granules)
    assert seen == sum(slot.size_bytes for slot in SLOTS) // 16


@settings(max_examples=60, deadline=None)
@given(source=DRAWN, per_line=st.sampled_from([1, 2, 8, 16]), data=st.data())
def test_lines_are_all_granules(source: Drawn, per_line: int, data: st.DataObject) -> None:
    slot = data.draw(st.sampled_from(SLOTS))
    first = data.draw(st.integers(0, slot.size_bytes // 16 - 1))
    n = data.draw(st.integers(1, slot.size_bytes // 16 - first))
    extent = Extent(slot.ipa + first * 16, n * 16)
    found: list[int] = []
    missing: Tally[Missing] = Tally()
    at = None
    for line in lines(source, [extent], per_line, missing):
        assert line.ipa % (per_line * 16) == 0
        assert at is None or line.ipa == at
        at = line.ipa + line.n_lines * per_line * 16
        found += list(line.cells) * line.n_lines
    inside = [cell for cell in found if cell != OUTSIDE]
    assert inside == source.granules(extent)
    assert missing.size_bytes == inside.count(RAW_MISSING) * 16


@settings(max_examples=60, deadline=None)
@given(source=DRAWN, tags=st.lists(st.sampled_from([0, 1, 3]), max_size=2), only=st.booleans())
def test_chosen_tags_are_the_rows_with_them(source: Drawn, tags: list[int], only: bool) -> None:
    every = list(tag_runs(source, source.extents()))
    chosen = list(tag_runs(source, source.extents(), wanted_tags(tags, only_tagged=only)))
    assert chosen == [
        row
        for row in every
        if isinstance(row, Missing) or ((not tags or row.tag in tags) and (row.tag or not only))
    ]


@settings(max_examples=80, deadline=None)
@given(a=DRAWN, b=DRAWN, alone=st.booleans())
def test_totals_are_those_of_the_rows(a: Drawn, b: Drawn, alone: bool) -> None:
    if alone:
        del b.tags[SLOTS[1].ipa]
    found = totals(a, b)
    for slot, counts in found.slots:
        rows = list(diff(a, b, [Extent(slot.ipa, slot.size_bytes)]))
        differing = [row for row in rows if isinstance(row, Difference)]
        assert counts.n_ranges == len(differing)
        assert counts.differing_bytes == sum(row.size_bytes for row in differing)
        assert counts.missing_bytes == sum(
            row.size_bytes for row in rows if isinstance(row, Missing)
        )
        kinds = (
            counts.tagged_bytes,
            counts.untagged_bytes,
            counts.retagged_bytes,
            counts.only_a_bytes,
            counts.only_b_bytes,
        )
        assert sum(kinds) == counts.differing_bytes
    assert found.total.n_ranges == sum(counts.n_ranges for _, counts in found.slots)


@settings(max_examples=60, deadline=None)
@given(source=DRAWN, n=st.integers(-40, N), n_context=st.integers(0, 60), tag=st.integers(0, 255))
def test_a_look_is_what_is_there(source: Drawn, n: int, n_context: int, tag: int) -> None:
    ipa = BASE + n * 16 + 5
    (found,) = look(source, [Pointer(tag << 56 | ipa)], n_context)
    here = source.granules(Extent(ipa // 16 * 16, 16))
    assert found.pointer.ipa == ipa
    assert found.tag == (here[0] if here and here[0] != MISSING else None)
    assert (found.missing is not None) is (bool(here) and here[0] == MISSING)
    assert (found.nearest is None) is bool(here)
    assert found.matches is (None if found.tag is None or not tag else found.tag == tag & 15)
    for at, cell in enumerate(found.context):
        around = source.granules(Extent(found.context_ipa + at * 16, 16))
        assert cell == (around[0] if around else OUTSIDE)
    if found.run is not None:
        assert set(source.granules(Extent(found.run.ipa, found.run.size_bytes))) == {found.tag}


def test_a_moved_source_reads_what_was_there() -> None:
    source = Drawn({slot.ipa: _expanded([(n + 1, 3), (0, 2)], 512) for n, slot in enumerate(SLOTS)})
    # The first goes to where the third was, the third before all.
    moves = [(SLOTS[0].ipa, BASE + 8 * PAGE), (SLOTS[2].ipa, BASE - 4 * PAGE)]
    moved = MovedSource(source, Relocation(moves, SLOTS))
    assert [(slot.id, slot.ipa) for slot in moved.memslots] == [
        (2, BASE - 4 * PAGE),
        (1, BASE + 2 * PAGE),
        (0, BASE + 8 * PAGE),
    ]
    for slot, old in zip(moved.memslots, (SLOTS[2], SLOTS[1], SLOTS[0]), strict=True):
        extent = Extent(slot.ipa, slot.size_bytes)
        steps = list(moved.read([extent]))
        assert steps[0].ipa == slot.ipa
        tags = [_tags_of(step) for step in steps]
        assert np.concatenate(tags).tobytes() == source.tags[old.ipa][: slot.size_bytes // 16]


def _tags_of(step: Step) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    assert isinstance(step, Copied)
    return np.frombuffer(step.tags, np.uint8)
