"""The vocabulary of all layers: guests, their memslots, ranges of their memory.

Every backend is a `Guest`, and answers as the kernel's KVM_ARM_MTE_COPY_TAGS does
(Documentation/virt/kvm/api.rst, 4.130): a copy returns the bytes of *guest memory* that it
completed, and an errno only if it completed none. `mtetool.sources` and `mtetool.flows` decide what
such an answer means for a whole guest; a backend retries nothing and hides nothing.

Nothing here imports numpy, so a program that only names memory starts quickly.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self

from mtetool.buffers import as_bytes
from mtetool.closing import Closing
from mtetool.uapi import GRANULE_BYTES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mtetool.buffers import TagBuffer

SlotKind = Literal["ram", "rom", "device"]

Pending = Callable[[], int]
"""A copy in flight: calling it, once, returns or raises the copy's answer.

Copies take effect in the order in which they were begun: calling one completes those before it,
and any other method of the guest completes all of them. A copy that is never called may or may not
have taken effect. A copy owns its buffer until it is complete.
"""


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest physical memory that the VMM has given to KVM.

    `readonly` is None if unknown (a slot found by asking the kernel). `kind` is "device" for memory
    that cannot carry tags; such slots are never copied. `host_address` is where the slot begins in
    the VMM's own memory, if the user gave it.
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
        """The extent from one address up to another."""
        return cls(ipa, end - ipa)

    @property
    def end(self) -> int:
        """The first address after the extent."""
        return self.ipa + self.size_bytes


@dataclass(frozen=True, slots=True)
class Region:
    """A part of guest memory under the name that the VMM gives it, from `offset` in it on."""

    name: str
    offset: int
    ipa: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Guest memory whose tags could not be read, and why; `errno` is Linux's number or None."""

    ipa: int
    size_bytes: int
    errno: int | None
    reason: str

    @property
    def end(self) -> int:
        """The first address after the range."""
        return self.ipa + self.size_bytes


class Mapped(NamedTuple):
    """A range of virtual addresses, and the guest memory that it is mapped to.

    It is a part of one page or block of `block_bytes`; 0 where the MMU is off.
    """

    address: int
    size_bytes: int
    ipa: int
    block_bytes: int


class Unmapped(NamedTuple):
    """A range of virtual addresses that is not mapped, and the error that says why."""

    address: int
    size_bytes: int
    error: Exception


class Virtual(NamedTuple):
    """A pointer as a vCPU takes it: its address without a tag, and its tag.

    `tag` is None where it has none; `is_unchecked` is true for a tag that matches all memory.
    `half` is 0 for the lower half of the address space, 1 for the upper.
    """

    address: int
    tag: int | None
    is_unchecked: bool
    half: int


class AddressSpace(Protocol):
    """The virtual addresses of one vCPU."""

    @property
    def vcpu(self) -> int:
        """The vCPU's number."""
        ...

    @property
    def is_on(self) -> bool:
        """Whether its MMU is on; if not, virtual addresses are physical ones."""
        ...

    def pointer(self, given: int) -> Virtual:
        """Take a pointer apart. Raises NotMappedError, PageTableError."""
        ...

    def parts(self, start: int, end: int) -> Iterator[Mapped | Unmapped]:
        """All of a range of addresses without tags, in order; as it is now."""
        ...


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
    """What the user specified about a guest besides its name.

    `memslots` replaces the layout that mtetool would find out; `qmp` is the VMM's monitor socket.
    `connect` is the URI of the libvirt that knows the domain; None for its default. Without
    `use_monitor`, the VMM's monitor is asked nothing.
    """

    memslots: tuple[Memslot, ...] = ()
    qmp: Path | None = None
    connect: str | None = None
    use_monitor: bool = True


