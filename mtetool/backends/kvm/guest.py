"""The real ioctl in a live VMM: `kvm:PID[:FD]`.

KVM answers only to the process that created the VM (EIO otherwise), so that every call is
made there, by a helper thread (`mtetool.attach.session`).
"""

from __future__ import annotations

import errno
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING

from mtetool import uapi
from mtetool.attach.helper import PAGE_BYTES
from mtetool.attach.session import Session, Target
from mtetool.backends.kvm.by_hand import by_hand_and_proven, check_by_hand, places_by_hand
from mtetool.backends.kvm.memslots import memslots_of, places_of
from mtetool.backends.kvm.transfer import BUFFER_BYTES, COPY_BYTES, Transfer
from mtetool.backends.kvm.vcpus import hold_vcpus
from mtetool.buffers import as_bytes
from mtetool.errors import (
    AttachRefusedError,
    GuestError,
    GuestLostError,
    LayoutUnknownError,
    MteOffError,
    MteUnsupportedError,
    SourceError,
    TooLateError,
    WrongHostError,
    errno_name,
)
from mtetool.guest import Extent, Guest, GuestInfo, Memslot
from mtetool.vmm import monitors, proc, qemu
from mtetool.vmm.hostmemory import HostMemory
from mtetool.vmm.pagemap import Pagemap, UnknownError

if TYPE_CHECKING:
    from mtetool.buffers import TagBuffer
    from mtetool.guest import GuestOptions


class _NotAsked(Enum):
    NOT_ASKED = auto()


_NOT_ASKED = _NotAsked.NOT_ASKED


def open_kvm(rest: str, options: GuestOptions) -> KvmGuest:
    """Open `PID` or `PID:FD`, the VM of a running VMM.

    Raises WrongHostError, SourceError, NoSuchProcessError, NotAVmmError, SeveralVmsError,
    PermissionRefusedError, ForeignMonitorError. Nothing is attached to before the first call that
    needs it.
    """
    if platform.machine() != "aarch64":
        raise WrongHostError(
            f"kvm:{rest} needs an arm64 host with MTE; this one is {platform.machine()}",
            hint="run mtetool on the host of the VM; emu: works everywhere",
        )
    pid_text, colon, fd_text = rest.partition(":")
    if not pid_text.isdecimal() or (colon and not fd_text.isdecimal()):
        raise SourceError(
            f"kvm:{rest} is not of the form kvm:PID or kvm:PID:FD",
            hint="look for the VMM with: mtetool list",
        )
    process = proc.find(int(pid_text))
    check_by_hand(process.pid, options.memslots)
    fd = proc.choose_vm(process, int(fd_text) if colon else None)
    guest = KvmGuest(process, fd, options)
    if options.qmp:
        guest.check_monitor()
    return guest


