"""Which threads of a VMM are its vCPUs, and stopping them: what `save --freeze` does.

Nothing but KVM_RUN tells a vCPU's thread, and a thread that runs shows its call only when it
is stopped. So those are stopped that may be vCPUs, and those that turned out not to be are let
go at once. Where fewer are found than the VM has (one that is halted in the VMM's own code
looks like any waiting thread), all threads are held but a main thread that waits elsewhere.
"""

from __future__ import annotations

from mtetool import uapi
from mtetool.attach.ptrace import Registers
from mtetool.attach.session import Session
from mtetool.vmm import proc
from mtetool.vmm.proc import Activity

_NR_IOCTL = 29
# A thread that is made meanwhile is held as well; a VMM that makes them without end is not.
_ROUNDS = 20


def hold_vcpus(session: Session, pid: int, n_vcpus: int) -> int:
    """Stop the threads of all vCPUs; how many threads are held then.

    Raises GuestError subclasses; what is held by then is held until `session.release`.
    """
    seen = proc.activities(pid)
    suspects = {tid for tid, was in seen.items() if was is not Activity.BLOCKED}
    suspects.discard(session.helper_tid)
    held = session.hold(suspects)
    vcpus = {tid for tid in held if seen[tid] is Activity.VCPU or _was_in_kvm_run(held[tid])}
    if len(vcpus) >= n_vcpus:
        session.release(set(held) - vcpus)
        return len(vcpus)
    return len(held) + _hold_others(session, pid, spared=pid not in suspects)


def _hold_others(session: Session, pid: int, *, spared: bool) -> int:
    """Stop all threads, new ones too, but ours and, if `spared`, the main one."""
    n_held, left = 0, {session.helper_tid} | ({pid} if spared else set())
    for _ in range(_ROUNDS):
        more = session.hold(set(proc.activities(pid)) - left)
        if not more:
            break
        n_held += len(more)
    return n_held


def _was_in_kvm_run(registers: Registers) -> bool:
    # The stop ended the call; its number and arguments stand where they were, but for x0.
    return registers.x[8] == _NR_IOCTL and registers.x[1] == uapi.KVM_RUN
