"""The memslots of a VM, learnt from the kernel itself; nothing is created, moved or touched.

A new memslot is asked for that the kernel must refuse: EEXIST where it overlaps another
(virt/kvm/kvm_main.c, __kvm_set_memory_region), else EINVAL, because its host memory, the vDSO's
data, cannot carry tags (arch/arm64/kvm/mmu.c, kvm_arch_prepare_memory_region), or EFAULT beyond
the guest's address space. That only holds in a VM with MTE on, which the caller has to know, and
not for every kernel (6.1 takes such memory, and so may newer ones): so the same is asked of a
scratch VM of our own first.
Should a kernel take such a slot all the same, it is deleted at once, and nothing more is asked.

Where in the VMM a slot's memory is, it confirms, too: a slot that is there keeps its size, address
and read-only flag, so that another one is EINVAL, and may be moved, but EEXIST onto another slot,
which is looked at only then. `mtetool.backends.kvm.placing` says why no such question can move
one: other slots are in the way, which are looked at again right before it. Should a VMM remove them
in between, the slot is put back by the very next call.
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
from mtetool.backends.kvm.placing import SMALLEST_BYTES, Guess, Placer
from mtetool.errors import BusyError, GuestError, GuestLostError, LayoutUnknownError, errno_name
from mtetool.guest import Memslot
from mtetool.procfs import Mapping
from mtetool.spans import Place, Span
from mtetool.vmm.scratch import ScratchVm, scratch_vm

# No VMM uses the highest ids. Where one does, each answer is EINVAL (another address than the
# slot's own), and nothing is found: then the next is tried.
_IDS = range(uapi.MEMSLOTS_MAX - 1, uapi.MEMSLOTS_MAX - 4, -1)
_PIECE_BYTES_MAX = 1 << 42

# VMMs count ids up from 0 and fill gaps: after so many that are free there is none.
_FREE_IDS = 16
# Slots whose places were told are mostly among the first ids; the others are not needed then.
_FREE_IDS_TOLD = 2
_USED_IDS_MAX = 64
_GUESSES_MAX = 250


class _ChangedError(Exception):
    """The memslots are not what they were a moment ago."""


def memslots_of(session: Session, fd: int) -> tuple[Memslot, ...]:
    """The memslots of a VM with MTE on, in order of address; those that touch come as one.

    Whether they are read-only cannot be seen. Raises LayoutUnknownError, GuestLostError.
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
    """Where guest memory is, as the kernel confirms it.

    The VM has MTE on. `layout` is what `memslots_of` gave for it or a monitor told, None where
    neither was asked; `told` is where memory is said to be, which is what is tried first, and all
    that is tried where the kernel confirms it.
    Where several places are given for some memory, it is in one of them; where none, its place is
    unknown. Raises LayoutUnknownError, GuestLostError, AttachRefusedError; BusyError where the VMM
    changed its memslots so that one was moved, and GuestError where it could not be put back.
    """
    if not _kernel_confirms():
        raise _unknown(session.pid, "this host's kernel may move a memslot that is only asked for")
    maps = session.mappings()
    asking = _Asking(session, fd, _IDS[0], maps)
    prober = Prober(asking.ask, PAGE_BYTES, asking.piece_bytes)
    covered = _ranges(memslots_of(session, fd) if layout is None else layout)
    if layout is not None and len(covered) > 1 and not prober.still(covered):
        covered = _ranges(memslots_of(session, fd))
    if len(covered) < 2:
        return []  # nothing could be in the way of its only memory
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
        # All of this was true at one time, or none is believed.
        if (
            prober.still(covered)
            and asking.used_ids(largest, n_free) == ids
            and all(asking.confirms(guess) for guess in placer.right)
        ):
            return places
    return []


def _ranges(slots: Sequence[Memslot]) -> list[Span]:
    """What memslots cover; those that touch come as one."""
    found: list[Span] = []
    for slot in sorted(slots, key=lambda slot: slot.ipa):
        start = found.pop().start if found and found[-1].end == slot.ipa else slot.ipa
        found.append(Span(start, slot.end))
    return found


def _kernel_confirms() -> bool:
    """Whether this kernel refuses what `places_of` asks, tried on a VM that ends here."""
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
    """Whether this kernel answers as is needed, tried on a VM that ends here."""
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
    """Data of the vDSO: not the process's own memory, and never shmem or anonymous."""
    return next((m.start for m in maps if m.name in ("[vvar]", "[vdso]")), None)


class _Asking:
    """One question after the other, all for the same unused slot id."""

    def __init__(self, session: Session, fd: int, slot_id: int, maps: Sequence[Mapping]) -> None:
        self._session = session
        self._fd = fd
        self._slot_id = slot_id
        untaggable = _untaggable(maps)
        if untaggable is None:
            raise _unknown(session.pid, "the process has no vDSO to ask with")
        self._untaggable = untaggable
        # The host range ends in the first page that cannot carry tags, whatever its size.
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
        """The ids of memslots up to where more than `n_free` in a row are not used.

        The first of many. `ipa` is of any memory. A question that is refused twice over: a slot
        that is there has another address, and one that is not overlaps memory; and the memory
        offered cannot carry tags.
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
        """Whether all of it is right.

        Raises _ChangedError where what was in the way is gone; BusyError and GuestError as
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
        """Move the slot of a guess, which was carried out, to where it was; the error to raise.

        What was moved from a range of memory left the only free place there: anywhere else in it
        the kernel refuses to put it. The likely places come first, without a look at them.
        """
        size = guess.size_bytes
        inside = [guess.told] if guess.told is not None else []
        homes = [at for at in inside if any(s <= at and at + size <= e for s, e in guess.hosts)]
        homes += [at for start, end in guess.hosts for at in (start, end - size)]
        searched = (self._free_place(*host, size) for host in guess.hosts)
        what = (
            f"process {self._session.pid} changed its memslots while the kernel was asked about"
            f" them: memslot {guess.slot_id} ({size} bytes) was moved to {guess.ipa:#x}"
        )
        details = {"pid": self._session.pid, "slot": guess.slot_id, "size_bytes": size}
        for home in chain(homes, searched):
            if home is not None and home != guess.ipa and self._move(guess, home) == 0:
                return BusyError(
                    f"{what} for a moment, and was put back to {home:#x}",
                    hint="check the guest, and try again when its VMM adds and removes no memory",
                    ipa=home,
                    **details,
                )
        return GuestError(
            f"{what}, and could not be put back",
            hint="stop the guest and start it again: a part of its memory is at a wrong address",
            ipa=guess.ipa,
            **details,
        )

    def _free_place(self, start: int, end: int, size: int) -> int | None:
        """Where in a range the first `size` bytes are that no slot has; None where none are."""
        # Every place of that size in the range has one of these pages.
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
        """Delete a slot that the kernel made, which it should have refused."""
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
    """What may be a guest's memory: neighbours that are alike are one mapping already."""
    found = [Span(m.start, m.end) for m in maps if m.flags[1] == "w"]
    return [span for span in found if span.size_bytes >= SMALLEST_BYTES]


def _hints(maps: Sequence[Mapping]) -> set[int]:
    """Sizes of the mappings that may be a guest's memory, and of neighbours together."""
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
