"""Following a program and all that it starts, to the moment when one ioctl has returned.

Whatever the tracer does, it may end at any instant: the kernel lets go of all that was followed.
Stops are looked at without being collected (WNOWAIT): a signal whose stop was collected is
forgotten when the tracer dies before it passed the signal on.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass

from mtetool.attach import procfs
from mtetool.attach.alarm import SIGNAL, IoctlAlarm
from mtetool.attach.ptrace import (
    EVENT_EXEC,
    EVENT_STOP,
    FOLLOW,
    SYSCALL_ENTRY,
    SYSCALL_STOP,
    WALL,
    Tracee,
)

_NR_IOCTL = 29  # include/uapi/asm-generic/unistd.h
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)


@dataclass(frozen=True, slots=True)
class Returned:
    """A thread, stopped right behind the ioctl that is watched for, and its result."""

    tracee: Tracee
    result: int


class Follower:
    """Process `pid` (one thread, not stopped), its threads and descendants, until we end.

    Looks for ioctls with `request` that return above 0. A process's first thread gets an
    alarm; its other threads, and all threads with `every_call` or where there is no right to
    set alarms, are stopped at every call. (A new thread of the C library blocks all signals.)
    Raises OSError where `pid` cannot be traced.
    """

    def __init__(self, pid: int, request: int, *, every_call: bool) -> None:
        self._request = request
        self._every_call = every_call
        self._alarms: dict[int, IoctlAlarm] = {}
        self._calling: set[int] = set()
        self._held: Tracee | None = None
        Tracee.seize(pid, FOLLOW)

    def next(self) -> Returned | None:
        """Let all run on to the next such return; None when all that was followed has ended.

        The thread stays stopped until the next `next`, the others run meanwhile.
        """
        if self._held is not None:
            with suppress(ProcessLookupError):
                self._resume(self._held)
            self._held = None
        while True:
            try:
                tid, status = peek()
            except ChildProcessError:
                return None
            # One that is killed while it is stopped is gone for every request.
            with suppress(ProcessLookupError):
                if status is None:
                    self._forget(tid)
                elif (found := self._stopped(Tracee(tid), status)) is not None:
                    self._held = found.tracee
                    return found

    def disarm(self) -> None:
        """Remove all alarms, before a thread is let go: it would be sent the next one's signal."""
        for tid in list(self._alarms):
            self._forget_alarm(tid)

    def _stopped(self, tracee: Tracee, status: int) -> Returned | None:
        number, event = status & 0xFF, status >> 8
        deliver = 0
        if number == SYSCALL_STOP:
            found = self._at_call(tracee)
        elif event == EVENT_STOP and number in _STOPPING:
            os.waitpid(tracee.tid, WALL)
            tracee.listen()
            return None
        elif event:
            found = None
            if event in (EVENT_EXEC, EVENT_STOP):
                self._arm(tracee.tid, anew=event == EVENT_EXEC)
        elif self._is_alarm(tracee, number):
            found = self._at_alarm(tracee)
        else:
            found, deliver = None, number
        if found is None:
            self._resume(tracee, deliver)
        return found

    def _at_call(self, tracee: Tracee) -> Returned | None:
        kind, value, argument = tracee.syscall_info()
        if kind == SYSCALL_ENTRY:
            if value == _NR_IOCTL and argument & 0xFFFF_FFFF == self._request:
                self._calling.add(tracee.tid)
        elif tracee.tid in self._calling:
            self._calling.remove(tracee.tid)
            return Returned(tracee, value) if value > 0 else None
        return None

    def _is_alarm(self, tracee: Tracee, number: int) -> bool:
        alarm = self._alarms.get(tracee.tid)
        return number == SIGNAL and alarm is not None and alarm.sent(tracee.signal_info())

    def _at_alarm(self, tracee: Tracee) -> Returned | None:
        # A call changes no register but the one of its result.
        x = tracee.registers().x
        if x[8] == _NR_IOCTL and x[1] & 0xFFFF_FFFF == self._request:
            return Returned(tracee, x[0])
        return None

    def _arm(self, tid: int, *, anew: bool) -> None:
        """Set the alarm of a process; anew when it executes a program: its thread may be new."""
        if anew:
            self._forget_alarm(tid)
        if not self._every_call and tid not in self._alarms and _leads(tid):
            with suppress(OSError):
                self._alarms[tid] = IoctlAlarm(tid)

    def _resume(self, tracee: Tracee, signal_number: int = 0) -> None:
        if tracee.tid in self._alarms:
            tracee.cont(signal_number)
        else:
            tracee.cont_to_syscall(signal_number)

    def _forget(self, tid: int) -> None:
        os.waitpid(tid, WALL)
        self._forget_alarm(tid)
        self._calling.discard(tid)

    def _forget_alarm(self, tid: int) -> None:
        if tid in self._alarms:
            self._alarms.pop(tid).close()


def peek() -> tuple[int, int | None]:
    """Wait for a stop, and leave it uncollected; the thread, and its status (None: it ended).

    The status has the signal in its low 8 bits and the event above. Raises ChildProcessError
    when there is nothing to wait for.
    """
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOWAIT | WALL)
    assert found is not None  # only WNOHANG has nothing to tell
    stopped = found.si_code in (os.CLD_TRAPPED, os.CLD_STOPPED)
    return found.si_pid, found.si_status if stopped else None


def process_of(tid: int) -> int:
    """The process that the thread belongs to. Raises OSError where it is gone."""
    lines = procfs.lines(f"/proc/{tid}/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))


def _leads(tid: int) -> bool:
    try:
        return process_of(tid) == tid
    except OSError:
        return False
