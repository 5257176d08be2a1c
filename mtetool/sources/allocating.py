"""Reading a guest must not allocate memory for it, unless the user wants that."""

from __future__ import annotations

from collections.abc import Iterable

from mtetool.errors import WouldAllocateError
from mtetool.guest import Extent, Guest
from mtetool.sources.layout import merged, total_bytes

# The largest unit in which a kernel allocates memory: a huge page.
_TOLERATED_BYTES = 2 << 20


def check_allocates_nothing(
    guest: Guest, extents: Iterable[Extent], name: str, *, every_page: bool
) -> None:
    """Check that reading, or writing tags of 0, in `extents` allocates no memory in the guest.

    Raises WouldAllocateError, before anything is read, where the guest would get more than a little
    memory and `every_page` does not allow it.
    """
    if every_page:
        return
    page = guest.page_size_bytes
    whole = [
        Extent(at := extent.ipa // page * page, -(-extent.end // page) * page - at)
        for extent in extents
    ]
    asked = merged(whole)
    n_bytes = guest.would_make(asked)
    if n_bytes > _TOLERATED_BYTES:
        raise WouldAllocateError(
            f"up to {n_bytes} bytes of memory would be newly allocated in {name}: it has"
            f" {total_bytes(asked)} bytes to read, and it is unknown which of its pages exist",
            hint="say where the memory is (--qmp SOCKET or --memslot IPA:SIZE@ADDRESS), or allow"
            " the allocation with --every-page",
            would_allocate_bytes=n_bytes,
        )
