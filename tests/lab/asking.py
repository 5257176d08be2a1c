"""Run in the lab: probe the kernel for the memslots of a VM, and measure the cost.

`python3 -m tests.lab.asking PID [QMP]` prints JSON: the ranges found, those that QEMU's monitor
reports (adjacent ones joined), the number of probes, the time, and which pages of the guest's
memory existed before and after.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from mtetool.attach.session import Session
from mtetool.backends.kvm import memslots
from mtetool.backends.kvm.guest import open_kvm
from mtetool.guest import GuestOptions, Memslot
from mtetool.vmm.monitors import open_given
from tests.lab.existing import large_memory


def joined(slots: tuple[Memslot, ...]) -> list[tuple[int, int]]:
    """Return slots as (start, end), with adjacent ones joined."""
    found: list[tuple[int, int]] = []
    for slot in slots:
        start = found.pop()[0] if found and found[-1][1] == slot.ipa else slot.ipa
        found.append((start, slot.end))
    return found


def main() -> None:
    """Probe, and print the results."""
    pid = int(sys.argv[1])
    told = None
    if len(sys.argv) > 2:
        with open_given(pid, Path(sys.argv[2])) as monitor:
            told = joined(monitor.memslots())
    count = 0
    ioctl = Session.ioctl

    def counted(self: Session, fd: int, request: int, argument: bytes | int) -> int:
        nonlocal count
        count += 1
        return ioctl(self, fd, request, argument)

    with open_kvm(str(pid), GuestOptions()) as guest:
        assert guest.vm.has_mte
        session = guest.vm.session
        Session.ioctl = counted  # type: ignore[method-assign]
        before = large_memory(pid)
        began = time.monotonic()
        found = memslots.memslots_of(session, guest.vm.fd)
        seconds = time.monotonic() - began
        after = large_memory(pid)
    result = {
        "found": joined(found),
        "told": told,
        "asked": count,
        "seconds": round(seconds, 3),
        "before": before,
        "after": after,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
