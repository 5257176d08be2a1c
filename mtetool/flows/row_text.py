"""Rows about tags as text, many at a time: there can be hundreds of millions."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mtetool import loops
from mtetool.buffers import as_bytes
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.pieces import constant
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer
    from mtetool.flows.dump import Wanted

_OUT_BYTES = 1 << 20
_BLOCK_GRANULES = 1 << 16
_ALL_TAGS = 0xFFFF
_RUN = struct.Struct("<5Q")


class RowText:
    """Turns tags into rows, as `mtetool.loops` documents them; each ends with a newline.

    The tags come in order of address. `is_json` makes lines of JSON, `each` a row for each granule.
    What is yielded is valid until the next one.
    """

    def __init__(self, *, is_json: bool, each: bool = False, wanted: Wanted | None = None) -> None:
        self._form = int(is_json)
        self._each = each
        self._wanted = _ALL_TAGS
        if wanted is not None:
            self._wanted = sum(1 << tag for tag in range(16) if wanted[tag])
        self._run = bytearray(_RUN.size)
        self._out = bytearray(_OUT_BYTES)

    @property
    def n_rows(self) -> int:
        """How many rows were made."""
        return int(_RUN.unpack(self._run)[3])

    @property
    def size_bytes(self) -> int:
        """How much guest memory the rows are about."""
        return int(_RUN.unpack(self._run)[4])

    def add(self, step: Copied | Fill) -> Iterator[memoryview]:
        """Rows about tags; of the last run, once it is known where it ends."""
        if isinstance(step, Copied):
            yield from self._rows(step.tags, b"", 1, step.ipa)
            return
        n_granules = step.size_bytes // GRANULE_BYTES
        if not self._each:
            yield from self._rows(bytes([step.tag]), b"", n_granules, step.ipa)
            return
        for first in range(0, n_granules, _BLOCK_GRANULES):
            tags = constant(step.tag, min(_BLOCK_GRANULES, n_granules - first))
            yield from self._rows(tags, b"", 1, step.ipa + first * GRANULE_BYTES)

    def compare(
        self, ipa: int, a: TagBuffer, b: TagBuffer, repeat: int = 1
    ) -> Iterator[memoryview]:
        """Rows about what differs between two lots of tags, each for `repeat` granules."""
        yield from self._rows(a, b, repeat, ipa)

    def end(self, *, two: bool = False) -> Iterator[memoryview]:
        """The row of the last run, if there is one; of two tags for `compare`.

        Also before anything that stands between two rows.
        """
        start, size, key, n_rows, n_bytes = _RUN.unpack(self._run)
        if not size:
            return
        # A run that is nowhere near is the end of any other.
        nowhere = start + size + (1 << 20)
        tags = (bytes([1]), bytes([2])) if two else (bytes([key ^ 1]), b"")
        yield from self._rows(*tags, 1, nowhere)
        _, _, _, n_rows, n_bytes = _RUN.unpack(self._run)
        _RUN.pack_into(self._run, 0, 0, 0, 0, n_rows, n_bytes)

    def _rows(self, a: TagBuffer, b: TagBuffer, repeat: int, ipa: int) -> Iterator[memoryview]:
        left, right = as_bytes(a), as_bytes(b)
        out = memoryview(self._out)
        while len(left):
            taken, written = loops.rows(
                left, right, repeat, ipa, self._form, self._each, self._wanted, self._run, out
            )
            if written:
                yield out[:written]
            left, right = left[taken:], right[taken:]
            ipa += taken * repeat * GRANULE_BYTES
