"""`mtetool dump --virtual --at`: what is at a virtual address of a VM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mtetool.cli.looking import document, put_context, row, status_of, verdict_words, why_not
from mtetool.cli.ranges import size
from mtetool.cli.render import print_json, put, say
from mtetool.cli.screen import screen
from mtetool.errors import STATUS_NO, STATUS_PARTIAL, UsageError
from mtetool.flows.virtual_looking import Found, VirtualLook, look_at_virtual
from mtetool.sources.source import GuestSource

if TYPE_CHECKING:
    from mtetool.flows.looking import Look
    from mtetool.guest import AddressSpace
    from mtetool.sources.source import TagSource


def look_at_addresses(
    source: TagSource,
    addresses: Sequence[int],
    n_context: int,
    vcpu: int | None,
    *,
    as_json: bool,
) -> int:
    """Print what is at virtual addresses, and return the status.

    Raises the error of the first one if none of them is mapped.
    """
    found = look_at_virtual(source, _spaces(source, vcpu), addresses, n_context)
    if not any(item.found for item in found):
        raise next(item.error for item in found if item.error)
    if as_json:
        print_json(document(source, [_row(item, source) for item in found], n_context))
    else:
        _print(found, source, n_context)
    status = status_of([item.look for item in found if item.look])
    if status != STATUS_NO and any(item.error for item in found):
        return STATUS_PARTIAL
    return status


def _spaces(source: TagSource, vcpu: int | None) -> Sequence[AddressSpace]:
    if source.name.startswith("proc:"):
        raise UsageError(
            f"the addresses of {source.name} are virtual ones anyway", hint="leave out --virtual"
        )
    spaces = source.address_spaces(vcpu) if isinstance(source, GuestSource) else None
    if spaces is None:
        raise UsageError(
            f"--virtual is for a VM that exists, which {source.name} is not: it has no vCPU to ask",
            hint="give guest physical addresses, without --virtual",
        )
    return spaces


def _print(found: Sequence[VirtualLook], source: TagSource, n_context: int) -> None:
    to = screen()
    for n, item in enumerate(found):
        if n:
            put("\n")
        if item.found and item.look:
            say(*_words(item, item.found, item.look, source))
            if n_context:
                put_context(item.look, to)
        elif item.error:
            say(item.error.message)


def _words(item: VirtualLook, found: Found, look: Look, source: TagSource) -> Iterator[str]:
    address, ipa = found.pointer.ipa, found.ipa
    if found.pointer.tag is not None:
        yield f"pointer {item.given:#x}: tag {found.pointer.tag:x}, address {address:#x}"
    if look.tag is None:
        why = f"its tag cannot be read: {why_not(look, source)}" if look.missing else ""
        device = item.slot is not None and item.slot.kind == "device"
        why = why or ("that has no tags" if device else "which is not in the guest's memory")
        yield f"{address:#x}: mapped to IPA {ipa:#x} ({_how(found)}), {why}"
        return
    where = f"slot {item.slot.id}" if item.slot else "no memslot"
    page = ipa // source.page_size_bytes * source.page_size_bytes
    yield f"{address:#x}: tag {look.tag:x}, IPA {ipa:#x}, in {where}, page {page:#x}"
    yield f"mapped by {_how(found)}"
    yield from verdict_words(look)


def _how(found: Found) -> str:
    vcpu = found.space.vcpu
    if not found.mapped.block_bytes:
        return f"vCPU {vcpu}, whose MMU is off: the address is a physical one"
    half = found.pointer.virtual.half
    return f"vCPU {vcpu}, TTBR{half}, in a page or block of {size(found.mapped.block_bytes)}"


def _row(item: VirtualLook, source: TagSource) -> dict[str, Any]:
    """As `looking.row`; the run and the context have virtual addresses."""
    if item.found is None or item.look is None:
        return _unmapped_row(item)
    found = item.found
    return row(item.look, source) | {
        "ipa": found.ipa,
        "virtual": {
            "address": found.pointer.ipa,
            "vcpu": found.space.vcpu,
            "ttbr": found.pointer.virtual.half if found.mapped.block_bytes else None,
            "mapping_bytes": found.mapped.block_bytes or None,
        },
        "slot": item.slot.id if item.slot else None,
        "nearest": None,
    }


def _unmapped_row(item: VirtualLook) -> dict[str, Any]:
    keys = ("ipa", "virtual", "pointer_tag", "tag", "match", "slot", "run")
    error = item.error
    return {
        "address": item.given,
        **dict.fromkeys(keys),
        "error": error.id if error else None,
        "reason": error.message if error else None,
        "nearest": None,
        "context_ipa": None,
        "context": [],
    }
