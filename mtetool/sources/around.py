"""Find the way around guest memory that cannot be copied: where a copy can go on.

The kernel says only that one page cannot be copied, never how many after it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NamedTuple

from mtetool.errors import BusyError, GuestError, errno_name
from mtetool.guest import Missing
from mtetool.sources.layout import UNREACHABLE, Layout

ONE_BY_ONE_PAGES = 1024
"""The longest stretch of pages that cannot be copied in which every page is tried.

A memslot that ends early can have 100,000s of them, and each try costs up to a millisecond on a
real VM, while a frozen guest waits.
"""

# How many pages are tried in one go where every page is tried, so that progress can be shown.
_STEP_PAGES = 1 << 14

# Errors about the request or the whole VM, not about the page: the next page would only
# give the same error again.
_WHOLE_VM = {
    errno.EINVAL: "the kernel rejects the request as malformed; is MTE on for this VM?",
    errno.EIO: "the VM belongs to another process, or is dead",
    errno.EBADF: "the VM's file descriptor is gone",
    errno.ENOTTY: "the file descriptor is not a VM's, or its kernel has no KVM_ARM_MTE_COPY_TAGS",
    errno.EPERM: "the kernel does not permit it",
    errno.EACCES: "the kernel does not permit it",
}

Transfer = Callable[[int, int], int]
"""Copies the tags of that many bytes from an address on, and returns the bytes done."""


class Gap(NamedTuple):
    """Memory that cannot be copied; how many of its pages failed, and how many were not tried."""

    missing: Missing
    failed_pages: int
    untried_pages: int


def way_around(
    transfer: Transfer,
    at: int,
    end: int,
    error: OSError,
    layout: Layout,
    *,
    writing: bool,
    insist: bool,
) -> Gap:
    """Find what is missing from `at` on, where a copy failed with nothing done.

    With `insist`, every page is tried, however many there are.
    """
    number = error.errno or errno.EIO
    raise_for_whole_vm(number, at, writing=writing)
    slot = layout.slot_at(at)
    if layout.slots and (slot is None or slot.kind == "device"):
        # The layout says where the next memory is: nothing needs to be tried.
        stop = slot.end if slot else layout.next_start(at) or end
        missing = Missing(at, min(stop, end) - at, number, _reason(number, at, layout, writing))
        return Gap(missing, 0, 0)
    page = layout.page_size_bytes
    limit = min(slot.end if slot else end, end)
    if insist:
        limit = min(limit, at + _STEP_PAGES * page)
    stop, failed = first_that_answers(transfer, at, limit, page, insist=insist)
    reason = _reason(number, at, layout, writing)
    untried = (stop - at) // page - failed
    if untried:
        reason += f"; {failed:,} of these {failed + untried:,} pages were tried"
    return Gap(Missing(at, stop - at, number, reason), failed, untried)


def first_that_answers(
    transfer: Transfer, start: int, end: int, page_bytes: int, *, insist: bool = False
) -> tuple[int, int]:
    """Find the first page after `start` that can be copied (else `end`), and how many cannot.

    The page at `start` is known to fail. The pages after it are tried one by one; once
    `ONE_BY_ONE_PAGES` have failed, and without `insist`, they are tried at doubling distances, then
    bisecting back. That can miss good pages between two that fail; the count lets the caller say
    so.
    """
    failed = 1

    def answers(ipa: int) -> bool:
        nonlocal failed
        try:
            return transfer(ipa, page_bytes) > 0
        except OSError as error:
            raise_for_whole_vm(error.errno or errno.EIO, ipa, writing=False)
            failed += 1
            return False

    bad = start
    while insist or failed <= ONE_BY_ONE_PAGES:
        if bad + page_bytes >= end:
            return end, failed
        if answers(bad + page_bytes):
            return bad + page_bytes, failed
        bad += page_bytes
    distance = bad - start
    while True:
        distance *= 2
        good = min(start + distance, end - page_bytes)
        if good <= bad:
            return end, failed
        if answers(good):
            break
        bad = good
    while good - bad > page_bytes:
        middle = bad + (good - bad) // page_bytes // 2 * page_bytes
        if answers(middle):
            good = middle
        else:
            bad = middle
    return good, failed


def raise_for_whole_vm(number: int, ipa: int, *, writing: bool) -> None:
    name = errno_name(number)
    verb = "written" if writing else "read"
    if number == errno.EBUSY:
        raise BusyError(
            f"tags cannot be {verb} at {ipa:#x}: {name}: the VM is logging dirty pages",
            hint="a migration, snapshot or dirty-rate measurement is under way in the VMM:"
            " let it end (QMP: query-migrate, query-dirty-rate), then try again",
            ipa=ipa,
            errno=name,
        )
    if number in _WHOLE_VM:
        raise GuestError(
            f"tags cannot be {verb} at {ipa:#x}: {name}: {_WHOLE_VM[number]}",
            ipa=ipa,
            errno=name,
        )


def _reason(number: int, ipa: int, layout: Layout, writing: bool) -> str:
    slot = layout.slot_at(ipa)
    if layout.slots and slot is None:
        return "no memslot there"
    if slot is not None and slot.kind == "device":
        return f"tags that cannot be reached: {UNREACHABLE}"
    if writing and slot is not None and (slot.readonly or slot.kind == "rom"):
        return "read-only"
    if number == errno.EFAULT:
        return "no memory that the host can reach"
    return os.strerror(number)