class KvmGuest(Guest):
    """The VM behind one file descriptor of a VMM process."""

    def __init__(self, process: proc.VmmProcess, fd: int, options: GuestOptions) -> None:
        self.page_size_bytes = PAGE_BYTES
        self._process = process
        self._fd = fd
        self._options = options
        self._session: Session | None = None
        self._transfer: Transfer | None = None
        self._monitor: qemu.Monitor | None = None
        self._silent: LayoutUnknownError | None = None
        self._has_monitor = True  # as far as is known
        self._slots: tuple[Memslot, ...] | None = None
        self._asked: tuple[Memslot, ...] | None = None
        self._mte: bool | None = None
        self._frozen_since: float | None = None
        self._requests = [uapi.KVM_ARM_MTE_COPY_TAGS]
        self._stack = ExitStack()
        self._memory: HostMemory | _NotAsked | None = _NOT_ASKED

    @property
    def borrowed_seconds(self) -> float:
        """For how long a thread of the VMM itself was borrowed."""
        return self._session.borrowed_seconds if self._session else 0.0

    def info(self) -> GuestInfo:
        """The VM; attaches, to ask the kernel whether MTE is on."""
        slots = self._memslots()
        if self._mte_is_on():
            self._host_memory()  # asked now, as the guest may wait from the first copy on
        return self._described(self._mte_is_on(), slots)

    def glance(self, *, attach: bool) -> tuple[GuestInfo, GuestError | None]:
        """As `info`, with None and () for what cannot be learnt, and the reason for that.

        Without `attach` only the monitor is asked, and what everybody may know.
        """
        mte: bool | None = None
        slots: tuple[Memslot, ...] = ()
        reason: GuestError | None = None
        try:
            mte = self._mte_is_on() if attach else None
            slots = self._memslots() if mte else self._ask_monitor().memslots()
        except LayoutUnknownError as error:
            # Without MTE the kernel is not asked, and to have no monitor is nothing to report.
            reason = error if mte or self._has_monitor else None
        except GuestError as error:
            reason = error
        return self._described(mte, slots), reason

    def _described(self, mte: bool | None, slots: tuple[Memslot, ...]) -> GuestInfo:
        return GuestInfo(
            source=f"kvm:{self._process.pid}:{self._fd}",
            mte=mte,
            page_size_bytes=self.page_size_bytes,
            memslots=slots,
            vmm=self._process.program,
            name=self._name(),
            pid=self._process.pid,
            vcpus=self._process.vcpus,
        )

    def paused(self) -> bool | None:
        """What QEMU's monitor says; without one, a vCPU that is in the guest tells. True frozen."""
        if self._frozen_since is not None:
            return True  # and a monitor may wait for a vCPU
        try:
            return self._ask_monitor().paused()
        except LayoutUnknownError:
            return False if proc.runs_guest(self._process.pid) else None

    def freeze(self) -> None:
        """See `Guest.freeze`: the threads of the vCPUs are stopped by ptrace."""
        session, pid = self._attached(), self._process.pid
        self._transfers().drop()  # nothing of before
        self._frozen_since = time.monotonic()
        try:
            hold_vcpus(session, pid, proc.find(pid).vcpus)
        except BaseException:
            self.thaw()
            raise

    def thaw(self) -> float:
        """See `Guest.thaw`."""
        since, self._frozen_since = self._frozen_since, None
        if since is None:
            return 0.0
        self._attached().release()
        self._transfers().drop()  # nothing of while it stood still
        return time.monotonic() - since

    def read_tags(self, ipa: int, out: TagBuffer, *, then_bytes: int = 0) -> int:
        """See `Guest.read_tags`; what will be read next is under way meanwhile."""
        view = as_bytes(out)
        self._check(ipa, len(view) * uapi.GRANULE_BYTES)
        if not view:
            return self._answered(self._transfers().nothing(), ipa)
        return self._answered(self._transfers().read(ipa, view, then_bytes), ipa)

    def may_be_tagged(self, extent: Extent) -> Iterator[Extent]:
        """See `Guest.may_be_tagged`: the pages that exist, where QEMU or the kernel says which."""
        memory = self._host_memory()
        if memory is None:
            yield extent
        else:
            yield from memory.existing(extent)

    def would_make(self, extents: Sequence[Extent]) -> int:
        """See `Guest.would_make`: holes of files in memory that may be the guest's."""
        from mtetool.vmm.holes import bytes_to_be_made

        return bytes_to_be_made(self._process.pid, self._host_memory(), extents)

    def _host_memory(self) -> HostMemory | None:
        if self._memory is _NOT_ASKED:
            self._memory = None
            # First of all: nobody is asked for what could not be used.
            with suppress(LayoutUnknownError, AttachRefusedError, UnknownError):
                pagemap = Pagemap(self._process.pid)
                self._stack.callback(pagemap.close)
                self._memory = HostMemory(pagemap, self._host_addresses())
        return self._memory

    def _host_addresses(self) -> list[tuple[int, int, int]]:
        """Where the kernel confirms that memory is, or the user says so."""
        by_hand = places_by_hand(self._options.memslots)
        layout, told = self._asked, []
        with suppress(LayoutUnknownError):
            monitor = self._ask_monitor()
            layout, told = monitor.memslots(), monitor.host_addresses()
        if not self._mte_is_on():
            raise mte_off(self._process.pid)
        try:
            proven = places_of(self._attached(), self._fd, layout, [*by_hand, *told])
        except (LayoutUnknownError, AttachRefusedError):
            if not by_hand:
                raise
            proven = []
        return by_hand_and_proven(by_hand, proven)

    def write_tags(self, ipa: int, tags: TagBuffer) -> int:
        """See `Guest.write_tags`."""
        view = as_bytes(tags)
        self._check(ipa, len(view) * uapi.GRANULE_BYTES)
        if not view:
            return self._answered(self._transfers().nothing(uapi.KVM_ARM_TAGS_TO_GUEST), ipa)
        done = 0
        while done < len(view):
            part = view[done : done + COPY_BYTES]
            at = ipa + done * uapi.GRANULE_BYTES
            completed = self._transfers().begin_write(at, part, then_read=False)()
            if completed <= 0 and done:
                break  # what was copied before counts; the next call there says why
            done += self._answered(completed, at) // uapi.GRANULE_BYTES
            if completed < len(part) * uapi.GRANULE_BYTES:
                break
        return done * uapi.GRANULE_BYTES

    def begin_write(
        self, ipa: int, tags: TagBuffer, *, then_read: bool = False
    ) -> Callable[[], int]:
        """See `Guest.begin_write`; under way at once."""
        view = as_bytes(tags)
        if not 0 < len(view) <= COPY_BYTES:
            return partial(self.write_tags, ipa, view)
        self._check(ipa, len(view) * uapi.GRANULE_BYTES)
        finish = self._transfers().begin_write(ipa, view, then_read=then_read)
        return lambda: self._answered(finish(), ipa)

    def enable_mte(self) -> bool:
        """See `Guest.enable_mte`: KVM_ENABLE_CAP in the VMM."""
        self._requests.append(uapi.KVM_ENABLE_CAP)
        if self._mte_is_on():
            return False
        request = uapi.enable_cap(uapi.KVM_CAP_ARM_MTE)
        result = self._attached().ioctl(self._fd, uapi.KVM_ENABLE_CAP, request)
        pid = self._process.pid
        if result < 0 and proc.find(pid).vcpus:
            raise TooLateError(
                f"the VM of process {pid} has vCPUs already: MTE can only be enabled before",
                hint="start QEMU with -preconfig, run mtetool enable, then x-exit-preconfig",
                pid=pid,
                errno=errno_name(-result),
            )
        if result < 0:
            raise MteUnsupportedError(
                f"the kernel refused to enable MTE for the VM of process {pid}:"
                f" {errno_name(-result)}",
                hint="look at what this host can do: mtetool probe",
                pid=pid,
                errno=errno_name(-result),
            )
        self._mte = True
        return True

    def close(self) -> None:
        """Detach; nothing of ours stays in the VMM."""
        self._stack.close()
        self._session = self._monitor = self._transfer = None

    def _attached(self) -> Session:
        if self._session is None:
            process, fd = self._process, self._fd
            target = Target(
                pid=process.pid,
                ioctls=tuple((fd, request) for request in self._requests),
                candidates=lambda: proc.threads_to_borrow(process.pid),
                # Between the look-up and the attach the PID may have changed hands.
                check=lambda: proc.check_same(process, fd),
            )
            self._session = Session(target, buffer_bytes=BUFFER_BYTES)
            self._stack.callback(self._session.close)
        return self._session

    def _check(self, ipa: int, length_bytes: int) -> None:
        """The kernel's checks of a whole request, which goes there in parts."""
        if not self._mte_is_on():
            raise mte_off(self._process.pid)
        if not uapi.is_copy_range(ipa, length_bytes, self.page_size_bytes):
            raise OSError(errno.EINVAL, f"{length_bytes} bytes at {ipa:#x} are not to be copied")

    def _transfers(self) -> Transfer:
        if self._transfer is None:
            self._transfer = Transfer(self._attached(), self._fd)
        return self._transfer

    def _answered(self, result: int, ipa: int) -> int:
        """What an ioctl answered: bytes, or an exception for -errno."""
        if result >= 0:
            return result
        if result == -errno.EIO:
            raise GuestLostError(f"the VM of process {self._process.pid} is dead (EIO)")
        raise OSError(-result, f"copying tags at {ipa:#x}: {errno_name(-result)}")

    def _mte_is_on(self) -> bool:
        if self._mte is None:
            # A copy of nothing passes every check, among them that MTE is on.
            result = self._transfers().nothing()
            if result not in (0, -errno.EINVAL):
                raise GuestLostError(
                    f"fd {self._fd} of process {self._process.pid} does not answer as a VM:"
                    f" {errno_name(-result)}"
                )
            self._mte = result == 0
        return self._mte

    def _memslots(self) -> tuple[Memslot, ...]:
        """As given by hand, or by the monitor, or by the kernel; in this order."""
        if self._options.memslots:
            return tuple(replace(slot, host_address=None) for slot in self._options.memslots)
        if self._slots is None:
            try:
                self._slots = self._ask_monitor().memslots()
            except LayoutUnknownError:
                if not self._mte_is_on():
                    raise mte_off(self._process.pid) from None
                if self._options.qmp:
                    raise
                self._slots = self._asked = memslots_of(self._attached(), self._fd)
        return self._slots

    def check_monitor(self) -> None:
        """See that the monitor that was given is not another VM's. Raises ForeignMonitorError."""
        with suppress(LayoutUnknownError):
            self._ask_monitor()

    def _ask_monitor(self) -> qemu.Monitor:
        """The monitor; one that did not answer once is not asked again."""
        if self._silent is not None:
            raise self._silent
        if self._monitor is None:
            pid, given = self._process.pid, self._options.qmp
            try:
                found = monitors.open_given(pid, given) if given else monitors.open_found(pid)
                if found is None:
                    raise self._no_monitor()
            except LayoutUnknownError as error:
                self._silent = error
                raise
            self._monitor = self._stack.enter_context(found)
        return self._monitor

    def _no_monitor(self) -> LayoutUnknownError:
        self._has_monitor = False
        return LayoutUnknownError(
            f"process {self._process.pid} ({self._process.program}) has no QMP monitor on a unix"
            " socket that could describe its memory layout",
            hint="name the memory by hand: --memslot IPA:SIZE (repeatable)",
        )

    def _name(self) -> str | None:
        try:
            return self._ask_monitor().name()
        except LayoutUnknownError:
            return monitors.name_of(self._process.pid)


def mte_off(pid: int) -> MteOffError:
    """The error for a VM that has no tags."""
    return MteOffError(
        f"MTE is off for the VM of process {pid}: it has no tags",
        hint="MTE is enabled before the first vCPU: mtetool enable, or QEMU's -M virt,mte=on",
        pid=pid,
    )
