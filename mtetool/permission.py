"""Who may trace whom: what this process may do, and why the kernel refused it a process.

The kernel answers EPERM to everything (`__ptrace_may_access` in kernel/ptrace.c, Yama in
security/yama/yama_lsm.c). Most of what it checks can be seen in /proc, and is named here.
"""

from __future__ import annotations

import errno
import os
import pwd
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mtetool.errors import (
    BusyError,
    NoSuchProcessError,
    PermissionRefusedError,
    errno_name,
)
from mtetool.procfs import status_of

# include/uapi/linux/capability.h
_CAP_SYS_PTRACE = 19
# The number of the first user namespace: PROC_USER_INIT_INO, include/linux/proc_ns.h.
_FIRST_USER_NAMESPACE = "user:[4026531837]"

_Reason = Literal[
    "other-user",
    "ptrace-scope",
    "capabilities",
    "not-dumpable",
    "user-namespace",
    "seccomp",
    "unknown",
]
REASONS: tuple[str, ...] = get_args(_Reason)
"""All values of an error's `reason`; stable."""


@dataclass(frozen=True, slots=True)
class Rights:
    """What this process may do to others; None where that is unknown.

    `ptrace_scope` is None where the kernel has no Yama. `seccomp` is the mode of this process:
    0 none, 1 strict, 2 a filter. `first_user_namespace` is false in a container's namespace.
    """

    cap_sys_ptrace: bool | None
    ptrace_scope: int | None
    seccomp: int | None
    first_user_namespace: bool | None


def own_rights(proc: Path = Path("/proc")) -> Rights:
    """Return the rights of this process. Raises nothing."""
    status = status_of("self", proc)
    capabilities = _number(status.get("CapEff"), 16)
    namespace = None
    with suppress(OSError):
        namespace = str((proc / "self/ns/user").readlink()) == _FIRST_USER_NAMESPACE
    scope = None
    with suppress(OSError):
        scope = _number((proc / "sys/kernel/yama/ptrace_scope").read_text(errors="replace"))
    return Rights(
        cap_sys_ptrace=None if capabilities is None else bool(capabilities >> _CAP_SYS_PTRACE & 1),
        ptrace_scope=scope,
        seccomp=_number(status.get("Seccomp")),
        first_user_namespace=namespace,
    )


def refusal(pid: int, error: OSError) -> NoSuchProcessError | PermissionRefusedError | BusyError:
    """Return the error for a failed attach, with its cause as far as that can be seen."""
    status = status_of(pid)
    if error.errno == errno.ESRCH or not status:
        return NoSuchProcessError(f"process {pid} is gone", pid=pid)
    if (ended := zombie(pid, status)) is not None:
        return ended
    tracer = _tracer_of(pid)
    if tracer:
        return BusyError(
            f"process {pid} is already traced by {_named(tracer)}, and a thread can have only one"
            " tracer",
            hint="let the debugger (or the other mtetool) finish first",
            pid=pid,
            tracer=tracer,
        )
    return refused(pid, f"attaching to {_named(pid)}", error)


def refused(pid: int, asked: str, error: OSError) -> PermissionRefusedError:
    """Return the error for something `asked` of a process that the kernel refused."""
    cause = _cause(own_rights(), pid, status_of(pid))
    return PermissionRefusedError(
        f"{asked} was refused ({errno_name(error.errno or 0)}): {cause.text}",
        hint=cause.hint,
        pid=pid,
        errno=errno_name(error.errno or 0),
        reason=cause.id,
    )


def zombie(pid: int, status: dict[str, str]) -> NoSuchProcessError | None:
    """Return the error for a process that has ended but is not reaped yet, otherwise None."""
    if not status.get("State", "").startswith(("Z", "X")) or _has_threads_left(pid):
        return None
    parent = _number(status.get("PPid")) or 0
    return NoSuchProcessError(
        f"process {pid} ({status.get('Name', '?')}) has ended; it stays in the list only until its"
        f" parent, {_named(parent)}, reaps it",
        hint="start it again: its memory is gone",
        pid=pid,
    )


def thread_has_ended(pid: int, tid: int) -> bool:
    """Return whether a thread of the process is gone, or about to be."""
    state = status_of(f"{pid}/task/{tid}").get("State", "X")
    return state.startswith(("Z", "X"))


