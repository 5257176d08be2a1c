"""The registers of vCPUs, asked of the kernel in the VMM.

KVM_GET_ONE_REG waits for the vCPU's mutex, which KVM_RUN holds as long as the vCPU is in the guest:
for ever, if the guest has nothing to do. A thread that waits so can only be killed, not stopped. So
mtetool asks only while every thread that could be in KVM_RUN is stopped by ptrace, which has led it
out of that call: for as long as a few calls take, once for all vCPUs. If an answer does not come at
once all the same, mtetool ends, and with it all that it holds; the VM then goes on.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.backends.kvm.page_tables import Registers
from mtetool.backends.kvm.vcpus import hold_vcpus
from mtetool.errors import BusyError, GuestLostError, NoVcpuError, PageTableError, errno_name

# For all to stop, and then for each register: a matter of microseconds. A save that was asked to
# stop the guest waits longer for threads that do not stop; a look at it must not.
_PATIENCE_SECONDS = 5.0

_PSTATE = uapi.KVM_REG_ARM_PSTATE
_SCTLR = uapi.arm64_sys_reg(3, 0, 1, 0, 0)
_TTBR0 = uapi.arm64_sys_reg(3, 0, 2, 0, 0)
_TTBR1 = uapi.arm64_sys_reg(3, 0, 2, 0, 1)
_TCR = uapi.arm64_sys_reg(3, 0, 2, 0, 2)
_TCR2 = uapi.arm64_sys_reg(3, 0, 2, 0, 3)
_VBAR = uapi.arm64_sys_reg(3, 0, 12, 0, 0)
_ALL = (_PSTATE, _SCTLR, _TCR, _TTBR0, _TTBR1, _VBAR, _TCR2)
# Kernels before 6.13, and CPUs without FEAT_TCR2, have no such register.
_OPTIONAL = frozenset({_TCR2})
_ANSWER_BYTES = 8
# PSTATE.M: AArch64 at EL2, where a guest that is a hypervisor runs.
_MODE, _EL2 = 0x1C, 0x08


class Vcpu:
    """What was asked of one vCPU; a register that it does not have is 0."""

    def __init__(self, number: int, values: Mapping[int, int]) -> None:
        self.number = number
        self.vectors = values[_VBAR]
        """Where its exception vectors are, which every kernel maps."""
        self.registers = Registers(
            sctlr=values[_SCTLR],
            tcr=values[_TCR],
            ttbr0=values[_TTBR0],
            ttbr1=values[_TTBR1],
            tcr2=values[_TCR2],
        )
        if values[_PSTATE] & _MODE == _EL2:
            raise PageTableError(
                f"vCPU {number} runs a hypervisor (at EL2), whose page tables mtetool cannot read",
                hint="choose another vCPU: --vcpu N",
                vcpu=number,
            )


def ask_vcpus(
    session: Session, pid: int, n_vcpus: int, fds: Mapping[int, int], *, held: bool
) -> list[Vcpu]:
    """Ask vCPUs, by their number and file descriptor; `n_vcpus` are all that the VM has.

    The transfer buffer must not be in use. With `held` all of them are held already. Raises
    NoVcpuError, PageTableError, BusyError, and what holding raises.
    """
    with _held(session, pid, n_vcpus, held=held):
        answers = {number: list(_ask(session, number, fd)) for number, fd in fds.items()}
    return [
        Vcpu(number, dict(zip(_ALL, values, strict=True))) for number, values in answers.items()
    ]


@contextmanager
def _held(session: Session, pid: int, n_vcpus: int, *, held: bool) -> Iterator[None]:
    if held:
        yield
        return
    try:
        hold_vcpus(session, pid, n_vcpus, main_too=True, patience=_PATIENCE_SECONDS)
        yield
    except BaseException:
        # Where this cannot be done any more, that mtetool ends does it.
        with suppress(BusyError, GuestLostError):
            session.release()
        raise
    session.release()


def _ask(session: Session, number: int, fd: int) -> Iterator[int]:
    for register in _ALL:
        argument = uapi.KVM_ONE_REG_STRUCT.pack(register, session.buffer_address)
        begun = session.begin_ioctl(fd, uapi.KVM_GET_ONE_REG, argument)
        result = session.finish(begun, _PATIENCE_SECONDS)
        if result == -errno.ENOENT and register in _OPTIONAL:
            yield 0
            continue
        if result < 0:
            why = "it was never initialized" if result == -errno.ENOEXEC else errno_name(-result)
            raise NoVcpuError(
                f"the registers of vCPU {number} of process {session.pid} cannot be read: {why}",
                hint="choose another vCPU: --vcpu N",
                vcpu=number,
                errno=errno_name(-result),
            )
        answer = bytearray(_ANSWER_BYTES)
        session.read_buffer(memoryview(answer))
        yield int.from_bytes(answer, "little")
