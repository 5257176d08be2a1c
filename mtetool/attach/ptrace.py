"""ptrace(2) of one thread, as this package needs it, and arm64 register sets.

All calls for a tracee must come from the one OS thread that seized it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from mtetool.attach import steps
from mtetool.attach.memory import Iovec
from mtetool.errors import AttachRefusedError, GuestLostError

# include/uapi/linux/ptrace.h
_CONT = 7
_DETACH = 17
_SYSCALL = 24
_SETOPTIONS = 0x4200
_GETEVENTMSG = 0x4201
_GETREGSET = 0x4204
_SETREGSET = 0x4205
_GETSIGINFO = 0x4202
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_LISTEN = 0x4208
_GETSIGMASK = 0x420A
_SETSIGMASK = 0x420B
_SECCOMP_GET_FILTER = 0x420C
_GET_SYSCALL_INFO = 0x420E
_GET_RSEQ_CONFIGURATION = 0x420F
# arch/arm64/include/uapi/asm/ptrace.h
PEEKMTETAGS = 33
POKEMTETAGS = 34
_O_TRACESYSGOOD = 1
_O_TRACECLONE = 8
FOLLOW = 0x02 | 0x04 | _O_TRACECLONE | 0x10
"""Options: report forks, vforks, clones and execs; trace new threads and processes from birth."""
EVENT_CLONE = 3
EVENT_EXEC = 4
EVENT_STOP = 128
SYSCALL_STOP = 0x85
"""The signal of a system-call stop: SIGTRAP, with the bit that TRACESYSGOOD adds."""
# include/uapi/linux/wait.h
WALL = 0x40000000
"""An option of wait: include threads."""
_WNOTHREAD = 0x20000000  # only the tracees of this OS thread
SYSCALL_ENTRY, SYSCALL_EXIT = 1, 2
_STOPS = (os.CLD_TRAPPED, os.CLD_STOPPED)
# The pause between two looks at a thread while another one's stop stays uncollected.
_POLL_SECONDS = 0.0002

_NAMES = {
    _CONT: "cont",
    _DETACH: "detach",
    _SYSCALL: "syscall",
    _SETOPTIONS: "setoptions",
    _GETEVENTMSG: "geteventmsg",
    _GETREGSET: "getregset",
    _SETREGSET: "setregset",
    _GETSIGINFO: "getsiginfo",
    _LISTEN: "listen",
    _GET_SYSCALL_INFO: "getsyscallinfo",
    _SEIZE: "seize",
    _INTERRUPT: "interrupt",
    _GETSIGMASK: "getsigmask",
    _SETSIGMASK: "setsigmask",
    _SECCOMP_GET_FILTER: "getfilter",
    _GET_RSEQ_CONFIGURATION: "getrseq",
    PEEKMTETAGS: "peekmtetags",
    POKEMTETAGS: "pokemtetags",
}

# include/uapi/linux/elf.h
NT_PRSTATUS = 1
NT_PRFPREG = 2
NT_ARM_TLS = 0x401
NT_ARM_SVE = 0x405
NT_ARM_SSVE = 0x40B
NT_ARM_POE = 0x40F
NT_ARM_GCS = 0x410

# struct user_pt_regs, arch/arm64/include/uapi/asm/ptrace.h: x0..x30, sp, pc, pstate.
_REGS = struct.Struct("<34Q")
# The longest SVE register set: header, 32 Z, 16 P and FFR of 2048 bits, fpsr, fpcr.
_REGSET_MAX = 16 + 16 * (32 * 16 + 16 * 2 + 2) + 64

# PSTATE.BTYPE: which indirect branch led here; it would be checked at the gadget.
PSTATE_BTYPE = 0xC00


_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]


# Reused: it is needed at every system call where there is no faster way.
_SYSCALL_INFO_BYTES = 88
_SYSCALL_INFO = struct.Struct("<qQQ")
_syscall_info = ctypes.create_string_buffer(_SYSCALL_INFO_BYTES)
_syscall_info_at = ctypes.addressof(_syscall_info)


def _ptrace(request: int, tid: int, addr: int = 0, data: int = 0) -> int:
    passing = data and request in (_CONT, _SYSCALL, _DETACH)
    steps.reach(_NAMES[request] + "-signal" if passing else _NAMES[request])
    result = int(_libc.ptrace(request, tid, addr, data))
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


@dataclass(frozen=True, slots=True)
class Registers:
    """The general registers of an arm64 thread: x has 31 of them."""

    x: tuple[int, ...]
    sp: int
    pc: int
    pstate: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Unpack the NT_PRSTATUS register set, 272 bytes."""
        words = _REGS.unpack(data)
        return cls(words[:31], *words[31:])

    def pack(self) -> bytes:
        """The NT_PRSTATUS register set, 272 bytes."""
        return _REGS.pack(*self.x, self.sp, self.pc, self.pstate)

    def with_call(self, number: int) -> Registers:
        """These registers with another system call's number."""
        return replace(self, x=(*self.x[:8], number, *self.x[9:]))

    def calling(self, number: int, args: tuple[int, ...], *, gadget: int, home: int) -> Registers:
        """These registers, about to run `svc; ret` at `gadget` and to return to `home`."""
        x = list(self.x)
        x[: len(args)] = [arg & 0xFFFF_FFFF_FFFF_FFFF for arg in args]
        x[8] = number
        x[30] = home
        return replace(self, x=tuple(x), pc=gadget, pstate=self.pstate & ~PSTATE_BTYPE)

    def returning(self, result: int) -> Registers:
        """These registers after a call with that result (-errno)."""
        return replace(self, x=(result & 0xFFFF_FFFF_FFFF_FFFF, *self.x[1:]))


