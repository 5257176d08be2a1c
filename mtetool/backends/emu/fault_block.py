"""The faults of an emulated guest, in its file: a block of 64 KiB after the tags.

    magic 8 | length u32 | CRC-32 of the rest u32 | msgpack: faults, what they have seen, vanished

in little-endian order, then zeros; a block of zeros means no faults. Only files of guests with
faults have it. A process that reads or changes it locks its bytes, with a lock of the open file:
several processes may read one guest's tags, and each copy counts.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

from mtetool.backends.emu.file import FAULTS_BYTES, damaged, refused, write_all
from mtetool.errors import MtetoolError, UsageError
from mtetool.faults.model import (
    ERRNO_MAX,
    Counted,
    Delay,
    Direction,
    Effect,
    Fail,
    Fault,
    Faults,
    Rate,
    Vanish,
)
from mtetool.files.fields import Fields, pack_map, unpack_map

FAULTS_MAX = 16
"""How many faults one guest may have: they fit into 4096 bytes, so they lie in one page of the
file, and a killed process never leaves half of a change (Linux checks for fatal signals between the
pages of a write: mm/filemap.c, generic_perform_write)."""

_MAGIC = b"MTEFAULT"
_HEAD = struct.Struct("<8sII")
_FLOCK = struct.Struct("@hhqqi0q")
_NUMBER_MAX = (1 << 64) - 1


class FaultsInFile:
    """The faults after a guest's tags; a `Kept` of `mtetool.faults.guest`.

    `at` is where the block is. If the file may not be written, what the faults see counts for this
    object only. The methods raise EmulatorFileError, HostIoError.
    """

    def __init__(self, fd: int, path: str, at: int, *, writable: bool) -> None:
        self._fd = os.dup(fd)
        self._path = path
        self._at = at
        self._writable = writable
        self._own: Faults | None = None

    @contextmanager
    def held(self) -> Iterator[Faults]:
        """The faults, locked for this process until the end of the `with`, which saves changes."""
        if not self._writable:
            if self._own is None:
                self._own = self.read()
            yield self._own
            return
        with self._locked(fcntl.F_WRLCK):
            before = self._load()
            faults = _unpacked(before, self._path)
            yield faults
            after = _packed(faults)
            if after != before:
                self._store(after)

    def read(self) -> Faults:
        """The faults as they are now."""
        with self._locked(fcntl.F_RDLCK):
            return _unpacked(self._load(), self._path)

    def replace(self, faults: Iterable[Fault]) -> None:
        """Replace the faults, or add the first ones; raises UsageError for too many."""
        packed = _packed(Faults.of(faults))
        with self._locked(fcntl.F_WRLCK):
            try:
                os.ftruncate(self._fd, self._at + FAULTS_BYTES)
            except OSError as error:
                raise refused(error, self._path) from error
            try:
                self._store(packed)
            except MtetoolError:
                # A full disk: no faults are better than unreadable ones.
                with suppress(OSError):
                    os.ftruncate(self._fd, self._at)
                raise

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self) -> bytes:
        try:
            block = os.pread(self._fd, FAULTS_BYTES, self._at)
        except OSError as error:
            raise refused(error, self._path) from error
        if len(block) < FAULTS_BYTES:
            raise damaged(self._path, "its faults are truncated")
        magic, length, checksum = _HEAD.unpack_from(block)
        if not any(block):
            return _packed(Faults())
        packed = block[_HEAD.size : _HEAD.size + length]
        if magic != _MAGIC or zlib.crc32(packed) != checksum:
            raise damaged(self._path, "its faults are damaged")
        return packed

    def _store(self, packed: bytes) -> None:
        block = _HEAD.pack(_MAGIC, len(packed), zlib.crc32(packed)) + packed
        try:
            write_all(self._fd, block, self._at)
        except OSError as error:
            raise refused(error, self._path) from error

    @contextmanager
    def _locked(self, kind: int) -> Iterator[None]:
        # A lock of the open file: one of the process would end when any other descriptor closes.
        self._lock(kind)
        try:
            yield
        finally:
            self._lock(fcntl.F_UNLCK)

    def _lock(self, kind: int) -> None:
        lock = _FLOCK.pack(kind, os.SEEK_SET, self._at, FAULTS_BYTES, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLKW, lock)
        except OSError as error:
            raise refused(error, self._path) from error


def _packed(faults: Faults) -> bytes:
    if len(faults.ordered) > FAULTS_MAX:
        raise UsageError(f"{len(faults.ordered)} faults: a guest can have at most {FAULTS_MAX}")
    rows = [
        {
            **_effect_row(fault.effect),
            "on": fault.on,
            "at": fault.at and fault.at[0],
            "size": fault.at and fault.at[1],
            "after": fault.after,
            "every": fault.every,
            # As text, which reads back as the same number.
            "chance": repr(fault.chance),
            "seed": fault.seed,
            "times": fault.times,
            "copies": counted.copies,
            "pages": counted.pages,
            "fired": counted.fired,
        }
        for fault, counted in zip(faults.ordered, faults.counted, strict=True)
    ]
    return pack_map({"faults": rows, "vanished": faults.vanished})


def _effect_row(effect: Effect) -> dict[str, object]:
    if isinstance(effect, Fail):
        return {"effect": "errno", "number": effect.errno}
    if isinstance(effect, Delay):
        return {"effect": "delay", "number": effect.nanoseconds}
    if isinstance(effect, Rate):
        return {"effect": "rate", "number": effect.bytes_per_second}
    return {"effect": "vanish", "number": 0}


def _unpacked(packed: bytes, path: str) -> Faults:
    """Raises EmulatorFileError."""
    try:
        fields = unpack_map(packed, "the faults")
        vanished = fields.truth_or_none("vanished")
        if vanished is None:
            raise fields.wrong("'vanished' is nil")
        faults, ordered = Faults(vanished=vanished), []
        for row in fields.array("faults"):
            fault, counted = _unpacked_fault(Fields(row, "a fault"))
            ordered.append(fault)
            faults.counted.append(counted)
        fields.end()
    # This covers well-formed nonsense: values that a Fault does not take.
    except (MtetoolError, ValueError) as error:
        raise damaged(path, f"its faults make no sense: {error}") from error
    faults.ordered = tuple(ordered)
    return faults


def _unpacked_fault(fields: Fields) -> tuple[Fault, Counted]:
    effect = _unpacked_effect(fields)
    on = fields.text_or_none("on")
    ipa = fields.integer_or_none("at", 0, _NUMBER_MAX)
    size = fields.integer_or_none("size", 0, _NUMBER_MAX)
    fault = Fault(
        effect,
        on=cast(Direction | None, on),
        at=None if ipa is None or size is None else (ipa, size),
        after=fields.integer("after", 0, _NUMBER_MAX),
        every=fields.integer("every", 0, _NUMBER_MAX),
        chance=float(fields.text("chance")),
        seed=fields.integer("seed", 0, _NUMBER_MAX),
        times=fields.integer_or_none("times", 0, _NUMBER_MAX),
    )
    counts = [fields.integer(name, 0, _NUMBER_MAX) for name in ("copies", "pages", "fired")]
    fields.end()
    return fault, Counted(*counts)


def _unpacked_effect(fields: Fields) -> Effect:
    kind, number = fields.text("effect"), fields.integer("number", 0, _NUMBER_MAX)
    if kind == "errno" and number <= ERRNO_MAX:
        return Fail(number)
    if kind == "delay":
        return Delay(number)
    if kind == "rate":
        return Rate(number)
    if kind == "vanish":
        return Vanish()
    raise fields.wrong("of no known kind")
