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
        """Check a well-formed request before any page is copied: 0 or -errno."""
        ...

    def copy_some(self, request: CopyRequest, done: int) -> int:
        """Copy from `done` bytes into the request on; return the bytes copied, 0 if it cannot."""
        ...


def copy_tags(request: CopyRequest, memory: TagMemory, *, mte: bool, page_size_bytes: int) -> int:
    """Copy up to the first page that cannot be copied; return the kernel's answer.

    That is the bytes of guest memory done, or -errno if none was.
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
    """Make the kernel's checks before it touches any memory, in its order: 0 or -EINVAL."""
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
    """Copy one page's tags from or to a buffer; return whether all were copied."""
    found = memory.fault_in(at, write=to_guest)
    if found is None:
        return False
    copy = _to_guest if to_guest else _from_guest
    return copy(memory, found, buffer) == memory.host.page_granules


def _from_guest(memory: AddressSpace, found: Found, buffer: int) -> int:
    """Copy the tags of one page into the buffer; return how many were copied."""
    granules = memory.host.page_granules
    # The page of zeros that memory shares until it is written to has no mark either.
    if found.page is None or found.page.tags is None:
        return _clear_user(memory, buffer, granules)
    first = found.offset // 16
    return memory.store(buffer, bytes(found.page.tags[first : first + granules]))


def _to_guest(memory: AddressSpace, found: Found, buffer: int) -> int:
    """Copy the tags of the buffer onto one page; return how many were copied.

    If the buffer faults, the page is left with tags of 0.
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
    """The kernel's clear_user: zeros up to the first fault; return how many were surely written.

    Unlike the copying of tags, it checks that the address is a user address, which one with a tag
    is not (access_ok, arch/arm64/include/asm/uaccess.h).
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
    """Whether one store of eight bytes succeeds, even across the end of a page."""
    return all(
        memory.fault_in(at, write=True) is not None for at in (address, address + _STORE_BYTES - 1)
    )
