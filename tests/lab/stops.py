"""Run in the lab: stop mtetool, in every possible way, while it holds a guest's vCPUs.

`python3 -m tests.lab.stops PID [TIMES]` prints, as JSON, what happened to mtetool and to the VMM
with that PID each time, and for how long its guest stood still after a SIGSTOP (measured TIMES
times).
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from mtetool.attach import steps

_PATIENCE_SECONDS = 300.0
_F_SETPIPE_SZ = 1031
# Reached before the first of the held vCPUs is let go.
_HELD = "thaw/detach"
_WRITE_TO_STDERR = "64 0x2 "
_SNAPSHOT = "/tmp/stops.out"


class Guest:
    """The threads of a VMM's vCPUs: those that are named like QEMU's, or else all."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        self._vcpus = [t for t in tasks if "KVM" in (t / "comm").read_text()] or tasks

    def stands(self) -> bool:
        """Return whether a vCPU is held."""
        return any(fields(task)[0] == "t" for task in self._vcpus)

    def used(self) -> list[int]:
        """Return the CPU time that each vCPU has used."""
        return [int(f[11]) + int(f[12]) for f in map(fields, self._vcpus)]

    def goes_on(self) -> float:
        """Wait until the guest has run; return for how many seconds it did not."""
        since = time.monotonic()
        used = self.used()
        until(lambda: not self.stands() and self.used() != used)
        return time.monotonic() - since


def fields(process: Path) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return (process / "stat").read_text().rpartition(")")[2].split()


def until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.004)


def save(guest: Guest, *more: str) -> list[str]:
    """Return a save command that freezes the guest."""
    words = ["mtetool", "save", f"kvm:{guest.pid}", "--freeze", "--force", "-o", _SNAPSHOT]
    return [*words, "--memslot", "0x40000000:64M", *more]


def start(
    words: list[str], *, signal_held: str = "", prepare: Callable[[], object] = lambda: None
) -> int:
    """Start mtetool in a forked child, where `prepare` is called first; return its PID.

    With `signal_held`, it gets that signal while it holds the vCPUs.
    """
    child = os.fork()
    if child == 0:
        status = 70
        try:
            from mtetool.__main__ import main

            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            prepare()
            steps.on_step(steps.fault(f"{signal_held}@{_HELD}") if signal_held else None)
            sys.argv = words
            status = main()
        finally:
            os._exit(status)
    return child


def status_of(pid: int) -> int:
    """Wait for a child's end; return its status, or -N for signal N."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def whole() -> bool:
    """Return whether the snapshot is whole."""
    return status_of(start(["mtetool", "verify", _SNAPSHOT])) == 0


def by_sigstop(guest: Guest) -> tuple[int, float]:
    """Return how mtetool ended, and for how long the guest stood still after the stop."""
    pid = start(save(guest), signal_held="STOP")
    until(lambda: fields(Path(f"/proc/{pid}"))[0] in "TZX")
    seconds = guest.goes_on()
    return status_of(pid), seconds


def by_sigtstp(guest: Guest) -> dict[str, object]:
    """Send Ctrl-Z's signal while the vCPUs are held, in a job of its own."""
    pid = start(save(guest), signal_held="TSTP", prepare=lambda: os.setpgid(0, 0))
    return stopped_and_continued(guest, pid)


