"""The memslots of a VM, learnt from the kernel itself; nothing is created, moved or touched.

mtetool asks for a new memslot that the kernel must refuse: EEXIST if it overlaps another
(virt/kvm/kvm_main.c, __kvm_set_memory_region), else EINVAL, because its host memory, the vDSO's
data, cannot carry tags (arch/arm64/kvm/mmu.c, kvm_arch_prepare_memory_region), or EFAULT beyond the
guest's address space. This holds only in a VM with MTE on, which the caller must know, and not for
every kernel (6.1 accepts such memory, and newer ones may): so mtetool first asks the same of a
scratch VM of its own. Should a kernel accept such a slot all the same, mtetool deletes it at once,
and asks nothing more.

The kernel also confirms where in the VMM a slot's memory is. The size, address and read-only flag
of an existing slot cannot change (EINVAL). A slot may be moved, but not onto another one (EEXIST),
which the kernel checks last, so EEXIST means that all three are right.
`mtetool.backends.kvm.placing` says why no such question can move a slot: other slots are in the
way, and mtetool checks for them again right before it asks. Should a VMM remove them in between,
the very next call puts the slot back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import chain

from mtetool import procfs, uapi
from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.session import Session
from mtetool.backends.kvm.overlaps import Answer, Prober
from mtetool.backends.kvm.placing import SMALLEST_BYTES, Guess, Placer, inside
from mtetool.errors import BusyError, GuestError, GuestLostError, LayoutUnknownError, errno_name
from mtetool.guest import Memslot
from mtetool.procfs import Mapping
from mtetool.spans import Place, Span
from mtetool.vmm.scratch import ScratchVm, scratch_vm

# No VMM is known to use the highest ids. If one does, each answer is EINVAL (the address is not the
# slot's own), and nothing is found: then mtetool tries the next id.
_IDS = range(uapi.MEMSLOTS_MAX - 1, uapi.MEMSLOTS_MAX - 4, -1)
_PIECE_BYTES_MAX = 1 << 42

# VMMs count ids up from 0 and fill gaps: after this many free ids no more are in use.
_FREE_IDS = 16
# Slots whose places were given mostly have the first ids; then the others are not needed.
_FREE_IDS_TOLD = 2
_USED_IDS_MAX = 64
_GUESSES_MAX = 250


class _ChangedError(Exception):
    """The memslots are not what they were a moment ago."""


def memslots_of(session: Session, fd: int) -> tuple[Memslot, ...]:
    """The memslots of a VM with MTE on, in order of address, adjacent ones merged.

    Whether they are read-only is unknown. Raises LayoutUnknownError, GuestLostError.
    """
    if not _kernel_refuses():
        raise _unknown(
            session.pid,
            "this host's kernel may take what it must refuse, or /dev/kvm cannot be opened to try",
        )
    maps = session.mappings()
    for slot_id in _IDS:
        asking = _Asking(session, fd, slot_id, maps)
        prober = Prober(asking.ask, PAGE_BYTES, asking.piece_bytes, _hints(maps))
        if found := prober.covered():
            return tuple(
                Memslot(number, start, end - start, readonly=None)
                for number, (start, end) in enumerate(found)
            )
    raise _unknown(session.pid, "it answers as if there were none")


def places_of(
    session: Session,
    fd: int,
    layout: Sequence[Memslot] | None,
    told: Sequence[Place] = (),
) -> list[Place]:
    """Where guest memory is, as the kernel confirms.

    The VM has MTE on. `layout` is the answer of `memslots_of` or a monitor, None if neither was
    asked. `told` is where memory is said to be: these places are tried first, and no others if the
    kernel confirms them. If several places are returned for some memory, it is in one of them; if
    none, its place is unknown. Raises LayoutUnknownError, GuestLostError, AttachRefusedError;
    BusyError if the VMM changed its memslots so that one was moved, and GuestError if it could not
    be put back.
    """
    if not _kernel_confirms():
        raise _unknown(session.pid, "this host's kernel may move a memslot when asked about it")
    maps = session.mappings()
    asking = _Asking(session, fd, _IDS[0], maps)
    prober = Prober(asking.ask, PAGE_BYTES, asking.piece_bytes)
    covered = _ranges(memslots_of(session, fd) if layout is None else layout)
    if layout is not None and len(covered) > 1 and not prober.still(covered):
        covered = _ranges(memslots_of(session, fd))
    if len(covered) < 2:
        return []  # no other slot could be in the way
    memory = _guest_memory(maps)
    largest = max(covered, key=lambda span: span.size_bytes).start
    passes = ((_FREE_IDS_TOLD, []), (_FREE_IDS, memory)) if told else ((_FREE_IDS, memory),)
    with suppress(_ChangedError):
        for n_free, candidates in passes:
            ids = asking.used_ids(largest, n_free)
            placer = Placer(
                covered, ids, candidates, PAGE_BYTES, asking.confirms, _GUESSES_MAX, told
            )
            places = placer.places()
            if placer.all_told_proven():
                break
        # Believe all of it only if all was true at one time.
        if (
            prober.still(covered)
            and asking.used_ids(largest, n_free) == ids
            and all(asking.confirms(guess) for guess in placer.right)
        ):
            return places
    return []


def _ranges(slots: Sequence[Memslot]) -> list[Span]:
    """The ranges that memslots cover, adjacent ones merged."""
    found: list[Span] = []
    for slot in sorted(slots, key=lambda slot: slot.ipa):
        start = found.pop().start if found and found[-1].end == slot.ipa else slot.ipa
        found.append(Span(start, slot.end))
    return found


def _kernel_confirms() -> bool:
    """Whether this kernel refuses what `places_of` asks, tried on a scratch VM."""
    try:
        with scratch_vm() as vm:
            return _refuses_to_move(vm)
    except OSError:
        return False


def _refuses_to_move(vm: ScratchVm) -> bool:
    page, readonly = PAGE_BYTES, uapi.KVM_MEM_READONLY
    untaggable = _untaggable(procfs.mappings(os.getpid()))
    if untaggable is None or vm.enable(uapi.KVM_CAP_ARM_MTE):
        return False
    # Two pages, a hole of two, one page.
    if vm.set_memslot(0, 0, 2 * page, readonly) or vm.set_memslot(1, 4 * page, page, 0):
        return False
    questions = (
        vm.set_memslot(0, 3 * page, 2 * page, readonly),  # all is right, and slot 1 is in the way
        vm.set_memslot(0, 3 * page, 2 * page, 0),
        vm.set_memslot(0, 3 * page, 3 * page, readonly),
        vm.offer_memory(0, 3 * page, 2 * page, untaggable),
        vm.offer_memory(9, 3 * page, 2 * page, untaggable),  # no such slot
    )
    if questions != (-errno.EEXIST, *[-errno.EINVAL] * 3, -errno.EEXIST):
        return False
    layout = [vm.offer_memory(9, at * page, page, untaggable) for at in range(6)]
    taken, free = -errno.EEXIST, -errno.EINVAL
    return layout == [taken, taken, free, free, taken, free]


def _kernel_refuses() -> bool:
    """Whether this kernel answers as `memslots_of` needs, tried on a scratch VM."""
    try:
        with scratch_vm() as vm:
            untaggable = _untaggable(procfs.mappings(os.getpid()))
            if (
                untaggable is None
                or vm.enable(uapi.KVM_CAP_ARM_MTE)
                or vm.set_memslot(0, 0, PAGE_BYTES, 0)
            ):
                return False
            taken = vm.offer_memory(1, 0, PAGE_BYTES, untaggable)
            free = vm.offer_memory(1, PAGE_BYTES, PAGE_BYTES, untaggable)
            return (taken, free) == (-errno.EEXIST, -errno.EINVAL)
    except OSError:
        return False  # without /dev/kvm that is unknown


def _untaggable(maps: Sequence[Mapping]) -> int | None:
    """The vDSO's data: not the process's own memory, and never shmem or anonymous."""
    return next((m.start for m in maps if m.name in ("[vvar]", "[vdso]")), None)


class _Asking:
    """Asks one question after the other, all about the same unused slot id."""

    def __init__(self, session: Session, fd: int, slot_id: int, maps: Sequence[Mapping]) -> None:
        self._session = session
        self._fd = fd
        self._slot_id = slot_id
        untaggable = _untaggable(maps)
        if untaggable is None:
            raise _unknown(session.pid, "the process has no vDSO to ask with")
        self._untaggable = untaggable
        # The host range ends with the first page that cannot carry tags, whatever its size.
        room = min(untaggable, uapi.MEMSLOT_PAGES_MAX * PAGE_BYTES, _PIECE_BYTES_MAX)
        self.piece_bytes = 1 << room.bit_length() - 1

    def ask(self, ipa: int, size: int) -> Answer:
        hva = self._untaggable + PAGE_BYTES - size
        result = self._set(self._slot_id, uapi.KVM_MEM_READONLY, ipa, size, hva)
        if result == -errno.EEXIST:
            return Answer.TAKEN
        if result == -errno.EINVAL:
            return Answer.FREE
        if result == -errno.EFAULT:
            return Answer.BEYOND
        if result == 0:
            self._unmake(self._slot_id, ipa)
        raise self._failed(result)

    def used_ids(self, ipa: int, n_free: int) -> list[int]:
        """The memslot ids in use, up to a gap of more than `n_free` ids.

        If there are many, only the first ones. `ipa` is an address of any guest memory. The kernel
        has two reasons to refuse each question: an existing slot has another address, and a new one
        overlaps memory; besides, the memory offered cannot carry tags.
        """
        found: list[int] = []
        slot_id = 0
        while slot_id - (found[-1] if found else -1) <= n_free and len(found) < _USED_IDS_MAX:
            flags = uapi.KVM_MEM_READONLY
            result = self._set(slot_id, flags, ipa, PAGE_BYTES, self._untaggable)
            if result == 0:
                self._unmake(slot_id, ipa)
            if not self._overlaps(result):
                found.append(slot_id)
            slot_id += 1
        return found

    def confirms(self, guess: Guess) -> bool:
        """Whether all of a guess is right.

        Raises _ChangedError if a slot that was in the way is gone; BusyError and GuestError like
        `places_of`.
        """
        for page in guess.blockers:
            if self.ask(page, PAGE_BYTES) is not Answer.TAKEN:
                raise _ChangedError
        result = self._move(guess, guess.ipa)
        if result == 0:
            raise self._put_back(guess)
        return self._overlaps(result)

    def _put_back(self, guess: Guess) -> GuestError:
        """Undo a move that the kernel carried out after all; return the error to raise.

        A slot moved out of a range of memory left the only free place there: the kernel refuses to
        put it anywhere else in the range. The likely places are tried first, without checking them.
        """
        size = guess.size_bytes
        inside = [guess.told] if guess.told is not None else []
        homes = [at for at in inside if any(s <= at and at + size <= e for s, e in guess.hosts)]
        homes += [at for start, end in guess.hosts for at in (start, end - size)]
        searched = (self._free_place(*host, size) for host in guess.hosts)
        what = (
            f"process {self._session.pid} changed its memslots while mtetool asked the kernel"
            f" about them: memslot {guess.slot_id} ({size} bytes) was moved to {guess.ipa:#x}"
        )
        details = {"pid": self._session.pid, "slot": guess.slot_id, "size_bytes": size}
        for home in chain(homes, searched):
            if home is not None and home != guess.ipa and self._move(guess, home) == 0:
                return BusyError(
                    f"{what} for a moment, and was put back at {home:#x}",
                    hint="check the guest, and retry while its VMM neither adds nor removes memory",
                    ipa=home,
                    **details,
                )
        return GuestError(
            f"{what}, and could not be put back",
            hint="stop the guest and start it again: part of its memory is at the wrong address",
            ipa=guess.ipa,
            **details,
        )

    def _free_place(self, start: int, end: int, size: int) -> int | None:
        """Where in a range the first `size` bytes without a slot are; None if there are none."""
        # Every place of that size in the range contains one of these pages.
        for page in range(start + size - PAGE_BYTES, end, size):
            if self.ask(page, PAGE_BYTES) is Answer.TAKEN:
                continue
            low, high = max(start, page - size + PAGE_BYTES), page
            while low < high:
                middle = low + (high - low) // 2 // PAGE_BYTES * PAGE_BYTES
                free = self.ask(middle, page + PAGE_BYTES - middle) is not Answer.TAKEN
                low, high = (low, middle) if free else (middle + PAGE_BYTES, high)
            return low
        return None

    def _move(self, guess: Guess, ipa: int) -> int:
        flags = uapi.KVM_MEM_READONLY if guess.readonly else 0
        return self._set(guess.slot_id, flags, ipa, guess.size_bytes, guess.address)

    def _set(self, slot_id: int, flags: int, ipa: int, size: int, address: int) -> int:
        region = uapi.memory_region(slot_id, flags, ipa, size, address)
        return self._session.ioctl(self._fd, uapi.KVM_SET_USER_MEMORY_REGION, region)

    def _unmake(self, slot_id: int, ipa: int) -> None:
        """Delete a slot that the kernel made but should have refused."""
        self._set(slot_id, 0, ipa, 0, self._untaggable)

    def _overlaps(self, result: int) -> bool:
        if result not in (-errno.EEXIST, -errno.EINVAL):
            raise self._failed(result)
        return result == -errno.EEXIST

    def _failed(self, result: int) -> GuestLostError | LayoutUnknownError:
        if result == -errno.EIO:
            return GuestLostError(f"the VM of process {self._session.pid} is dead (EIO)")
        return _unknown(self._session.pid, f"the kernel answered {errno_name(-result)}")


def _guest_memory(maps: Sequence[Mapping]) -> list[Span]:
    """Mappings that may be guest memory: the kernel has merged similar neighbours already."""
    found = [Span(m.start, m.end) for m in maps if m.flags[1] == "w"]
    return [span for span in found if span.size_bytes >= SMALLEST_BYTES]


def likely_places(maps: Sequence[Mapping], size_bytes: int) -> list[int]:
    """Where in a process a memslot of that size may be, without asking the kernel."""
    spans = _guest_memory(maps)
    exact = [span.start for span in spans if span.size_bytes == size_bytes]
    return [*exact, *inside(spans, size_bytes)]


def _hints(maps: Sequence[Mapping]) -> set[int]:
    """Sizes of the mappings that may be guest memory, and of neighbours taken together."""
    hints = set()
    start = end = 0
    for m in maps:
        if m.flags[1] != "w" and m.inode == 0:
            continue
        start = start if m.start == end else m.start
        end = m.end
        hints |= {m.end - m.start, end - start}
    return hints


def _unknown(pid: int, why: str) -> LayoutUnknownError:
    return LayoutUnknownError(
        f"the memslots of process {pid} cannot be learnt from the kernel: {why}",
        hint="name the memory by hand: --memslot IPA:SIZE (repeatable)",
        pid=pid,
    )
