"""The real ioctl in a live VMM: `kvm:PID[:FD]`."""

from __future__ import annotations

import errno
import platform
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

from mtetool import uapi
from mtetool.attach.helper import PAGE_BYTES
from mtetool.backends.kvm.by_hand import by_hand_and_proven, check_by_hand, places_by_hand
from mtetool.backends.kvm.memslots import memslots_of, places_of
from mtetool.backends.kvm.monitor import VmmMonitor, monitor_of
from mtetool.backends.kvm.transfer import BURST, COPY_GRANULES, DEPTH
from mtetool.backends.kvm.vcpus import hold_vcpus
from mtetool.backends.kvm.vm import Vm
from mtetool.buffers import as_bytes
from mtetool.errors import (
    AttachRefusedError,
    GuestError,
    LayoutUnknownError,
    SourceError,
    WrongHostError,
)
from mtetool.guest import Extent, GuestInfo, LiveGuest, Memslot, Region
from mtetool.vmm import proc
from mtetool.vmm.hostmemory import HostMemory
from mtetool.vmm.pagemap import Pagemap, UnknownError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from mtetool.buffers import TagBuffer
    from mtetool.closing import Closing
    from mtetool.guest import AddressSpace, GuestOptions, Pending
    from mtetool.spans import Place


def open_kvm(rest: str, options: GuestOptions) -> KvmGuest:
    """Open `PID` or `PID:FD`, the VM of a running VMM.

    Raises WrongHostError, SourceError, NoSuchProcessError, NotAVmmError, SeveralVmsError,
    PermissionRefusedError, ForeignMonitorError. mtetool attaches only at the first call that needs
    it.
    """
    check_host(f"kvm:{rest}")
    pid_text, colon, fd_text = rest.partition(":")
    if not pid_text.isdecimal() or (colon and not fd_text.isdecimal()):
        raise SourceError(
            f"kvm:{rest} is not of the form kvm:PID or kvm:PID:FD",
            hint="find the VMM: mtetool list",
        )
    process = proc.find(int(pid_text))
    check_by_hand(process.pid, options.memslots)
    fd = proc.choose_vm(process, int(fd_text) if colon else None)
    guest = KvmGuest(process, fd, options)
    guest.monitor.check()
    return guest


def check_host(source: str) -> None:
    """Check that this host can have tags. Raises WrongHostError."""
    if platform.machine() != "aarch64":
        raise WrongHostError(
            f"{source} needs an arm64 host with MTE; this one is {platform.machine()}",
            hint="run mtetool on the VM's host; emu: works everywhere",
        )


