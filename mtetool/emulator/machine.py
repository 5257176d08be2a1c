"""Emulated VMs: KVM's answers to the process that makes them.

Every method is one ioctl. It returns 0 or more, or -errno; it raises nothing.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from dataclasses import dataclass, field, replace

from mtetool import uapi
from mtetool.emulator.behaviours import Behaviour, Host
from mtetool.emulator.ioctl import CopyRequest, copy_page, copy_tags
from mtetool.emulator.memory import AddressSpace

# arch/arm64/kvm/mmu.c, kvm_init_stage2_mmu: the type's low byte is the size of guest addresses.
_IPA_BITS_MASK = 0xFF
_IPA_BITS_MIN = 32
_IPA_BITS_DEFAULT = 40
_U64 = 1 << 64
# The vCPU features known here; others of real hosts (PMU, SVE, …) have nothing to do with tags.
_FEATURES = uapi.KVM_ARM_VCPU_EL1_32BIT | uapi.KVM_ARM_VCPU_PSCI_0_2


@dataclass(frozen=True, slots=True)
class Slot:
    """A memslot, in bytes; `address` is the process's own.

    `guest_memfd`: its memory is not the process's.
    """

    id: int
    flags: int
    ipa: int
    size_bytes: int
    address: int
    guest_memfd: bool = False

    @property
    def end(self) -> int:
        """The first guest address after the slot."""
        return self.ipa + self.size_bytes


class EmulatedKvm:
    """/dev/kvm of an emulated host, as one process sees it."""

    def __init__(self, memory: AddressSpace) -> None:
        self.memory = memory

    def create_vm(self, kind: int = 0) -> EmulatedVm | int:
        """KVM_CREATE_VM; -EINVAL for a type that this host does not have."""
        bits = kind & _IPA_BITS_MASK or _IPA_BITS_DEFAULT
        if kind & ~_IPA_BITS_MASK or not _IPA_BITS_MIN <= bits <= self.memory.host.ipa_bits:
            return -errno.EINVAL
        return EmulatedVm(self.memory, bits)


@dataclass
class EmulatedVm:
    """One VM; its memory is that of the process that made it."""

    memory: AddressSpace
    ipa_bits: int
    mte: bool = False
    _slots: dict[int, Slot] = field(default_factory=dict)
    _vcpus: dict[int, int | None] = field(default_factory=dict)
    _features: int | None = None

    @property
    def host(self) -> Host:
        """The host that it runs on."""
        return self.memory.host

    @property
    def memslots(self) -> list[Slot]:
        """Its memslots, in order of guest address."""
        return sorted(self._slots.values(), key=lambda slot: slot.ipa)

    @property
    def dirty_logging(self) -> bool:
        """Whether any memslot logs dirty pages."""
        return any(slot.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES for slot in self._slots.values())

    def check_extension(self, capability: int) -> int:
        """KVM_CHECK_EXTENSION on the VM, for the capabilities that are emulated."""
        answers = {
            uapi.KVM_CAP_ARM_MTE: 1,
            uapi.KVM_CAP_ARM_VM_IPA_SIZE: self.host.ipa_bits,
            uapi.KVM_CAP_MAX_VCPUS: self.host.max_vcpus,
            uapi.KVM_CAP_ARM_EL1_32BIT: int(self.host.aarch32),
        }
        return answers.get(capability, 0)

    def enable_cap(self, capability: int, flags: int = 0, argument: int = 0) -> int:
        """KVM_ENABLE_CAP of KVM_CAP_ARM_MTE, the only one emulated; others are unknown."""
        if flags or capability != uapi.KVM_CAP_ARM_MTE or self._vcpus:
            return -errno.EINVAL
        if any(slot.guest_memfd for slot in self._slots.values()):
            return -errno.EINVAL
        self.mte = True
        return 0

    def create_vcpu(self, number: int) -> int:
        """KVM_CREATE_VCPU."""
        if number >= self.host.max_vcpus:
            return -errno.EINVAL
        if number in self._vcpus:
            return -errno.EEXIST
        self._vcpus[number] = None
        return 0

    def init_vcpu(self, number: int, target: int, features: int) -> int:
        """KVM_ARM_VCPU_INIT with the first word of features."""
        if number not in self._vcpus:
            return -errno.EBADF
        features &= ~uapi.KVM_ARM_VCPU_POWER_OFF
        if target != uapi.KVM_ARM_TARGET_GENERIC_V8:
            return -errno.EINVAL
        if features & ~self._known_features():
            return -errno.ENOENT
        if features & ~_FEATURES:
            return -errno.EINVAL
        if features & uapi.KVM_ARM_VCPU_EL1_32BIT and (self.mte or not self.host.aarch32):
            return -errno.EINVAL
        # All vCPUs of a VM have the features of the first, and keep them.
        if self._features not in (None, features):
            return -errno.EINVAL
        self._features = self._vcpus[number] = features
        return 0

    def _known_features(self) -> int:
        nested = self.host.has(Behaviour.VCPU_EL2_FEATURES)
        return _FEATURES | (uapi.KVM_ARM_VCPU_HAS_EL2 if nested else 0)

    # --- memslots: virt/kvm/kvm_main.c, kvm_set_memory_region -----------------------------

    def set_memslot(self, slot: int, flags: int, ipa: int, size_bytes: int, address: int) -> int:
        """KVM_SET_USER_MEMORY_REGION; a size of 0 removes the slot."""
        new = Slot(slot, flags, ipa, size_bytes, address)
        error = self._check_region(new)
        if error:
            return error
        old = self._slots.get(slot)
        if not size_bytes:
            return 0 if self._slots.pop(slot, None) else -errno.EINVAL
        if old is not None:
            if not _may_become(old, new):
                return -errno.EINVAL
            if old == new:
                return 0
        moved = old is None or old.ipa != ipa
        if moved and self._overlaps(new):
            return -errno.EEXIST
        error = self._prepare(new)
        if not error:
            self._slots[slot] = new
        return error

    def create_guest_memfd(self, size_bytes: int) -> int:
        """KVM_CREATE_GUEST_MEMFD; the memory itself is never used."""
        if not self.host.has(Behaviour.GUEST_MEMFD):
            return -errno.EINVAL
        return 0 if size_bytes > 0 and not size_bytes % self.host.page_size_bytes else -errno.EINVAL

    def set_guest_memfd_slot(self, slot: int, ipa: int, size_bytes: int, address: int) -> int:
        """KVM_SET_USER_MEMORY_REGION2 of a new slot with a guest_memfd behind it."""
        if slot in self._slots or self.mte:
            return -errno.EINVAL
        error = self.set_memslot(slot, 0, ipa, size_bytes, address)
        if not error:
            self._slots[slot] = replace(self._slots[slot], guest_memfd=True)
        return error

    def _check_region(self, new: Slot) -> int:
        page = self.host.page_size_bytes
        if new.flags & ~(uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY):
            return -errno.EINVAL
        if new.size_bytes % page or new.ipa % page or new.address % page:
            return -errno.EINVAL
        # There is one address space; the bits above the lowest 16 would be the number of another.
        if new.id >= uapi.MEMSLOTS_MAX:
            return -errno.EINVAL
        if new.address + new.size_bytes > 1 << self.host.va_bits or new.end >= _U64:
            return -errno.EINVAL
        if new.size_bytes // page > uapi.MEMSLOT_PAGES_MAX:
            return -errno.EINVAL
        return 0

    def _overlaps(self, new: Slot) -> bool:
        return any(
            slot.id != new.id and slot.ipa < new.end and new.ipa < slot.end
            for slot in self._slots.values()
        )

    def _prepare(self, new: Slot) -> int:
        """kvm_arch_prepare_memory_region (arch/arm64/kvm/mmu.c)."""
        if new.end > 1 << self.ipa_bits:
            return -errno.EFAULT
        behind = self.memory.crossing(new.address, new.size_bytes)
        if self.mte and not all(mapping.tags_allowed for mapping in behind):
            return -errno.EINVAL
        return 0

    # --- tags -----------------------------------------------------------------------------

    def copy_tags(self, request: CopyRequest, *, foreign: bool = False) -> int:
        """KVM_ARM_MTE_COPY_TAGS; `foreign`: by a process that did not make the VM."""
        if foreign:
            return -errno.EIO
        return copy_tags(request, self, mte=self.mte, page_size_bytes=self.host.page_size_bytes)

    def begin(self, request: CopyRequest) -> int:
        """See `TagMemory.begin`: nothing is written while dirty pages are logged."""
        return -errno.EBUSY if request.to_guest and self.dirty_logging else 0

    def copy_some(self, request: CopyRequest, done: int) -> int:
        """See `TagMemory.copy_some`: one page."""
        page_bytes = self.host.page_size_bytes
        buffer = request.addr + done // page_bytes * self.host.page_granules
        at = self._host_address(request.guest_ipa + done, write=request.to_guest)
        if at is None or not copy_page(self.memory, at, buffer, to_guest=request.to_guest):
            return 0
        return page_bytes

    def _host_address(self, ipa: int, *, write: bool) -> int | None:
        """Where the process has a guest's page; None if it has none, or may not write to it."""
        slots = self.memslots
        index = bisect_right(slots, ipa, key=lambda slot: slot.ipa) - 1
        if index < 0 or slots[index].end <= ipa:
            return None
        slot = slots[index]
        if write and slot.flags & uapi.KVM_MEM_READONLY:
            return None
        return slot.address + ipa - slot.ipa


def _may_become(old: Slot, new: Slot) -> bool:
    """Whether a slot can change like this: its place and dirty logging, and nothing else."""
    only = replace(new, ipa=old.ipa, flags=new.flags & ~uapi.KVM_MEM_LOG_DIRTY_PAGES)
    return only == replace(old, flags=old.flags & ~uapi.KVM_MEM_LOG_DIRTY_PAGES)
