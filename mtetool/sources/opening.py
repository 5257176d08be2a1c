"""Open what a user names: a guest, a snapshot, a snapshot with the bases that it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from mtetool.backends import is_guest, open_guest
from mtetool.errors import BaseNeededError, UsageError, host_error
from mtetool.guest import GuestOptions
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import SnapshotReader
from mtetool.snapshot.summary import display_name, is_seekable, opened
from mtetool.sources.layers import LayeredSource, Layers, open_layers
from mtetool.sources.source import GuestSource, SnapshotSource, TagSource, seekable_stream


@dataclass(frozen=True, slots=True)
class SnapshotInput:
    """An open snapshot. If `seekable` is true, `reader` may be called more than once."""

    stream: BinaryIO
    name: str
    seekable: bool

    def reader(self) -> SnapshotReader:
        """A reader from the first byte on. Raises SnapshotError, HostIoError."""
        if self.seekable:
            try:
                self.stream.seek(0)
            except OSError as error:
                raise host_error(error, f"{self.name}: seeking failed") from error
        return SnapshotReader(self.stream, self.name)


@dataclass(frozen=True, slots=True)
class LayeredInput:
    """Open snapshots that are read as one, any number of times."""

    layers: Layers
    seekable: bool = True

    def reader(self) -> Layers:
        """All of them together."""
        return self.layers


@contextmanager
def snapshot_input(path: str, bases: Sequence[str] = ()) -> Iterator[SnapshotInput | LayeredInput]:
    """Open a snapshot file, or standard input for "-"; with the bases that a delta needs.

    A path may be a pipe as well: a FIFO, or a shell's <(process substitution). Raises
    UsageError, NoSuchFileError, NotASnapshotError (a directory), HostIoError, and with bases
    what `open_layers` raises.
    """
    if bases:
        with open_layers([*bases, path]) as layers:
            yield LayeredInput(layers)
        return
    with opened(path) as stream:
        yield SnapshotInput(stream, display_name(path), is_seekable(stream))


@contextmanager
def open_source(
    source: str,
    options: GuestOptions | None = None,
    *,
    every_page: bool = False,
    bases: Sequence[str] = (),
    bases_of_another: bool = False,
) -> Iterator[TagSource]:
    """Open a guest (`kvm:PID` or another), a snapshot file, or standard input for "-".

    With `every_page` all of a guest is read, even where that allocates memory. A delta finds the
    snapshots that it needs among `bases`, by their ids; with `bases_of_another`, they may be there
    for another source. Raises what opening those raises; LayoutUnknownError for a guest without a
    layout, BaseNeededError for a delta without its base, UsageError for bases of no delta.
    """
    if is_guest(source):
        if bases and not bases_of_another:
            raise _no_delta(source)
        with open_guest(source, options) as guest:
            yield GuestSource(guest, source, every_page=every_page)
        return
    with (
        opened(source) as stream,
        snapshot_source(stream, source, bases, bases_of_another=bases_of_another) as (tags, _),
    ):
        yield tags


@contextmanager
def snapshot_source(
    stream: BinaryIO,
    source: str,
    bases: Sequence[str] = (),
    *,
    bases_of_another: bool = False,
) -> Iterator[tuple[TagSource, Header]]:
    """The tags of a snapshot in an open file or pipe, and its header; `bases` as `open_source`.

    Raises SnapshotError, BaseNeededError, UsageError.
    """
    with ExitStack() as stack:
        name = display_name(source)
        streams = [(stack.enter_context(seekable_stream(stream, name)), name)]
        for path in bases:
            name = display_name(path)
            below = stack.enter_context(opened(path))
            streams.append((stack.enter_context(seekable_stream(below, name)), name))
        chain = _chain(streams)
        if len(chain) > 1:
            layers = Layers(chain)
            yield LayeredSource(layers, source), layers.header
            return
        if bases and not bases_of_another:
            raise _no_delta(source)
        ((stream, name),) = chain
        snapshot = SnapshotSource(IndexedSnapshot.of(stream, name), source)
        yield snapshot, snapshot.header


def _no_delta(source: str) -> UsageError:
    return UsageError(f"--base goes with a delta, and {source} is not one", hint="leave out --base")


def _chain(streams: Sequence[tuple[BinaryIO, str]]) -> list[tuple[BinaryIO, str]]:
    """The first snapshot, and those of the others that it needs: the oldest first."""
    headers = [_header(stream, name) for stream, name in streams]
    by_id = {header.snapshot_id: n for n, header in enumerate(headers) if n}
    chain = [streams[0]]
    needed, above = headers[0].base_id, streams[0][1]
    while needed is not None:
        n = by_id.pop(needed, None)
        if n is None:
            among = "not one of those given with --base" if len(streams) > 1 else "not here"
            raise BaseNeededError(
                f"{above} is a delta to the snapshot {needed}, which is {among}",
                hint="name that with --base, or merge the two: mtetool merge BASE DELTA -o WHOLE",
                base_id=needed,
            )
        chain.insert(0, streams[n])
        needed, above = headers[n].base_id, streams[n][1]
    return chain


def _header(stream: BinaryIO, name: str) -> Header:
    header = SnapshotReader(stream, name).header
    try:
        stream.seek(0)
    except OSError as error:
        raise host_error(error, f"{name}: seeking failed") from error
    return header