class KvmGuest(LiveGuest):
    """The VM behind one file descriptor of a VMM process; `monitor` is by default its own."""

    page_size_bytes = PAGE_BYTES
    max_copy_granules = COPY_GRANULES
    depth = DEPTH
    burst = BURST

    def __init__(
        self,
        process: proc.VmmProcess,
        fd: int,
        options: GuestOptions,
        monitor: VmmMonitor | None = None,
    ) -> None:
        self.monitor = monitor or monitor_of(process, options)
        self._options = options
        self.pid = process.pid
        self.vm = Vm(process, fd)
        self._asked: tuple[Memslot, ...] | None = None
        """The memslots, if the kernel was asked for them."""
        self._kept = ExitStack()
        self._stack = ExitStack()
        self._stack.callback(self.vm.close)
        self._stack.callback(self.monitor.close)

    def keep(self, resource: Closing) -> None:
        """Close something together with the guest, after mtetool has detached."""
        self._kept.callback(resource.close)

    @property
    def borrowed_seconds(self) -> float:
        """How long a thread of the VMM itself was borrowed."""
        return self.vm.borrowed_seconds

    def info(self) -> GuestInfo:
        """Describe the VM; attaches, to ask the kernel whether MTE is on."""
        slots = self._memslots
        return self._described(self.vm.has_mte, slots)

    def glance(self, *, attach: bool) -> tuple[GuestInfo, GuestError | None]:
        """Like `info`, with None and () for anything unknown, and the reason for that.

        Without `attach`, this uses only the monitor, and what any user may know.
        """
        mte: bool | None = None
        slots: tuple[Memslot, ...] = ()
        reason: GuestError | None = None
        try:
            mte = self.vm.has_mte if attach else None
            slots = self._memslots if mte else self.monitor.ask().memslots()
        except LayoutUnknownError as error:
            # Without MTE the kernel is not asked, and a missing monitor is not worth reporting.
            reason = error if mte or self.monitor.may_exist else None
        except GuestError as error:
            reason = error
        return self._described(mte, slots), reason

    def _described(self, mte: bool | None, slots: tuple[Memslot, ...]) -> GuestInfo:
        return GuestInfo(
            source=self.monitor.source(self.vm.fd),
            mte=mte,
            page_size_bytes=self.page_size_bytes,
            memslots=slots,
            vmm=self.vm.process.program,
            name=self.monitor.name(),
            pid=self.vm.process.pid,
            vcpus=self.vm.process.vcpus,
        )

    def regions(self) -> list[Region]:
        """See `Guest.regions`; others may use the monitor from then on."""
        _ = self._memslots
        with suppress(LayoutUnknownError):
            found = self.monitor.ask().regions()
            self.monitor.close()
            return found
        return []

    def prepare(self) -> None:
        """See `Guest.prepare`: ask the monitor and the kernel where its memory is."""
        if self.vm.has_mte:
            _ = self._host_memory

    def paused(self) -> bool | None:
        """True if frozen; else what libvirt or QEMU says, or else what its threads show."""
        if self.is_frozen:
            return True  # a monitor may be waiting for a vCPU
        said = self.monitor.paused()
        if said is None and proc.runs_guest(self.vm.process.pid):
            return False
        return said

    def _stop(self) -> None:
        """Stop the vCPU threads with ptrace."""
        self.vm.drain()
        pid = self.vm.process.pid
        hold_vcpus(self.vm.session, pid, proc.find(pid).vcpus)

    def _resume(self) -> None:
        if self.vm.is_attached:
            self.vm.send()
            self.vm.session.release()  # first of all: the copies in flight come before it anyway
            self.vm.drain()

    def read_tags(self, ipa: int, out: TagBuffer) -> int:
        """See `Guest.read_tags`."""
        return self._copy(ipa, as_bytes(out), uapi.KVM_ARM_TAGS_FROM_GUEST)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`."""
        return self._copy(ipa, as_bytes(tags), uapi.KVM_ARM_TAGS_TO_GUEST)

    def begin_read(self, ipa: int, out: TagBuffer) -> Pending:
        """See `Guest.begin_read`; in flight at once."""
        return self._begin(ipa, as_bytes(out), uapi.KVM_ARM_TAGS_FROM_GUEST)

    def begin_write(self, ipa: int, tags: TagBuffer) -> Pending:
        """See `Guest.begin_write`; in flight at once."""
        return self._begin(ipa, as_bytes(tags), uapi.KVM_ARM_TAGS_TO_GUEST)

    def read_scattered(self, extents: NDArray[np.uint64], out: TagBuffer) -> int:
        """See `Guest.read_scattered`; by chains of calls."""
        from mtetool.backends.kvm import scattered

        self.vm.need_mte()
        done = scattered.read(self.vm.transfer, extents, as_bytes(out))
        # What went wrong with the first is known only by its own copy.
        return done * uapi.GRANULE_BYTES if done else super().read_scattered(extents, out)

    def write_scattered(self, extents: NDArray[np.uint64], tags: TagBuffer) -> int:
        """See `Guest.write_scattered`; by chains of calls."""
        from mtetool.backends.kvm import scattered

        self.vm.need_mte()
        page = self.page_size_bytes // uapi.GRANULE_BYTES
        done = scattered.write(self.vm.transfer, extents, as_bytes(tags), page)
        return done * uapi.GRANULE_BYTES if done else super().write_scattered(extents, tags)

    def _begin(self, ipa: int, tags: memoryview, flags: int) -> Pending:
        self._check(ipa, len(tags) * uapi.GRANULE_BYTES)
        copy = self.vm.transfer.begin(ipa, tags, flags)
        return lambda: self.vm.answer(copy, ipa)

    def _copy(self, ipa: int, tags: memoryview, flags: int) -> int:
        self._check(ipa, len(tags) * uapi.GRANULE_BYTES)
        self.vm.drain()
        if not tags:
            return self.vm.nothing(flags)
        done = 0
        while done < len(tags):
            part = tags[done : done + COPY_GRANULES]
            at = ipa + done * uapi.GRANULE_BYTES
            try:
                n_granules = self._begin(at, part, flags)() // uapi.GRANULE_BYTES
            except OSError:
                if done:
                    break  # what was copied counts; the next call from here says why
                raise
            done += n_granules
            if n_granules < len(part):
                break
        return done * uapi.GRANULE_BYTES

    def _check(self, ipa: int, length_bytes: int) -> None:
        """Apply the kernel's checks to a whole request, which reaches it in parts."""
        self.vm.need_mte()
        if not uapi.is_copy_range(ipa, length_bytes, self.page_size_bytes):
            raise OSError(errno.EINVAL, f"{length_bytes} bytes at {ipa:#x} cannot be copied")

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`."""
        return self.vm.enable_mte()

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """See `Guest.may_be_tagged`: the pages that exist, if QEMU or the kernel says which."""
        memory = self._host_memory
        if memory is None:
            yield extent
        else:
            yield from memory.existing(extent)

    def would_make(self, extents: Sequence[Extent]) -> int:
        """See `Guest.would_make`: holes of files in memory that may be the guest's."""
        from mtetool.vmm.holes import bytes_to_be_made

        return bytes_to_be_made(self.vm.process.pid, self._host_memory, extents)

    def address_spaces(self, vcpu: int | None = None) -> Sequence[AddressSpace]:
        """See `Guest.address_spaces`; the vCPUs are stopped for the moment of the question.

        Raises NoVcpuError, PageTableError.
        """
        from mtetool.backends.kvm.addresses import address_spaces

        self.vm.drain()
        return address_spaces(
            self.vm,
            self._memslots,
            self._host_memory or self._memory_without_places(),
            vcpu,
            held=self.is_frozen,
        )

    @cached_property
    def _host_memory(self) -> HostMemory | None:
        # The pagemap comes first: without it, nothing else needs to be asked.
        with suppress(LayoutUnknownError, AttachRefusedError, UnknownError):
            pagemap = Pagemap(self.vm.process.pid)
            self._stack.callback(pagemap.close)
            return HostMemory(pagemap, self._places())
        return None

    def _memory_without_places(self) -> HostMemory | None:
        with suppress(UnknownError):
            pagemap = Pagemap(self.vm.process.pid)
            self._stack.callback(pagemap.close)
            return HostMemory(pagemap, [])
        return None

    def _places(self) -> list[Place]:
        """Where memory is, as the kernel confirms or the user says."""
        by_hand = places_by_hand(self._options.memslots)
        layout, told = self._asked, []
        with suppress(LayoutUnknownError):
            monitor = self.monitor.ask()
            layout, told = monitor.memslots(), monitor.host_addresses()
        self.vm.need_mte()
        try:
            proven = places_of(self.vm.session, self.vm.fd, layout, [*by_hand, *told])
        except (LayoutUnknownError, AttachRefusedError):
            if not by_hand:
                raise
            proven = []
        return by_hand_and_proven(by_hand, proven)

    @cached_property
    def _memslots(self) -> tuple[Memslot, ...]:
        """The memslots given by hand, else the monitor's, else the kernel's."""
        if self._options.memslots:
            return tuple(replace(slot, host_address=None) for slot in self._options.memslots)
        try:
            return self.monitor.ask().memslots()
        except LayoutUnknownError:
            self.vm.need_mte()
            if self._options.qmp:
                raise
        self._asked = memslots_of(self.vm.session, self.vm.fd)
        return self._asked

    def close(self) -> None:
        """Detach; nothing of ours stays in the VMM."""
        with self._kept:
            self._stack.close()
