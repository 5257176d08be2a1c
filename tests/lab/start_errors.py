"""Run in the lab: start a VMM with MTE required, and make the companion's requests fail.

`python3 -m tests.lab.start_errors` makes each request to the kernel fail in turn, one per start
and each in another way, and prints, as JSON, how many failed, and the starts with a wrong result:
a VM without MTE.
"""

from __future__ import annotations

import errno
import functools
import json
import mmap
import os
from collections.abc import Callable

from mtetool.attach import alarm, follow, memory, ptrace, stderr
from mtetool.backends.kvm.starting import Wish
from mtetool.errors import BusyError, MtetoolError
from mtetool.flows.exec import exec_vmm
from tests.lab.stride import deaths_before, turns

_VMM = ["/lab/newvms", "1"]
_MTE, _NO_VM = "vm 1 mte=1\nready\n", f"vm 1 errno={errno.EOPNOTSUPP} open=0\nready\n"
_NOT_STARTED = 4
_ERRORS: tuple[Callable[[], Exception], ...] = (
    lambda: OSError(errno.EPERM, os.strerror(errno.EPERM)),
    lambda: BusyError("it is not its day"),
    lambda: RuntimeError("this cannot be"),
)


def fail_at(step: int, failed: mmap.mmap) -> None:
    """Make the step fail, and everything after it succeed; `failed` is set then."""
    count = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal count
            count += 1
            if count == step:
                failed[0] = 1
                raise _ERRORS[step % len(_ERRORS)]()
            return function(*arguments)

        return run

    ptrace._ptrace = counted(ptrace._ptrace)  # type: ignore[assignment]
    memory._transfer = counted(memory._transfer)  # type: ignore[assignment]
    follow.peek = counted(follow.peek)  # type: ignore[assignment]
    stderr._duplicate = counted(stderr._duplicate)  # type: ignore[assignment]
    made = counted(alarm.IoctlAlarm.__init__)
    alarm.IoctlAlarm.__init__ = made  # type: ignore[method-assign,assignment]


def run(prepare: Callable[[], None]) -> tuple[str, int]:
    """Start the VMM; return what it printed, and its exit code."""
    stdout, stdout_there = os.pipe()
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(stdout_there, 1)
        os.dup2(null, 2)
        prepare()
        try:
            exec_vmm(_VMM, Wish(1, 60, True, False, str))
        except MtetoolError:
            os._exit(_NOT_STARTED)
    os.close(stdout_there)
    with os.fdopen(stdout, "rb") as said:
        text = said.read().decode()
    return text, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> None:
    """Fail at every step in turn, until a start completes without a failure."""
    failed = mmap.mmap(-1, 1)  # shared with the companion
    wrong: dict[int, tuple[str, int]] = {}
    ends: dict[str, int] = {}
    first = 1
    for step in turns(first):
        failed[0] = 0
        said, end = run(functools.partial(fail_at, step, failed))
        ends[f"{said}{end}"] = ends.get(f"{said}{end}", 0) + 1
        if (said, end) not in ((_MTE, 7), (_NO_VM, 7), ("", _NOT_STARTED), ("", -9)):
            wrong[step] = said, end
        if not failed[0]:
            break
    print(json.dumps({"errors": deaths_before(step, first), "wrong": wrong, "ends": ends}))


if __name__ == "__main__":
    main()
