"""Read a snapshot front to back, from any stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, BinaryIO

from mtetool.buffers import as_bytes
from mtetool.errors import (
    DamagedError,
    NotASnapshotError,
    TruncatedError,
    UnknownVersionError,
)
from mtetool.files.kinds import EMULATED_MAGIC
from mtetool.guest import Missing
from mtetool.snapshot.heads import (
    DoneHead,
    TagsHead,
    decode_done,
    decode_header,
    decode_index,
    decode_missing,
    decode_tags,
)
from mtetool.snapshot.ledger import Ledger, LedgerError
from mtetool.snapshot.model import CHUNK_GRANULES, Footer, Header
from mtetool.snapshot.records import (
    CHECKSUM,
    DONE,
    END_MAGIC,
    HEAD,
    INDEX_ENTRY,
    INDX,
    MAGIC,
    MAX_RECORDS,
    MISS,
    PROLOGUE,
    TAGS,
    TRAILER,
    VERSION,
    ByteSource,
    Digest,
    Record,
    read_record,
)
from mtetool.uapi import GRANULE_BYTES
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer


@dataclass(frozen=True, slots=True)
class Piece:
    """The tags of some memory; `fill` is the one tag of all of it, or None.

    With `over_base` they are the exclusive-or of the tags and those of the snapshot's base.
    `stored_bytes` is the size of the record in the file.
    """

    ipa: int
    n_granules: int
    fill: int | None
    stored_bytes: int
    over_base: bool
    _where: str = field(repr=False, compare=False)
    _payload: bytes = field(repr=False)
    _max_granules: int = field(repr=False, compare=False)
    _page_granules: int = field(repr=False, compare=False)
    # What the record's head says about its tags: how many are not 0, and in how many pages.
    _tagged: tuple[int, int] = field(repr=False)
    _runs: int | None = field(repr=False, compare=False)
    _split: tuple[int, int] | None = field(repr=False, compare=False)

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory."""
        return self.n_granules * GRANULE_BYTES

    @property
    def end(self) -> int:
        """The first address after it."""
        return self.ipa + self.size_bytes

    def tags(self, out: TagBuffer | None = None) -> memoryview:
        """Write the tags, one byte a granule, to `out` (of that length) or to a new buffer.

        Raises DamagedError where they cannot be decompressed or do not match the record's head, and
        ValueError for a fill that is longer than the snapshot's chunks: it may cover a terabyte.
        """
        if self.fill is not None and self.n_granules > self._max_granules:
            raise ValueError(f"a fill of {self.n_granules} granules at once")
        view = as_bytes(bytearray(self.n_granules) if out is None else out)
        if self.fill is not None:
            view[:] = bytes([self.fill]) * self.n_granules
            return view
        # Imported here, because reading only the description needs no decompression.
        from mtetool import loops
        from mtetool.snapshot.frames import FrameError, decode

        try:
            decode(self._payload, view, runs=self._runs, split=self._split)
        except FrameError as error:
            raise DamagedError(f"{self._where}: {error}", ipa=self.ipa) from error
        # The footer's totals are sums of these, and `info` prints them without looking at tags.
        _, tagged, pages, _ = loops.scan(view, self._page_granules)
        if (tagged, pages) != self._tagged:
            raise DamagedError(f"{self._where}: its tags do not match its head", ipa=self.ipa)
        return view


