"""Follow a program and all that it starts, to the moment when a VM has been made.

Whatever the tracer does, it may end at any instant: the kernel lets go of all that was followed.
Stops are looked at without being collected (WNOWAIT): a signal whose stop was collected is
forgotten when the tracer dies before it passed the signal on.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from mtetool import procfs
from mtetool.attach import memory
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
from mtetool.errors import AttachRefusedError

_NR_IOCTL = 29  # include/uapi/asm-generic/unistd.h
_SVC = bytes.fromhex("010000d4")
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)

Look = Callable[[int], frozenset[int]]


class TooLongError(Exception):
    """What was waited for did not come in the time that was given."""


@dataclass(frozen=True, slots=True)
class Made:
    """A stopped thread of `process`, in which the file descriptors `fds` are new.

    With `at_return` the thread stands right after the ioctl that made the one of them, before any
    instruction of its own. `signal` is what it is about to be given.
    """

    tracee: Tracee
    process: int
    fds: tuple[int, ...]
    at_return: bool
    signal: int = 0


class Follower:
    """Process `pid` (one thread, not stopped), its threads and descendants, until we end.

    Looks for file descriptors that ioctl `request` makes; `look` gives those that a process has.
    A process's first thread gets an alarm; its other threads, and all threads with `every_call`
    or where there is no right to set alarms, are stopped at every call. (A new thread of the C
    library blocks all signals.) An alarm may come late, or be blocked, so at each stop of a
    process with an alarm its file descriptors are compared with those of before.
    Raises OSError where `pid` cannot be traced.
    """

    def __init__(self, pid: int, request: int, look: Look, *, every_call: bool) -> None:
        self._request = request
        self._look = look
        self._every_call = every_call
        self._alarms: dict[int, IoctlAlarm] = {}
        self._blocking: set[int] = set()
        self._calling: set[int] = set()
        self._seen: dict[int, frozenset[int]] = {}
        self._process_of: dict[int, int] = {}
        self._held: Made | None = None
        self._waits = self._late = False
        Tracee.seize(pid, FOLLOW)
        self._process_of[pid] = pid

    @property
    def processes(self) -> tuple[int, ...]:
        """All that is followed and has not been seen to end, the oldest first."""
        return tuple(dict.fromkeys(self._process_of.values()))

    def give_up_after(self, seconds: float) -> None:
        """From then on, `next` raises TooLongError where it has to wait. Uses SIGALRM."""
        signal.signal(signal.SIGALRM, self._rang)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def next(self) -> Made | None:
        """Let all run on to the next file descriptor; None when all that was followed has ended.

        The thread stays stopped until the next `next`, the others run meanwhile. Raises
        TooLongError, with no stop in hand.
        """
        if self._held is not None:
            with suppress(ProcessLookupError):
                self._resume(self._held.tracee, self._held.signal)
            self._held = None
        while True:
            try:
                tid, status = self._wait()
            except ChildProcessError:
                return None
            # One that is killed while it is stopped is gone for every request.
            with suppress(ProcessLookupError):
                if status is None:
                    self._forget(tid)
                elif (found := self._stopped(Tracee(tid), status)) is not None:
                    self._held = found
                    return found

    def disarm(self) -> None:
        """Remove all alarms, before a thread is let go: it would be sent the next one's signal."""
        for tid in list(self._alarms):
            self._forget_alarm(tid)

    def unseen(self) -> bool:
        """Whether a process has such a file descriptor that no stop has shown."""
        return any(self._look(pid) - self._seen.get(pid, frozenset()) for pid in self.processes)

    def _wait(self) -> tuple[int, int | None]:
        # The alarm breaks the wait off, and nothing else: a stop that it came after waits there.
        self._waits = True
        try:
            if self._late:
                raise TooLongError
            return peek()
        finally:
            self._waits = False

    def _rang(self, number: int, frame: FrameType | None) -> None:
        self._late = True
        if self._waits:
            raise TooLongError

    def _stopped(self, tracee: Tracee, status: int) -> Made | None:
        number, event = status & 0xFF, status >> 8
        if tracee.tid not in self._process_of:
            self._process_of[tracee.tid] = process_of(tracee.tid)
        if event == EVENT_STOP and number in _STOPPING:
            os.waitpid(tracee.tid, WALL)
            tracee.listen()
            return None
        deliver = 0
        if number == SYSCALL_STOP:
            found = self._at_call(tracee)
        elif event:
            found = self._at_event(tracee, event)
        elif self._is_alarm(tracee, number):
            found = self._at_alarm(tracee)
        else:
            deliver = number
            found = self._compared(tracee, deliver)
        if found is None:
            self._resume(tracee, deliver)
        return found

    def _at_call(self, tracee: Tracee) -> Made | None:
        kind, value, argument = tracee.syscall_info()
        if kind == SYSCALL_ENTRY:
            if value == _NR_IOCTL and argument & 0xFFFF_FFFF == self._request:
                self._calling.add(tracee.tid)
            return None
        if tracee.tid in self._blocking:
            self._arm(tracee, anew=False)
        if tracee.tid not in self._calling:
            return None
        self._calling.remove(tracee.tid)
        return self._returned(tracee, value)

    def _at_event(self, tracee: Tracee, event: int) -> Made | None:
        process = self._process_of[tracee.tid]
        if event == EVENT_EXEC or process not in self._seen:
            # What a process has from its parent, or keeps across exec, was made by another.
            self._seen[process] = self._look(process)
        found = self._compared(tracee)
        if event in (EVENT_EXEC, EVENT_STOP):
            self._arm(tracee, anew=event == EVENT_EXEC)
        return found

    def _is_alarm(self, tracee: Tracee, number: int) -> bool:
        alarm = self._alarms.get(tracee.tid)
        return number == SIGNAL and alarm is not None and alarm.sent(tracee.signal_info())

    def _at_alarm(self, tracee: Tracee) -> Made | None:
        # A call changes no register but the one of its result. Where the alarm was late, the
        # thread has gone on, and the registers say nothing.
        try:
            registers = tracee.registers()
        except AttachRefusedError:
            return None  # a 32-bit program, which KVM does not serve here
        x = registers.x
        if x[8] == _NR_IOCTL and x[1] & 0xFFFF_FFFF == self._request:
            process = self._process_of[tracee.tid]
            with suppress(OSError):  # text that may be run and not be read
                if memory.read(process, registers.pc - 4, 4) == _SVC:
                    return self._returned(tracee, x[0])
        return self._compared(tracee)

    def _returned(self, tracee: Tracee, fd: int) -> Made | None:
        """The thread stands right after the request, which answered `fd`."""
        process = self._process_of[tracee.tid]
        now = self._look(process)
        if fd not in now:
            return None
        # The number may be that of an earlier one, which was closed meanwhile.
        self._seen[process] = (now & self._seen.get(process, frozenset())) | {fd}
        return Made(tracee, process, (fd,), at_return=True)

    def _compared(self, tracee: Tracee, deliver: int = 0) -> Made | None:
        """What is new in the process since it was looked at last, wherever its thread stands."""
        process = self._process_of[tracee.tid]
        # Those that are stopped at every call say for themselves what they made.
        if process not in self._alarms or self._calling:
            return None
        now = self._look(process)
        new = now - self._seen.get(process, frozenset())
        self._seen[process] = now
        return Made(tracee, process, tuple(sorted(new)), False, deliver) if new else None

    def _arm(self, tracee: Tracee, *, anew: bool) -> None:
        """Set the alarm of a process; anew when it executes a program: its thread may be new."""
        tid = tracee.tid
        if anew:
            self._forget_alarm(tid)
        if self._every_call or tid in self._alarms or self._process_of[tid] != tid:
            return
        # A program inherits what is blocked; between fork and exec all may be, for a moment.
        if tracee.signal_mask() >> (SIGNAL - 1) & 1:
            self._blocking.add(tid)
            return
        self._blocking.discard(tid)
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
        self._blocking.discard(tid)
        self._process_of.pop(tid, None)
        self._seen.pop(tid, None)

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
    """The process that the thread belongs to. Raises ProcessLookupError where it is gone."""
    try:
        lines = procfs.lines(f"/proc/{tid}/status")
    except FileNotFoundError:
        raise ProcessLookupError from None
    return next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))
