"""Tags from one form into another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

from mtetool.errors import STATUS_OK, STATUS_PARTIAL, PartialError
from mtetool.formats.core_output import write_core
from mtetool.formats.elf import Elf
from mtetool.formats.opening import Opened
from mtetool.formats.packing import Packer
from mtetool.formats.pages import whole_pages
from mtetool.formats.tables import Saved, TableWriter, saved_at
from mtetool.guest import Extent, Missing
from mtetool.snapshot.model import Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.copying import Fill
from mtetool.sources.layout import check_aligned, hex_range, total_bytes
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.source import asked
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES


@dataclass
class ConvertResult:
    """What a conversion did; `n_rows` counts those of a table."""

    converted_bytes: int = 0
    missing: Tally[Missing] = field(default_factory=Tally)
    n_rows: int | None = None
    snapshot_id: str | None = None

    @property
    def status(self) -> int:
        """3 where anything is missing, else 0."""
        return STATUS_PARTIAL if self.missing else STATUS_OK


def chosen(opened: Opened, ranges: Sequence[Extent]) -> list[Extent]:
    """The extents to convert. Raises as `asked`, and MisalignedError for parts of pages."""
    check_aligned(ranges, opened.tags.page_size_bytes, "page size")
    return asked(opened.tags, ranges)


def to_core(
    opened: Opened,
    extents: Sequence[Extent],
    out: BinaryIO,
    *,
    dump: Elf | None = None,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Write an ELF core; `dump` is QEMU's, with the memory."""
    missing = write_core(opened.tags, extents, out, dump=dump, progress=progress)
    return result_of(extents, missing)


def to_packed(
    opened: Opened, extents: Sequence[Extent], out: BinaryIO, *, progress: Progress = no_progress
) -> ConvertResult:
    """Write two tags a byte. Raises PartialError for a missing one, which has no form there."""
    packer = Packer(out)
    total, done = total_bytes(extents), 0
    for step in opened.tags.read(extents):
        if isinstance(step, Missing):
            raise PartialError(
                f"the tags of {hex_range(Extent(step.ipa, step.size_bytes))} are missing"
                f" ({step.reason}), and packed tags have no form for that",
                hint="use --to raw, where the byte 0xff says so, or a --range without them",
                ipa=step.ipa,
                size_bytes=step.size_bytes,
            )
        if isinstance(step, Fill):
            packer.fill(step.tag, step.size_bytes // GRANULE_BYTES)
        else:
            packer.put(step.tags)
        done += step.size_bytes
        progress(done, total)
    packer.finish()
    return result_of(extents, Tally())


def to_snapshot(
    opened: Opened, extents: Sequence[Extent], out: BinaryIO, *, progress: Progress = no_progress
) -> ConvertResult:
    """Write a snapshot, with the layout of the input."""
    header = Header.for_guest(opened.info, extents)
    missing: Tally[Missing] = Tally()
    total, done = total_bytes(extents), 0
    with SnapshotWriter(out, header, jobs=None) as writer:
        for step in whole_pages(opened.tags, extents, header.page_size_bytes):
            if isinstance(step, Missing):
                writer.add_missing(step)
                missing.add(step)
            elif isinstance(step, Fill):
                writer.add_fill(step.ipa, step.size_bytes, step.tag)
            else:
                writer.add_tags(step.ipa, step.tags)
            done += step.size_bytes
            progress(done, total)
        writer.finish(consistent=None)
    result = result_of(extents, missing)
    result.snapshot_id = header.snapshot_id
    return result


def to_table(
    opened: Opened,
    extents: Sequence[Extent],
    table: TableWriter,
    *,
    progress: Progress = no_progress,
) -> ConvertResult:
    """Add the runs of one input to a table."""
    before = table.n_rows
    missing = table.add(
        opened.tags, extents, opened.info.memslots, whose(opened), progress=progress
    )
    result = result_of(extents, missing)
    result.n_rows = table.n_rows - before
    return result


def whose(opened: Opened) -> Saved:
    """The names that rows of an input have."""
    header = opened.header
    if header is None:
        return Saved(opened.info.name or opened.info.source, opened.tags.name, None)
    guest = header.name or header.source or None
    return Saved(guest, header.snapshot_id, saved_at(header.created_utc))


def result_of(extents: Sequence[Extent], missing: Tally[Missing]) -> ConvertResult:
    """The result of a conversion of extents, of which some are missing."""
    return ConvertResult(total_bytes(extents) - missing.size_bytes, missing)


def together(results: Sequence[ConvertResult]) -> ConvertResult:
    """The results of several inputs of one table, as one."""
    whole = ConvertResult(n_rows=0)
    for result in results:
        whole.converted_bytes += result.converted_bytes
        whole.n_rows = (whole.n_rows or 0) + (result.n_rows or 0)
        for item in result.missing:
            whole.missing.add(item)
    return whole