class SnapshotReader:
    """Reads a snapshot from a stream, front to back; iterated once.

    The header is read at once. Iterating yields the records of tags and of missing tags in the
    order in which they were written; a later one replaces earlier ones, and the checksum of each
    has been compared. The iteration ends only when the snapshot is known to be whole: totals,
    index, coverage, and nothing after the end.

    Raises NotASnapshotError, UnknownVersionError, TruncatedError, DamagedError, HostIoError.
    """

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self._source = ByteSource(stream, name)
        self._digest = Digest()
        self.header = self._read_header()
        self._ledger = Ledger(self.header)
        self._page_granules = self.header.page_size_bytes // GRANULE_BYTES
        self._sequence = 1
        # What the index must say, and what it says, without keeping either.
        self._expected_index, self._index = Digest(), Digest()
        self._index_offset: int | None = None
        self._index_records = 0
        self._footer: Footer | None = None
        self._pieces = self._read_pieces()

    def __iter__(self) -> Iterator[Piece | Missing]:
        return self._pieces

    @property
    def footer(self) -> Footer:
        """The totals. Raises RuntimeError before the iteration has ended."""
        if self._footer is None:
            raise RuntimeError("the snapshot was not read to its end")
        return self._footer

    @property
    def missing(self) -> tuple[Missing, ...]:
        """The missing ranges so far: ascending, neighbours with one cause joined."""
        return self._ledger.missing.ranges()

    @property
    def offset(self) -> int:
        """The number of bytes read so far."""
        return self._source.offset

    def _read_header(self) -> Header:
        prologue = _read_prologue(self._source)
        record = read_record(self._source, 0, CHUNK_GRANULES, prologue)
        self._digest.add(CHECKSUM.pack(record.checksum))
        if record.kind != HEAD:
            raise DamagedError(f"{self._source.name} does not start with a header")
        return decode_header(record.head, f"{self._source.name}: the header")

    def _read_pieces(self) -> Iterator[Piece | Missing]:
        while True:
            record = read_record(self._source, self._sequence, self.header.chunk_granules)
            if record.kind == DONE:
                self._finish(record)
                return
            self._sequence += 1
            if self._sequence > MAX_RECORDS:
                raise self._damaged(record, "one record too many")
            self._digest.add(CHECKSUM.pack(record.checksum))
            if record.kind == INDX:
                self._take_index(record)
            elif record.kind == HEAD:
                raise self._damaged(record, "it is a second header")
            elif self._index_offset is not None:
                raise self._damaged(record, "it comes after the index")
            elif record.kind == TAGS or record.kind == MISS:
                yield self._take(record)
            else:
                _check_ignorable(record, self._source.name)

    def _damaged(self, record: Record, problem: str) -> DamagedError:
        return DamagedError(f"{_where(self._source.name, record)}: {problem}", offset=record.offset)

    def _take(self, record: Record) -> Piece | Missing:
        name = self._source.name
        result: Piece | Missing
        try:
            if record.kind == TAGS:
                head = tags_head(record, name, self.header)
                self._ledger.tags(head)
                granules = head.granules
                result = piece_of(record, head, name, self.header)
            else:
                result = decode_missing(record.head, _where(name, record))
                self._ledger.miss(result)
                granules = result.size_bytes // GRANULE_BYTES
        except LedgerError as error:
            raise self._damaged(record, str(error)) from error
        entry = INDEX_ENTRY.pack(
            record.offset, result.ipa, granules, record.kind, record.length_bytes
        )
        self._expected_index.add(entry)
        return result

    def _take_index(self, record: Record) -> None:
        index_entries(record, self._source.name)
        if self._index_offset is None:
            self._index_offset = record.offset
        self._index_records += 1
        self._index.add(record.payload)

    def _finish(self, record: Record) -> None:
        has_base = self.header.base_id is not None
        done = decode_done(record.head, _where(self._source.name, record), has_base=has_base)
        said = done.footer
        try:
            self._ledger.check_changed(said.changed_granules)
            footer = self._ledger.footer(self._sequence, said.consistent, said.changed_granules)
        except LedgerError as error:
            raise self._damaged(record, str(error)) from error
        if self._index_offset is None:
            self._index_offset = record.offset
        expected = DoneHead(footer, self._index_offset, self._index_records, self._digest.value)
        if done != expected:
            raise self._damaged(record, "the totals do not match the records before it")
        if self._index.value != self._expected_index.value:
            raise self._damaged(record, "the index does not match the records before it")
        trailer = self._source.exactly(TRAILER.size, "the end mark")
        if trailer != TRAILER.pack(record.offset, END_MAGIC):
            raise DamagedError(f"{self._source.name}: the end mark is wrong")
        if self._source.read(1):
            raise DamagedError(
                f"{self._source.name} continues after the end of the snapshot,"
                f" which is {self._source.offset - 1} bytes long",
                hint="remove what was appended to it",
            )
        self._footer = footer


# --- shared by the sequential and the indexed reader --------------------------------------------


def _where(name: str, record: Record) -> str:
    return f"{name}: record {record.sequence} at byte {record.offset}"


