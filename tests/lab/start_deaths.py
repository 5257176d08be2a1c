"""Run in the lab: start a VMM, and kill the companion that watches the start before each step.

`python3 -m tests.lab.start_deaths [every-call] [term] [stop]` prints, as JSON, how each VMM
differed from one that was started plainly. A step is one request to the kernel that concerns the
VMM; before the death the VMM gets time to reach its next stop. With "term" the VMM gets a SIGTERM
one step earlier, which must end it. With "stop" the companion is stopped there instead, and never
continued.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mtetool.attach import alarm, follow, memory, ptrace
from mtetool.backends.kvm.starting import Wish
from mtetool.flows.exec import exec_vmm
from tests.lab.stride import deaths_before, turns

_VMM = ["/lab/testvmm", "--no-mte", "--vcpus", "1", "0x40000000:0x100000"]
_SETTLE_SECONDS = 20.0
_ARRIVE_SECONDS = 0.03
_KEPT = (
    "State",
    "TracerPid",
    "Threads",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "Seccomp",
)


def die_at(step: int, died: mmap.mmap, terminate: bool, end: signal.Signals) -> None:
    """Make the process that goes through the steps get `end` before this one, and set `died`."""
    count, vmm = 0, os.getpid()

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal count
            count += 1
            if terminate and count == step - 1:
                died[0] = 1
                os.kill(vmm, signal.SIGTERM)
                time.sleep(_ARRIVE_SECONDS)
            if count == step:
                time.sleep(_ARRIVE_SECONDS)
                died[0] = 1
                os.kill(os.getpid(), end)
            return function(*arguments)

        return run

    ptrace._ptrace = counted(ptrace._ptrace)  # type: ignore[assignment]
    memory._transfer = counted(memory._transfer)  # type: ignore[assignment]
    follow.peek = counted(follow.peek)  # type: ignore[assignment]
    made = counted(alarm.IoctlAlarm.__init__)
    alarm.IoctlAlarm.__init__ = made  # type: ignore[method-assign,assignment]


def start(prepare: Callable[[], None] | None, wish: Wish) -> tuple[int, int, int]:
    """Start the VMM, plainly without `prepare`; return its PID, standard input and output."""
    stdin_there, stdin = os.pipe()
    stdout, stdout_there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(stdin_there, 0)
        os.dup2(stdout_there, 1)
        if prepare is None:
            os.execv(_VMM[0], _VMM)  # noqa: S606 - that is the point
        prepare()
        exec_vmm(_VMM, wish)
    os.close(stdin_there)
    os.close(stdout_there)
    return pid, stdin, stdout


def state(pid: int) -> dict[str, object]:
    """Return what a death must leave as in a plain start."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    fds = sorted(Path(f"/proc/{pid}/fd").iterdir())
    return {
        "status": {line[0]: line[1] for line in lines if line[0].rstrip(":") in _KEPT},
        "fds": [str(path.readlink()).split("[")[0] for path in fds],
        "children": Path(f"/proc/{pid}/task/{pid}/children").read_text(),
    }


def settled(pid: int, stdout: int, expected: dict[str, object] | None) -> dict[str, object]:
    """Return the VMM's state after it is ready, as soon as it is the expected one."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    said = os.read(stdout, 100)
    while said:
        now = {"said": said.decode(), **state(pid)}
        sleeps = "S" in str(now.get("status"))
        if now == expected or (expected is None and sleeps) or time.monotonic() > deadline:
            return now
        time.sleep(0.01)
    return {"said": ""}


def run(
    prepare: Callable[[], None] | None, wish: Wish, expected: dict[str, object] | None
) -> dict[str, object]:
    """Start the VMM, let it end by itself, and return how it was."""
    pid, stdin, stdout = start(prepare, wish)
    found = settled(pid, stdout, expected and {k: v for k, v in expected.items() if k != "end"})
    os.close(stdin)
    os.close(stdout)
    return {**found, "end": os.waitpid(pid, 0)[1]}


def main() -> None:
    """Die at every step in turn, until a start gets through alive."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them
    # If it dies before the VMM is started, that is reported and the VMM is started anyway.
    wish = Wish(1, 60, False, "every-call" in sys.argv[1:], lambda error: "")
    terminate = "term" in sys.argv[1:]
    end = signal.SIGSTOP if "stop" in sys.argv[1:] else signal.SIGKILL
    plain = run(None, wish, None)
    died = mmap.mmap(-1, 1)  # shared with the companion
    harmed: dict[int, dict[str, object]] = {}
    first = 2 if terminate else 1
    for step in turns(first):
        died[0] = 0
        found = run(functools.partial(die_at, step, died, terminate, end), wish, plain)
        as_told = found["end"] == signal.SIGTERM if terminate and died[0] else found == plain
        if not as_told:
            harmed[step] = found
            break
        if not died[0]:
            break
    print(json.dumps({"deaths": deaths_before(step, first), "harmed": harmed, "plain": plain}))


if __name__ == "__main__":
    main()
