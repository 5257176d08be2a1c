"""MTE for a VM that is about to be made: what the companion of a starting VMM does.

KVM enables MTE only before the first vCPU (arch/arm64/kvm/arm.c, kvm_vm_ioctl_enable_cap). Here the
thread that made the VM is stopped right after KVM_CREATE_VM, when no other thread knows the VM's
file descriptor yet. If the alarm came late, it is stopped somewhere after that.

If MTE is required, a VM that cannot have it is closed, and KVM_CREATE_VM fails with EOPNOTSUPP. If
that is impossible too, the VMM is killed. Nothing less keeps the promise: a VM whose descriptor is
closed later lives on in its vCPUs, the number may be another file's by then, and a call that fails
with the VM left open has leaked it. No work is lost, because the guest has not run.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from mtetool import uapi
from mtetool.attach import seccomp
from mtetool.attach.borrow import BorrowedThread
from mtetool.attach.follow import Follower, Made, TooLongError
from mtetool.attach.stderr import stderr_of, write_briefly
from mtetool.errors import (
    AttachRefusedError,
    BusyError,
    MtetoolError,
    MteUnsupportedError,
    NotAVmmError,
    errno_name,
)
from mtetool.vmm import proc

# include/uapi/asm-generic/unistd.h
_NR_IOCTL, _NR_CLOSE, _NR_RT_SIGRETURN = 29, 57, 139
# One thread is stopped meanwhile. If it takes longer we exit, which is safe.
_PATIENCE_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Wish:
    """Which VM should get MTE, counted from 1 in the order in which they are made.

    `seconds` is how long to wait for it; `required` means that there must be no such VM without
    MTE; `every_call` is that of `Follower`. `text` formats an error for the report.
    """

    vm: int
    seconds: float
    required: bool
    every_call: bool
    text: Callable[[MtetoolError], str]
    user: int | None = None
    write: Callable[[int, bytes], None] = write_briefly


def attach(pid: int, wish: Wish) -> Callable[[], bool]:
    """Attach to a process that is about to become the VMM; return what to do then.

    That returns whether a VM has MTE now. Raises OSError if it cannot attach.
    """
    follower = Follower(
        pid, uapi.KVM_CREATE_VM, proc.vm_fds, every_call=wish.every_call, user=wish.user
    )
    return lambda: _work(follower, wish)


def _work(follower: Follower, wish: Wish) -> bool:
    try:
        found = _wait_for_vm(follower, wish)
        follower.disarm()
    except TooLongError:
        with stderr_of(follower.processes) as stderr:
            _write(stderr, wish, _none_in_time(wish, unseen=follower.unseen()))
    except BaseException as error:  # noqa: BLE001 - whatever it was, keep the promise
        _fail(follower.processes, wish, _told(error))
    else:
        return found is not None and _give_mte(*found, wish)
    return False


def _wait_for_vm(follower: Follower, wish: Wish) -> tuple[Made, int] | None:
    """The thread and the VM that it has just made; None if all followed processes have ended."""
    follower.give_up_after(wish.seconds)
    count = 0
    while (made := follower.next()) is not None:
        for fd in made.fds:
            count += 1
            if count == wish.vm:
                signal.setitimer(signal.ITIMER_REAL, 0)
                return made, fd
    return None


def _give_mte(made: Made, fd: int, wish: Wish) -> bool:
    """Enable MTE for the VM `fd`; if that fails but is required, make sure there is no VM."""
    error: MtetoolError | None

    def stuck(number: int, frame: FrameType | None) -> None:
        message = f"process {made.process} has not answered for {_PATIENCE_SECONDS} seconds"
        _fail((made.process,), wish, BusyError(message))
        os._exit(0)  # this detaches from it

    signal.signal(signal.SIGALRM, stuck)
    signal.alarm(_PATIENCE_SECONDS)
    try:
        with _borrowed(made) as (thread, at_return):
            error, closed = _decide(thread, fd, closes=wish.required and at_return)
            # While the thread is still stopped: it may be about to be killed.
            if error is not None:
                _fail((made.process,), wish, error, closed=closed)
    except BaseException as other:  # noqa: BLE001 - as above
        error = _told(other)
        _fail((made.process,), wish, error)
    signal.alarm(0)
    return error is None


@contextmanager
def _borrowed(made: Made) -> Iterator[tuple[BorrowedThread, bool]]:
    """Borrow the thread; yield it, and whether it resumes right after the call that made the VM."""
    tracee = made.tracee
    before = tracee.registers()
    tracee.to_event_stop(made.signal)
    # A signal that came first has taken the thread into its handler.
    at_return = made.at_return and tracee.registers() == before
    with BorrowedThread(made.process, tracee.tid, (), held=tracee) as thread:
        yield thread, at_return


def _decide(thread: BorrowedThread, fd: int, *, closes: bool) -> tuple[MtetoolError | None, bool]:
    """Enable MTE; return why that failed, and whether the VM was closed so its call fails."""
    error: MtetoolError | None
    try:
        error = _try(thread, fd)
    except BaseException as other:  # noqa: BLE001 - as above
        error = _told(other)
    closed = False
    if error is not None and closes:
        with suppress(Exception):
            closed = _close(thread, fd)
    return error, closed


def _try(thread: BorrowedThread, fd: int) -> MtetoolError | None:
    """Enable MTE for the VM `fd`; return why that failed."""
    call = seccomp.Call("ioctl", _NR_IOCTL, (fd, uapi.KVM_ENABLE_CAP))
    if (refused := _refused(thread, call)) is not None:
        return refused
    argument = thread.leave_argument(uapi.enable_cap(uapi.KVM_CAP_ARM_MTE))
    result = thread.syscall(_NR_IOCTL, fd, uapi.KVM_ENABLE_CAP, argument)
    if result == 0:
        return None
    return MteUnsupportedError(
        f"the kernel refused to enable MTE for the new VM: {errno_name(-result)}",
        hint="check what this host can do: mtetool probe",
        errno=errno_name(-result),
    )


def _close(thread: BorrowedThread, fd: int) -> bool:
    """Close the VM, and make the call that made it fail; return False if that is impossible."""
    if _refused(thread, seccomp.Call("close", _NR_CLOSE, (fd,))) is not None:
        return False
    if thread.syscall(_NR_CLOSE, fd) != 0:
        return False
    thread.answer(-errno.EOPNOTSUPP)
    return True


def _refused(thread: BorrowedThread, call: seccomp.Call) -> AttachRefusedError | None:
    """Why the thread's filters forbid the call or the return from it; None if they do not."""
    try:
        seccomp.allow(thread.filters, thread.pid, call)
        back = seccomp.Call("rt_sigreturn", _NR_RT_SIGRETURN)
        seccomp.allow(thread.filters, thread.pid, back)
    except AttachRefusedError as error:
        return error
    return None


