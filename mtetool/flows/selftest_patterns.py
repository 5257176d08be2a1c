"""Test tags that distinguish every granule from all others, and what went wrong with them.

Granule i has the number i; the patterns are the hexadecimal digits of the numbers, so the
tags read for all patterns spell the number of the granule that they were written to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES, TAG_MAX
from mtetool.words import counted

_N_TAGS = TAG_MAX + 1
_EMULATED_PAGE_GRANULES = 4096 // GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class Defect:
    """A way in which tags get lost, with a stable id; `text` names a cause if it is known."""

    id: str
    text: str
    hint: str


NOT_KEPT = Defect(
    "tags-not-kept",
    "the tags that are read do not depend on those written: this host's memory keeps none",
    "check the firmware's MTE settings, and the emulator if this host is emulated",
)
OVERWRITE_IN_PAGE = Defect(
    "tags-overwrite-in-page",
    "tags set in a page overwrite each other, as in QEMU 7.2 (the version of Debian 12): this host"
    " is probably emulated by it, and its emulated processors lose tags",
    "emulate the host with QEMU 8 or later, or use a real processor",
)
OVERWRITE = Defect(
    "tags-overwrite",
    "tags set in one place overwrite those of another place",
    "do not trust any tags on this host; no cause of this is known, so please report it",
)
CHANGED = Defect(
    "tags-changed",
    "tags are read back that were never written",
    "do not trust any tags on this host; no cause of this is known, so please report it",
)


def patterns(n_granules: int) -> Iterator[Tags]:
    """Yield the patterns for `n_granules` granules, each of shape (n_granules,).

    The first 16 give every granule every tag, in the order of the lowest digit; the others
    are the higher digits.
    """
    number = np.arange(n_granules)
    for shift in range(_N_TAGS):
        yield ((number + shift) % _N_TAGS).astype(np.uint8)
    for digit in range(1, _n_digits(n_granules)):
        yield (number >> 4 * digit & TAG_MAX).astype(np.uint8)


def compare(reads: Sequence[Tags], granules_per_page: int, ipa: int) -> str | None:
    """Say how the tags that were read differ from the patterns; None where they do not.

    `reads` has what came back for each pattern, from `ipa` on.
    """
    n_granules = reads[0].size
    wrong = np.zeros(n_granules, dtype=bool)
    first: tuple[int, int, int] | None = None
    for written, read in zip(patterns(n_granules), reads, strict=True):
        differ = written != read
        if first is None and differ.any():
            at = int(differ.argmax())
            first = at, int(written[at]), int(read[at])
        wrong |= differ
    if first is None:
        return None
    at, wrote, got = first
    pages = int(wrong.reshape(-1, granules_per_page).any(axis=1).sum())
    return (
        f"wrong: {counted(int(wrong.sum()), 'granule')} in {counted(pages, 'page')};"
        f" at {ipa + at * GRANULE_BYTES:#x} {wrote} was written and {got} read"
    )


def diagnose(reads: Sequence[Tags]) -> Defect:
    """Return the defect that makes `reads` differ from the patterns."""
    if all(np.array_equal(read, reads[0]) for read in reads):
        return NOT_KEPT
    source = _source(reads)
    if source is None:
        return CHANGED
    # QEMU 7.2 looks up a tag by its page's address, without the place in the page, and by one
    # address bit for the nibble (allocation_tag_mem and store_tag1 in target/arm/mte_helper.c;
    # fixed in 8.0): the last tag set stays. Its pages have 4 KiB, whatever the host's page size.
    number = np.arange(source.size)
    last = (number | _EMULATED_PAGE_GRANULES - 1) & ~1 | number & 1
    return OVERWRITE_IN_PAGE if np.array_equal(source, last) else OVERWRITE


def _source(reads: Sequence[Tags]) -> NDArray[np.intp] | None:
    """Return the number of the granule whose tags each granule has; None if there is none."""
    n_granules = reads[0].size
    number = np.zeros(n_granules, dtype=np.intp)
    for digit, read in enumerate((reads[0], *reads[_N_TAGS:])):
        number |= read.astype(np.intp) << 4 * digit
    if bool((number >= n_granules).any()):
        return None
    written = zip(patterns(n_granules), reads, strict=True)
    return number if all(np.array_equal(tags[number], read) for tags, read in written) else None


def _n_digits(n_granules: int) -> int:
    return max((n_granules - 1).bit_length() + 3, 4) // 4
