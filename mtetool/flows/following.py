"""Read a live guest again and again, and find what changed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import BinaryIO, cast

from mtetool.errors import host_error
from mtetool.flows.diff import Difference, diff
from mtetool.flows.save import SaveOptions, save
from mtetool.guest import Extent, Guest
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.sources.layout import check_aligned
from mtetool.sources.source import SnapshotSource
from mtetool.uapi import GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class Round:
    """A read of the guest, at a `time` in seconds since the epoch.

    `changes` are those since the read before, `a` the old tag, in order of address. They must be
    iterated before the next round.
    """

    time: float
    extents: list[Extent]
    missing_bytes: int
    changes: Iterator[Difference]


def follow(
    opening: Callable[[], AbstractContextManager[Guest]],
    *,
    ranges: Sequence[Extent] = (),
    slots: Sequence[int] = (),
    every_page: bool = False,
    interval_seconds: float = 1.0,
    count: int | None = None,
) -> Iterator[Round]:
    """Read a guest `count` times (None: for ever), and yield each round; the first has no changes.

    Each read opens the guest anew, by `opening`, and leaves it at its end, so that nothing is held
    in between. The last tags are kept in a file without a name, compressed: memory is bounded.
    Raises what opening and saving raise.
    """
    check_aligned(ranges, GRANULE_BYTES, "granule")
    last: _Read | None = None
    n = 0
    try:
        while count is None or n < count:
            started, now = time.monotonic(), time.time()
            current = _read(opening, ranges, slots, every_page=every_page)
            changes = _changes(last, current, ranges) if last is not None else iter(())
            yield Round(now, current.extents, current.missing_bytes, changes)
            if last is not None:
                last.close()
            last, n = current, n + 1
            if count is None or n < count:
                time.sleep(max(interval_seconds - (time.monotonic() - started), 0))
    finally:
        if last is not None:
            last.close()


@dataclass
class _Read:
    """The tags of one moment, in a file without a name."""

    stream: BinaryIO
    extents: list[Extent]
    missing_bytes: int

    def source(self, name: str) -> SnapshotSource:
        self.stream.seek(0)
        return SnapshotSource(IndexedSnapshot.of(self.stream, name), name)

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()


def _read(
    opening: Callable[[], AbstractContextManager[Guest]],
    ranges: Sequence[Extent],
    slots: Sequence[int],
    *,
    every_page: bool,
) -> _Read:
    try:
        stream = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115 - kept for the next round
    except OSError as error:
        raise _about_spool(error) from error
    try:
        with opening() as guest:
            pages = tuple(_whole_pages(guest, ranges))
            wanted = SaveOptions(ranges=pages, slots=tuple(slots), every_page=every_page)
            result = save(guest, stream, wanted)
        stream.flush()
    except OSError as error:
        stream.close()
        raise _about_spool(error) from error
    except BaseException:
        stream.close()
        raise
    return _Read(stream, list(result.scope), result.missing.size_bytes)


def _about_spool(error: OSError) -> Exception:
    told = host_error(error, "tags could not be kept in the directory for temporary files")
    told.hint = "use another directory: TMPDIR=DIRECTORY mtetool ..."
    return told


def _whole_pages(guest: Guest, ranges: Sequence[Extent]) -> Iterator[Extent]:
    page = guest.page_size_bytes
    for extent in ranges:
        yield Extent.between(extent.ipa // page * page, -(-extent.end // page) * page)


def _changes(last: _Read, current: _Read, ranges: Sequence[Extent]) -> Iterator[Difference]:
    before, after = last.source("the last read"), current.source("this read")
    for found in diff(before, after, list(ranges) or None):
        if isinstance(found, Difference):
            yield found
