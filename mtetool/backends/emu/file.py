"""The file behind an emulated guest: its header, its lock, and how it is made.

It has a header, then the tags of each memslot, one byte per granule, in order of address, each slot
at a multiple of 64 KiB. The header:

    magic 8 | version u32 | description u32 | file size u64 | CRC-32 u32 | msgpack description

in little-endian order; the checksum covers the rest of the header. Tags that were never set are
holes. After the tags there may be a block with faults (`fault_block`), which the file size in the
header does not count.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from mtetool.emulator.behaviours import Behaviour
from mtetool.errors import (
    BusyError,
    DamagedError,
    EmulatorFileError,
    MisalignedError,
    MtetoolError,
    NoSuchFileError,
    RangeError,
    SourceError,
    UsageError,
    file_error,
)
from mtetool.files.fields import Fields, pack_map, unpack_map
from mtetool.files.kinds import EMULATED_MAGIC, SNAPSHOT_MAGIC
from mtetool.files.newfile import exists, new_file
from mtetool.files.output import check_not_a_stream
from mtetool.files.place import Place, located, named
from mtetool.guest import Memslot, SlotKind
from mtetool.uapi import GRANULE_BYTES, PAGE_SIZES
from mtetool.words import counted

FAULTS_BYTES = 64 << 10
"""The size of the block after the tags of a guest that has faults."""

_MAGIC = EMULATED_MAGIC
_VERSION = 1
_HEAD = struct.Struct("<8sIIQ")
_CHECKSUM = struct.Struct("<I")
_DESCRIPTION_AT = _HEAD.size + _CHECKSUM.size
_DESCRIPTION_MAX_BYTES = 4 << 20
_ALIGNMENT_BYTES = 64 << 10
_ADDRESS_END = 1 << 64
_COUNT_MAX = _ADDRESS_END - 1


@dataclass(frozen=True, slots=True)
class Description:
    """What the header says; slots in order of address, `readonly` never None.

    `hugetlb` has the ids of slots with hugetlb memory, `behaviours` how its kernel differs from
    others.
    """

    page_size_bytes: int
    mte: bool
    vcpus: int
    memslots: tuple[Memslot, ...]
    hugetlb: frozenset[int] = frozenset()
    behaviours: frozenset[Behaviour] = frozenset()


def check_description(described: Description) -> None:
    """Raise UsageError, MisalignedError, RangeError for a guest that cannot exist."""
    if described.page_size_bytes not in PAGE_SIZES:
        raise UsageError(
            f"a page size of {described.page_size_bytes} bytes: must be 4096, 16384 or 65536"
        )
    if not 0 <= described.vcpus <= _COUNT_MAX:
        raise UsageError(f"{described.vcpus} vCPUs: must be 0 to {_COUNT_MAX}")
    if not described.memslots:
        raise UsageError("a guest needs a memslot")
    for slot in described.memslots:
        _check_slot(slot, described.page_size_bytes)
    for lower, upper in pairwise(described.memslots):
        if lower.end > upper.ipa:
            raise UsageError(f"the memslots at {lower.ipa:#x} and {upper.ipa:#x} overlap")
    if len({slot.id for slot in described.memslots}) != len(described.memslots):
        raise UsageError("two memslots have the same id")


def check_hugetlb(described: Description) -> None:
    """Raise UsageError for hugetlb memory in a VM with MTE on a kernel that refuses it.

    For new guests only: the kernel checks when a memslot is made, not when MTE is enabled.
    """
    if Behaviour.HUGETLB_TAGS in described.behaviours or not described.mte:
        return
    for slot in described.memslots:
        if slot.id in described.hugetlb:
            raise UsageError(
                f"the memslot at {slot.ipa:#x} is hugetlb memory, which this kernel refuses"
                " for a VM with MTE (EINVAL)",
                hint="emulate a kernel that accepts it (6.13): --kernel-behaviour"
                f" {Behaviour.HUGETLB_TAGS.value}",
            )


def _check_slot(slot: Memslot, page: int) -> None:
    if slot.size_bytes <= 0:
        raise RangeError(f"the memslot at {slot.ipa:#x} has no size", ipa=slot.ipa)
    if slot.ipa % page or slot.size_bytes % page:
        raise MisalignedError(
            f"the memslot {slot.ipa:#x}:{slot.size_bytes:#x} is not made of whole pages"
            f" of {page} bytes",
            ipa=slot.ipa,
        )
    if slot.ipa < 0 or slot.end > _ADDRESS_END:
        raise RangeError(f"the memslot at {slot.ipa:#x} ends beyond 64 bits", ipa=slot.ipa)


# --- the header ---------------------------------------------------------------------------


def header(described: Description) -> bytes:
    """The header of a guest's file; its length does not depend on whether MTE is on."""
    packed = _packed(described)
    if len(packed) > _DESCRIPTION_MAX_BYTES:
        raise UsageError(f"too many memslots for one guest: {len(described.memslots)}")
    head = _HEAD.pack(_MAGIC, _VERSION, len(packed), file_size(described))
    return head + _CHECKSUM.pack(zlib.crc32(packed, zlib.crc32(head))) + packed