class Guest(Closing, ABC):
    """An open guest: its layout and its tags.

    A backend must implement the six abstract methods; the others are correct for any guest, and a
    backend overrides those that it can do better or faster. It is a context manager; after `close`
    mtetool leaves nothing in the guest or VMM.
    """

    page_size_bytes: int
    """The page size that addresses and lengths of copies must be aligned to."""
    max_copy_granules: int = 4 << 20
    """The most that one copy may cover: 4 MiB of tags, 64 MiB of guest memory."""
    depth: int = 1
    """How many copies, each with its read-back, are worth having in flight; with 1, none is begun
    before the last one was called."""
    burst: int = 1
    """How many small copies are worth having in flight: they are made together, so it is best to
    begin many before the first is called. With 1, they are as all others."""
    small_granules: int = 16 << 10
    """The most that a small copy covers: 64 pages of 4 KiB."""
    pid: int | None = None
    """The process that the guest is of, the VMM; known whatever else is not."""
    makes_pages: bool = True
    """Whether writing tags of 0 to memory that is not allocated yet allocates it."""

    @abstractmethod
    def info(self) -> GuestInfo:
        """Describe the guest as it is now.

        Raises LayoutUnknownError if the memslots cannot be learnt.
        """

    def regions(self) -> list[Region]:
        """The names of memory, as far as the VMM's monitor says; it is not asked again."""
        return []

    def prepare(self) -> None:
        """Do the slow work that precedes the first copy, while nothing waits for it yet.

        Raises GuestError.
        """

    @abstractmethod
    def freeze(self) -> None:
        """Stop all vCPUs until `thaw`, so that the guest cannot change its tags.

        They resume by themselves if mtetool dies. Raises GuestError, and leaves none stopped.
        """

    @abstractmethod
    def thaw(self) -> float:
        """Resume the vCPUs; return how many seconds they were stopped (0.0: they never ran)."""

    @abstractmethod
    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """Copy the tags of guest memory from `ipa` on into `out` (one byte per granule).

        `out` is a writable buffer of bytes; its length times 16 is the length of the guest memory
        in bytes. Returns the bytes of guest memory completed, a multiple of the page size, fewer if
        something stopped the copy: copy again from there to learn why.

        Raises OSError with the kernel's errno if nothing was copied (EFAULT: no memory there,
        EINVAL: misaligned, too long), and GuestError if the guest is gone or has no MTE.
        """

    @abstractmethod
    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """Copy `tags` (one byte per granule) onto the guest memory from `ipa` on.

        Like `read_tags`, but also EFAULT for read-only memory and EBUSY while any memslot logs
        dirty pages. A write of no tags changes nothing, and is refused if any write would be
        (EBUSY, no permission).
        """

    @abstractmethod
    def enable_mte(self) -> bool:
        """Turn MTE on, before the first vCPU; return False if it was on already.

        Raises TooLateError, MteUnsupportedError.
        """

    def paused(self) -> bool | None:
        """Whether the guest's vCPUs are stopped now; None if unknown."""
        return None

    def address_spaces(self, vcpu: int | None = None) -> Sequence[AddressSpace] | None:
        """The virtual addresses of each vCPU, or of this one; None for a guest without vCPUs.

        Raises GuestError.
        """
        return None

    def any_thread_reads(self, extent: Extent) -> bool:
        """Whether several threads may read an extent at once, faster than one would.

        The same then holds for any part of the extent, and a read of it fails only if the host
        does.
        """
        return False

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """The parts of an extent that may have tags other than 0.

        The parts are ascending, consist of whole pages, as does the extent, and do not touch. The
        memory between them was found to have no tags by looking, not by reading, which would
        allocate untouched memory. Memory about which this is unknown, and addresses without memory,
        are in the parts.
        """
        yield extent

    def would_make(self, extents: Sequence[Extent]) -> int:
        """The most bytes of memory that the host would newly allocate for a read of `extents`.

        They are whole pages; only the parts of them that `may_be_tagged` yields are read. This is
        found by looking, not by reading.
        """
        return 0

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        """Begin what `read_tags` does, for 1 to `max_copy_granules` granules; see `Pending`."""
        return partial(self.read_tags, ipa, out)

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        """Begin what `write_tags` does, for 1 to `max_copy_granules` granules; see `Pending`."""
        return partial(self.write_tags, ipa, tags)

    def read_scattered(self, extents: NDArray[np.uint64], out: TagBuffer) -> int:
        """Copy the tags of many extents into `out`, in their order, one after another.

        `extents` has a row for each: its address and size in bytes, whole pages, at most
        `max_copy_granules // 2` granules. Returns the bytes of guest memory completed before the
        first page that could not be read; a copy from there says why. Raises as `read_tags`.
        """
        tags, done = as_bytes(out), 0
        for ipa, size_bytes in extents.tolist():
            part = tags[done // GRANULE_BYTES :][: size_bytes // GRANULE_BYTES]
            try:
                completed = self.read_tags(ipa, part)
            except OSError:
                if done:
                    break
                raise
            done += completed
            if completed < size_bytes:
                break
        return done

    def write_scattered(self, extents: NDArray[np.uint64], tags: TagBuffer) -> int:
        """Copy `tags` onto many extents (as for `read_scattered`), and read each back.

        Returns the bytes of guest memory before the first page that could not be written, or was
        found to have other tags. Raises as `write_tags`.
        """
        wanted, done = as_bytes(tags), 0
        for ipa, size_bytes in extents.tolist():
            part = wanted[done // GRANULE_BYTES :][: size_bytes // GRANULE_BYTES]
            found = memoryview(bytearray(len(part)))
            try:
                completed = self.write_tags(ipa, part)
                self.read_tags(ipa, found[: completed // GRANULE_BYTES])
            except OSError:
                if done:
                    break
                raise
            step = self.page_size_bytes // GRANULE_BYTES
            pages = range(0, completed // GRANULE_BYTES, step)
            equal = (found[at : at + step] == part[at : at + step] for at in pages)
            good = sum(1 for _ in takewhile(bool, equal)) * self.page_size_bytes
            done += good
            if good < size_bytes:
                break
        return done


class LiveGuest(Guest):
    """A guest that runs in a process of this host: a backend defines how to stop its threads."""

    _frozen_since: float | None = None

    @abstractmethod
    def _stop(self) -> None:
        """Stop its threads. Raises GuestError, and may leave some stopped."""

    @abstractmethod
    def _resume(self) -> None:
        """Resume the threads that were stopped."""

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
