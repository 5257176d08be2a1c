"""All VMs of this host, as far as this user may see them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from mtetool.attach.helper import PAGE_BYTES
from mtetool.backends.kvm.domain import KnownDomains
from mtetool.backends.kvm.guest import KvmGuest
from mtetool.backends.kvm.monitor import monitor_of
from mtetool.errors import MtetoolError, PermissionRefusedError, host_error
from mtetool.guest import GuestInfo, GuestOptions
from mtetool.vmm import libvirt, proc

State = Literal["running", "paused"]


@dataclass(frozen=True, slots=True)
class ListedVm:
    """A VM; what is unknown is None, and `reason` says why."""

    info: GuestInfo
    fd: int
    state: State | None
    owner: str | None
    reason: MtetoolError | None

    @property
    def memory_bytes(self) -> int | None:
        """The size of all writable memslots; None if they are unknown."""
        if not self.info.memslots:
            return None
        return sum(s.size_bytes for s in self.info.memslots if s.kind == "ram" and not s.readonly)


@dataclass(frozen=True, slots=True)
class Listing:
    """The VMs by PID and fd, and an error for each process that could not be inspected.

    `unnamed` says why libvirt was not asked about VMs that look like its domains.
    """

    vms: tuple[ListedVm, ...]
    unseen: tuple[PermissionRefusedError, ...]
    unnamed: MtetoolError | None = None


def list_vms(*, attach: bool, connect: str | None = None) -> Listing:
    """List all VMs. With `attach`, attach to each for a moment to ask whether MTE is on.

    `connect` is the URI of the libvirt that may know some of them. A VM that ends meanwhile is left
    out. Raises UsageError for a wrong URI, but no GuestError: a VM that refuses is listed too.
    """
    if connect is not None:
        libvirt.checked_uri(connect)
    processes, unseen = proc.find_all()
    with KnownDomains(processes, connect) as domains:
        found = [
            vm
            for process in processes
            for vm in _of_process(process, domains.of(process.pid), attach=attach)
        ]
    return Listing(tuple(found), tuple(unseen), domains.error)


def _of_process(
    process: proc.VmmProcess, domain: libvirt.Domain | None, *, attach: bool
) -> Iterator[ListedVm]:
    if len(process.vm_fds) > 1:
        domain = None  # the name would be that of several
    for fd in process.vm_fds:
        owner = proc.owner(process.pid)
        vm = _looked_at(process, fd, owner, domain, attach=attach)
        if proc.owner(process.pid) is not None:
            yield vm


def _looked_at(
    process: proc.VmmProcess,
    fd: int,
    owner: str | None,
    domain: libvirt.Domain | None,
    *,
    attach: bool,
) -> ListedVm:
    """One VM; whatever goes wrong becomes the reason in its row, and affects no other row."""
    monitor = monitor_of(process, GuestOptions(), domain)
    unseen = GuestInfo(
        source=monitor.source(fd),
        mte=None,
        page_size_bytes=PAGE_BYTES,
        memslots=(),
        vmm=process.program,
        name=domain.name if domain else None,
        pid=process.pid,
        vcpus=process.vcpus,
    )
    if platform.machine() != "aarch64":
        state = _state(monitor.paused()) if domain else None
        return ListedVm(replace(unseen, mte=False), fd, state, owner, None)
    try:
        with KvmGuest(process, fd, GuestOptions(), monitor) as guest:
            info, reason = guest.glance(attach=attach)
            paused = guest.paused()
    except MtetoolError as error:
        return ListedVm(unseen, fd, None, owner, error)
    except OSError as error:
        failed = host_error(error, f"looking at process {process.pid}", pid=process.pid)
        return ListedVm(unseen, fd, None, owner, failed)
    return ListedVm(info, fd, _state(paused), owner, reason)


def _state(paused: bool | None) -> State | None:
    return None if paused is None else "paused" if paused else "running"
