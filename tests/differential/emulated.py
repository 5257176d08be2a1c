"""The emulated side."""

from __future__ import annotations

import errno
import zlib
from typing import Literal

from mtetool.emulator import (
    AddressSpace,
    CopyRequest,
    EmulatedKvm,
    EmulatedVm,
    Host,
    MemoryFile,
)
from tests.differential.sides import (
    ARENA,
    ARENA_PAGES,
    HUGE_ARENA,
    HUGE_PAGES,
    Kind,
    Protection,
    Trace,
    pattern,
)


class EmulatedSide:
    """A process on an emulated kernel; a `Side`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.page_size_bytes = host.page_size_bytes
        self.hugepage_bytes = host.hugepage_bytes
        self.memory = AddressSpace(host)
        self._kvm = EmulatedKvm(self.memory)
        self.vms: dict[int, EmulatedVm] = {}
        self._files: dict[int, MemoryFile] = {}
        self.reset()

    def reset(self) -> int:
        """Close everything and reserve the arenas, as a new process would have them."""
        self.vms.clear()
        self._files.clear()
        self.memory.unmap(0, 1 << self.host.va_bits)
        self.memory.map(ARENA, ARENA_PAGES * self.page_size_bytes, "none")
        if self.hugepage_bytes:
            self.memory.unmap(HUGE_ARENA, HUGE_PAGES * self.hugepage_bytes)
        return 0

    def create_vm(self, vm: int, kind: int) -> int:
        """See `Side.create_vm`."""
        made = self._kvm.create_vm(kind)
        if isinstance(made, int):
            return made
        self.vms[vm] = made
        return 0

    def close_vm(self, vm: int) -> int:
        """See `Side.close_vm`."""
        return 0 if self.vms.pop(vm, None) else -errno.EBADF

    def check_extension(self, vm: int, capability: int) -> int:
        """See `Side.check_extension`."""
        return self.vms[vm].check_extension(capability) if vm in self.vms else -errno.EBADF

    def enable_cap(self, vm: int, capability: int, flags: int, argument: int) -> int:
        """See `Side.enable_cap`."""
        if vm not in self.vms:
            return -errno.EBADF
        return self.vms[vm].enable_cap(capability, flags, argument)

    def create_guest_memfd(self, vm: int, file: int, size_bytes: int) -> int:
        """See `Side.create_guest_memfd`."""
        return self.vms[vm].create_guest_memfd(size_bytes) if vm in self.vms else -errno.EBADF

    def set_guest_memfd_slot(
        self, vm: int, slot: int, ipa: int, size_bytes: int, address: int, file: int
    ) -> int:
        """See `Side.set_guest_memfd_slot`."""
        if vm not in self.vms:
            return -errno.EBADF
        return self.vms[vm].set_guest_memfd_slot(slot, ipa, size_bytes, address)

    def create_vcpu(self, vm: int, number: int) -> int:
        """See `Side.create_vcpu`."""
        return self.vms[vm].create_vcpu(number) if vm in self.vms else -errno.EBADF

    def init_vcpu(self, vm: int, number: int, target: int, features: int) -> int:
        """See `Side.init_vcpu`."""
        if vm not in self.vms:
            return -errno.EBADF
        return self.vms[vm].init_vcpu(number, target, features)

    def set_memslot(
        self, vm: int, slot: int, flags: int, ipa: int, size_bytes: int, address: int
    ) -> int:
        """See `Side.set_memslot`."""
        if vm not in self.vms:
            return -errno.EBADF
        return self.vms[vm].set_memslot(slot, flags, ipa, size_bytes, address)

    def copy_tags(
        self, vm: int, ipa: int, length: int, address: int, flags: int, reserved: list[int]
    ) -> int:
        """See `Side.copy_tags`."""
        if vm not in self.vms:
            return -errno.EBADF
        request = CopyRequest(ipa, length, address, flags, (reserved[0], reserved[1]))
        return self.vms[vm].copy_tags(request)

    def copy_tags_at(self, vm: int, address: int) -> int:
        """See `Side.copy_tags_at`."""
        return -errno.EFAULT if vm in self.vms else -errno.EBADF

    def copy_tags_in_child(self, vm: int, ipa: int, length: int, address: int, flags: int) -> int:
        """See `Side.copy_tags_in_child`."""
        if vm not in self.vms:
            return -errno.EBADF
        return self.vms[vm].copy_tags(CopyRequest(ipa, length, address, flags), foreign=True)

    def create_file(self, file: int, kind: Literal["memory", "disk"], size_bytes: int) -> int:
        """See `Side.create_file`."""
        allowed = kind == "memory"
        self._files[file] = MemoryFile(size_bytes, self.page_size_bytes, allowed)
        return 0

    def truncate(self, file: int, size_bytes: int) -> int:
        """See `Side.truncate`."""
        if file not in self._files:
            return -errno.EBADF
        return self.memory.truncate(self._files[file], size_bytes)

    def punch(self, file: int, offset: int, size_bytes: int) -> int:
        """See `Side.punch`."""
        if file not in self._files:
            return -errno.EBADF
        self._files[file].punch(offset, size_bytes)
        return 0

    def map(
        self, address: int, size_bytes: int, kind: Kind, protection: Protection, file: int, at: int
    ) -> int:
        """See `Side.map`."""
        if kind in ("private", "shared"):
            return self.memory.map(address, size_bytes, protection, shared=kind == "shared")
        if kind == "huge":
            return self.memory.map(address, size_bytes, protection, huge=True)
        if file not in self._files:
            return -errno.EBADF
        shared = kind in ("file", "disk")
        behind = self._files[file]
        return self.memory.map(
            address, size_bytes, protection, file=behind, offset=at, shared=shared
        )

    def unmap(self, address: int, size_bytes: int) -> int:
        """See `Side.unmap`."""
        return self.memory.unmap(address, size_bytes)

    def protect(self, address: int, size_bytes: int, protection: Protection) -> int:
        """See `Side.protect`."""
        return self.memory.protect(address, size_bytes, protection)

    def discard(self, address: int, size_bytes: int) -> int:
        """See `Side.discard`."""
        return self.memory.discard(address, size_bytes)

    def page_out(self, address: int, size_bytes: int) -> int:
        """See `Side.page_out`."""
        return self.memory.page_out(address, size_bytes)

    def trace_tags(self, request: Trace, address: int, buffer: int, n_tags: int) -> int:
        """See `Side.trace_tags`."""
        if not self.memory.peek_tags(address, 1):
            return -errno.EIO
        if request == "peek":
            done = self.memory.store(buffer, self.memory.peek_tags(address, n_tags))
        else:
            done = self.memory.poke_tags(address, self.memory.load(buffer, n_tags))
        return done or -errno.EFAULT

    def fill(self, address: int, size_bytes: int, seed: int) -> int:
        """See `Side.fill`."""
        return self.memory.write(address, pattern(size_bytes, seed))

    def peek(self, address: int, size_bytes: int) -> int:
        """See `Side.peek`."""
        data = self.memory.load(address, size_bytes)
        return zlib.crc32(data) if len(data) == size_bytes else -errno.EFAULT

    def contents(self, address: int, size_bytes: int) -> bytes:
        """See `Side.contents`."""
        return self.memory.load(address, size_bytes)