class _Waits(threading.local):
    """Stops and ends of the threads that this OS thread traces.

    A signal's stop is looked at but not collected: the signal would be lost if we died before we
    passed it on (wait_task_stopped, kernel/exit.c). Every thread's end is collected: the kernel
    reports the end of a process thread by thread, its first thread last, and only when all the
    others that we trace have been collected. Other threads' stops are left to their own waits.
    """

    def __init__(self) -> None:
        self._ended: set[int] = set()

    def forget(self, tid: int) -> None:
        self._ended.discard(tid)

    def next(self, tid: int) -> int | None:
        """The thread's next stop: its signal, and the event above it; None when it has ended."""
        others = False
        try:
            while tid not in self._ended:
                found = _look(os.P_PID, tid, os.WNOHANG) if others else _look(os.P_ALL, 0)
                if found is None:
                    others = False
                    time.sleep(_POLL_SECONDS)
                elif found.si_code not in _STOPS:
                    self._collect_end(found.si_pid)
                elif found.si_pid != tid:
                    others = True
                else:
                    status: int = found.si_status
                    if status >> 8 or status == SYSCALL_STOP:
                        os.waitpid(tid, WALL)
                    return status
        except ChildProcessError:
            pass
        return None

    def ended(self, tid: int) -> bool:
        try:
            while (found := _look(os.P_ALL, 0, os.WNOHANG)) and found.si_code not in _STOPS:
                self._collect_end(found.si_pid)
        except ChildProcessError:
            return True  # where SIGCHLD is ignored, ends are not reported
        return tid in self._ended

    def _collect_end(self, tid: int) -> None:
        os.waitpid(tid, WALL)
        self._ended.add(tid)


def _look(kind: int, tid: int, options: int = 0) -> os.waitid_result | None:
    """Wait for the next change and leave it uncollected; with WNOHANG, None is possible."""
    options |= os.WEXITED | os.WSTOPPED | os.WNOWAIT | WALL | _WNOTHREAD
    return os.waitid(kind, tid, options)


