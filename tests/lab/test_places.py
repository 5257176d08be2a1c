"""Without a monitor, the kernel confirms where in the VMM its guest's memory is."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.lab.guests import Qemu, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.test_slots import LAYOUTS

BASE = 0x4000_0000
MIB = 1 << 20
_NODES = "".join(
    f" -object memory-backend-ram,id=m{n},size=192M -numa node,nodeid={n},cpus={n},memdev=m{n}"
    for n in range(2)
)


def _places(lab: Machine, pid: int, *words: str) -> dict[str, Any]:
    # Otherwise the kernel would add pages to the existing ones to make a huge page.
    lab.sh("echo never >/sys/kernel/mm/transparent_hugepage/enabled")
    command = ["python3", "-m", "tests.lab.places", str(pid), *words]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True, timeout=600)
    found: dict[str, Any] = json.loads(result.stdout)
    print(found, flush=True)
    assert found["same"]
    return found


@pytest.mark.parametrize("layout", [pytest.param("256M", marks=pytest.mark.long), "256M memfd"])
def test_main_memory_of_qemu(lab: Machine, layout: str) -> None:
    memory, extra = LAYOUTS[layout]
    guest = Qemu(lab, "g", memory=memory, extra=extra).start()
    found = _places(lab, guest.pid, guest.qmp_path)
    main = [place for place in found["told"] if place[0] == BASE]
    assert len(main) == 1
    assert [place for place in found["places"] if place[0] == BASE] == main
    assert found["questions"] < 300
    # A few confirm what a monitor reports.
    assert [place for place in found["confirmed"] if place[0] == BASE] == main
    assert found["confirming"] < 100


@pytest.mark.long
def test_two_nodes_of_qemu(lab: Machine) -> None:
    guest = Qemu(lab, "g", memory="384M", extra="-S -smp 2" + _NODES).start()
    found = _places(lab, guest.pid, guest.qmp_path)
    nodes = [place for place in found["told"] if place[0] >= BASE]
    assert [place[:2] for place in nodes] == [[BASE, 192 * MIB], [BASE + 192 * MIB, 192 * MIB]]
    # They have the same size, so it is unknown which is which.
    addresses = sorted(address for *_, address in nodes)
    for start in (BASE, BASE + 192 * MIB):
        at = sorted(place[2] for place in found["places"] if place[0] == start)
        assert at == addresses


def test_slots_within_one_mapping(lab: Machine) -> None:
    """The VMM's mappings are adjacent and alike, so /proc shows a single one."""
    small = [[16 * MIB, 3 * MIB // 2], [32 * MIB, MIB], [40 * MIB, 5 * MIB // 4]]
    slots = [[BASE, 64 * MIB], *small]
    words = [f"{ipa:#x}:{size:#x}" for ipa, size in slots]
    words[2] += ":ro"
    pid = start_test_vmm(lab, *words)
    found = _places(lab, pid)
    assert sorted(place[:2] for place in found["places"]) == sorted(slots)
    # If no mappings were adjacent, this would test nothing.
    ends = {address + size for _, size, address in found["places"]}
    assert any(address in ends for _, _, address in found["places"])


def test_one_memslot_is_not_asked_for(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x4000000")
    found = _places(lab, pid)
    assert (found["places"], found["questions"]) == ([], 0)


_LIE = """
import sys
from mtetool.__main__ import main
from mtetool.vmm.qemu import Monitor
true = Monitor.host_addresses
spare = int(sys.argv.pop(1), 16)
def lie(self):
    return [one._replace(address=spare) if one.ipa == 0x40000000 else one for one in true(self)]
Monitor.host_addresses = lie
sys.exit(main())
"""


@pytest.mark.long
def test_a_monitor_that_tells_wrong_addresses(lab: Machine) -> None:
    """The address is that of untouched memory of the same size: no tag is lost."""
    spare = "-object memory-backend-ram,id=spare,size=256M,prealloc=off"
    guest = Qemu(lab, "g", extra=spare).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    maps = lab.sh(f"cat /proc/{guest.pid}/smaps").stdout.decode()
    empty = re.findall(
        r"^([0-9a-f]+)-[0-9a-f]+ rw-p 0{8} 00:00 0 *\nSize: +262144 kB\n"
        r"(?:.*\n){2}Rss: +0 kB",
        maps,
        re.MULTILINE,
    )
    assert len(empty) == 1, maps
    lab.put("/tmp/lie.py", _LIE.encode())
    save = f"save kvm:{guest.pid} --qmp {guest.qmp_path} -o"
    words = ["python3", "/tmp/lie.py", f"0x{empty[0]}", *save.split(), "/tmp/s"]
    lab.run(words, env={"PYTHONPATH": "/opt/mtetool"}, timeout=600, check=True)
    lab.mtetool(f"{save} /tmp/every --every-page", timeout=600)
    tagged = json.loads(lab.run(["mtetool", "info", "--json", "/tmp/s"]).stdout)
    assert tagged["tagged_bytes"] > 0, tagged
    same = lab.run(["mtetool", "diff", "/tmp/s", "/tmp/every"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


def test_a_slot_that_was_moved_is_put_back(lab: Machine) -> None:
    """On a real kernel, in a VM of the test itself whose other slots vanish at that moment."""
    command = ["python3", "-m", "tests.lab.moving"]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    found = json.loads(result.stdout)
    print(found)
    assert found["answers"] == [-17, 0, 0]
    assert found["at_home"]
    assert "was put back at 0x40000000" in found["message"]