def replace_header(fd: int, old: Description, new: Description) -> None:
    """Overwrite a guest's header with that of the same guest with MTE switched.

    It writes only the bytes that differ, checksum and switch, which are within the file's first
    sector: a process that dies meanwhile leaves either the old header or the new one. Raises
    OSError.
    """
    before, after = header(old), header(new)
    differing = [at for at, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    first, last = min(differing), max(differing)
    write_all(fd, after[first : last + 1], first)


def offsets(described: Description) -> Iterator[int]:
    """Where in the file the tags of each slot begin."""
    *starts, _ = _edges(described)
    yield from starts


def file_size(described: Description) -> int:
    """The size in bytes of a guest's file, most of it holes."""
    *_, end = _edges(described)
    return end


def _edges(described: Description) -> Iterator[int]:
    at = _align(_DESCRIPTION_AT + len(_packed(described)))
    for slot in described.memslots:
        yield at
        at = _align(at + slot.size_bytes // GRANULE_BYTES)
    yield at


def _align(n_bytes: int) -> int:
    return -(-n_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def _packed(described: Description) -> bytes:
    slots = [
        {
            "id": slot.id,
            "ipa": slot.ipa,
            "size": slot.size_bytes,
            "readonly": bool(slot.readonly),
            "kind": slot.kind,
            "hugetlb": slot.id in described.hugetlb,
        }
        for slot in described.memslots
    ]
    return pack_map(
        {
            "page_size": described.page_size_bytes,
            "mte": described.mte,
            "vcpus": described.vcpus,
            "memslots": slots,
            "behaviours": sorted(behaviour.value for behaviour in described.behaviours),
        }
    )


def _unpacked(packed: bytes) -> Description:
    """Decode a description. Raises DamagedError."""
    fields = unpack_map(packed, "the description")
    page = fields.integer("page_size", 1, _COUNT_MAX)
    mte = fields.truth_or_none("mte")
    vcpus = fields.integer("vcpus", 0, _COUNT_MAX)
    rows = [Fields(row, "a memslot") for row in fields.array("memslots")]
    hugetlb = [row.truth_or_none("hugetlb") for row in rows]
    slots = tuple(_unpacked_slot(row) for row in rows)
    behaviours = frozenset(_unpacked_behaviour(name) for name in fields.array("behaviours"))
    if mte is None:
        raise fields.wrong("'mte' is nil")
    fields.end()
    huge = frozenset(slot.id for slot, is_huge in zip(slots, hugetlb, strict=True) if is_huge)
    return Description(page, mte, vcpus, slots, huge, behaviours)


def _unpacked_behaviour(name: object) -> Behaviour:
    try:
        return Behaviour(name)
    except ValueError:
        raise DamagedError("it names a kernel behaviour that this mtetool does not know") from None


def _unpacked_slot(fields: Fields) -> Memslot:
    slot_id, ipa = fields.integer("id", 0, _COUNT_MAX), fields.integer("ipa", 0, _COUNT_MAX)
    size = fields.integer("size", 1, _COUNT_MAX)
    readonly, kind = fields.truth_or_none("readonly"), fields.text("kind")
    if readonly is None or kind not in ("ram", "rom", "device"):
        raise fields.wrong("of no known kind")
    fields.end()
    return Memslot(slot_id, ipa, size, readonly, cast(SlotKind, kind))


def read_header(fd: int, path: str) -> Description:
    """Read the header. Raises EmulatorFileError for one that `create` would not have written."""
    try:
        start = os.pread(fd, _DESCRIPTION_AT, 0)
        if start.startswith(SNAPSHOT_MAGIC):
            raise EmulatorFileError(
                f"{path} is a snapshot, not an emulated guest",
                hint=f"describe it: mtetool info {path}; restore it: mtetool restore {path} GUEST",
                path=path,
            )
        if not start or start[: len(_MAGIC)] != _MAGIC[: len(start)]:
            raise damaged(path, "it does not start like one")
        if len(start) < _DESCRIPTION_AT:
            raise damaged(path, "it is truncated")
        _, version, length, size = _HEAD.unpack_from(start)
        if version != _VERSION:
            raise damaged(path, f"its version, {version}, is unknown to this mtetool")
        if length > _DESCRIPTION_MAX_BYTES:
            raise damaged(path, "its header is damaged")
        packed = os.pread(fd, length, _DESCRIPTION_AT)
        actual = os.fstat(fd).st_size
    except OSError as error:
        raise refused(error, path) from error
    if actual < size:
        raise damaged(path, f"it is truncated: {actual} of {size} bytes")
    (checksum,) = _CHECKSUM.unpack_from(start, _HEAD.size)
    if zlib.crc32(packed, zlib.crc32(start[: _HEAD.size])) != checksum:
        raise damaged(path, "its header is damaged: the checksum is wrong")
    return _described(packed, path, size, actual)


def _described(packed: bytes, path: str, size: int, actual: int) -> Description:
    try:
        described = _unpacked(packed)
        check_description(described)
    # Well-formed nonsense: here a wrong layout is the file's fault, not the user's.
    except MtetoolError as error:
        raise damaged(path, f"its description makes no sense: {error.message}") from error
    if actual not in (size, size + FAULTS_BYTES) or size != file_size(described):
        raise damaged(path, f"its size, {counted(actual, 'byte')}, does not match its description")
    return described


# --- the file -----------------------------------------------------------------------------


def open_file(path: str) -> tuple[int, bool]:
    """Open a regular file; return its descriptor and whether it can be written.

    Raises NoSuchFileError, PermissionRefusedError, EmulatorFileError for a directory and the
    like, HostIoError.
    """
    # Non-blocking, in case of a FIFO; anything but a regular file is refused once it is open.
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            fd, writable = os.open(path, os.O_RDWR | flags), True
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR):
                raise
            fd, writable = os.open(path, os.O_RDONLY | flags), False
    except OSError as error:
        raise refused(error, path) from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise damaged(
            path, f"it is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}"
        )
    return fd, writable


def lock(fd: int, path: str, kind: int) -> None:
    """Take the lock `kind`, LOCK_SH or LOCK_EX, or raise BusyError at once."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BusyError(
            f"{path} is in use by another process",
            hint=f"wait for it to end; find it: fuser {path}",
        ) from None
    except OSError as error:
        raise refused(error, path) from error


def create(path: str, described: Description, *, force: bool, fill: Callable[[int], None]) -> None:
    """Make a file; `fill` gets its descriptor before it appears under its name.

    Raises FileExistsAlreadyError without `force`; BusyError if it would replace a guest that is in
    use; NoSuchFileError if there is no such directory; SourceError and BadNameError if `path` is
    not a name for a file; PermissionRefusedError, DiskFullError, HostIoError.
    """
    content = header(described)
    with located(path) as place:
        _check_place(place, force=force)
        with new_file(place, force=force) as new, named(path):
            new.open()
            fd = new.file.fileno()
            os.ftruncate(fd, file_size(described))
            write_all(fd, content, 0)
            fill(fd)
            new.keep()


def _check_place(place: Place, *, force: bool) -> None:
    if place.found is None:
        return
    if stat.S_ISDIR(place.found.st_mode):
        raise SourceError(f"{place.path} is a directory", hint="name a file in it", path=place.path)
    check_not_a_stream(place)
    if not force:
        raise exists(place.path)
    if not place.is_regular:
        raise SourceError(
            f"{place.path} is not a regular file, and mtetool does not replace it",
            hint="name a new file",
            path=place.path,
        )
    # A guest in use by another process would live on without a name, and its work be lost.
    fd, _ = open_file(place.path)
    try:
        lock(fd, place.path, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at an offset. Raises OSError."""
    left = memoryview(data)
    while left:
        n_bytes = os.pwrite(fd, left, offset)
        left, offset = left[n_bytes:], offset + n_bytes


# --- what goes wrong ----------------------------------------------------------------------


def refused(error: OSError, path: str) -> MtetoolError:
    """Convert an OSError of this host, so it is never mistaken for an answer of the guest."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NoSuchFileError(
            f"{path}: no such file", hint="make a guest: mtetool emu create PATH", path=path
        )
    return file_error(error, path)


def damaged(path: str, why: str) -> EmulatorFileError:
    """The error that says why a file is not an emulated guest's."""
    return EmulatorFileError(
        f"{path} is not the file of an emulated guest: {why}",
        hint="make one: mtetool emu create PATH",
        path=path,
    )
