"""Saving a guest's tags into a snapshot."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, BinaryIO, Literal

from mtetool.errors import (
    STATUS_GUEST,
    STATUS_OK,
    STATUS_PARTIAL,
    GuestError,
    GuestLostError,
    PartialError,
    UsageError,
    errno_name,
)
from mtetool.flows.freezing import DEFAULT_SPOOL_BYTES, Spool, held_still
from mtetool.guest import Extent, Guest, GuestInfo, Memslot, Missing
from mtetool.snapshot.model import Header
from mtetool.snapshot.writer import SnapshotWriter
from mtetool.sources.allocating import check_allocates_nothing
from mtetool.sources.copying import Copied, Fill, Later, TagReader, check_has_tags, check_mte_is_on
from mtetool.sources.layout import (
    Layout,
    check_aligned,
    check_inside,
    hex_range,
    merged,
    slot_extents,
    total_bytes,
    without,
)
from mtetool.sources.pieces import Progress, no_progress
from mtetool.sources.tally import Tally
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    from mtetool.sources.layers import Layers


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """What the user asked for.

    Without `ranges` or `slots` (ids), all memory that has tags is saved. `partial` None is "keep"
    for pages that cannot be read, and "fail" for a guest that ends half-way. `freeze` stops the
    guest's vCPUs while tags are read. Up to `spool_bytes` of the snapshot are kept in memory
    meanwhile, so that the guest does not wait for the output (None: none, or with `freeze`
    `DEFAULT_SPOOL_BYTES`). `every_page` also reads the pages that cannot have tags.
    """

    ranges: tuple[Extent, ...] = ()
    slots: tuple[int, ...] = ()
    partial: Literal["keep", "fail"] | None = None
    freeze: bool = False
    spool_bytes: int | None = None
    every_page: bool = False
    level: int = 1
    jobs: int | None = None


@dataclass
class SaveResult:
    """What a save did; `lost` says how the guest ended, if it did half-way.

    `frozen_seconds` is how long the vCPUs were stopped; None if that was not asked for.
    `spool_overflowed` says whether they waited for the output because the spool was full.
    `copy_seconds` runs from the first copy to the end of the last. `changed_bytes` of guest memory
    have other tags than in the base; None without a base.
    """

    header: Header
    info: GuestInfo
    scope: tuple[Extent, ...]
    skipped: tuple[Memslot, ...]
    consistent: bool | None = None
    saved_bytes: int = 0
    written_bytes: int = 0
    uniform_bytes: int = 0
    changed_bytes: int | None = None
    missing: Tally[Missing] = field(default_factory=Tally)
    lost: str | None = None
    frozen_seconds: float | None = None
    spool_overflowed: bool = False
    copy_seconds: float = 0.0

    @property
    def status(self) -> int:
        """The exit status: 0, 3 where anything is missing, 4 where the guest was lost."""
        if self.lost is not None:
            return STATUS_GUEST
        return STATUS_PARTIAL if self.missing else STATUS_OK


def save(
    guest: Guest,
    out: BinaryIO,
    options: SaveOptions,
    *,
    base: Layers | None = None,
    progress: Progress = no_progress,
) -> SaveResult:
    """Write a guest's tags to `out`, front to back; with `base`, only what has changed.

    Raises MisalignedError, RangeError, UsageError and WouldAllocateError before anything is
    read; PartialError for the first page that cannot be read, with partial "fail"; GuestError
    when nothing at all can be read or the guest is gone; SnapshotError and BaseNeededError for
    the base; OutputStalledError where a frozen guest would have to wait for `out`.
    """
    check_mte_is_on(guest)
    info = guest.info()
    guest.prepare()
    layout = Layout(info.memslots, guest.page_size_bytes)
    check_has_tags(layout, info.source)
    scope = decide_scope(layout, options, info.source)
    check_allocates_nothing(guest, scope, info.source, every_page=options.every_page)
    # Slow work (the monitor, threads, memory for the tags) comes before the guest stands still.
    paused_before = True if options.freeze else guest.paused()
    header = Header.for_guest(info, scope, paused=paused_before)
    if base is not None:
        header = _on(base, header)
    result = SaveResult(header, info, tuple(scope), _skipped(layout, options))
    spool = Spool(out, _spool_bytes(options), total_bytes(scope) // GRANULE_BYTES)
    with SnapshotWriter(spool, header, level=options.level, jobs=options.jobs) as writer:
        # Where the writer's threads read, no guest waits, and they have their own buffers.
        others = base is None and all(guest.any_thread_reads(extent) for extent in scope)
        if not others:
            writer.warm_up()
        reader = TagReader(
            guest, layout, keep=0 if others else writer.keeps, insist=options.every_page
        )
        with held_still(guest, wanted=options.freeze) as thaw:
            if options.freeze:
                spool.hurry()
            started = time.perf_counter()
            _copy(reader, writer, result, options, base, progress)
            result.copy_seconds = time.perf_counter() - started
            result.consistent = _consistent(paused_before, _paused_after(guest, result))
            result.frozen_seconds = thaw()
        result.spool_overflowed = spool.overflowed
        spool.let_through()
        writer.finish(consistent=result.consistent)
        result.written_bytes = writer.written_bytes
        result.uniform_bytes = writer.fill_bytes
        if writer.changed_granules is not None:
            result.changed_bytes = writer.changed_granules * GRANULE_BYTES
    return result


def decide_scope(layout: Layout, options: SaveOptions, source: str) -> list[Extent]:
    """Return the extents to save, by address: ranges as asked, slots by id, or all memory.

    Raises MisalignedError, RangeError, UsageError.
    """
    if options.ranges:
        if options.slots:
            raise UsageError("--range and --slot exclude each other")
        check_aligned(options.ranges, layout.page_size_bytes, "guest's page size")
        check_inside(options.ranges, [Extent(s.ipa, s.size_bytes) for s in layout.slots], source)
        return merged(options.ranges)
    if options.slots:
        return slot_extents(layout.slots, options.slots, "the guest")
    return layout.taggable


def _skipped(layout: Layout, options: SaveOptions) -> tuple[Memslot, ...]:
    if options.ranges or options.slots:
        return ()
    return tuple(slot for slot in layout.slots if slot.kind == "device")


def _copy(
    reader: TagReader,
    writer: SnapshotWriter,
    result: SaveResult,
    options: SaveOptions,
    base: Layers | None,
    progress: Progress,
) -> None:
    total, done = total_bytes(result.scope), 0
    progress(0, total)
    reached: list[Extent] = []
    try:
        steps = reader.read if base else reader.read_later
        for step in steps(result.scope, every_page=options.every_page):
            if isinstance(step, Missing):
                _note_missing(step, writer, result, options)
            else:
                _add(step, writer, base)
                result.saved_bytes += step.size_bytes
            reached.append(Extent(step.ipa, step.size_bytes))
            reached = merged(reached)
            done += step.size_bytes
            progress(done, total)
    except GuestError as error:
        at = reached[-1].end if reached else result.scope[0].ipa
        lost = isinstance(error, GuestLostError) and result.saved_bytes > 0
        if not lost or options.partial != "keep":
            raise _with_where(error, result, at) from error.__cause__
        result.lost = _with_where(error, result, at).message
        for extent in without(result.scope, reached):
            missing = Missing(extent.ipa, extent.size_bytes, None, "the guest ended meanwhile")
            writer.add_missing(missing)
            result.missing.add(missing)
    if not result.saved_bytes:
        raise _nothing(result, reader)


def _on(base: Layers, header: Header) -> Header:
    """Return the header of a delta, after a check of the whole base that it relies on."""
    base.need_whole()
    if base.page_size_bytes != header.page_size_bytes:
        raise UsageError(
            f"{base.name} has pages of {base.page_size_bytes} bytes, but the guest has pages of"
            f" {header.page_size_bytes}: a delta needs the same page size",
            hint="save the whole guest, without --base",
        )
    base.check()
    return replace(header, base_id=base.header.snapshot_id)


def _add(step: Copied | Fill | Later, writer: SnapshotWriter, base: Layers | None) -> None:
    if isinstance(step, Later):
        writer.add_later(step.ipa, step.size_bytes, step.read)
    elif isinstance(step, Copied):
        writer.add_tags(step.ipa, step.tags, base=base.fill_in if base is not None else None)
    elif base is None:
        writer.add_fill(step.ipa, step.size_bytes, step.tag)
    else:
        for part, changed in base.changed_by(step):
            if changed:
                writer.add_fill(part.ipa, part.size_bytes, step.tag, changed=changed)
            else:
                writer.add_same(part.ipa, part.size_bytes)


def _note_missing(
    missing: Missing, writer: SnapshotWriter, result: SaveResult, options: SaveOptions
) -> None:
    if options.partial == "fail":
        raise PartialError(
            f"tags of {hex_range(Extent(missing.ipa, missing.size_bytes))} cannot be read:"
            f" {missing.reason}; {result.saved_bytes} bytes of guest memory had been read before",
            hint="leave out --partial fail: the snapshot is then written with those ranges marked"
            " as missing (status 3)",
            ipa=missing.ipa,
            size_bytes=missing.size_bytes,
            saved_bytes=result.saved_bytes,
        )
    writer.add_missing(missing)
    result.missing.add(missing)


def _with_where(error: GuestError, result: SaveResult, ipa: int) -> GuestError:
    """Return the same error, which now also says how far the save had come."""
    slot = next((s for s in result.info.memslots if s.ipa <= ipa < s.end), None)
    if result.saved_bytes:
        error.message += (
            f"; the tags of {result.saved_bytes} bytes had been read, up to {ipa:#x}"
            + (f" in slot {slot.id}" if slot else "")
        )
        error.args = (error.message,)
        error.details.update(saved_bytes=result.saved_bytes, saved_up_to=ipa)
    return error


def _nothing(result: SaveResult, reader: TagReader) -> GuestError:
    """Return the error for a save that read nothing: what it tried, and whether that was all."""
    (first,) = result.missing.first(1)
    failed, untried = reader.failed_pages, reader.untried_pages
    if untried:
        return GuestError(
            f"no tags were read: {failed:,} of {failed + untried:,} pages were tried, and none of"
            f" them can be read ({errno_name(first.errno or 0)} at {first.ipa:#x})",
            hint="use --every-page to try every page; nothing was saved",
            ipa=first.ipa,
            tried_pages=failed,
            untried_pages=untried,
        )
    return GuestError(
        f"no tags at all can be read: {first.ipa:#x}: {first.reason}",
        hint="check the memslots, and those given with --memslot; nothing was saved",
        ipa=first.ipa,
        tried_pages=failed,
        untried_pages=0,
    )


def _paused_after(guest: Guest, result: SaveResult) -> bool | None:
    return None if result.lost is not None else guest.paused()


def _spool_bytes(options: SaveOptions) -> int:
    if options.spool_bytes is not None:
        return options.spool_bytes
    return DEFAULT_SPOOL_BYTES if options.freeze else 0


def _consistent(before: bool | None, after: bool | None) -> bool | None:
    """Return whether the vCPUs stood still throughout, as far as the two ends show."""
    if before is False or after is False:
        return False
    return True if before and after else None
