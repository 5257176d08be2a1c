"""The kernel's numbers and structs that mtetool uses, each with its origin.

This module does no input or output. Layouts are those of the 64-bit little-endian arm64 ABI.
"""

from __future__ import annotations

import struct

# --- memory tags: Documentation/arch/arm64/memory-tagging-extension.rst -------------------
GRANULE_BYTES = 16
TAG_MAX = 15

# --- arm64: arch/arm64/Kconfig, ARM64_*_PAGES -----------------------------------------------
PAGE_SIZES = (4 << 10, 16 << 10, 64 << 10)
"""The page sizes that kernels are built with, in bytes."""

# --- ioctl numbers: include/uapi/asm-generic/ioctl.h --------------------------------------
_IOC_NONE, _IOC_WRITE, _IOC_READ = 0, 1, 2


def ioc(direction: int, kind: int, number: int, size: int) -> int:
    """Return an ioctl number: direction in 31:30, size in 29:16, type in 15:8, number in 7:0."""
    return direction << 30 | size << 16 | kind << 8 | number


# --- KVM: include/uapi/linux/kvm.h --------------------------------------------------------
KVMIO = 0xAE
KVM_API_VERSION = 12
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_ARM_EL1_32BIT = 93
KVM_CAP_ARM_MTE = 205
# The answer is the largest guest address size in bits, which goes into the low byte of
# KVM_CREATE_VM's argument (Documentation/virt/kvm/api.rst, 4.2).
KVM_CAP_ARM_VM_IPA_SIZE = 165

KVM_GET_API_VERSION = ioc(_IOC_NONE, KVMIO, 0x00, 0)
KVM_CREATE_VM = ioc(_IOC_NONE, KVMIO, 0x01, 0)
KVM_CHECK_EXTENSION = ioc(_IOC_NONE, KVMIO, 0x03, 0)
KVM_CREATE_VCPU = ioc(_IOC_NONE, KVMIO, 0x41, 0)
KVM_RUN = ioc(_IOC_NONE, KVMIO, 0x80, 0)

KVM_MEMORY_REGION_STRUCT = struct.Struct("<IIQQQ")
"""struct kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size,
userspace_addr; 32 bytes."""
KVM_SET_USER_MEMORY_REGION = ioc(_IOC_WRITE, KVMIO, 0x46, KVM_MEMORY_REGION_STRUCT.size)
KVM_MEM_LOG_DIRTY_PAGES = 1 << 0
KVM_MEM_READONLY = 1 << 1
KVM_MEM_GUEST_MEMFD = 1 << 2

KVM_MEMORY_REGION2_STRUCT = struct.Struct("<IIQQQQI116x")
"""struct kvm_userspace_memory_region2: the fields of the first, guest_memfd_offset, guest_memfd,
padding; 160 bytes."""
KVM_SET_USER_MEMORY_REGION2 = ioc(_IOC_WRITE, KVMIO, 0x49, KVM_MEMORY_REGION2_STRUCT.size)
KVM_CREATE_GUEST_MEMFD_STRUCT = struct.Struct("<QQ48x")
"""struct kvm_create_guest_memfd: size, flags, padding; 64 bytes."""
KVM_CREATE_GUEST_MEMFD = ioc(
    _IOC_READ | _IOC_WRITE, KVMIO, 0xD4, KVM_CREATE_GUEST_MEMFD_STRUCT.size
)
GUEST_MEMFD_FLAG_MMAP = 1 << 0

KVM_ENABLE_CAP_STRUCT = struct.Struct("<II4Q64x")
"""struct kvm_enable_cap: cap, flags, args[4], padding; 104 bytes."""
# The header defines it as _IOW of the struct: 0x4068aea3.
KVM_ENABLE_CAP = ioc(_IOC_WRITE, KVMIO, 0xA3, KVM_ENABLE_CAP_STRUCT.size)

# The largest memslot, include/linux/kvm_host.h: KVM_MEM_MAX_NR_PAGES.
MEMSLOT_PAGES_MAX = (1 << 31) - 1
# arch/arm64/include/asm/kvm_host.h: KVM_USER_MEM_SLOTS; ids are below it.
MEMSLOTS_MAX = (1 << 15) - 1

