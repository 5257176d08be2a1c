"""Run in the lab: attach to a VMM whose main thread watches its own registers and calls.

`python3 -m tests.lab.holders WHAT MODE...` starts a holder for each mode, one after the other,
and prints each holder's counts as JSON: `registers` attaches to it, and is also killed at steps
throughout; `calls` attaches until the holder's call returns; `signals` sends it numbered signals
meanwhile; `faults` makes it fault in the middle of the borrow; `stopped` attaches to a holder that
a signal has stopped where it cannot be borrowed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from mtetool.attach import gadgets, steps
from mtetool.backends import open_guest
from mtetool.errors import AttachRefusedError
from mtetool.guest import GuestOptions, Memslot

_MEMORY = Memslot(0, 0x40000000, 1 << 20)
_COUNTS = Path("/tmp/holder.counts")
_FIELDS = ("rounds", "changed", "early", "late_ms", "signals", "disorder", "unbroken")
_ATTACHES = 4
_DEATHS = 10
_MOST_ATTACHES = 120
_FEW_ATTACHES = 4
# How long a call of two seconds has lasted at the first attach.
_LATE_SECONDS = 1.4
_SIGNAL_ATTACHES = 15
# A step at which the thread is in the middle of a call of mtetool's.
_MIDDLE = 40
_PATIENCE_SECONDS = 30.0
_SIGRTMIN = 34

_libc = ctypes.CDLL(None)


def attach(pid: int) -> bool:
    """Attach, read, detach; return whether the attach succeeded."""
    tags = np.zeros(4096, dtype=np.uint8)
    try:
        with open_guest(f"kvm:{pid}", GuestOptions(memslots=(_MEMORY,))) as guest:
            guest.read_tags(_MEMORY.ipa, tags)
    except AttachRefusedError as error:
        print(error.message, file=sys.stderr)
        return False
    return True


def counts() -> dict[str, int]:
    """Return what the holder has counted so far."""
    data = _COUNTS.read_bytes()[: 8 * len(_FIELDS)]
    return dict(zip(_FIELDS, struct.unpack(f"<{len(_FIELDS)}Q", data), strict=True))


@contextmanager
def holder(mode: str) -> Iterator[int | None]:
    """Run a holder; yield its PID, or None if this machine lacks what the mode needs."""
    # It is never idle, and an attach needs the CPU.
    words = ["/lab/holder", mode, str(_COUNTS)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, preexec_fn=lambda: os.nice(19))
    assert process.stdout is not None
    ready = process.stdout.readline() == b"ready\n"
    try:
        if ready and not mode.endswith(("-for-ever", "read")):
            wait_for(lambda: process.poll() is not None or counts()["rounds"] > 0)
        yield process.pid if ready else None
        if ready:
            assert process.poll() is None, f"the holder ended: {process.returncode}"
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


def names_of_steps(pid: int) -> list[str]:
    """Return the names of an attach's steps."""
    names: list[str] = []
    steps.on_step(names.append)
    attach(pid)
    steps.on_step(None)
    return names


