"""Run in the lab: attach, copy, freeze and detach, killed before each of its steps.

`python3 -m tests.lab.deaths PID [no-exit]` forks a mtetool for each step (see
`mtetool.attach.steps`) and prints, as JSON, the VMM's state after each death. With "no-exit"
mtetool acts as if the VMM's C library lacked the instructions that end a thread, as in a
statically linked VMM.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import cast

import numpy as np

from mtetool.attach import gadgets, steps
from mtetool.backends import open_guest
from mtetool.backends.kvm.guest import KvmGuest
from mtetool.backends.kvm.registers import ask_vcpus
from mtetool.guest import GuestOptions, Memslot
from mtetool.vmm import proc
from tests.lab.stops import guards
from tests.lab.stride import deaths_before, turns

_MEMORY = Memslot(0, 0x40000000, 1 << 20)
_SETTLE_SECONDS = 20.0


def cycle(pid: int) -> None:
    """Do what the commands do to a VMM: attach, copy, freeze, copy, detach; also in chains.

    And ask its vCPUs for their registers, for which they are stopped.
    """
    tags, scattered = (np.zeros(n, dtype=np.uint8) for n in (4096, 2048))
    pages = np.array([[_MEMORY.ipa + 8192 * n, 4096] for n in range(8)], np.uint64)
    with open_guest(f"kvm:{pid}", GuestOptions(memslots=(_MEMORY,))) as guest:
        guest.read_tags(_MEMORY.ipa, tags)
        assert guest.read_scattered(pages, scattered) == 8 * 4096
        if fds := proc.vcpu_fds(pid):
            asked = ask_vcpus(cast(KvmGuest, guest).vm.session, pid, len(fds), fds, held=False)
            assert len(asked) == len(fds)
        guest.freeze()
        guest.write_tags(_MEMORY.ipa, tags)
        assert guest.write_scattered(pages, scattered) == 8 * 4096
        guest.thaw()


def die_at(number: int) -> None:
    """Make this process be killed before that step, counted from 1."""
    count = 0

    def hook(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.on_step(hook)


def leave_a_mapping(pid: int) -> None:
    """Die where the most is left behind, so the next attach has to remove it."""
    child = os.fork()
    if child == 0:
        steps.on_step(steps.fault("KILL@helper/setoptions"))
        cycle(pid)
        os._exit(0)
    os.waitpid(child, 0)


def names(pid: int) -> list[str]:
    """Return the names of all steps: of a cycle, and of one that removes what a death left."""
    cycle(pid)
    seen: list[str] = []
    steps.on_step(seen.append)
    cycle(pid)
    steps.on_step(None)
    leave_a_mapping(pid)
    steps.on_step(seen.append)
    cycle(pid)
    steps.on_step(None)
    return seen


def state(pid: int) -> dict[str, object]:
    """Return what a death must leave as it was."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir())
    keys = ("SigBlk", "TracerPid", "State", "SigPnd")
    lines = [line.split() for task in tasks for line in (task / "status").read_text().splitlines()]
    kept = [line for line in lines if line[0].rstrip(":") in keys and line[0] != "State:"]
    stopped = [line for line in lines if line[0] == "State:" and line[1] in "tTZ"]
    threads = {"threads": len(tasks), "status": kept, "stopped": stopped, "fds": fds(pid)}
    return {**threads, "guards": guards()}


def fds(pid: int) -> list[str]:
    """Return what the VMM's file descriptors refer to."""
    links = (path.readlink() for path in sorted(Path(f"/proc/{pid}/fd").iterdir()))
    return [str(link) for link in links if "qmp" not in str(link)]


def settled(pid: int, before: dict[str, object], but: str = "") -> dict[str, object] | None:
    """Wait until the VMM is as `before`, except `but`; return its state if it never is."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        try:
            now = state(pid)
        except OSError as error:
            now = {"error": str(error)}
        if {**now, but: 0} == {**before, but: 0}:
            return None
        if time.monotonic() > deadline:
            return now
        time.sleep(0.02)


def mappings(pid: int) -> int:
    """Return how many mappings of mtetool's the VMM has."""
    return sum(line.startswith("6d74") for line in Path(f"/proc/{pid}/maps").open())


def main() -> None:
    """Die at every step in turn, until a cycle completes."""
    pid = int(sys.argv[1])
    if "no-exit" in sys.argv[2:]:
        gadgets._find_exit = lambda pid, maps: None
    steps_of_a_cycle = names(pid)
    before, harmed, left = state(pid), {}, 0
    leave_a_mapping(pid)
    for step in turns():
        child = os.fork()
        if child == 0:
            die_at(step)
            cycle(pid)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if (after := settled(pid, before)) is not None:
            harmed[step] = after
            break
        left = max(left, mappings(pid))
        if os.WIFEXITED(status):
            break
    result = {
        "deaths": deaths_before(step),
        "steps": steps_of_a_cycle,
        "last_status": status,
        "harmed": harmed,
        "before": before,
        "most_mappings_left": left,
        "mappings_in_the_end": mappings(pid),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
