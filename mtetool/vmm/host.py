"""What this host offers: its processor, its KVM, and what this process may do to others.

This looks only at this process, /proc and /dev; the one VM that it makes is a scratch VM of our
own, which is gone once it has answered.
"""

from __future__ import annotations

import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from mtetool import uapi
from mtetool.permission import own_rights
from mtetool.vmm.scratch import Kvm


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was found; None for what could not be found out.

    `kvm_errno` is 0 when /dev/kvm could be opened. The last four are those of
    `mtetool.permission.Rights`.
    """

    machine: str
    kernel: str
    page_size_bytes: int
    kvm_errno: int
    mte: bool | None
    cap_sys_ptrace: bool | None
    ptrace_scope: int | None
    seccomp: int | None
    first_user_namespace: bool | None = True


def host_facts(proc: Path = Path("/proc"), kvm: Path = Path("/dev/kvm")) -> HostFacts:
    """Look at this host. Raises nothing: what cannot be seen is None."""
    machine = platform.machine()
    kvm_errno, mte = _ask_kvm(kvm, machine)
    rights = own_rights(proc)
    return HostFacts(
        machine=machine,
        kernel=platform.release(),
        page_size_bytes=resource.getpagesize(),
        kvm_errno=kvm_errno,
        mte=mte,
        cap_sys_ptrace=rights.cap_sys_ptrace,
        ptrace_scope=rights.ptrace_scope,
        seccomp=rights.seccomp,
        first_user_namespace=rights.first_user_namespace,
    )


def _ask_kvm(path: Path, machine: str) -> tuple[int, bool | None]:
    """The errno of opening KVM (0: open), and whether a VM can have MTE."""
    try:
        kvm = Kvm(path)
    except OSError as error:
        return error.errno or 0, None
    with kvm:
        return 0, _scratch_vm_has_mte(kvm) if machine == "aarch64" else None


def _scratch_vm_has_mte(kvm: Kvm) -> bool | None:
    """Whether MTE can be enabled, tried on a scratch VM; None without a VM."""
    try:
        vm = kvm.create_vm()
    except OSError:
        return None
    with vm:
        offered = vm.check_extension(uapi.KVM_CAP_ARM_MTE) > 0
        return offered and vm.enable(uapi.KVM_CAP_ARM_MTE) == 0
