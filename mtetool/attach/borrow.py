"""Borrowing a thread: stopped where it is, it makes calls for us, and is put back to the bit.

The order of the steps is what keeps the process alive if we die between any two of them:

1. stop the thread; read all its state; lay a signal frame with that state on its stack;
2. point its registers at `svc; ret`, with rt_sigreturn as the place to return to;
3. only then block its signals, and let it run: whatever call it is in when we vanish, it
   finishes that call and rt_sigreturn puts it back where it was;
4. on purpose it goes home without rt_sigreturn (which would reset the kernel's restart block
   and so turn a restarted sleep into EINTR): vector state, signal mask, general registers
   last, detach.
"""

from __future__ import annotations

import struct
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from mtetool.attach import frame, gadgets, memory, seccomp
from mtetool.attach.frame import FRAME_BYTES, ThreadState
from mtetool.attach.gadgets import Gadgets
from mtetool.attach.ptrace import (
    EVENT_CLONE,
    NT_ARM_GCS,
    NT_ARM_POE,
    NT_ARM_SSVE,
    NT_ARM_SVE,
    NT_PRFPREG,
    Registers,
    Tracee,
)
from mtetool.errors import AttachRefusedError, GuestLostError

# Kept free below the stack pointer: arm64 has no red zone, but a leaf may be about to push.
_STACK_GAP_BYTES = 1024
# How often a thread inside a restartable sequence is let run on before it is given up.
_RSEQ_TRIES = 20
_SIGSTOP = 19


class BorrowedThread:
    """A thread of the process, ours for a while; a context manager.

    `seconds` is the time for which it was stopped or made calls for us. With `held` it is
    seized and stopped already, at a system call or a signal; where it cannot be borrowed it
    then stays so.
    """

    def __init__(self, pid: int, tid: int, held: Tracee | None = None) -> None:
        self.pid = pid
        self.tid = tid
        self._held = held
        self.seconds = 0.0
        self.gadgets: Gadgets
        self._tracee: Tracee
        self._state: ThreadState
        self._call_base: Registers
        self._since = 0.0

    def __enter__(self) -> Self:
        self._tracee = self._held or Tracee.seize(self.tid)
        self._since = time.monotonic()
        try:
            self._stop_outside_rseq()
            self.gadgets = gadgets.find(self.pid)
            self._state = _read_state(self._tracee)
            self._lay_crash_road()
        except GuestLostError:
            raise
        except BaseException:
            # Nothing of the thread's state was changed yet: letting go is enough.
            if self._held is None:
                with suppress(OSError):
                    self._tracee.detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(value, GuestLostError):
            return  # there is no thread to send home
        self._go_home()
        self.seconds = time.monotonic() - self._since

    @property
    def poe(self) -> bytes | None:
        """The thread's NT_ARM_POE register set, which a thread that it makes needs as well."""
        return self._state.poe

    def syscall(self, number: int, *args: int) -> int:
        """Make a system call in the thread; its result, -errno for an error.

        Raises GuestLostError when the thread ended meanwhile.
        """
        self._aim(number, args)
        result, _ = run_call(self._tracee)
        return result

    def leave_argument(self, data: bytes) -> int:
        """Put up to 1024 bytes into the thread's unused stack for a call; their address."""
        address = self._frame_at + FRAME_BYTES
        memory.write(self.pid, address, data[:_STACK_GAP_BYTES])
        return address

    def answer(self, result: int) -> None:
        """Let the call that the thread came from have that result (-errno) once it is home."""
        self._state = replace(self._state, registers=self._state.registers.returning(result))

    def allows(self, calls: tuple[seccomp.Call, ...]) -> None:
        """See that the thread's seccomp filters allow the calls; AttachRefusedError if not."""
        seccomp.check(self._tracee, self.pid, calls)

    def clone(self, number: int, *args: int) -> tuple[int, Tracee | None]:
        """Make a clone call; its result, and the new thread, traced and stopped before its start.

        The new thread waits for its first stop to be collected with `Tracee.wait`.
        """
        self._tracee.trace_clones(True)
        self._aim(number, args)
        result, child = run_call(self._tracee)
        self._tracee.trace_clones(False)
        return result, Tracee(child) if child else None

    def _stop_outside_rseq(self) -> None:
        if self._held is not None:
            self._tracee.to_event_stop()  # behind a call, so outside of such a sequence
            return
        for _ in range(_RSEQ_TRIES):
            self._tracee.stop()
            if not _inside_rseq(self.pid, self._tracee):
                return
            self._tracee.cont()
        raise AttachRefusedError(
            f"thread {self.tid} of process {self.pid} never leaves a restartable sequence",
            hint="try again",
        )

    def _lay_crash_road(self) -> None:
        state = self._state
        try:
            content = frame.build(state)
        except frame.FrameTooLargeError:
            raise AttachRefusedError(
                f"thread {self.tid} of process {self.pid} uses vectors too long to be kept safe",
                hint="try again; it may not use them then",
            ) from None
        self._frame_at = (state.registers.sp - _STACK_GAP_BYTES - FRAME_BYTES) & ~15
        if not _writable(self.pid, self._frame_at, state.registers.sp):
            raise AttachRefusedError(
                f"thread {self.tid} of process {self.pid} has no room left on its stack",
                hint="try again; it may stand elsewhere then",
            )
        memory.write(self.pid, self._frame_at, content)
        registers = state.registers
        self._call_base = Registers(registers.x, self._frame_at, registers.pc, registers.pstate)
        self._blocked = False

    def _aim(self, number: int, args: tuple[int, ...]) -> None:
        self._tracee.set_registers(
            self._call_base.calling(
                number, args, gadget=self.gadgets.svc_ret, home=self.gadgets.sigreturn
            )
        )
        if not self._blocked:
            # Not before the registers: dying between the two would leave it blocked for ever.
            self._tracee.set_signal_mask(frame.ALL_SIGNALS)
            self._blocked = True

    def _go_home(self) -> None:
        tracee, state = self._tracee, self._state
        if self._blocked:
            # From a system-call stop to an event stop: at the former, x7 cannot be set.
            tracee.to_event_stop()
        if state.sve_live and state.sve is not None:
            tracee.set_regset(NT_ARM_SVE, state.sve)
        else:
            tracee.set_regset(NT_PRFPREG, state.fpsimd)
        tracee.set_signal_mask(state.signal_mask)
        tracee.set_registers(state.registers)
        tracee.detach()


