"""Pieces of a snapshot in bounded portions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from mtetool.flows.copying import CHUNK_GRANULES
from mtetool.snapshot.model import Extent
from mtetool.snapshot.reader import Piece
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags

Progress = Callable[[int, int], None]
"""Called with the bytes of guest memory that are done and those there are in all."""


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """Nobody wants to know."""


def chunks(piece: Piece, within: Extent | None = None) -> Iterator[tuple[int, Tags]]:
    """A piece's tags with their addresses; only those `within` (whole granules, in the piece).

    A fill may span a terabyte: it comes in chunks. Raises DamagedError where the tags cannot
    be decompressed. The arrays are only valid until the next step, and not to be written to.
    """
    start, stop = (within.ipa, within.end) if within else (piece.ipa, piece.end)
    if piece.fill is None:
        first, last = ((at - piece.ipa) // GRANULE_BYTES for at in (start, stop))
        yield start, piece.tags()[first:last]
        return
    n_granules = (stop - start) // GRANULE_BYTES
    constant = np.full(min(n_granules, CHUNK_GRANULES), piece.fill, dtype=np.uint8)
    for done in range(0, n_granules, CHUNK_GRANULES):
        yield start + done * GRANULE_BYTES, constant[: min(CHUNK_GRANULES, n_granules - done)]
