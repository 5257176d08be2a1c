"""Asking the kernel for memslots, also a kernel that does not behave as it must."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from mtetool import procfs, uapi
from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.session import Session
from mtetool.backends.kvm import memslots
from mtetool.backends.kvm.placing import Guess
from mtetool.errors import BusyError, GuestLostError, LayoutUnknownError
from mtetool.guest import Memslot
from mtetool.procfs import Mapping
from mtetool.spans import Place, Span
from tests.backends.kvm.test_placing import Slot, machines


class FakeSession:
    """A process whose kernel gives the same answer to every ioctl."""

    pid = os.getpid()

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.sizes: list[int] = []

    def mappings(self) -> list[Mapping]:
        return procfs.mappings(self.pid)

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert (fd, request) == (7, uapi.KVM_SET_USER_MEMORY_REGION)
        self.sizes.append(uapi.KVM_MEMORY_REGION_STRUCT.unpack(argument)[3])
        return self.answer


def ask(session: FakeSession) -> None:
    memslots.memslots_of(cast(Session, session), 7)


def test_kernel_that_may_take_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "_kernel_refuses", lambda: False)
    session = FakeSession(0)
    with pytest.raises(LayoutUnknownError, match="must refuse"):
        ask(session)
    assert session.sizes == []


def test_slot_that_was_made_after_all_is_deleted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "_kernel_refuses", lambda: True)
    session = FakeSession(0)
    with pytest.raises(LayoutUnknownError, match="answered"):
        ask(session)
    assert len(session.sizes) == 2
    assert session.sizes[1] == 0


def test_dead_vm_and_no_slots_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "_kernel_refuses", lambda: True)
    with pytest.raises(GuestLostError):
        ask(FakeSession(-errno.EIO))
    with pytest.raises(LayoutUnknownError, match="as if there were none"):
        ask(FakeSession(-errno.EFAULT))


MIB, GIB = 1 << 20, 1 << 30
VVAR = 0xFFFF_0000_0000
MAIN = 0x7000_0000_0000
# (ipa, size, address, flags) by id.
SLOTS = {
    0: (GIB, 256 * MIB, MAIN, 0),
    1: (0, 64 * MIB, MAIN + GIB, uapi.KVM_MEM_READONLY),
    3: (128 * MIB, 2 * MIB, MAIN + 2 * GIB, 0),
}
Slots = dict[int, tuple[int, int, int, int]]


class Vmm(FakeSession):
    """A process whose kernel knows memslots; a call that would change any fails the test."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(0)
        self.slots = dict(slots)
        self.then: Callable[[Vmm], None] = lambda vmm: None

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        super().ioctl(fd, request, argument)
        self.then(self)
        slot, flags, ipa, size, address = uapi.KVM_MEMORY_REGION_STRUCT.unpack(argument)
        own = self.slots.get(slot)
        if own is not None and (size, address, flags) != own[1:]:
            return -errno.EINVAL
        for number, (at, length, *_) in self.slots.items():
            if number != slot and at < ipa + size and ipa < at + length:
                return -errno.EEXIST
        assert own is None, "the slot would be moved"
        if ipa + size > 1 << 40:
            return -errno.EFAULT
        assert address <= VVAR < address + size, "the slot would be created"
        return -errno.EINVAL

    def places(self, monkeypatch: pytest.MonkeyPatch) -> list[Place]:
        maps = [Mapping(at, at + size, "rw-p", 0, "") for _, size, at, _ in SLOTS.values()]
        maps += [Mapping(VVAR, VVAR + PAGE_BYTES, "r--p", 0, "[vvar]")]
        monkeypatch.setattr("mtetool.procfs.mappings", lambda pid: maps)
        monkeypatch.setattr(memslots, "_kernel_refuses", lambda: True)
        monkeypatch.setattr(memslots, "_kernel_confirms", lambda: True)
        return memslots.places_of(cast(Session, self), 7, None)


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = Vmm(SLOTS)
    places = vmm.places(monkeypatch)
    assert places == sorted((ipa, size, address) for ipa, size, address, _ in SLOTS.values())
    slots = tuple(Memslot(0, ipa, size) for ipa, size, *_ in SLOTS.values())
    found = memslots.places_of(cast(Session, vmm), 7, tuple(sorted(slots, key=lambda s: s.ipa)))
    assert found == places


def test_kernel_that_may_move_a_slot_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "_kernel_confirms", lambda: False)
    session = FakeSession(0)
    with pytest.raises(LayoutUnknownError, match="may move"):
        memslots.places_of(cast(Session, session), 7, ())
    assert session.sizes == []


def test_the_only_slot_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memslots, "_kernel_confirms", lambda: True)
    session = FakeSession(0)
    assert memslots.places_of(cast(Session, session), 7, (Memslot(0, 0, GIB),)) == []
    assert session.sizes == []


