"""Open anything that `convert` reads: by what the user says, or by its first bytes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BufferedReader
from itertools import pairwise
from typing import BinaryIO, Literal, cast

from mtetool.backends import is_guest, open_guest
from mtetool.errors import BadFormatError, UsageError, host_error
from mtetool.formats import elf, migration
from mtetool.formats.bytesof import size_of
from mtetool.formats.core_input import open_core
from mtetool.formats.gdb_remote import open_gdb
from mtetool.formats.migration import open_migration
from mtetool.formats.parts import PartSource, laid_out
from mtetool.guest import Extent, GuestInfo, GuestOptions, Memslot
from mtetool.snapshot.model import Header
from mtetool.snapshot.records import MAGIC
from mtetool.snapshot.summary import display_name, is_seekable, opened
from mtetool.sources.layout import check_aligned, slots_of
from mtetool.sources.opening import snapshot_source
from mtetool.sources.source import GuestSource, TagSource
from mtetool.uapi import PAGE_SIZES

InputForm = Literal["mtesnap", "core", "migration", "raw", "packed", "gdb"]

_MAGICS: dict[bytes, InputForm] = {
    MAGIC[:4]: "mtesnap",
    elf.MAGIC: "core",
    migration.MAGIC: "migration",
}
_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """How the user described an input: its form, None for what its first bytes say; its memory.

    `places` are in the order of the file; `options` has memslots as well.
    """

    form: InputForm | None = None
    places: tuple[Extent, ...] = ()
    page_size_bytes: int = PAGE_SIZES[0]
    options: GuestOptions = field(default_factory=GuestOptions)
    every_page: bool = False
    bases: tuple[str, ...] = ()
    """Snapshots that deltas need, as for `mtetool.sources.opening.open_source`."""
    bases_of_another: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """An open input. `header` is that of a snapshot; `info` describes any other."""

    tags: TagSource
    info: GuestInfo
    header: Header | None = None


@contextmanager
def open_input(source: str, wanted: Wanted) -> Iterator[Opened]:
    """Open a guest, a file, or standard input for "-".

    Raises UsageError, MisalignedError, BadFormatError, and what opening a guest, a snapshot or a
    stream raises.
    """
    if wanted.bases and not wanted.bases_of_another and wanted.form not in (None, "mtesnap"):
        raise UsageError(f"--base goes with a snapshot, and --from {wanted.form} is none")
    if wanted.form == "gdb":
        _need_places(wanted)
        with open_gdb(source, wanted.places, wanted.page_size_bytes) as tags:
            yield Opened(tags, tags.info)
        return
    if is_guest(source):
        if wanted.bases and not wanted.bases_of_another:
            raise UsageError(f"--base goes with a delta, and {source} is a guest")
        if wanted.form is not None:
            raise UsageError(f"{source} is a guest, and --from {wanted.form} is for a file")
        with open_guest(source, wanted.options) as guest:
            yield Opened(GuestSource(guest, source, every_page=wanted.every_page), guest.info())
        return
    name = display_name(source)
    with opened(source) as stream:
        form = wanted.form or _form_of(stream, name)
        if wanted.bases and not wanted.bases_of_another and form != "mtesnap":
            raise UsageError(f"--base goes with a snapshot, and {name} is none")
        if form == "mtesnap":
            with snapshot_source(
                stream, source, wanted.bases, bases_of_another=wanted.bases_of_another
            ) as (snapshot, header):
                info = GuestInfo(
                    header.source, True, header.page_size_bytes, slots_of(header), name=header.name
                )
                yield Opened(snapshot, info, header)
            return
        if form == "migration":
            yield _opened(open_migration(stream, name, wanted.options.memslots))
            return
        with _seekable(stream) as file:
            yield _opened(_in_file(file, name, form, wanted))


def _opened(tags: PartSource) -> Opened:
    return Opened(tags, tags.info)


def _in_file(file: BinaryIO, name: str, form: InputForm, wanted: Wanted) -> PartSource:
    if form == "core":
        return open_core(file, name)
    _need_places(wanted)
    slots = wanted.options.memslots or tuple(
        Memslot(number, place.ipa, place.size_bytes, None)
        for number, place in enumerate(wanted.places)
    )
    info = GuestInfo(name, True, wanted.page_size_bytes, slots)
    n_bytes = size_of(file, name)
    return laid_out(file, name, info, wanted.places, n_bytes, packed=form == "packed")


def _need_places(wanted: Wanted) -> None:
    if not wanted.places:
        raise UsageError(
            f"--from {wanted.form} does not say which memory the tags are of",
            hint="give it, in the order of the file: --memslot IPA:SIZE, or --range IPA:SIZE",
        )
    check_aligned(wanted.places, wanted.page_size_bytes, "page size")
    ordered = sorted(wanted.places, key=lambda place: place.ipa)
    for before, place in pairwise(ordered):
        if before.end > place.ipa:
            raise UsageError(f"the ranges given overlap at {place.ipa:#x}")


def _form_of(stream: BinaryIO, name: str) -> InputForm:
    """The form that the first bytes show. Raises BadFormatError."""
    try:
        # All that `opened` yields are buffered readers.
        head = cast(BufferedReader, stream).peek(4)[:4]
    except OSError as error:
        raise host_error(error, f"{name}: reading failed") from error
    if head in _MAGICS:
        return _MAGICS[head]
    raise BadFormatError(
        f"{name} is neither a snapshot nor a core file nor a migration of QEMU",
        hint="for bare tags, say how they are stored: --from raw (one a byte) or packed (two)",
    )


@contextmanager
def _seekable(stream: BinaryIO) -> Iterator[BinaryIO]:
    """The stream, or a copy in a file without a name of one that comes through a pipe."""
    if is_seekable(stream):
        yield stream
        return
    try:
        spool = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115
    except OSError as error:
        raise host_error(error, "no file for input from a pipe can be made") from error
    try:
        try:
            shutil.copyfileobj(stream, spool, _PIECE_BYTES)
            spool.flush()
        except OSError as error:
            told = host_error(error, "input from a pipe could not be copied to a temporary file")
            told.hint = "use another directory: TMPDIR=DIRECTORY mtetool ...; or name a file"
            raise told from error
        yield spool
    finally:
        with suppress(OSError):
            spool.close()
