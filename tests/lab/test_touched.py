"""Untouched memory is neither read nor allocated, and every tag is saved: on a real QEMU."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.lab.guests import Qemu, kill_vmms
from tests.lab.machine import Machine
from tests.lab.memory import Existing, GuestMemory

BASE = 0x4000_0000
MIB = 1 << 20
SIZE = 256 * MIB

_MEMFD = (
    "-object memory-backend-memfd,id=m,size={size},share={share},reserve=off"
    " -machine memory-backend=m"
)
MEMORIES = {
    "private": "",
    "memfd": _MEMFD.format(size="256M", share="on"),
    "memfd-private": _MEMFD.format(size="256M", share="off"),
}


# Pages of QEMU's memory that are in the file, but not in QEMU's page tables.
_ONLY_IN_THE_FILE = """
import os, sys
from pathlib import Path
from mtetool.backends import open_guest
from mtetool.guest import Extent
pid, base = sys.argv[1], 0x40000000
def link(path):
    try:
        return os.readlink(path)
    except FileNotFoundError:  # QEMU runs, and has closed it
        return ""
(path,) = [p for p in Path(f"/proc/{pid}/fd").iterdir()
           if link(p).startswith("/memfd:memory-backend-memfd")]
fd = os.open(path, os.O_RDWR)
page = os.sysconf("SC_PAGE_SIZE")
with open_guest(f"kvm:{pid}") as guest:
    at = 200 << 20
    around = Extent(base + at, 16 * page)
    assert list(guest.may_be_tagged(around)) == []
    os.pwrite(fd, b"x", at + 3 * page + 5)
    os.posix_fallocate(fd, at + 8 * page, page)
    found = list(guest.may_be_tagged(around))
    assert found == [Extent(base + at + 3 * page, page)], found
