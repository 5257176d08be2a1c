"""Run in the lab: probe for a place in a VM whose other memslots vanish during the probe.

The VM belongs to this process, so no thread is borrowed, and the answers are the kernel's own.
Prints JSON: the answers to the first right guess and to the requests after it, the error, and
whether the slot is back where it was.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
from typing import cast

from mtetool import procfs, uapi
from mtetool.attach.session import Session
from mtetool.backends.kvm import memslots
from mtetool.errors import BusyError
from mtetool.procfs import Mapping
from mtetool.vmm.scratch import ScratchVm, scratch_vm

MIB = 1 << 20
# Main memory first, as in QEMU.
SLOTS = ((0x4000_0000, 64 * MIB), (0, 8 * MIB), (16 * MIB, 2 * MIB), (32 * MIB, MIB))


class Own:
    """This process as a session on its own VM, whose other memslots vanish."""

    pid = os.getpid()

    def __init__(self, vm: ScratchVm) -> None:
        self.vm = vm
        self.answers: list[int] = []
        self.goes = True

    def mappings(self) -> list[Mapping]:
        """See `Session.mappings`."""
        return procfs.mappings(self.pid)

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        """See `Session.ioctl`."""
        slot, _, _, size, address = uapi.KVM_MEMORY_REGION_STRUCT.unpack(argument)
        is_right = slot == 0 and (size, address) == (SLOTS[0][1], place(self.vm))
        if is_right and self.goes:
            # They were in the way until now: the kernel said so.
            self.answers.append(self.vm._ioctl(request, argument))
            self.goes = False
            for number in range(1, len(SLOTS)):
                assert self.vm.set_memslot(number, 0, 0, 0) == 0
        answer = self.vm._ioctl(request, argument)
        if self.answers and len(self.answers) < 3:
            self.answers.append(answer)
        return answer


def place(vm: ScratchVm) -> int:
    """Return where slot 0 is in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(vm._memory[0]))


def main() -> None:
    """Probe, and print the results."""
    with scratch_vm() as vm:
        assert vm.enable(uapi.KVM_CAP_ARM_MTE) == 0
        kept = []
        for number, (ipa, size) in enumerate(SLOTS):
            assert vm.set_memslot(number, ipa, size, 0) == 0
            # A page between them, so each is a mapping of its own.
            kept.append(mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS))
        own = Own(vm)
        message = ""
        try:
            memslots.places_of(cast(Session, own), 0, None)
        except BusyError as error:
            message = error.message
        # The slot's own place is taken again, from its first to its last page, and no other is.
        untaggable = memslots._untaggable(own.mappings())
        assert untaggable is not None
        page = mmap.PAGESIZE
        first, last = SLOTS[0][0], SLOTS[0][0] + SLOTS[0][1] - page
        taken = [vm.offer_memory(9, at, page, untaggable) for at in (first, last, 0, last + page)]
        in_the_way, free = -errno.EEXIST, -errno.EINVAL
        at_home = taken == [in_the_way, in_the_way, free, free]
    print(json.dumps({"answers": own.answers, "message": message, "at_home": at_home}))


if __name__ == "__main__":
    main()
