"""Finding memslots by asking, against a model of the kernel's answers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mtetool.backends.kvm.overlaps import Answer, Prober
from mtetool.spans import Span

PAGE = 4096
SPACE_PAGES = 1 << 28


class Model:
    """Slots as (first page, pages), and the number of questions asked."""

    def __init__(self, slots: list[tuple[int, int]]) -> None:
        self.slots = slots
        self.asked = 0

    def ask(self, ipa: int, size: int) -> Answer:
        assert ipa % PAGE == size % PAGE == 0
        assert size > 0
        self.asked += 1
        first, last = ipa // PAGE, (ipa + size) // PAGE
        if any(first < at + n and at < last for at, n in self.slots):
            return Answer.TAKEN
        return Answer.BEYOND if last > SPACE_PAGES else Answer.FREE

    def covered(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for at, n in sorted(self.slots):
            start, end = at * PAGE, (at + n) * PAGE
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, end))
        return found


@st.composite
def layouts(draw: st.DrawFn, largest_gap: int = 1 << 20) -> list[tuple[int, int]]:
    """Up to twelve slots that do not overlap; some touch."""
    slots, at = [], draw(st.integers(0, 1 << 18))
    for _ in range(draw(st.integers(0, 12))):
        n = draw(st.one_of(st.integers(1, 40), st.integers(1, 1 << 16), st.just(1 << 14)))
        slots.append((at, n))
        at += n + draw(st.one_of(st.just(0), st.integers(1, 3), st.integers(1, largest_gap)))
    return slots


def found(model: Model, hints: list[int], piece: int = 1 << 36) -> list[Span]:
    return Prober(model.ask, PAGE, piece, hints).covered()


@given(layouts(), st.sampled_from([1 << 30, 1 << 36, 1 << 42]))
def test_all_memory_is_found_and_what_is_between_is_free(
    slots: list[tuple[int, int]], piece: int
) -> None:
    model = Model(slots)
    ranges = found(model, [], piece)
    for start, end in model.covered():
        assert any(low <= start and end <= high for low, high in ranges)
    # Each range begins and ends with memory.
    for low, high in ranges:
        assert model.ask(low, PAGE) is model.ask(high - PAGE, PAGE) is Answer.TAKEN
    assert ranges == sorted(ranges)


@given(layouts())
def test_hints_of_all_ends_make_it_exact(slots: list[tuple[int, int]]) -> None:
    model = Model(slots)
    assert found(model, [end - start for start, end in model.covered()]) == model.covered()


# Each page of a range is asked about up to 128 pages.
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), max_size=12))
def test_small_ranges_are_exact_without_any_hint(pairs: list[tuple[int, int]]) -> None:
    slots, at = [], 0
    for n, gap in pairs:
        slots.append((at, n))
        at += n + gap
    model = Model(slots)
    assert found(model, []) == model.covered()


def test_it_asks_seldom() -> None:
    # QEMU's virt machine: two adjacent flashes, the stolen time, and 64 GiB of memory.
    model = Model([(0, 16384), (16384, 16384), (0x90A0, 1), (0x40000, 1 << 24)])
    hints = [64 << 20, 128 << 20, PAGE, 64 << 30]
    assert found(model, hints) == model.covered()
    assert model.asked < 900


def test_no_memory_at_all() -> None:
    assert found(Model([]), []) == []
