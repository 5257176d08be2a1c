"""Finding where slots are by guessing, against a model of a kernel that obeys requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtetool.backends.kvm.placing import Guess, Placer, settled
from mtetool.spans import Place, Span

PAGE = 4096
MIB = 1 << 20
GIB = 1 << 30
HEAP = 0x7000_0000_0000


@dataclass(frozen=True)
class Slot:
    id: int
    ipa: int
    size: int
    address: int
    readonly: bool = False


class Kernel:
    """Answers as virt/kvm/kvm_main.c does; a request that it would carry out is a failure."""

    def __init__(self, slots: list[Slot]) -> None:
        self.slots = {slot.id: slot for slot in slots}
        self.main = max(slots, key=lambda slot: slot.size)

    def ask(self, guess: Guess) -> bool:
        own = self.slots[guess.slot_id]
        assert guess.ipa % PAGE == 0
        asked = (guess.size_bytes, guess.address, guess.readonly)
        if asked != (own.size, own.address, own.readonly):
            return False
        assert guess.ipa != own.ipa, "flags would be changed"
        there = [
            slot
            for slot in self.slots.values()
            if slot.ipa < guess.ipa + guess.size_bytes and guess.ipa < slot.ipa + slot.size
        ]
        others = [slot for slot in there if slot is not own]
        assert len(others) > 1 or others == [self.main], "the slot could be moved"
        # The blockers that are checked first are the slots in the way, and a host holds the slot.
        holders = [next(o for o in others if o.ipa <= p < o.ipa + o.size) for p in guess.blockers]
        assert len(set(holders)) > 1 or holders == [self.main]
        end = own.ipa + own.size
        assert any(first <= own.ipa and end <= behind for first, behind in guess.hosts)
        return True

    def covered(self) -> list[Span]:
        found: list[Span] = []
        for slot in sorted(self.slots.values(), key=lambda slot: slot.ipa):
            start = slot.ipa
            if found and found[-1].end == start:
                start = found.pop().start
            found.append(Span(start, slot.ipa + slot.size))
        return found

    def placer(self, memory: list[Span], most: int = 2000, told: Sequence[Place] = ()) -> Placer:
        return Placer(self.covered(), sorted(self.slots), memory, PAGE, self.ask, most, told)

    def check(self, places: list[Place]) -> None:
        """Check that wherever places are reported, the true one is among them."""
        ends = sorted({end for ipa, size, _ in places for end in (ipa, ipa + size)})
        for at in ends:
            told = {address + at - ipa for ipa, size, address in places if ipa <= at < ipa + size}
            true = {
                slot.address + at - slot.ipa
                for slot in self.slots.values()
                if slot.ipa <= at < slot.ipa + slot.size
            }
            assert not told or true <= told
            assert not told or true


QEMU = [
    Slot(0, GIB, 256 * MIB, HEAP),
    Slot(1, 0, 64 * MIB, HEAP + GIB, True),
    Slot(2, 64 * MIB, 64 * MIB, HEAP + GIB + 65 * MIB, True),
    Slot(3, 0x90A0000, PAGE, HEAP + 2 * GIB),
]
QEMU_MEMORY = [
    Span(HEAP, HEAP + 256 * MIB),
    Span(HEAP + GIB, HEAP + GIB + 64 * MIB),
    Span(HEAP + GIB + 65 * MIB, HEAP + GIB + 129 * MIB),
    *(Span(at, at + 8 * MIB) for at in range(HEAP + 3 * GIB, HEAP + 3 * GIB + 320 * MIB, 16 * MIB)),
]


def test_qemu_as_it_is() -> None:
    kernel = Kernel(QEMU)
    placer = kernel.placer(QEMU_MEMORY)
    places = placer.places()
    kernel.check(places)
    assert [place for place in places if place[0] == GIB] == [(GIB, 256 * MIB, HEAP)]
    # Which of the two is the first flash is unknown.
    assert len(places) == 5
    assert placer.asked < 200


def test_main_memory_inside_of_a_larger_mapping() -> None:
    for before, after in ((0, MIB), (3 * MIB + PAGE, 0), (2 * MIB - PAGE, 5 * MIB)):
        memory = [Span(HEAP - before, HEAP + 256 * MIB + after), *QEMU_MEMORY[1:]]
        kernel = Kernel(QEMU)
        places = kernel.placer(memory).places()
        kernel.check(places)
        assert (GIB, 256 * MIB, HEAP) in places


def test_nodes_of_one_size_are_told_for_each_others_place() -> None:
    nodes = [Slot(0, GIB, 128 * MIB, HEAP), Slot(4, GIB + 128 * MIB, 128 * MIB, HEAP + 128 * MIB)]
    kernel = Kernel([*nodes, *QEMU[1:]])
    places = kernel.placer(QEMU_MEMORY).places()
    # They touch in the VMM's memory, too, and so form one mapping of twice the size.
    kernel.check(places)
    assert places == []
    halves = [Span(HEAP, HEAP + 128 * MIB), Span(HEAP + 128 * MIB, HEAP + 256 * MIB)]
    kernel = Kernel([*nodes, *(slot for slot in QEMU[1:] if slot.id != 2)])
    places = kernel.placer([*halves, *QEMU_MEMORY[1:]]).places()
    kernel.check(places)
    assert [place[0] for place in places if place[0] >= GIB] == 2 * [GIB] + 2 * [GIB + 128 * MIB]


@pytest.mark.parametrize("slots", [QEMU[:1], QEMU[:2]])
def test_nothing_is_asked_where_too_little_is_in_the_way(slots: list[Slot]) -> None:
    placer = Kernel(slots).placer(QEMU_MEMORY)
    assert placer.places() == []
    assert placer.asked == 0


def test_it_stops_asking() -> None:
    placer = Kernel(QEMU).placer(QEMU_MEMORY, most=3)
    placer.places()
    assert placer.asked == 3


def test_a_range_that_is_not_filled_is_not_known() -> None:
    right = [Guess(0, 0, 3 * MIB, HEAP, False)]
    assert settled([Span(0, 4 * MIB), Span(GIB, GIB + MIB)], right) == []
    assert settled([Span(0, 3 * MIB), Span(GIB, GIB + MIB)], right) == [(0, 3 * MIB, HEAP)]
    # It can be the other one.
    assert settled([Span(0, 3 * MIB), Span(GIB, GIB + 3 * MIB)], right) == []


def test_what_is_told_is_tried_first_and_enough() -> None:
    kernel = Kernel(QEMU)
    told = [Place(GIB, 256 * MIB, HEAP), Place(0x90A0000, PAGE, HEAP + 2 * GIB)]
    placer = kernel.placer([], told=told)
    assert placer.places() == told[:1]
    assert placer.all_told_proven()
    assert placer.asked <= len(QEMU)


@pytest.mark.parametrize("shift", [-256 * MIB, -PAGE, PAGE, 3 * GIB])
def test_what_is_told_and_wrong_is_not_believed(shift: int) -> None:
    kernel = Kernel(QEMU)
    told = [Place(GIB, 256 * MIB, HEAP + shift)]
    placer = kernel.placer([], told=told)
    assert placer.places() == []
    assert not placer.all_told_proven()
    # Then the VMM's mappings are tried.
    placer = kernel.placer(QEMU_MEMORY, told=told)
    assert (GIB, 256 * MIB, HEAP) in placer.places()


def test_told_in_each_others_place() -> None:
    """Which is which cannot be proven: both places are reported for both."""
    nodes = [Slot(0, GIB, 128 * MIB, HEAP), Slot(4, GIB + 128 * MIB, 128 * MIB, HEAP + GIB // 2)]
    kernel = Kernel([*nodes, *QEMU[1:]])
    told = [
        Place(GIB, 128 * MIB, HEAP + GIB // 2),
        Place(GIB + 128 * MIB, 128 * MIB, HEAP),
    ]
    kernel.check(kernel.placer(QEMU_MEMORY, told=told).places())


@st.composite
def machines(draw: st.DrawFn) -> tuple[list[Slot], list[Span]]:
    """Slots, and the VMM's mappings: some touch and so form one, some are not the guest's."""
    sizes = draw(st.lists(st.sampled_from([1, 2, 3, 4, 16, 64, 256]), min_size=1, max_size=7))
    gaps = st.sampled_from([0, 0, 1, 5, 100])
    ids = draw(st.permutations(range(len(sizes))))
    slots, memory, ipa = [], [], draw(st.integers(0, 3)) * MIB
    homes = []
    address = HEAP
    for size in draw(st.permutations(sizes)):
        address += draw(gaps) * MIB
        homes.append((size * MIB, address))
        memory.append((address, address + size * MIB))
        address += size * MIB
    for slot_id, (size, home) in zip(ids, draw(st.permutations(homes)), strict=True):
        ipa += draw(gaps) * MIB
        slots.append(Slot(slot_id, ipa, size, home, draw(st.booleans())))
        ipa += size
    merged: list[Span] = []
    for start, end in memory:
        first = merged.pop().start if merged and merged[-1].end == start else start
        merged.append(Span(first, end))
    return slots, merged


@given(machines())
def test_whatever_is_told_is_true_and_nothing_could_be_moved(
    machine: tuple[list[Slot], list[Span]],
) -> None:
    slots, memory = machine
    kernel = Kernel(slots)
    kernel.check(kernel.placer(memory).places())


@given(machines(), st.data())
def test_whatever_somebody_tells(
    machine: tuple[list[Slot], list[Span]], data: st.DataObject
) -> None:
    slots, memory = machine
    kernel = Kernel(slots)
    sizes = st.sampled_from([slot.size for slot in slots])
    addresses = st.sampled_from([slot.address for slot in slots])
    ipas = st.sampled_from([slot.ipa for slot in slots])
    told = data.draw(st.lists(st.builds(Place, ipas, sizes, addresses), max_size=4))
    kernel.check(kernel.placer(memory, told=told).places())
