"""Finding the vCPU threads of a VMM and stopping them, for `save --freeze` and `--virtual`.

Only KVM_RUN identifies a vCPU's thread, and a running thread shows its call only when it is
stopped. So mtetool stops the threads that may be vCPUs, and releases at once those that turn out
not to be. If it finds fewer than the VM has (a vCPU halted in the VMM's own code looks like any
waiting thread), it holds all threads except a main thread that waits elsewhere.
"""

from __future__ import annotations

from mtetool import uapi
from mtetool.attach.ptrace import Registers
from mtetool.attach.session import Session
from mtetool.attach.tracer import CALL_PATIENCE_SECONDS
from mtetool.vmm import proc
from mtetool.vmm.proc import Activity

_NR_IOCTL = 29
# Threads made meanwhile are held as well, but a VMM may make them without end.
_ROUNDS = 20


def hold_vcpus(
    session: Session,
    pid: int,
    n_vcpus: int,
    *,
    main_too: bool = False,
    patience: float = CALL_PATIENCE_SECONDS,
) -> int:
    """Stop the threads of all vCPUs; return how many threads are held.

    With `main_too`, no thread that might be a vCPU's is spared. If they do not all stop within
    `patience`, the session cannot be used any more.

    Raises GuestError subclasses; threads held by then stay held until `session.release`.
    """
    seen = proc.activities(pid)
    suspects = {tid for tid, was in seen.items() if was is not Activity.BLOCKED}
    suspects.discard(session.helper_tid)
    held = session.hold(suspects, patience)
    vcpus = {tid for tid in held if seen[tid] is Activity.VCPU or _was_in_kvm_run(held[tid])}
    if len(vcpus) >= n_vcpus:
        session.release(set(held) - vcpus)
        return len(vcpus)
    spared = pid not in suspects and not main_too
    return len(held) + _hold_others(session, pid, patience, spared=spared)


def _hold_others(session: Session, pid: int, patience: float, *, spared: bool) -> int:
    """Stop all threads, new ones too, except ours and, if `spared`, the main one."""
    n_held, left = 0, {session.helper_tid} | ({pid} if spared else set())
    for _ in range(_ROUNDS):
        more = session.hold(set(proc.activities(pid)) - left, patience)
        if not more:
            break
        n_held += len(more)
    return n_held


def _was_in_kvm_run(registers: Registers) -> bool:
    # The stop ended the call; its number and arguments are still in place, except x0.
    return registers.x[8] == _NR_IOCTL and registers.x[1] == uapi.KVM_RUN
