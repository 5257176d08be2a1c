"""Writing a snapshot front to back, into anything that takes bytes."""

from __future__ import annotations

import os
from array import array
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Self

from mtetool.errors import HostError, HostIoError, LayoutError, RangeError
from mtetool.snapshot.frames import Compressor, Packed, count_tagged, uniform_packed
from mtetool.snapshot.heads import (
    DoneHead,
    TagsHead,
    encode_done,
    encode_header,
    encode_index,
    encode_missing,
    encode_tags,
    fill_head,
    storable,
)
from mtetool.snapshot.ledger import Ledger, LedgerError
from mtetool.snapshot.maps import storable_text
from mtetool.snapshot.model import (
    ADDRESS_LIMIT,
    MAX_ERRNO,
    Footer,
    Header,
    Missing,
    header_problem,
)
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
from mtetool.tags import pack
from mtetool.uapi import GRANULE_BYTES, TAG_MAX

if TYPE_CHECKING:
    from mtetool.tags import Tags

# Chunks under way for each worker: one that it compresses, one that waits for it.
_WINDOW_PER_JOB = 2

# Fills that wait behind a chunk under way; they are small, but must not pile up either.
_MAX_QUEUED = 4096


class _Stored(NamedTuple):
    """A record of tags as it will be written."""

    head: TagsHead
    frame: bytes