def run_call(tracee: Tracee) -> tuple[int, int]:
    """Run a tracee that is aimed at `svc; ret` through that call.

    Returns the call's result (signed) and the id of the thread it made (0: none).
    """
    child = stops = signal = 0
    while stops < 2:  # the entry and the exit
        stop = tracee.to_syscall_stop(signal)
        # All others are blocked; the process as a whole must not miss this one.
        signal = stop.signal if not stop.event and stop.signal == _SIGSTOP else 0
        if stop.syscall:
            stops += 1
        elif stop.event == EVENT_CLONE:
            child = tracee.event_message()
    result: int = struct.unpack("<q", struct.pack("<Q", tracee.registers().x[0]))[0]
    return result, child


def _read_state(tracee: Tracee) -> ThreadState:
    gcs = tracee.regset(NT_ARM_GCS)
    if gcs and gcs[0] & 1:
        raise AttachRefusedError(
            f"thread {tracee.tid} has a guarded control stack, which every way back would trip",
            hint="start the VMM with its guarded control stack off",
        )
    ssve = tracee.regset(NT_ARM_SSVE)
    if ssve and struct.unpack_from("<H", ssve, 12)[0] & 1:
        raise AttachRefusedError(
            f"thread {tracee.tid} is in SME streaming mode, whose state a call would lose",
            hint="try again; it may have left that mode then",
        )
    fpsimd = tracee.regset(NT_PRFPREG)
    if fpsimd is None:
        raise AttachRefusedError(f"thread {tracee.tid} shows no floating-point registers")
    return ThreadState(
        tracee.registers(),
        fpsimd,
        tracee.regset(NT_ARM_SVE),
        tracee.regset(NT_ARM_POE),
        tracee.signal_mask(),
    )


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


def _writable(pid: int, low: int, high: int) -> bool:
    return any(
        m.start <= low and high <= m.end and m.flags.startswith("rw") for m in memory.mappings(pid)
    )


def choose_thread(pid: int, is_bad: frozenset[int] = frozenset()) -> int:
    """The thread to borrow: the main one, unless it is in `is_bad` (vCPUs) or has ended.

    Raises AttachRefusedError where none is left.
    """
    tids = sorted(int(path.name) for path in Path(f"/proc/{pid}/task").iterdir())
    tids.sort(key=lambda tid: tid != pid)
    for tid in tids:
        if tid not in is_bad and state_letter(Path(f"/proc/{pid}/task/{tid}")) not in "ZX":
            return tid
    raise AttachRefusedError(f"process {pid} has no thread that could be borrowed")


def state_letter(task: Path) -> str:
    """A thread's state as /proc/PID/task/TID/stat has it: R, S, T, Z, …; X where it is gone."""
    try:
        stat = (task / "stat").read_text(errors="replace")
    except OSError:
        return "X"
    return stat.rpartition(")")[2].split()[0]
