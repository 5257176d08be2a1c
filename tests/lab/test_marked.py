"""Memory that exists and never had tags: the kernel's mark on its frames shows that."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.test_touched import BASE, MIB, save

_PREALLOCATED = {
    "anonymous": "-object memory-backend-ram,id=m,size=256M,prealloc=on -machine memory-backend=m",
    "memfd": "-object memory-backend-memfd,id=m,size=256M,share=on,prealloc=on"
    " -machine memory-backend=m",
}


def _huge(lab: Machine, how: str) -> None:
    lab.sh(f"echo {how} >/sys/kernel/mm/transparent_hugepage/enabled")


def _marked(lab: Machine, source: str, ipa: int, size: int) -> dict[str, float]:
    command = ["python3", "-m", "tests.lab.marked", source, str(ipa), str(size)]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    found: dict[str, float] = json.loads(result.stdout)
    return found


@pytest.mark.long
@pytest.mark.parametrize("memory", ["anonymous", "memfd"])
@pytest.mark.parametrize("huge", ["never", "always"])
def test_preallocated_memory(lab: Machine, memory: str, huge: str) -> None:
    _huge(lab, huge)
    guest = Qemu(lab, "g", extra=_PREALLOCATED[memory]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    found = _marked(lab, f"kvm:{guest.pid}", BASE, 256 * MIB)
    done = save(lab, guest.pid, "/root/s")
    every = save(lab, guest.pid, "/root/every", "--every-page")
    print(memory, huge, found, done["copy_seconds"], every["copy_seconds"], flush=True)
    assert found["existing"] == 256 * MIB
    if huge == "never":
        assert found["marked"] < found["existing"]
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]
    # After a restore over other tags, in marked memory, everything is as before.
    lab.mtetool(
        "emu create /root/e --force --memory 256M --fill random",
        f"save emu:/root/e -o /root/r --force --range {BASE}:8M",
        f"restore /root/r kvm:{guest.pid}",
        f"restore /root/s kvm:{guest.pid}",
    )
    guest.qmp("cont")
    assert [(check.wrong, check.data_wrong) for check in guest.wait_for_checks()] == [(0, 0)] * 2


@pytest.mark.long
def test_a_mark_inside_of_a_huge_page_does_not_show(lab: Machine) -> None:
    """The flags of its first page stand for all pages: none of them may be left out."""
    _huge(lab, "always")
    slots = ["0x40000000:0x4000000", "0x1000000:0x100000", "0x2000000:0x100000"]
    pid = start_test_vmm(lab, "--data", *slots)
    huge = lab.sh(f"grep AnonHugePages: /proc/{pid}/smaps_rollup").stdout.split()
    assert int(huge[1]) << 10 >= 32 * MIB
    at = f"{BASE + 32 * MIB + 5 * 16384}:16K"
    lab.mtetool(
        "emu create /tmp/e --memory 64M",
        f"emu fill /tmp/e random --range {at}",
        f"save emu:/tmp/e -o /tmp/r --range {at}",
        f"restore /tmp/r kvm:{pid} --memslot 0x40000000:64M",
    )
    save(lab, pid, "/tmp/s")
    same = lab.run(["mtetool", "diff", "/tmp/s", "/tmp/r", "--range", at])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.long
def test_without_the_right_to_see_frames_all_that_exists_is_read(lab: Machine) -> None:
    _huge(lab, "never")
    guest = Qemu(lab, "g", extra=_PREALLOCATED["anonymous"], uid=1000).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    lab.sh("echo 0 >/proc/sys/kernel/yama/ptrace_scope 2>/dev/null; true")
    command = ["python3", "-m", "tests.lab.marked", f"kvm:{guest.pid}", str(BASE), str(256 * MIB)]
    words = ["python3", "/tmp/become.py", "1000", *command]
    result = lab.run(words, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    found = json.loads(result.stdout)
    assert found["marked"] == found["existing"] == 256 * MIB