class SnapshotWriter:
    """Writes a snapshot; used as a context manager, in one thread.

    Records come out in the order of the calls, later ones for the same page replace earlier
    ones. Memory is bounded by a few chunks, plus 32 bytes for the index for each record.
    The caller's thread packs, `jobs` threads compress (None: one for each CPU that this
    process may use), `out.write` is only called in the caller's thread.

    Raises LayoutError for a header that cannot be stored. Errors of `out` pass as they are.
    Leaving the context without `finish`, or by an exception, aborts: what was written then
    has no end, and every reader refuses it.
    """

    def __init__(
        self, out: BinaryIO, header: Header, *, level: int = 1, jobs: int | None = 1
    ) -> None:
        problem = header_problem(header)
        if problem is not None:
            raise LayoutError(f"the guest's layout cannot be saved: {problem}")
        self.header = storable(header)
        self._page_granules = header.page_size_bytes // GRANULE_BYTES
        self._ledger = Ledger(header)
        self._log = _Log(out, self.header)
        self._compressor = Compressor(level)
        jobs = jobs or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="compress")
        self._window = _WINDOW_PER_JOB * jobs
        # In the order of the records: chunks under way, and fills, which need no work.
        self._pending: deque[Future[_Stored] | _Stored] = deque()
        self._n_chunks = 0
        # The last fill, held back: the next one may continue it.
        self._fill: tuple[int, int, int] | None = None
        self._open = True

    def add_tags(self, ipa: int, tags: Tags) -> None:
        """The tags of the memory from `ipa` on (page-aligned), one byte a granule.

        `tags` is C-contiguous, of whole pages, at most the header's `chunk_granules` long,
        bits 7:4 zero; it may be written again as soon as this returns. Raises RangeError.
        """
        n_granules = int(tags.size)
        self._check(ipa, n_granules * GRANULE_BYTES)
        if n_granules > self.header.chunk_granules:
            raise RangeError(
                f"{n_granules} granules in a chunk of at most {self.header.chunk_granules}"
            )
        packed = pack(tags)
        tag = uniform_packed(packed)
        if tag is not None:
            self.add_fill(ipa, n_granules * GRANULE_BYTES, tag)
            return
        self._queue_fill()
        while self._n_chunks >= self._window:
            self._write_oldest()
        self._pending.append(self._submit(ipa, packed))
        self._n_chunks += 1
        self._write_ready()

    def add_fill(self, ipa: int, size_bytes: int, tag: int) -> None:
        """Memory of any size (both page-aligned, in bytes) whose granules all have one tag.

        Raises RangeError.
        """
        self._check(ipa, size_bytes)
        if not 0 <= tag <= TAG_MAX:
            raise RangeError(f"a tag of {tag}, which are 0 to {TAG_MAX}")
        if self._fill is not None:
            start, end, last_tag = self._fill
            if end == ipa and last_tag == tag and self._ledger.holds(start, ipa + size_bytes):
                self._fill = (start, ipa + size_bytes, tag)
                return
        self._queue_fill()
        self._fill = (ipa, ipa + size_bytes, tag)

    def add_missing(self, missing: Missing) -> None:
        """Memory whose tags could not be read. Raises RangeError."""
        self._check(missing.ipa, missing.size_bytes)
        if missing.errno is not None and not 0 <= missing.errno <= MAX_ERRNO:
            raise RangeError(f"an errno of {missing.errno}")
        if missing.size_bytes >= ADDRESS_LIMIT:
            raise RangeError("all of the address space is more than one record can speak of")
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

    def finish(self, *, consistent: bool | None) -> Footer:
        """Write what is outstanding, the index and the end. Nothing can be added after.

        Raises RangeError when pages of the scope were left out.
        """
        self._require_open()
        self._settle()
        self._close_pool()
        index_offset = self._log.offset
        index_records = self._log.write_index()
        try:
            footer = self._ledger.footer(self._log.records, consistent)
        except LedgerError as error:
            raise RangeError(str(error)) from error
        self._log.write_end(footer, index_offset, index_records)
        self._open = False
        return footer

    def abort(self) -> None:
        """Stop the threads and forget what was not written. May be called twice."""
        self._open = False
        self._close_pool()
        self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        unfinished = self._open
        self.abort()
        if unfinished and kind is None:
            raise RuntimeError("a snapshot was left without finish()")

    def _require_open(self) -> None:
        if not self._open:
            raise RuntimeError("the snapshot was finished or given up already")

    def _check(self, ipa: int, size_bytes: int) -> None:
        self._require_open()
        try:
            self._ledger.check(ipa, size_bytes)
        except LedgerError as error:
            raise RangeError(str(error), ipa=ipa, size_bytes=size_bytes) from error

    def _submit(self, ipa: int, packed: Packed) -> Future[_Stored]:
        try:
            return self._pool.submit(self._compress, ipa, packed)
        except RuntimeError as error:
            # "can't start new thread", without an errno.
            raise HostError(
                f"compressing: {error} (EAGAIN)",
                hint="a higher limit on processes (ulimit -u, pids.max of the cgroup), or --jobs 1",
            ) from error

    def _compress(self, ipa: int, packed: Packed) -> _Stored:
        tagged, pages = count_tagged(packed, self._page_granules)
        head = TagsHead(ipa, 2 * int(packed.size), None, tagged, pages)
        return _Stored(head, self._compressor(packed))

    def _queue_fill(self) -> None:
        """Put the fill that was held back into its place."""
        if self._fill is None:
            return
        (start, end, tag), self._fill = self._fill, None
        granules = (end - start) // GRANULE_BYTES
        self._pending.append(_Stored(fill_head(start, granules, tag, self._page_granules), b""))
        self._write_ready()
        while len(self._pending) > _MAX_QUEUED:
            self._write_oldest()

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
        head, frame = oldest
        try:
            self._ledger.tags(head)
        except LedgerError as error:
            raise RangeError(str(error)) from error
        self._log.write(TAGS, encode_tags(head), frame, index=(head.ipa, head.granules))

    def _settle(self) -> None:
        self._queue_fill()
        while self._pending:
            self._write_oldest()

    def _close_pool(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


class _Log:
    """Puts records behind each other: numbers, checksums, offsets, the index, the end."""

    def __init__(self, out: BinaryIO, header: Header) -> None:
        self._out = out
        self._digest = Digest()
        self._index = array("B")
        self.records = 0
        self.offset = 0
        head = encode_header(header)
        if len(head) > MAX_HEADER_BYTES:
            raise LayoutError(
                f"the guest's layout cannot be saved: {len(header.memslots)} memslots and"
                f" {len(header.scope)} ranges are more than a header holds"
            )
        prologue = PROLOGUE.pack(MAGIC, VERSION, 0)
        self._put(prologue)
        self.write(HEAD, head, prologue=prologue)

    def _put(self, data: bytes) -> None:
        self.offset += len(data)
        written = self._out.write(data)
        if written is not None and written < len(data):
            # Only unbuffered files do this.
            rest = memoryview(data)[written:]
            while rest:
                written = self._out.write(rest)
                if not written:
                    raise HostIoError("the output takes no more bytes")
                rest = rest[written:]

    def write(
        self,
        kind: bytes,
        head: bytes,
        payload: bytes = b"",
        *,
        prologue: bytes = b"",
        index: tuple[int, int] | None = None,
    ) -> None:
        """A record; `index` is the address and number of granules that the index will name."""
        if self.records >= MAX_RECORDS:
            raise RangeError(f"a snapshot of more than {MAX_RECORDS} records")
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
        """All parts of the index; returns how many there were."""
        entries = memoryview(self._index)
        step = MAX_INDEX_ENTRIES * INDEX_ENTRY.size
        parts = 0
        for start in range(0, len(entries), step):
            part = bytes(entries[start : start + step])
            self.write(INDX, encode_index(len(part) // INDEX_ENTRY.size), part)
            parts += 1
        return parts

    def write_end(self, footer: Footer, index_offset: int, index_records: int) -> None:
        """The end record and the trailer."""
        start = self.offset
        done = DoneHead(footer, index_offset, index_records, self._digest.value)
        self.write(DONE, encode_done(done))
        self._put(TRAILER.pack(start, END_MAGIC))
