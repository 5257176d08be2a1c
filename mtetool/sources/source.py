"""One way to read tags from any source: a guest, a snapshot in a file or from a pipe."""

from __future__ import annotations

import heapq
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from typing import BinaryIO, Protocol, cast

from mtetool.errors import UsageError, host_error
from mtetool.guest import AddressSpace, Extent, Guest, Memslot, Missing
from mtetool.snapshot.index import Entry, IndexedSnapshot
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.snapshot.summary import is_seekable
from mtetool.sources.ahead import MOST_RESULTS, ahead
from mtetool.sources.allocating import check_allocates_nothing
from mtetool.sources.copying import Copied, Fill, Step, TagReader, cut, tagged_layout
from mtetool.sources.layout import (
    check_aligned,
    check_inside,
    common,
    merged,
    slot_extents,
    slots_of,
)
from mtetool.uapi import GRANULE_BYTES


class TagSource(Protocol):
    """A source of tags for some extents of guest memory."""

    @property
    def name(self) -> str:
        """The name that the user gave it."""
        ...

    @property
    def page_size_bytes(self) -> int:
        """The page size of the guest's host."""
        ...

    @property
    def memslots(self) -> Sequence[Memslot]:
        """The guest's memory layout, in order of address; of a snapshot, that at its save."""
        ...

    def extents(self) -> list[Extent]:
        """The memory that it covers, in order of address."""
        ...

    def check(self, extents: Sequence[Extent]) -> None:
        """Raise WouldAllocateError if reading these would allocate unwanted memory."""
        ...

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """The tags of ascending extents of whole granules, in order of address.

        Every granule of the extents is in exactly one of the results, whose tags are valid
        until the next step. Raises GuestError, SnapshotError.
        """
        ...


def asked(source: TagSource, ranges: Sequence[Extent], slots: Sequence[int] = ()) -> list[Extent]:
    """The extents to read from a source: the requested ranges, slots (by id), or all of it.

    Raises MisalignedError for parts of granules, RangeError for a range outside all of it,
    UsageError for a slot that it does not have, WouldAllocateError.
    """
    extents = held = merged(source.extents())
    if ranges and slots:
        raise UsageError("--range and --slot exclude each other")
    if slots:
        extents = slot_extents(source.memslots, slots, source.name)
        check_inside(extents, held, source.name)
    if ranges:
        check_aligned(ranges, GRANULE_BYTES, "granule")
        check_inside(ranges, held, source.name)
        extents = merged(ranges)
    source.check(extents)
    return extents


