"""What a snapshot says, regardless of how it is stored.

Nothing here imports numpy, zstandard or xxhash: a program that only names extents or
prints a header starts quickly.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Self

import mtetool
from mtetool.guest import Extent, GuestInfo, Memslot, Missing
from mtetool.uapi import GRANULE_BYTES, PAGE_SIZES

CHUNK_GRANULES = 4 << 20
"""Granules of one record of tags unless the header says otherwise: 4 MiB of tag bytes."""

MAX_CHUNK_GRANULES = 32 << 20
"""The most that a header may declare for `chunk_granules`."""

ADDRESS_LIMIT = 1 << 64

MAX_SLOT_ID = (1 << 32) - 1
MAX_ERRNO = (1 << 31) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first record of a snapshot says.

    `memslots` is the source's layout (empty where it was unknown), in order of address; `scope` is
    the memory that the snapshot covers: aligned to `page_size_bytes`, ascending, disjoint.
    `paused` is whether the guest stood still when the save began.
    `snapshot_id` and `base_id` are 32 lower-case hex digits.
    """

    page_size_bytes: int
    memslots: tuple[Memslot, ...]
    scope: tuple[Extent, ...]
    source: str = ""
    created_utc: str
    tool: str
    kernel: str
    machine: str
    vmm: str | None
    name: str | None
    paused: bool | None
    snapshot_id: str
    base_id: str | None = None
    chunk_granules: int = CHUNK_GRANULES

    @classmethod
    def for_guest(
        cls, info: GuestInfo, scope: Sequence[Extent], *, paused: bool | None = None
    ) -> Self:
        """The header of a new snapshot of a guest of this host, made now, with a new id."""
        return cls(
            page_size_bytes=info.page_size_bytes,
            memslots=tuple(sorted(info.memslots, key=lambda slot: slot.ipa)),
            scope=tuple(scope),
            source=info.source,
            created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            tool=f"mtetool {mtetool.__version__}",
            kernel=platform.release(),
            machine=platform.machine(),
            vmm=info.vmm,
            name=info.name,
            paused=paused,
            snapshot_id=os.urandom(16).hex(),
        )


@dataclass(frozen=True, slots=True)
class Footer:
    """What the end of a snapshot says.

    `records` counts those before the end record. `granules`, `tagged_granules` (tag not 0)
    and `tagged_pages` (pages with such a granule) are sums over all records of tags, so a page
    that was written twice counts twice. `missing_bytes` is the guest memory that is missing in the
    end. `consistent` is whether the guest stood still during the whole save. `changed_granules` is
    how many granules of a delta have another tag than in the base, or have no tag there; None where
    that is unknown, and for a snapshot without a base.
    """

    records: int
    granules: int
    tagged_granules: int
    tagged_pages: int
    missing_bytes: int
    consistent: bool | None
    changed_granules: int | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """A snapshot's description; `file_bytes` is None where it came through a pipe."""

    header: Header
    footer: Footer
    missing: tuple[Missing, ...]
    file_bytes: int | None


def header_problem(header: Header) -> str | None:
    """What is wrong with a header's numbers, in words; None when nothing is."""
    page = header.page_size_bytes
    if page not in PAGE_SIZES:
        return f"a page size of {page} bytes"
    if not 0 < header.chunk_granules <= MAX_CHUNK_GRANULES:
        return f"chunks of {header.chunk_granules} granules"
    if header.chunk_granules % (page // GRANULE_BYTES):
        return f"chunks of {header.chunk_granules} granules, which are not whole pages"
    for what, ranges in (("memslot", header.memslots), ("scope", header.scope)):
        behind = 0
        for item in ranges:
            where = f"{what} {item.ipa:#x}:{item.size_bytes:#x}"
            if item.ipa % page or item.size_bytes % page or item.size_bytes <= 0:
                return f"{where} is not made of whole pages"
            if item.ipa < behind:
                return f"{where} overlaps the one before, or is out of order"
            behind = item.ipa + item.size_bytes
            # The whole address space in one range has a size that no u64 holds.
            if behind > ADDRESS_LIMIT or item.size_bytes >= ADDRESS_LIMIT:
                return f"{where} ends beyond the address space"
    for slot in header.memslots:
        if not 0 <= slot.id <= MAX_SLOT_ID:
            return f"a memslot with the number {slot.id}"
    for digits in (header.snapshot_id, header.base_id):
        if digits is not None and not _is_id(digits):
            return f"an id that is not 32 hex digits: {digits[:40]!r}"
    return None


def _is_id(text: str) -> bool:
    return len(text) == 32 and all(digit in "0123456789abcdef" for digit in text)
