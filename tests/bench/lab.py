"""`python -m tests.bench.lab`: what attaching, saving and restoring cost in the lab.

All times are of an emulated CPU: compare them only with others of the same run.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Sequence

from tests.bench.loop import beside_the_loop
from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_BORROW = """
import json, sys, time
import numpy as np
from mtetool.backends import open_guest
pid, runs = sys.argv[1], int(sys.argv[2])
out = np.zeros(16 << 20, np.uint8)
rows = []
for _ in range(runs):
    start = time.perf_counter()
    with open_guest(f"kvm:{pid}") as guest:
        guest.info()
        ready = time.perf_counter()
        done = guest.read_tags(0x40000000, out)
        read = time.perf_counter()
        assert done == 256 << 20
        assert guest.write_tags(0x40000000, out) == done
        rows.append([guest.borrowed_seconds, ready - start, read - ready,
                     time.perf_counter() - read])
print(json.dumps(rows))
"""

# From the start of a command to the first vCPU of the VMM that it becomes.
_START = """
import json, os, signal, subprocess, sys, time
rows = []
for _ in range(int(sys.argv[1])):
    start = time.perf_counter()
    vmm = subprocess.Popen(sys.argv[2:], stderr=subprocess.DEVNULL)
    directory = f"/proc/{vmm.pid}/fd"
    def link(fd):
        try: return os.readlink(f"{directory}/{fd}")
        except OSError: return ""
    while not any(link(fd).startswith("anon_inode:kvm-vcpu:") for fd in os.listdir(directory)):
        time.sleep(0.005)
    rows.append(time.perf_counter() - start)
    vmm.kill()
    vmm.wait()
print(json.dumps(rows))
"""


# The command itself, from the start of its process to the first ioctl of its helper.
_FIRST = """
import os, sys, time
from pathlib import Path
from mtetool.attach import steps
def hook(name):
    if name == "call/syscall":
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        now = float(Path("/proc/uptime").read_text().split()[0])
        print(now - ticks / os.sysconf("SC_CLK_TCK"), file=sys.stderr)
        steps.on_step(None)
steps.on_step(hook)
from mtetool.__main__ import main
sys.exit(main())
"""


def main() -> None:
    """Boot, measure, print a table."""
    with Machine() as lab:
        print(f"{'boot to first command':46} {lab.boot_seconds:8.2f} s")
        guest = Qemu(lab, "guest").start()
        guest.wait_for_checks()
        guest.qmp("stop")
        env = {"PYTHONPATH": "/opt/mtetool"}
        command = ["python3", "-c", _BORROW, str(guest.pid), "20"]
        rows = json.loads(lab.run(command, env=env, check=True, timeout=600).stdout)
        names = (
            "VMM's thread borrowed",
            "open, attach, layout",
            "read 256 MiB of guest tags (4 ioctls)",
            "write 256 MiB of guest tags (4 ioctls)",
        )
        for name, column in zip(names, zip(*rows, strict=True), strict=True):
            _row(name, column)
        words = ["save", f"kvm:{guest.pid}", "-o", "/tmp/s", "--force", "--quiet"]
        first = [
            float(lab.run(["python3", "-c", _FIRST, *words], env=env, check=True).stderr)
            for _ in range(5)
        ]
        _row("start of the command to its first ioctl", first)
        guest.qmp("cont")
        frozen = [
            json.loads(lab.run(["mtetool", *words, "--freeze", "--json"]).stdout)["frozen_seconds"]
            for _ in range(5)
        ]
        _row("save --freeze, 256 MiB and flash: vCPUs stopped", frozen)
        guest.qmp("stop")
        for name, line in (
            ("save, 256 MiB and flash, whole command", f"save kvm:{guest.pid} -o /tmp/s --force"),
            ("restore with read-back, whole command", f"restore /tmp/s kvm:{guest.pid}"),
        ):
            _time(lab, name, line)
        guest.qmp("quit")
        _time_starts(lab)
    for beside in beside_the_loop(5):
        print(
            f"{beside.action}, 1 GiB, first copy to last: {beside.seconds:.3f} s;"
            f" bare ioctls {beside.bare_seconds:.3f} s; ratio {beside.ratio:.2f}",
            flush=True,
        )


def _time_starts(lab: Machine) -> None:
    _time(lab, "mtetool's own start", "--version")
    qemu = shlex.split(Qemu(lab, "other", wrapper="exec", mte=False).command())[1:]
    for name, wrapper in (
        ("QEMU to its first vCPU, by itself", []),
        ("with mtetool exec", ["mtetool", "exec", "--"]),
        ("with mtetool exec --every-call", ["mtetool", "exec", "--every-call", "--"]),
    ):
        command = ["python3", "-c", _START, "5", *wrapper, *qemu]
        rows = json.loads(lab.run(command, check=True, timeout=300).stdout)
        _row(name, rows)


def _time(lab: Machine, name: str, words: str) -> None:
    seconds = []
    for _ in range(5):
        script = f"mtetool {words} >/dev/null 2>&1; cat /proc/uptime"
        before = float(lab.sh("cat /proc/uptime").stdout.split()[0])
        after = float(lab.sh(script, timeout=300).stdout.split()[0])
        seconds.append(after - before)
    _row(name, seconds)


def _row(name: str, seconds: Sequence[float]) -> None:
    print(f"{name:46} {statistics.median(seconds):8.3f} s   worst {max(seconds):.3f} s", flush=True)


if __name__ == "__main__":
    main()
