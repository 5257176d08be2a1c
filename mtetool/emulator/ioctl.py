"""KVM_ARM_MTE_COPY_TAGS, as kvm_vm_ioctl_mte_copy_tags answers it (arch/arm64/kvm/guest.c)."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mtetool.emulator.behaviours import Behaviour
from mtetool.uapi import KVM_ARM_TAGS_FROM_GUEST, TAG_MAX, is_copy_range

if TYPE_CHECKING:
    from mtetool.emulator.memory import AddressSpace, Found

# clear_user stores eight bytes at a time (arch/arm64/lib/clear_user.S).
_STORE_BYTES = 8


@dataclass(frozen=True, slots=True)
class CopyRequest:
    """struct kvm_arm_copy_mte_tags; each field as it is in the kernel's struct."""

    guest_ipa: int
    length: int
    addr: int = 0
    flags: int = KVM_ARM_TAGS_FROM_GUEST
    reserved: tuple[int, int] = (0, 0)

    @property
    def to_guest(self) -> bool:
        """Whether tags go into the guest."""
        return not self.flags & KVM_ARM_TAGS_FROM_GUEST


class TagMemory(Protocol):
    """The memory of a guest, and the buffer of a request."""

    def begin(self, request: CopyRequest) -> int:
        """What is looked at before any page, of a request that is well-formed: 0 or -errno."""
        ...

    def copy_some(self, request: CopyRequest, done: int) -> int:
        """Copy from the page on that is `done` bytes into the request: bytes, 0 if it cannot be."""
        ...


def copy_tags(request: CopyRequest, memory: TagMemory, *, mte: bool, page_size_bytes: int) -> int:
    """Copy up to the first page that cannot be; the kernel's answer.

    That is the bytes of guest memory done, or -errno when none was.
    """
    error = _check_request(request, mte=mte, page_size_bytes=page_size_bytes)
    if error or (error := memory.begin(request)):
        return error
    done = 0
    while done < request.length and (some := memory.copy_some(request, done)):
        done += some
    if done < request.length and not done:
        return -errno.EFAULT
    return done


def _check_request(request: CopyRequest, *, mte: bool, page_size_bytes: int) -> int:
    """What the kernel looks at before it touches any memory, in its order: 0 or -EINVAL."""
    if not mte:
        return -errno.EINVAL
    if request.reserved != (0, 0):
        return -errno.EINVAL
    if request.flags & ~KVM_ARM_TAGS_FROM_GUEST:
        return -errno.EINVAL
    if not is_copy_range(request.guest_ipa, request.length, page_size_bytes):
        return -errno.EINVAL
    return 0


def copy_page(memory: AddressSpace, at: int, buffer: int, *, to_guest: bool) -> bool:
    """Copy the tags of one page of a process's memory, from or to a buffer; whether all were."""
    found = memory.fault_in(at, write=to_guest)
    if found is None:
        return False
    copy = _to_guest if to_guest else _from_guest
    return copy(memory, found, buffer) == memory.host.page_granules


def _from_guest(memory: AddressSpace, found: Found, buffer: int) -> int:
    """The tags of one page into the buffer; how many were copied."""
    granules = memory.host.page_granules
    # The page of zeros that memory shares until it is written to has no mark either.
    if found.page is None or found.page.tags is None:
        return _clear_user(memory, buffer, granules)
    first = found.offset // 16
    return memory.store(buffer, bytes(found.page.tags[first : first + granules]))


def _to_guest(memory: AddressSpace, found: Found, buffer: int) -> int:
    """The tags of the buffer onto one page; how many were copied.

    Where the buffer faults, the page is left with no tags but 0.
    """
    page, granules = found.page, memory.host.page_granules
    assert page is not None
    tags = memory.load(buffer, granules)
    marked = page.mark()
    first = found.offset // 16
    whole = len(tags) == granules
    marked[first : first + granules] = (
        bytes(tag & TAG_MAX for tag in tags) if whole else bytes(granules)
    )
    return len(tags)


def _clear_user(memory: AddressSpace, address: int, size_bytes: int) -> int:
    """clear_user of the kernel: zeros up to the first fault; how many were surely written.

    Unlike the copying of tags it looks whether the address is one of a process, for which one
    with a tag of its own is none (access_ok, arch/arm64/include/asm/uaccess.h).
    """
    if address + size_bytes > 1 << memory.host.va_bits:
        return 0
    if memory.host.has(Behaviour.CLEAR_USER_EXACT):
        return memory.store(address, bytes(size_bytes))
    for done in range(0, size_bytes, _STORE_BYTES):
        if not _reachable(memory, address + done):
            return done
        memory.store(address + done, bytes(_STORE_BYTES))
    return size_bytes


def _reachable(memory: AddressSpace, address: int) -> bool:
    """Whether one store of eight bytes goes through, over the end of a page too."""
    return all(
        memory.fault_in(at, write=True) is not None for at in (address, address + _STORE_BYTES - 1)
    )
