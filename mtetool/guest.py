"""What everybody speaks of: guests, their memslots, ranges of their memory.

`Guest` is what every backend is. A backend answers as the kernel's KVM_ARM_MTE_COPY_TAGS does
(Documentation/virt/kvm/api.rst, 4.130): a copy gives the bytes of *guest memory* it completed, and
an errno only when it completed nothing. What such an answer means for a whole guest is decided
above, in `mtetool.sources` and `mtetool.flows`; a backend retries nothing and hides nothing.

Nothing here imports numpy, so that a program which only names memory starts quickly.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer

SlotKind = Literal["ram", "rom", "device"]

Pending = Callable[[], int]
"""A copy that was begun: calling it, once, gives or raises the copy's answer.

Copies take effect in the order in which they were begun, by the time they are called, and are
called in that order; one that is not called may have taken effect or not. The buffer is the copy's
until it was called, or until a later copy was. All other methods of the guest come after
every copy that was begun.
"""


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest physical memory that the VMM has given to KVM.

    `readonly` is None where that is unknown (a slot found by asking the kernel). `kind`
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
        """The first address after the slot."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of guest physical memory, in bytes."""

    ipa: int
    size_bytes: int

    @classmethod
    def between(cls, ipa: int, end: int) -> Self:
        """The extent from an address up to another."""
        return cls(ipa, end - ipa)

    @property
    def end(self) -> int:
        """The first address after the extent."""
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
        """The first address after it."""
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
    """What the user said about a guest besides its name.

    `memslots` replaces whatever could be learnt; `qmp` is the VMM's monitor socket.
    """

    memslots: tuple[Memslot, ...] = ()
    qmp: Path | None = None


class Guest(ABC):
    """A guest that was opened: its layout, and its tags.

    A backend has to write six methods; the others are right for any guest, and a backend that can
    do better, or faster, has its own. Used as a context manager; after `close` nothing of ours is
    left in the guest or VMM.
    """

    page_size_bytes: int
    """The page size that addresses and lengths of copies must be aligned to."""
    max_copy_granules: int = 4 << 20
    """What is begun as one copy at most: 4 MiB of tags, 64 MiB of guest memory."""
    depth: int = 1
    """How many copies, each with its read-back, are worth beginning before the first is taken."""
    makes_pages: bool = True
    """Whether writing tags of 0 where there is no memory yet makes that memory."""

    @abstractmethod
    def info(self) -> GuestInfo:
        """The guest as it is now.

        Raises LayoutUnknownError where the memslots cannot be learnt.
        """

    def prepare(self) -> None:  # noqa: B027 - most have nothing that takes long
        """Do all that is slow and comes before the first copy, while nobody waits yet.

        Raises GuestError.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Stop all vCPUs until `thaw`, so that nothing of the guest changes its tags.

        They run on by themselves if mtetool dies. Raises GuestError; then none is stopped.
        """

    @abstractmethod
    def thaw(self) -> float:
        """Let the vCPUs run on; for how many seconds they stood still (0.0: they never ran)."""

    @abstractmethod
    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """Copy the tags of guest memory from `ipa` on into `out` (one byte a granule).

        `out` is a writable buffer of bytes; its length times 16 is the length in bytes of guest
        memory. Returns the bytes of guest memory completed, a multiple of the page
        size, short where something stopped the copy: ask again at that place to learn why.

        Raises OSError with the kernel's errno when nothing was copied (EFAULT: no memory
        there, EINVAL: misaligned, too long), and GuestError when the guest is gone or has
        no MTE.
        """

    @abstractmethod
    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """Copy `tags` (one byte a granule) onto the guest memory from `ipa` on.

        As `read_tags`; besides EFAULT for read-only memory and EBUSY while any memslot
        logs dirty pages. Of no tags at all it is refused where any write would be (EBUSY, no
        permission), and changes nothing.
        """

    @abstractmethod
    def enable_mte(self) -> bool:
        """Turn MTE on, before the first vCPU; False where it was on already.

        Raises TooLateError, MteUnsupportedError.
        """

    def paused(self) -> bool | None:
        """Whether the guest's vCPUs stand still now; None where that is unknown."""
        return None

    def any_thread_reads(self, extent: Extent) -> bool:
        """Whether several threads may read an extent at a time, and be faster than one.

        So may they any part of it, then. Nothing is in the way of reading it: only the host can
        fail.
        """
        return False

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """The parts of an extent that may have tags other than 0.

        Ascending, whole pages, as is the extent, and no two of them touch. What lies between
        them has been found to have no tags at all, by looking and not by reading: memory that
        nobody ever touched is not made by that. What is unknown, and addresses without
        memory, are in the parts.
        """
        yield extent

    def would_make(self, extents: Sequence[Extent]) -> int:
        """At most how many bytes of memory the host would newly allocate for a read of `extents`.

        They are whole pages; of them only what `may_be_tagged` gives is read. Found by looking and
        not by reading.
        """
        return 0

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        """Begin what `read_tags` does, for 1 to `max_copy_granules` granules; see `Pending`."""
        return partial(self.read_tags, ipa, out)

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        """Begin what `write_tags` does, for 1 to `max_copy_granules` granules; see `Pending`."""
        return partial(self.write_tags, ipa, tags)

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of
        """Let go of the guest. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class LiveGuest(Guest):
    """A guest that runs in a process of this host: a backend says how its threads are stopped."""

    _frozen_since: float | None = None

    @abstractmethod
    def _stop(self) -> None:
        """Stop its threads. Raises GuestError; some may be stopped then."""

    @abstractmethod
    def _resume(self) -> None:
        """Let the threads run on that were stopped."""

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze` stopped it."""
        return self._frozen_since is not None

    def freeze(self) -> None:
        """See `Guest.freeze`."""
        self._frozen_since = time.monotonic()
        try:
            self._stop()
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> float:
        """See `Guest.thaw`."""
        since, self._frozen_since = self._frozen_since, None
        if since is None:
            return 0.0
        self._resume()
        return time.monotonic() - since
