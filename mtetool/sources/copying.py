"""Copy tags out of a guest and into one, around memory that cannot be copied (`sources.around`).

The kernel returns how much of a copy it completed, and an errno only when that is nothing
(Documentation/virt/kvm/api.rst, KVM_ARM_MTE_COPY_TAGS). So a copy that came back short is retried
at the place where it stopped, which gives the errno.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

from mtetool.buffers import prepared
from mtetool.errors import GuestError, errno_name
from mtetool.guest import Extent, Guest, Memslot, Missing, Pending
from mtetool.sources.around import Transfer, raise_for_whole_vm, way_around
from mtetool.sources.layout import Layout, layout_of, total_bytes
from mtetool.uapi import GRANULE_BYTES


@dataclass(frozen=True, slots=True)
class Copied:
    """Tags that were read, one byte a granule; see `mtetool.buffers` for how long they are valid.

    With `over_base`, in a delta, they are the exclusive-or of the tags and those of its base.
    """

    ipa: int
    tags: memoryview
    over_base: bool = False

    @property
    def size_bytes(self) -> int:
        """Bytes of guest memory."""
        return len(self.tags) * GRANULE_BYTES


def check_mte_is_on(guest: Guest) -> None:
    """Raise MteOffError for a guest without MTE, whatever its layout and its snapshot are.

    This comes before any other request to the guest: where nothing needs to be read (memory that
    was never touched, an empty snapshot), no copy would report it.
    """
    guest.read_tags(0, bytearray())  # an empty copy passes every check, or says why not


def check_has_tags(layout: Layout, name: str) -> None:
    """Raise GuestError for a guest without any memory that has tags."""
    if not layout.taggable:
        raise GuestError(
            f"{name} has no memory that carries tags",
            hint="check its memslots: mtetool emu show; or name them: --memslot IPA:SIZE",
        )


def tagged_layout(guest: Guest, name: str, otherwise: Sequence[Memslot] | None = None) -> Layout:
    """The layout of a guest that has tags; `otherwise` is as for `layout_of`.

    Raises MteOffError, GuestError for a guest without memory, LayoutUnknownError.
    """
    check_mte_is_on(guest)
    layout = layout_of(guest, otherwise)
    guest.prepare()
    check_has_tags(layout, name)
    return layout


def check_takes_tags(guest: Guest, ipa: int) -> None:
    """Raise what a write of tags at `ipa` would raise for any memory; nothing is written.

    PermissionRefusedError where this user may not write to the guest, BusyError while it logs
    dirty pages, GuestError.
    """
    try:
        guest.write_tags(ipa, bytearray())
    except OSError as error:
        number = error.errno or errno.EIO
        raise_for_whole_vm(number, ipa, writing=True)
        raise GuestError(
            f"no tags can be written: {os.strerror(number)} ({errno_name(number)})",
            errno=errno_name(number),
        ) from error


@dataclass(frozen=True, slots=True)
class Fill:
    """Any number of granules that all have one tag: nothing was read for them."""

    ipa: int
    size_bytes: int
    tag: int
    over_base: bool = False


@dataclass(frozen=True, slots=True)
class Later:
    """Tags that their user reads later, in a thread of its own."""

    ipa: int
    size_bytes: int
    read: Callable[[memoryview], None]
    """Fills a buffer of one byte a granule. Raises OSError where not all can be read."""


Step = Copied | Fill | Missing
"""A result of reading: each has `ipa` and `size_bytes` of guest memory."""


class _Begun(NamedTuple):
    """A copy that was begun before its turn."""

    ipa: int
    n_granules: int
    copy: Pending


class TagReader:
    """Reads a guest's tags in chunks; `keep` chunks stay valid besides the last.

    A chunk is as long as the guest can copy at once, or `chunk_granules`. With `insist`, every page
    of memory that cannot be read is tried, however much there is.
    """

    def __init__(
        self,
        guest: Guest,
        layout: Layout,
        *,
        chunk_granules: int | None = None,
        keep: int = 0,
        insist: bool = False,
    ) -> None:
        self._guest = guest
        self._insist = insist
        self.failed_pages = 0
        """Pages that were tried and cannot be read."""
        self.untried_pages = 0
        """Pages that were assumed unreadable without a try, besides those that failed."""
        self._layout = layout
        page = layout.page_size_bytes
        chunk_bytes = (chunk_granules or guest.max_copy_granules) * GRANULE_BYTES
        self._chunk_bytes = -(-chunk_bytes // page) * page
        # Faulted in now: a guest may be waiting, paused, from the first copy on. (Fresh buffers
        # for each chunk would cost more than the copy.)
        n_granules = self._chunk_bytes // GRANULE_BYTES
        # More buffers, for the copies that are begun before a chunk is handed out; if no chunk is
        # kept, nobody waits, and they are made when they are needed.
        self._n_ahead = guest.depth if guest.depth > 1 else 0
        n_buffers = 1 + keep + (self._n_ahead if keep else 0)
        self._buffers = [prepared(n_granules) for _ in range(n_buffers)]
        self._zeros = memoryview(bytes(n_granules))
        self._begun: deque[_Begun] = deque()
        self._together = memoryview(b"")

    def read(self, extents: Iterable[Extent], *, every_page: bool = False) -> Iterator[Step]:
        """Read the tags of `extents` (page-aligned), in their order; yield what is missing, too.

        Every page of the extents is in exactly one of the results. Memory that the guest says
        cannot be tagged is not read, unless `every_page` is true; either way results are cut at the
        same places, in chunks from the extent's start. Raises GuestError if the guest is gone or
        refuses as a whole.
        """
        for step in self._read_all(extents, every_page, later=False):
            assert not isinstance(step, Later)
            yield step

    def read_later(
        self, extents: Iterable[Extent], *, every_page: bool = False
    ) -> Iterator[Step | Later]:
        """As `read`, but chunks that any thread can read are left to others."""
        return self._read_all(extents, every_page, later=True)

    def _read_all(
        self, extents: Iterable[Extent], every_page: bool, *, later: bool
    ) -> Iterator[Step | Later]:
        for group in self._groups(extents):
            self._drop_begun()  # of an earlier read that was abandoned
            if len(group) > 1:
                yield from self._read_scattered(group, every_page)
                continue
            (extent,) = group
            parts = [extent] if every_page else self._guest.may_be_tagged(extent)
            yield from self._read(extent, _Ahead(parts), later=later)

    def _groups(self, extents: Iterable[Extent]) -> Iterator[list[Extent]]:
        """Put small extents that follow each other together, where reading them at once pays."""
        guest = self._guest
        most = min(guest.max_copy_granules // 2, self._chunk_bytes // GRANULE_BYTES)
        group: list[Extent] = []
        n_granules = 0
        for extent in extents:
            n_here = extent.size_bytes // GRANULE_BYTES
            is_small = guest.burst > 1 and n_here <= min(guest.small_granules, most)
            if group and (not is_small or len(group) == guest.burst or n_granules + n_here > most):
                yield group
                group, n_granules = [], 0
            if is_small:
                group.append(extent)
                n_granules += n_here
            else:
                yield [extent]
        if group:
            yield group

    def _read_scattered(self, group: list[Extent], every_page: bool) -> Iterator[Step | Later]:
        """Read small extents together; one that cannot be read is then read by itself.

        After each of those, fewer are tried together: where most fail, a burst is wasted.
        """
        at, n_together = 0, len(group)
        while at < len(group):
            some = group[at : at + n_together]
            steps = list(self._parts_of(some, every_page))
            rows = [part for parts in steps for part in parts]
            done = self._copy_scattered(rows)
            first = 0
            for extent, parts in zip(some, steps, strict=True):
                if first + total_bytes(parts) > done:
                    n_together = max(n_together // 4, 1)
                    yield from self._read(extent, _Ahead(parts), later=False)
                    at += 1
                    break
                yield self._placed(extent, parts, first)
                first += total_bytes(parts)
                at += 1
            else:
                n_together *= 2

    def _parts_of(self, extents: list[Extent], every_page: bool) -> Iterator[list[Extent]]:
        for extent in extents:
            yield [extent] if every_page else list(self._guest.may_be_tagged(extent))

    def _copy_scattered(self, rows: list[Extent]) -> int:
        """Read extents, one after another, into the buffer for that; return the bytes done."""
        if not rows:
            return 0
        import numpy as np

        n_granules = total_bytes(rows) // GRANULE_BYTES
        if len(self._together) < n_granules:
            self._together = memoryview(bytearray(n_granules))
        extents = np.array([(row.ipa, row.size_bytes) for row in rows], np.uint64)
        try:
            return self._guest.read_scattered(extents, self._together[:n_granules])
        except OSError:
            return 0  # the copy of the first alone says why

    def _placed(self, extent: Extent, parts: list[Extent], first_bytes: int) -> Copied | Fill:
        """An extent whose parts were read together, from `first_bytes` of guest memory on."""
        if not parts:
            return Fill(extent.ipa, extent.size_bytes, 0)
        buffer = self._buffers[0]
        tags = buffer[: extent.size_bytes // GRANULE_BYTES]
        tags[:] = self._zeros[: len(tags)]
        for part in parts:
            room = _slice(tags, extent.ipa, part.ipa, part.end)
            at = first_bytes // GRANULE_BYTES
            room[:] = self._together[at : at + len(room)]
            first_bytes += part.size_bytes
        self._buffers.append(self._buffers.pop(0))
        return Copied(extent.ipa, tags)

    def _read(self, extent: Extent, parts: _Ahead, *, later: bool) -> Iterator[Step | Later]:
        at = extent.ipa
        while at < extent.end:
            # Where the chunk ends: on the extent's own grid, whatever is left out.
            behind = at + self._chunk_bytes - (at - extent.ipa) % self._chunk_bytes
            behind = min(behind, extent.end)
            part = parts.at_or_behind(at)
            if part is None or part.ipa >= behind:
                stop = extent.end
                if part is not None:
                    stop = part.ipa - (part.ipa - extent.ipa) % self._chunk_bytes
                yield Fill(at, stop - at, 0)
                at = stop
                continue
            if later and self._guest.any_thread_reads(Extent.between(at, behind)):
                yield self._later(at, behind, parts)
                at = behind
                continue
            stop, error = self._read_chunk(at, behind, parts)
            if stop > at:
                tags = self._buffers[0][: (stop - at) // GRANULE_BYTES]
                self._buffers.append(self._buffers.pop(0))
                yield Copied(at, tags)
                at = stop
            if error is not None:
                part = parts.at_or_behind(at)
                end = part.end if part is not None else extent.end
                missing = self._around(at, end, error)
                yield missing
                at += missing.size_bytes

    def _around(self, at: int, end: int, error: OSError) -> Missing:
        gap = way_around(
            self._try, at, end, error, self._layout, writing=False, insist=self._insist
        )
        self.failed_pages += gap.failed_pages
        self.untried_pages += gap.untried_pages
        return gap.missing

    def _later(self, start: int, end: int, parts: _Ahead) -> Later:
        here: list[Extent] = []
        at = start
        while at < end and (part := parts.at_or_behind(at)) is not None and part.ipa < end:
            here.append(Extent.between(max(part.ipa, at), min(part.end, end)))
            at = here[-1].end

        def read(out: memoryview) -> None:
            done = start
            for there in [*here, Extent(end, 0)]:
                _slice(out, start, done, there.ipa)[:] = _slice(self._zeros, done, done, there.ipa)
                part = _slice(out, start, there.ipa, there.end)
                if part and self._guest.read_tags(there.ipa, part) != there.size_bytes:
                    raise OSError(errno.EFAULT, "not all of it can be read")
                done = there.end

        return Later(start, end - start, read)

    def _read_chunk(self, start: int, end: int, parts: _Ahead) -> tuple[int, OSError | None]:
        """Read into the first buffer; return where it stopped, and the error if it was early."""
        at = start
        while at < end and (pieces := parts.within(at, end, self._guest.burst)):
            self._begin(start, pieces)
            for piece in pieces:
                self._fill_with_zeros(start, at, piece.ipa)
                copy = self._begun.popleft().copy
                if piece is pieces[-1] and piece.end == end:
                    self._look_ahead(end, parts.end_of_part(piece.ipa))
                try:
                    done = copy()
                except OSError as error:
                    self._drop_begun()
                    return piece.ipa, error
                _check_completed(done, piece.size_bytes, piece.ipa, self._layout)
                at = piece.ipa + done
                if done < piece.size_bytes:
                    break  # the next copy from there says why
        self._fill_with_zeros(start, at, end)
        return end, None

    def _fill_with_zeros(self, start: int, at: int, end: int) -> None:
        n_granules = max(end - at, 0) // GRANULE_BYTES
        first = (at - start) // GRANULE_BYTES
        self._buffers[0][first : first + n_granules] = self._zeros[:n_granules]

    def _begin(self, start: int, pieces: list[Extent]) -> None:
        """Begin copies into the first buffer, except those that were begun already."""
        for n, piece in enumerate(pieces):
            n_granules = piece.size_bytes // GRANULE_BYTES
            if n < len(self._begun):
                if self._begun[n][:2] == (piece.ipa, n_granules):
                    continue
                self._drop_begun()
                self._begin(start, pieces)
                return
            room = self._buffers[0][(piece.ipa - start) // GRANULE_BYTES :][:n_granules]
            copy = self._guest.begin_read(piece.ipa, room)
            self._begun.append(_Begun(piece.ipa, n_granules, copy))

    def _drop_begun(self) -> None:
        """Wait for copies that were begun in vain: they may yet fill buffers that are used next."""
        while self._begun:
            with suppress(OSError):
                self._begun.popleft().copy()

    def _look_ahead(self, at: int, end: int) -> None:
        """Begin the copies from a chunk's end on, into the buffers that will then be the first."""
        at += sum(begun.n_granules for begun in self._begun) * GRANULE_BYTES
        while at < end and len(self._begun) < self._n_ahead:
            if len(self._buffers) < 2 + len(self._begun):
                self._buffers.append(prepared(len(self._zeros)))
            n_granules = min(end - at, self._chunk_bytes) // GRANULE_BYTES
            room = self._buffers[1 + len(self._begun)][:n_granules]
            self._begun.append(_Begun(at, n_granules, self._guest.begin_read(at, room)))
            at += n_granules * GRANULE_BYTES

    def _try(self, ipa: int, size_bytes: int) -> int:
        return self._guest.read_tags(ipa, self._buffers[0][: size_bytes // GRANULE_BYTES])

    def read_granules(
        self, extents: Iterable[Extent], *, every_page: bool = False
    ) -> Iterator[Step]:
        """As `read`, for extents of whole granules: the pages around them are read."""
        page = self._layout.page_size_bytes
        wanted = list(extents)
        around = [
            Extent.between(extent.ipa // page * page, -(-extent.end // page) * page)
            for extent in wanted
        ]
        steps = self.read(around, every_page=every_page)
        for extent, pages in zip(wanted, around, strict=True):
            left_bytes = pages.size_bytes
            while left_bytes:
                step = next(steps)
                left_bytes -= step.size_bytes
                start = max(step.ipa, extent.ipa)
                yield cut(step, start, min(step.ipa + step.size_bytes, extent.end) - start)


def _slice(tags: memoryview, ipa: int, start: int, stop: int) -> memoryview:
    """The part for [start, stop) of tags that begin at `ipa`."""
    return tags[(start - ipa) // GRANULE_BYTES : (stop - ipa) // GRANULE_BYTES]


def cut(step: Step, ipa: int, size_bytes: int) -> Step:
    """The part of a step from `ipa` on; whole granules inside of it."""
    if not isinstance(step, Copied):
        return replace(step, ipa=ipa, size_bytes=size_bytes)
    offset = (ipa - step.ipa) // GRANULE_BYTES
    tags = step.tags[offset : offset + size_bytes // GRANULE_BYTES]
    return Copied(ipa, tags, step.over_base)


def moved(step: Step, distance: int) -> Step:
    """The same step at an address so many bytes higher."""
    return replace(step, ipa=step.ipa + distance)


class _Ahead:
    """Ascending extents, read ahead."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = iter(extents)
        self._next: deque[Extent] = deque()

    def at_or_behind(self, ipa: int) -> Extent | None:
        """The first extent that ends after `ipa`; None where there is none."""
        while self._next and self._next[0].end <= ipa:
            self._next.popleft()
        while not self._next and (extent := next(self._extents, None)) is not None:
            if extent.end > ipa:
                self._next.append(extent)
        return self._next[0] if self._next else None

    def within(self, ipa: int, end: int, most: int) -> list[Extent]:
        """The first extents between two addresses, `most` of them, cut at these addresses."""
        found: list[Extent] = []
        extent, n = self.at_or_behind(ipa), 0
        while extent is not None and extent.ipa < end and len(found) < most:
            found.append(Extent.between(max(extent.ipa, ipa), min(extent.end, end)))
            n += 1
            if n == len(self._next) and (more := next(self._extents, None)) is not None:
                self._next.append(more)
            extent = self._next[n] if n < len(self._next) else None
        return found

    def end_of_part(self, ipa: int) -> int:
        """Where the first extent that ends after `ipa` ends."""
        extent = self.at_or_behind(ipa)
        return extent.end if extent else ipa


def write_extent(
    guest: Guest, ipa: int, tags: memoryview, layout: Layout, *, insist: bool = False
) -> Iterator[Extent | Missing]:
    """Begin to write `tags`, at most what the guest copies at once, from `ipa` on.

    (Both are whole pages.) Iterating over the result does the rest, and yields what was written and
    what could not be. With `insist`, every page of memory that cannot be written is tried. It
    raises BusyError while the VM logs dirty pages, GuestError if the guest is gone.
    """

    def write(at: int, size_bytes: int) -> int:
        first = (at - ipa) // GRANULE_BYTES
        return guest.write_tags(at, tags[first : first + size_bytes // GRANULE_BYTES])

    whole = Extent(ipa, len(tags) * GRANULE_BYTES)
    return _walk(guest.begin_write(ipa, tags), write, whole, layout, insist=insist)


def _walk(
    begun: Pending, transfer: Transfer, extent: Extent, layout: Layout, *, insist: bool
) -> Iterator[Extent | Missing]:
    """Write an extent that was begun whole. The caller uses each result before the next."""
    at, end = extent.ipa, extent.end
    while at < end:
        try:
            done = begun() if at == extent.ipa else transfer(at, end - at)
        except OSError as error:
            gap = way_around(transfer, at, end, error, layout, writing=True, insist=insist)
            yield gap.missing
            at += gap.missing.size_bytes
            continue
        _check_completed(done, end - at, at, layout)
        yield Extent(at, done)
        at += done


def _check_completed(done: int, size_bytes: int, at: int, layout: Layout) -> None:
    if not 0 < done <= size_bytes or done % layout.page_size_bytes:
        raise GuestError(
            f"the copy of {size_bytes} bytes at {at:#x} returned {done}, which is not a"
            " possible length",
            ipa=at,
        )
