"""A process's own memory with tags: `proc:PID`, through ptrace.

Its memslots are its mappings with PROT_MTE, at its own addresses; adjacent mappings that are alike
count as one. A copy needs a stopped thread of the process (`mtetool.attach.visit`) and changes
nothing else there. Measured on Linux 6.12 and 7.3, the requests behave as follows:

- A page that was never touched reads as zeros and stays unallocated (a hole of a memfd gets a
  page).
- Private memory takes tags whatever its protection, even read-only (a tracer may, by FOLL_FORCE).
  Shared memory that the program may not write is refused; such slots are read-only.
- An address with a tag in its top byte, and memory that the program was never allowed to read
  (PROT_NONE, PROT_EXEC alone), make the kernel complain in its log (WARN_ON_ONCE in
  mte_ptrace_copy_tags): a host with panic_on_warn would go down. So mtetool never asks for either:
  such mappings are slots of the kind "device".
"""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING

from mtetool import permission, uapi
from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.ptrace import Tracee
from mtetool.attach.visit import Visitor
from mtetool.backends.proc.requests import peek, poke
from mtetool.backends.proc.smaps import AddressSpace, as_memslots
from mtetool.buffers import as_bytes
from mtetool.errors import (
    AttachRefusedError,
    BusyError,
    MteOffError,
    MteUnsupportedError,
    SourceError,
    UsageError,
    WrongHostError,
)
from mtetool.guest import GuestInfo, LiveGuest, Memslot
from mtetool.tags import as_array
from mtetool.vmm import proc

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer
    from mtetool.guest import GuestOptions


def open_process(rest: str, options: GuestOptions) -> ProcessGuest:
    """Open `PID`, a process of this host.

    Raises WrongHostError, SourceError, UsageError, NoSuchProcessError, NotAProcessError,
    AttachRefusedError, PermissionRefusedError. mtetool attaches only at the first copy.
    """
    if platform.machine() != "aarch64":
        raise WrongHostError(
            f"proc:{rest} needs an arm64 host with MTE; this one is {platform.machine()}",
            hint="run mtetool on the process's host; emu: works everywhere",
        )
    if not rest.isdecimal():
        raise SourceError(f"proc:{rest} is not of the form proc:PID")
    if options.memslots or options.qmp:
        raise UsageError(
            "--memslot and --qmp are for VMs: the kernel reports the memory of a process",
            hint="choose parts of it with --range",
        )
    pid = int(rest)
    if pid == os.getpid():
        raise AttachRefusedError(
            f"process {pid} is mtetool itself, and no process can trace itself", pid=pid
        )
    proc.check_is_process(pid, "proc")
    return ProcessGuest(pid)


