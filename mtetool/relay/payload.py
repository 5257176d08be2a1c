"""Tags of scattered pages, as a TAGS frame carries them.

The extents' addresses and sizes, then two tags a byte, compressed by zstd. All numbers are
little-endian. Nobody believes it: every length is checked before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from mtetool import loops
from mtetool.errors import RelayPeerError
from mtetool.guest import Extent
from mtetool.snapshot.frames import FrameError, content
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mtetool.tags import Tags

_HEAD = Struct("<II")  # number of extents, number of granules
MOST_GRANULES = 1 << 20
"""The most in one frame: 1 MiB of tags, of 16 MiB of memory."""
_LEVEL = 1


def pack(extents: NDArray[np.uint64], tags: Tags) -> bytes:
    """The payload for extents (a row each: address, size in bytes) and all their tags."""
    packed = np.empty(len(tags) // 2, np.uint8)
    loops.pack(tags, packed)
    head = _HEAD.pack(len(extents), len(tags))
    places = extents.astype("<u8").tobytes()
    return head + places + zstandard.ZstdCompressor(_LEVEL).compress(packed.tobytes())


def unpack(payload: bytes | bytearray, page_bytes: int) -> tuple[NDArray[np.uint64], Tags]:
    """The extents and tags of a payload, whose extents are whole pages of the sender's.

    Raises RelayPeerError for anything that `pack` does not make.
    """
    if len(payload) < _HEAD.size:
        raise _wrong("it is too short")
    n_extents, n_granules = _HEAD.unpack_from(payload)
    end = _HEAD.size + 16 * n_extents
    if not 0 < n_granules <= MOST_GRANULES or n_granules % 2 or end > len(payload):
        raise _wrong(f"{n_extents} extents with {n_granules} granules")
    extents = np.frombuffer(payload[_HEAD.size : end], "<u8").reshape(-1, 2).astype(np.uint64)
    sizes = extents[:, 1]
    page = np.uint64(page_bytes)
    most = np.uint64(n_granules * GRANULE_BYTES)
    if (extents % page).any() or not sizes.all() or (sizes > most).any() or sizes.sum() != most:
        raise _wrong("its extents are not whole pages, or not as long as its tags")
    if (extents[:, 0] > np.uint64((1 << 63) - 1)).any():
        raise _wrong("an address is not a guest's")
    try:
        packed = content(bytes(payload[end:]), n_granules // 2, n_granules // 2)
    except FrameError as error:
        raise _wrong(str(error)) from error
    tags = np.empty(n_granules, np.uint8)
    loops.unpack(packed, tags)
    return extents, tags


def check_inside(extents: NDArray[np.uint64], memory: Sequence[Extent]) -> None:
    """Check that all extents lie in the guest's memory. Raises RelayPeerError."""
    inside = np.zeros(len(extents), bool)
    starts, ends = extents[:, 0], extents[:, 0] + extents[:, 1]
    for extent in memory:
        inside |= (starts >= np.uint64(extent.ipa)) & (ends <= np.uint64(extent.end))
    if not inside.all():
        first = int(starts[~inside][0])
        raise _wrong(f"this guest has no memory that takes tags at {first:#x}")


def _wrong(what: str) -> RelayPeerError:
    return RelayPeerError(
        f"the other relay sent tags that make no sense: {what}",
        hint="install the same version of mtetool on both hosts",
        reason=f"tags that make no sense: {what}",
    )