def tags_head(record: Record, name: str, header: Header) -> TagsHead:
    """The head of a record of tags. Raises DamagedError, UnknownVersionError."""
    where = _where(name, record)
    page_granules = header.page_size_bytes // GRANULE_BYTES
    has_base = header.base_id is not None
    head = decode_tags(record.head, where, page_granules, header.chunk_granules, has_base=has_base)
    if (head.fill is None) != bool(record.payload):
        raise DamagedError(f"{where}: its payload does not fit its encoding")
    return head


def piece_of(record: Record, head: TagsHead, name: str, header: Header) -> Piece:
    """The piece that a record of tags holds."""
    return Piece(
        ipa=head.ipa,
        n_granules=head.granules,
        fill=head.fill,
        stored_bytes=record.length_bytes,
        over_base=head.over_base,
        _where=_where(name, record),
        _payload=record.payload,
        _max_granules=header.chunk_granules,
        _page_granules=header.page_size_bytes // GRANULE_BYTES,
        _tagged=(head.tagged_granules, head.tagged_pages),
        _runs=head.runs,
        _split=head.split,
    )


def index_entries(record: Record, name: str) -> int:
    """How many entries a part of the index has. Raises DamagedError, UnknownVersionError."""
    where = _where(name, record)
    n_entries = decode_index(record.head, where)
    if len(record.payload) != n_entries * INDEX_ENTRY.size:
        raise DamagedError(f"{where}: an index whose size does not fit its {n_entries} entries")
    return n_entries


def _check_ignorable(record: Record, name: str) -> None:
    first = record.kind[:1]
    if not (first.isalpha() and first.islower()):
        raise UnknownVersionError(
            f"{_where(name, record)} is of a kind that this mtetool does not know:"
            f" {record.kind.decode('ascii', 'backslashreplace')!r}",
            hint="update mtetool: a newer one wrote it",
        )


_OTHER_FORMATS = (
    (b"\x1f\x8b", "a gzip file"),
    (b"\x28\xb5\x2f\xfd", "a zstd file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"BZh", "a bzip2 file"),
    (b"PK\x03\x04", "a zip file"),
    (b"\x7fELF", "an ELF file (a core dump?)"),
    (b"QEVM", "a QEMU migration stream"),
    (b"QFI\xfb", "a qcow2 image"),
    (b"\x89PNG", "a PNG image"),
    (EMULATED_MAGIC, "the file of an emulated guest"),
    (b"\x89MTESNP\r\n", "a snapshot that was destroyed when it was transferred as text"),
)


def _looks_like(start: bytes) -> str:
    if not start:
        return "empty"
    for magic, what in _OTHER_FORMATS:
        if start.startswith(magic):
            return what
    if all(byte in b"\t\n\r" or byte >= 32 for byte in start):
        try:
            start.decode()
        except UnicodeDecodeError as error:
            # The end of what was read may cut a character.
            return "text" if error.end >= len(start) and error.start else "some other file"
        return "text"
    return "some other file"


def _path(name: str) -> str:
    return "PATH" if name == "standard input" else name


def _read_prologue(source: ByteSource) -> bytes:
    prologue = source.read(PROLOGUE.size)
    if not prologue.startswith(MAGIC):
        if prologue and MAGIC.startswith(prologue):
            raise TruncatedError(f"{source.name} ends after {counted(len(prologue), 'byte')}")
        what = _looks_like(prologue)
        hint = {
            "a gzip file": "unpack it first: gunzip",
            "a zstd file": "unpack it first: zstd -d",
            "an xz file": "unpack it first: unxz",
            "the file of an emulated guest": f"name it as a guest: emu:{_path(source.name)}",
        }.get(what, "make a snapshot with mtetool save")
        raise NotASnapshotError(f"{source.name} is not a snapshot: it is {what}", hint=hint)
    if len(prologue) < PROLOGUE.size:
        raise TruncatedError(f"{source.name} ends after {counted(len(prologue), 'byte')}")
    _, version, flags = PROLOGUE.unpack(prologue)
    if version != VERSION:
        raise UnknownVersionError(
            f"{source.name} is a snapshot of version {version};"
            f" this mtetool reads version {VERSION}",
            hint="update mtetool: a newer one wrote it",
            version=version,
        )
    if flags:
        raise UnknownVersionError(
            f"{source.name} is a snapshot of version {version} with features ({flags:#x})"
            f" that this mtetool, which reads version {VERSION}, does not know",
            hint="update mtetool: a newer one wrote it",
        )
    return prologue
