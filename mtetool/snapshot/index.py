"""A snapshot in a file, read through the index at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Self

from mtetool.errors import DamagedError, host_error
from mtetool.guest import Missing
from mtetool.snapshot.heads import DoneHead, decode_done, decode_missing
from mtetool.snapshot.ledger import Ledger, LedgerError
from mtetool.snapshot.model import Footer, Header, Summary
from mtetool.snapshot.reader import Piece, SnapshotReader, index_entries, piece_of, tags_head
from mtetool.snapshot.records import (
    DONE,
    END_MAGIC,
    INDEX_ENTRY,
    INDX,
    MISS,
    TAGS,
    TRAILER,
    ByteSource,
    Record,
    read_record,
)
from mtetool.uapi import GRANULE_BYTES


class Entry(NamedTuple):
    """Where a record of tags or of missing tags is, and what it covers."""

    offset: int
    ipa: int
    granules: int
    kind: bytes
    length_bytes: int

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory."""
        return self.granules * GRANULE_BYTES


class IndexedSnapshot:
    """Header, end and index of a snapshot; the records in between are read on demand.

    The checksum of every record that is read is compared; records that are not read may be damaged.
    """

    def __init__(self, stream: BinaryIO, name: str, header: Header, size: int, end: int) -> None:
        self._stream = stream
        self._name = name
        self.header = header
        self._file_bytes = size
        self._first = stream.tell()
        self._end = end
        # Only for its checks of ranges; nothing is entered into it.
        self._ledger = Ledger(header)
        self._done = self._read_done()

    @classmethod
    def of(cls, stream: BinaryIO, name: str) -> Self:
        """A snapshot in a regular file. Raises SnapshotError, HostIoError."""
        header = SnapshotReader(stream, name).header
        try:
            first = stream.tell()
            size = os.fstat(stream.fileno()).st_size
            stream.seek(max(first, size - TRAILER.size))
            trailer = stream.read(TRAILER.size)
            stream.seek(first)
        except OSError as error:
            raise host_error(error, f"{name}: reading failed") from error
        if len(trailer) == TRAILER.size:
            end, magic = TRAILER.unpack(trailer)
            if magic == END_MAGIC and first <= end < size:
                return cls(stream, name, header, size, end)
        # Something is wrong with the file, and reading it front to back shows what.
        try:
            stream.seek(0)
        except OSError as error:
            raise host_error(error, f"{name}: seeking failed") from error
        for _ in SnapshotReader(stream, name):
            pass
        raise DamagedError(f"{name} has no index")

    def _record_at(self, offset: int) -> Record:
        try:
            self._stream.seek(offset)
        except OSError as error:
            raise host_error(error, f"{self._name}: seeking failed") from error
        source = ByteSource(self._stream, self._name, offset)
        return read_record(source, None, self.header.chunk_granules)

    def _damaged(self, offset: int, problem: str) -> DamagedError:
        return DamagedError(f"{self._name}: the record at byte {offset}: {problem}", offset=offset)

    def _read_done(self) -> DoneHead:
        record = self._record_at(self._end)
        if record.kind != DONE:
            raise self._damaged(self._end, "it is not the end record, which must be here")
        if self._end + record.length_bytes + TRAILER.size != self._file_bytes:
            raise self._damaged(self._end, "the file continues after the end record")
        done = decode_done(
            record.head,
            f"{self._name}: the end record",
            has_base=self.header.base_id is not None,
        )
        if record.sequence != done.footer.records:
            raise self._damaged(self._end, "the end record miscounts the records before it")
        if not self._first <= done.index_offset <= self._end:
            raise self._damaged(self._end, "the index is outside the file")
        return done

    def entries(self) -> Iterator[Entry]:
        """The entries of the index, all checked, in the order of the log."""
        offset = self._done.index_offset
        behind = self._first
        for _ in range(self._done.index_records):
            if offset >= self._end:
                raise self._damaged(offset, "the index continues after the end record")
            record = self._record_at(offset)
            if record.kind != INDX:
                raise self._damaged(offset, "it is not the index, which must be here")
            index_entries(record, self._name)
            for values in INDEX_ENTRY.iter_unpack(record.payload):
                entry = Entry(*values)
                self._check_entry(entry, behind, offset)
                behind = entry.offset + entry.length_bytes
                yield entry
            offset += record.length_bytes
        if offset != self._end:
            raise self._damaged(offset, "the index does not end where the end record starts")

    def _check_entry(self, entry: Entry, behind: int, offset: int) -> None:
        end = entry.offset + entry.length_bytes
        if entry.offset < behind or end > self._done.index_offset or not entry.length_bytes:
            raise self._damaged(offset, "an index entry points to a wrong place")
        if entry.kind not in (TAGS, MISS):
            raise self._damaged(offset, f"an index entry of kind {entry.kind!r}")
        try:
            self._ledger.check(entry.ipa, entry.size_bytes)
        except LedgerError as error:
            raise self._damaged(offset, f"the index: {error}") from error

    def load(self, entry: Entry) -> Piece | Missing:
        """Read the record that an entry names. Raises SnapshotError."""
        record = self._record_at(entry.offset)
        where = f"{self._name}: the record at byte {entry.offset}"
        result: Piece | Missing
        if record.kind == TAGS:
            head = tags_head(record, self._name, self.header)
            result = piece_of(record, head, self._name, self.header)
        elif record.kind == MISS:
            result = decode_missing(record.head, where)
        else:
            raise DamagedError(f"{where} is not what the index says")
        found = Entry(
            record.offset,
            result.ipa,
            result.size_bytes // GRANULE_BYTES,
            record.kind,
            record.length_bytes,
        )
        if found != entry or result.size_bytes % GRANULE_BYTES:
            raise DamagedError(f"{where} is not what the index says")
        return result

    def summary(self) -> Summary:
        """Summarise the header, the end, the index and the records of missing tags."""
        ledger = Ledger(self.header)
        try:
            for entry in self.entries():
                missing = self.load(entry) if entry.kind == MISS else None
                if isinstance(missing, Missing):
                    ledger.miss(missing)
                else:
                    ledger.seen(entry.ipa, entry.granules)
            counted = ledger.footer(self._done.footer.records, self._done.footer.consistent)
        except LedgerError as error:
            raise DamagedError(f"{self._name}: {error}") from error
        footer = self._done.footer
        if (counted.granules, counted.missing_bytes) != (footer.granules, footer.missing_bytes):
            raise DamagedError(f"{self._name}: the totals do not match the index")
        return Summary(self.header, footer, ledger.missing.ranges(), self._file_bytes)

    @property
    def footer(self) -> Footer:
        """The totals from the end record."""
        return self._done.footer
