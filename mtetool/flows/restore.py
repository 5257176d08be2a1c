"""Restoring a snapshot's tags into a guest, exactly: untagged memory ends up untagged."""

from __future__ import annotations

import errno
import heapq
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import InitVar, dataclass, field

from mtetool import loops
from mtetool.buffers import prepared
from mtetool.errors import (
    STATUS_OK,
    STATUS_PARTIAL,
    BusyError,
    InterruptedWorkError,
    LayoutError,
    MtetoolError,
    SignalError,
)
from mtetool.flows.comparing import Comparer, add_differences
from mtetool.flows.relocation import Relocation, check_fit
from mtetool.guest import Extent, Guest, Memslot, Missing, Pending
from mtetool.snapshot.model import Header
from mtetool.snapshot.reader import SnapshotReader
from mtetool.sources.allocating import check_allocates_nothing
from mtetool.sources.copying import (
    Copied,
    Fill,
    TagReader,
    check_takes_tags,
    tagged_layout,
    write_extent,
)
from mtetool.sources.layers import Layers
from mtetool.sources.layout import Layout, common, hex_range, merged, slots_of, total_bytes
from mtetool.sources.pieces import Progress, constant, no_progress
from mtetool.sources.stored import Stored, stored
from mtetool.sources.tally import Tally
from mtetool.streaming import Rows, extent_row
from mtetool.uapi import GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What the user asked for; `moves` are pairs of a slot's old and new IPA.

    `every_page` also writes tags of 0 where the guest cannot have others, even where that
    allocates memory. The result lists only the first `listed` ranges of a kind (None: all).
    """

    verify: bool = True
    dry_run: bool = False
    every_page: bool = False
    moves: tuple[tuple[int, int], ...] = ()
    listed: int | None = None


@dataclass
class RestoreResult:
    """What happened to every page of the snapshot; addresses are the guest's.

    Only a dry run fills `changes`: the ranges where the guest's tags differ from the snapshot's.
    `stopped` says why the restore ended early, if it did. `copy_seconds` runs from the first copy
    to the end of the last.
    """

    header: Header
    paused: bool | None
    dry_run: bool
    listed: InitVar[int | None] = None
    restored_bytes: int = 0
    restored_up_to: int | None = None
    verified_bytes: int = 0
    readonly_bytes: int = 0
    missing: Tally[Missing] = field(init=False)
    refused: Tally[Missing] = field(init=False)
    readonly_differing: Tally[Extent] = field(init=False)
    verify_differing: Tally[Extent] = field(init=False)
    changes: Tally[Extent] = field(init=False)
    stopped: str | None = None
    copy_seconds: float = 0.0

    def __post_init__(self, listed: int | None) -> None:
        self.missing, self.refused = Tally(listed), Tally(listed)
        self.readonly_differing, self.verify_differing = Tally(listed), Tally(listed)
        self.changes = Tally(listed)

    @property
    def status(self) -> int:
        """The exit status: 0, or 3 where any page did not get the snapshot's tags."""
        short = (self.missing, self.refused, self.readonly_differing, self.verify_differing)
        return STATUS_PARTIAL if any(short) or self.stopped else STATUS_OK

    def not_as_wanted(self) -> Iterator[Extent]:
        """Yield the listed ranges where the guest does not have the snapshot's tags."""
        refused = (Extent(item.ipa, item.size_bytes) for item in self.refused)
        found = (refused, self.readonly_differing, self.verify_differing)
        last: Extent | None = None
        for extent in heapq.merge(*found, key=lambda extent: extent.ipa):
            if last is not None and extent.ipa <= last.end:
                last = Extent(last.ipa, max(last.end, extent.end) - last.ipa)
                continue
            if last is not None:
                yield last
            last = extent
        if last is not None:
            yield last


def restore(
    open_reader: Callable[[], SnapshotReader | Layers],
    guest: Guest,
    options: RestoreOptions,
    *,
    again: bool,
    progress: Progress = no_progress,
) -> RestoreResult:
    """Write a snapshot's tags into a guest.

    `open_reader` starts at the snapshot's first byte. With `again` it can do so a second time, and
    the whole snapshot is read and checked before anything is written. Without it (a pipe), each
    piece is checked before it is used.

    Raises SnapshotError, LayoutError, MisalignedError, UsageError, BaseNeededError,
    WouldAllocateError; BusyError when the guest logs dirty pages and nothing was written. An error
    after the first write says that something was written.
    """
    try:
        work, reader = _prepared(open_reader, guest, options, again=again)
    except SignalError as caught:
        if not options.dry_run:
            caught.word = _interrupted(caught.number, "nothing was written", restored_bytes=0)
        raise
    return work.run(reader, progress)


