"""Records: how the bytes of a snapshot are cut, checked and numbered. See mtesnap(5).

Every length is checked against a bound before anything is read for it, and a record's checksum is
compared before anything in it is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO

from xxhash import xxh3_64, xxh3_64_intdigest

from mtetool.errors import DamagedError, HostIoError, TruncatedError, host_error
from mtetool.files.kinds import SNAPSHOT_MAGIC
from mtetool.words import counted

MAGIC = SNAPSHOT_MAGIC
END_MAGIC = b"\x89MTEEND\n"
VERSION = 1

PROLOGUE = Struct("<8sII")  # magic, version, flags
PREAMBLE = Struct("<4sIII")  # kind, head length, payload length, sequence
CHECKSUM = Struct("<Q")
TRAILER = Struct("<Q8s")  # offset of the end record, end magic
INDEX_ENTRY = Struct("<QQQ4sI")  # offset, ipa, granules, kind, length of the record

PREAMBLE_BYTES = PREAMBLE.size + CHECKSUM.size

HEAD = b"HEAD"
TAGS = b"TAGS"
MISS = b"MISS"
INDX = b"INDX"
DONE = b"DONE"

MAX_HEADER_BYTES = 1 << 20
MAX_HEAD_BYTES = 64 << 10
MAX_INDEX_ENTRIES = 1 << 16
"""The most entries of one index record; a longer index takes several."""
MAX_RECORDS = 1 << 24
MAX_RUNS_SHARE = 4
"""A record of runs has at most one run for this many granules."""
LONG_RUN_GRANULES = 16
"""From this length on, a run's length is stored apart: at most a byte for this many granules."""

# A read asks for this much at once, so a false length costs no more than this.
_READ_BYTES = 1 << 20


def frame_bound(packed_bytes: int) -> int:
    """The most bytes that a zstd frame of that many may take; not below ZSTD_compressBound."""
    return packed_bytes + packed_bytes // 256 + 64


def payload_bound(kind: bytes, chunk_granules: int) -> int:
    """The most payload that a record of this kind may have, in bytes."""
    if kind == TAGS:
        return frame_bound(chunk_granules // 2)
    if kind == INDX:
        return MAX_INDEX_ENTRIES * INDEX_ENTRY.size
    if kind in (HEAD, MISS, DONE):
        return 0
    return frame_bound(chunk_granules // 2)


@dataclass(frozen=True, slots=True)
class Record:
    """A record whose checksum was right; `offset` is where it starts in the snapshot."""

    kind: bytes
    sequence: int
    offset: int
    head: bytes
    payload: bytes
    checksum: int

    @property
    def length_bytes(self) -> int:
        """The whole length of the record in the file."""
        return PREAMBLE_BYTES + len(self.head) + len(self.payload)


def checksum_of(prologue: bytes, preamble: bytes, head: bytes, payload: bytes) -> int:
    """A record's checksum; `prologue` is empty except for the first record."""
    if not payload:
        return int(xxh3_64_intdigest(prologue + preamble + head))
    state = xxh3_64(prologue + preamble + head)
    state.update(payload)
    return int(state.intdigest())


class Digest:
    """A running xxh3 over data that is not kept: the records' checksums, the index's entries."""

    def __init__(self) -> None:
        self._state = xxh3_64()

    def add(self, data: bytes) -> None:
        """Take the next bytes."""
        self._state.update(data)

    @property
    def value(self) -> int:
        """The digest so far."""
        return int(self._state.intdigest())


class ByteSource:
    """A stream that is read front to back, short reads or not; knows its name and position."""

    def __init__(self, stream: BinaryIO, name: str, offset: int = 0) -> None:
        self._stream = stream
        self.name = name
        self.offset = offset

    def read(self, n_bytes: int) -> bytes:
        """Read up to `n_bytes` bytes: fewer only where the stream ends. Raises HostIoError."""
        parts: list[bytes] = []
        left = n_bytes
        while left:
            try:
                part = self._stream.read(min(left, _READ_BYTES))
            except OSError as error:
                what = f"{self.name}: reading failed at byte {self.offset}"
                raise host_error(error, what) from error
            if part is None:
                raise HostIoError(f"{self.name}: a non-blocking stream has nothing to read now")
            if not part:
                break
            parts.append(part)
            left -= len(part)
            self.offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def exactly(self, n_bytes: int, what: str) -> bytes:
        """Read `n_bytes` bytes. Raises TruncatedError where the stream ends before that."""
        start = self.offset
        data = self.read(n_bytes)
        if len(data) < n_bytes:
            raise TruncatedError(
                f"{self.name} ends after {counted(self.offset, 'byte')}, in the middle of {what}"
                f" that starts at byte {start}",
                hint="copy or save it again: the copy was cut short, or the save never finished",
                offset=self.offset,
            )
        return data


def read_record(
    source: ByteSource, sequence: int | None, chunk_granules: int, prologue: bytes = b""
) -> Record:
    """Read the next record, compare its checksum; a `sequence` of None takes any number.

    Raises TruncatedError, and DamagedError naming the record.
    """
    offset = source.offset
    where = f"{source.name}: the record at byte {offset}"
    opening = source.exactly(PREAMBLE_BYTES, "a record")
    kind, head_bytes, payload_bytes, number = PREAMBLE.unpack_from(opening)
    if head_bytes > (MAX_HEADER_BYTES if kind == HEAD else MAX_HEAD_BYTES):
        raise DamagedError(f"{where} declares a head of {head_bytes} bytes", offset=offset)
    if payload_bytes > payload_bound(kind, chunk_granules):
        raise DamagedError(f"{where} declares a payload of {payload_bytes} bytes", offset=offset)
    head = source.exactly(head_bytes, "a record's head")
    payload = source.exactly(payload_bytes, "a record's payload")
    (checksum,) = CHECKSUM.unpack_from(opening, PREAMBLE.size)
    if checksum != checksum_of(prologue, opening[: PREAMBLE.size], head, payload):
        raise DamagedError(
            f"{where} has a wrong checksum",
            hint="use another copy: a disk, a transfer or an editor has changed this file",
            offset=offset,
        )
    if sequence is not None and number != sequence:
        raise DamagedError(
            f"{where} is number {number} where number {sequence} belongs:"
            " records were lost, repeated or moved",
            offset=offset,
        )
    return Record(kind, number, offset, head, payload, checksum)
