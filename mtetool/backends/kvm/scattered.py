"""Copies of many scattered pages, built as arrays: no Python for each page."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mtetool import loops, uapi
from mtetool.attach import chain_room
from mtetool.backends.kvm.transfer import COPY_GRANULES, UNREAD
from mtetool.extents import n_granules_of, parts

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from mtetool.backends.kvm.transfer import Transfer

_READ, _WRITE = uapi.KVM_ARM_TAGS_FROM_GUEST, uapi.KVM_ARM_TAGS_TO_GUEST
_WORDS = chain_room.ARGUMENT_BYTES // 8


def read(transfer: Transfer, extents: NDArray[np.uint64], out: memoryview) -> int | None:
    """Read the tags of extents into `out`, in their order.

    Returns how many granules were read before the first that could not be; None if chains are not
    possible here. Raises GuestError.
    """
    transfer.drain()
    session = transfer.session
    done = 0
    for part in parts(extents, chain_room.MOST_CALLS, COPY_GRANULES):
        n_granules = n_granules_of(part)
        session.write_buffer(_unread(n_granules), 0)
        if not session.finish(transfer.chain(_arguments(transfer, part, 0, _READ).tobytes())):
            return None
        tags = out[done : done + n_granules]
        session.read_buffer(tags, 0)
        found = np.frombuffer(tags, np.uint8)
        good = n_granules
        if found.size and found.max() > uapi.TAG_MAX:
            good = int((found > uapi.TAG_MAX).argmax())
        done += good
        if good < n_granules:
            break
    return done


def write(
    transfer: Transfer, extents: NDArray[np.uint64], tags: memoryview, page_granules: int
) -> int | None:
    """Write the tags of extents, and read them back.

    Returns how many granules were found equal before the first page that was not; None as for
    `read`.
    """
    transfer.drain()
    session = transfer.session
    done = 0
    for part in parts(extents, chain_room.MOST_CALLS // 2, COPY_GRANULES // 2):
        n_granules = n_granules_of(part)
        wanted = tags[done : done + n_granules]
        session.write_buffer(wanted, 0)
        session.write_buffer(_unread(n_granules), n_granules)
        calls = (
            _arguments(transfer, part, 0, _WRITE),
            _arguments(transfer, part, n_granules, _READ),
        )
        if not session.finish(transfer.chain(np.concatenate(calls).tobytes())):
            return None
        found = memoryview(bytearray(n_granules))
        session.read_buffer(found, n_granules)
        good = loops.first_difference(found, wanted)
        done += good // page_granules * page_granules
        if good < n_granules:
            break
    return done


def _arguments(
    transfer: Transfer, extents: NDArray[np.uint64], at: int, flags: int
) -> NDArray[np.uint64]:
    """The ioctls' arguments, one a row: struct kvm_arm_copy_mte_tags."""
    words = np.zeros((len(extents), _WORDS), np.uint64)
    n_granules = extents[:, 1] // np.uint64(uapi.GRANULE_BYTES)
    words[:, :2] = extents
    words[:, 2] = (
        np.uint64(transfer.session.buffer_address + at) + np.cumsum(n_granules) - n_granules
    )
    words[:, 3] = flags
    return words


_ALL_UNREAD = memoryview(bytearray([UNREAD]) * COPY_GRANULES)


def _unread(n_granules: int) -> memoryview:
    return _ALL_UNREAD[:n_granules]
