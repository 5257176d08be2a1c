"""A file with a guest's migration stream and its tags: how it is cut, checked and compressed.

It is `PROLOGUE` with a magic of its own, then frames as between two relays (`relay.frames`), each
with its number in its checksum, so that a record that is missing, twice, damaged or in another's
place is found, and an end that is missing, too:

    HELLO        a map: who wrote it
    READY        a map: the memory that takes tags. Not there for a guest without MTE
    DATA...      QEMU's stream up to the footer of RAM's end section
    END_OF_RAM
    TAGS...      all tags that are not 0, and no others
    ALL_TAGS     a map: of how many pages
    DATA...      the rest of the stream: the state of the devices
    EOF_DATA     that was all of the stream
    BYE          and the file ends here

A DATA frame holds the number of bytes (u32, little-endian), and these as a frame of zstd.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from struct import Struct
from typing import Self

import zstandard

from mtetool.errors import (
    DamagedError,
    NotASnapshotError,
    RelayPeerError,
    TruncatedError,
    UnknownVersionError,
    host_error,
    no_thread,
)
from mtetool.files.fields import Fields, pack_map, unpack_map
from mtetool.files.sink import Sink
from mtetool.relay.frames import HEADER, PROLOGUE, Frame, Kind, check, header, parse_header
from mtetool.snapshot.frames import FrameError, content

MAGIC = b"mtesaved"
VERSION = 1
PIECE_BYTES = 1 << 20
"""QEMU's stream is cut into pieces of about that size; one has at most twice as many bytes."""

_SIZE = Struct("<I")
_LEVEL = 1
_MOST_JOBS = 4
_PIECES_PER_JOB = 2  # one that is compressed, and one that waits for that
_DAMAGED_HINT = "use another copy of the file; this one has changed since it was written"


