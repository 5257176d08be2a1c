"""Pieces of a snapshot in bounded portions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from mtetool.flows.copying import CHUNK_GRANULES
from mtetool.snapshot.reader import Piece
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags

Progress = Callable[[int, int], None]
"""Called with the bytes of guest memory that are done and those there are in all."""


def no_progress(done_bytes: int, total_bytes: int) -> None:
    """Nobody wants to know."""


def chunks(piece: Piece) -> Iterator[tuple[int, Tags]]:
    """A piece's tags with their addresses. A fill may span a terabyte: it comes in chunks.

    Raises DamagedError where the tags cannot be decompressed. The arrays are only valid
    until the next step, and not to be written to.
    """
    if piece.fill is None:
        yield piece.ipa, piece.tags()
        return
    constant = np.full(min(piece.n_granules, CHUNK_GRANULES), piece.fill, dtype=np.uint8)
    for first in range(0, piece.n_granules, CHUNK_GRANULES):
        yield (
            piece.ipa + first * GRANULE_BYTES,
            constant[: min(CHUNK_GRANULES, piece.n_granules - first)],
        )
