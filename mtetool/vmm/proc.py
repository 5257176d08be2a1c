"""VMs as /proc shows them: which file descriptors of a process are VMs and vCPUs."""

from __future__ import annotations

import os
import pwd
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from mtetool import permission, procfs, uapi
from mtetool.errors import (
    NoSuchProcessError,
    NotAProcessError,
    NotAVmmError,
    PermissionRefusedError,
    SeveralVmsError,
    SourceError,
)

# These names come from virt/kvm/kvm_main.c.
_VM_LINK = "anon_inode:kvm-vm"
_VCPU_LINK = "anon_inode:kvm-vcpu:"
# include/linux/sched.h
_PF_KTHREAD = 0x0020_0000
_PF_IO_WORKER, _PF_USER_WORKER = 0x10, 0x4000  # the latter since Linux 6.4

# A QEMU with hundreds of devices has some 100 KiB. A process can declare any of its memory to be
# its arguments (PR_SET_MM).
_COMMAND_LINE_BYTES = 1 << 20

# How often, and how far apart, to look at a thread that is never seen waiting.
_LOOKS = 6
_LOOK_SECONDS = 0.005


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
    try:
        check_is_process(pid, "kvm")
    except NotAProcessError as error:
        message = f"{error.message}: it has no KVM virtual machine"
        raise NotAVmmError(message, hint=error.hint, **error.details) from error
    links = _fd_links(pid)
    vm_fds = sorted(fd for fd, link in links.items() if link == _VM_LINK)
    vcpus = len({link for link in links.values() if link.startswith(_VCPU_LINK)})
    return VmmProcess(pid, start_time(pid), program(pid), tuple(vm_fds), vcpus)


def check_is_process(pid: int, prefix: str) -> None:
    """Check that `pid` is a user-space process; hints name others with `prefix`.

    Raises NoSuchProcessError (also for one that has ended), NotAProcessError.
    """
    status = procfs.status_of(pid)
    if not status:
        raise no_process(pid)
    # /proc also accepts the ids of threads, which it does not list.
    group = int(status["Tgid"])
    if group != pid:
        raise NotAProcessError(
            f"{pid} is a thread of process {group}, not a process",
            hint=f"{prefix}:{group}",
            pid=pid,
        )
    if (ended := permission.zombie(pid, status)) is not None:
        raise ended
    if _is_kernel_thread(pid):
        raise NotAProcessError(
            f"process {pid} ({status.get('Name', '?')}) is a kernel thread",
            hint="give the PID of a program; list the VMMs: mtetool list",
            pid=pid,
        )


def has_memory(pid: int, started: int) -> bool:
    """Whether the process that started then still exists, and is not about to be gone."""
    try:
        return start_time(pid) == started and bool(Path(f"/proc/{pid}/maps").read_bytes())
    except PermissionError:
        return True
    except (OSError, NoSuchProcessError):
        return False


def find_all() -> tuple[list[VmmProcess], list[PermissionRefusedError]]:
    """All processes that have a VM, by PID; and an error for each that could not be inspected."""
    found: list[VmmProcess] = []
    unseen: list[PermissionRefusedError] = []
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        try:
            process = find(int(path.name))
        except PermissionRefusedError as error:
            unseen.append(error)
        except (NoSuchProcessError, NotAVmmError):
            continue  # it ended meanwhile
        else:
            found += [process] if process.vm_fds else []
    return sorted(found, key=lambda process: process.pid), unseen


