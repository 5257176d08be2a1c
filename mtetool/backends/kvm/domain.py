"""A domain of libvirt, `libvirt:NAME` or `libvirt:UUID`: a VM as `kvm:PID`, but libvirt knows it.

libvirt says whether it runs, and passes commands on to QEMU's monitor, which it holds itself. All
else is as for any VM: tags are copied in QEMU's own process, which `mtetool.vmm.domain_process`
finds and proves.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from mtetool.backends.kvm.by_hand import check_by_hand
from mtetool.backends.kvm.guest import KvmGuest, check_host
from mtetool.backends.kvm.monitor import VmmMonitor, monitor_of
from mtetool.errors import (
    DomainOffError,
    DomainProcessError,
    LayoutUnknownError,
    MtetoolError,
    NoSuchDomainError,
    SourceError,
)
from mtetool.vmm import domain_process, domain_xml, proc
from mtetool.vmm.domain_process import Proof
from mtetool.vmm.libvirt import Domain, Libvirt, PassThrough, off
from mtetool.vmm.qemu import Monitor

if TYPE_CHECKING:
    from mtetool.guest import GuestOptions

# A list of VMs is of use without libvirt's names, too.
_LIST_SECONDS = 4.0


def open_domain(rest: str, options: GuestOptions) -> KvmGuest:
    """Open a domain, by its UUID or name. mtetool attaches only at the first call that needs it.

    Raises WrongHostError, SourceError, UsageError, NoSuchDomainError, DomainOffError,
    DomainProcessError, LibvirtUnavailableError, SeveralVmsError, PermissionRefusedError,
    ForeignMonitorError.
    """
    if not rest:
        raise SourceError(
            "libvirt: names no domain", hint="libvirt:NAME or libvirt:UUID; see mtetool list"
        )
    check_host(f"libvirt:{rest}")
    passes_on = options.use_monitor and options.qmp is None
    libvirt = Libvirt(options.connect, readonly=not passes_on)
    try:
        domain = libvirt.domain(rest)
        if not domain.is_active():
            raise off(domain.name)
        process, monitor = (_passed_on if passes_on else _by_user)(domain, options)
        check_by_hand(process.pid, options.memslots)
        fd = proc.choose_vm(process, None)
        monitor.check()
    except BaseException:
        libvirt.close()
        raise
    guest = KvmGuest(process, fd, options, monitor)
    guest.keep(libvirt)
    return guest


def _by_user(domain: Domain, options: GuestOptions) -> tuple[proc.VmmProcess, VmmMonitor]:
    """The domain's process, proven by its user, and a monitor that libvirt does not hold."""
    process = domain_process.find(domain.uuid, Proof(_user_id(domain), None))
    return process, monitor_of(process, options, domain)


def _passed_on(domain: Domain, options: GuestOptions) -> tuple[proc.VmmProcess, VmmMonitor]:
    """The domain's process, proven by its user and its threads, and the monitor by libvirt.

    A monitor that does not answer is done without, as for any VM.
    """
    monitor = Monitor(PassThrough(domain))
    tids: frozenset[int] = frozenset()
    silent: LayoutUnknownError | None = None
    uid = _user_id(domain)
    try:
        tids = monitor.vcpu_threads()
    except LayoutUnknownError as error:
        silent = error
    process = domain_process.find(domain.uuid, Proof(uid, tids or None))

    def open_monitor() -> Monitor:
        if silent is not None:
            raise silent
        return monitor

    return process, VmmMonitor(process, open_monitor, domain=domain)


def _user_id(domain: Domain) -> int | None:
    """The id of the user that the domain's QEMU runs as; None if libvirt does not say."""
    try:
        uid = domain_xml.user_id(domain.xml())
    except ValueError as error:
        raise DomainProcessError(
            f"libvirt does not say clearly which user runs the domain {domain.name}: {error}",
            hint=f"look at its description: virsh dumpxml {domain.uuid}",
        ) from error
    return os.geteuid() if uid is None and domain.libvirt.is_session else uid


class KnownDomains:
    """The domains that some of these processes run, as one connection to libvirt knows them.

    libvirt is asked only if a command line looks as if it had written it. `error` says why it could
    not be asked; then no process is known to run a domain. No command is passed on to a monitor.
    """

    def __init__(self, processes: Iterable[proc.VmmProcess], uri: str | None) -> None:
        self.error: MtetoolError | None = None
        self._domains: dict[int, Domain] = {}
        self._stack = ExitStack()
        by_uuid: defaultdict[str, list[int]] = defaultdict(list)
        for process in processes:
            if uuid := domain_process.uuid_of(process.pid):
                by_uuid[uuid].append(process.pid)
        if by_uuid:
            try:
                self._look_up(by_uuid, uri)
            except MtetoolError as error:
                self.error = error
                self._domains.clear()

    def _look_up(self, by_uuid: dict[str, list[int]], uri: str | None) -> None:
        libvirt = self._stack.enter_context(Libvirt(uri, readonly=True, seconds=_LIST_SECONDS))
        for uuid, pids in by_uuid.items():
            try:
                domain = libvirt.domain(uuid)
                proof = Proof(_user_id(domain), None)
            except (NoSuchDomainError, DomainOffError, DomainProcessError):
                continue  # another libvirt's, or none: any VM can have a UUID
            fitting = [pid for pid in pids if proof.against(pid) is None]
            if len(fitting) == 1:
                self._domains[fitting[0]] = domain

    def of(self, pid: int) -> Domain | None:
        """The domain that a process runs, if that is proven."""
        return self._domains.get(pid)

    def __enter__(self) -> KnownDomains:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
