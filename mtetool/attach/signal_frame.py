"""Signal frames: a thread's whole state as rt_sigreturn(2) restores it.

The frame is the way home for a thread whose tracer has vanished: it is on the thread's stack
before any register changes. Layout: arch/arm64/kernel/signal.c and
arch/arm64/include/uapi/asm/sigcontext.h. Pure functions: bytes in, bytes out.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from mtetool.attach.ptrace import Registers

_SIGMASK_AT = 168  # siginfo is 128 bytes; ucontext has flags, link and stack before the mask
_MCONTEXT_AT = 304  # fault_address, then regs[31], sp, pc, pstate
_RECORDS_AT = 592
_RECORDS_BYTES = 4096
FRAME_BYTES = _RECORDS_AT + _RECORDS_BYTES
"""The length of a frame with vectors of at most 896 bits, as most have."""

_FPSIMD_MAGIC, _FPSIMD_BYTES = 0x46508001, 0x210
_SVE_MAGIC = 0x53564501
_POE_MAGIC = 0x504F4530
_EXTRA_MAGIC, _EXTRA_BYTES = 0x45585401, 32
_TERMINATOR = bytes(16)

ALL_SIGNALS = 0xFFFF_FFFF_FFFF_FFFF

_SVE_HEADER = struct.Struct("<IIHHHH")  # struct user_sve_header
SVE_PT_REGS_SVE = 1


@dataclass(frozen=True, slots=True)
class ThreadState:
    """The state that a borrowed thread must get back to the bit.

    `fpsimd` is the NT_PRFPREG register set (528 bytes), `sve` NT_ARM_SVE where the CPU has
    it, `poe` the POR_EL0 value of NT_ARM_POE; `signal_mask` has bit N-1 for signal N.
    """

    registers: Registers
    fpsimd: bytes
    sve: bytes | None
    poe: bytes | None
    signal_mask: int

    @property
    def sve_live(self) -> bool:
        """Whether the thread has values in the SVE registers beyond the FP ones."""
        return self.sve is not None and vectors_live(self.sve)


def vectors_live(regset: bytes) -> bool:
    """Whether an NT_ARM_SVE or NT_ARM_SSVE register set holds vectors, not just FP registers."""
    return bool(_SVE_HEADER.unpack_from(regset)[4] & SVE_PT_REGS_SVE)


def build(state: ThreadState, at: int = 0) -> bytes:
    """The signal frame that restores `state`, for the 16-byte aligned address `at`.

    It has FRAME_BYTES, or more where the SVE vectors are long: their record then follows the
    plain frame's records, at an address that the frame holds.
    uc_stack stays zero, which rt_sigreturn takes as "leave the alternate stack alone".
    """
    frame = bytearray(_RECORDS_AT)
    struct.pack_into("<Q", frame, _SIGMASK_AT, state.signal_mask)
    struct.pack_into("<Q", frame, _MCONTEXT_AT, 0)
    frame[_MCONTEXT_AT + 8 : _MCONTEXT_AT + 8 + 272] = state.registers.pack()
    frame += _fpsimd_record(state.fpsimd)
    if state.poe is not None:
        # Linux 6.12 restores garbage into POR_EL0 when this record is missing.
        frame += struct.pack("<II", _POE_MAGIC, 16) + state.poe[:8]
    if state.sve is not None and state.sve_live:
        record = _sve_record(state.sve)
        if len(frame) + len(record) + len(_TERMINATOR) > FRAME_BYTES:
            frame += _extra_record(at + len(frame), len(record) + len(_TERMINATOR))
        frame += record
    frame += _TERMINATOR
    return bytes(frame.ljust(FRAME_BYTES, b"\0"))


def build_calling(
    number: int,
    args: tuple[int, ...],
    *,
    gadget: int,
    home: int,
    sp: int = 0,
    poe: bytes | None = None,
    blocked: int = ALL_SIGNALS,
) -> bytes:
    """The frame of a thread that has no state of its own: it makes one call, then goes `home`.

    All signals stay blocked, unless `blocked` says otherwise: such a thread never runs a handler.
    """
    blank = Registers((0,) * 31, sp=sp, pc=0, pstate=0)
    registers = blank.calling(number, args, gadget=gadget, home=home)
    return build(ThreadState(registers, bytes(528), None, poe, blocked))


def register_at(number: int) -> int:
    """Where a frame holds that register: 0 to 30, or 31 for the stack pointer."""
    return _MCONTEXT_AT + 8 + number * 8


def _fpsimd_record(fpsimd: bytes) -> bytes:
    vectors, fpsr_fpcr = fpsimd[:512], fpsimd[512:520]
    return struct.pack("<II", _FPSIMD_MAGIC, _FPSIMD_BYTES) + fpsr_fpcr + vectors


def _sve_record(sve: bytes) -> bytes:
    vector_bytes: int = _SVE_HEADER.unpack_from(sve)[2]
    # Z0..Z31, P0..P15 and FFR; ptrace appends fpsr and fpcr, which the frame has elsewhere.
    payload = sve[_SVE_HEADER.size :][: vector_bytes // 16 * (32 * 16 + 16 * 2 + 2)]
    size = (16 + len(payload) + 15) // 16 * 16
    head = struct.pack("<IIHHHH", _SVE_MAGIC, size, vector_bytes, 0, 0, 0)
    return (head + payload).ljust(size, b"\0")


def _extra_record(at: int, length: int) -> bytes:
    # parse_user_sigframe wants a terminator, and right after it the data that the record points to.
    data_at = at + _EXTRA_BYTES + len(_TERMINATOR)
    head = struct.pack("<IIQI12x", _EXTRA_MAGIC, _EXTRA_BYTES, data_at, length)
    return head + _TERMINATOR