def owner(pid: int) -> str | None:
    """The user that the process runs as, by name if there is one; None if it is gone."""
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
    except OSError:
        return None
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def choose_vm(process: VmmProcess, fd: int | None) -> int:
    """The VM's fd: `fd` if it is a VM, or the only one that there is.

    Raises NotAVmmError, SeveralVmsError, SourceError (`fd` is not a VM).
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
        raise SourceError(f"fd {fd} of process {pid} is not a VM; its VMs are {listed}", pid=pid)
    if fd is None and len(fds) > 1:
        raise SeveralVmsError(
            f"process {pid} ({process.program}) has several VMs: fds {listed}",
            hint=f"name one: kvm:{pid}:{fds[0]}",
            pid=pid,
            fds=list(fds),
        )
    return fds[0] if fd is None else fd


def check_same(process: VmmProcess, fd: int) -> None:
    """Check that the PID and the fd are still what they were. Raises NoSuchProcessError."""
    pid = process.pid
    if start_time(pid) != process.start_time:
        raise NoSuchProcessError(
            f"process {pid} ended, and another one has its PID now",
            hint="find the VMM again: mtetool list; nothing was touched",
            pid=pid,
        )
    if _fd_links(pid).get(fd) != _VM_LINK:
        raise NoSuchProcessError(
            f"process {pid} closed its VM (fd {fd}) in the meantime", hint="check the VMM", pid=pid
        )


def vm_fds(pid: int) -> frozenset[int]:
    """The file descriptors of the process that are VMs; none if they cannot be read."""
    found = []
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - many, and again and again
            with suppress(OSError):
                if os.readlink(f"/proc/{pid}/fd/{name}") == _VM_LINK:  # noqa: PTH115
                    found.append(int(name))
    return frozenset(found)


def vcpu_fds(pid: int) -> dict[int, int]:
    """The file descriptors of the process's vCPUs, by the number of each vCPU.

    Raises NoSuchProcessError, PermissionRefusedError.
    """
    found: dict[int, int] = {}
    for fd, link in sorted(_fd_links(pid).items()):
        number = link.removeprefix(_VCPU_LINK)
        if number != link and number.isdecimal():
            found.setdefault(int(number), fd)
    return dict(sorted(found.items()))


def start_time(pid: int) -> int:
    """When the process started, in clock ticks since boot: with the PID, its identity."""
    try:
        return int(procfs.stat_of(f"/proc/{pid}")[19])
    except (FileNotFoundError, ProcessLookupError):
        raise no_process(pid) from None


class Activity(Enum):
    """What a thread is doing, as /proc shows it."""

    VCPU = "in KVM_RUN"
    BLOCKED = "waits in another call"
    RUNNING = "runs: in its own code, in the kernel or in the guest"


def activities(pid: int) -> dict[int, Activity]:
    """What each living thread is doing now. Empty if that is unknown.

    Threads that the kernel made in the process (io_uring: iou-sqp-PID, iou-wrk-PID; vhost-PID) are
    left out: they have no code of their own to stop in, and their registers mean nothing.
    """
    found = {}
    kernels = ~_flags(Path(f"/proc/{pid}")) & (_PF_IO_WORKER | _PF_USER_WORKER)
    for task in _tasks(pid):
        with suppress(OSError, IndexError):
            fields = procfs.stat_of(task)
            # A flag of the main thread comes from its parent, with another meaning (Linux 5.16).
            if fields[0] in "ZX" or int(fields[6]) & kernels:
                continue
            found[int(task.name)] = _activity((task / "syscall").read_text().split())
    return found


def _activity(call: list[str]) -> Activity:
    # "29 0xFD 0xae80 ...": ioctl is 29 on arm64. "-1 ..." is a thread stopped outside calls.
    if call[0] == "running":
        return Activity.RUNNING
    in_kvm_run = len(call) > 2 and call[0] == "29" and int(call[2], 16) == uapi.KVM_RUN
    return Activity.VCPU if in_kvm_run else Activity.BLOCKED


def is_stopped(pid: int) -> bool | None:
    """Whether all living threads are stopped by a signal; None if it is gone."""
    states = set()
    for task in _tasks(pid):
        with suppress(OSError, IndexError):
            states.add(procfs.stat_of(task)[0])
    states -= {"Z", "X"}
    return states == {"T"} if states else None


def runs_guest(pid: int) -> bool:
    """Whether any vCPU runs, as far as that can be seen.

    A thread in KVM_RUN proves it, halted or not: there is none while the VMM has paused its guest.
    A thread other than the main one that never waits is taken for a vCPU, too.
    """
    restless: set[int] | None = None
    for _ in range(_LOOKS):
        seen = activities(pid)
        if Activity.VCPU in seen.values():
            return True
        runs = {tid for tid, was in seen.items() if was is Activity.RUNNING and tid != pid}
        restless = runs if restless is None else restless & runs
        time.sleep(_LOOK_SECONDS)
    return bool(restless)


def threads_to_borrow(pid: int) -> list[int]:
    """The process's threads, in the order in which borrowing them disturbs the guest least.

    The main thread if it waits in a call, as a main loop does; others that wait; then those that
    run all the time and so may be vCPUs; last the vCPUs.
    """
    seen: dict[int, set[Activity]] = {}
    for _ in range(_LOOKS):
        for tid, activity in activities(pid).items():
            seen.setdefault(tid, set()).add(activity)
        if seen.get(pid) == {Activity.BLOCKED}:
            break
        time.sleep(_LOOK_SECONDS)

    def rank(tid: int) -> tuple[int, bool, int]:
        was = seen[tid]
        kind = 2 if Activity.VCPU in was else 0 if Activity.BLOCKED in was else 1
        return kind, tid != pid, tid

    return sorted(seen, key=rank)


def command_line(pid: int) -> list[str]:
    """The process's arguments; empty if they cannot be read, or are absurdly long."""
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as file:
            raw = file.read(_COMMAND_LINE_BYTES + 1)
    except OSError:
        return []
    if len(raw) > _COMMAND_LINE_BYTES:
        return []
    return [os.fsdecode(word) for word in raw.split(b"\0")[:-1]]


def inner_tids(pid: int) -> frozenset[int]:
    """The ids of the process's threads as it sees them itself, in its own PID namespace."""
    statuses = (procfs.status_of(task.name, task.parent) for task in _tasks(pid))
    ids = (status.get("NSpid", "").split() for status in statuses)
    return frozenset(int(each[-1]) for each in ids if each and each[-1].isdecimal())


def uid_of(pid: int) -> int | None:
    """The user that the process runs as; None if it is gone."""
    uids = procfs.status_of(pid).get("Uid", "").split()
    return int(uids[1]) if len(uids) > 1 and uids[1].isdecimal() else None


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
        raise no_process(pid) from None
    except PermissionError as error:
        asked = f"looking at the file descriptors of process {pid}"
        raise permission.refused(pid, asked, error) from error
    return links


def _is_kernel_thread(pid: int) -> bool:
    return bool(_flags(Path(f"/proc/{pid}")) & _PF_KTHREAD)


def _flags(task: Path) -> int:
    """The PF_ flags of a task; 0 if it is gone."""
    try:
        return int(procfs.stat_of(task)[6])
    except OSError:
        return 0


def no_process(pid: int) -> NoSuchProcessError:
    """The error for a process that does not exist."""
    return NoSuchProcessError(
        f"there is no process {pid}", hint="find the VMM: mtetool list", pid=pid
    )


def program(pid: int) -> str:
    """The name of the program that the process executes; `?` if it cannot be read."""
    # The kernel cuts comm at 15 bytes; reading the executable's name needs the right to trace.
    try:
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    except OSError:
        pass
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "?"
