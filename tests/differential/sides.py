"""One way to call a kernel, real or emulated: the same calls give the same answers.

A `Side` is one process with VMs and memory of its own. The caller chooses its addresses, inside
`ARENA` (and `HUGE_ARENA` for huge pages), so both sides have everything at the same place.
Answers are 0 or more, or -errno; the caller names VMs, vCPUs and files by numbers, never by file
descriptors.
"""

from __future__ import annotations

from typing import Literal, Protocol

Kind = Literal["private", "shared", "file", "file-private", "disk", "disk-private", "huge"]
"""Memory to map: anonymous private or shared, a memfd shared or private, a file on a disk
shared or private, huge pages (anonymous, private)."""
Protection = Literal["none", "r", "rw", "rw-mte"]
Trace = Literal["peek", "poke"]

ARENA = 0x10_0000_0000
ARENA_PAGES = 256
HUGE_ARENA = 0x20_0000_0000
HUGE_PAGES = 4


class Side(Protocol):
    """A kernel that can be called, and the resources of a process on it."""

    page_size_bytes: int
    hugepage_bytes: int
    """The size of the huge pages of "huge" memory; 0 if there are none."""

    # --- KVM --------------------------------------------------------------------------

    def create_vm(self, vm: int, kind: int) -> int:
        """KVM_CREATE_VM of a type; returns 0, and the VM then has the number `vm`."""
        ...

    def close_vm(self, vm: int) -> int:
        """Close the VM and its vCPUs."""
        ...

    def check_extension(self, vm: int, capability: int) -> int:
        """KVM_CHECK_EXTENSION on a VM."""
        ...

    def enable_cap(self, vm: int, capability: int, flags: int, argument: int) -> int:
        """KVM_ENABLE_CAP on a VM, with the first of its arguments."""
        ...

    def create_guest_memfd(self, vm: int, file: int, size_bytes: int) -> int:
        """KVM_CREATE_GUEST_MEMFD of mappable memory; returns 0, and its number is `file`."""
        ...

    def set_guest_memfd_slot(
        self, vm: int, slot: int, ipa: int, size_bytes: int, address: int, file: int
    ) -> int:
        """KVM_SET_USER_MEMORY_REGION2 of a slot backed by that guest_memfd."""
        ...

    def create_vcpu(self, vm: int, number: int) -> int:
        """KVM_CREATE_VCPU; returns 0 for a file descriptor."""
        ...

    def init_vcpu(self, vm: int, number: int, target: int, features: int) -> int:
        """KVM_ARM_VCPU_INIT; EBADF for a vCPU that was never created."""
        ...

    def set_memslot(
        self, vm: int, slot: int, flags: int, ipa: int, size_bytes: int, address: int
    ) -> int:
        """KVM_SET_USER_MEMORY_REGION."""
        ...

    def copy_tags(
        self, vm: int, ipa: int, length: int, address: int, flags: int, reserved: list[int]
    ) -> int:
        """KVM_ARM_MTE_COPY_TAGS with every field of its struct."""
        ...

    def copy_tags_at(self, vm: int, address: int) -> int:
        """KVM_ARM_MTE_COPY_TAGS of a struct at an address that cannot be read."""
        ...

    def copy_tags_in_child(self, vm: int, ipa: int, length: int, address: int, flags: int) -> int:
        """KVM_ARM_MTE_COPY_TAGS by a child that has inherited the VM."""
        ...

    # --- memory -----------------------------------------------------------------------

    def create_file(self, file: int, kind: Literal["memory", "disk"], size_bytes: int) -> int:
        """Create a file of zeros (memfd_create, or open on a disk), named by a number."""
        ...

    def truncate(self, file: int, size_bytes: int) -> int:
        """ftruncate."""
        ...

    def punch(self, file: int, offset: int, size_bytes: int) -> int:
        """fallocate with FALLOC_FL_PUNCH_HOLE."""
        ...

    def map(
        self, address: int, size_bytes: int, kind: Kind, protection: Protection, file: int, at: int
    ) -> int:
        """mmap with MAP_FIXED; `file` and the offset `at` are for the kinds of files."""
        ...

    def unmap(self, address: int, size_bytes: int) -> int:
        """munmap."""
        ...

    def protect(self, address: int, size_bytes: int, protection: Protection) -> int:
        """mprotect."""
        ...

    def discard(self, address: int, size_bytes: int) -> int:
        """madvise with MADV_DONTNEED."""
        ...

    def page_out(self, address: int, size_bytes: int) -> int:
        """Page private memory out to swap; return how many of its pages are there then."""
        ...

    def trace_tags(self, request: Trace, address: int, buffer: int, n_tags: int) -> int:
        """PTRACE_PEEKMTETAGS or PTRACE_POKEMTETAGS on a child of this process.

        The child has the same mappings; the buffer is this process's. Returns how many tags were
        copied.
        """
        ...

    def fill(self, address: int, size_bytes: int, seed: int) -> int:
        """Write `pattern(size_bytes, seed)` there; return the bytes written, or -EFAULT."""
        ...

    def peek(self, address: int, size_bytes: int) -> int:
        """Return the CRC-32 of the memory, or -EFAULT if not all of it can be read."""
        ...

    def contents(self, address: int, size_bytes: int) -> bytes:
        """Return the memory's bytes, up to the first page that cannot be read."""
        ...


def pattern(size_bytes: int, seed: int) -> bytes:
    """Return bytes, given by the seed, that differ from their neighbours; some have high bits.

    Seed 0 gives one constant byte, which a copy out of a guest never writes.
    """
    if not seed:
        return b"\xee" * size_bytes
    period = bytes((index * index * 7 + index * seed + seed * 31) & 0xFF for index in range(251))
    return (period * (size_bytes // 251 + 1))[:size_bytes]
