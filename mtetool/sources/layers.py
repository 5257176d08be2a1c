"""A snapshot and its deltas, read as one: tags that a delta lacks come from the one below."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import BinaryIO

from mtetool import loops
from mtetool.errors import BaseNeededError, DamagedError, LayoutError, UsageError, host_error
from mtetool.guest import Extent, Missing
from mtetool.snapshot.index import IndexedSnapshot
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import SnapshotReader
from mtetool.snapshot.summary import display_name, opened
from mtetool.sources.checking import Checked, check
from mtetool.sources.copying import Copied, Fill, Step
from mtetool.sources.layout import common, merged, slots_of, without
from mtetool.sources.pieces import Progress, constant, no_progress
from mtetool.sources.source import SnapshotSource, seekable_stream
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES


@contextmanager
def open_layers(paths: Sequence[str]) -> Iterator[Layers]:
    """Open snapshots as one: a base, a delta to it, a delta to that, and so on.

    The first may be a delta as well; then together they are one, too. "-" is standard input.
    Raises what opening a snapshot raises, and BaseNeededError where one is not a delta to the
    one before it.
    """
    with ExitStack() as stack:
        streams = []
        for path in paths:
            name = display_name(path)
            stream = stack.enter_context(opened(path))
            streams.append((stack.enter_context(seekable_stream(stream, name)), name))
        yield Layers(streams)


class Layers:
    """Several snapshots, each a delta to the one before.

    The checksum of every record that is read is compared; `check` reads all of them.
    """

    def __init__(self, streams: Sequence[tuple[BinaryIO, str]]) -> None:
        self._streams = streams
        snapshots = [IndexedSnapshot.of(stream, name) for stream, name in streams]
        self._sources = [
            SnapshotSource(snapshot, name)
            for snapshot, (_, name) in zip(snapshots, streams, strict=True)
        ]
        headers = [snapshot.header for snapshot in snapshots]
        for number, below in enumerate(headers[:-1]):
            _check_on(below, streams[number][1], headers[number + 1], streams[number + 1][1])
        scopes = merged([extent for header in headers for extent in header.scope])
        self.header: Header = replace(
            headers[-1],
            base_id=headers[0].base_id,
            scope=tuple(scopes),
            chunk_granules=max(header.chunk_granules for header in headers),
        )
        self.consistent = snapshots[-1].footer.consistent
        self.name = streams[-1][1]
        self.page_size_bytes = self.header.page_size_bytes
        self._lock = threading.Lock()
        self._missing: tuple[Missing, ...] = ()

    @property
    def missing(self) -> tuple[Missing, ...]:
        """What is missing in the end; known once `check` is done."""
        return self._missing

    def need_whole(self) -> None:
        """Raise BaseNeededError if the first snapshot is a delta too."""
        if self.header.base_id is not None:
            name = self._streams[0][1]
            raise BaseNeededError(
                f"{name} is a delta to the snapshot {self.header.base_id}, which is not here",
                hint="name that snapshot before it; mtetool info prints a snapshot's id",
                base_id=self.header.base_id,
            )

    def extents(self) -> list[Extent]:
        """The memory that they cover, in order of address."""
        return list(self.header.scope)

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """As `TagSource.read`; steps are over the base if that is not here."""
        for extent in extents:
            yield from self._read(len(self._sources) - 1, extent)

    def steps(self, *, keep: int = 0) -> Iterator[Step]:
        """All tags, in order of address. All stay valid: each record has a buffer of its own."""
        return self.read(self.header.scope)

    def check(self, *, progress: Progress = no_progress) -> Checked:
        """Check every byte of every snapshot, and find out what is missing in the end."""
        n_pieces = stored_bytes = 0
        for stream, name in self._streams:
            try:
                stream.seek(0)
            except OSError as error:
                raise host_error(error, f"{name}: seeking failed") from error
            found = check(SnapshotReader(stream, name), progress=progress)
            n_pieces += found.n_pieces
            stored_bytes += found.stored_bytes
        self._missing = tuple(step for step in self.steps() if isinstance(step, Missing))
        missing: Tally[Missing] = Tally()
        for item in self._missing:
            missing.add(item)
        gone = [Extent(item.ipa, item.size_bytes) for item in self._missing]
        held = without(list(self.header.scope), gone)
        return Checked(self.header, held, missing, n_pieces, stored_bytes)

    def fill_in(self, ipa: int, out: memoryview) -> bool:
        """Write the tags from `ipa` on to `out`; False if some of them are not here.

        Several threads may call it at a time.
        """
        extent = Extent(ipa, len(out) * GRANULE_BYTES)
        with self._lock:
            for step in self.read([extent]):
                if isinstance(step, Missing) or step.over_base:
                    return False
                first = (step.ipa - ipa) // GRANULE_BYTES
                n_granules = step.size_bytes // GRANULE_BYTES
                tags = step.tags if isinstance(step, Copied) else constant(step.tag, n_granules)
                out[first : first + n_granules] = tags
        return True

    def changed_by(self, fill: Fill) -> list[tuple[Extent, int]]:
        """The parts of a range, and how many granules in each have another tag than `fill`."""
        with self._lock:
            return [
                (Extent(step.ipa, step.size_bytes), self._count_others(step, fill.tag))
                for step in self.read([Extent(fill.ipa, fill.size_bytes)])
            ]

    def _count_others(self, step: Step, tag: int) -> int:
        n_granules = step.size_bytes // GRANULE_BYTES
        if isinstance(step, Missing) or step.over_base:
            return n_granules
        if isinstance(step, Fill):
            return 0 if step.tag == tag else n_granules
        if tag:
            loops.xor(step.tags, constant(tag, n_granules))
        return loops.scan(step.tags, self.page_size_bytes // GRANULE_BYTES)[1]

    def _read(self, level: int, extent: Extent) -> Iterator[Step]:
        source = self._sources[level]
        mine = common([extent], source.extents())
        others = without([extent], mine)
        for part in sorted([*mine, *others], key=lambda part: part.ipa):
            if level and part in others:
                yield from self._read(level - 1, part)
                continue
            for step in source.read_kept([part]):
                if level and not isinstance(step, Missing) and step.over_base:
                    yield from self._resolved(level, step)
                else:
                    yield step

    def _resolved(self, level: int, step: Copied | Fill) -> Iterator[Step]:
        """A step over the layer below, combined with that layer."""
        extent = Extent(step.ipa, step.size_bytes)
        if isinstance(step, Fill):
            yield from self._read(level - 1, extent)
            return
        for below in self._read(level - 1, extent):
            first = (below.ipa - step.ipa) // GRANULE_BYTES
            tags = step.tags[first : first + below.size_bytes // GRANULE_BYTES]
            if isinstance(below, Missing):
                raise DamagedError(
                    f"{self._streams[level][1]} changes tags at {below.ipa:#x} that its base"
                    f" does not have: {below.reason}",
                    ipa=below.ipa,
                )
            if isinstance(below, Copied):
                loops.xor(tags, below.tags)
            elif below.tag:
                loops.xor(tags, constant(below.tag, len(tags)))
            yield Copied(below.ipa, tags, below.over_base)


class LayeredSource:
    """The tags of a delta with all its bases; a `TagSource`."""

    def __init__(self, layers: Layers, name: str) -> None:
        layers.need_whole()
        self.name = name
        self.page_size_bytes = layers.page_size_bytes
        self.memslots = slots_of(layers.header)
        self._layers = layers

    def extents(self) -> list[Extent]:
        """See `TagSource.extents`."""
        return self._layers.extents()

    def check(self, extents: Sequence[Extent]) -> None:
        """See `TagSource.check`: reading files allocates nothing."""

    def read(self, extents: Sequence[Extent]) -> Iterator[Step]:
        """See `TagSource.read`."""
        return self._layers.read(extents)


def _check_on(below: Header, below_name: str, above: Header, name: str) -> None:
    if above.base_id is None:
        raise UsageError(
            f"{name} is a whole snapshot, not a delta to {below_name}",
            hint="name the base first, and only deltas after it; to take from it what is missing:"
            f" --fill {name}",
        )
    if above.base_id != below.snapshot_id:
        raise BaseNeededError(
            f"{name} is a delta to the snapshot {above.base_id}, but {below_name} is"
            f" {below.snapshot_id}",
            hint="name all snapshots in the order in which they were saved",
            base_id=above.base_id,
        )
    if above.page_size_bytes != below.page_size_bytes:
        raise LayoutError(
            f"{name} has pages of {above.page_size_bytes} bytes, but its base {below_name} has"
            f" pages of {below.page_size_bytes} bytes"
        )