"""


_KHUGEPAGED = "/sys/kernel/mm/transparent_hugepage/khugepaged"


@pytest.fixture(autouse=True)
def _nothing_is_made_by_others(lab: Machine) -> Iterator[None]:
    """Keep the kernel, which forms huge pages at any time, from adding new pages to them."""
    counts = ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")
    before = lab.sh(f"cd {_KHUGEPAGED}; cat {' '.join(counts)}").stdout.decode().split()
    lab.sh(f"cd {_KHUGEPAGED}; for count in {' '.join(counts)}; do echo 0 >$count; done")
    yield
    kill_vmms(lab)
    back = (f"echo {value} >{name}" for name, value in zip(counts, before, strict=True))
    lab.sh(f"cd {_KHUGEPAGED}; {'; '.join(back)}")


def all_made(found: Existing) -> bool:
    """Return whether every page of the guest's memory exists, in the file or as the process's."""
    return SIZE in (found.own_bytes, found.file_bytes)


def save(lab: Machine, pid: int, path: str, *words: str) -> dict[str, float]:
    command = ["mtetool", "save", f"kvm:{pid}", "-o", path, "--force", "--json", *words]
    found: dict[str, float] = json.loads(lab.run(command, check=True, timeout=600).stdout)
    return found


@pytest.mark.long
@pytest.mark.parametrize("memory", ["memfd", "private", "memfd-private"])
def test_a_save_makes_no_memory_and_has_every_tag(lab: Machine, memory: str) -> None:
    guest = Qemu(lab, "g", extra=MEMORIES[memory]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    touched = GuestMemory.of(guest, BASE, SIZE)
    before = touched.existing()
    assert not all_made(before)
    save(lab, guest.pid, "/root/s")
    # A restore into the guest itself allocates nothing either.
    lab.run(["mtetool", "restore", "/root/s", f"kvm:{guest.pid}"], check=True, timeout=300)
    assert touched.existing() == before
    save(lab, guest.pid, "/root/every", "--every-page")
    # Private memory that is only read stays the kernel's one page of zeros.
    assert all_made(touched.existing()) == (memory != "private")
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"], check=False)
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]
    guest.qmp("cont")
    checks = guest.wait_for_checks()
    assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0), (0, 0)]


_HOLD_THE_MONITOR = """
import socket, sys, time
client = socket.socket(socket.AF_UNIX)
client.connect(sys.argv[1])
print(client.recv(1 << 16), flush=True)
time.sleep(100000)
"""


@pytest.mark.long
@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_a_save_without_a_monitor_makes_no_memory(lab: Machine, memory: str) -> None:
    """As under libvirt, which holds the only connection: the kernel confirms where memory is."""
    guest = Qemu(lab, "g", extra=f"{MEMORIES[memory]} -S").start().wait_for_machine()
    touched = GuestMemory.of(guest, BASE, SIZE)
    lab.put("/tmp/hold.py", _HOLD_THE_MONITOR.encode())
    lab.sh(
        f"python3 /tmp/hold.py {guest.qmp_path} >/tmp/held &"
        " until grep -q QMP /tmp/held; do sleep 0.1; done"
    )
    before = touched.existing()
    save(lab, guest.pid, "/root/s")
    # Also if it is given by hand, and only a part.
    save(lab, guest.pid, "/root/told", "--memslot", f"{BASE}:{SIZE}")
    assert touched.existing() == before
    save(lab, guest.pid, "/root/every", "--every-page")
    assert all_made(touched.existing())
    for path in ("/root/every", "/root/told"):
        words = ["--range", f"{BASE}:256M"] if path == "/root/told" else []
        same = lab.run(["mtetool", "diff", "/root/s", path, *words])
        assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.long
def test_holes_of_shared_memory_in_huge_pages(lab: Machine) -> None:
    """Its files have large blocks, like those of hugetlbfs, and still report their holes."""
    lab.sh("echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        guest = Qemu(lab, "g", extra=MEMORIES["memfd"]).start()
        guest.wait_for_checks(1)
        guest.qmp("stop")
        touched = GuestMemory.of(guest, BASE, SIZE)
        before = touched.existing()
        save(lab, guest.pid, "/root/s")
        assert touched.existing() == before
        save(lab, guest.pid, "/root/every", "--every-page")
        assert before.file_bytes < touched.existing().file_bytes == SIZE
    finally:
        lab.sh("echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.long
@pytest.mark.kernel("7.3")
def test_huge_pages_of_hugetlbfs_are_all_read(lab: Machine) -> None:
    """Which of them exist is unknown: they are allocated only on request; see mtetool-save(1)."""
    lab.sh("echo 150 >/proc/sys/vm/nr_hugepages")
    memory = MEMORIES["memfd"].replace("share=on", "share=on,hugetlb=on,hugetlbsize=2M")
    try:
        guest = Qemu(lab, "g", extra=memory).start()
        guest.wait_for_checks(1)
        guest.qmp("stop")
        before = lab.sh("grep HugePages_Free: /proc/meminfo").stdout.split()
        assert int(before[1]) > 150 - 128
        refused = lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/root/s", "--json"])
        assert (refused.returncode, json.loads(refused.stderr)["error"]) == (4, "would-allocate")
        assert lab.sh("grep HugePages_Free: /proc/meminfo").stdout.split() == before
        save(lab, guest.pid, "/root/every", "--every-page")
        free = lab.sh("grep HugePages_Free: /proc/meminfo").stdout.split()
        assert int(free[1]) == 150 - 128
        save(lab, guest.pid, "/root/s")
        guest.qmp("cont")
        checks = guest.wait_for_checks()
        assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0), (0, 0)]
    finally:
        kill_vmms(lab)
        lab.sh("echo 0 >/proc/sys/vm/nr_hugepages")
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.every_kernel(long=["6.12-16k", "7.3"])
def test_a_page_that_is_only_in_the_file_exists(lab: Machine) -> None:
    """Another process wrote it, or it is no longer in the page tables."""
    guest = Qemu(lab, "g", extra=f"{MEMORIES['memfd']} -S").start()
    env = {"PYTHONPATH": "/opt/mtetool"}
    lab.run(["python3", "-c", _ONLY_IN_THE_FILE, str(guest.pid)], env=env, check=True, timeout=100)


@pytest.mark.long
def test_64_gib_of_which_a_hundredth_is_touched(lab: Machine) -> None:
    """640 MiB of the guest have tags, in 160 places: that alone is the cost of a save."""
    memory = _MEMFD.format(size="64G", share="on")
    guest = Qemu(lab, "g", memory="64G", extra=f"{memory} -S").start()
    ranges = " ".join(f"--range {BASE + n * 400 * MIB}:4M" for n in range(160))
    lab.mtetool(
        "emu create /root/e --force --memory 64G",
        f"emu fill /root/e random {ranges}",
        "save emu:/root/e --force -o /root/r",
        f"restore /root/r kvm:{guest.pid} --no-verify",
        timeout=900,
    )
    touched = GuestMemory.of(guest, BASE, 64 << 30)
    before = touched.existing()
    whole = save(lab, guest.pid, "/root/s")
    assert touched.existing() == before
    part = save(lab, guest.pid, "/root/part", "--range", f"{BASE}:1G")
    print(
        f"64 GiB, {before.file_bytes >> 20} MiB touched: {whole['copy_seconds']:.1f} s,"
        f" {whole['file_bytes']} bytes; 1 GiB of it: {part['copy_seconds']:.1f} s"
    )
    assert (
        lab.run(["mtetool", "diff", "/root/r", "/root/s", "--range", f"{BASE}:64G"]).returncode == 0
    )
