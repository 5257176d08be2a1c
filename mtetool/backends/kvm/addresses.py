"""The address spaces of a VM's vCPUs: their registers, and where in the VMM their tables are.

The kernel confirms where guest memory is (`mtetool.backends.kvm.memslots`), but not for a VM with a
single memslot. Then the guest itself tells: of the few places where that much memory could be, only
the right one leads from its registers through its page tables to its own exception vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from mtetool.backends.kvm.memslots import likely_places
from mtetool.backends.kvm.page_tables import PageTables, Read, half_of
from mtetool.backends.kvm.registers import Vcpu, ask_vcpus
from mtetool.backends.kvm.virtual import GuestMemory, VcpuAddresses
from mtetool.backends.kvm.vm import Vm
from mtetool.errors import MtetoolError, NoVcpuError, PageTableError
from mtetool.guest import Mapped, Memslot
from mtetool.spans import Place
from mtetool.vmm import proc
from mtetool.vmm.hostmemory import HostMemory


def address_spaces(
    vm: Vm,
    slots: Sequence[Memslot],
    host: HostMemory | None,
    number: int | None,
    *,
    held: bool,
) -> list[VcpuAddresses]:
    """Ask all vCPUs of a VM, or the one with that number; `host` is where its memory is.

    Raises NoVcpuError, PageTableError, and what attaching raises.
    """
    pid = vm.process.pid
    if host is None:
        raise PageTableError(
            f"which memory of process {pid} exists is unknown, so its guest's page tables are not"
            " read: that could allocate memory, or wait for another process",
            hint="run mtetool as root; it cannot be known while a userfaultfd is in use",
            pid=pid,
        )
    fds = _vcpu_fds(vm, number)
    vcpus = ask_vcpus(vm.session, pid, len(proc.vcpu_fds(pid)), fds, held=held)
    memory = GuestMemory(pid, slots, _completed(vm, slots, host, vcpus))
    return [VcpuAddresses(vcpu.number, vcpu.registers, memory.read) for vcpu in vcpus]


def _vcpu_fds(vm: Vm, number: int | None) -> Mapping[int, int]:
    pid = vm.process.pid
    if len(proc.vm_fds(pid)) > 1:
        raise NoVcpuError(
            f"process {pid} has several VMs, and it is unknown to which of them its vCPUs belong",
            hint="give guest physical addresses, without --virtual",
            pid=pid,
        )
    fds = proc.vcpu_fds(pid)
    if not fds:
        raise NoVcpuError(
            f"the VM of process {pid} has no vCPU yet", hint="wait until it runs", pid=pid
        )
    if number is None:
        return fds
    if number not in fds:
        raise NoVcpuError(
            f"the VM of process {pid} has no vCPU {number}",
            hint=f"its vCPUs: {', '.join(map(str, list(fds)[:16]))}{', …' * (len(fds) > 16)}",
            pid=pid,
        )
    return {number: fds[number]}


def _completed(
    vm: Vm, slots: Sequence[Memslot], host: HostMemory, vcpus: Sequence[Vcpu]
) -> HostMemory:
    """The host's memory with the place of the largest slot, if only the guest tells that."""
    largest = max(slots, key=lambda slot: slot.size_bytes, default=None)
    if largest is None or any(at for *_, at in host.told(largest.ipa, largest.end)):
        return host
    pid = vm.process.pid
    candidates = [
        Place(largest.ipa, largest.size_bytes, address)
        for address in likely_places(vm.session.mappings(), largest.size_bytes)
    ]

    def reader(place: Place) -> Read:
        return GuestMemory(pid, slots, host.with_place(place)).read

    place = proven_place(vcpus, candidates, slots, reader)
    return host.with_place(place) if place else host


def proven_place(
    vcpus: Sequence[Vcpu],
    candidates: Sequence[Place],
    slots: Sequence[Memslot],
    reader: Callable[[Place], Read],
) -> Place | None:
    """The one candidate through which the guest's own exception vectors are found in its memory.

    None if there is no such candidate, or if there are several.
    """
    asked = [vcpu for vcpu in vcpus if vcpu.registers.is_on]
    found = [
        place
        for place in candidates
        if asked and all(_has_vectors(vcpu, slots, reader(place)) for vcpu in asked)
    ]
    return found[0] if len(found) == 1 else None


def _has_vectors(vcpu: Vcpu, slots: Sequence[Memslot], read: Read) -> bool:
    with suppress(MtetoolError):
        tables = PageTables(vcpu.registers, half_of(vcpu.vectors), read)
        parts = tables.parts(vcpu.vectors, vcpu.vectors + 1)
        return any(
            isinstance(part, Mapped) and any(slot.ipa <= part.ipa < slot.end for slot in slots)
            for part in parts
        )
    return False
