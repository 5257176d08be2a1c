"""Borrow a thread: stop it where it is, make calls through it, and put it back to the bit.

The order of the steps keeps the process alive if we die between any two of them:

1. stop the thread; read all its state; lay a signal frame with that state on its stack;
2. point its registers at `svc; ret`, with rt_sigreturn as the return address;
3. only then block its signals, and let it run: whatever call it is in when we vanish, it
   finishes that call and rt_sigreturn puts it back where it was;
4. if we live, send it home without rt_sigreturn, which would reset the kernel's restart block
   and so turn a restarted sleep into EINTR: restore the vector state, the signal mask and last the
   general registers, resume the call that it was in (`mtetool.attach.restart`), detach.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from mtetool import procfs
from mtetool.attach import gadgets, memory, restart, seccomp, signal_frame, steps
from mtetool.attach.gadgets import Gadgets
from mtetool.attach.ptrace import (
    EVENT_CLONE,
    NT_ARM_GCS,
    NT_ARM_POE,
    NT_ARM_SSVE,
    NT_ARM_SVE,
    NT_ARM_TLS,
    NT_PRFPREG,
    Registers,
    Stop,
    Tracee,
)
from mtetool.attach.signal_frame import ThreadState
from mtetool.errors import AttachRefusedError, BusyError, GuestLostError

# Kept free below the stack pointer: arm64 has no red zone, but a leaf may be about to push.
_STACK_GAP_BYTES = 1024
# How often, and for how long each time, a thread is let run on from a place where it cannot be
# borrowed, before it is given up.
_STAND_TRIES = 12
_STAND_SECONDS = 0.002
_SIGSTOP, _SIGTRAP = 19, 5
# include/linux/errno.h: ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK.
# As the result of a call they say that the kernel restarts it when the thread runs on.
_RESTART_CODES = (-512, -513, -514, -516)
_CALL_TRIES = 100
# SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGSYS: with all signals blocked, one of
# these can only come from the thread's own instruction.
_FAULTS = (4, 5, 7, 8, 11, 31)


class BorrowedThread:
    """A thread of the process, ours for a while; a context manager.

    `calls` are all the calls that it, or a thread that it makes, is going to make: its seccomp
    filters must allow them. `check` is called once the thread has stopped, and raises if this is
    not the right process. `seconds` is how long the thread was stopped or made calls for us.

    With `held` it is already seized, and at an event stop.

    Entering raises AttachRefusedError where this thread cannot be borrowed safely, and
    ProcessLookupError where it does not belong to the process. The thread is then unchanged, and
    still held if it was held before.
    """

    def __init__(
        self,
        pid: int,
        tid: int,
        calls: tuple[seccomp.Call, ...],
        check: Callable[[], object] = lambda: None,
        held: Tracee | None = None,
    ) -> None:
        self.pid = pid
        self.tid = tid
        self._calls = calls
        self._check = check
        self._held = held
        self.seconds = 0.0
        self.gadgets: Gadgets
        self.filters: tuple[seccomp.Program, ...]
        self._tracee: Tracee
        self._state: ThreadState
        self._call_base: Registers
        self._since = 0.0

    def __enter__(self) -> Self:
        steps.enter("borrow")
        self._tracee = self._held or Tracee.seize_of(self.pid, self.tid)
        self._since = time.monotonic()
        try:
            self._stop_where_it_can_be_borrowed()
            self._check()
            self.filters = seccomp.check(self._tracee, self.pid, self._calls)
            self.gadgets = gadgets.find(self.pid)
            self._state = _read_state(self._tracee)
            self._lay_crash_road()
        except GuestLostError:
            raise
        except BaseException:
            # Nothing in the thread's state has changed yet: letting go is enough.
            if self._held is None:
                with suppress(OSError):
                    self._tracee.detach()
            raise
        return self

    def __exit__(self, kind: object, value: BaseException | None, *rest: object) -> None:
        if isinstance(value, GuestLostError):
            return  # there is no thread to send home
        self._go_home()
        self.seconds = time.monotonic() - self._since

    @property
    def poe(self) -> bytes | None:
        """The thread's NT_ARM_POE register set, which a thread that it makes needs as well."""
        return self._state.poe

    def syscall(self, number: int, *args: int) -> int:
        """Make a system call in the thread; return its result, -errno for an error.

        Raises GuestLostError if the thread ends meanwhile.
        """
        self._aim(number, args)
        result, _ = run_call(self._tracee)
        return result

    def leave_argument(self, data: bytes) -> int:
        """Put up to 1024 bytes into the thread's unused stack for a call; return their address."""
        address = self._state.registers.sp - _STACK_GAP_BYTES
        memory.write(self.pid, address, data[:_STACK_GAP_BYTES])
        return address

    def answer(self, result: int) -> None:
        """Give the call that the thread was in that result (-errno) once it is home."""
        self._state = replace(self._state, registers=self._state.registers.returning(result))

    def clone(self, number: int, *args: int) -> tuple[int, Tracee | None]:
        """Make a clone call; return its result and the new thread, traced, stopped before it runs.

        The new thread's first stop is still to be collected with `Tracee.wait`.
        """
        self._tracee.trace_clones(True)
        self._aim(number, args)
        result, child = run_call(self._tracee)
        self._tracee.trace_clones(False)
        return result, Tracee(child) if child else None

    def _stop_where_it_can_be_borrowed(self) -> None:
        tracee = self._tracee
        stop = tracee.stop() if self._held is None else None
        for _ in range(_STAND_TRIES):
            self._original_call = restart.settle(self.pid, tracee)
            obstacle = _obstacle(self.pid, tracee)
            if obstacle is None:
                return
            # A process that is stopped as a whole stays where it is, and a thread that is held for
            # us must not run on.
            if stop is None or stop.signal != _SIGTRAP:
                break
            tracee.cont()
            time.sleep(_STAND_SECONDS)
            stop = tracee.stop()
        stopped = stop is not None and stop.signal != _SIGTRAP
        raise AttachRefusedError(
            f"thread {self.tid} of process {self.pid} {obstacle}",
            hint=f"continue the process, which is stopped: kill -CONT {self.pid}"
            if stopped
            else "try again: by then it may be elsewhere",
        )

    def _lay_crash_road(self) -> None:
        state = self._state
        registers = state.registers
        # rt_sigreturn drops the kernel's note of a call to resume: the call is made anew.
        crash = replace(state, registers=registers.with_call(self._original_call))
        length = len(signal_frame.build(crash))
        self._frame_at = (registers.sp - _STACK_GAP_BYTES - length) & ~15
        if not _has_room(self.pid, self._tracee, self._frame_at, registers.sp):
            raise AttachRefusedError(
                f"thread {self.tid} of process {self.pid} has no room left on its stack",
                hint="try again: by then it may be elsewhere",
            )
        memory.write(self.pid, self._frame_at, signal_frame.build(crash, self._frame_at))
        self._call_base = Registers(registers.x, self._frame_at, registers.pc, registers.pstate)
        self._blocked = False

    def _aim(self, number: int, args: tuple[int, ...]) -> None:
        self._tracee.set_registers(
            self._call_base.calling(
                number, args, gadget=self.gadgets.svc_ret, home=self.gadgets.sigreturn
            )
        )
        if not self._blocked:
            # Not before the registers: if we died between the two, it would stay blocked for ever.
            self._tracee.set_signal_mask(signal_frame.ALL_SIGNALS)
            self._blocked = True

    def _go_home(self) -> None:
        steps.enter("home")
        tracee, state = self._tracee, self._state
        if self._blocked:
            # From a system-call stop to an event stop: at a system-call stop, x7 cannot be set.
            tracee.to_event_stop()
        if state.sve_live and state.sve is not None:
            tracee.set_regset(NT_ARM_SVE, state.sve)
        else:
            tracee.set_regset(NT_PRFPREG, state.fpsimd)
        tracee.set_signal_mask(state.signal_mask)
        tracee.set_registers(state.registers)
        signal = restart.resume(self.pid, tracee, state.registers) if self._blocked else 0
        tracee.detach(signal)


