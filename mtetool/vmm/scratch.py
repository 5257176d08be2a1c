"""Scratch VMs of our own: with memory, without a program, gone when they are closed.

The process that made the VM makes all calls itself, so no thread is borrowed. Answers are those of
the kernel: 0 or more, or -errno.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mtetool import uapi
from mtetool.closing import Closing

if TYPE_CHECKING:
    from mtetool.tags import Tags


class Kvm(Closing):
    """/dev/kvm, open; a context manager. Raises OSError if it cannot be opened."""

    def __init__(self, path: Path = Path("/dev/kvm")) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def create_vm(self) -> ScratchVm:
        """Make a VM. Raises OSError if KVM's API is not the known one, or no VM can be made."""
        version = fcntl.ioctl(self._fd, uapi.KVM_GET_API_VERSION)
        if version != uapi.KVM_API_VERSION:
            raise OSError(errno.EPROTO, f"KVM's API has version {version}")
        bits = fcntl.ioctl(self._fd, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_ARM_VM_IPA_SIZE)
        # Type 0 asks for 40 address bits, which small hosts do not have.
        return ScratchVm(fcntl.ioctl(self._fd, uapi.KVM_CREATE_VM, bits if 0 < bits < 40 else 0))

    def close(self) -> None:
        """Close it. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class ScratchVm(Closing):
    """One VM, by the file descriptor that KVM_CREATE_VM returned; a context manager.

    Its memory is private and anonymous: other memory cannot carry tags before Linux 6.2.
    """

    page_size_bytes = mmap.PAGESIZE

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._vcpus: list[int] = []
        self._memory: dict[int, mmap.mmap] = {}

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM: 0 if it is not offered."""
        return self._ioctl(uapi.KVM_CHECK_EXTENSION, capability)

    def enable(self, capability: int) -> int:
        """KVM_ENABLE_CAP on the VM."""
        return self._ioctl(uapi.KVM_ENABLE_CAP, uapi.enable_cap(capability))

    def set_memslot(self, slot: int, ipa: int, size_bytes: int, flags: int) -> int:
        """KVM_SET_USER_MEMORY_REGION: new memory, or other flags for an existing slot.

        Raises OSError (ENOMEM) if this process cannot have the memory.
        """
        if slot not in self._memory:
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._memory[slot] = mmap.mmap(-1, size_bytes, flags=private)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory[slot]))
        region = uapi.memory_region(slot, flags, ipa, size_bytes, address)
        return self._ioctl(uapi.KVM_SET_USER_MEMORY_REGION, region)

    def offer_memory(self, slot: int, ipa: int, size_bytes: int, address: int) -> int:
        """KVM_SET_USER_MEMORY_REGION, read-only, for memory that the VM should refuse."""
        region = uapi.memory_region(slot, uapi.KVM_MEM_READONLY, ipa, size_bytes, address)
        return self._ioctl(uapi.KVM_SET_USER_MEMORY_REGION, region)

    def create_vcpu(self) -> int:
        """KVM_CREATE_VCPU; the vCPU is never run."""
        result = self._ioctl(uapi.KVM_CREATE_VCPU, len(self._vcpus))
        if result < 0:
            return result
        self._vcpus.append(result)
        return 0

    def copy_tags(
        self, ipa: int, length_bytes: int, tags: Tags, flags: int, reserved: int = 0
    ) -> int:
        """KVM_ARM_MTE_COPY_TAGS between the VM and `tags`; the bytes of guest memory copied.

        `tags` must have room for all that the kernel may copy: this is not checked here.
        """
        address = tags.ctypes.data
        request = uapi.copy_mte_tags(ipa, length_bytes, address, flags, reserved)
        return self._ioctl(uapi.KVM_ARM_MTE_COPY_TAGS, request)

    def close(self) -> None:
        """End the VM, and free its memory. Idempotent."""
        vcpus, self._vcpus = self._vcpus, []
        fd, self._fd = self._fd, -1
        # The VM lives as long as one of its vCPUs is open.
        for descriptor in (*vcpus, fd):
            if descriptor >= 0:
                os.close(descriptor)
        while self._memory:
            self._memory.popitem()[1].close()

    def _ioctl(self, request: int, argument: int | bytes) -> int:
        # With a mutable buffer, Python returns the result instead of the buffer.
        passed = bytearray(argument) if isinstance(argument, bytes) else argument
        try:
            return fcntl.ioctl(self._fd, request, passed)
        except OSError as error:
            return -(error.errno or errno.EIO)


def scratch_vm() -> ScratchVm:
    """Make a VM with this host's KVM. Raises OSError."""
    with Kvm() as kvm:
        return kvm.create_vm()
