"""Memory that KVM refuses in a VM with MTE: what `mtetool exec` says, and how QEMU ends."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu, page_bytes
from tests.lab.machine import Machine

MIB = 1 << 20

_BACKEND = "-object memory-backend-{},id=m,size=128M -machine memory-backend=m"
_ON_DISK = _BACKEND.format("file,mem-path=/root/ram")
_IN_TMPFS = _BACKEND.format("file,mem-path=/dev/shm/ram,share=on")
_HUGE_PAGES = """
size=$(grep Hugepagesize /proc/meminfo | tr -dc 0-9)
echo $((1 + 131072 / size)) >/proc/sys/vm/nr_hugepages
mkdir -p /tmp/huge
mount -t hugetlbfs huge /tmp/huge
"""
_NO_HUGE_PAGES = "umount /tmp/huge; echo 0 >/proc/sys/vm/nr_hugepages"
_HUGE = [
    _BACKEND.format("memfd,hugetlb=on"),
    pytest.param(_BACKEND.format("file,mem-path=/tmp/huge,share=on"), marks=pytest.mark.long),
    pytest.param("-mem-path /tmp/huge", marks=pytest.mark.long),
]
_SLOT_REFUSED = "error registering slot: Invalid argument"


def _qemu(lab: Machine, extra: str, memory: str = "128M") -> Qemu:
    return Qemu(lab, "g", mte=False, memory=memory, wrapper="mtetool exec --", extra=extra)


def _abort(lab: Machine, extra: str) -> list[str]:
    """Start a QEMU that aborts; return what it printed, and mtetool before it."""
    result = lab.run(["sh", "-c", f"exec {_qemu(lab, extra).command()}"], timeout=60)
    error = result.stderr.decode()
    assert (result.returncode, _SLOT_REFUSED in error) == (-6, True), error
    return error.splitlines()


def _start(guest: Qemu) -> str:
    """Start a QEMU whose VM gets MTE; return what it printed, and mtetool before it."""
    guest.start().wait_for_machine()
    asked = guest.lab.run(["mtetool", "enable", f"kvm:{guest.pid}", "--json"], check=True)
    assert json.loads(asked.stdout)["changed"] is False
    return guest.lab.get("/tmp/g.out").decode()


@pytest.mark.parametrize(
    "extra", [_ON_DISK, pytest.param("-mem-path /root", marks=pytest.mark.long)]
)
def test_qemu_aborts_with_memory_of_a_file_on_a_disk(lab: Machine, extra: str) -> None:
    first, hint, *rest = _abort(lab, extra)
    words = extra.partition(" -machine")[0]
    assert first.startswith(f"mtetool: '{words}': KVM refuses memory of a file outside tmpfs")
    assert hint.startswith("  try: ")
    assert all("mtetool" not in line for line in rest)


@pytest.mark.long
def test_a_file_on_a_disk_is_no_obstacle_without_mte(lab: Machine) -> None:
    guest = Qemu(lab, "g", mte=False, memory="128M", wrapper="env", extra=f"-S {_ON_DISK}")
    guest.start().wait_for_machine()
    assert lab.get("/tmp/g.out") == b""


@pytest.mark.long
def test_a_file_in_tmpfs_keeps_tags(lab: Machine) -> None:
    guest = _qemu(lab, _IN_TMPFS)
    assert _start(guest) == ""
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
    lab.sh("rm -f /dev/shm/ram")


@pytest.mark.parametrize("extra", _HUGE)
def test_huge_pages_that_the_kernel_refuses(lab: Machine, extra: str) -> None:
    lab.sh(_HUGE_PAGES)
    try:
        assert "KVM refuses huge pages in a VM with MTE" in _abort(lab, extra)[0]
    finally:
        lab.sh(_NO_HUGE_PAGES)


@pytest.mark.long
@pytest.mark.kernel("7.3")
@pytest.mark.parametrize("extra", _HUGE)
def test_huge_pages_that_the_kernel_accepts(lab: Machine, extra: str) -> None:
    lab.sh(_HUGE_PAGES)
    try:
        guest = _qemu(lab, f"-S {extra}")
        assert _start(guest) == ""
        lab.sh(f"kill -9 {guest.pid}; while [ -e /proc/{guest.pid} ]; do sleep 0.1; done")
    finally:
        lab.sh(_NO_HUGE_PAGES)


@pytest.mark.parametrize(
    "path", ["/root/hot", pytest.param("/dev/shm/hot", marks=pytest.mark.long)]
)
def test_hotplugged_memory(lab: Machine, path: str) -> None:
    lab.sh("truncate -s 1M /tmp/firmware")  # hotplug needs ACPI, which needs a firmware
    guest = _qemu(lab, "-bios /tmp/firmware -S", memory="128M,slots=2,maxmem=1G")
    assert _start(guest) == ""
    backend = {"qom-type": "memory-backend-file", "id": "m", "size": 128 * MIB, "mem-path": path}
    guest.qmp("object-add", json.dumps(backend))
    guest.qmp("query-status")
    dimm = json.dumps({"driver": "pc-dimm", "id": "d", "memdev": "m"})
    if path.startswith("/dev/shm"):
        guest.qmp("device_add", dimm)
        guest.qmp("query-status")
        assert lab.get("/tmp/g.out") == b""
    else:
        with pytest.raises(AssertionError):
            guest.qmp("device_add", dimm)
        lab.sh(f"while [ -e /proc/{guest.pid} ]; do sleep 0.1; done")
        assert _SLOT_REFUSED in lab.get("/tmp/g.out").decode()
    lab.sh(f"rm -f {path}")


@pytest.mark.every_kernel(long=["6.12-16k", "7.3"])
def test_kvm_refuses_the_memory_of_devices(lab: Machine) -> None:
    out = lab.run(["python3", "-m", "tests.lab.bars"], check=True, env=_CHECKOUT).stdout
    answers = out.decode().splitlines()
    # Nothing smaller than a page can be mapped, and no driver leaves more than 4 KiB unclaimed.
    assert answers or page_bytes(lab) > 4096
    assert set(answers) <= {"-22 0"}
    script = "from mtetool.vmm.taggable import ThisHost; print(ThisHost().accepts('device'))"
    asked = lab.run(["python3", "-c", script], check=True, env=_CHECKOUT)
    assert asked.stdout == b"False\n"


_CHECKOUT = {"PYTHONPATH": "/opt/mtetool"}
