"""What this host offers: its processor, its KVM, and what this process may do to others.

Looks only at this process and at /proc and /dev; the one VM that is made is a scratch one
of our own, and is gone when the answer is there.
"""

from __future__ import annotations

import fcntl
import os
import platform
import resource
from dataclasses import dataclass
from pathlib import Path

from mtetool import uapi

# include/uapi/linux/capability.h
_CAP_SYS_PTRACE = 19

# include/uapi/linux/kvm.h; the answer is the largest guest address size in bits, which goes
# into the low byte of KVM_CREATE_VM's argument (Documentation/virt/kvm/api.rst, 4.2).
_KVM_CAP_ARM_VM_IPA_SIZE = 165


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


def _ask_kvm(kvm: Path, machine: str) -> tuple[int, bool | None]:
    """The errno of opening KVM (0: open), and whether a VM can have MTE."""
    try:
        descriptor = os.open(kvm, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.errno or 0, None
    try:
        return 0, _scratch_vm_has_mte(descriptor) if machine == "aarch64" else None
    except OSError:
        return 0, None
    finally:
        os.close(descriptor)


def _scratch_vm_has_mte(kvm: int) -> bool:
    """Whether MTE can be enabled, tried on a VM that ends here. Raises OSError."""
    if fcntl.ioctl(kvm, uapi.KVM_GET_API_VERSION) != uapi.KVM_API_VERSION:
        return False
    bits = fcntl.ioctl(kvm, uapi.KVM_CHECK_EXTENSION, _KVM_CAP_ARM_VM_IPA_SIZE)
    # Type 0 asks for 40 bits of address, which small hosts do not have.
    vm = fcntl.ioctl(kvm, uapi.KVM_CREATE_VM, bits if 0 < bits < 40 else 0)
    try:
        if not fcntl.ioctl(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_ARM_MTE):
            return False
        fcntl.ioctl(vm, uapi.KVM_ENABLE_CAP, uapi.enable_cap(uapi.KVM_CAP_ARM_MTE))
        return True
    finally:
        os.close(vm)


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
