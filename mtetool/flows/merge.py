"""Merge several snapshots, each a delta to the one before, into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import BinaryIO

from mtetool.errors import STATUS_OK, STATUS_PARTIAL
from mtetool.guest import Missing
from mtetool.snapshot.model import Footer, Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.checking import Checked
from mtetool.sources.copying import Copied, Fill
from mtetool.sources.layers import Layers
from mtetool.sources.layout import total_bytes
from mtetool.sources.pieces import Progress, no_progress


@dataclass(frozen=True, slots=True)
class MergeResult:
    """The result: a snapshot with the id and the content of the last one."""

    header: Header
    footer: Footer
    checked: Checked

    @property
    def status(self) -> int:
        """3 where anything is missing, else 0."""
        return STATUS_PARTIAL if self.checked.missing else STATUS_OK


def merge(
    layers: Layers,
    out: BinaryIO,
    *,
    level: int = 1,
    jobs: int | None = None,
    progress: Progress = no_progress,
) -> MergeResult:
    """Check all `layers`, then write what they hold together to `out`.

    If the first is a delta, the result is a delta to the same base. Raises SnapshotError.
    """
    checked = layers.check()
    total, done = total_bytes(layers.extents()), 0
    progress(0, total)
    with SnapshotWriter(out, layers.header, level=level, jobs=jobs) as writer:
        for step in layers.steps():
            if isinstance(step, Missing):
                writer.add_missing(step)
            elif isinstance(step, Fill):
                if step.over_base:
                    writer.add_same(step.ipa, step.size_bytes)
                else:
                    writer.add_fill(step.ipa, step.size_bytes, step.tag)
            else:
                _add(step, writer)
            done += step.size_bytes
            progress(done, total)
        footer = writer.finish(consistent=layers.consistent)
    return MergeResult(layers.header, footer, checked)


def _add(step: Copied, writer: SnapshotWriter) -> None:
    # Each record was decoded into a buffer of its own, which is not written to again.
    if step.over_base:
        writer.add_changes(step.ipa, step.tags)
    else:
        writer.add_tags(step.ipa, step.tags)