@pytest.mark.parametrize("change", ["added", "gone", "moved", "another", "renamed"])
def test_what_changes_meanwhile_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    new: Slots = {
        "added": {**SLOTS, 2: (GIB * 8, GIB, MAIN + 9 * GIB, 0)},
        "gone": {0: SLOTS[0], 1: SLOTS[1]},
        "moved": {**SLOTS, 3: (160 * MIB, *SLOTS[3][1:])},
        "another": {**SLOTS, 3: (SLOTS[3][0], SLOTS[3][1], MAIN + 5 * GIB, 0)},
        "renamed": {0: SLOTS[0], 1: SLOTS[1], 2: SLOTS[3]},
    }[change]
    vmm = Vmm(SLOTS)
    confirms = memslots._Asking.confirms

    def changing(self: memslots._Asking, guess: Guess) -> bool:
        found = confirms(self, guess)
        if guess.slot_id == 3 and found:
            vmm.slots = dict(new)
        return found

    monkeypatch.setattr(memslots._Asking, "confirms", changing)
    assert vmm.places(monkeypatch) == []


class MovingVmm(Vmm):
    """A process that removes the slots in the way at the very moment of a question."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(slots)
        self.removed = 0
        self.calls_while_moved = 0

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        slot, flags, ipa, size, address = uapi.KVM_MEMORY_REGION_STRUCT.unpack(argument)
        own = self.slots.get(slot)
        if own is None or (size, address, flags) != own[1:]:
            self.calls_while_moved += self.removed
            return super().ioctl(fd, request, argument)
        there = [
            number
            for number, (at, length, *_) in self.slots.items()
            if number != slot and at < ipa + size and ipa < at + length
        ]
        if there and not self.removed:
            self.removed = len(there)
            for number in there:
                del self.slots[number]
            there = []
        if there:
            return -errno.EEXIST
        self.slots[slot] = (ipa, *own[1:])
        return 0


# Two slots of the same size touch, and the only place for the question overlaps one of them.
_TWINS = [
    Slot(0, 0, MIB, MAIN),
    Slot(1, MIB, MIB, MAIN + 18 * MIB),
    Slot(2, 3 * MIB, MIB, MAIN + 19 * MIB),
    Slot(3, 5 * MIB, 16 * MIB, MAIN + 20 * MIB),
    Slot(4, 21 * MIB, 16 * MIB, MAIN + MIB),
]
_TWINS_MEMORY = [(MAIN, MAIN + 17 * MIB), (MAIN + 18 * MIB, MAIN + 36 * MIB)]


@given(machines(), st.booleans())
@example((_TWINS, _TWINS_MEMORY), False)
def test_a_slot_that_was_moved_is_put_back(
    machine: tuple[list[Slot], list[Span]], is_told: bool
) -> None:
    slots, memory = machine
    known = {
        slot.id: (slot.ipa, slot.size, slot.address, uapi.KVM_MEM_READONLY * slot.readonly)
        for slot in slots
    }
    vmm = MovingVmm(known)
    told = [Place(slot.ipa, slot.size, slot.address) for slot in slots] if is_told else []
    with pytest.MonkeyPatch.context() as patch:
        maps = [Mapping(start, end, "rw-p", 0, "") for start, end in memory]
        maps += [Mapping(VVAR, VVAR + PAGE_BYTES, "r--p", 0, "[vvar]")]
        patch.setattr("mtetool.procfs.mappings", lambda pid: maps)
        patch.setattr(memslots, "_kernel_refuses", lambda: True)
        patch.setattr(memslots, "_kernel_confirms", lambda: True)
        moved = False
        try:
            memslots.places_of(cast(Session, vmm), 7, None, told)
        except BusyError:
            moved = True
            event(f"put back, told: {is_told}")
    assert moved is bool(vmm.removed)
    # The slots that the VMM did not remove are where they were.
    assert all(vmm.slots[number] == known[number] for number in vmm.slots)
    assert len(vmm.slots) == len(known) - vmm.removed


def test_the_very_next_call_puts_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    vmm = MovingVmm(SLOTS)
    with pytest.raises(BusyError, match="put back at 0x40000000"):
        vmm.places(monkeypatch)
    assert vmm.calls_while_moved == 0
    assert vmm.slots[0] == SLOTS[0]


def test_blockers_that_are_gone_end_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end before the question that could then move a slot."""
    vmm = Vmm(SLOTS)
    asked: list[Guess] = []
    confirms = memslots._Asking.confirms

    def without_the_others(self: memslots._Asking, guess: Guess) -> bool:
        asked.append(guess)
        vmm.slots = {0: SLOTS[0]}
        return confirms(self, guess)

    monkeypatch.setattr(memslots._Asking, "confirms", without_the_others)
    assert vmm.places(monkeypatch) == []
    assert len(asked) == 1


def test_a_layout_that_was_told_is_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that is not the kernel's would not show what is in the way."""
    main = Memslot(0, *SLOTS[0][:2])
    for layout in ([main], [main, Memslot(1, 0, MIB)], [main, Memslot(1, 4 * GIB, MIB)]):
        vmm = Vmm(SLOTS)
        vmm.places(monkeypatch)
        told = [Place(ipa, size, address) for ipa, size, address, _ in SLOTS.values()]
        found = memslots.places_of(cast(Session, vmm), 7, layout, told)
        assert found == ([] if len(layout) < 2 else sorted(told))
    vmm = Vmm(SLOTS)
    vmm.places(monkeypatch)
    vmm.sizes.clear()
    layout = [Memslot(0, ipa, size) for ipa, size, *_ in SLOTS.values()]
    assert memslots.places_of(cast(Session, vmm), 7, layout, told) == sorted(told)
    print(len(vmm.sizes), "questions")
    assert len(vmm.sizes) < 100
