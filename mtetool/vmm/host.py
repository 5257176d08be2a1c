"""What this host offers: its processor, its KVM, and what this process may do to others.

Looks only at this process and at /proc and /dev; the one VM that is made is a scratch one
of our own, and is gone when the answer is there.
"""

from __future__ import annotations

import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from mtetool import uapi
from mtetool.vmm.scratch import Kvm

# include/uapi/linux/capability.h
_CAP_SYS_PTRACE = 19


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was found; None where it could not be found out.

    `kvm_errno` is 0 when /dev/kvm could be opened. `seccomp` is the mode of this process: 0
    none, 1 strict, 2 a filter. `ptrace_scope` is None where the kernel has no Yama.
    """

    machine: str
    kernel: str
    page_size_bytes: int
    kvm_errno: int
    mte: bool | None
    cap_sys_ptrace: bool | None
    ptrace_scope: int | None
    seccomp: int | None


def host_facts(proc: Path = Path("/proc"), kvm: Path = Path("/dev/kvm")) -> HostFacts:
    """Look at this host. Raises nothing: what cannot be seen is None."""
    machine = platform.machine()
    kvm_errno, mte = _ask_kvm(kvm, machine)
    status = _status(proc / "self" / "status")
    return HostFacts(
        machine=machine,
        kernel=platform.release(),
        page_size_bytes=resource.getpagesize(),
        kvm_errno=kvm_errno,
        mte=mte,
        cap_sys_ptrace=_bit(status.get("CapEff"), _CAP_SYS_PTRACE),
        ptrace_scope=_number(_text(proc / "sys/kernel/yama/ptrace_scope")),
        seccomp=_number(status.get("Seccomp")),
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
    """Whether MTE can be enabled, tried on a VM that ends here; None without a VM."""
    try:
        vm = kvm.create_vm()
    except OSError:
        return None
    with vm:
        offered = vm.check_extension(uapi.KVM_CAP_ARM_MTE) > 0
        return offered and vm.enable(uapi.KVM_CAP_ARM_MTE) == 0


def _status(path: Path) -> dict[str, str]:
    fields = (line.partition(":") for line in (_text(path) or "").splitlines())
    return {name: value.strip() for name, _, value in fields}


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None


def _number(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def _bit(hexadecimal: str | None, bit: int) -> bool | None:
    try:
        return bool(int(hexadecimal, 16) >> bit & 1) if hexadecimal is not None else None
    except ValueError:
        return None
