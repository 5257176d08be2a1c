"""A guest that is read shall have no more memory afterwards, unless the user wants that."""

from __future__ import annotations

from collections.abc import Iterable

from mtetool.errors import WouldAllocateError
from mtetool.guest import Extent, Guest
from mtetool.sources.layout import merged, total_bytes

# The unit in which a kernel makes memory where it makes the most of it at a time: a huge page.
_TOLERATED_BYTES = 2 << 20


def check_allocates_nothing(
    guest: Guest, extents: Iterable[Extent], name: str, *, every_page: bool
) -> None:
    """Check that reading or writing tags of 0 in `extents` leaves the guest's memory as it is.

    Raises WouldAllocateError, before anything is read, where the guest would be given more than a
    little memory and `every_page` does not say that it may be.
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
            f" {total_bytes(asked)} bytes to be read, and it is not known which of its pages exist",
            hint="say where the memory is: a monitor (--qmp SOCKET), or --memslot"
            " IPA:SIZE@ADDRESS; or allocate it: --every-page",
            would_allocate_bytes=n_bytes,
        )
