"""The memslots of a VM, learnt from the kernel itself; nothing is created or touched.

A new memslot is asked for that the kernel must refuse: EEXIST where it overlaps another
(virt/kvm/kvm_main.c, __kvm_set_memory_region), else EINVAL, because its host memory, the vDSO's
data, cannot carry tags (arch/arm64/kvm/mmu.c, kvm_arch_prepare_memory_region), or EFAULT beyond
the guest's address space. That only holds in a VM with MTE on, which the caller has to know, and
not for every kernel (6.1 takes such memory, and so may newer ones): so the same is asked of a
scratch VM of our own first.
Should a kernel take such a slot all the same, it is deleted at once, and nothing more is asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from mtetool import uapi
from mtetool.attach import memory
from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.memory import Mapping
from mtetool.attach.session import Session
from mtetool.errors import GuestLostError, LayoutUnknownError, errno_name
from mtetool.guest import Memslot
from mtetool.vmm.probing import Answer, Prober
from mtetool.vmm.scratch import scratch_vm

# No VMM uses the highest ids. Where one does, each answer is EINVAL (another address than the
# slot's own), and nothing is found: then the next is tried.
_IDS = range(uapi.MEMSLOTS_MAX - 1, uapi.MEMSLOTS_MAX - 4, -1)
_PIECE_BYTES_MAX = 1 << 42


def memslots_of(session: Session, fd: int) -> tuple[Memslot, ...]:
    """The memslots of a VM with MTE on, in order of address; those that touch come as one.

    Whether they are read-only cannot be seen. Raises LayoutUnknownError, GuestLostError.
    """
    if not _kernel_refuses():
        raise _unknown(
            session.pid,
            "this host's kernel may take what it must refuse, or /dev/kvm cannot be opened to try",
        )
    maps = memory.mappings(session.pid)
    for slot_id in _IDS:
        asking = _Asking(session, fd, slot_id, maps)
        prober = Prober(asking.ask, PAGE_BYTES, asking.piece_bytes, _hints(maps))
        if found := prober.covered():
            return tuple(
                Memslot(number, start, end - start, readonly=None)
                for number, (start, end) in enumerate(found)
            )
    raise _unknown(session.pid, "it answers as if there were none")


def _kernel_refuses() -> bool:
    """Whether this kernel answers as is needed, tried on a VM that ends here."""
    try:
        with scratch_vm() as vm:
            untaggable = _untaggable(memory.mappings(os.getpid()))
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
        return False  # without /dev/kvm nobody may know


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
        region = uapi.memory_region(self._slot_id, uapi.KVM_MEM_READONLY, ipa, size, hva)
        result = self._session.ioctl(self._fd, uapi.KVM_SET_USER_MEMORY_REGION, region)
        if result == -errno.EEXIST:
            return Answer.TAKEN
        if result == -errno.EINVAL:
            return Answer.FREE
        if result == -errno.EFAULT:
            return Answer.BEYOND
        if result == 0:
            none = uapi.memory_region(self._slot_id, 0, ipa, 0, hva)
            self._session.ioctl(self._fd, uapi.KVM_SET_USER_MEMORY_REGION, none)
        if result == -errno.EIO:
            raise GuestLostError(f"the VM of process {self._session.pid} is dead (EIO)")
        raise _unknown(self._session.pid, f"the kernel answered {errno_name(-result)}")


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