def _fail(
    processes: tuple[int, ...], wish: Wish, error: MtetoolError, *, closed: bool = False
) -> None:
    """Report the error and its outcome; kill if MTE is required and the VM was not closed.

    The processes are traced: a process that waits for their end sees it only after the report.
    """
    if not wish.required:
        outcome = "so the VMM continues without MTE"
    else:
        outcome = "so the VMM gets no VM" if closed else "so mtetool killed the VMM"
    hint = error.hint
    if wish.required:
        hint = f"{hint}; or --no-require" if hint else "start it without MTE: --no-require"
    with stderr_of(processes) as stderr:
        if wish.required and not closed:
            for pid in processes:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        message = f"{error.message}, {outcome}"
        _write(stderr, wish, type(error)(message, hint=hint, **error.details))


def _write(stderr: int | None, wish: Wish, error: MtetoolError) -> None:
    if stderr is not None:
        wish.write(stderr, wish.text(error).encode(errors="replace"))


def _told(error: BaseException) -> MtetoolError:
    """Turn any error into one that can be reported."""
    if isinstance(error, MtetoolError):
        return error
    reason = error.strerror if isinstance(error, OSError) else None
    reason = reason or f"{type(error).__name__} {error}".strip()
    return AttachRefusedError(f"mtetool can no longer watch the start: {reason}")


def _none_in_time(wish: Wish, *, unseen: bool) -> MtetoolError:
    number = f" {wish.vm}" if wish.vm > 1 else ""
    if unseen:
        return NotAVmmError(
            f"no VM{number} was seen within {wish.seconds:g} seconds, but there is one by now,"
            " without MTE",
            hint="start it with --every-call",
        )
    return NotAVmmError(
        f"no VM{number} was made within {wish.seconds:g} seconds, so none gets MTE",
        hint="wait longer with --wait, or use --every-call if there is one by now",
    )