# --- KVM on arm64: arch/arm64/include/uapi/asm/kvm.h --------------------------------------
KVM_ARM_COPY_MTE_TAGS_STRUCT = struct.Struct("<QQQQ2Q")
"""struct kvm_arm_copy_mte_tags: guest_ipa, length, addr, flags, reserved[2]; 48 bytes."""
KVM_ARM_MTE_COPY_TAGS = ioc(_IOC_READ, KVMIO, 0xB4, KVM_ARM_COPY_MTE_TAGS_STRUCT.size)
KVM_ARM_TAGS_TO_GUEST = 0
KVM_ARM_TAGS_FROM_GUEST = 1

KVM_ONE_REG_STRUCT = struct.Struct("<QQ")
"""struct kvm_one_reg: id, addr; 16 bytes."""
KVM_GET_ONE_REG = ioc(_IOC_WRITE, KVMIO, 0xAB, KVM_ONE_REG_STRUCT.size)
KVM_REG_ARM64_U64 = 0x6030_0000_0000_0000
# KVM_REG_ARM_CORE; the number is the offset in struct kvm_regs, in words of 32 bits.
KVM_REG_ARM_PSTATE = KVM_REG_ARM64_U64 | 0x0010 << 16 | 264 // 4


def arm64_sys_reg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """Return KVM's id of a system register (ARM64_SYS_REG)."""
    return KVM_REG_ARM64_U64 | 0x0013 << 16 | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


KVM_VCPU_INIT_STRUCT = struct.Struct("<I7I")
"""struct kvm_vcpu_init: target, features; 32 bytes."""
KVM_ARM_VCPU_INIT = ioc(_IOC_WRITE, KVMIO, 0xAE, KVM_VCPU_INIT_STRUCT.size)
KVM_ARM_TARGET_GENERIC_V8 = 5
KVM_ARM_VCPU_POWER_OFF = 1 << 0
KVM_ARM_VCPU_EL1_32BIT = 1 << 1
KVM_ARM_VCPU_PSCI_0_2 = 1 << 2
KVM_ARM_VCPU_HAS_EL2 = 1 << 7

# Since 6.4 (commit 2def950c63e3) the kernel refuses longer copies; before, it truncated the
# return value to an int.
COPY_LENGTH_MAX = (1 << 31) - 1


def is_copy_range(ipa: int, length_bytes: int, page_size_bytes: int) -> bool:
    """Return whether KVM_ARM_MTE_COPY_TAGS accepts a range: whole pages, and not too many.

    Otherwise the kernel answers EINVAL (arch/arm64/kvm/guest.c, kvm_vm_ioctl_mte_copy_tags).
    """
    aligned = ipa % page_size_bytes == 0 and length_bytes % page_size_bytes == 0
    return aligned and length_bytes <= COPY_LENGTH_MAX


def enable_cap(cap: int) -> bytes:
    """The argument of KVM_ENABLE_CAP for a capability without arguments."""
    return KVM_ENABLE_CAP_STRUCT.pack(cap, 0, 0, 0, 0, 0)


def copy_mte_tags(guest_ipa: int, length: int, addr: int, flags: int, reserved: int = 0) -> bytes:
    """The argument of KVM_ARM_MTE_COPY_TAGS; `length` in bytes of guest memory.

    `reserved` fills the words that the kernel requires to be 0.
    """
    fields = (guest_ipa, length, addr, flags, reserved, reserved)
    return KVM_ARM_COPY_MTE_TAGS_STRUCT.pack(*fields)


def vcpu_init(target: int, features: int) -> bytes:
    """The argument of KVM_ARM_VCPU_INIT; `features` is the first of seven words."""
    return KVM_VCPU_INIT_STRUCT.pack(target, features, 0, 0, 0, 0, 0, 0)


def memory_region(slot: int, flags: int, guest_ipa: int, size: int, addr: int) -> bytes:
    """The argument of KVM_SET_USER_MEMORY_REGION; `size` in bytes."""
    return KVM_MEMORY_REGION_STRUCT.pack(slot, flags, guest_ipa, size, addr)
