"""Follow a program and everything that it starts, to the moment when a VM has been made.

The tracer may die at any instant: the kernel then lets go of everything that it followed. It looks
at stops without collecting them (WNOWAIT): a signal whose stop was collected is lost if the tracer
dies before it passes the signal on.
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
    """The wait took longer than the given time."""


@dataclass(frozen=True, slots=True)
class Made:
    """A stopped thread of `process`, in which the file descriptors `fds` are new.

    With `at_return` there is one of them, and the thread is stopped right after the ioctl that made
    it, before any instruction of its own. `signal` is about to be delivered to it.
    """

    tracee: Tracee
    process: int
    fds: tuple[int, ...]
    at_return: bool
    signal: int = 0


class Follower:
    """Follows process `pid` (one thread, not stopped), its threads and descendants until we end.

    It looks for file descriptors that ioctl `request` makes; `look` returns those that a process
    has. A process's first thread gets an alarm. Its other threads are stopped at every call (a new
    thread of the C library blocks all signals), and so are all threads with `every_call` or where
    we have no right to set alarms. An alarm can come late or be blocked, so each stop of a process
    with an alarm compares its file descriptors with the earlier ones. A process that executes a
    program as another user than `user` (setuid) is let go; None: it is not.
    Raises OSError where `pid` cannot be traced.
    """

    def __init__(
        self, pid: int, request: int, look: Look, *, every_call: bool, user: int | None = None
    ) -> None:
        self._request = request
        self._user = user
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
        """The followed processes that have not been seen to end, oldest first."""
        return tuple(dict.fromkeys(self._process_of.values()))

    def give_up_after(self, seconds: float) -> None:
        """Make `next` raise TooLongError instead of waiting any longer than that. Uses SIGALRM."""
        signal.signal(signal.SIGALRM, self._rang)
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def next(self) -> Made | None:
        """Let all threads run on to the next file descriptor; None when all of them have ended.

        The thread that made it stays stopped until the next call, while the others run. Raises
        TooLongError, and then holds no stopped thread.
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
            # A thread that is killed while it is stopped is gone for every request.
            with suppress(ProcessLookupError):
                if status is None:
                    os.waitpid(tid, WALL)
                    self._forget(tid)
                elif (found := self._stopped(Tracee(tid), status)) is not None:
                    self._held = found
                    return found

    def disarm(self) -> None:
        """Remove all alarms before a thread is let go: the next signal would be delivered to it."""
        for tid in list(self._alarms):
            self._forget_alarm(tid)

    def unseen(self) -> bool:
        """Whether a process has such a file descriptor that no stop has reported."""
        return any(self._look(pid) - self._seen.get(pid, frozenset()) for pid in self.processes)

    def _wait(self) -> tuple[int, int | None]:
        # SIGALRM interrupts the wait and nothing else: a stop that came first stays uncollected.
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
        if event == EVENT_EXEC and not self._is_ours(self._process_of[tracee.tid]):
            os.waitpid(tracee.tid, WALL)
            self._forget(tracee.tid)
            tracee.detach()
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
            # Another program made the descriptors that are inherited or kept across exec.
            self._seen[process] = self._look(process)
        found = self._compared(tracee)
        if event in (EVENT_EXEC, EVENT_STOP):
            self._arm(tracee, anew=event == EVENT_EXEC)
        return found

    def _is_alarm(self, tracee: Tracee, number: int) -> bool:
        alarm = self._alarms.get(tracee.tid)
        return number == SIGNAL and alarm is not None and alarm.sent(tracee.signal_info())

    def _at_alarm(self, tracee: Tracee) -> Made | None:
        # A call changes only the register of its result. If the alarm was late, the thread has run
        # on, and the registers say nothing.
        try:
            registers = tracee.registers()
        except AttachRefusedError:
            return None  # a 32-bit program, which KVM does not serve here
        x = registers.x
        if x[8] == _NR_IOCTL and x[1] & 0xFFFF_FFFF == self._request:
            process = self._process_of[tracee.tid]
            with suppress(OSError):  # text that may be executed but not read
                if memory.read(process, registers.pc - 4, 4) == _SVC:
                    return self._returned(tracee, x[0])
        return self._compared(tracee)

    def _returned(self, tracee: Tracee, fd: int) -> Made | None:
        """Handle a thread that stopped right after the request, which returned `fd`."""
        process = self._process_of[tracee.tid]
        now = self._look(process)
        if fd not in now:
            return None
        # The number may be that of an earlier descriptor, closed meanwhile.
        self._seen[process] = (now & self._seen.get(process, frozenset())) | {fd}
        return Made(tracee, process, (fd,), at_return=True)

    def _compared(self, tracee: Tracee, deliver: int = 0) -> Made | None:
        """Report what is new in the process since the last look, wherever its thread stopped."""
        process = self._process_of[tracee.tid]
        # Threads that are stopped at every call show what they made themselves.
        if process not in self._alarms or self._calling:
            return None
        now = self._look(process)
        new = now - self._seen.get(process, frozenset())
        self._seen[process] = now
        return Made(tracee, process, tuple(sorted(new)), False, deliver) if new else None

    def _arm(self, tracee: Tracee, *, anew: bool) -> None:
        """Set a process's alarm; anew after an exec, when its first thread may be another one."""
        tid = tracee.tid
        if anew:
            self._forget_alarm(tid)
        if self._every_call or tid in self._alarms or self._process_of[tid] != tid:
            return
        # A program inherits blocked signals; between fork and exec all may be blocked for a moment.
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

    def _is_ours(self, process: int) -> bool:
        if self._user is None:
            return True
        users = procfs.status_of(process).get("Uid", "").split()
        return set(users) == {str(self._user)}

    def _forget(self, tid: int) -> None:
        self._forget_alarm(tid)
        self._calling.discard(tid)
        self._blocking.discard(tid)
        self._process_of.pop(tid, None)
        self._seen.pop(tid, None)

    def _forget_alarm(self, tid: int) -> None:
        if tid in self._alarms:
            self._alarms.pop(tid).close()


def peek() -> tuple[int, int | None]:
    """Wait for a stop and leave it uncollected; return the thread and its status (None: ended).

    The status has the signal in its low 8 bits and the event above. Raises ChildProcessError
    when there is nothing to wait for.
    """
    found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOWAIT | WALL)
    assert found is not None  # None comes with WNOHANG only
    stopped = found.si_code in (os.CLD_TRAPPED, os.CLD_STOPPED)
    return found.si_pid, found.si_status if stopped else None


def process_of(tid: int) -> int:
    """The process that the thread belongs to. Raises ProcessLookupError where it is gone."""
    try:
        lines = procfs.lines(f"/proc/{tid}/status")
    except FileNotFoundError:
        raise ProcessLookupError from None
    return next(int(line.split()[1]) for line in lines if line.startswith("Tgid:"))
