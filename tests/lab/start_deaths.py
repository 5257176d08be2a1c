"""Run in the lab: start a VMM, and kill the companion that watches the start before each step.

`python3 -m tests.lab.start_deaths [every-call] [term] [stop] [service]` prints, as JSON, how each
VMM differed from one that was started plainly. A step is one request to the kernel that concerns
the VMM; before the death the VMM gets time to reach its next stop. With "term" the VMM gets a
SIGTERM one step earlier, which must end it. With "stop" the companion is stopped there instead, and
never continued. With "service" the companion is one of the companion service, and the VMM another
user's, started by the emulator wrapper.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtetool.attach import alarm, follow, memory, ptrace
from mtetool.backends.kvm.starting import Wish
from mtetool.companion import client, serving
from mtetool.companion.listening import listener
from mtetool.companion.service import Service
from mtetool.flows.exec import exec_vmm
from tests.lab.stride import deaths_before, turns

_VMM = ["/lab/testvmm", "--no-mte", "--vcpus", "1", "0x40000000:0x100000"]
_USER = 64055
_SOCKET = "/tmp/companion.sock"
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


@dataclass(frozen=True)
class Death:
    """How the companions die: at step `step` by `end`; `died` is set then.

    With `terminate` the VMM gets a SIGTERM one step earlier.
    """

    died: mmap.mmap
    terminate: bool
    end: signal.Signals
    step: int = 0


def die_at(death: Death, vmm: int) -> None:
    """Make the process that goes through the steps die so."""
    count, step = 0, death.step

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            nonlocal count
            count += 1
            if death.terminate and count == step - 1:
                death.died[0] = 1
                os.kill(vmm, signal.SIGTERM)
                time.sleep(_ARRIVE_SECONDS)
            if count == step:
                time.sleep(_ARRIVE_SECONDS)
                death.died[0] = 1
                os.kill(os.getpid(), death.end)
            return function(*arguments)

        return run

    ptrace._ptrace = counted(ptrace._ptrace)  # type: ignore[assignment]
    memory._transfer = counted(memory._transfer)  # type: ignore[assignment]
    follow.peek = counted(follow.peek)  # type: ignore[assignment]
    made = counted(alarm.IoctlAlarm.__init__)
    alarm.IoctlAlarm.__init__ = made  # type: ignore[method-assign,assignment]
    serving._message = counted(serving._message)  # type: ignore[assignment]
    serving._send = counted(serving._send)  # type: ignore[assignment]


def become_plainly() -> None:
    """Become the VMM."""
    os.execv(_VMM[0], _VMM)  # noqa: S606 - that is the point


def become_with_companion(death: Death, wish: Wish) -> None:
    """Become the VMM, attended by a companion that dies so."""
    die_at(death, os.getpid())
    exec_vmm(_VMM, wish)


def become_as_user(become: Callable[[], object]) -> None:
    """Do so as another user."""
    os.setgroups([])
    os.setresgid(_USER, _USER, _USER)
    os.setresuid(_USER, _USER, _USER)
    become()


def become_by_wrapper() -> None:
    """Become the VMM as the emulator wrapper does."""
    client.SOCKET, client.QEMU = _SOCKET, _VMM[0]
    sys.argv = _VMM
    client.main()


def start_service(death: Death) -> int:
    """Start the companion service, whose processes die so; return its PID."""
    made = listener(Path(_SOCKET))
    pid = os.fork()
    if pid == 0:

        def served(connection: socket.socket) -> None:
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            die_at(death, struct.unpack("3i", credentials)[0])
            serving.serve(connection, str)

        Service(made, served).run()
    made.close()
    return pid


def start(become: Callable[[], object]) -> tuple[int, int, int]:
    """Start the VMM in this way; return its PID, standard input and output."""
    stdin_there, stdin = os.pipe()
    stdout, stdout_there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(stdin_there, 0)
        os.dup2(stdout_there, 1)
        become()
    os.close(stdin_there)
    os.close(stdout_there)
    return pid, stdin, stdout


def state(pid: int) -> dict[str, Any]:
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
        asleep = now["status"]["State:"] == "S"
        if now == expected or (expected is None and asleep) or time.monotonic() > deadline:
            return now
        time.sleep(0.01)
    return {"said": ""}


def run(become: Callable[[], object], expected: dict[str, object] | None) -> dict[str, object]:
    """Start the VMM, let it end by itself, and return how it was."""
    pid, stdin, stdout = start(become)
    found = settled(pid, stdout, expected and {k: v for k, v in expected.items() if k != "end"})
    os.close(stdin)
    os.close(stdout)
    return {**found, "end": os.waitpid(pid, 0)[1]}


def main() -> None:
    """Die at every step in turn, until a start gets through alive."""
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python ignores them
    # If it dies before the VMM is started, that is reported and the VMM is started anyway.
    how = sys.argv[1:]
    wish = Wish(1, 60, False, "every-call" in how, lambda error: "")
    service = "service" in how
    end = signal.SIGSTOP if "stop" in how else signal.SIGKILL
    died = mmap.mmap(-1, 1)  # shared with the companion
    death = Death(died, "term" in how, end)
    plain = run(
        functools.partial(become_as_user, become_plainly) if service else become_plainly, None
    )
    harmed: dict[int, dict[str, object]] = {}
    first = 2 if death.terminate else 1
    for step in turns(first):
        died[0] = 0
        death = replace(death, step=step)
        if service:
            attended_by = start_service(death)
            found = run(functools.partial(become_as_user, become_by_wrapper), plain)
            os.kill(attended_by, signal.SIGKILL)
            os.waitpid(attended_by, 0)
        else:
            found = run(functools.partial(become_with_companion, death, wish), plain)
        as_told = found["end"] == signal.SIGTERM if death.terminate and died[0] else found == plain
        if not as_told:
            harmed[step] = found
            break
        if not died[0]:
            break
    print(json.dumps({"deaths": deaths_before(step, first), "harmed": harmed, "plain": plain}))


if __name__ == "__main__":
    main()
