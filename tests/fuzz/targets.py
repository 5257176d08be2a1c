"""What the fuzzer does with each input, and what must hold for any input."""

from __future__ import annotations

import io
import os
import random
import time
from pathlib import Path
from typing import BinaryIO, cast

from mtetool.backends.emu.file import read_header
from mtetool.backends.emu.guest import create_emulated, open_emulated
from mtetool.errors import (
    MtetoolError,
    SnapshotError,
    StreamDamagedError,
    StreamUnsupportedError,
)
from mtetool.flows.restore import RestoreOptions, restore
from mtetool.guest import GuestOptions, Memslot, Missing
from mtetool.relay.stream import RamStream
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.reader import Piece, SnapshotReader
from mtetool.tags import as_array
from mtetool.uapi import GRANULE_BYTES
from tests.relay import streams
from tests.snapshot import second_reader
from tests.snapshot.forge import BASE, PAGE, random_tags

Log = list[tuple[str, int, int]]

# The independent reader keeps all pages in memory, and is slow.
_SECOND_READER_BYTES = 1 << 20
_SECONDS = 1.0
_SECONDS_PER_BYTE = 1e-6


class FindingError(AssertionError):
    """Something that must never happen."""


def read_snapshot(data: bytes) -> bool:
    """Give an input to all readers; return if it was accepted. Raises FindingError and bugs."""
    started = time.process_time()
    log, work_bytes = _front_to_back(data)
    _by_index(data, log)
    took = time.process_time() - started
    if took > _SECONDS + _SECONDS_PER_BYTE * (len(data) + work_bytes):
        raise FindingError(f"{took:.1f} s for {len(data)} bytes that hold {work_bytes}")
    _as_the_page_says(data, log)
    return log is not None


def _front_to_back(data: bytes) -> tuple[Log | None, int]:
    """The records of the log, None if the file was refused; and the bytes of tags seen."""
    log: Log = []
    work_bytes = 0
    try:
        reader = SnapshotReader(io.BytesIO(data), "input")
        for piece in reader:
            log.append(_entry(piece))
            if isinstance(piece, Piece) and piece.n_granules <= reader.header.chunk_granules:
                tags = as_array(piece.tags())
                work_bytes += piece.n_granules
                if tags.size != piece.n_granules or bool((tags > 15).any()):
                    raise FindingError(f"{tags.size} tags of {piece.n_granules}, or more than 15")
        if reader.footer.missing_bytes != sum(missing.size_bytes for missing in reader.missing):
            raise FindingError("the footer does not count what is missing")
    except SnapshotError as error:
        if error.status != 5:
            raise FindingError(f"{error.id} has status {error.status}") from error
        return None, work_bytes
    return log, work_bytes


def _entry(piece: Piece | Missing) -> tuple[str, int, int]:
    kind = "MISS" if isinstance(piece, Missing) else "TAGS"
    return kind, piece.ipa, piece.size_bytes // GRANULE_BYTES


def _by_index(data: bytes, log: Log | None) -> None:
    """Check that the index agrees with the log, and that a sound file is not refused."""
    fd = os.memfd_create("input")
    with open(fd, "w+b", buffering=0) as file:  # noqa: PTH123
        file.write(data)
        file.seek(0)
        found: Log = []
        try:
            snapshot = IndexedSnapshot.of(cast(BinaryIO, file), "input")
            snapshot.summary()
            found = [_entry(snapshot.load(entry)) for entry in snapshot.entries()]
        except SnapshotError as error:
            if log is not None:
                raise FindingError(f"refused by its index only: {error}") from error
            return
        if log is not None and found != log:
            raise FindingError("the index and the log have different records")


def _as_the_page_says(data: bytes, log: Log | None) -> None:
    """Check that a reader made from mtesnap(5) alone accepts and refuses the same files."""
    if not _is_small(data):
        return
    try:
        contents = second_reader.read(data)
    except second_reader.RefusedError as error:
        if log is not None:
            raise FindingError(f"accepted, though mtesnap(5) says: {error}") from error
        return
    if log is None:
        raise FindingError("refused, though mtesnap(5) allows it")
    if contents.log != log:
        raise FindingError("the reader made from mtesnap(5) reads other records")


def _is_small(data: bytes) -> bool:
    """Whether no record describes much memory."""
    try:
        reader = SnapshotReader(io.BytesIO(data), "input")
        scope = reader.header.scope
        if sum(extent.size_bytes for extent in scope) > _SECOND_READER_BYTES:
            return False
    except SnapshotError:
        # Only the head has been read by then: cheap for either reader.
        return len(data) < 1 << 14
    return reader.header.chunk_granules <= 1 << 16


class Restorer:
    """Restores inputs into an emulated guest; a refused input must leave it as it was."""

    def __init__(self, directory: Path) -> None:
        self._path = str(directory / "guest")
        slots = (Memslot(0, 0, 4 * PAGE, True, "rom"), Memslot(1, BASE, 64 * PAGE))
        create_emulated(self._path, memslots=slots, force=True)
        with open_emulated(self._path, GuestOptions()) as guest:
            guest.write_tags(BASE, random_tags(64))
        self._content = Path(self._path).read_bytes()

    def __call__(self, data: bytes) -> bool:
        """Return whether an input was restored. Raises FindingError and bugs."""

        def reader() -> SnapshotReader:
            return SnapshotReader(io.BytesIO(data), "input")

        with open_emulated(self._path, GuestOptions()) as guest:
            try:
                result = restore(reader, guest, RestoreOptions(), again=True)
            except MtetoolError as error:
                if Path(self._path).read_bytes() != self._content:
                    raise FindingError(f"refused ({error.id}), and tags were written") from error
                return False
        if result.status not in (0, 3):
            raise FindingError(f"a restore with status {result.status}")
        Path(self._path).write_bytes(self._content)
        return True


def read_emulated_guest(data: bytes) -> bool:
    """Open an input as the file of an emulated guest, and read its header."""
    fd = os.memfd_create("input")
    try:
        os.write(fd, data)
        described = read_header(fd, "input")
    except MtetoolError as error:
        if error.status != 4:
            raise FindingError(f"{error.id} has status {error.status}") from error
        return False
    finally:
        os.close(fd)
    return bool(described.memslots)


def follow_stream(data: bytes) -> bool:
    """Follow a migration stream, with changes that the input selects, whole and in pieces."""
    rng = random.Random(data)  # noqa: S311
    stream = streams.changed(streams.random_stream(rng), rng)
    started = time.process_time()
    whole = _followed(stream, len(stream))
    if _followed(stream, rng.choice((1, 7, 100, 4096))) != whole:
        raise FindingError("a stream ends differently in pieces")
    if time.process_time() - started > _SECONDS:
        raise FindingError(f"{time.process_time() - started:.1f} s for {len(stream)} bytes")
    return isinstance(whole, tuple)


def _followed(stream: bytes, piece_bytes: int) -> object:
    parser = RamStream()
    try:
        for at in range(0, len(stream), piece_bytes):
            held = parser.feed(stream[at : at + piece_bytes])
            if held is not None:
                break
    except (StreamDamagedError, StreamUnsupportedError) as error:
        return error.message
    end = None if held is None else at + held
    return end, parser.blocks, [marks.tobytes() for marks in parser.marks]