def _interrupted(number: int, message: str, **details: object) -> InterruptedWorkError:
    hint = "run the same restore again: it puts every tag in its place"
    return InterruptedWorkError(message, number, hint=hint, **details)


def _prepared(
    open_reader: Callable[[], SnapshotReader | Layers],
    guest: Guest,
    options: RestoreOptions,
    *,
    again: bool,
) -> tuple[_Restorer, Stored]:
    """Do everything that comes before the first write."""
    reader = stored(open_reader())
    header = reader.header
    layout = tagged_layout(guest, "the guest", slots_of(header))
    relocation = Relocation(options.moves, header.memslots)
    relocation.check_targets(layout.page_size_bytes)
    gone: list[Extent] = []
    if again:
        checked = reader.check()
        planned = checked.held
        gone = [Extent(missing.ipa, missing.size_bytes) for missing in reader.missing]
    else:
        ram = [Extent(s.ipa, s.size_bytes) for s in header.memslots if s.kind != "device"]
        planned = common(header.scope, ram) if ram else list(header.scope)
    scope = relocation.moved(merged(header.scope))
    targets = relocation.moved(planned)
    check_fit(targets, layout, scope, relocation.moved(merged(gone)))
    check_allocates_nothing(guest, targets, "the guest", every_page=options.every_page)
    to_write = common(targets, layout.writable)
    if to_write:
        check_takes_tags(guest, to_write[0].ipa // layout.page_size_bytes * layout.page_size_bytes)
    if again:
        reader = stored(open_reader())
        checked.expect_same(reader.header)
    return _Restorer(guest, layout, relocation, header, options), reader


@dataclass(frozen=True, slots=True, eq=False)
class _Begun:
    """A write in flight, counted from 1; `steps` finish it.

    `read_back` fills `found` with the tags that the guest has after the write.
    """

    number: int
    ipa: int
    tags: memoryview
    steps: Iterator[Extent | Missing]
    may_be_readonly: bool
    found: memoryview
    read_back: Pending | None

    @property
    def is_small(self) -> bool:
        return len(self.tags) <= Guest.small_granules

    def overlaps(self, ipa: int, size_bytes: int) -> bool:
        return ipa < self.ipa + len(self.tags) * GRANULE_BYTES and self.ipa < ipa + size_bytes


class _Restorer:
    """One restore under way: it takes pieces in the order of the snapshot.

    Up to `depth` writes (the guest's) are in flight, each with its read-back: while the kernel
    copies for one, earlier ones are compared with what the guest has. Small ones are begun by the
    hundred, because the guest makes them together.
    """

    def __init__(
        self,
        guest: Guest,
        layout: Layout,
        relocation: Relocation,
        header: Header,
        options: RestoreOptions,
    ) -> None:
        self._guest = guest
        self._layout = layout
        self._relocation = relocation
        self._options = options
        self._reader = TagReader(guest, layout, insist=options.every_page)
        self._comparer = Comparer(self._reader)
        self._begun: deque[_Begun] = deque()
        self._n_started = 0
        self._begun_up_to = 0
        self._wrote_beyond = False
        # Room for read-backs in flight. With one write at a time, a read after it is as good.
        in_flight = options.verify and not options.dry_run and guest.depth > 1
        n_found = guest.depth if in_flight else 0
        self._found = [prepared(guest.max_copy_granules) for _ in range(n_found)]
        self.result = RestoreResult(header, guest.paused(), options.dry_run, options.listed)

    def run(self, reader: Stored, progress: Progress) -> RestoreResult:
        total, done = total_bytes(reader.header.scope), 0
        progress(0, total)
        started = time.perf_counter()
        try:
            for step in reader.steps(keep=self._guest.depth - 1):
                if isinstance(step, Copied):
                    n_before = self._n_started
                    self._take(step.ipa, step.tags)
                    while self._begun and self._begun[0].number <= n_before:
                        self._finish_first()  # its buffer is reused next
                elif isinstance(step, Fill):
                    self._take_fill(step)
                done += step.size_bytes
                progress(done, total)
            self._finish_writing()
        except BusyError as error:
            if not self.result.restored_bytes and not self._wrote_beyond:
                raise
            self.result.stopped = error.message
        except MtetoolError as error:
            with suppress(MtetoolError):
                self._finish_writing()
            raise self._with_what_was_done(error) from error.__cause__
        except SignalError as caught:
            # Writes in flight are not waited for, and do not count.
            if not self._options.dry_run:
                word = _interrupted(caught.number, "the restore is not complete")
                self._with_what_was_done(word)
                caught.word = word
            raise
        finally:
            self.result.copy_seconds = time.perf_counter() - started
        for missing in reader.missing:
            self._leave_out(missing)
        return self.result

    def _with_what_was_done(self, error: MtetoolError) -> MtetoolError:
        result = self.result
        left = next(result.not_as_wanted(), None)
        if left is not None:
            found = (result.refused, result.readonly_differing, result.verify_differing)
            error.message += (
                f"; {sum(tally.size_bytes for tally in found)} bytes before that did not get the"
                f" snapshot's tags, the first at {left.ipa:#x}"
            )
            error.args = (error.message,)
        error.details.setdefault("not_restored", Rows(map(extent_row, result.not_as_wanted())))
        if self._options.dry_run:
            return error
        if result.restored_bytes and result.restored_up_to is not None:
            error.message += (
                f"; the tags of {result.restored_bytes} bytes of guest memory were already written,"
                f" the last at {result.restored_up_to - GRANULE_BYTES:#x}"
            )
        elif self._n_started:
            error.message += "; the first write had begun, and may have changed tags"
        else:
            error.message += "; nothing was written before that"
        error.args = (error.message,)
        error.details.setdefault("restored_bytes", result.restored_bytes)
        error.details.setdefault("restored_up_to", result.restored_up_to)
        return error

    def _leave_out(self, missing: Missing) -> None:
        for _, target in self._relocation(Extent(missing.ipa, missing.size_bytes)):
            self.result.missing.add(
                Missing(target.ipa, target.size_bytes, missing.errno, missing.reason)
            )

    def _take(self, ipa: int, tags: memoryview) -> None:
        """Put tags at an address of the snapshot into their slots in the guest."""
        whole = Extent(ipa, len(tags) * GRANULE_BYTES)
        for offset, target in self._relocation(whole):
            first = offset // GRANULE_BYTES
            part = tags[first : first + target.size_bytes // GRANULE_BYTES]
            for at, stop, slot in self._by_slot(target):
                low, high = (at - target.ipa) // GRANULE_BYTES, (stop - target.ipa) // GRANULE_BYTES
                self._put(at, part[low:high], slot)

    def _take_fill(self, fill: Fill) -> None:
        """As `_take`, for one tag over any length."""
        for _, target in self._relocation(Extent(fill.ipa, fill.size_bytes)):
            for at, stop, slot in self._by_slot(target):
                self._put_fill(Fill(at, stop - at, fill.tag), slot)

    def _put_fill(self, fill: Fill, slot: Memslot) -> None:
        result = self.result
        if slot.readonly or slot.kind == "rom":
            self._comparer.compare_fill(fill, result.readonly_differing, result.refused)
            result.readonly_bytes += fill.size_bytes
        elif self._options.dry_run:
            self._comparer.compare_fill(fill, result.changes, result.refused)
        else:
            page = self._layout.page_size_bytes
            at, end = fill.ipa, fill.ipa + fill.size_bytes
            first, last = -(-at // page) * page, end // page * page
            if not fill.tag and first < last:
                # Skips a terabyte of untouched memory in one step.
                self._put_constant(fill.tag, at, first, slot)
                at = first
                for there in self._tagged_there(Extent.between(first, last)):
                    self._already_so(at, there.ipa)
                    self._put_constant(fill.tag, there.ipa, there.end, slot)
                    at = there.end
                self._already_so(at, last)
                at = last
            self._put_constant(fill.tag, at, end, slot)

    def _put_constant(self, tag: int, start: int, stop: int, slot: Memslot) -> None:
        most = self._guest.max_copy_granules
        for ipa in range(start, stop, most * GRANULE_BYTES):
            n_granules = min((stop - ipa) // GRANULE_BYTES, most)
            self._put(ipa, constant(tag, n_granules), slot)

    def _already_so(self, start: int, stop: int) -> None:
        if start < stop:
            self._finish_writing()
            self.result.restored_bytes += stop - start
            self.result.restored_up_to = stop
            if self._options.verify:
                self.result.verified_bytes += stop - start

    def _by_slot(self, target: Extent) -> Iterator[tuple[int, int, Memslot]]:
        at, end = target.ipa, target.ipa + target.size_bytes
        while at < end:
            slot = self._layout.slot_at(at)
            if slot is None or slot.kind == "device":
                # The header was checked, but a pipe's pieces can break its promise.
                raise LayoutError(
                    f"the snapshot holds tags of {hex_range(target)}, where the guest has no"
                    " memory that takes tags",
                    ipa=at,
                )
            stop = min(slot.end, end)
            yield at, stop, slot
            at = stop

    def _put(self, ipa: int, tags: memoryview, slot: Memslot) -> None:
        result = self.result
        if slot.readonly or slot.kind == "rom":
            self._compare_readonly(ipa, tags)
        elif self._options.dry_run:
            self._comparer.compare(ipa, tags, result.changes, result.refused)
        else:
            for at, part in self._whole_pages(ipa, tags):
                if self._guest.makes_pages and not self._options.every_page:
                    self._write_where_it_matters(at, part, slot)
                else:
                    self._write(at, part, may_be_readonly=slot.readonly is None)

    def _write_where_it_matters(self, ipa: int, tags: memoryview, slot: Memslot) -> None:
        """Write whole pages, except tags of 0 where the guest has no others, and maybe no page."""
        at, end = ipa, ipa + len(tags) * GRANULE_BYTES
        for there in self._tagged_there(Extent.between(at, end)):
            self._write_tagged_pages(at, tags[(at - ipa) // GRANULE_BYTES :], there.ipa - at, slot)
            part = tags[(there.ipa - ipa) // GRANULE_BYTES :][: there.size_bytes // GRANULE_BYTES]
            self._write(there.ipa, part, may_be_readonly=slot.readonly is None)
            at = there.end
        self._write_tagged_pages(at, tags[(at - ipa) // GRANULE_BYTES :], end - at, slot)

    def _tagged_there(self, extent: Extent) -> Iterator[Extent]:
        self._finish_overlapping(extent.ipa, extent.size_bytes)
        if self._options.every_page:
            return iter([extent])
        return self._guest.may_be_tagged(extent)

    def _write_tagged_pages(
        self, ipa: int, tags: memoryview, size_bytes: int, slot: Memslot
    ) -> None:
        """In `size_bytes` of memory without tags, write the pages that must get some."""
        page = self._layout.page_size_bytes
        n_pages, first = size_bytes // page, 0
        part = tags[: size_bytes // GRANULE_BYTES]
        while first < n_pages:
            tagged, behind = loops.page_run(part, page // GRANULE_BYTES, first)
            start, stop = (n * page // GRANULE_BYTES for n in (first, behind))
            at = ipa + first * page
            if tagged:
                self._write(at, part[start:stop], may_be_readonly=slot.readonly is None)
            else:
                self._already_so(at, ipa + behind * page)
            first = behind

    def _compare_readonly(self, ipa: int, tags: memoryview) -> None:
        result = self.result
        self._comparer.compare(ipa, tags, result.readonly_differing, result.refused)
        result.readonly_bytes += len(tags) * GRANULE_BYTES

    def _whole_pages(self, ipa: int, tags: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Cut tags at the guest's pages; the guest supplies the rest of a page held in part.

        A snapshot of a host with smaller pages may cut a page into several pieces, in any
        order: each piece then changes its own part of the page.
        """
        page = self._layout.page_size_bytes
        end = ipa + len(tags) * GRANULE_BYTES
        first, last = -(-ipa // page) * page, end // page * page
        if first > last:  # Inside one page.
            first = last = end
        for start, stop in ((ipa, first), (first, last), (last, end)):
            if start >= stop:
                continue
            part = tags[(start - ipa) // GRANULE_BYTES : (stop - ipa) // GRANULE_BYTES]
            if start % page or stop % page:
                filled = self._filled_up(start, part)
                if filled is not None:
                    yield start // page * page, filled
            else:
                yield start, part

    def _filled_up(self, ipa: int, part: memoryview) -> memoryview | None:
        self._finish_writing()  # they may be of the same page
        page = self._layout.page_size_bytes
        first = ipa // page * page
        for step in self._reader.read([Extent(first, page)], every_page=True):
            if isinstance(step, Copied):
                whole = memoryview(bytearray(step.tags))
                offset = (ipa - first) // GRANULE_BYTES
                whole[offset : offset + len(part)] = part
                return whole
            if isinstance(step, Missing):
                size_bytes = len(part) * GRANULE_BYTES
                self.result.refused.add(Missing(ipa, size_bytes, step.errno, step.reason))
        return None

    def _write(self, ipa: int, tags: memoryview, *, may_be_readonly: bool) -> None:
        """Begin to write and read back; finish earlier writes meanwhile."""
        most = self._guest.max_copy_granules
        for first in range(0, len(tags), most):
            part = tags[first : first + most]
            self._begin(ipa + first * GRANULE_BYTES, part, may_be_readonly=may_be_readonly)
            self._keep_few()

    def _keep_few(self) -> None:
        """Finish writes in flight if there are as many as are worth having there."""
        n_large = sum(not begun.is_small for begun in self._begun)
        depth, burst = self._guest.depth, self._guest.burst
        if n_large >= depth or (burst == 1 and len(self._begun) >= depth):
            self._finish_first()
        elif len(self._begun) * 4 >= burst > 1:
            # Not one by one: then each that follows would be alone.
            for _ in range(len(self._begun) // 2):
                self._finish_first()

    def _begin(self, ipa: int, tags: memoryview, *, may_be_readonly: bool) -> None:
        self._finish_overlapping(ipa, len(tags) * GRANULE_BYTES)
        insist = self._options.every_page
        self._n_started += 1  # a signal may come before the next line is done
        steps = write_extent(self._guest, ipa, tags, self._layout, insist=insist)
        found = self._room_for(len(tags))
        back = self._guest.begin_read(ipa, found) if self._found else None
        number = self._n_started
        self._begun.append(_Begun(number, ipa, tags, steps, may_be_readonly, found, back))
        self._begun_up_to = max(self._begun_up_to, ipa + len(tags) * GRANULE_BYTES)

    def _room_for(self, n_granules: int) -> memoryview:
        """Room for a read-back in flight, if there are any: there are `depth` large ones."""
        if not self._found:
            return memoryview(b"")
        if n_granules <= Guest.small_granules:
            return memoryview(bytearray(n_granules))
        self._found.append(self._found.pop(0))
        return self._found[0][:n_granules]

    def _finish_overlapping(self, ipa: int, size_bytes: int) -> None:
        """Finish the writes to this memory, before a later step replaces them."""
        if ipa >= self._begun_up_to:
            return  # as nearly always: a snapshot is in order of address
        if any(begun.overlaps(ipa, size_bytes) for begun in self._begun):
            self._finish_writing()

    def _finish_writing(self) -> None:
        while self._begun:
            self._finish_first()

    def _finish_first(self) -> None:
        begun = self._begun.popleft()
        try:
            self._take_steps(begun)
        except BusyError:
            # The VM may have stopped logging meanwhile: then a later write went through.
            self._wrote_beyond = any(_has_written(later) for later in self._begun)
            self._begun.clear()
            raise
        except BaseException:
            # Later writes may have happened, but do not count: all memory up to where a restore
            # came has its tags, or is reported.
            self._begun.clear()
            raise

    def _take_steps(self, begun: _Begun) -> None:
        result = self.result
        for step in begun.steps:
            first = (step.ipa - begun.ipa) // GRANULE_BYTES
            part = begun.tags[first : first + step.size_bytes // GRANULE_BYTES]
            if isinstance(step, Missing):
                self._refuse(step, part, may_be_readonly=begun.may_be_readonly)
                continue
            result.restored_bytes += step.size_bytes
            result.restored_up_to = step.ipa + step.size_bytes
            if self._options.verify:
                self._verify(begun, step, part)
                result.verified_bytes += step.size_bytes

    def _verify(self, begun: _Begun, step: Extent, wanted: memoryview) -> None:
        """Compare what was written with the read-back or, if that is not whole, page by page."""
        result = self.result
        back = begun.read_back if len(wanted) == len(begun.tags) else None
        if back is not None and _is_whole(back, step.size_bytes):
            add_differences(result.verify_differing, step.ipa, begun.found, wanted)
        else:
            self._comparer.compare(
                step.ipa, wanted, result.verify_differing, result.refused, every_page=True
            )

    def _refuse(self, step: Missing, part: memoryview, *, may_be_readonly: bool) -> None:
        """Note pages that cannot be written; if unknown, a read shows if they are read-only."""
        page_granules = self._layout.page_size_bytes // GRANULE_BYTES
        probe: Tally[Missing] = Tally()
        # The kernel's answer for read-only memory; any other errno has another reason.
        may_be_readonly = may_be_readonly and step.errno == errno.EFAULT
        if may_be_readonly:
            first = part[:page_granules]
            self._comparer.compare(step.ipa, first, Tally(), probe, every_page=True)
        if may_be_readonly and not probe:
            self._compare_readonly(step.ipa, part)
        else:
            self.result.refused.add(step)


def _has_written(begun: _Begun) -> bool:
    """Whether a write in flight got anywhere."""
    with suppress(MtetoolError):
        return isinstance(next(begun.steps, None), Extent)
    return False


def _is_whole(copy: Pending, size_bytes: int) -> bool:
    """Return whether a copy was complete. If not, another copy of the memory shows the error."""
    with suppress(OSError):
        return copy() == size_bytes
    return False
