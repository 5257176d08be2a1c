"""The process that runs a domain of libvirt, which has no call that would name it.

libvirt starts QEMU with the domain's UUID on the command line. A command line is a stranger's word,
so a process is believed only with proof from libvirt: the user that it runs as, its threads, or
both. It must be the only such process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mtetool.errors import (
    DomainProcessError,
    NoSuchProcessError,
    NotAVmmError,
    PermissionRefusedError,
)
from mtetool.vmm import proc, qemu_options

_HINT = "check what runs it: ps -fC qemu-system-aarch64; or name it yourself: kvm:PID"
_MOST_TOLD = 8


@dataclass(frozen=True, slots=True)
class Proof:
    """What libvirt says of a domain's process: its user's id, and threads; None if unknown."""

    uid: int | None
    tids: frozenset[int] | None

    def against(self, pid: int) -> str | None:
        """Why this cannot be the process; None if it can."""
        if self.uid is None and not self.tids:
            return "is not known to libvirt by its user or its threads"
        uid = proc.uid_of(pid)
        if self.uid is not None and uid != self.uid:
            return f"runs as user {uid}, and the domain's runs as {self.uid}"
        if self.tids and not self.tids <= proc.inner_tids(pid):
            return "does not have the vCPU threads that QEMU names"
        return None


def find(uuid: str, proof: Proof) -> proc.VmmProcess:
    """The process that runs the domain. Raises DomainProcessError, PermissionRefusedError."""
    fitting: list[proc.VmmProcess] = []
    against: list[str] = []
    refused: PermissionRefusedError | None = None
    for pid in _pids():
        if uuid_of(pid) != uuid:
            continue
        try:
            found = _examined(pid, uuid, proof)
        except PermissionRefusedError as error:
            refused = error
        except (NoSuchProcessError, NotAVmmError):
            continue  # it ended meanwhile
        else:
            if isinstance(found, str):
                against.append(f"process {pid} {found}")
            else:
                fitting.append(found)
    if refused is not None:
        raise refused
    if len(fitting) != 1:
        raise _unproven(uuid, fitting, against)
    return fitting[0]


def pids_of(name: str) -> list[int]:
    """All processes that say they run a domain, by its name or UUID; nothing is proven."""
    named = ((pid, qemu_options.domain(proc.command_line(pid))) for pid in _pids())
    return [pid for pid, its in named if its and (name == its.name or name.lower() == its.uuid)]


def uuid_of(pid: int) -> str | None:
    """The UUID of the domain that a process says it runs."""
    domain = qemu_options.domain(proc.command_line(pid))
    return domain.uuid if domain else None


def _examined(pid: int, uuid: str, proof: Proof) -> proc.VmmProcess | str:
    """The process, or why it is not the one."""
    # A stranger's process, which we may not examine, must not make it our error.
    if objection := proof.against(pid):
        return objection
    process = proc.find(pid)
    if not process.vm_fds:
        return "has no KVM virtual machine"
    # The PID may have changed hands before its start time was read.
    if uuid_of(pid) != uuid or (objection := proof.against(pid)):
        return objection or "is another one by now"
    if proc.start_time(pid) != process.start_time:
        return "is another one by now"
    return process


def _unproven(uuid: str, fitting: list[proc.VmmProcess], against: list[str]) -> DomainProcessError:
    if fitting:
        pids = ", ".join(str(process.pid) for process in fitting[:_MOST_TOLD])
        message = f"several processes fit the domain {uuid}, and only one can run it: {pids}"
    elif against:
        told = "; ".join(against[:_MOST_TOLD])
        message = f"no process is proven to run the domain {uuid}: {told}"
    else:
        message = f"no process of this host has the domain's -uuid {uuid} on its command line"
    return DomainProcessError(message, hint=_HINT)


def _pids() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal())
