"""Save: QEMU's migration stream and the guest's tags, in one file.

When the last section of RAM has passed, the guest stands still: QEMU has stopped it, or whoever
manages it did so before. So that is when all tags are read, and they stand in the file before the
rest of the stream. Nothing is held back from QEMU, which does not know whether anybody reads; it
learns of a failure by the end of the pipe.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtetool import __version__
from mtetool.errors import GuestLostError, MteOffError, host_error
from mtetool.guest import Extent, Guest
from mtetool.relay import guests
from mtetool.relay.frames import Kind
from mtetool.relay.outgoing import Outgoing
from mtetool.relay.placing import Placed
from mtetool.relay.report import News, Report
from mtetool.relay.saved import PIECE_BYTES, SavedWriter
from mtetool.relay.stream import RamStream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from mtetool.files.sink import Sink

# Tags are asked for in parts of so much memory, for which there are lists of pages.
_PART_BYTES = 1 << 30
_NEWS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Source:
    """The guest whose QEMU writes to our pipe; `ready` is None if it has no MTE."""

    name: str
    guest: Guest
    ready: guests.Ready | None


def wait_for_stream(fd: int) -> bool:
    """Wait until QEMU has written something, which is not read; return whether it did."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return any(event & select.POLLIN for _, event in poll.poll())


def open_source(fd: int, wanted: guests.Wanted) -> Source:
    """Open the guest of the QEMU that has written to this pipe. Raises GuestError."""
    name, guest = guests.open_at_pipe(wanted, fd, writes=True)
    try:
        return Source(name, guest, guests.ready(guest, name))
    except MteOffError:
        return Source(name, guest, None)
    except BaseException:
        guest.close()
        raise


def save(fd: int, out: Sink, source: Source, news: News) -> Report:
    """Write QEMU's stream from `fd` and the guest's tags to `out`. The guest is closed then.

    Raises MtetoolError: then `out` has no end, and nobody will load it.
    """
    started = time.monotonic()
    with source.guest, SavedWriter(out) as writer:
        saving = _Saving(fd, writer, source, news)
        saving.run()
        saving.report.elapsed_seconds = time.monotonic() - started
        return saving.report


class _Saving:
    def __init__(self, fd: int, writer: SavedWriter, source: Source, news: News) -> None:
        self._fd = fd
        self._writer = writer
        self._source = source
        self._news = news
        self._stream = RamStream()
        self._held = bytearray()
        self._told = 0.0
        self.report = Report("save", guest=source.name, peer=socket.gethostname())

    def run(self) -> None:
        source, writer = self._source, self._writer
        hello: dict[str, object] = {"host": socket.gethostname(), "mtetool": __version__}
        writer.put_map(Kind.HELLO, hello)
        if source.ready is None:
            self._news.say(f"{source.name} has no MTE: its stream is saved without tags")
        else:
            writer.put_map(Kind.READY, source.ready.fields())
        rest = self._memory()
        writer.put(Kind.END_OF_RAM)
        self._tags()
        self._tail(rest)
        writer.finish()
        self._count()
        self.report.finished = True

    def _memory(self) -> bytes:
        """Write the stream up to the end of RAM; return what was read beyond."""
        while piece := self._read():
            at = self._stream.feed(piece)
            self._keep(piece if at is None else piece[:at])
            if at is not None:
                self._flush()
                return piece[at:]
            if time.monotonic() - self._told > _NEWS_SECONDS:
                self._count()
                self._told = time.monotonic()
        raise _ended("all memory")

    def _tail(self, piece: bytes) -> None:
        piece = piece or self._read()
        if not piece:
            raise _ended("the state of the devices")
        while piece:
            self._keep(piece)
            piece = self._read()
        self._flush()

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, PIECE_BYTES)
        except OSError as error:
            raise host_error(error, "standard input") from error

    def _keep(self, piece: bytes) -> None:
        self.report.stream_bytes += len(piece)
        self._held += piece
        if len(self._held) >= PIECE_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            self._writer.data(self._held)
            self._held = bytearray()

    def _tags(self) -> None:
        ready, report = self._source.ready, self.report
        if ready is not None:
            self._news.say("all memory has passed; its tags are read")
            _all_tags(self._source.guest, ready, self._emit, report)
        self._writer.put_map(Kind.ALL_TAGS, {"pages": report.tag_pages})

    def _emit(self, packed: bytes) -> None:
        self._writer.put(Kind.TAGS, packed)

    def _count(self) -> None:
        stream, report = self._stream, self.report
        report.machine = stream.machine
        report.stream_pages = stream.n_records
        total = sum(block.size_bytes for block in stream.blocks)
        report.memory_pages = total // stream.page_bytes if total else None
        report.file_bytes = self._writer.written_bytes
        self._news.update(report)


def _ended(what: str) -> GuestLostError:
    return GuestLostError(
        f"QEMU ended its stream before {what} had passed",
        hint="see why: query-migrate, virsh domjobinfo, QEMU's log",
    )


def _all_tags(
    guest: Guest, ready: guests.Ready, emit: Callable[[bytes], object], report: Report
) -> None:
    """Read all tags, and emit those of pages that have any. Raises GuestError."""
    page = ready.page_size_bytes
    report.read_pages, report.rounds = 0, 1
    for part in _parts(ready.memory):
        marks = np.zeros(part.size_bytes // page, np.uint8)
        for there in guest.may_be_tagged(part):
            marks[(there.ipa - part.ipa) // page : (there.end - part.ipa) // page] = 1
        if not marks.any():
            continue
        outgoing = Outgoing(guest, [Placed(0, 0, part.ipa, part.size_bytes)], page)
        outgoing.round([marks], emit)
        sent = outgoing.sent
        report.read_pages += sent.read_pages
        report.tag_pages += sent.pages
        report.tag_bytes += sent.bytes
        report.copy_seconds += sent.read_seconds


def _parts(memory: Sequence[Extent]) -> Iterator[Extent]:
    for extent in memory:
        for ipa in range(extent.ipa, extent.end, _PART_BYTES):
            yield Extent.between(ipa, min(ipa + _PART_BYTES, extent.end))


def settle(fd: int) -> None:
    """Wait until a file is on the disk, so that nobody relies on one that is not.

    Raises HostError.
    """
    if stat.S_ISREG(os.fstat(fd).st_mode):
        try:
            os.fsync(fd)
        except OSError as error:
            raise host_error(error, "standard output") from error