def at_number(number: int) -> steps.Hook:
    """Return a hook that kills this process before that step, counted from 1."""
    count = 0

    def hook(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def before_a_signal_is_passed_on(name: str) -> None:
    """Kill this process while it has one of the holder's signals in hand (a hook)."""
    if name.endswith("-signal"):
        os.kill(os.getpid(), signal.SIGKILL)


def die(pid: int, hook: steps.Hook) -> bool:
    """Attach in another process, with that hook; wait until the holder is alone again.

    Return whether the hook has killed that process.
    """
    child = os.fork()
    if child == 0:
        steps.on_step(hook)
        attach(pid)
        os._exit(0)
    _, end = os.waitpid(child, 0)
    task = Path(f"/proc/{pid}/task")
    wait_for(lambda: len(list(task.iterdir())) == 1 and "TracerPid:\t0" in status(pid))
    return os.WIFSIGNALED(end)


def status(pid: int) -> str:
    """Return the main thread's status."""
    return Path(f"/proc/{pid}/task/{pid}/status").read_text()


def blocked(pid: int) -> str:
    """Return the signals that the main thread blocks."""
    return next(line for line in status(pid).splitlines() if line.startswith("SigBlk"))


def registers(pid: int) -> dict[str, object]:
    """Attach, and die at steps; the holder's loop goes on all the time."""
    mask, done = blocked(pid), 0
    for _ in range(_ATTACHES):
        done += attach(pid)
    n_steps = len(names_of_steps(pid))
    for number in range(_DEATHS if done else 2):
        die(pid, at_number(1 + number * n_steps // _DEATHS))
    attach(pid)
    rounds = counts()["rounds"]
    wait_for(lambda: counts()["rounds"] > rounds + 2)
    return {"attached": done, "steps": n_steps, "mask_kept": blocked(pid) == mask}


def calls(pid: int) -> dict[str, object]:
    """Attach late in a call, and until it returns; or to a call that waits for ever.

    Then die in the middle of the borrow, in a call that was interrupted before and in one that
    was not.
    """
    attach(pid)  # the first one loads modules, and is slow
    rounds = counts()["rounds"]
    if rounds:
        wait_for(lambda: counts()["rounds"] > rounds)
        rounds += 1
        time.sleep(_LATE_SECONDS)
    attaches = 0
    most = _MOST_ATTACHES if rounds else _FEW_ATTACHES
    while counts()["rounds"] < rounds + 1 and attaches < most:
        attach(pid)
        attaches += 1
    result = {"attaches": attaches, "came_back": counts()["rounds"] - rounds}
    result["late_without_death_ms"] = counts()["late_ms"]
    last = counts()["rounds"]
    for death in (True, True, False, True):
        if death:
            die(pid, at_number(_MIDDLE))
        else:
            attach(pid)
    if rounds:
        wait_for(lambda: counts()["rounds"] > last)
    return {**result, "attached_at_ms": int(_LATE_SECONDS * 1000)}


def signals(pid: int) -> dict[str, object]:
    """Attach while signals are sent: three together, the next after these have been handled."""
    stop = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            for _ in range(3):
                _libc.sigqueue(pid, _SIGRTMIN, ctypes.c_void_p(sent))
                sent += 1
            wait_for(lambda number=sent: counts()["signals"] >= number)  # type: ignore[misc]
            time.sleep(0.01)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    for _ in range(_SIGNAL_ATTACHES):
        attach(pid)
    deaths = sum(die(pid, before_a_signal_is_passed_on) for _ in range(_SIGNAL_ATTACHES))
    stop.set()
    sender.join()
    return {"sent": sent, "deaths": deaths}


def faults(pid: int) -> dict[str, object]:
    """Attach with an instruction that is not where mtetool finds it: the thread faults on it."""
    find = gadgets.find
    gadgets.find = lambda pid: replace(find(pid), svc_ret=0x1000)  # nothing is mapped there
    done = attach(pid)
    gadgets.find = find
    return {"faulted": not done, **registers(pid)}


def stopped(pid: int) -> dict[str, object]:
    """Attach to a holder that is stopped as a whole; count how often it was continued."""
    wait_for(lambda: counts()["rounds"] > 0)
    os.kill(pid, signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in status(pid))
    rounds = counts()["rounds"]
    let_on = sum(name.endswith("/cont") for name in names_of_steps(pid))
    ran = counts()["rounds"] - rounds
    return {"let_on": let_on, "ran": ran, "still": "State:\tT" in status(pid)}


def main() -> None:
    """Run each mode in turn."""
    what = {f.__name__: f for f in (registers, calls, signals, faults, stopped)}[sys.argv[1]]
    found: dict[str, object] = {}
    for mode in sys.argv[2:]:
        started = time.monotonic()
        with holder(mode) as pid:
            result = what(pid) if pid is not None else None
            seconds = round(time.monotonic() - started, 1)
            found[mode] = result and {**result, **counts(), "seconds": seconds}
            print(mode, found[mode], file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