class ProcessGuest(LiveGuest):
    """A process, with the address space that it had when it was opened."""

    pid: int

    def __init__(self, pid: int) -> None:
        self.page_size_bytes = PAGE_BYTES
        self.pid = pid
        self._program = proc.program(pid)
        self._space = AddressSpace(pid)
        self._slots: tuple[Memslot, ...] = ()
        self._visitor: Visitor | None = None

    @property
    def stopped_seconds(self) -> float:
        """The longest time that a thread of the process was stopped for a copy."""
        return self._visitor.stopped_seconds if self._visitor else 0.0

    def info(self) -> GuestInfo:
        """The process: `mte` is whether any of its memory has PROT_MTE now, `name` its program."""
        self._slots = self._layout()
        return GuestInfo(
            source=f"proc:{self.pid}",
            mte=bool(self._slots),
            page_size_bytes=self.page_size_bytes,
            memslots=self._slots,
            name=self._program,
            pid=self.pid,
        )

    def paused(self) -> bool | None:
        """Whether all threads are stopped, by us or by a signal (SIGSTOP)."""
        return True if self.is_frozen else proc.is_stopped(self.pid)

    def _stop(self) -> None:
        """Stop all threads of the process; other processes that share its memory run on.

        Also raises BusyError if its memory is no longer that of the last `info`.
        """
        self._visits().freeze()
        if self._slots and self._slots != self._layout():
            raise BusyError(
                f"process {self.pid} mapped or unmapped memory while it was being stopped",
                hint="retry, or stop it first: kill -STOP PID",
                pid=self.pid,
            )

    def _resume(self) -> None:
        self._visits().thaw()

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """See `Guest.read_tags`."""
        view = as_bytes(out)
        size_bytes = len(view) * uapi.GRANULE_BYTES
        self._check(ipa, size_bytes)
        n_granules = self._space.accessible(ipa, size_bytes) // uapi.GRANULE_BYTES
        part = as_array(view[:n_granules])
        return self._copy(ipa, size_bytes, n_granules, lambda tracee: peek(tracee, ipa, part))

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`; never EBUSY."""
        view = as_bytes(tags)
        size_bytes = len(view) * uapi.GRANULE_BYTES
        self._check(ipa, size_bytes)
        allowed = min(self._space.accessible(ipa, size_bytes), self._to_readonly(ipa, size_bytes))
        n_granules = allowed // uapi.GRANULE_BYTES
        part = as_array(view[:n_granules])
        return self._copy(ipa, size_bytes, n_granules, lambda tracee: poke(tracee, ipa, part))

    def enable_mte(self) -> bool:
        """Return False if any memory has tags; else raise MteUnsupportedError."""
        if self._has_tags():
            return False
        raise MteUnsupportedError(
            f"process {self.pid} ({self._program}) has no memory with tags, and only the"
            " program itself can change that, by mapping memory with PROT_MTE",
            hint="tag a program's heap with glibc: GLIBC_TUNABLES=glibc.mem.tagging=3",
            pid=self.pid,
        )

    def close(self) -> None:
        """Detach from the process."""
        visitor, self._visitor = self._visitor, None
        try:
            if visitor is not None:
                visitor.close()
        finally:
            self._space.close()

    def _visits(self) -> Visitor:
        if self._visitor is None:
            pid = self.pid
            self._visitor = Visitor(
                pid,
                living=lambda: proc.activities(pid),
                ranked=lambda: proc.threads_to_borrow(pid),
                check=self._space.check,
            )
        return self._visitor

    def _layout(self) -> tuple[Memslot, ...]:
        return as_memslots(self._space.tagged_mappings())

    def _has_tags(self) -> bool:
        # Memory once found counts until the next `info`; without any, look again.
        self._slots = self._slots or self._layout()
        return bool(self._slots)

    def _check(self, ipa: int, size_bytes: int) -> None:
        """Apply the checks that KVM makes of a request, for a process."""
        if not self._has_tags():
            raise MteOffError(
                f"process {self.pid} ({self._program}) has no memory with tags (PROT_MTE)",
                hint="its program or allocator must ask for it; for the heap, with glibc:"
                " GLIBC_TUNABLES=glibc.mem.tagging=3",
                pid=self.pid,
            )
        if not uapi.is_copy_range(ipa, size_bytes, self.page_size_bytes):
            raise OSError(errno.EINVAL, f"{size_bytes} bytes at {ipa:#x} cannot be copied")

    def _to_readonly(self, ipa: int, size_bytes: int) -> int:
        """How many bytes from `ipa` on come before read-only memory."""
        behind = (slot.ipa for slot in self._slots if slot.readonly and slot.end > ipa)
        return max(min(next(behind, ipa + size_bytes), ipa + size_bytes) - ipa, 0)

    def _copy(
        self, ipa: int, size_bytes: int, n_granules: int, function: Callable[[Tracee], int]
    ) -> int:
        if not size_bytes:
            return 0
        done = 0
        if n_granules:
            try:
                done = self._visits().visit(function)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise permission.refusal(self.pid, error) from error
        if not done:
            raise OSError(errno.EFAULT, f"no tags of process {self.pid} can be copied at {ipa:#x}")
        return done * uapi.GRANULE_BYTES
