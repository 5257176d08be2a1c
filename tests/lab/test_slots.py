"""Memslots without a monitor: the kernel's answers match the VMM's slots, and cost nothing."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.guests import Qemu, page_bytes, start_test_vmm
from tests.lab.machine import Machine

MIB, GIB = 1 << 20, 1 << 30

_MEMFD = "-object memory-backend-memfd,id=m,size={0},share=on -machine memory-backend=m"
# Hotplug needs ACPI, which QEMU only offers with firmware; what that does is irrelevant here.
_FIRMWARE = "-bios /tmp/firmware -S"
LAYOUTS = {
    "256M": ("256M", "-S"),
    "256M memfd": ("256M", _MEMFD.format("256M") + " -S"),
    "64G sparse": ("64G", "-S"),
    "64G memfd": ("64G", _MEMFD.format("64G") + " -S"),
    "hotplugged": ("256M,slots=4,maxmem=4G", _FIRMWARE),
    "pci": ("1G", "-S -device virtio-net-pci -device virtio-balloon-pci"),
}
ODD = (
    "0:0x1000 0x3000:0x2000 0x5000:0x1000:ro 0x10000:0x7000 0x40000000:0x12345000"
    " 0x60000000:0x1000 0x60002000:0x3000:ro 0x80000000:0x40000000 0xc0000000:0x1000"
    " 0xff00000000:0x100000"
)


def _asked(lab: Machine, pid: int, *words: str) -> dict[str, Any]:
    # Otherwise the kernel would add pages to the existing ones to make a huge page.
    lab.sh("echo never >/sys/kernel/mm/transparent_hugepage/enabled")
    command = ["python3", "-m", "tests.lab.asking", str(pid), *words]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    found: dict[str, Any] = json.loads(result.stdout)
    print({key: found[key] for key in ("asked", "seconds")}, flush=True)
    return found


# The layouts that CI runs: a memfd with holes, and hotplugged memory.
_SHORT = ("64G memfd", "hotplugged")


@pytest.mark.parametrize(
    "layout",
    [
        layout if layout in _SHORT else pytest.param(layout, marks=pytest.mark.long)
        for layout in LAYOUTS
    ],
)
def test_layouts_of_qemu(lab: Machine, layout: str) -> None:
    memory, extra = LAYOUTS[layout]
    lab.sh("echo 1 >/proc/sys/vm/overcommit_memory; truncate -s 1M /tmp/firmware")
    # QEMU does not allow hotplug together with its own mte=on.
    guest = Qemu(lab, "g", memory=memory, extra=extra, mte=layout != "hotplugged").start()
    if layout == "hotplugged":
        lab.run(["mtetool", "enable", f"kvm:{guest.pid}"], check=True)
        guest.qmp("x-exit-preconfig")
        for n in (1, 2):
            backend = f'{{"qom-type": "memory-backend-ram", "id": "m{n}", "size": {n * 128 * MIB}}}'
            guest.qmp("object-add", backend)
            guest.qmp("device_add", f'{{"driver": "pc-dimm", "id": "d{n}", "memdev": "m{n}"}}')
    found = _asked(lab, guest.pid, guest.qmp_path)
    assert found["found"] == found["told"]
    assert len(found["found"]) > 1
    assert found["before"] == found["after"]


def _odd(page: int) -> list[str]:
    """Return the odd slots for a page size: as many pages, and as many between them."""

    def scaled(number: int) -> int:
        low = number % (16 * MIB)
        return number - low + low * page // 4096

    words = (word.split(":") for word in ODD.split())
    return [
        ":".join([*(f"{scaled(int(number, 0)):#x}" for number in (ipa, size)), *rest])
        for ipa, size, *rest in words
    ]


def test_ten_odd_slots(lab: Machine) -> None:
    odd = _odd(page_bytes(lab))
    pid = start_test_vmm(lab, "--memfd", *odd)
    found = _asked(lab, pid)
    expected: list[list[int]] = []
    for word in odd:
        ipa, size = (int(number, 0) for number in word.split(":")[:2])
        start = expected.pop()[0] if expected and expected[-1][1] == ipa else ipa
        expected.append([start, ipa + size])
    assert found["found"] == expected
    assert found["before"] == found["after"]


def test_save_restore_and_verify_without_a_monitor(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x200000", "0x50000000:0x100000:ro")
    guest = f"kvm:{pid}"
    lab.run(["mtetool", "save", guest, "-o", "/tmp/s"], check=True)
    info = json.loads(lab.run(["mtetool", "info", "/tmp/s", "--json"], check=True).stdout)
    slots = [(s["ipa"], s["size_bytes"], s["readonly"]) for s in info["memslots"]]
    assert slots == [(0x40000000, 2 * MIB, None), (0x50000000, MIB, None)]
    restored = lab.run(["mtetool", "restore", "/tmp/s", guest, "--json"], check=True)
    assert json.loads(restored.stdout)["readonly_bytes"] == MIB
    lab.run(["mtetool", "verify", "/tmp/s", "--against", guest], check=True)
