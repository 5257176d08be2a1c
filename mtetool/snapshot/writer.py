"""Write a snapshot front to back, into anything that takes bytes."""

from __future__ import annotations

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar

from mtetool.buffers import as_bytes
from mtetool.errors import LayoutError, RangeError, no_thread
from mtetool.files.fields import storable_text
from mtetool.files.sink import Sink
from mtetool.guest import Missing
from mtetool.snapshot.frames import BaseTags, Encoded, Encoder
from mtetool.snapshot.heads import (
    DoneHead,
    TagsHead,
    encode_done,
    encode_header,
    encode_index,
    encode_missing,
    encode_tags,
    fill_head,
    same_head,
    storable,
)
from mtetool.snapshot.ledger import Ledger, LedgerError
from mtetool.snapshot.model import ADDRESS_LIMIT, MAX_ERRNO, Footer, Header, header_problem
from mtetool.snapshot.records import (
    CHECKSUM,
    DONE,
    END_MAGIC,
    HEAD,
    INDEX_ENTRY,
    INDX,
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_INDEX_ENTRIES,
    MAX_RECORDS,
    MISS,
    PREAMBLE,
    PROLOGUE,
    TAGS,
    TRAILER,
    VERSION,
    Digest,
    checksum_of,
)
from mtetool.uapi import GRANULE_BYTES, TAG_MAX
from mtetool.words import counted

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

T = TypeVar("T")

# More threads than this have nothing to do: the kernel's own copy is slower than two of them,
# and each needs memory for some chunks.
_MOST_JOBS = 4

# Chunks in flight for each worker: one that it encodes, one that waits for it.
_WINDOW_PER_JOB = 2

# Fills that wait after a chunk in flight; they are small, but must not pile up either.
_MAX_QUEUED = 4096


class _Stored(NamedTuple):
    """A record of tags as it will be written."""

    head: TagsHead
    frame: bytes
    changed: int | None


