"""All VMs of this host, as far as this user may see them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mtetool.attach.helper import PAGE_BYTES
from mtetool.backends.kvm.guest import KvmGuest
from mtetool.errors import MtetoolError, PermissionRefusedError, host_error
from mtetool.guest import GuestInfo, GuestOptions
from mtetool.vmm import proc

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
    """The VMs by PID and fd, and an error for each process that could not be inspected."""

    vms: tuple[ListedVm, ...]
    unseen: tuple[PermissionRefusedError, ...]


def list_vms(*, attach: bool) -> Listing:
    """List all VMs. With `attach`, attach to each for a moment to ask whether MTE is on.

    A VM that ends meanwhile is left out. Raises no GuestError: a VM that refuses is listed too.
    """
    processes, unseen = proc.find_all()
    found = (vm for process in processes for vm in _of_process(process, attach=attach))
    return Listing(tuple(found), tuple(unseen))


def _of_process(process: proc.VmmProcess, *, attach: bool) -> Iterator[ListedVm]:
    for fd in process.vm_fds:
        owner = proc.owner(process.pid)
        if platform.machine() != "aarch64":
            yield ListedVm(_unseen(process, fd, mte=False), fd, None, owner, None)
            continue
        vm = _looked_at(process, fd, owner, attach=attach)
        if proc.owner(process.pid) is not None:
            yield vm


def _looked_at(process: proc.VmmProcess, fd: int, owner: str | None, *, attach: bool) -> ListedVm:
    """One VM; whatever goes wrong becomes the reason in its row, and affects no other row."""
    try:
        with KvmGuest(process, fd, GuestOptions()) as guest:
            info, reason = guest.glance(attach=attach)
            paused = guest.paused()
    except MtetoolError as error:
        return ListedVm(_unseen(process, fd, mte=None), fd, None, owner, error)
    except OSError as error:
        failed = host_error(error, f"looking at process {process.pid}", pid=process.pid)
        return ListedVm(_unseen(process, fd, mte=None), fd, None, owner, failed)
    state: State | None = None if paused is None else "paused" if paused else "running"
    return ListedVm(info, fd, state, owner, reason)


def _unseen(process: proc.VmmProcess, fd: int, *, mte: bool | None) -> GuestInfo:
    return GuestInfo(
        source=f"kvm:{process.pid}:{fd}",
        mte=mte,
        page_size_bytes=PAGE_BYTES,
        memslots=(),
        vmm=process.program,
        pid=process.pid,
        vcpus=process.vcpus,
    )
