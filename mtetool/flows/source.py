"""One way to read tags from whatever has them: a guest, a snapshot file, a pipe."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING, Protocol

from mtetool.backends import GuestOptions, is_guest, open_guest
from mtetool.backends.base import Guest
from mtetool.flows.copying import Copied, TagReader
from mtetool.flows.layout import check_aligned, check_inside, common, layout_of, merged
from mtetool.flows.pieces import chunks
from mtetool.snapshot.model import Extent, Missing
from mtetool.snapshot.reader import SnapshotReader, open_snapshot
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.tags import Tags


class TagSource(Protocol):
    """What has tags for some extents of guest memory."""

    name: str
    page_size_bytes: int

    def extents(self) -> list[Extent]:
        """The memory that it speaks of, in order of address."""
        ...

    def clip(self, within: Sequence[Extent] | None) -> list[Extent]:
        """Its extents, cut to `within`."""
        ...

    def read(self, extents: Sequence[Extent]) -> Iterator[Copied | Missing]:
        """The tags of ascending extents of whole granules, in order of address.

        Each result's tags are valid until the next step. Raises GuestError, SnapshotError.
        """
        ...