class SavedWriter:
    """Writes such a file, front to back; used as a context manager, in one thread.

    Pieces of the stream are compressed in threads, a few at a time. Leaving the context without
    `finish` leaves a file without its end, which every reader refuses. Errors of `out` pass
    through unchanged.
    """

    def __init__(self, out: Sink) -> None:
        self._out = out
        self._number = 0
        jobs = min(len(os.sched_getaffinity(0)), _MOST_JOBS)
        self._most_waiting = jobs * _PIECES_PER_JOB
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="compress")
        self._local = threading.local()
        self._waiting: deque[Future[bytes]] = deque()
        self.written_bytes = 0
        self._put(PROLOGUE.pack(MAGIC, VERSION, 0))

    def data(self, piece: bytes | bytearray) -> None:
        """Add a piece of QEMU's stream, which must not change any more. Raises HostError."""
        try:
            self._waiting.append(self._pool.submit(self._compressed, piece))
        except RuntimeError as error:
            raise no_thread("compressing", error) from error
        while len(self._waiting) > self._most_waiting:
            self._write(Kind.DATA, self._waiting.popleft().result())

    def put(self, kind: Kind, payload: bytes = b"") -> None:
        """Add a record of another kind."""
        while self._waiting:
            self._write(Kind.DATA, self._waiting.popleft().result())
        self._write(kind, payload)

    def put_map(self, kind: Kind, values: dict[str, object]) -> None:
        """Add a record whose payload is a map."""
        self.put(kind, pack_map(values))

    def finish(self) -> None:
        """Write the end."""
        self.put(Kind.EOF_DATA)
        self.put(Kind.BYE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _compressed(self, piece: bytes | bytearray) -> bytes:
        compressor = getattr(self._local, "compressor", None)
        if compressor is None:
            compressor = self._local.compressor = zstandard.ZstdCompressor(_LEVEL)
        compressed: bytes = compressor.compress(piece)
        return _SIZE.pack(len(piece)) + compressed

    def _write(self, kind: Kind, payload: bytes) -> None:
        self._put(header(self._number, kind, [payload]))
        self._put(payload)
        self._number += 1

    def _put(self, data: bytes) -> None:
        self.written_bytes += len(data)
        self._out.write(data)


class SavedReader:
    """Reads such a file from a descriptor, of which `before` was read already.

    Every method raises NotASnapshotError, TruncatedError, DamagedError or UnknownVersionError for
    a file that is not whole and sound as far as it was read, and HostError.
    """

    def __init__(self, fd: int, name: str, before: bytes = b"") -> None:
        self._fd = fd
        self._name = name
        self._before = before
        self._number = 0
        self.read_bytes = 0

    def start(self) -> Fields:
        """Read the beginning; return the map of its HELLO."""
        prologue = self._read(PROLOGUE.size)
        if prologue[: len(MAGIC)] != MAGIC[: len(prologue)] or not prologue:
            raise NotASnapshotError(
                f"{self._name} is not a file that mtetool relay save has written",
                hint="decompress and load it by what wrote it; tags alone: mtetool restore",
            )
        self._need(prologue, PROLOGUE.size)
        _, version, flags = PROLOGUE.unpack(prologue)
        if version != VERSION or flags:
            raise UnknownVersionError(
                f"{self._name} has version {version} of the format"
                f"{f' with the flags {flags:#x}' if flags else ''}; this mtetool knows version"
                f" {VERSION}",
                hint="update mtetool",
                version=version,
            )
        return self.map(Kind.HELLO)

    def record(self) -> Frame:
        """Read the next record, whose checksum is right."""
        at = self.read_bytes
        try:
            head = parse_header(self._exactly(HEADER.size))
            payload = self._exactly(head.length)
            check(self._number, head, payload)
        except RelayPeerError as error:
            raise self.damaged(str(error.details.get("reason")), at) from error
        self._number += 1
        return Frame(head.kind, payload)

    def map(self, kind: Kind) -> Fields:
        """Read the next record, which must be of that kind, and holds a map."""
        return self.fields(self.record(), kind)

    def fields(self, record: Frame, kind: Kind) -> Fields:
        """The map of a record, which must be of that kind."""
        self.check_kind(record, kind)
        return unpack_map(bytes(record.payload), f"{self._name}: the {kind.name} record")

    def check_kind(self, record: Frame, *kinds: Kind) -> None:
        """Check that it is a record of one of these kinds."""
        if record.kind not in kinds:
            raise self.damaged(f"a {record.kind.name} record, whose turn it is not")

    def data(self, record: Frame) -> bytes:
        """Decompress the piece of QEMU's stream in a DATA record."""
        size = _SIZE.unpack_from(record.payload)[0] if len(record.payload) >= _SIZE.size else -1
        if not 0 <= size <= 2 * PIECE_BYTES:
            raise self.damaged("a DATA record of an impossible size")
        try:
            return content(bytes(record.payload[_SIZE.size :]), size, size)
        except FrameError as error:
            raise self.damaged(f"in a DATA record, {error}") from error

    def end(self) -> None:
        """Check that nothing follows."""
        if self._read(1):
            raise self.damaged("bytes after its end")

    def damaged(self, what: str, offset: int | None = None) -> DamagedError:
        """The error for something that no writer makes, in front of the place of reading."""
        offset = self.read_bytes if offset is None else offset
        message = f"{self._name} is damaged at byte {offset:,}: {what}"
        return DamagedError(message, hint=_DAMAGED_HINT, offset=offset)

    def _exactly(self, n: int) -> bytes:
        data = self._read(n)
        self._need(data, n)
        return data

    def _need(self, data: bytes, n: int) -> None:
        if len(data) < n:
            raise TruncatedError(
                f"{self._name} ends at byte {self.read_bytes:,}, in the middle",
                hint="use another copy of the file; this one was cut off",
                offset=self.read_bytes,
            )

    def _read(self, n: int) -> bytes:
        data, self._before = self._before[:n], self._before[n:]
        if len(data) < n:
            try:
                data += read_fully(lambda most: os.read(self._fd, most), n - len(data))
            except OSError as error:
                raise host_error(error, self._name) from error
        self.read_bytes += len(data)
        return data


def read_fully(read: Callable[[int], bytes], n: int) -> bytes:
    """Read n bytes in as many calls as it takes; fewer at the end. Raises what `read` raises."""
    pieces = []
    while n and (piece := read(n)):
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)
