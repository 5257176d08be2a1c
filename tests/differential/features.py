"""The kind of kernel that a side is, found by trying, never by its version."""

from __future__ import annotations

import errno

from mtetool import uapi
from mtetool.emulator import Behaviour, Host
from tests.differential.sides import ARENA, HUGE_ARENA, Side

_IPA = 1 << 30
_VM = 0


def find_host(side: Side) -> Host:
    """Return the host that behaves as this side does."""
    assert side.create_vm(_VM, 0) == 0
    host = Host(
        page_size_bytes=side.page_size_bytes,
        ipa_bits=side.check_extension(_VM, uapi.KVM_CAP_ARM_VM_IPA_SIZE),
        va_bits=_va_bits(side),
        max_vcpus=side.check_extension(_VM, uapi.KVM_CAP_MAX_VCPUS),
        hugepage_bytes=side.hugepage_bytes,
        aarch32=bool(side.check_extension(_VM, uapi.KVM_CAP_ARM_EL1_32BIT)),
        behaviours=frozenset(found for found, has in _TRIALS.items() if has(side)),
    )
    side.close_vm(_VM)
    return host


def _va_bits(side: Side) -> int:
    page = side.page_size_bytes
    for bits in (52, 48, 47, 42, 39):
        if side.set_memslot(_VM, bits, 0, _IPA, page, (1 << bits) - page) == 0:
            side.set_memslot(_VM, bits, 0, _IPA, 0, 0)
            return bits
    raise AssertionError("a memslot takes no address of a process")


def _hugetlb_tags(side: Side) -> bool:
    size = side.hugepage_bytes
    if not size:
        return False
    vm = 1
    side.create_vm(vm, 0)
    side.enable_cap(vm, uapi.KVM_CAP_ARM_MTE, 0, 0)
    side.map(HUGE_ARENA, size, "huge", "rw", -1, 0)
    answer = side.set_memslot(vm, 0, 0, _IPA, size, HUGE_ARENA)
    side.close_vm(vm)
    side.unmap(HUGE_ARENA, size)
    return answer == 0


def _clear_user_exact(side: Side) -> bool:
    page, vm = side.page_size_bytes, 1
    side.create_vm(vm, 0)
    side.enable_cap(vm, uapi.KVM_CAP_ARM_MTE, 0, 0)
    side.map(ARENA, page, "private", "rw", -1, 0)
    side.set_memslot(vm, 0, 0, _IPA, page, ARENA)
    buffer = ARENA + 2 * page
    side.map(buffer, page, "private", "rw", -1, 0)
    side.fill(buffer, page, 0)
    side.copy_tags(vm, _IPA, page, buffer + page - 3, uapi.KVM_ARM_TAGS_FROM_GUEST, [0, 0])
    last = side.contents(buffer + page - 1, 1)
    side.close_vm(vm)
    side.map(ARENA, 3 * page, "private", "none", -1, 0)
    return last == b"\0"


def _guest_memfd(side: Side) -> bool:
    vm = 1
    side.create_vm(vm, 0)
    answer = side.create_guest_memfd(vm, 0, side.page_size_bytes)
    side.close_vm(vm)
    return answer == 0


def _vcpu_el2_features(side: Side) -> bool:
    vm = 1
    side.create_vm(vm, 0)
    side.create_vcpu(vm, 0)
    answer = side.init_vcpu(vm, 0, uapi.KVM_ARM_TARGET_GENERIC_V8, uapi.KVM_ARM_VCPU_HAS_EL2)
    side.close_vm(vm)
    return answer == -errno.EINVAL


_TRIALS = {
    Behaviour.HUGETLB_TAGS: _hugetlb_tags,
    Behaviour.CLEAR_USER_EXACT: _clear_user_exact,
    Behaviour.GUEST_MEMFD: _guest_memfd,
    Behaviour.VCPU_EL2_FEATURES: _vcpu_el2_features,
}
