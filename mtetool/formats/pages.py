"""Tags in whole pages, as a snapshot stores them, from a source whose gaps are not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mtetool.buffers import as_bytes
from mtetool.formats.parts import RAW_MISSING
from mtetool.guest import Extent, Missing
from mtetool.sources.copying import Copied, Step
from mtetool.sources.source import TagSource
from mtetool.tags import as_array, runs
from mtetool.uapi import GRANULE_BYTES

_WINDOW_BYTES = 64 << 20


def whole_pages(source: TagSource, extents: Sequence[Extent], page_bytes: int) -> Iterator[Step]:
    """Read ascending extents of whole pages; a page with a gap is missing as a whole.

    Each piece of tags has a buffer of its own.
    """
    for extent in extents:
        for ipa in range(extent.ipa, extent.end, _WINDOW_BYTES):
            window = Extent(ipa, min(_WINDOW_BYTES, extent.end - ipa))
            yield from _window(source, window, page_bytes)


def _window(source: TagSource, window: Extent, page_bytes: int) -> Iterator[Step]:
    tags = np.empty(window.size_bytes // GRANULE_BYTES, dtype=np.uint8)
    reason = ""
    number: int | None = None
    for step in source.read([window]):
        if not isinstance(step, Copied) and step.size_bytes == window.size_bytes:
            yield step
            return
        first = (step.ipa - window.ipa) // GRANULE_BYTES
        part = tags[first : first + step.size_bytes // GRANULE_BYTES]
        if isinstance(step, Copied):
            part[:] = as_array(step.tags)
        elif isinstance(step, Missing):
            part[:] = RAW_MISSING
            reason, number = step.reason, step.errno
        else:
            part[:] = step.tag
    pages = tags.reshape(-1, page_bytes // GRANULE_BYTES)
    gone = (pages == RAW_MISSING).any(axis=1).astype(np.uint8)
    starts, lengths, kinds = runs(gone)
    for start, length, is_gone in zip(
        starts.tolist(), lengths.tolist(), kinds.tolist(), strict=True
    ):
        ipa = window.ipa + start * page_bytes
        if is_gone:
            yield Missing(ipa, length * page_bytes, number, reason)
        else:
            yield Copied(ipa, as_bytes(pages[start : start + length].reshape(-1)))
