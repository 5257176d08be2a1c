"""Merge several snapshots, each a delta to the one before, into one."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from mtetool.errors import STATUS_OK, STATUS_PARTIAL, LayoutError
from mtetool.guest import Extent, Missing
from mtetool.snapshot.model import Footer, Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.checking import Checked
from mtetool.sources.copying import Copied, Fill, Step
from mtetool.sources.layers import Layers
from mtetool.sources.layout import total_bytes, without
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.tally import Tally


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result: a snapshot with the id and the content of the last one.

    With fills, `filled_bytes` of guest memory came from those, and the id is a new one.
    """

    header: Header
    footer: Footer
    checked: Checked
    filled_bytes: int = 0

    @property
    def status(self) -> int:
        """3 where anything is missing, else 0."""
        return STATUS_PARTIAL if self.checked.missing else STATUS_OK


def merge(
    layers: Layers,
    out: BinaryIO,
    *,
    fills: Sequence[Layers] = (),
    level: int = 1,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> MergeResult:
    """Check all `layers`, then write what they hold together to `out`.

    What is missing there is taken from the first of the `fills` that has it. If the first layer is
    a delta, the result is a delta to the same base. Raises SnapshotError; BaseNeededError and
    LayoutError for a fill that does not fit.
    """
    checked = layers.check()
    header = layers.header
    for fill in fills:
        _check_fill(fill, header)
    if fills:
        header = replace(header, snapshot_id=os.urandom(16).hex())
    total, done = total_bytes(layers.extents()), 0
    progress(0, total)
    missing: Tally[Missing] = Tally()
    filled: list[int] = []
    with SnapshotWriter(out, header, level=level, jobs=jobs) as writer:
        for step in _filled(layers.steps(), fills, filled):
            if isinstance(step, Missing):
                writer.add_missing(step)
                missing.add(step)
            elif isinstance(step, Fill):
                if step.over_base:
                    writer.add_same(step.ipa, step.size_bytes)
                else:
                    writer.add_fill(step.ipa, step.size_bytes, step.tag)
            else:
                _add(step, writer)
            done += step.size_bytes
            progress(done, total)
        # Tags of two moments are not what the guest had at any.
        footer = writer.finish(consistent=False if filled else layers.consistent)
    if fills:
        gone = [Extent(item.ipa, item.size_bytes) for item in missing]
        checked.missing, checked.held = missing, without(header.scope, gone)
    return MergeResult(header, footer, checked, sum(filled))


def _check_fill(fill: Layers, header: Header) -> None:
    """Check a whole snapshot that fills gaps; raise LayoutError if it is of other memory."""
    fill.need_whole()
    slots, others = (
        [(slot.ipa, slot.size_bytes) for slot in known.memslots] for known in (header, fill.header)
    )
    if fill.page_size_bytes != header.page_size_bytes or (slots and others and slots != others):
        raise LayoutError(
            f"{fill.name} cannot fill gaps: its pages or its memslots are others",
            hint="compare the two: mtetool info FILE FILE",
            page_size_bytes=fill.page_size_bytes,
        )
    fill.check()


def _filled(steps: Iterable[Step], fills: Sequence[Layers], filled: list[int]) -> Iterator[Step]:
    """The steps, with what is missing from the first of `fills` that has it.

    The bytes of guest memory of each step from there are appended to `filled`.
    """
    for step in steps:
        if not isinstance(step, Missing) or not fills:
            yield step
            continue
        for found in fills[0].read([Extent(step.ipa, step.size_bytes)]):
            if isinstance(found, Missing):
                rest = replace(step, ipa=found.ipa, size_bytes=found.size_bytes)
                yield from _filled([rest], fills[1:], filled)
            else:
                filled.append(found.size_bytes)
                yield found


def _add(step: Copied, writer: SnapshotWriter) -> None:
    # Each record was decoded into a buffer of its own, which is not written to again.
    if step.over_base:
        writer.add_changes(step.ipa, step.tags)
    else:
        writer.add_tags(step.ipa, step.tags)
