"""MTE for a VM that is about to be made: what the companion of a starting VMM does.

KVM enables MTE before the first vCPU only (arch/arm64/kvm/arm.c, kvm_vm_ioctl_enable_cap). The
thread that made the VM stands right behind KVM_CREATE_VM here, and nobody else knows the VM's
file descriptor yet.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

from mtetool import uapi
from mtetool.attach import seccomp
from mtetool.attach.borrow import BorrowedThread
from mtetool.attach.follow import Follower, Returned, process_of
from mtetool.errors import (
    AttachRefusedError,
    GuestLostError,
    MtetoolError,
    MteUnsupportedError,
    NotAVmmError,
    errno_name,
)
from mtetool.vmm import proc

# include/uapi/asm-generic/unistd.h
_NR_IOCTL, _NR_CLOSE, _NR_RT_SIGRETURN = 29, 57, 139
# One thread stands still meanwhile. If it takes longer we end, which is safe.
_PATIENCE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Wish:
    """Which VM is to have MTE, counted from 1 in the order in which they are made.

    `seconds` is how long it is waited for; `required` that there shall be no such VM without
    MTE; `every_call` as in `Follower`. `tell` is given what went wrong, in the companion.
    """

    vm: int
    seconds: float
    required: bool
    every_call: bool
    tell: Callable[[MtetoolError], None]


class _TooLongError(Exception):
    """No such VM was made in the time that was given."""


def attach(pid: int, wish: Wish) -> Callable[[], None]:
    """Attach to a process that is about to become the VMM; what is to be done then.

    Raises OSError where it cannot be attached to.
    """
    follower = Follower(pid, uapi.KVM_CREATE_VM, every_call=wish.every_call)
    return lambda: _work(follower, wish)


def _work(follower: Follower, wish: Wish) -> None:
    try:
        found = _wait_for_vm(follower, wish)
        follower.disarm()
        if found is not None:
            _enable(found, wish)
    except _TooLongError:
        follower.disarm()
        wish.tell(
            NotAVmmError(
                f"no VM{f' {wish.vm}' if wish.vm > 1 else ''} was made within {wish.seconds:g}"
                " seconds: none gets MTE",
                hint="more time with --wait; --every-call if there is one by now",
            )
        )
    except (GuestLostError, ProcessLookupError):
        pass  # the VMM ended; what it has to say about that, it said itself
    except MtetoolError as error:
        wish.tell(error)
    except OSError as error:
        reason = error.strerror or str(error)
        wish.tell(AttachRefusedError(f"the start cannot be watched further: {reason}"))


def _wait_for_vm(follower: Follower, wish: Wish) -> Returned | None:
    """The thread that has just made the VM; None when all that was followed has ended."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, wish.seconds)
    count = 0
    while (found := follower.next()) is not None:
        count += proc.is_vm(found.tracee.tid, found.result)
        if count == wish.vm:
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    return found


def _too_long(number: int, frame: FrameType | None) -> None:
    raise _TooLongError


def _enable(found: Returned, wish: Wish) -> None:
    """Enable MTE for the VM that the thread has just made; it runs on behind its call.

    Raises AttachRefusedError, MteUnsupportedError; where MTE is required, the call has failed
    with EOPNOTSUPP then.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_PATIENCE_SECONDS)
    tracee = found.tracee
    try:
        thread = BorrowedThread(process_of(tracee.tid), tracee.tid, (), held=tracee)
        with thread:
            error = _try(thread, found.result)
            if error is not None and wish.required:
                thread.answer(-errno.EOPNOTSUPP)
    except AttachRefusedError as refused:
        error = refused
        if wish.required:
            tracee.set_registers(tracee.registers().returning(-errno.EOPNOTSUPP))
    if error is not None:
        raise _failure(error, wish)


def _try(thread: BorrowedThread, fd: int) -> MtetoolError | None:
    """Enable MTE for the VM `fd`; why that failed, with the VM closed where it can be."""
    calls = (
        seccomp.Call("ioctl", _NR_IOCTL, (fd, uapi.KVM_ENABLE_CAP)),
        seccomp.Call("close", _NR_CLOSE, (fd,)),
        seccomp.Call("rt_sigreturn", _NR_RT_SIGRETURN),
    )
    try:
        for call in calls:
            seccomp.allow(thread.filters, thread.pid, call)
    except AttachRefusedError as error:
        return error
    argument = thread.leave_argument(uapi.enable_cap(uapi.KVM_CAP_ARM_MTE))
    result = thread.syscall(_NR_IOCTL, fd, uapi.KVM_ENABLE_CAP, argument)
    if result == 0:
        return None
    return MteUnsupportedError(
        f"the kernel refused to enable MTE for the new VM: {errno_name(-result)}",
        hint="look at what this host can do: mtetool probe",
        errno=errno_name(-result),
    )


def _failure(error: MtetoolError, wish: Wish) -> MtetoolError:
    """What is told: the error, and what that means for the VMM."""
    outcome = "so it gets no VM" if wish.required else "the VM goes on without MTE"
    message = f"{error.message}: {outcome}"
    hint = error.hint
    if wish.required:
        hint = f"{hint}; or --no-require" if hint else "--no-require starts it without MTE"
    return type(error)(message, hint=hint, **error.details)