@contextmanager
def seekable_stream(stream: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """The stream of a snapshot, or a checked copy of one that comes through a pipe."""
    if is_seekable(stream):
        yield stream
        return
    with _spool(stream, name) as spool:
        yield spool


class GuestSource:
    """The tags that a guest has now."""

    def __init__(self, guest: Guest, name: str, *, every_page: bool = False) -> None:
        self.name = name
        self.page_size_bytes = guest.page_size_bytes
        self._guest = guest
        self._every_page = every_page
        self._layout = tagged_layout(guest, name)
        self.memslots = self._layout.slots
        self._reader = TagReader(guest, self._layout, insist=every_page)

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`: all slots but those of devices."""
        return self._layout.taggable

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`."""
        check_allocates_nothing(self._guest, extents, self.name, every_page=self._every_page)

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        return self._reader.read_granules(extents, every_page=self._every_page)

    def address_spaces(self, vcpu: int | None) -> Sequence[AddressSpace] | None:
        """See `Guest.address_spaces`."""
        return self._guest.address_spaces(vcpu)


class SnapshotSource:
    """The tags of a snapshot in a file, read by its index."""

    def __init__(self, snapshot: IndexedSnapshot, name: str) -> None:
        self.name = name
        self.header = snapshot.header
        self.page_size_bytes = snapshot.header.page_size_bytes
        self.memslots = slots_of(snapshot.header)
        self._snapshot = snapshot
        self._entries = list(_in_force(snapshot.entries()))
        self._starts = [extent.ipa for extent, _ in self._entries]

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`: the scope of the snapshot."""
        return list(self._snapshot.header.scope)

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`: reading a file allocates nothing."""

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`; tags are decompressed in threads, ahead of their use."""
        return ahead(self._steps(extents, _Rooms()))

    def read_kept(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """As `read`; all tags stay valid, and may be written to."""
        return ahead(self._steps(extents))

    def _steps(
        self, extents: Sequence[Extent], rooms: _Rooms | None = None
    ) -> Iterator[Step | Callable[[], Step]]:
        for extent in extents:
            at = extent.ipa
            entries = islice(self._entries, max(bisect_right(self._starts, at) - 1, 0), None)
            current = next(entries, None)
            while at < extent.end:
                while current is not None and current[0].end <= at:
                    current = next(entries, None)
                if current is None or current[0].ipa > at:
                    stop = min(extent.end, current[0].ipa if current else extent.end)
                    yield Missing(at, stop - at, None, "not in the snapshot")
                else:
                    stop = min(extent.end, current[0].end)
                    yield self._load(current[1], Extent(at, stop - at), rooms)
                at = stop

    def _load(self, entry: Entry, part: Extent, rooms: _Rooms | None) -> Step | Callable[[], Step]:
        record = self._snapshot.load(entry)
        if isinstance(record, Missing):
            return cut(record, part.ipa, part.size_bytes)
        if record.fill is not None:
            step = Fill(record.ipa, record.size_bytes, record.fill, record.over_base)
            return cut(step, part.ipa, part.size_bytes)
        room = rooms.next(record.n_granules) if rooms else None
        return partial(_decoded, record, part, room)


def _decoded(record: Piece, part: Extent, room: memoryview | None) -> Step:
    tags = record.tags(room)
    return cut(Copied(record.ipa, tags, record.over_base), part.ipa, part.size_bytes)


class _Rooms:
    """Buffers that are used in turn by what `ahead` calls: new ones would cost page faults."""

    def __init__(self) -> None:
        self._rooms = [bytearray() for _ in range(MOST_RESULTS)]
        self._next = 0

    def next(self, n_bytes: int) -> memoryview:
        """The buffer whose turn it is, so large."""
        at, self._next = self._next, (self._next + 1) % len(self._rooms)
        if len(self._rooms[at]) < n_bytes:
            self._rooms[at] = bytearray(n_bytes)
        return memoryview(self._rooms[at])[:n_bytes]


def _in_force(entries: Iterable[Entry]) -> Iterator[tuple[Extent, Entry]]:
    """Which record counts where, in order of address: a later one replaces earlier ones."""
    by_ipa = sorted(
        ((entry.ipa, entry.ipa + entry.size_bytes, -number, entry))
        for number, entry in enumerate(entries)
    )
    # The record with the highest number is on top; records that have ended are dropped late.
    open_now: list[tuple[int, int, Entry]] = []
    at = index = 0
    while index < len(by_ipa) or open_now:
        if not open_now:
            at = by_ipa[index][0]
        while index < len(by_ipa) and by_ipa[index][0] <= at:
            _, end, number, entry = by_ipa[index]
            heapq.heappush(open_now, (number, end, entry))
            index += 1
        while open_now and open_now[0][1] <= at:
            heapq.heappop(open_now)
        if not open_now:
            continue
        _, end, entry = open_now[0]
        stop = min(end, by_ipa[index][0]) if index < len(by_ipa) else end
        yield Extent(at, stop - at), entry
        at = stop


class _Copying:
    """A stream that keeps a copy of what is read from it."""

    def __init__(self, stream: BinaryIO, copy: BinaryIO) -> None:
        self._stream = stream
        self._copy = copy

    def read(self, n_bytes: int = -1) -> bytes:
        data = self._stream.read(n_bytes)
        with _about_spool():
            self._copy.write(data)
        return data


@contextmanager
def _spool(stream: BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Copy a snapshot from a pipe to a file without a name, checked on the way.

    A source that is not a snapshot fails at its first bytes, and fills no disk.
    """
    with _about_spool():
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    # Closed by hand: `with` would flush once more after an error.
    try:
        for _ in SnapshotReader(cast(BinaryIO, _Copying(stream, spool)), name):
            pass
        with _about_spool():
            spool.seek(0)
        yield spool
    finally:
        with suppress(OSError):
            spool.close()


@contextmanager
def _about_spool() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = "a snapshot from a pipe could not be copied to the directory for temporary files"
        told = host_error(error, what)
        told.hint = "use another directory: TMPDIR=DIRECTORY mtetool ...; or save to a file first"
        raise told from error


def clip(source: TagSource, within: Sequence[Extent] | None) -> list[Extent]:
    """The extents of a source, cut to `within`."""
    held = merged(source.extents())
    return held if within is None else common(held, within)