def run_call(tracee: Tracee) -> tuple[int, int]:
    """Run a tracee that is aimed at `svc; ret` through that call.

    Returns the call's result (signed) and the id of the thread that it made (0: none). A call that
    the kernel interrupted and would restart is made again: a signal that is about to stop the
    process does that to a clone. Raises BusyError if the call never completes.
    """
    for _ in range(_CALL_TRIES):
        result, child = _run_once(tracee)
        if result not in _RESTART_CODES:
            return result, child
    raise BusyError(
        f"thread {tracee.tid} was interrupted in each of {_CALL_TRIES} attempts at a system call",
        hint="try again; check whether something keeps stopping and continuing the VMM",
    )


def _run_once(tracee: Tracee) -> tuple[int, int]:
    child = stops = signal = 0
    while stops < 2:  # the entry and the exit
        stop = tracee.to_syscall_stop(signal)
        signal = pass_on(tracee, stop)
        if stop.syscall:
            stops += 1
        elif stop.event == EVENT_CLONE:
            child = tracee.event_message()
    result: int = struct.unpack("<q", struct.pack("<Q", tracee.registers().x[0]))[0]
    return result, child


def pass_on(tracee: Tracee, stop: Stop) -> int:
    """The signal to continue with from a stop of a thread that has all signals blocked.

    Raises AttachRefusedError if its own instruction caused the stop.
    """
    if not stop.event and stop.signal in _FAULTS and not stop.syscall:
        raise AttachRefusedError(
            f"thread {tracee.tid} could not make a system call for mtetool: signal {stop.signal}",
            hint="check whether its process unmapped the vDSO or made it non-executable",
        )
    # All other signals are blocked; the process as a whole must not miss SIGSTOP.
    return stop.signal if not stop.event and stop.signal == _SIGSTOP else 0


