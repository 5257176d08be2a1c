"""`mtetool dump --at`: what is at an address, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mtetool.cli.ranges import size, why
from mtetool.cli.render import print_json, put, say
from mtetool.cli.screen import screen
from mtetool.cli.views import grid_around
from mtetool.errors import STATUS_NO, STATUS_OK, STATUS_PARTIAL
from mtetool.flows.dump import OUTSIDE, RAW_MISSING
from mtetool.flows.looking import Look, Pointer, look
from mtetool.sources.layout import UNREACHABLE, hex_range
from mtetool.streaming import extent_row
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.cli.screen import Screen
    from mtetool.sources.source import TagSource


def look_at(source: TagSource, addresses: Sequence[int], n_context: int, *, as_json: bool) -> int:
    """Print what is at addresses, and return the status: 1 where a pointer has another tag."""
    found = look(source, [Pointer(address) for address in addresses], n_context)
    if as_json:
        rows = [row(item, source) for item in found]
        print_json(document(source, rows, n_context))
    else:
        to = screen()
        for n, item in enumerate(found):
            if n:
                put("\n")
            say(*_words(item, source))
            if n_context:
                put_context(item, to)
    return status_of(found)


def put_context(item: Look, to: Screen) -> None:
    """Print the granules around an address."""
    if item.tag is not None:
        for line in grid_around(item.context_ipa, item.context, item.pointer.ipa, to):
            put(line)


def status_of(found: Sequence[Look]) -> int:
    """The status: a mismatch counts more than what has no tag."""
    if any(item.matches is False for item in found):
        return STATUS_NO
    return STATUS_PARTIAL if any(item.tag is None for item in found) else STATUS_OK


def _words(item: Look, source: TagSource) -> Iterator[str]:
    pointer, ipa = item.pointer, item.pointer.ipa
    where = f"slot {item.slot.id}" if item.slot else "no memslot"
    page = ipa // source.page_size_bytes * source.page_size_bytes
    if pointer.tag is not None:
        yield f"pointer {pointer.given:#x}: tag {pointer.tag:x}, address {ipa:#x}"
    if item.tag is None:
        yield f"{ipa:#x}: {why_not(item, source)}"
        if pointer.is_kernels:
            yield "it looks like a virtual address of a kernel: --virtual translates those"
        return
    yield f"{ipa:#x}: tag {item.tag:x}, in {where}, page {page:#x}"
    yield from verdict_words(item)


def verdict_words(item: Look) -> Iterator[str]:
    """The run around an address that has a tag, and whether its pointer has the same."""
    pointer = item.pointer
    if item.run is not None:
        start, end = item.run.ipa, item.run.ipa + item.run.size_bytes
        n_context = len(item.context) * GRANULE_BYTES
        edges = [start == item.context_ipa, end == item.context_ipa + n_context]
        more = " at least" if any(edges) else ""
        how_long = size(item.run.size_bytes)
        yield f"run: {start:#x} to {end - 1:#x}{more}, {how_long} of tag {item.tag:x}"
    if pointer.is_unchecked and pointer.tag is not None:
        yield f"pointer {pointer.tag:x}, memory {item.tag:x}: the guest does not check this tag"
    if item.matches is not None:
        verdict = "match" if item.matches else "mismatch"
        yield f"pointer {pointer.tag:x}, memory {item.tag:x}: {verdict}"


def why_not(item: Look, source: TagSource) -> str:
    """Why an address has no tag."""
    if item.missing is not None:
        return f"its tag cannot be read: {why(item.missing)}"
    if item.slot is not None and item.slot.kind == "device":
        return f"no tags: slot {item.slot.id} is {UNREACHABLE}"
    near = item.nearest
    if near is None:
        return f"not in the memory of {source.name}, which has none"
    ipa = item.pointer.ipa
    there = f"begins {near.ipa - ipa:#x} bytes after it"
    if ipa >= near.end:
        distance = ipa - near.end
        there = f"ends {distance:#x} bytes before it" if distance else "ends right before it"
    return f"not in the memory of {source.name}; the nearest, {hex_range(near)}, {there}"


def document(source: TagSource, rows: Sequence[dict[str, Any]], n_context: int) -> dict[str, Any]:
    """All of it as JSON."""
    return {
        "schema": "mtetool.dump-at/1",
        "source": source.name,
        "page_size_bytes": source.page_size_bytes,
        "context_granules": n_context,
        "mismatches": sum(row["match"] is False for row in rows),
        "addresses": list(rows),
    }


def row(item: Look, source: TagSource) -> dict[str, Any]:
    """What is at an address, as JSON."""
    tags = [tag if tag not in (RAW_MISSING, OUTSIDE) else None for tag in item.context]
    run = item.run
    return {
        "address": item.pointer.given,
        "ipa": item.pointer.ipa,
        "virtual": None,
        "pointer_tag": item.pointer.tag,
        "tag": item.tag,
        "match": item.matches,
        "slot": item.slot.id if item.slot else None,
        "run": None if run is None else {"ipa": run.ipa, "size_bytes": run.size_bytes},
        "error": None,
        "reason": None if item.tag is not None else why_not(item, source),
        "nearest": None if item.nearest is None else extent_row(item.nearest),
        "context_ipa": item.context_ipa,
        "context": tags,
    }
