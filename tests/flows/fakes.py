"""A guest in memory that fails where a test wants it to, and counts the calls."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from mtetool.buffers import TagBuffer, as_bytes
from mtetool.errors import GuestLostError, LayoutUnknownError
from mtetool.guest import Extent, Guest, GuestInfo, Memslot, Pending
from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES

PAGE = 4096


def told_later(copy: Callable[[], int]) -> Pending:
    """Copy now; a call of the result returns or raises what came of it."""
    try:
        done = copy()
    except (OSError, GuestLostError) as error:
        failed = error

        def fail() -> int:
            raise failed

        return fail
    return lambda: done


def nowhere(ipa: int) -> bool:
    """No page fails."""
    return False


@dataclass
class FakeGuest(Guest):
    """Answers as the kernel does; `bad` and `bad_write` say which pages fail."""

    slots: tuple[Memslot, ...]
    page_size_bytes: int = PAGE
    max_copy_granules: int = 4 << 20
    depth: int = 2
    bad: Callable[[int], bool] = nowhere
    bad_write: Callable[[int], bool] = nowhere
    bad_errno: int = errno.EFAULT
    layout_known: bool = True
    paused_answers: list[bool | None] = field(default_factory=lambda: [True])
    lost_after_reads: int | None = None
    busy_after_writes: int | None = None
    reads: int = 0
    writes: int = 0
    frozen: bool = False
    freezes: int = 0
    reads_while_running: int = 0
    knows_untagged: bool = False
    makes_pages: bool = True
    would_make_bytes: int = 0
    memory: dict[int, Tags] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for slot in self.slots:
            n_granules = slot.size_bytes // GRANULE_BYTES
            self.memory[slot.ipa] = np.zeros(n_granules, dtype=np.uint8)

    def info(self) -> GuestInfo:
        if not self.layout_known:
            raise LayoutUnknownError("the layout is unknown")
        return GuestInfo("fake:1", True, self.page_size_bytes, self.slots)

    def freeze(self) -> None:
        self.frozen = True
        self.freezes += 1

    def thaw(self) -> float:
        was, self.frozen = self.frozen, False
        return 2.5 if was else 0.0

    def paused(self) -> bool | None:
        if self.frozen:
            return True
        if len(self.paused_answers) > 1:
            return self.paused_answers.pop(0)
        return self.paused_answers[0]

    def _page(self, ipa: int) -> Tags | None:
        for slot in self.slots:
            if slot.ipa <= ipa < slot.end and slot.kind != "device":
                first = (ipa - slot.ipa) // GRANULE_BYTES
                return self.memory[slot.ipa][first : first + self.page_granules]
        return None

    @property
    def page_granules(self) -> int:
        return self.page_size_bytes // GRANULE_BYTES

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        if not len(as_bytes(out)):
            if self.lost_after_reads is not None and self.reads >= self.lost_after_reads:
                raise GuestLostError("the VM is gone")
            return 0
        self.reads += 1
        self.reads_while_running += not self.frozen
        if self.lost_after_reads is not None and self.reads > self.lost_after_reads:
            raise GuestLostError("the VM is gone")

        def read(page: Tags, part: Tags) -> None:
            part[:] = page

        return self._copy(ipa, np.asarray(out), self.bad, read)

    def would_make(self, extents: Sequence[Extent]) -> int:
        return min(self.would_make_bytes, sum(extent.size_bytes for extent in extents))

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        if not self.knows_untagged:
            yield extent
            return
        start = None
        for at in range(extent.ipa, extent.end, self.page_size_bytes):
            page = self._page(at)
            if page is None or self.bad(at) or page.any():
                start = at if start is None else start
            elif start is not None:
                yield Extent.between(start, at)
                start = None
        if start is not None:
            yield Extent.between(start, extent.end)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        if self.busy_after_writes is not None and self.writes >= self.busy_after_writes:
            raise OSError(errno.EBUSY, "dirty logging")
        if not len(as_bytes(tags)):
            return 0
        self.writes += 1

        def write(page: Tags, part: Tags) -> None:
            page[:] = part

        def fails(at: int) -> bool:
            slot = next((s for s in self.slots if s.ipa <= at < s.end), None)
            return self.bad_write(at) or self.bad(at) or bool(slot and slot.kind == "rom")

        return self._copy(ipa, np.asarray(tags), fails, write)

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        """Read at once and report later, as the kernel can do it."""
        return told_later(lambda: self.read_tags(ipa, out))

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        """Write at once and report later."""
        return told_later(lambda: self.write_tags(ipa, tags))

    def _copy(
        self, ipa: int, tags: Tags, fails: Callable[[int], bool], act: Callable[[Tags, Tags], None]
    ) -> int:
        size_bytes = tags.size * GRANULE_BYTES
        if ipa % self.page_size_bytes or size_bytes % self.page_size_bytes:
            raise OSError(errno.EINVAL, "misaligned")
        for done in range(0, size_bytes, self.page_size_bytes):
            page = self._page(ipa + done)
            if page is None or fails(ipa + done):
                if done:
                    return done
                raise OSError(self.bad_errno if page is not None else errno.EFAULT, "no")
            first = done // GRANULE_BYTES
            act(page, tags[first : first + self.page_granules])
        return size_bytes

    def enable_mte(self) -> bool:
        return False

    def close(self) -> None:
        pass