_waits = _Waits()


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a tracee stopped: the signal, the ptrace event (0: none), or a system call."""

    signal: int
    event: int
    syscall: bool


class Tracee:
    """One seized thread."""

    def __init__(self, tid: int) -> None:
        self.tid = tid

    @classmethod
    def seize(cls, tid: int, options: int = 0) -> Self:
        """Trace the thread without stopping it; `options` may be FOLLOW.

        No option outlives us: without PTRACE_O_EXITKILL the kernel detaches when we die.
        Raises OSError (EPERM: not allowed or traced already, ESRCH: gone).
        """
        _waits.forget(tid)
        _ptrace(_SEIZE, tid, 0, _O_TRACESYSGOOD | options)
        return cls(tid)

    @classmethod
    def seize_of(cls, pid: int, tid: int) -> Self:
        """As `seize`, for a thread of that process. Raises ProcessLookupError for any other.

        The id may have passed to another process's thread since it was looked up. From the seize
        on, it stays with the seized thread.
        """
        tracee = cls.seize(tid)
        if Path(f"/proc/{pid}/task/{tid}").exists():
            return tracee
        with suppress(GuestLostError, ProcessLookupError):
            tracee.stop()
            tracee.detach()
        raise ProcessLookupError(errno.ESRCH, f"thread {tid} is not of process {pid}")

    def trace_clones(self, on: bool) -> None:
        """Set whether threads that this thread makes are traced from birth."""
        _ptrace(_SETOPTIONS, self.tid, 0, _O_TRACESYSGOOD | (_O_TRACECLONE if on else 0))

    def interrupt(self) -> None:
        """Ask the thread to stop; `wait` returns the stop."""
        _ptrace(_INTERRUPT, self.tid)

    def wait(self) -> Stop:
        """Wait for the thread's next stop. Raises GuestLostError if it ends instead."""
        status = _waits.next(self.tid)
        if status is None:
            raise GuestLostError(
                f"thread {self.tid} of the VMM ended while mtetool was attached to it",
                hint="find out why the VMM ended; mtetool does not end it",
            )
        return Stop(status & 0x7F, status >> 8, status == SYSCALL_STOP)

    def ended(self) -> bool:
        """Whether the thread has ended, without waiting; reaps all threads that have."""
        return _waits.ended(self.tid)

    def stop(self) -> Stop:
        """Stop the thread between two instructions of its own: an event stop.

        Signals that arrive first are delivered, in their order. The returned signal is
        SIGTRAP, or the stopping signal where the whole process is stopped.
        """
        self.interrupt()
        return self.until_event_stop()

    def to_event_stop(self, signal: int = 0) -> Stop:
        """Go from another kind of stop to an event stop, without an instruction in between.

        The signal is delivered on the way.
        """
        self.interrupt()
        self.cont(signal)
        return self.until_event_stop()

    def until_event_stop(self) -> Stop:
        """Wait for the requested event stop; signals that come first are delivered."""
        while (stop := self.wait()).event != EVENT_STOP:
            # A signal in flight (event 0) is passed on; at any other stop there is none.
            self.cont(0 if stop.syscall or stop.event else stop.signal)
        return stop

    def cont(self, signal: int = 0) -> None:
        """Let the thread run on, with that signal delivered to it."""
        _ptrace(_CONT, self.tid, 0, signal)

    def to_syscall_stop(self, signal: int = 0) -> Stop:
        """Let the thread run, with that signal, until it enters or leaves a system call."""
        self.cont_to_syscall(signal)
        return self.wait()

    def cont_to_syscall(self, signal: int = 0) -> None:
        """As `to_syscall_stop`, without waiting for the stop."""
        _ptrace(_SYSCALL, self.tid, 0, signal)

    def listen(self) -> None:
        """Leave the thread in the group stop that was collected, until SIGCONT ends it."""
        _ptrace(_LISTEN, self.tid)

    def signal_info(self) -> bytes:
        """The siginfo_t of the signal that the thread is stopped with, 128 bytes."""
        buffer = ctypes.create_string_buffer(128)
        _ptrace(_GETSIGINFO, self.tid, 0, ctypes.addressof(buffer))
        return buffer.raw

    def syscall_info(self) -> tuple[int, int, int]:
        """What a system-call stop is about (Linux 5.3).

        Returns SYSCALL_ENTRY, the call's number and its second argument; or SYSCALL_EXIT, the
        result and 0.
        """
        # struct ptrace_syscall_info: op at 0; from 24 on nr and args, or rval.
        _ptrace(_GET_SYSCALL_INFO, self.tid, _SYSCALL_INFO_BYTES, _syscall_info_at)
        first, _, second = _SYSCALL_INFO.unpack_from(_syscall_info, 24)
        kind = _syscall_info.raw[0]
        return kind, first, second if kind == SYSCALL_ENTRY else 0

    def detach(self, signal: int = 0) -> None:
        """Let the thread go, with that signal delivered to it."""
        _ptrace(_DETACH, self.tid, 0, signal)

    def copy_tags(self, request: int, address: int, local: int, n_bytes: int) -> int:
        """PEEKMTETAGS or POKEMTETAGS: `n_bytes` tags, one a byte, to or from memory of ours.

        Returns how many were copied. Raises OSError if none were: EIO whatever is wrong with
        `address`, ESRCH if the thread is no longer stopped.
        """
        iovec = Iovec(local, n_bytes)
        _ptrace(request, self.tid, address, ctypes.addressof(iovec))
        return int(iovec.length)

    def event_message(self) -> int:
        """The message of the last event: for a clone, the new thread's id."""
        message = ctypes.c_ulong()
        _ptrace(_GETEVENTMSG, self.tid, 0, ctypes.addressof(message))
        return message.value

    def regset(self, kind: int) -> bytes | None:
        """A register set by its NT_ number; None where this CPU or kernel has none."""
        buffer = ctypes.create_string_buffer(_REGSET_MAX)
        iovec = Iovec(ctypes.addressof(buffer), len(buffer))
        try:
            _ptrace(_GETREGSET, self.tid, kind, ctypes.addressof(iovec))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENODEV, errno.EIO):
                return None
            raise
        return buffer.raw[: iovec.length]

    def set_regset(self, kind: int, data: bytes) -> None:
        """Write a register set, all of `data`."""
        buffer = ctypes.create_string_buffer(data, len(data))
        iovec = Iovec(ctypes.addressof(buffer), len(buffer))
        _ptrace(_SETREGSET, self.tid, kind, ctypes.addressof(iovec))

    def registers(self) -> Registers:
        """The general registers."""
        data = self.regset(NT_PRSTATUS)
        if data is None or len(data) != _REGS.size:
            raise AttachRefusedError(
                f"thread {self.tid} has no arm64 registers: it runs a 32-bit program",
                hint="use a 64-bit VMM: mtetool supports no other",
            )
        return Registers.unpack(data)

    def set_registers(self, registers: Registers) -> None:
        """Set the general registers. At a system-call stop the kernel ignores x7."""
        self.set_regset(NT_PRSTATUS, registers.pack())

    def signal_mask(self) -> int:
        """The blocked signals, bit N-1 for signal N; inside sigsuspend and kin the saved mask."""
        mask = ctypes.c_uint64()
        _ptrace(_GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        return mask.value

    def set_signal_mask(self, mask: int) -> None:
        """Set the blocked signals."""
        value = ctypes.c_uint64(mask)
        _ptrace(_SETSIGMASK, self.tid, 8, ctypes.addressof(value))

    def rseq_area(self) -> int | None:
        """The address of the thread's struct rseq, None where it registered none."""
        buffer = ctypes.create_string_buffer(24)
        try:
            _ptrace(_GET_RSEQ_CONFIGURATION, self.tid, 24, ctypes.addressof(buffer))
        except OSError:
            return None  # a kernel before 5.13, or one without rseq
        pointer: int = struct.unpack_from("<Q", buffer.raw)[0]
        return pointer or None

    def seccomp_filters(self) -> list[bytes]:
        """The thread's seccomp filters, 8 bytes an instruction; the thread must be stopped.

        Raises OSError (EACCES without CAP_SYS_ADMIN).
        """
        filters: list[bytes] = []
        while True:
            try:
                count = _ptrace(_SECCOMP_GET_FILTER, self.tid, len(filters), 0)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    return filters
                raise
            buffer = ctypes.create_string_buffer(8 * count)
            _ptrace(_SECCOMP_GET_FILTER, self.tid, len(filters), ctypes.addressof(buffer))
            filters.append(buffer.raw)
