"""Run in the lab: copy tags from and to a process, and kill mtetool before each step.

`python3 -m tests.lab.process_deaths PID ADDRESS` kills mtetool while it works on the page of
process PID at ADDRESS, whose tags it may change; with `--process` as the only argument it kills
the processes instead. It prints its findings as JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from mtetool.attach import steps
from mtetool.backends import open_guest
from mtetool.errors import GuestError
from tests.lab.stops import guards
from tests.lab.stride import deaths_before, turns

_SETTLE_SECONDS = 20.0
_KEYS = ("TracerPid:", "SigBlk:", "SigPnd:", "ShdPnd:")


def cycle(pid: int, address: int, value: int) -> None:
    """Do what the commands do to a process: attach, read, write, freeze, read, thaw."""
    tags = np.zeros(mmap.PAGESIZE // 16, dtype=np.uint8)
    with open_guest(f"proc:{pid}") as guest:
        guest.read_tags(address, tags)
        guest.write_tags(address, np.full_like(tags, value))
        guest.freeze()
        guest.read_tags(address, tags)
        guest.thaw()


def names(pid: int, address: int) -> list[str]:
    """Return the names of a cycle's steps."""
    cycle(pid, address, 1)
    seen: list[str] = []
    steps.on_step(seen.append)
    cycle(pid, address, 2)
    steps.on_step(None)
    return seen


def before(number: int, victim: int) -> steps.Hook:
    """Return a hook that kills `victim` before that step, counted from 1."""
    count = 0

    def hook(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(victim, signal.SIGKILL)

    return hook


def state(pid: int) -> dict[str, object]:
    """Return what a death must leave as it was; and no thread may be stopped."""
    tasks = sorted(Path(f"/proc/{pid}/task").iterdir())
    lines = [line.split() for task in tasks for line in (task / "status").read_text().splitlines()]
    return {
        "threads": len(tasks),
        "status": [line for line in lines if line[0] in _KEYS],
        "stopped": [line for line in lines if line[0] == "State:" and line[1] in "tTZ"],
        "guards": guards(),
        "memory": [line.split()[:2] for line in Path(f"/proc/{pid}/maps").open()],
    }


def settled(pid: int, wanted: dict[str, object]) -> dict[str, object] | None:
    """Wait until the process is in that state; return its state if it never is, else None."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (now := state(pid)) != wanted:
        if time.monotonic() > deadline:
            return now
        time.sleep(0.01)
    return None


def kill_mtetool(pid: int, address: int) -> dict[str, object]:
    """Die at every step in turn, until a cycle completes."""
    of_a_cycle = names(pid, address)
    wanted, harmed = state(pid), {}
    for number in turns():
        child = os.fork()
        if child == 0:
            steps.on_step(before(number, os.getpid()))
            cycle(pid, address, number % 15)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if (now := settled(pid, wanted)) is not None:
            harmed[number] = now
            break
        if os.WIFEXITED(status):
            break
    result = {"deaths": deaths_before(number), "steps": of_a_cycle, "last_status": status}
    return {**result, "harmed": harmed, "wanted": wanted}


def start() -> tuple[subprocess.Popen[bytes], int]:
    """Start a process with tagged memory; return it, and the memory's address."""
    words = ["/lab/tagged", "--at", "0x40000000:0x10000"]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    return process, 0x40000000


def working(pid: int, address: int, number: int) -> int:
    """Run a cycle and kill the process at that step; return 0 for success, 4 for an error."""
    hook, count = before(number, pid), 0

    def counting(name: str) -> None:
        nonlocal count
        count += 1
        hook(name)

    steps.on_step(counting)
    try:
        cycle(pid, address, 5)
    except GuestError:
        return 4
    # At the last steps, nothing can fail any more.
    return 4 if count >= number else 0


def kill_processes() -> dict[str, object]:
    """Kill a process at every step of a cycle in turn."""
    statuses: Counter[str] = Counter()
    stuck: list[object] = []
    for number in turns():
        process, address = start()
        child = os.fork()
        if child == 0:
            os._exit(working(process.pid, address, number))
        deadline = time.monotonic() + _SETTLE_SECONDS
        while not (done := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                stuck.append([number, "mtetool"])
            time.sleep(0.005)
        status = os.waitstatus_to_exitcode(done[1])
        if status == 0:
            process.kill()
            process.wait()
            break
        statuses[str(status)] += 1
        try:
            process.wait(_SETTLE_SECONDS)
        except subprocess.TimeoutExpired:
            stuck.append([number, "process"])
    return {"deaths": deaths_before(number), "statuses": statuses, "stuck": stuck}


def main() -> None:
    """Kill mtetool or the processes, as the arguments say."""
    if sys.argv[1] == "--process":
        print(json.dumps(kill_processes()))
    else:
        print(json.dumps(kill_mtetool(int(sys.argv[1]), int(sys.argv[2], 0))))


if __name__ == "__main__":
    main()