class SnapshotWriter:
    """Writes a snapshot; used as a context manager, in one thread.

    Records come out in the order of the calls; later ones for the same page replace earlier ones.
    Memory is bounded by a few chunks for each job, plus 32 bytes of index for each record. `jobs`
    threads encode (None: one for each CPU that this process may use, at most four); `out.write` is
    called only in the caller's thread.

    Raises LayoutError for a header that cannot be stored. Errors of `out` pass through unchanged.
    Leaving the context without `finish`, or by an exception, aborts: the output then has no end,
    and every reader refuses it.
    """

    def __init__(self, out: Sink, header: Header, *, level: int = 1, jobs: int | None = 1) -> None:
        problem = header_problem(header)
        if problem is not None:
            raise LayoutError(f"the guest's layout cannot be saved: {problem}")
        self.header = storable(header)
        self._page_granules = header.page_size_bytes // GRANULE_BYTES
        self._ledger = Ledger(header)
        self._log = _Log(out, self.header)
        self._encoder = Encoder(level, header.chunk_granules)
        self._jobs = jobs or min(len(os.sched_getaffinity(0)), _MOST_JOBS)
        self._pool = ThreadPoolExecutor(self._jobs, thread_name_prefix="encode")
        self.keeps = _WINDOW_PER_JOB * self._jobs
        """How many chunks can be in flight; their tags are still needed."""
        self.fill_bytes = 0
        """Bytes of guest memory in records of one tag so far."""
        # In the order of the records: chunks in flight, and fills, which need no work.
        self._pending: deque[Future[_Stored] | _Stored] = deque()
        self._n_chunks = 0
        # The last fill, held back: the next one may continue it.
        self._fill: TagsHead | None = None
        self._open = True
        self.changed_granules: int | None = None if header.base_id is None else 0
        """Granules of a delta that differ from the base so far; None where that is unknown."""

    def warm_up(self) -> None:
        """Start the threads and allocate what they need, so that no chunk waits for that.

        Raises HostError where no more threads can be started.
        """
        gate = threading.Barrier(self._jobs)

        def ready() -> None:
            try:
                self._encoder.warm_up()
                gate.wait()  # so that no thread does the work of two
            except threading.BrokenBarrierError:
                pass  # another thread failed, and says why
            except BaseException:
                gate.abort()
                raise

        try:
            started = [self._submit(ready) for _ in range(self._jobs)]
        except BaseException:
            gate.abort()
            raise
        for future in started:
            future.result()

    def add_tags(self, ipa: int, tags: TagBuffer, *, base: BaseTags | None = None) -> None:
        """Add the tags of the memory from `ipa` on (page-aligned), one byte a granule.

        `tags` is C-contiguous, of whole pages, at most the header's `chunk_granules` long, with
        bits 7:4 zero. It must not change until `keeps` more chunks have been added, or the end.
        With `base`, which is called in other threads, only the changes since then are written.
        Raises RangeError; ValueError, sooner or later, for bytes that are not tags; and what `base`
        raises.
        """
        page, view = self._page_granules, as_bytes(tags)
        if base is None:
            self._add(ipa, len(view), lambda: self._encoder(view, page))
        else:
            self._add(ipa, len(view), lambda: self._encoder.against(base, ipa, view, page))

    def add_later(self, ipa: int, size_bytes: int, read: Callable[[memoryview], None]) -> None:
        """As `add_tags`, for tags that a thread of the writer reads itself.

        `read` fills a buffer of one byte a granule. A later call, or `finish`, raises what it
        raises.
        """
        page = self._page_granules
        n_granules = size_bytes // GRANULE_BYTES
        self._add(ipa, n_granules, lambda: self._encoder.reading(read, n_granules, page))

    def add_changes(self, ipa: int, tags: TagBuffer) -> None:
        """As `add_tags`, for the exclusive-or of tags and those of the base."""
        view = as_bytes(tags)
        self._add(ipa, len(view), lambda: self._encoder.changes(view, self._page_granules))

    def _add(self, ipa: int, n_granules: int, encode: Callable[[], Encoded]) -> None:
        self._check(ipa, n_granules * GRANULE_BYTES)
        if n_granules > self.header.chunk_granules:
            raise RangeError(
                f"{n_granules} granules in a chunk of at most {self.header.chunk_granules}"
            )
        self._pending.append(self._submit(lambda: _stored(ipa, n_granules, encode())))
        self._n_chunks += 1
        while self._n_chunks > self.keeps:
            self._write_oldest()
        self._write_ready()

    def add_fill(self, ipa: int, size_bytes: int, tag: int, *, changed: int | None = None) -> None:
        """Add memory of any size (both page-aligned, in bytes) whose granules all have one tag.

        `changed` of them have another tag in the base. Raises RangeError.
        """
        self._check(ipa, size_bytes)
        if not 0 <= tag <= TAG_MAX:
            raise RangeError(f"a tag of {tag}; tags are 0 to {TAG_MAX}")
        granules = size_bytes // GRANULE_BYTES
        self._queue(fill_head(ipa, granules, tag, self._page_granules), changed)

    def add_same(self, ipa: int, size_bytes: int) -> None:
        """Add memory of any size (both page-aligned, in bytes) with the tags of the base.

        Raises RangeError.
        """
        self._check(ipa, size_bytes)
        if self.header.base_id is None:
            raise RangeError("the snapshot has no base")
        self._queue(same_head(ipa, size_bytes // GRANULE_BYTES), 0)

    def _queue(self, head: TagsHead, changed: int | None) -> None:
        self._pending.append(_Stored(head, b"", changed))
        self._write_ready()
        while len(self._pending) > _MAX_QUEUED:
            self._write_oldest()

    def add_missing(self, missing: Missing) -> None:
        """Add memory whose tags could not be read. Raises RangeError."""
        self._check(missing.ipa, missing.size_bytes)
        if missing.errno is not None and not 0 <= missing.errno <= MAX_ERRNO:
            raise RangeError(f"an errno of {missing.errno}")
        if missing.size_bytes >= ADDRESS_LIMIT:
            raise RangeError("one record cannot cover all of the address space")
        stored = Missing(
            missing.ipa, missing.size_bytes, missing.errno, storable_text(missing.reason)
        )
        self._settle()
        try:
            self._ledger.miss(stored)
        except LedgerError as error:
            raise RangeError(str(error)) from error
        granules = stored.size_bytes // GRANULE_BYTES
        self._log.write(MISS, encode_missing(stored), index=(stored.ipa, granules))

    @property
    def written_bytes(self) -> int:
        """The length of the snapshot so far."""
        return self._log.offset

    def finish(self, *, consistent: bool | None) -> Footer:
        """Write everything outstanding, the index and the end. Nothing can be added afterwards.

        Raises RangeError if pages of the scope were left out.
        """
        self._require_open()
        self._settle()
        self._close_pool()
        index_offset = self._log.offset
        index_records = self._log.write_index()
        try:
            footer = self._ledger.footer(self._log.records, consistent, self.changed_granules)
        except LedgerError as error:
            raise RangeError(str(error)) from error
        self._log.write_end(footer, index_offset, index_records)
        self._open = False
        return footer

    def abort(self) -> None:
        """Stop the threads and drop everything that was not written. Idempotent."""
        self._open = False
        self._close_pool()
        self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        unfinished = self._open
        self.abort()
        if unfinished and kind is None:
            raise RuntimeError("a snapshot was left without finish()")

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError("the snapshot was already finished or aborted")

    def _check(self, ipa: int, size_bytes: int) -> None:
        self._require_open()
        try:
            self._ledger.check(ipa, size_bytes)
        except LedgerError as error:
            raise RangeError(str(error), ipa=ipa, size_bytes=size_bytes) from error

    def _submit(self, work: Callable[[], T]) -> Future[T]:
        try:
            return self._pool.submit(work)
        except RuntimeError as error:
            raise no_thread("compressing", error) from error

    def _write_ready(self) -> None:
        while self._pending:
            oldest = self._pending[0]
            if isinstance(oldest, Future) and not oldest.done():
                return
            self._write_oldest()

    def _write_oldest(self) -> None:
        oldest = self._pending.popleft()
        if isinstance(oldest, Future):
            self._n_chunks -= 1
            oldest = oldest.result()
        head, frame, changed = oldest
        if self.changed_granules is not None:
            known = self.changed_granules
            self.changed_granules = None if changed is None else known + changed
        if head.fill is None:
            self._write_fill()
            self._write(head, frame)
            return
        self.fill_bytes += 0 if head.over_base else head.size_bytes
        last = self._fill
        if last is not None and _alike(last, head) and self._ledger.holds(last.ipa, head.end):
            self._fill = replace(
                last,
                granules=last.granules + head.granules,
                tagged_granules=last.tagged_granules + head.tagged_granules,
                tagged_pages=last.tagged_pages + head.tagged_pages,
            )
            return
        self._write_fill()
        self._fill = head

    def _write_fill(self) -> None:
        """Write the fill that was held back."""
        head, self._fill = self._fill, None
        if head is not None:
            self._write(head, b"")

    def _write(self, head: TagsHead, frame: bytes) -> None:
        try:
            self._ledger.tags(head)
        except LedgerError as error:
            raise RangeError(str(error)) from error
        self._log.write(TAGS, encode_tags(head), frame, index=(head.ipa, head.granules))

    def _settle(self) -> None:
        while self._pending:
            self._write_oldest()
        self._write_fill()

    def _close_pool(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def _stored(ipa: int, n_granules: int, found: Encoded) -> _Stored:
    head = TagsHead(
        ipa,
        n_granules,
        found.fill,
        found.tagged_granules,
        found.tagged_pages,
        found.runs,
        found.over_base,
        found.split,
    )
    return _Stored(head, found.frame, found.changed)


def _alike(first: TagsHead, second: TagsHead) -> bool:
    """Whether the second fill continues the first."""
    same = (first.fill, first.over_base) == (second.fill, second.over_base)
    return same and first.end == second.ipa


class _Log:
    """Writes records one after another: numbers, checksums, offsets, the index, the end."""

    def __init__(self, out: Sink, header: Header) -> None:
        self._out = out
        self._digest = Digest()
        self._index = array("B")
        self.records = 0
        self.offset = 0
        head = encode_header(header)
        if len(head) > MAX_HEADER_BYTES:
            raise LayoutError(
                f"the guest's layout cannot be saved: {counted(len(header.memslots), 'memslot')}"
                f" and {counted(len(header.scope), 'range')} are more than a header can hold"
            )
        prologue = PROLOGUE.pack(MAGIC, VERSION, 0)
        self._put(prologue)
        self.write(HEAD, head, prologue=prologue)

    def _put(self, data: bytes) -> None:
        self.offset += len(data)
        self._out.write(data)

    def write(
        self,
        kind: bytes,
        head: bytes,
        payload: bytes = b"",
        *,
        prologue: bytes = b"",
        index: tuple[int, int] | None = None,
    ) -> None:
        """Write a record; `index` is the address and number of granules for its index entry."""
        if self.records >= MAX_RECORDS:
            raise RangeError(f"a snapshot can have at most {MAX_RECORDS} records")
        preamble = PREAMBLE.pack(kind, len(head), len(payload), self.records)
        checksum = CHECKSUM.pack(checksum_of(prologue, preamble, head, payload))
        start = self.offset
        self._put(preamble + checksum + head)
        if payload:
            self._put(payload)
        self.records += 1
        if kind != DONE:
            self._digest.add(checksum)
        if index is not None:
            self._index.frombytes(INDEX_ENTRY.pack(start, *index, kind, self.offset - start))

    def write_index(self) -> int:
        """Write all parts of the index; return how many there are."""
        entries = memoryview(self._index)
        step = MAX_INDEX_ENTRIES * INDEX_ENTRY.size
        parts = 0
        for start in range(0, len(entries), step):
            part = bytes(entries[start : start + step])
            self.write(INDX, encode_index(len(part) // INDEX_ENTRY.size), part)
            parts += 1
        return parts

    def write_end(self, footer: Footer, index_offset: int, index_records: int) -> None:
        """Write the end record and the trailer."""
        start = self.offset
        done = DoneHead(footer, index_offset, index_records, self._digest.value)
        self.write(DONE, encode_done(done))
        self._put(TRAILER.pack(start, END_MAGIC))
