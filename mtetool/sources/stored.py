"""Snapshots to put into a guest: one that is read front to back, or one with its deltas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from mtetool.errors import BaseNeededError
from mtetool.guest import Missing
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.checking import Checked, check
from mtetool.sources.copying import Copied, Fill, Step
from mtetool.sources.layers import Layers
from mtetool.sources.pieces import Progress, decoded, no_progress


class Stored(Protocol):
    """All tags of a snapshot, whole: read once, by `steps` or by `check`."""

    @property
    def header(self) -> Header:
        """The header of the snapshot."""
        ...

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What is missing in the end; known once the snapshot was read to its end."""
        ...

    def steps(self, *, keep: int = 0) -> Iterator[Step]:
        """The tags; a later step replaces what earlier ones say.

        The tags of `keep` steps stay valid besides the last. Raises SnapshotError.
        """
        ...

    def check(self, *, progress: Progress = no_progress) -> Checked:
        """Check every byte. Raises SnapshotError."""
        ...


def stored(snapshot: SnapshotReader | Layers) -> Stored:
    """The tags of a snapshot that needs no other. Raises BaseNeededError."""
    if isinstance(snapshot, Layers):
        snapshot.need_whole()
        return snapshot
    base_id = snapshot.header.base_id
    if base_id is not None:
        raise BaseNeededError(
            f"the snapshot is a delta to the snapshot {base_id}, and useless without it",
            hint="name that with --base, or merge the two: mtetool merge BASE DELTA -o WHOLE",
            base_id=base_id,
        )
    return _FrontToBack(snapshot)


class _FrontToBack:
    """A snapshot from a stream; a `Stored`."""

    def __init__(self, reader: SnapshotReader) -> None:
        self._reader = reader
        self.header = reader.header

    @property
    def missing(self) -> tuple[Missing, ...]:
        return self._reader.missing

    def steps(self, *, keep: int = 0) -> Iterator[Step]:
        for piece, tags in decoded(self._reader, keep=keep):
            if isinstance(piece, Missing):
                yield piece
            elif tags is not None:
                yield Copied(piece.ipa, tags)
            elif piece.fill is not None:
                yield Fill(piece.ipa, piece.size_bytes, piece.fill)

    def check(self, *, progress: Progress = no_progress) -> Checked:
        return check(self._reader, progress=progress)
