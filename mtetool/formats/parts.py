"""Tags that lie in a file as plain bytes, or packed two a byte, in any number of parts."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from mtetool.errors import BadFormatError
from mtetool.formats.bytesof import read_at
from mtetool.guest import Extent, GuestInfo, Missing
from mtetool.loops import unpack
from mtetool.sources.copying import Copied, Step
from mtetool.tags import Tags, as_array, runs
from mtetool.uapi import GRANULE_BYTES, TAG_MAX
from mtetool.words import counted

RAW_MISSING = 0xFF
"""The byte of a granule without a known tag, where there is a byte for each."""

# Even, so that it is whole bytes of packed tags.
_PIECE_GRANULES = 1 << 20


class Part(NamedTuple):
    """Memory whose tags are at `offset` in the file, or are missing for a `reason`.

    Packed tags begin in the low nibble of their first byte.
    """

    ipa: int
    size_bytes: int
    offset: int = 0
    packed: bool = True
    reason: str | None = None

    @property
    def end(self) -> int:
        """The first address after the part."""
        return self.ipa + self.size_bytes


class PartSource:
    """The tags of parts that ascend and do not overlap; a `TagSource`."""

    def __init__(self, stream: BinaryIO, name: str, info: GuestInfo, parts: Sequence[Part]) -> None:
        self.name = name
        self.info = info
        self.memslots = info.memslots
        self.page_size_bytes = info.page_size_bytes
        self._stream = stream
        self._parts = parts
        self._starts = [part.ipa for part in parts]

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return [Extent(part.ipa, part.size_bytes) for part in self._parts]

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`: reading a file allocates nothing."""

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`. Raises BadFormatError for a byte that is not a tag."""
        for extent in extents:
            at = extent.ipa
            index = max(bisect_right(self._starts, at) - 1, 0)
            for part in self._parts[index:]:
                if part.ipa >= extent.end:
                    break
                if part.end <= at:
                    continue
                if part.ipa > at:
                    yield Missing(at, part.ipa - at, None, "not in the file")
                    at = part.ipa
                stop = min(part.end, extent.end)
                yield from self._part(part, at, stop)
                at = stop
            if at < extent.end:
                yield Missing(at, extent.end - at, None, "not in the file")

    def _part(self, part: Part, ipa: int, end: int) -> Iterator[Step]:
        if part.reason is not None:
            yield Missing(ipa, end - ipa, None, part.reason)
            return
        while ipa < end:
            n_granules = min(_PIECE_GRANULES, (end - ipa) // GRANULE_BYTES)
            first = (ipa - part.ipa) // GRANULE_BYTES
            if part.packed:
                yield Copied(ipa, self._unpacked(part, first, n_granules))
            else:
                yield from self._plain(part, ipa, first, n_granules)
            ipa += n_granules * GRANULE_BYTES

    def _unpacked(self, part: Part, first: int, n_granules: int) -> memoryview:
        start, stop = first // 2, -(-(first + n_granules) // 2)
        packed = read_at(self._stream, part.offset + start, stop - start, self.name)
        tags = memoryview(bytearray(2 * len(packed)))
        unpack(packed, tags)
        return tags[first % 2 :][:n_granules]

    def _plain(self, part: Part, ipa: int, first: int, n_granules: int) -> Iterator[Step]:
        offset = part.offset + first
        data = bytearray(read_at(self._stream, offset, n_granules, self.name))
        tags = as_array(data)
        if not (tags > TAG_MAX).any():
            yield Copied(ipa, memoryview(data))
            return
        self._check(tags, offset)
        starts, lengths, missing = runs((tags == RAW_MISSING).astype(np.uint8))
        rows = zip(starts.tolist(), lengths.tolist(), missing.tolist(), strict=True)
        for start, length, gone in rows:
            at = ipa + start * GRANULE_BYTES
            if gone:
                yield Missing(at, length * GRANULE_BYTES, None, "the byte for a missing tag, 0xff")
            else:
                yield Copied(at, memoryview(data)[start : start + length])

    def _check(self, tags: Tags, offset: int) -> None:
        wrong = np.flatnonzero((tags > TAG_MAX) & (tags != RAW_MISSING))
        if wrong.size:
            byte = int(tags[wrong[0]])
            raise BadFormatError(
                f"{self.name}: {byte:#04x} at byte {offset + int(wrong[0]):,} is not a tag: there"
                " are 16, from 0x00 to 0x0f, and 0xff for a missing one",
                hint="for two tags a byte, use --from packed",
                offset=offset + int(wrong[0]),
            )


def laid_out(
    stream: BinaryIO,
    name: str,
    info: GuestInfo,
    places: Sequence[Extent],
    n_bytes: int,
    *,
    packed: bool,
) -> PartSource:
    """The tags of a file with nothing but tags, for `places` one after another.

    Raises BadFormatError unless the file has exactly as many bytes as that takes.
    """
    parts, at = [], 0
    for place in places:
        n_granules = place.size_bytes // GRANULE_BYTES
        parts.append(Part(place.ipa, place.size_bytes, at, packed))
        at += n_granules // 2 if packed else n_granules
    if at != n_bytes:
        per_byte = 2 if packed else 1
        whole = n_bytes * per_byte * GRANULE_BYTES
        raise BadFormatError(
            f"{name} has {counted(n_bytes, 'byte')}, and the memory given takes {at:,}"
            f" ({'two tags' if packed else 'one tag'} a byte)",
            hint=f"the file is for {whole:#x} bytes of memory: give all of it, in the file's order,"
            " by --memslot IPA:SIZE or --range IPA:SIZE",
        )
    return PartSource(stream, name, info, sorted(parts))
