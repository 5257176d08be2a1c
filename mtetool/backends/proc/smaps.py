"""The tagged memory of a process: its mappings with PROT_MTE, as /proc/PID/smaps shows them."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mtetool import permission
from mtetool.errors import AttachRefusedError, GuestError, GuestLostError
from mtetool.guest import Memslot
from mtetool.procfs import Mapping, parsed
from mtetool.vmm import proc


class AddressSpace:
    """The memory of a process as it is now, not of a program that it executes later.

    An open /proc/PID/maps belongs to the address space, not to the process: once the address space
    is gone (the process ended, or executed a program) the file is empty. Raises NoSuchProcessError,
    PermissionRefusedError, AttachRefusedError.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._start_time = proc.start_time(pid)
        try:
            self._maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise permission.refused(
                pid, f"looking at the memory of process {pid}", error
            ) from error
        if not os.pread(self._maps, 1, 0):
            raise AttachRefusedError(
                f"the kernel shows no memory of process {pid}: its main thread has ended, but other"
                " threads have not",
                hint="nothing can be done about this from outside",
                pid=pid,
            )
        self._text = b""
        self._parsed: list[Mapping] = []

    def close(self) -> None:
        """Close it. Idempotent."""
        if self._maps >= 0:
            os.close(self._maps)
        self._maps = -1

    def check(self) -> None:
        """Check that it still exists. Raises GuestLostError."""
        try:
            if os.pread(self._maps, 1, 0):
                return
        except ProcessLookupError:
            pass
        raise self._lost()

    def tagged_mappings(self) -> list[TaggedMapping]:
        """Its PROT_MTE mappings. Raises GuestLostError, PermissionRefusedError."""
        try:
            with Path(f"/proc/{self._pid}/smaps").open(
                errors="surrogateescape", newline="\n"
            ) as smaps:
                found = list(tagged_mappings(smaps))
        except (FileNotFoundError, ProcessLookupError):
            raise self._lost() from None
        except OSError as error:
            raise self._refused(error) from error
        self.check()
        return found

    def accessible(self, address: int, size_bytes: int) -> int:
        """How many bytes from `address` on the program itself may read now, at most `size_bytes`.

        Raises GuestLostError.
        """
        mappings = self._mappings()
        index = bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1
        at = address
        for mapping in mappings[max(index, 0) :]:
            # The kernel and the program can also read memory that is only writable.
            if not mapping.start <= at < mapping.end or mapping.flags[:2] == "--":
                break
            at = mapping.end
            if at >= address + size_bytes:
                break
        return min(at - address, size_bytes)

    def _mappings(self) -> list[Mapping]:
        pieces = []
        try:
            os.lseek(self._maps, 0, os.SEEK_SET)
            while piece := os.read(self._maps, 1 << 20):
                pieces.append(piece)
        except ProcessLookupError:
            pieces = []
        text = b"".join(pieces)
        if not text:
            raise self._lost()
        if text != self._text:
            self._text, self._parsed = text, parsed(os.fsdecode(text).split("\n"))
        return self._parsed

    def _refused(self, error: OSError) -> GuestError:
        if isinstance(error, (FileNotFoundError, ProcessLookupError)):
            return proc.no_process(self._pid)
        return permission.refused(self._pid, f"looking at the memory of process {self._pid}", error)

    def _lost(self) -> GuestLostError:
        if proc.has_memory(self._pid, self._start_time):
            return GuestLostError(
                f"process {self._pid} executed another program (execve): the memory that mtetool"
                " was working on is gone",
                hint="start again with the new program",
                pid=self._pid,
            )
        return GuestLostError(
            f"process {self._pid} ended while mtetool was working on it",
            hint="check why it ended; mtetool does not end it",
            pid=self._pid,
        )


@dataclass(frozen=True, slots=True)
class TaggedMapping:
    """[start, end) of a process's addresses, mapped with PROT_MTE.

    `accessible` is whether the program itself may read it (writing includes that);
    `tags_writable` whether a tracer may write its tags: always for private memory, as a debugger's
    breakpoints go into read-only code (FOLL_FORCE; check_vma_flags, mm/gup.c), for shared memory
    only if the program may write it. `backing` is the inode behind it, 0 for anonymous memory.
    """

    start: int
    end: int
    accessible: bool
    tags_writable: bool
    backing: int


def tagged_mappings(smaps: Iterable[str]) -> Iterator[TaggedMapping]:
    """The PROT_MTE mappings among the lines of an smaps file, in order of address."""
    head = ""
    for line in smaps:
        name, colon, rest = line.partition(":")
        if not colon or "-" in name:
            # "ffff9752f000-ffff9753f000 rw-p …", where every other line is "Name:  value".
            head = line
        elif name == "VmFlags" and "mt" in (flags := rest.split()):
            for mapping in parsed([head]):
                yield _tagged(mapping, frozenset(flags))


def _tagged(mapping: Mapping, flags: frozenset[str]) -> TaggedMapping:
    # fs/proc/task_mmu.c, show_smap_vma_flags; "sh" is VM_SHARED, "mw" VM_MAYWRITE, "ht" hugetlb.
    forced = "mw" in flags and not flags & {"sh", "ht"}
    return TaggedMapping(
        start=mapping.start,
        end=mapping.end,
        accessible=bool(flags & {"rd", "wr"}),
        tags_writable="wr" in flags or forced,
        backing=mapping.inode,
    )


def as_memslots(mappings: Iterable[TaggedMapping]) -> tuple[Memslot, ...]:
    """Such mappings as memslots; adjacent ones that are alike are merged.

    The kernel itself splits and merges mappings freely. Memory that the program has protected from
    itself is not "ram": mtetool makes no requests for it, see `mtetool.backends.proc.guest`.
    """
    merged: list[TaggedMapping] = []
    for mapping in mappings:
        last = merged[-1] if merged else None
        if last is not None and mapping == replace(last, start=last.end, end=mapping.end):
            merged[-1] = replace(last, end=mapping.end)
        else:
            merged.append(mapping)
    return tuple(
        Memslot(
            number,
            m.start,
            m.end - m.start,
            readonly=not m.tags_writable,
            kind="ram" if m.accessible else "device",
        )
        for number, m in enumerate(merged)
    )