def _read_state(tracee: Tracee) -> ThreadState:
    gcs = tracee.regset(NT_ARM_GCS)
    if gcs and gcs[0] & 1:
        raise AttachRefusedError(
            f"thread {tracee.tid} has a guarded control stack, which every way home would trip",
            hint="start the VMM without a guarded control stack",
        )
    fpsimd = tracee.regset(NT_PRFPREG)
    if fpsimd is None:
        raise AttachRefusedError(f"thread {tracee.tid} has no floating-point registers")
    return ThreadState(
        tracee.registers(),
        fpsimd,
        tracee.regset(NT_ARM_SVE),
        tracee.regset(NT_ARM_POE),
        tracee.signal_mask(),
    )


def _obstacle(pid: int, tracee: Tracee) -> str | None:
    """Why the thread cannot be borrowed where it stands; None where it can."""
    ssve = tracee.regset(NT_ARM_SSVE)
    if ssve and signal_frame.vectors_live(ssve):
        return "is in SME streaming mode, and a system call would lose that state"
    if _inside_rseq(pid, tracee):
        return "is in a restartable sequence"
    return None


def _inside_rseq(pid: int, tracee: Tracee) -> bool:
    area = tracee.rseq_area()
    if area is None:
        return False
    (section,) = struct.unpack("<Q", memory.read(pid, area + 8, 8))
    if section == 0:
        return False
    # struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip
    start, length = struct.unpack("<QQ", memory.read(pid, section + 8, 16))
    return bool(start <= tracee.registers().pc < start + length)


def _has_room(pid: int, tracee: Tracee, low: int, high: int) -> bool:
    """Whether the bytes [low, high) belong to the thread's stack and to nothing else.

    A stack that is part of something larger (the heap, an arena) has other data right below it.
    So its end must be known: it is the main thread's stack, or it holds the thread's TLS (as C
    libraries make them), or it has a guard page below it (as coroutines have).
    """
    maps = procfs.mappings(pid)
    for below, m in zip([None, *maps], maps, strict=False):
        if m.start <= low and high <= m.end and m.flags.startswith("rw"):
            tls = tracee.regset(NT_ARM_TLS)
            pointer = struct.unpack_from("<Q", tls)[0] if tls else 0
            guarded = below is not None and below.end == m.start and below.flags[:3] == "---"
            on_heap = m.name == "[heap]"
            return m.name == "[stack]" or guarded or (high <= pointer < m.end and not on_heap)
    return False


def state_letter(task: Path) -> str:
    """A thread's state from /proc/PID/task/TID/stat: R, S, T, Z, …; X where it is gone."""
    try:
        return procfs.stat_of(task)[0]
    except OSError:
        return "X"
