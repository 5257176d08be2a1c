"""Load: a file with QEMU's migration stream and tags, into a QEMU that waits for it.

QEMU gets the stream up to the end of RAM. The rest, without which it does not start the guest, is
kept until the whole file has been read and found sound, and all tags are in the guest and were
read back. On any doubt the pipe is closed before.
"""

from __future__ import annotations

import fcntl
import os
import select
import stat
import termios
import time
from tempfile import SpooledTemporaryFile
from typing import IO, TYPE_CHECKING

from mtetool.errors import (
    GuestLostError,
    RelayPeerError,
    StreamDamagedError,
    StreamUnsupportedError,
    host_error,
)
from mtetool.relay import guests
from mtetool.relay.frames import Frame, Kind
from mtetool.relay.incoming import Incoming
from mtetool.relay.report import News, Report
from mtetool.relay.saved import PIECE_BYTES, SavedReader
from mtetool.relay.stream import BEGINNING, RamStream
from mtetool.words import counted, printable

if TYPE_CHECKING:
    from mtetool.files.fields import Fields

# The state of devices is usually below one MiB; that of assigned ones may be large.
_IN_MEMORY_BYTES = 64 << 20
_LOOK_MS = 10
_NEWS_SECONDS = 0.5
_NOT_STARTED = "the guest was not started, and the file is as it was"


def load(reader: SavedReader, out: int, wanted: guests.Wanted, news: News) -> Report:
    """Pass the stream in a file on to the QEMU that reads from `out`, with all tags in place.

    Raises MtetoolError: then QEMU did not get the end of the stream, and does not start the guest,
    unless the error says so. It always gets the stream's beginning, without which it would wait.
    """
    return _Loading(reader, out, wanted, news).run()


class _Loading:
    def __init__(self, reader: SavedReader, out: int, wanted: guests.Wanted, news: News) -> None:
        self._reader = reader
        self._out = out
        self._wanted = wanted
        self._news = news
        self._told = 0.0
        self._ahead = len(BEGINNING)
        self.report = Report("load")

    def run(self) -> Report:
        started = time.monotonic()
        reader, report = self._reader, self.report
        self._write(BEGINNING)
        self._wanted.check()
        self._hello(reader.start())
        record, there = reader.record(), None
        if record.kind is Kind.READY:
            fields = reader.fields(record, Kind.READY)
            there = guests.Ready.read(fields)
            fields.end()
            record = reader.record()
        self._memory(record)
        ram_ended = time.monotonic()
        self._tags(there)
        with SpooledTemporaryFile(_IN_MEMORY_BYTES) as tail:
            self._keep_tail(tail)
            report.held_seconds = time.monotonic() - ram_ended
            self._news.say(
                "all tags are in place and were read back: the guest may start"
                if there is not None
                else "the file has no tags: its guest has no MTE"
            )
            tail.seek(0)
            while piece := tail.read(PIECE_BYTES):
                self._pass_on(piece)
        report.finished = True
        report.elapsed_seconds = time.monotonic() - started
        self._update()
        return report

    def _hello(self, fields: Fields) -> None:
        self.report.peer = printable(fields.text("host"))
        fields.text("mtetool")
        fields.end()

    def _memory(self, record: Frame) -> None:
        """Pass everything up to the end of RAM on, and nothing beyond, whatever the file says."""
        stream = RamStream()
        while record.kind is not Kind.END_OF_RAM:
            self._reader.check_kind(record, Kind.DATA)
            data = self._reader.data(record)
            try:
                at = stream.feed(data)
            except (StreamDamagedError, StreamUnsupportedError) as error:
                raise self._reader.damaged(error.message) from error
            if at not in (None, len(data)):
                raise self._reader.damaged("a DATA record that goes beyond the end of RAM")
            self._pass_on(data)
            if time.monotonic() - self._told > _NEWS_SECONDS:
                self._told = time.monotonic()
                self._update()
            record = self._reader.record()
        if not stream.done:
            raise self._reader.damaged("its memory is not whole")
        self.report.machine = stream.machine
        self.report.stream_pages = stream.n_records

    def _pass_on(self, data: bytes) -> None:
        self.report.stream_bytes += len(data)
        had, self._ahead = self._ahead, max(self._ahead - len(data), 0)
        self._write(data[had:])

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._out, left) :]
        except BrokenPipeError:
            raise self._gone() from None
        except OSError as error:
            raise host_error(error, "standard output") from error

    def _gone(self) -> GuestLostError:
        return GuestLostError(
            "QEMU closed the pipe before it had read the whole stream",
            hint=f"see why in its log; {_NOT_STARTED}",
        )

    # --- tags ------------------------------------------------------------------------------

    def _tags(self, there: guests.Ready | None) -> None:
        record = self._reader.record()
        if there is None:
            self._check_all(record)
            return
        self._wait_until_read()
        name, guest = guests.open_at_pipe(self._wanted, self._out, writes=False)
        self.report.guest = name
        with guest:
            here = guests.ready(guest, name)
            guests.check_same_memory(there.memory, here.memory)
            started = time.monotonic()
            incoming = Incoming(guest, here.memory, there.page_size_bytes, otherwise=_NOT_STARTED)
            incoming.clear()
            while record.kind is Kind.TAGS:
                self._apply(incoming, record)
                record = self._reader.record()
            self._check_all(record)
            self.report.copy_seconds = time.monotonic() - started

    def _apply(self, incoming: Incoming, record: Frame) -> None:
        self.report.tag_bytes += len(record.payload)
        try:
            incoming.apply(record.payload)
        except RelayPeerError as error:
            raise self._reader.damaged(str(error.details.get("reason"))) from error
        self.report.tag_pages = incoming.applied.pages
        self.report.rounds = incoming.applied.frames

    def _check_all(self, record: Frame) -> None:
        fields = self._reader.fields(record, Kind.ALL_TAGS)
        wanted = fields.integer("pages", 0, 1 << 63)
        fields.end()
        if wanted != self.report.tag_pages:
            n_pages = counted(self.report.tag_pages, "page")
            raise self._reader.damaged(f"it has the tags of {n_pages}, and speaks of {wanted:,}")

    def _wait_until_read(self) -> None:
        """Wait until QEMU has read all that was written.

        Until then it may not have been started: libvirt starts what fills the pipe before.
        """
        if not stat.S_ISFIFO(os.fstat(self._out).st_mode):
            return
        poll = select.poll()
        poll.register(self._out, 0)  # an error is reported anyway: there is no reader any more
        while int.from_bytes(fcntl.ioctl(self._out, termios.FIONREAD, bytes(4)), "little"):
            if poll.poll(_LOOK_MS):
                raise self._gone()
        if poll.poll(0):
            raise self._gone()

    # --- the end ---------------------------------------------------------------------------

    def _keep_tail(self, tail: IO[bytes]) -> None:
        reader = self._reader
        while (record := reader.record()).kind is Kind.DATA:
            self._spool(tail, reader.data(record))
        if not tail.tell():
            raise reader.damaged("it has no state of devices")
        for kind in (Kind.EOF_DATA, Kind.BYE):
            reader.check_kind(record, kind)
            if kind is Kind.EOF_DATA:
                record = reader.record()
        reader.end()
        self.report.file_bytes = reader.read_bytes

    def _spool(self, tail: IO[bytes], data: bytes) -> None:
        try:
            tail.write(data)
        except OSError as error:
            raise host_error(error, "the temporary file for the state of the devices") from error

    def _update(self) -> None:
        self.report.file_bytes = self._reader.read_bytes
        self._news.update(self.report)
