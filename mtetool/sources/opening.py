"""A snapshot that is read once or, where possible, twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from mtetool.errors import host_error
from mtetool.snapshot.reader import SnapshotReader
from mtetool.snapshot.summary import display_name, is_seekable, opened
from mtetool.sources.layers import Layers, open_layers


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
