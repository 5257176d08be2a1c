#!/usr/bin/env python3
"""Try code that copies tags against an emulated kernel: no arm64 host, no root.

`copy_all` is what a VMM might do to save a guest. Here the guest's memory has a hole.
"""

import errno

from mtetool import uapi
from mtetool.emulator import AddressSpace, CopyRequest, EmulatedKvm, EmulatedVm, Host

PAGE = 4096
RAM, HOLE = 0x4000_0000, 3 * PAGE
MEMORY, BUFFER = 0x10_0000_0000, 0x20_0000_0000


def copy_all(vm: EmulatedVm, ipa: int, length: int, buffer: int) -> list[tuple[int, int]]:
    """Copy tags out of a guest; return the ranges (address, bytes) that it does not have."""
    missing, done = [], 0
    while done < length:
        request = CopyRequest(
            ipa + done, length - done, buffer + done // 16, uapi.KVM_ARM_TAGS_FROM_GUEST
        )
        answer = vm.copy_tags(request)
        if answer == -errno.EFAULT:
            missing.append((ipa + done, PAGE))
            answer = PAGE
        elif answer < 0:
            raise OSError(-answer, errno.errorcode[-answer])
        done += answer
    return missing


def main() -> None:
    """Write and read tags of a VM of eight pages that lacks the fourth."""
    memory = AddressSpace(Host(page_size_bytes=PAGE))
    vm = EmulatedKvm(memory).create_vm()
    assert isinstance(vm, EmulatedVm)
    assert vm.enable_cap(uapi.KVM_CAP_ARM_MTE) == 0
    memory.map(MEMORY, 8 * PAGE, "rw")
    memory.map(BUFFER, PAGE, "rw")
    assert vm.set_memslot(0, 0, RAM, HOLE, MEMORY) == 0
    assert vm.set_memslot(1, 0, RAM + HOLE + PAGE, 4 * PAGE, MEMORY + HOLE + PAGE) == 0

    memory.write(BUFFER, bytes(range(256)))
    request = CopyRequest(RAM, PAGE, BUFFER, uapi.KVM_ARM_TAGS_TO_GUEST)
    print(f"one page of tags to the guest: {vm.copy_tags(request)}")
    for ipa, size in copy_all(vm, RAM, 8 * PAGE, BUFFER):
        print(f"no memory at {ipa:#x}:{size:#x}")
    print(f"the first tags: {memory.load(BUFFER, 20).hex(' ')}")


if __name__ == "__main__":
    main()
