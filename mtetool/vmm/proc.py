"""VMs as /proc shows them: which file descriptors of a process are VMs and vCPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mtetool import uapi
from mtetool.errors import (
    NoSuchProcessError,
    NotAVmmError,
    PermissionRefusedError,
    SeveralVmsError,
    SourceError,
)

# The names are given in virt/kvm/kvm_main.c.
_VM_LINK = "anon_inode:kvm-vm"
_VCPU_LINK = "anon_inode:kvm-vcpu:"


@dataclass(frozen=True, slots=True)
class VmmProcess:
    """A process with KVM file descriptors: `vm_fds` ascending, `vcpus` counted."""

    pid: int
    start_time: int
    program: str
    vm_fds: tuple[int, ...]
    vcpus: int


def find(pid: int) -> VmmProcess:
    """Look at a process. Raises NoSuchProcessError, NotAVmmError, PermissionRefusedError."""
    _check_is_process(pid)
    links = _fd_links(pid)
    vm_fds = sorted(fd for fd, link in links.items() if link == _VM_LINK)
    vcpus = len({link for link in links.values() if link.startswith(_VCPU_LINK)})
    return VmmProcess(pid, start_time(pid), _program(pid), tuple(vm_fds), vcpus)


def choose_vm(process: VmmProcess, fd: int | None) -> int:
    """The VM's fd: `fd` where it is one, or the only one that there is.

    Raises NotAVmmError, SeveralVmsError, SourceError (that fd is no VM).
    """
    pid, fds = process.pid, process.vm_fds
    listed = ", ".join(map(str, fds))
    if not fds:
        raise NotAVmmError(
            f"process {pid} ({process.program}) has no KVM virtual machine",
            hint="give the PID of the VMM itself, not of a shell or a wrapper around it",
            pid=pid,
        )
    if fd is not None and fd not in fds:
        raise SourceError(f"fd {fd} of process {pid} is no VM; its VMs are {listed}", pid=pid)
    if fd is None and len(fds) > 1:
        raise SeveralVmsError(
            f"process {pid} ({process.program}) has several VMs: fds {listed}",
            hint=f"name one: kvm:{pid}:{fds[0]}",
            pid=pid,
            fds=list(fds),
        )
    return fds[0] if fd is None else fd


def is_vm(pid: int, fd: int) -> bool:
    """Whether that file descriptor of the process (or thread) is a VM."""
    try:
        return os.readlink(f"/proc/{pid}/fd/{fd}") == _VM_LINK  # noqa: PTH115 - no Path wanted
    except OSError:
        return False


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the PID, its identity."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise _no_process(pid) from None
    return int(stat.rpartition(")")[2].split()[19])


def vcpu_threads(pid: int) -> frozenset[int]:
    """The threads that sit in KVM_RUN now, as far as /proc tells."""
    found = set()
    for task in _tasks(pid):
        try:
            call = (task / "syscall").read_text().split()
        except OSError:
            continue
        # "29 0xFD 0xae80 ...": ioctl is 29 on arm64. A thread that runs shows "running".
        if len(call) > 2 and call[0] == "29" and int(call[2], 16) == uapi.KVM_RUN:
            found.add(int(task.name))
    return frozenset(found)


def command_line(pid: int) -> list[str]:
    """The process's arguments; empty where they cannot be read."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def _fd_links(pid: int) -> dict[int, str]:
    links = {}
    try:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links[int(path.name)] = os.readlink(path)  # noqa: PTH115 - no Path wanted
            except FileNotFoundError:
                continue  # closed meanwhile
    except (FileNotFoundError, ProcessLookupError):
        raise _no_process(pid) from None
    except PermissionError:
        raise PermissionRefusedError(
            f"the file descriptors of process {pid} cannot be read",
            hint="run as root (CAP_SYS_PTRACE), or as the user that runs the VMM",
            pid=pid,
        ) from None
    return links


def _check_is_process(pid: int) -> None:
    # /proc also answers to the ids of threads, which it does not list.
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise _no_process(pid) from None
    group = next(line.split()[1] for line in status.splitlines() if line.startswith("Tgid:"))
    if int(group) != pid:
        raise NotAVmmError(
            f"{pid} is a thread of process {group}, not a process", hint=f"kvm:{group}", pid=pid
        )


def _no_process(pid: int) -> NoSuchProcessError:
    return NoSuchProcessError(
        f"there is no process {pid}", hint="look for the VMM with: pgrep -a qemu", pid=pid
    )


def _program(pid: int) -> str:
    # The kernel cuts comm at 15 bytes; the executable's name needs the right to trace.
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    except OSError:
        pass
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
