"""Sequences of calls, valid and invalid, that hypothesis makes as a program would.

The emulated kernel answers each call at once, so later ones can build on it; at the end of a
sequence, a real kernel answers the same calls, and every answer must be equal.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from mtetool import uapi
from mtetool.emulator import Host
from mtetool.emulator.machine import Slot
from tests.differential.emulated import EmulatedSide
from tests.differential.sides import ARENA, ARENA_PAGES, HUGE_ARENA, HUGE_PAGES

Call = list[Any]
Ask = Callable[[list[Call]], list[int]]
"""Makes a list of calls on a real kernel without VMs; returns the answers."""

TO_GUEST, FROM_GUEST = uapi.KVM_ARM_TAGS_TO_GUEST, uapi.KVM_ARM_TAGS_FROM_GUEST
DIRTY, READONLY = uapi.KVM_MEM_LOG_DIRTY_PAGES, uapi.KVM_MEM_READONLY

# The arena in pages: guest memory first, then the buffers, with nothing after them.
_GUEST_PAGES = 48
_BUFFER_PAGE = 64
_BUFFER_PAGES = 8
_FILE_PAGES = 16
_INT_MAX = (1 << 31) - 1
_LENGTHS = [
    *(0, 1, 16, 4096, 8192, 16384, 65536),
    *(_INT_MAX, _INT_MAX + 1, _INT_MAX + 1 - 4096, _INT_MAX + 1 - 16384),
    *((1 << 32) + 16384, (1 << 64) - 16384, 1 << 63),
]
_MTE = uapi.KVM_CAP_ARM_MTE

_vms = st.sampled_from([0, 0, 0, 0, 0, 0, 1, 1])
_slot_ids = st.integers(0, 3)
_pages = st.integers(0, 7)
_some_pages = st.sampled_from([1, 1, 2, 3, 4, 6, 8])
_KINDS = "private private shared file file file-private file-private disk disk-private"
_kinds = st.sampled_from(_KINDS.split())
_protections = st.sampled_from(["rw", "rw", "rw", "rw", "r", "none"])
_access = st.sampled_from([0, 0, 0, READONLY])
_features = st.sampled_from([0, 0, 1, 2, 2, 4, 6, 1 << 7, 1 << 20])


class Differences(RuleBasedStateMachine):
    """One sequence; the caller sets `host` and `ask`."""

    host: ClassVar[Host]
    ask: ClassVar[Ask]
    calls_compared: ClassVar[int] = 0
    sequences: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.side = EmulatedSide(self.host)
        self.page = self.host.page_size_bytes
        self.calls: list[Call] = []
        self.answers: list[int] = []

    def call(self, name: str, *words: Any) -> int:
        """Call the emulated kernel, and keep the call for the real one."""
        answer: int = getattr(self.side, name)(*words)
        self.calls.append([name, *words])
        self.answers.append(answer)
        return answer

    def teardown(self) -> None:
        """Read all tags, then make the same calls on the real kernel."""
        for vm in sorted(self.side.vms):
            for slot in self.side.vms[vm].memslots:
                self._read_back(vm, slot)
        real = type(self).ask(self.calls)
        cls = Differences
        cls.calls_compared += len(self.calls)
        cls.sequences += 1
        for number, (emulated, answer) in enumerate(zip(self.answers, real, strict=True)):
            assert emulated == answer, self._difference(number, emulated, answer)

    def _difference(self, number: int, emulated: int, real: int) -> str:
        calls = "\n".join(json.dumps(call) for call in self.calls[: number + 1])
        return f"{calls}\nemulated {emulated}, real {real}"

    # --- where things are -----------------------------------------------------------------

    def _ipa(self, page: int) -> int:
        return (1 << 30) + page * self.page

    def _buffer(self, page: int = 0) -> int:
        return ARENA + (_BUFFER_PAGE + page) * self.page

    def _copy(self, vm: int, ipa: int, n_pages: int, flags: int, address: int) -> None:
        self.call("copy_tags", vm, ipa, n_pages * self.page, address, flags, [0, 0])

    def _read_back(self, vm: int, slot: Slot) -> None:
        """Read all tags of a slot; where a copy fails, go on at the next page."""
        at, end = slot.ipa, min(slot.end, slot.ipa + 64 * self.page)
        while at < end:
            self.call("map", self._buffer(), self.page * 4, "private", "rw", -1, 0)
            self.call("fill", self._buffer(), self.page * 4, 0)
            length = end - at
            words = (at, length, self._buffer(), FROM_GUEST, [0, 0])
            done = self.call("copy_tags", vm, *words)
            self.call("peek", self._buffer(), self.page * 4)
            at += max(done, self.page)

    # --- the beginning --------------------------------------------------------------------

    @initialize(
        mte=st.sampled_from(["first"] * 6 + ["last", "last", "never"]),
        two=st.booleans(),
        kinds=st.lists(st.tuples(_kinds, _protections, _access), min_size=1, max_size=4),
        tagged=st.booleans(),
    )
    def begin(self, mte: str, two: bool, kinds: list[tuple[str, str, int]], tagged: bool) -> None:
        """Make VMs with some memory, and a buffer."""
        vms = (0, 1) if two else (0,)
        for vm in vms:
            self.call("create_vm", vm, 0)
            if mte == "first":
                self.call("enable_cap", vm, _MTE, 0, 0)
        self.call("map", self._buffer(), _BUFFER_PAGES * self.page, "private", "rw", -1, 0)
        for number, (kind, protection, flags) in enumerate(kinds):
            address = ARENA + number * 8 * self.page
            self._map(address, 8, kind, protection)
            words = (number, flags, self._ipa(number * 8), 8 * self.page, address)
            self.call("set_memslot", 0, *words)
        for vm in vms:
            if mte == "last":
                self.call("enable_cap", vm, _MTE, 0, 0)
        if tagged:
            self.call("fill", self._buffer(), _BUFFER_PAGES * self.page, 77)
            for number in range(len(kinds)):
                self._copy(0, self._ipa(number * 8), 8, TO_GUEST, self._buffer())

    def _map(self, address: int, n_pages: int, kind: str, protection: str, at: int = 0) -> None:
        """Map memory of a kind; there is one file in memory and one on a disk."""
        file = {"file": 0, "disk": 1}.get(kind.removesuffix("-private"), -1)
        if file >= 0 and file not in self.side._files:
            size = 6 * self.page
            self.call("create_file", file, "memory" if file == 0 else "disk", size)
        words = (n_pages * self.page, kind, protection, file, at * self.page)
        self.call("map", address, *words)

    # --- VMs and vCPUs --------------------------------------------------------------------

    @precondition(lambda self: len(self.side.vms) < 4)
    @rule(
        vm=st.integers(0, 3), kind=st.sampled_from([0, 0, 31, 32, 36, 40, 48, 52, 53, 256, 1 << 31])
    )
    def create_vm(self, vm: int, kind: int) -> None:
        """Create a VM with addresses of some size, or of an impossible one."""
        if vm not in self.side.vms:
            self.call("create_vm", vm, kind)
            self.call("check_extension", vm, _MTE)

    @rule(
        vm=_vms,
        capability=st.sampled_from([_MTE] * 6 + [999_999]),
        flags=st.sampled_from([0] * 6 + [1, 1 << 31]),
        argument=st.sampled_from([0, 0, 7]),
    )
    def enable(self, vm: int, capability: int, flags: int, argument: int) -> None:
        """Enable a capability, before or after vCPUs."""
        self.call("enable_cap", vm, capability, flags, argument)

    @precondition(lambda self: any(len(vm._vcpus) < 2 for vm in self.side.vms.values()))
    @rule(
        vm=_vms,
        numbers=st.lists(st.sampled_from([0, 0, 1, 2, 511, 512, 1 << 20]), min_size=1, max_size=2),
        cores=st.lists(st.sampled_from([5] * 7 + [4]), min_size=2, max_size=2),
        features=st.lists(_features, min_size=2, max_size=2),
    )
    def create_vcpus(
        self, vm: int, numbers: list[int], cores: list[int], features: list[int]
    ) -> None:
        """Create vCPUs, perhaps one that exists, or beyond the host's limit, or unlike others.

        They are powered off, AArch32, nested, or have an unknown feature.
        """
        for number in numbers:
            self.call("create_vcpu", vm, number)
        for number, core, feature in zip(numbers, cores, features, strict=False):
            self.call("init_vcpu", vm, number, core, feature)

    @precondition(lambda self: any(vm._vcpus for vm in self.side.vms.values()))
    @rule(vm=_vms, number=st.sampled_from([0, 0, 0, 1, 511]), features=_features)
    def init_vcpu(self, vm: int, number: int, features: int) -> None:
        """Initialize a vCPU again."""
        self.call("init_vcpu", vm, number, uapi.KVM_ARM_TARGET_GENERIC_V8, features)

    # --- memory ---------------------------------------------------------------------------

    @rule(
        at=st.integers(0, _GUEST_PAGES - 1),
        n=_some_pages,
        kind=_kinds,
        protection=_protections,
        offset=st.integers(0, _FILE_PAGES - 1),
    )
    def map_memory(self, at: int, n: int, kind: str, protection: str, offset: int) -> None:
        """Map memory of any kind, also over other mappings and beyond the end of its file."""
        self._map(ARENA + at * self.page, n, kind, protection, offset)

    @precondition(lambda self: self.side._files)
    @rule(
        file=st.sampled_from([0, 0, 1]),
        size=st.integers(0, _FILE_PAGES),
        hole=st.booleans(),
        n=_pages,
        again=st.booleans(),
    )
    def change_file(self, file: int, size: int, hole: bool, n: int, again: bool) -> None:
        """Punch a hole into a file, or resize it, or cut it off and grow it again."""
        if file in self.side._files:
            if hole and n:
                self.call("punch", file, size * self.page, n * self.page)
            elif not hole:
                self.call("truncate", file, size * self.page)
                if again:
                    self.call("truncate", file, _FILE_PAGES * self.page)

    @rule(
        at=st.integers(0, _GUEST_PAGES - 1),
        n=_some_pages,
        what=st.sampled_from(["unmap", "discard", "none", "r", "rw"]),
    )
    def change_memory(self, at: int, n: int, what: str) -> None:
        """Unmap, discard or protect memory behind the VM's back."""
        address, size = ARENA + at * self.page, n * self.page
        if what in ("unmap", "discard"):
            self.call(what, address, size)
        else:
            self.call("protect", address, size, what)

    @rule(at=st.integers(0, 31), n=_some_pages, seed=st.integers(0, 255), which=st.integers(0, 31))
    def touch(self, at: int, n: int, seed: int, which: int) -> None:
        """Write to guest memory from the process: private pages of a file are copied."""
        slots = self._slots()
        address = slots[which % len(slots)][1].address if slots else ARENA
        self.call("fill", address + at % 8 * self.page, n * self.page, seed)

    @precondition(lambda self: self.host.hugepage_bytes)
    @rule(first=st.integers(0, HUGE_PAGES - 1), n=st.integers(1, 2), vm=_vms, slot=_slot_ids)
    def map_huge(self, first: int, n: int, vm: int, slot: int) -> None:
        """Map huge pages, and set a memslot of them."""
        n = min(n, HUGE_PAGES - first)
        huge = self.host.hugepage_bytes
        address, size = HUGE_ARENA + first * huge, n * huge
        if next(self.side.memory.crossing(address, size), None) is None:
            self.call("map", address, size, "huge", "rw", -1, 0)
            self.call(
                "set_memslot", vm, slot + 8, 0, (1 << 34) + slot * HUGE_PAGES * huge, size, address
            )

    # --- memslots -------------------------------------------------------------------------

    @rule(
        vm=_vms,
        slot=_slot_ids,
        flags=st.sampled_from([0, 0, 0, DIRTY, READONLY, READONLY | DIRTY]),
        ipa=st.integers(0, 40),
        n=_some_pages,
        at=st.integers(0, _GUEST_PAGES - 1),
    )
    def set_memslot(self, vm: int, slot: int, flags: int, ipa: int, n: int, at: int) -> None:
        """Set a memslot, new or changed, with or without memory behind it."""
        address = ARENA + at * self.page
        self.call("set_memslot", vm, slot, flags, self._ipa(ipa), n * self.page, address)

    def _slots(self) -> list[tuple[int, Slot]]:
        vms = sorted(self.side.vms.items())
        return [(number, slot) for number, vm in vms for slot in vm.memslots]

    @precondition(lambda self: self._slots())
    @rule(
        which=st.integers(0, 31),
        change=st.sampled_from(["remove", "move", "log", "log", "nothing", "grow", "readonly"]),
        by=st.integers(-9, 9),
    )
    def change_memslot(self, which: int, change: str, by: int) -> None:
        """Remove or move a memslot, switch its logging, or make a change that is refused."""
        vm, slot = (slots := self._slots())[which % len(slots)]
        flags, ipa, size = slot.flags, slot.ipa, slot.size_bytes
        if change == "remove":
            size = 0
        elif change == "move":
            ipa += by * self.page
        elif change == "log":
            flags ^= DIRTY
        elif change == "grow":
            size += self.page
        elif change == "readonly":
            flags ^= READONLY
        self.call("set_memslot", vm, slot.id, flags, max(ipa, 0), size, slot.address)

    @precondition(lambda self: any(slot.flags & DIRTY for _, slot in self._slots()))
    @rule()
    def stop_logging(self) -> None:
        """Turn off dirty logging everywhere, as at the end of a migration."""
        for vm, slot in self._slots():
            if slot.flags & DIRTY:
                words = (slot.flags & ~DIRTY, slot.ipa, slot.size_bytes, slot.address)
                self.call("set_memslot", vm, slot.id, *words)

    @rule(
        vm=_vms,
        slot=st.sampled_from([4, 5, 32_766, 32_767, 65_535, 65_536, (1 << 32) - 1]),
        flags=st.sampled_from([0, 0, 0, 1 << 2, 1 << 3, 1 << 31]),
        ipa=st.sampled_from([1 << 31, 1 << 39, 1 << 40, (1 << 48), (1 << 52), (1 << 64) - 4096]),
        size=st.sampled_from([0, 1, 16, 1 << 21, 1 << 43, 1 << 44, (1 << 64) - 4096]),
        address=st.sampled_from(
            [0, ARENA, ARENA + 1, ARENA | 5 << 56, (1 << 48) - 4096, (1 << 52) - (1 << 21), 1 << 63]
        ),
        off=st.sampled_from([0, 0, 0, 0, 0, 512]),
    )
    def odd_memslot(
        self, vm: int, slot: int, flags: int, ipa: int, size: int, address: int, off: int
    ) -> None:
        """Set a memslot at or over some limit."""
        ipa = min(ipa + off, (1 << 64) - 1)
        answer = self.call("set_memslot", vm, slot, flags, ipa, size, address)
        if answer == 0 and size:
            self.call("set_memslot", vm, slot, flags, ipa, 0, address)

    # --- copies ---------------------------------------------------------------------------

    @rule(
        vm=_vms,
        ipa=st.integers(0, 47),
        n=_some_pages,
        seed=st.integers(0, 255),
        at=st.sampled_from([0, 0, 0, 1, 3, 8, 100]),
    )
    def write_tags(self, vm: int, ipa: int, n: int, seed: int, at: int) -> None:
        """Write tags to the guest, with high bits, across whatever lies there."""
        self.call("fill", self._buffer(), 2 * self.page, seed)
        self._copy(vm, self._ipa(ipa), n, TO_GUEST, self._buffer() + at)

    @rule(vm=_vms, ipa=st.integers(0, 47), n=_some_pages, at=st.sampled_from([0, 0, 0, 1, 3, 100]))
    def read_tags(self, vm: int, ipa: int, n: int, at: int) -> None:
        """Read tags from the guest; nothing but the buffer may change."""
        self.call("fill", self._buffer(), 2 * self.page, 0)
        self._copy(vm, self._ipa(ipa), n, FROM_GUEST, self._buffer() + at)
        self.call("peek", self._buffer(), 2 * self.page)

    @precondition(lambda self: self._slots())
    @rule(
        which=st.integers(0, 31),
        first=st.integers(-2, 7),
        n=_some_pages,
        flags=st.sampled_from([TO_GUEST, FROM_GUEST]),
        seed=st.integers(0, 255),
    )
    def copy_at_slot(self, which: int, first: int, n: int, flags: int, seed: int) -> None:
        """Copy at a memslot, across its ends too."""
        vm, slot = (slots := self._slots())[which % len(slots)]
        self.call("fill", self._buffer(), 2 * self.page, seed)
        self._copy(vm, max(slot.ipa + first * self.page, 0), n, flags, self._buffer())
        self.call("peek", self._buffer(), 2 * self.page)

    @rule(
        vm=_vms,
        ipa=st.integers(0, 31),
        n=_some_pages,
        flags=st.sampled_from([TO_GUEST, FROM_GUEST]),
        back=st.sampled_from([0, 1, 3, 8, 20, 200, 256, 257, 400, 1000, 1024, 1500]),
        behind=st.sampled_from(["unmapped", "none", "r", "rw"]),
        tag=st.sampled_from([0, 0, 0, 5 << 56, 0xFF << 56]),
    )
    def copy_with_edge(
        self, vm: int, ipa: int, n: int, flags: int, back: int, behind: str, tag: int
    ) -> None:
        """Copy with a buffer that ends, or changes its protection, in the middle."""
        edge = self._buffer(4)
        self.call("map", self._buffer(2), 4 * self.page, "private", "rw", -1, 0)
        self.call("fill", self._buffer(2), 4 * self.page, back & 255)
        if behind == "unmapped":
            self.call("unmap", edge, 2 * self.page)
        else:
            self.call("protect", edge, 2 * self.page, behind)
        self._copy(vm, self._ipa(ipa), n, flags, (edge - back) | tag)
        self.call("peek", self._buffer(2), 2 * self.page)
        if behind in ("r", "rw"):
            self.call("peek", edge, 2 * self.page)

    @rule(
        vm=_vms,
        ipa=st.integers(0, 31),
        flags=st.sampled_from([TO_GUEST, FROM_GUEST]),
        address=st.sampled_from(
            [0, 1, 1 << 47, (1 << 52) - 64, (1 << 55) - 64, 1 << 63, (1 << 64) - 64]
        ),
    )
    def copy_with_bad_buffer(self, vm: int, ipa: int, flags: int, address: int) -> None:
        """Copy with a buffer at a bad address."""
        self._copy(vm, self._ipa(ipa), 1, flags, address)

    @rule(
        vm=_vms,
        ipa=st.sampled_from(
            [1 << 30, 1 << 30, 1 << 30, 0, 1 << 52, (1 << 64) - (1 << 16), 1 << 63]
        ),
        off=st.sampled_from([0, 0, 0, 0, 1, 16, 2048, 4096, 8192]),
        length=st.sampled_from(_LENGTHS),
        flags=st.sampled_from([0, 1, 1, 2, 3, 1 << 31, 1 << 32, (1 << 64) - 1]),
        reserved=st.sampled_from([[0, 0]] * 6 + [[1, 0], [0, 1], [0, 1 << 63]]),
    )
    def odd_copy(
        self, vm: int, ipa: int, off: int, length: int, flags: int, reserved: list[int]
    ) -> None:
        """Copy with arguments at and over every limit."""
        ipa = min(ipa + off, (1 << 64) - 1)
        self.call("fill", self._buffer(), _BUFFER_PAGES * self.page, 9)
        self.call("copy_tags", vm, ipa, length, self._buffer(), flags, reserved)
        self.call("peek", self._buffer(), self.page)

    @rule(vm=_vms, address=st.sampled_from([0, 1 << 47, 1 << 63]))
    def copy_without_struct(self, vm: int, address: int) -> None:
        """Copy without a readable struct: only the checks before it can answer."""
        self.call("copy_tags_at", vm, address)

    @precondition(lambda self: self.may_fork)
    @rule(vm=_vms, ipa=st.integers(0, 7), off=st.sampled_from([0, 1]))
    def copy_by_child(self, vm: int, ipa: int, off: int) -> None:
        """Copy from another process with the same VM."""
        words = (self._ipa(ipa) + off, self.page, self._buffer(), FROM_GUEST)
        self.call("copy_tags_in_child", vm, *words)

    @property
    def may_fork(self) -> bool:
        """Whether a fork is due: seldom, as it is slow."""
        return len(self.calls) % 7 == 0

    @rule(which=_pages, n=_some_pages, flags=st.sampled_from([TO_GUEST, FROM_GUEST]), to=_pages)
    def copy_within_guest_memory(self, which: int, n: int, flags: int, to: int) -> None:
        """Copy with a buffer in the guest's own memory."""
        self._copy(0, self._ipa(which), n, flags, ARENA + to * self.page)
        self.call("peek", ARENA + to * self.page, self.page)


assert _BUFFER_PAGE + _BUFFER_PAGES <= ARENA_PAGES