@dataclass(frozen=True, slots=True)
class _Cause:
    """Why the kernel refused; `text` follows a colon."""

    id: _Reason
    text: str
    hint: str


_AS_ROOT = "run mtetool as root (with CAP_SYS_PTRACE)"


def _cause(rights: Rights, pid: int, status: dict[str, str]) -> _Cause:
    """Return why the kernel refused, checking the most certain causes first."""
    if rights.ptrace_scope == 3:
        return _Cause(
            "ptrace-scope",
            "kernel.yama.ptrace_scope is 3, so no process may trace another on this host",
            "reboot without that setting: nothing else changes it",
        )
    if rights.cap_sys_ptrace:
        return _cause_with_capability(rights)
    user = _user(status)
    if user is not None and user != os.getuid():
        return _Cause(
            "other-user",
            f"it runs as {_user_name(user)} and mtetool as {_user_name(os.getuid())}, without"
            " CAP_SYS_PTRACE",
            f"{_AS_ROOT}, or as {_user_name(user)}",
        )
    if rights.ptrace_scope == 2:
        return _Cause(
            "ptrace-scope",
            "kernel.yama.ptrace_scope is 2, which demands CAP_SYS_PTRACE even of the same user",
            _AS_ROOT,
        )
    if user is not None and _is_protected(pid, user):
        return _Cause(
            "not-dumpable",
            "it is protected against its own user (not dumpable: it changed its user or"
            " capabilities, asked for this, or its program is not readable)",
            _AS_ROOT,
        )
    if _holds_more(status):
        return _Cause(
            "capabilities",
            "it holds capabilities that mtetool does not have, as in a container",
            f"{_AS_ROOT}; in a container: --cap-add SYS_PTRACE, or run it on the host",
        )
    if rights.ptrace_scope == 1:
        return _Cause(
            "ptrace-scope",
            "kernel.yama.ptrace_scope is 1, which lets a program trace only processes that it"
            " has started itself",
            f"{_AS_ROOT}, or set kernel.yama.ptrace_scope to 0",
        )
    return _cause_unseen(rights)


def _cause_with_capability(rights: Rights) -> _Cause:
    if rights.first_user_namespace is False:
        return _Cause(
            "user-namespace",
            "mtetool runs in a user namespace (a container, unshare), and its rights do not reach"
            " processes outside it",
            "run mtetool on the host itself, or in the VMM's own container",
        )
    return _cause_unseen(rights)


def _cause_unseen(rights: Rights) -> _Cause:
    if rights.seccomp:
        return _Cause(
            "seccomp",
            "mtetool itself runs under a seccomp filter, which may deny ptrace",
            "run mtetool on the host itself, or in a container with --cap-add SYS_PTRACE",
        )
    return _Cause(
        "unknown",
        "none of the usual causes can be seen; a security module (SELinux, AppArmor) may forbid it",
        "look in the kernel's log: dmesg, ausearch -m avc",
    )


def _user(status: dict[str, str]) -> int | None:
    """The user a process runs as, as seen from here."""
    words = status.get("Uid", "").split()
    return _number(words[1]) if len(words) > 1 else None


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def _is_protected(pid: int, user: int) -> bool:
    # The files in /proc/PID of a process that is not dumpable belong to root.
    try:
        return Path(f"/proc/{pid}/fd").stat().st_uid != user
    except OSError:
        return False


def _holds_more(status: dict[str, str]) -> bool:
    theirs = _number(status.get("CapPrm"), 16)
    ours = _number(status_of("self").get("CapEff"), 16)
    return theirs is not None and ours is not None and bool(theirs & ~ours)


def _has_threads_left(pid: int) -> bool:
    # A main thread that ended alone looks like a zombie too.
    try:
        return len(list(Path(f"/proc/{pid}/task").iterdir())) > 1
    except OSError:
        return False


def _tracer_of(pid: int) -> int:
    """Return the tracer of the process or of one of its threads; 0 where none is seen."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return 0
    tracers = (_number(status_of(task.name, task.parent).get("TracerPid")) for task in tasks)
    return next((tracer for tracer in tracers if tracer), 0)


def _named(pid: int) -> str:
    name = status_of(pid).get("Name")
    return f"process {pid} ({name})" if name else f"process {pid}"


def _number(text: str | None, base: int = 10) -> int | None:
    try:
        return int(text, base) if text is not None else None
    except ValueError:
        return None
