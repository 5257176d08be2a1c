"""Whether this host can copy tags: takes facts, and judges each of them in a row."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Literal

from mtetool.errors import errno_name
from mtetool.vmm.host import HostFacts

State = Literal["ok", "no", "unknown"]


@dataclass(frozen=True, slots=True)
class Row:
    """One judged fact. `id` is stable; `needed` says that "no" means no tags can be copied."""

    id: str
    title: str
    state: State
    value: str
    hint: str | None = None
    needed: bool = False


def judge(facts: HostFacts) -> list[Row]:
    """Return the facts as rows, in the order in which to fix them."""
    return [
        _architecture(facts),
        Row("kernel", "kernel release", "ok", facts.kernel),
        Row("page-size", "page size", "ok", f"{facts.page_size_bytes} bytes"),
        _kvm(facts),
        _mte(facts),
        *_permission(facts),
        _seccomp(facts),
    ]


def able(rows: list[Row]) -> bool:
    """Return whether nothing that is needed is known to be missing."""
    return all(row.state != "no" for row in rows if row.needed)


def _architecture(facts: HostFacts) -> Row:
    if facts.machine == "aarch64":
        return Row("architecture", "architecture", "ok", facts.machine, needed=True)
    hint = "use emulated guests (emu:PATH) and snapshots: MTE is a feature of arm64"
    return Row("architecture", "architecture", "no", facts.machine, hint, needed=True)


def _kvm(facts: HostFacts) -> Row:
    row_id, title = "kvm", "/dev/kvm"
    if facts.kvm_errno == 0:
        return Row(row_id, title, "ok", "can be opened")
    name = errno_name(facts.kvm_errno)
    if facts.kvm_errno == errno.ENOENT:
        hint = "check that the host supports virtualisation, and that the module is loaded"
        return Row(row_id, title, "no", f"{name}: absent", hint)
    hint = "join the group that owns it (often kvm); copying from a running VMM works without it"
    return Row(row_id, title, "no", f"{name}: cannot be opened", hint)


def _mte(facts: HostFacts) -> Row:
    row_id, title = "mte", "KVM_CAP_ARM_MTE"
    if facts.mte:
        return Row(row_id, title, "ok", "a scratch VM could enable it", needed=True)
    if facts.mte is None and facts.machine == "aarch64":
        hint = "to find out, run this where /dev/kvm can be opened"
        return Row(row_id, title, "unknown", "could not be determined", hint, needed=True)
    hint = "use a processor with FEAT_MTE2 and a kernel with CONFIG_ARM64_MTE (5.14 or later)"
    return Row(row_id, title, "no", "not offered", hint, needed=True)


def _permission(facts: HostFacts) -> list[Row]:
    """The capability, or else a kernel that lets a user trace their own processes."""
    same_user = facts.ptrace_scope in (None, 0)
    if facts.cap_sys_ptrace:
        capability = Row("cap-sys-ptrace", "CAP_SYS_PTRACE", "ok", "in the effective set")
    elif facts.cap_sys_ptrace is None:
        capability = Row("cap-sys-ptrace", "CAP_SYS_PTRACE", "unknown", "could not be read")
    else:
        value = "not held: only VMMs of the same user can be reached" if same_user else "not held"
        hint = "run as root, or give this process CAP_SYS_PTRACE"
        capability = Row(
            "cap-sys-ptrace", "CAP_SYS_PTRACE", "no", value, hint, needed=not same_user
        )
    return [capability, _yama(facts), _namespace(facts)]


def _yama(facts: HostFacts) -> Row:
    row_id, title = "ptrace-scope", "kernel.yama.ptrace_scope"
    if facts.ptrace_scope is None:
        return Row(row_id, title, "ok", "no Yama in this kernel")
    means = {
        0: "users may trace their own processes",
        1: "users may trace only what the tracer started",
        2: "only with CAP_SYS_PTRACE",
        3: "no process may trace",
    }
    value = f"{facts.ptrace_scope}: {means.get(facts.ptrace_scope, 'unknown')}"
    if facts.ptrace_scope == 3:
        hint = "use emulated guests: no process may trace another until the next boot"
        return Row(row_id, title, "no", value, hint, needed=True)
    if facts.ptrace_scope == 0 or facts.cap_sys_ptrace:
        return Row(row_id, title, "ok", value)
    return Row(row_id, title, "no", value, "set it to 0 to let users trace their own processes")


def _namespace(facts: HostFacts) -> Row:
    row_id, title = "user-namespace", "user namespace"
    if facts.first_user_namespace:
        return Row(row_id, title, "ok", "the host's own")
    value = "could not be read"
    if facts.first_user_namespace is False:
        value = "another one (a container): only VMMs in it can be reached"
    return Row(row_id, title, "unknown", value, "run mtetool on the host itself to reach all VMMs")


def _seccomp(facts: HostFacts) -> Row:
    row_id, title = "seccomp", "seccomp of this process"
    if facts.seccomp is None:
        return Row(row_id, title, "unknown", "could not be read")
    if facts.seccomp == 0:
        return Row(row_id, title, "ok", "none")
    hint = "run mtetool on the host itself: a container's filter may deny ptrace, process_vm_readv"
    return Row(row_id, title, "unknown", f"mode {facts.seccomp}", hint)
