"""System calls that a stop interrupts and that the kernel restarts after it.

At the stop, pc is back at the `svc` and x0 is what it was. If the thread then runs on by itself,
the kernel still adds what is not in the registers:

- a sleep with a relative timeout goes on by restart_syscall(2), which knows when it ends;
- a call that a handler's signal must interrupt (poll, a sleep) returns EINTR.

The kernel does neither for a thread that was sent elsewhere meanwhile. `settle` lets the first
happen before the thread is borrowed, `resume` the second afterwards.
Source: do_signal, arch/arm64/kernel/signal.c.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import replace

from mtetool import procfs
from mtetool.attach import memory
from mtetool.attach.ptrace import Registers, Tracee

# include/uapi/asm-generic/unistd.h
_NR_IO_PGETEVENTS, _NR_MSGRCV, _NR_MSGSND = 292, 188, 189
_NR_PSELECT6, _NR_PPOLL, _NR_SIGSUSPEND = 72, 73, 133
_NR_FUTEX, _NR_NANOSLEEP, _NR_CLOCK_NANOSLEEP, _NR_RESTART = 98, 101, 115, 128
_SLEEPS = (_NR_FUTEX, _NR_NANOSLEEP, _NR_CLOCK_NANOSLEEP)
# Calls that a handled signal interrupts whatever its SA_RESTART says (ERESTARTNOHAND and
# ERESTART_RESTARTBLOCK, include/linux/errno.h).
_BROKEN_OFF = (
    _NR_RESTART,
    _NR_PSELECT6,
    _NR_PPOLL,
    _NR_SIGSUSPEND,
    _NR_MSGRCV,
    _NR_MSGSND,
    _NR_IO_PGETEVENTS,
)
_SVC = bytes.fromhex("010000d4")
# movz x8 or w8, #imm16: how programs load a call's number, a few instructions before its svc.
_MOVZ_X8, _MOVZ_W8, _MOVZ_MASK = 0xD280_0008, 0x5280_0008, 0xFFE0_001F
_MOST_BETWEEN = 8
_SETTLE_TRIES = 3


def settle(pid: int, tracee: Tracee) -> int:
    """Lead a thread that was stopped in a sleep to where the kernel knows the sleep's end.

    Returns the number of the call that it is in, which x8 may no longer hold: this call is made
    anew where the kernel's knowledge is lost. The thread stays at an event stop.
    """
    original = None
    for _ in range(_SETTLE_TRIES):
        registers = tracee.registers()
        if not _sleeps(registers) or not at_svc(pid, registers):
            break
        original = registers.x[8]
        stop = tracee.to_syscall_stop()
        while not stop.syscall and not stop.event:
            stop = tracee.to_syscall_stop(stop.signal)
        tracee.to_event_stop()
    registers = tracee.registers()
    if registers.x[8] != _NR_RESTART or not at_svc(pid, registers):
        return registers.x[8]
    return original or _loaded_number(pid, registers.pc)


def resume(pid: int, tracee: Tracee, registers: Registers) -> int:
    """Let a thread that is back where it was resume the call that it was in.

    A signal that came while it was borrowed is delivered first; if its handler would have
    interrupted the call, it does so now. Returns the signal to detach with.
    """
    if not at_svc(pid, registers):
        return 0
    signal = 0
    while True:
        stop = tracee.to_syscall_stop(signal)
        if stop.syscall or stop.event:
            return 0
        signal = stop.signal
        if _caught(pid, tracee.tid, signal):
            if _breaks_off(registers):
                x = ((-errno.EINTR) & 0xFFFF_FFFF_FFFF_FFFF, *registers.x[1:])
                tracee.set_registers(replace(registers, x=x, pc=registers.pc + 4))
            return signal


def at_svc(pid: int, registers: Registers) -> bool:
    """Whether the thread's next instruction is a system call."""
    try:
        return memory.read(pid, registers.pc, 4) == _SVC
    except OSError:
        return False  # text that may be executed but not read


def _sleeps(registers: Registers) -> bool:
    number = registers.x[8]
    return number in _SLEEPS and (number != _NR_FUTEX or registers.x[3] != 0)


def _breaks_off(registers: Registers) -> bool:
    # Not a futex wait without a timeout: that depends on the handler's SA_RESTART.
    return registers.x[8] in _BROKEN_OFF or _sleeps(registers)


def _caught(pid: int, tid: int, signal: int) -> bool:
    """Whether the process has a handler for the signal."""
    for line in procfs.lines(f"/proc/{pid}/task/{tid}/status"):
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal - 1) & 1)
    return False


def _loaded_number(pid: int, pc: int) -> int:
    """The call number that the instructions before a `svc` load; restart_syscall if unclear."""
    try:
        code = memory.read(pid, pc - 4 * _MOST_BETWEEN, 4 * _MOST_BETWEEN)
    except OSError:
        return _NR_RESTART
    for word in reversed(struct.unpack(f"<{_MOST_BETWEEN}I", code)):
        if word & _MOVZ_MASK in (_MOVZ_X8, _MOVZ_W8):
            number: int = word >> 5 & 0xFFFF
            return number if number in _SLEEPS else _NR_RESTART
    return _NR_RESTART
