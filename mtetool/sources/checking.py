"""Read a whole snapshot to make sure that every byte of it is sound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from mtetool.errors import DamagedError
from mtetool.guest import Extent, Missing
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.copying import Fill
from mtetool.sources.layout import total_bytes, without
from mtetool.sources.pieces import Progress, decoded, no_progress
from mtetool.sources.tally import Tally


@dataclass
class Checked:
    """A snapshot that was read to its end: what it holds and what it says is missing."""

    header: Header
    held: list[Extent] = field(default_factory=list)
    missing: Tally[Missing] = field(default_factory=Tally)
    n_pieces: int = 0
    stored_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of guest memory whose tags the snapshot has."""
        return total_bytes(self.held)

    def expect_same(self, header: Header) -> None:
        """Raise DamagedError if the file is another one by now."""
        if header != self.header:
            raise DamagedError(
                "the snapshot changed between its check and its use",
                hint="check what writes to the file; mtetool did nothing with it",
            )


def check(
    reader: SnapshotReader,
    *,
    use: Callable[[int, memoryview], None] | None = None,
    use_fill: Callable[[Fill], None] | None = None,
    progress: Progress = no_progress,
) -> Checked:
    """Read every record, decompress every piece, and hand the tags to `use` and `use_fill`.

    Raises SnapshotError at the first thing that is wrong, a missing end included.
    """
    result = Checked(reader.header)
    total, done = total_bytes(reader.header.scope), 0
    progress(0, total)
    for piece, tags in decoded(reader):
        if not isinstance(piece, Missing):
            result.n_pieces += 1
            result.stored_bytes += piece.stored_bytes
            _append(result.held, Extent(piece.ipa, piece.size_bytes))
            if use is not None and tags is not None:
                use(piece.ipa, tags)
            elif use_fill is not None and piece.fill is not None:
                use_fill(Fill(piece.ipa, piece.size_bytes, piece.fill))
        done += piece.size_bytes
        progress(done, total)
    # A later record may have replaced an earlier one: what counts is the end of the log.
    for missing in reader.missing:
        result.missing.add(missing)
    gone = [Extent(missing.ipa, missing.size_bytes) for missing in reader.missing]
    result.held = without(result.held, gone)
    return result


def _append(extents: list[Extent], extent: Extent) -> None:
    """Append an extent; pieces mostly follow each other, and joining them keeps the list short."""
    if extents and extents[-1].ipa + extents[-1].size_bytes == extent.ipa:
        last = extents.pop()
        extent = Extent(last.ipa, last.size_bytes + extent.size_bytes)
    extents.append(extent)
