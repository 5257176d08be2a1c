"""A report of the tags of one source, or of two, as a page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mtetool.flows.diff import Difference, diff
from mtetool.formats.opening import Opened
from mtetool.formats.page import MOST_CELLS, Report, page
from mtetool.formats.tagmap import MISSING, TagMap, tag_map
from mtetool.guest import Extent
from mtetool.sources.layout import common
from mtetool.uapi import GRANULE_BYTES


def report(
    opened: Opened, extents: Sequence[Extent], against: Opened | None = None
) -> tuple[Iterator[str], int]:
    """The page of a source, in pieces, and how many bytes of memory have no known tag.

    With `against`, memory whose tags differ there, or which it does not have, is marked.
    """
    found = tag_map(opened.tags, extents, MOST_CELLS)
    changed = _changed(found, opened, against) if against is not None else None
    made = Report(
        opened.tags.name,
        list(_facts(opened)),
        sorted(opened.info.memslots, key=lambda slot: slot.ipa),
        found,
        against.tags.name if against is not None else None,
        changed,
    )
    return page(made), int(found.histogram()[MISSING]) * GRANULE_BYTES


def _changed(found: TagMap, opened: Opened, against: Opened) -> NDArray[np.int64]:
    """For each cell the granules that differ. What only the other side has is in no cell."""
    changed = np.zeros(found.n_cells, dtype=np.int64)
    for difference in diff(opened.tags, against.tags, found.extents):
        if not isinstance(difference, Difference):
            continue
        whole = Extent(difference.ipa, difference.size_bytes)
        for part in common([whole], found.extents):
            for piece in found.within(part):
                for cells, granules in found.spread(piece.ipa, piece.size_bytes):
                    changed[cells] += granules
    return changed


def _facts(opened: Opened) -> Iterator[tuple[str, str]]:
    header = opened.header
    yield "source", opened.info.source
    if opened.info.name:
        yield "guest", opened.info.name
    if header is not None:
        yield "saved", header.created_utc
        yield "snapshot", header.snapshot_id
    yield "page size", f"{opened.tags.page_size_bytes // 1024} KiB"
