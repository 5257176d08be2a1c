"""The tags at virtual addresses: which vCPU maps them, where their page is, and what is there.

The guest runs meanwhile and may change its page tables between two reads of them. So they are
walked again once the tags were read, and everything is done again if the answer has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mtetool.errors import AmbiguousAddressError, BusyError, GuestError, NotMappedError
from mtetool.flows.looking import Look, Pointer, look, window_around
from mtetool.guest import AddressSpace, Mapped, Memslot, Unmapped, Virtual
from mtetool.sources.layout import Layout
from mtetool.sources.source import TagSource
from mtetool.sources.virtual import VirtualSource

_TRIES = 8


@dataclass(frozen=True, slots=True)
class VirtualPointer(Pointer):
    """A virtual address as it was given; `virtual` is how a vCPU takes it."""

    virtual: Virtual

    @property
    def ipa(self) -> int:
        """The address without a tag: a virtual one."""
        return self.virtual.address

    @property
    def tag(self) -> int | None:
        """The pointer's tag; None where the guest uses none."""
        return self.virtual.tag

    @property
    def is_unchecked(self) -> bool:
        """Whether the guest lets it access memory of any tag (TCMA)."""
        return self.virtual.is_unchecked


@dataclass(frozen=True, slots=True)
class Found:
    """Where a virtual address is: in guest memory, by the tables of one vCPU."""

    pointer: VirtualPointer
    space: AddressSpace
    mapped: Mapped

    @property
    def ipa(self) -> int:
        """The guest physical address."""
        return self.mapped.ipa


@dataclass(frozen=True, slots=True)
class VirtualLook:
    """What is at a virtual address; `error` says why nothing is, and then the rest is None.

    `slot` is None where the address is mapped to what is no memory.
    """

    given: int
    found: Found | None = None
    slot: Memslot | None = None
    look: Look | None = None
    error: GuestError | None = None


def look_at_virtual(
    source: TagSource, spaces: Sequence[AddressSpace], given: Sequence[int], n_context: int
) -> list[VirtualLook]:
    """Look at virtual addresses, with `n_context` granules before and after each.

    Raises BusyError where the guest changes its tables all the time, and what reading raises.
    """
    for _ in range(_TRIES):
        places = [_place(spaces, address) for address in given]
        looks = _looks(source, [each for each in places if isinstance(each, Found)], n_context)
        if [_place(spaces, address) for address in given] == places:
            break
    else:
        raise BusyError(
            "the guest changes its page tables faster than they can be read",
            hint="try again, or stop the guest meanwhile",
        )
    layout = Layout(tuple(source.memslots), source.page_size_bytes)
    result = []
    for address, place in zip(given, places, strict=True):
        if isinstance(place, Found):
            slot = layout.slot_at(place.ipa)
            result.append(VirtualLook(address, place, slot, looks[place]))
        else:
            result.append(VirtualLook(address, error=place.error))
    return result


@dataclass(frozen=True, slots=True)
class _Nowhere:
    """An address that is not mapped; equal to any other for the same reason."""

    reason: str
    error: GuestError = field(compare=False)


def _looks(source: TagSource, found: Sequence[Found], n_context: int) -> dict[Found, Look]:
    """Look at all of one address space together."""
    looks: dict[Found, Look] = {}
    by_vcpu: dict[int, list[Found]] = {}
    for each in found:
        by_vcpu.setdefault(each.space.vcpu, []).append(each)
    for group in by_vcpu.values():
        windows = [window_around(each.pointer, n_context) for each in group]
        virtual = VirtualSource(source, group[0].space, windows)
        results = look(virtual, [each.pointer for each in group], n_context)
        looks.update(zip(group, results, strict=True))
    return looks


def _place(spaces: Sequence[AddressSpace], given: int) -> Found | _Nowhere:
    """Find an address in one of the address spaces; see `mtetool-dump(1)` for which one counts."""
    # The MMU of a vCPU that was never started is off: it says nothing while others are on.
    asked = [space for space in spaces if space.is_on] or list(spaces[:1])
    tried = [_in_space(space, given) for space in asked]
    found = [each for each in tried if isinstance(each, Found)]
    if not found:
        return next(each for each in tried if isinstance(each, _Nowhere))
    first = found[0]
    others = [each for each in found if each.mapped != first.mapped]
    if others and not first.pointer.virtual.half:
        where = ", ".join(f"vCPU {each.space.vcpu}: {each.ipa:#x}" for each in (first, *others))
        reason = f"{given:#x} is in the memory of several processes ({where})"
        error = AmbiguousAddressError(reason, hint=f"choose a vCPU: --vcpu {first.space.vcpu}")
        return _Nowhere(reason, error)
    return first


def _in_space(space: AddressSpace, given: int) -> Found | _Nowhere:
    try:
        pointer = VirtualPointer(given, space.pointer(given))
        part = next(iter(space.parts(pointer.ipa, pointer.ipa + 1)))
        if isinstance(part, Unmapped):
            raise part.error
    except GuestError as error:
        return _Nowhere(error.message, _explained(error, given, space))
    return Found(pointer, space, part)


def _explained(error: GuestError, given: int, space: AddressSpace) -> GuestError:
    if not isinstance(error, NotMappedError):
        return _same(error, f"{given:#x} on vCPU {space.vcpu}: {error.message}", error.hint)
    is_lower = not given >> 55 & 1
    hint = "the process that has it must run on a vCPU: --vcpu N" if is_lower else None
    hint = error.hint or hint or "compare with the guest's own message: is the address complete?"
    return _same(error, f"{given:#x} is not mapped on vCPU {space.vcpu}: {error.message}", hint)


def _same(error: GuestError, message: str, hint: str | None) -> GuestError:
    """An error of the same kind with another message."""
    return type(error)(message, hint=hint, **error.details)