def stopped_and_continued(guest: Guest, pid: int) -> dict[str, object]:
    """Wait until a job stops, continue it, wait for its end; return what happened."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    found: dict[str, object] = {"stopped": os.WIFSTOPPED(status), "held": guest.stands()}
    guest.goes_on()
    if os.WIFSTOPPED(status):
        os.kill(pid, signal.SIGCONT)
        _, status = os.waitpid(pid, 0)
    return {**found, "status": os.waitstatus_to_exitcode(status), "whole": whole()}


def at_a_terminal(work: Callable[[int], object]) -> dict[str, object]:
    """Call `work` with the master's end, as leader of a terminal's session; return its result."""
    reading, writing = os.pipe()
    master, terminal = pty.openpty()
    leader = os.fork()
    if leader == 0:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        os.write(writing, json.dumps(work(master)).encode())
        os._exit(0)
    os.close(writing)
    os.close(terminal)
    threading.Thread(target=_look_at, args=(master,), daemon=True).start()
    with open(reading, "rb") as found:  # noqa: PTH123 - a descriptor
        text = found.read()
    os.waitpid(leader, 0)
    document: dict[str, object] = json.loads(text)
    return document


def _look_at(master: int) -> None:
    """Read what is written to a terminal, until no process has it open any more."""
    with suppress(OSError):
        while os.read(master, 1 << 16):
            pass


def job(words: list[str], *, foreground: bool) -> tuple[int, int]:
    """Start a job on this session's terminal; return its PID, and the terminal."""
    terminal = os.open("/dev/tty", os.O_RDWR)

    def prepare() -> None:
        os.setpgid(0, 0)
        if foreground:
            os.tcsetpgrp(terminal, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        for fd in range(3):
            os.dup2(terminal, fd)

    return start(words, prepare=prepare), terminal


def by_ctrl_z(guest: Guest) -> dict[str, object]:
    """Type Ctrl-Z at a terminal, under a progress bar, as soon as a vCPU is held."""

    def work(master: int) -> object:
        pid, _ = job(save(guest), foreground=True)
        # If the job was never seen to hold a vCPU, it did so between two polls.
        while not seen_holding(guest, pid):
            os.waitpid(pid, 0)
            pid, _ = job(save(guest), foreground=True)
        os.write(master, b"\x1a")
        return stopped_and_continued(guest, pid)

    return at_a_terminal(work)


def seen_holding(guest: Guest, pid: int) -> bool:
    """Wait until a vCPU is held; return False if the process has ended instead."""
    ended = False

    def seen() -> bool:
        nonlocal ended
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        return ended or guest.stands()

    until(seen)
    return not ended


def by_tostop(guest: Guest) -> dict[str, object]:
    """Run a background job at a terminal that stops jobs that write to it (stty tostop)."""

    def work(master: int) -> object:
        attributes = termios.tcgetattr(master)
        attributes[3] |= termios.TOSTOP
        termios.tcsetattr(master, termios.TCSANOW, attributes)
        pid, terminal = job(save(guest, "--progress", "json"), foreground=False)
        found: list[bool] = []
        while os.WIFSTOPPED((ended := os.waitpid(pid, os.WUNTRACED))[1]):
            found.append(guest.stands())
            guest.goes_on()
            os.tcsetpgrp(terminal, pid)
            os.kill(pid, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(ended[1])
        return {"stops": len(found), "held": any(found), "status": status, "whole": whole()}

    return at_a_terminal(work)


def by_nobody_reading(guest: Guest) -> dict[str, object]:
    """Send progress to a pipe that is full, and stays full until the guest runs again."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, _F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(4096))
    words = save(guest, "--progress", "json")
    pid = start(words, prepare=lambda: os.dup2(writing, 2))
    os.close(writing)
    # The first line comes once the guest is held. The guest is let go though it is unread.
    until(lambda: writes_to_stderr(pid))
    guest.goes_on()
    held = guest.stands()
    with open(reading, "rb") as source:  # noqa: PTH123 - a descriptor
        lines = source.read()[4096:].splitlines()
    last = json.loads(lines[-1])
    done = last["done_bytes"] == last["total_bytes"]
    return {"held": held, "done": done, "status": status_of(pid), "whole": whole()}


def writes_to_stderr(pid: int) -> bool:
    """Return whether a thread of the process is blocked in a write to standard error."""
    calls = (task / "syscall" for task in Path(f"/proc/{pid}/task").iterdir())
    return any(call.read_text().startswith(_WRITE_TO_STDERR) for call in calls)


def main() -> None:
    """Stop mtetool in all ways."""
    os.nice(-15)  # ahead of the guest's busy vCPUs
    guest, times = Guest(int(sys.argv[1])), int((sys.argv[2:] or ["1"])[0])
    stops = [by_sigstop(guest) for _ in range(times)]

    result: dict[str, object] = {
        "sigstop": {
            "statuses": sorted({status for status, _ in stops}),
            "seconds": [round(seconds, 3) for _, seconds in stops],
        },
    }
    for work in (by_sigtstp, by_ctrl_z, by_tostop, by_nobody_reading):
        result[work.__name__] = work(guest)
        print(work.__name__, result[work.__name__], file=sys.stderr, flush=True)
    result["guards_left"] = guards()
    print(json.dumps(result))


def guards() -> int:
    """Count mtetool's guards on this host, zombies included."""
    names = (process / "comm" for process in Path("/proc").glob("[0-9]*"))
    count = 0
    for name in names:
        try:
            count += name.read_text() == "mte-guard\n"
        except OSError:
            continue
    return count


if __name__ == "__main__":
    main()
