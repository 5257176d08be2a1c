"""Ask a thread's seccomp filters about a call before it is made.

A call that a filter denies may kill the process, and a suspension of the filters
(PTRACE_O_SUSPEND_SECCOMP) ends with the tracer. So mtetool makes only calls that all filters
allow. The filters are classic BPF (Documentation/userspace-api/seccomp_filter.rst); each runs,
and the strictest answer counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mtetool import procfs
from mtetool.attach.ptrace import Tracee
from mtetool.errors import AttachRefusedError

_AUDIT_ARCH_AARCH64 = 0xC00000B7
_ALLOWED_ACTIONS = (0x7FFF0000, 0x7FFC0000)  # ALLOW, LOG
_INSTRUCTION = struct.Struct("<HBBI")
_MASK = 0xFFFF_FFFF
_ARGUMENTS_AT = 16  # of six, 8 bytes each, in struct seccomp_data

Program = Sequence[tuple[int, int, int, int]]


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that is going to be made, with the arguments that a filter can see."""

    name: str
    number: int
    args: tuple[int, ...] = ()

    def data(self) -> bytes:
        """The struct seccomp_data of the call."""
        args = (*self.args, *(0,) * (6 - len(self.args)))
        masked = (arg & 0xFFFF_FFFF_FFFF_FFFF for arg in args)
        return struct.pack("<iIQ6Q", self.number, _AUDIT_ARCH_AARCH64, 0, *masked)


def check(tracee: Tracee, pid: int, calls: Iterable[Call]) -> tuple[Program, ...]:
    """Check that the stopped thread's filters allow all the calls; return the filters.

    Raises AttachRefusedError, which names the call that is not allowed, or says that the filters
    cannot be read.
    """
    mode = _mode(pid, tracee.tid)
    if mode == 0:
        return ()
    if mode == 1:
        raise AttachRefusedError(f"thread {tracee.tid} of process {pid} is in strict seccomp mode")
    try:
        programs = tuple(parse(raw) for raw in tracee.seccomp_filters())
    except OSError as error:
        raise AttachRefusedError(
            f"process {pid} has a seccomp filter that cannot be read: {error.strerror}",
            hint="run mtetool as root in the host's own namespaces (CAP_SYS_ADMIN); for a VM that"
            " is about to start, use the companion service: mtetool-companion(1)",
        ) from error
    for call in calls:
        allow(programs, pid, call)
    return programs


def allow(programs: Iterable[Program], pid: int, call: Call) -> None:
    """Check that all the filters allow the call. Raises AttachRefusedError."""
    if not all(run(program, call.data()) in _ALLOWED_ACTIONS for program in programs):
        raise AttachRefusedError(
            f"the seccomp filter of process {pid} does not allow {call.name}"
            f" (system call {call.number})",
            hint=f"allow {call.name} in the VMM's filter, or start it without one",
        )


def looks_at(programs: Iterable[Program], argument: int) -> bool:
    """Whether any of the filters loads that argument of a call, counted from 0."""
    at = _ARGUMENTS_AT + 8 * argument
    return any(
        code & 0x07 == 0x00 and code & 0xE0 == 0x20 and at <= k < at + 8
        for program in programs
        for code, _, _, k in program
    )


def parse(raw: bytes) -> Program:
    """A filter's instructions, code, jt, jf and k each, from 8 bytes apiece."""
    return list(_INSTRUCTION.iter_unpack(raw))


def run(program: Program, data: bytes) -> int:
    """Run a classic BPF program on `data`, a struct seccomp_data; return the action's bits."""
    a = x = pc = 0
    scratch = [0] * 16
    while True:
        code, jt, jf, k = program[pc]
        pc += 1
        kind = code & 0x07
        if kind == 0x06:  # ret
            return (a if code & 0x18 == 0x10 else k) & 0xFFFF0000
        if kind in (0x00, 0x01):  # ld, ldx
            value = _load(code, k, data, scratch)
            a, x = (value, x) if kind == 0x00 else (a, value)
        elif kind in (0x02, 0x03):  # st, stx
            scratch[k] = a if kind == 0x02 else x
        elif kind == 0x04:
            a = _arithmetic(code & 0xF0, a, x if code & 0x08 else k)
        elif kind == 0x05:
            if code & 0xF0 == 0x00:
                pc += k
            else:
                pc += jt if _compare(code & 0xF0, a, x if code & 0x08 else k) else jf
        elif code & 0x80:  # txa
            a = x
        else:  # tax
            x = a


def _load(code: int, k: int, data: bytes, scratch: list[int]) -> int:
    mode = code & 0xE0
    if mode == 0x20:  # absolute, a 32-bit word
        value: int = struct.unpack_from("<I", data, k)[0]
        return value
    if mode == 0x60:
        return scratch[k]
    return len(data) if mode == 0x80 else k


def _arithmetic(operation: int, a: int, b: int) -> int:
    results = {
        0x00: lambda: a + b,
        0x10: lambda: a - b,
        0x20: lambda: a * b,
        0x30: lambda: a // b if b else 0,
        0x40: lambda: a | b,
        0x50: lambda: a & b,
        0x60: lambda: a << b if b < 32 else 0,
        0x70: lambda: a >> b if b < 32 else 0,
        0x80: lambda: -a,
        0xA0: lambda: a ^ b,
    }
    return results[operation]() & _MASK


def _compare(operation: int, a: int, b: int) -> bool:
    return {0x10: a == b, 0x20: a > b, 0x30: a >= b, 0x40: bool(a & b)}[operation]


def _mode(pid: int, tid: int) -> int:
    status = procfs.lines(f"/proc/{pid}/task/{tid}/status")
    lines = (line.split() for line in status if line.startswith("Seccomp:"))
    return next((int(line[1]) for line in lines), 0)
