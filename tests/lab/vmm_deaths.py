"""Run in the lab: kill the VMM before each step of an attach, a copy and a detach.

`python3 -m tests.lab.vmm_deaths` prints, as JSON, how many VMMs died this way, how mtetool ended
each time, and the steps at which it or the dead VMM did not end within an ample time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter

from mtetool.attach import steps
from mtetool.errors import GuestError
from tests.lab.deaths import cycle
from tests.lab.stride import deaths_before, turns

_ENDS_SECONDS = 15.0


def start_vmm() -> subprocess.Popen[bytes]:
    """Start the VMM that does nothing, and wait until it is ready."""
    words = ["/lab/testvmm", "0x40000000:0x100000"]
    vmm = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert vmm.stdout
    assert vmm.stdout.readline() == b"ready\n"
    return vmm


def child(pid: int, number: int) -> int:
    """Run a cycle and kill the VMM at that step; return 0 for success, 4 for an error."""
    count = 0

    def hook(_: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(pid, signal.SIGKILL)

    steps.on_step(hook)
    try:
        cycle(pid)
    except GuestError:
        return 4
    # At the last steps, nothing can fail any more.
    return 4 if count >= number else 0


def ended(pid: int) -> int | None:
    """Return the child's status, or None if it had to be killed."""
    deadline = time.monotonic() + _ENDS_SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> None:
    """Kill a VMM at every step in turn."""
    statuses: Counter[int] = Counter()
    stuck: list[dict[str, object]] = []
    for number in turns():
        vmm = start_vmm()
        pid = os.fork()
        if pid == 0:
            os._exit(child(vmm.pid, number))
        # Only this process waits for the VMM: it can only be reaped when mtetool lets it go.
        status = ended(pid)
        if status == 0:
            vmm.kill()
            vmm.wait()
            break
        if status is None:
            stuck.append({"step": number, "who": "mtetool"})
        else:
            statuses[os.waitstatus_to_exitcode(status)] += 1
        try:
            vmm.wait(_ENDS_SECONDS)
        except subprocess.TimeoutExpired:
            stuck.append({"step": number, "who": "VMM"})
    print(json.dumps({"deaths": deaths_before(number), "statuses": statuses, "stuck": stuck}))


if __name__ == "__main__":
    main()
