"""What everybody speaks of: guests, their memslots, ranges of their memory.

`Guest` is what every backend is. A backend answers as the kernel's KVM_ARM_MTE_COPY_TAGS does
(Documentation/virt/kvm/api.rst, 4.130): a copy gives the bytes of *guest memory* it completed, and
an errno only when it completed nothing. What such an answer means for a whole guest is decided
above, in `mtetool.sources` and `mtetool.flows`; a backend retries nothing and hides nothing.

Nothing here imports numpy, so that a program which only names memory starts quickly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Protocol, Self

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

SlotKind = Literal["ram", "rom", "device"]


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest physical memory that the VMM has given to KVM.

    `readonly` is None where nobody may know (a slot found by asking the kernel). `kind`
    is "device" for memory that cannot carry tags; such slots are never copied. `host_address` is
    where the slot begins in the VMM's own memory, if the user said so.
    """

    id: int
    ipa: int
    size_bytes: int
    readonly: bool | None = False
    kind: SlotKind = "ram"
    host_address: int | None = None

    @property
    def end(self) -> int:
        """The first address behind the slot."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of guest physical memory, in bytes."""

    ipa: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first address behind the extent."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class Missing:
    """Guest memory whose tags could not be read, and why; `errno` is Linux's number or None."""

    ipa: int
    size_bytes: int
    errno: int | None
    reason: str

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class GuestInfo:
    """A guest's description, as `emu show`, `info` and `list` print it."""

    source: str
    mte: bool | None
    page_size_bytes: int
    memslots: tuple[Memslot, ...]
    vmm: str | None = None
    name: str | None = None
    pid: int | None = None
    vcpus: int | None = None


@dataclass(frozen=True, slots=True)
class GuestOptions:
    """What the user told about a guest besides its name.

    `memslots` replaces whatever could be learnt; `qmp` is the VMM's monitor socket.
    """

    memslots: tuple[Memslot, ...] = ()
    qmp: Path | None = None


class Guest(Protocol):
    """A guest that was opened: its layout, and its tags.

    Used as a context manager; after `close` nothing of ours is left in the guest or VMM.
    """

    @property
    def page_size_bytes(self) -> int:
        """The page size that addresses and lengths of copies must be aligned to."""
        ...

    @property
    def makes_pages(self) -> bool:
        """Whether writing tags of 0 where there is no memory yet makes that memory."""
        ...

    def any_thread_reads(self, ipa: int, size_bytes: int) -> bool:
        """Whether several threads may read such a range at a time, and be faster than one.

        So may they any part of it, then. Nothing is in the way of reading it: only the host can
        fail.
        """
        ...

    def info(self) -> GuestInfo:
        """The guest as it is now.

        Raises LayoutUnknownError where the memslots cannot be learnt.
        """
        ...

    def paused(self) -> bool | None:
        """Whether the guest's vCPUs stand still now; None where nobody may know."""
        ...

    def freeze(self) -> None:
        """Stop all vCPUs until `thaw`, so that nothing of the guest changes its tags.

        They run on by themselves if mtetool dies. Raises GuestError; then none is stopped.
        """
        ...

    def thaw(self) -> float:
        """Let the vCPUs run on; for how many seconds they stood still (0.0: they never ran)."""
        ...

    def read_tags(self, ipa: int, out: TagBuffer, *, then_bytes: int = 0) -> int:
        """Copy the tags of guest memory from `ipa` on into `out` (one byte a granule).

        `out` is a writable buffer of bytes; its length times 16 is the length in bytes of guest
        memory. Returns the bytes of guest memory completed, a multiple of the page
        size, short where something stopped the copy: ask again at that place to learn why.

        `then_bytes` of guest memory right behind will be read by the next calls: their copy may
        begin at once, so that those tags may be of a moment before they are asked for.

        Raises OSError with the kernel's errno when nothing was copied (EFAULT: no memory
        there, EINVAL: misaligned, too long), and GuestError when the guest is gone or has
        no MTE.
        """
        ...

    def may_be_tagged(self, ipa: int, size_bytes: int) -> Iterator[tuple[int, int]]:
        """The parts (address, size) of a range that may have tags other than 0.

        Ascending, whole pages, as is the range, and no two of them touch. What lies between
        them has been found to have no tags at all, by looking and not by reading: memory that
        nobody ever touched is not made by that. What cannot be told, and addresses without
        memory, are in the parts.
        """
        ...

    def would_make(self, ranges: Sequence[tuple[int, int]]) -> int:
        """At most how many bytes of memory the host would newly allocate for a read of ranges.

        `ranges` are (address, size) of whole pages; of them only what `may_be_tagged` gives is
        read. Found by looking and not by reading.
        """
        ...

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """Copy `tags` (one byte a granule) onto the guest memory from `ipa` on.

        As `read_tags`; besides EFAULT for read-only memory and EBUSY while any memslot
        logs dirty pages. Of no tags at all it is refused where any write would be (EBUSY, no
        permission), and changes nothing.
        """
        ...

    def begin_write(
        self, ipa: int, tags: TagBuffer, *, then_read: bool = False
    ) -> Callable[[], int]:
        """As `write_tags`, by the time the result is called, which gives or raises its answer.

        At most two writes are begun and not called, of memory that does not overlap; they are
        called in their order, and `tags` stay as they are until then. With `then_read` the same
        memory, if all was written, is read in one call before the next result is called.
        """
        ...

    def enable_mte(self) -> bool:
        """Turn MTE on, before the first vCPU; False where it was on already.

        Raises TooLateError, MteUnsupportedError.
        """
        ...

    def close(self) -> None:
        """Let go of the guest. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
