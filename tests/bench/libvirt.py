"""`python -m tests.bench.libvirt`: what the emulator wrapper costs under libvirt, in the lab.

All times are of an emulated CPU: compare them only with others of the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from tests.lab.libvirt import QEMU, Domain, Libvirt
from tests.lab.machine import Machine
from tests.lab.mte_hosts import WRAPPER, mte_host

_RUNS = 5


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _starts(host: Libvirt, emulator: str) -> float:
    guest = Domain(host, "web", emulator=emulator).define()
    seconds = _seconds(lambda: host.virsh("start", guest.name))
    host.virsh("destroy", guest.name)
    host.virsh("undefine", guest.name)
    return seconds


def _probes(host: Libvirt, emulator: str) -> float:
    host.lab.sh(f"touch {emulator}")  # so libvirt looks again
    return _seconds(lambda: host.virsh("domcapabilities", "--emulatorbin", emulator))


def main() -> None:
    """Measure both by turns, and print the medians."""
    with Machine() as lab:
        host = mte_host(lab)
        emulators = (QEMU, WRAPPER)
        for what, measure in (("virsh start", _starts), ("probes of an emulator", _probes)):
            for each in emulators:
                measure(host, each)  # the first time, libvirt looks at more than this
            rows = [[measure(host, each) for each in emulators] for _ in range(_RUNS)]
            plain, wrapped = zip(*rows, strict=True)
            for name, times in (("plain", plain), ("wrapped", wrapped)):
                shown = " ".join(f"{seconds:.2f}" for seconds in times)
                print(f"{what}, {name}: median {statistics.median(times):.2f} s of {shown}")


if __name__ == "__main__":
    main()
