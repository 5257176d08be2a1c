"""Classic BPF as the kernel runs it, on filters like those of real sandboxes."""

from __future__ import annotations

import struct

from mtetool.attach import seccomp
from mtetool.attach.gadgets import find_aligned
from mtetool.attach.seccomp import Call

ALLOW, KILL = 0x7FFF0000, 0x00000000
LD, JEQ, JGT, JSET, RET, AND = 0x20, 0x15, 0x25, 0x45, 0x06, 0x54


def _run(program: list[tuple[int, int, int, int]], call: Call) -> int:
    raw = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    return seccomp.run(seccomp.parse(raw), call.data())


def test_a_filter_by_number() -> None:
    program = [(LD, 0, 0, 0), (JEQ, 0, 1, 29), (RET, 0, 0, ALLOW), (RET, 0, 0, KILL)]
    assert _run(program, Call("ioctl", 29)) == ALLOW
    assert _run(program, Call("mmap", 222)) == KILL


def test_a_filter_sees_architecture_and_both_halves_of_arguments() -> None:
    arch = [(LD, 0, 0, 4), (JEQ, 1, 0, 0xC00000B7), (RET, 0, 0, KILL)]
    low = [(LD, 0, 0, 24), (JEQ, 1, 0, 0x8030AEB4), (RET, 0, 0, KILL)]
    high = [(LD, 0, 0, 28), (JEQ, 0, 1, 0), (RET, 0, 0, ALLOW), (RET, 0, 0, KILL)]
    program = arch + low + high
    assert _run(program, Call("ioctl", 29, (9, 0x8030AEB4))) == ALLOW
    assert _run(program, Call("ioctl", 29, (9, 0x1_8030AEB4))) == KILL


def test_a_filter_that_demands_thread_flags() -> None:
    # How sandboxes distinguish pthread_create from fork: (flags & CLONE_THREAD) must be set.
    program = [
        (LD, 0, 0, 16),
        (AND, 0, 0, 0x10000),
        (JEQ, 0, 1, 0x10000),
        (RET, 0, 0, ALLOW),
        (RET, 0, 0, KILL),
    ]
    assert _run(program, Call("clone", 220, (0x3D0F00,))) == ALLOW
    assert _run(program, Call("clone", 220, (0x11,))) == KILL


def test_registers_scratch_and_arithmetic() -> None:
    program = [
        (0x00, 0, 0, 7),  # ld #7
        (0x07, 0, 0, 0),  # tax
        (0x00, 0, 0, 3),  # ld #3
        (0x0C, 0, 0, 0),  # add x
        (0x02, 0, 0, 5),  # st M[5]
        (0x84, 0, 0, 0),  # neg
        (0x60, 0, 0, 5),  # ld M[5]
        (0x64, 0, 0, 16),  # lsh #16
        (JSET, 0, 1, 0x000A0000),
        (0x16, 0, 0, 0),  # ret a
        (RET, 0, 0, KILL),
    ]
    assert _run(program, Call("x", 0)) == 0x000A0000
    assert _run([(0x80, 0, 0, 0), (JGT, 0, 1, 63), (RET, 0, 0, ALLOW)], Call("x", 0)) == ALLOW


def test_gadgets_are_instructions_not_bytes() -> None:
    assert find_aligned(b"\0\0abcd\0\0abcd", b"abcd") == 8
    assert find_aligned(b"\0abcd", b"abcd") is None
