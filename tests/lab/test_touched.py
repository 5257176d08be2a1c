"""What nobody touched is neither read nor made, and every tag is saved: on QEMU's real memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab.guests import Qemu, kill_vmms
from tests.lab.machine import Machine

BASE = 0x4000_0000
MIB = 1 << 20

_MEMFD = (
    "-object memory-backend-memfd,id=m,size={size},share={share},reserve=off"
    " -machine memory-backend=m"
)
MEMORIES = {
    "private": "",
    "memfd": _MEMFD.format(size="256M", share="on"),
    "memfd-private": _MEMFD.format(size="256M", share="off"),
}

# What exists of QEMU's memory beyond its page tables: the file's own pages.
_ONLY_IN_THE_FILE = """
import os, sys
from pathlib import Path
from mtetool.backends import open_guest
pid, base = sys.argv[1], 0x40000000
(path,) = [p for p in Path(f"/proc/{pid}/fd").iterdir()
           if os.readlink(p).startswith("/memfd:memory-backend-memfd")]
fd = os.open(path, os.O_RDWR)
page = os.sysconf("SC_PAGE_SIZE")
with open_guest(f"kvm:{pid}") as guest:
    at = 200 << 20
    assert list(guest.may_be_tagged(base + at, 16 * page)) == []
    os.pwrite(fd, b"x", at + 3 * page + 5)
    os.posix_fallocate(fd, at + 8 * page, page)
    found = list(guest.may_be_tagged(base + at, 16 * page))
    assert found == [(base + at + 3 * page, page)], found
"""


@pytest.fixture(autouse=True)
def _no_vmms(lab: Machine) -> Iterator[None]:
    yield
    kill_vmms(lab)


def resident(lab: Machine, pid: int) -> int:
    """Bytes of memory that the process has, shared memory included, and what its files have."""
    text = lab.sh(f"cat /proc/{pid}/status /proc/meminfo").stdout
    rss, shmem = (re.search(name + rb":\s+(\d+) kB", text) for name in (rb"VmRSS", rb"Shmem"))
    assert rss
    assert shmem
    return (int(rss[1]) + int(shmem[1])) << 10


def save(lab: Machine, pid: int, path: str, *words: str) -> dict[str, float]:
    command = ["mtetool", "save", f"kvm:{pid}", "-o", path, "--force", "--json", *words]
    found: dict[str, float] = json.loads(lab.run(command, check=True, timeout=600).stdout)
    return found


@pytest.mark.parametrize("memory", list(MEMORIES))
def test_a_save_makes_no_memory_and_has_every_tag(lab: Machine, memory: str) -> None:
    guest = Qemu(lab, "g", extra=MEMORIES[memory]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    # Once for what the first run of all makes: Python's caches, QEMU's answers.
    save(lab, guest.pid, "/root/s", "--range", f"{BASE}:64K")
    before = resident(lab, guest.pid)
    save(lab, guest.pid, "/root/s")
    grown = resident(lab, guest.pid) - before
    save(lab, guest.pid, "/root/every", "--every-page")
    filled = resident(lab, guest.pid) - before
    print(f"{memory}: {before >> 20} MiB, grown by {grown >> 10} KiB, {filled >> 10} by every page")
    # Helper and tables take a little; what is not there is 100 MiB and more.
    assert grown < 4 * MIB
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"], check=False)
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]
    if memory != "memfd-private":
        sizes = lab.sh("stat -c %s /root/s /root/every").stdout.split()
        assert abs(int(sizes[0]) - int(sizes[1])) < 100  # names, ids and times
    # Restored into the guest itself, nothing is made either, and all is as it was.
    before = resident(lab, guest.pid)
    lab.run(["mtetool", "restore", "/root/s", f"kvm:{guest.pid}"], check=True, timeout=300)
    assert resident(lab, guest.pid) - before < 4 * MIB
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


@pytest.mark.parametrize("memory", [pytest.param("private", marks=pytest.mark.long), "memfd"])
def test_a_save_without_a_monitor_makes_no_memory(lab: Machine, memory: str) -> None:
    """As under libvirt, whose connection is the only one: the kernel confirms where memory is."""
    guest = Qemu(lab, "g", extra=MEMORIES[memory]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    lab.put("/tmp/hold.py", _HOLD_THE_MONITOR.encode())
    lab.sh(
        f"python3 /tmp/hold.py {guest.qmp_path} >/tmp/held &"
        " until grep -q QMP /tmp/held; do sleep 0.1; done"
    )
    save(lab, guest.pid, "/root/s", "--range", f"{BASE}:64K")
    before = resident(lab, guest.pid)
    done = save(lab, guest.pid, "/root/s")
    grown = resident(lab, guest.pid) - before
    # Told by hand, too: a part of what there is.
    save(lab, guest.pid, "/root/told", "--memslot", f"{BASE}:256M")
    told = resident(lab, guest.pid) - before
    every = save(lab, guest.pid, "/root/every", "--every-page")
    filled = resident(lab, guest.pid) - before
    print(
        f"{memory}: {before >> 20} MiB, grown by {grown >> 10} and {told >> 10} KiB,"
        f" {filled >> 10} KiB by every page;"
        f" {done['copy_seconds']:.2f} s, {every['copy_seconds']:.2f} s"
    )
    assert max(grown, told) < 4 * MIB
    if memory == "memfd":
        assert filled > 100 * MIB
    for path in ("/root/every", "/root/told"):
        words = ["--range", f"{BASE}:256M"] if path == "/root/told" else []
        same = lab.run(["mtetool", "diff", "/root/s", path, *words])
        assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


def test_holes_of_shared_memory_in_huge_pages(lab: Machine) -> None:
    """Its files have large blocks, as those of hugetlbfs, and know their holes all the same."""
    lab.sh("echo always >/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    try:
        guest = Qemu(lab, "g", extra=MEMORIES["memfd"]).start()
        guest.wait_for_checks(1)
        guest.qmp("stop")
        save(lab, guest.pid, "/root/s", "--range", f"{BASE}:64K")
        before = resident(lab, guest.pid)
        save(lab, guest.pid, "/root/s")
        assert resident(lab, guest.pid) - before < 4 * MIB
        save(lab, guest.pid, "/root/every", "--every-page")
        assert resident(lab, guest.pid) - before > 64 * MIB
    finally:
        lab.sh("echo never >/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    same = lab.run(["mtetool", "diff", "/root/s", "/root/every"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.long
@pytest.mark.kernel("7.3")
def test_huge_pages_of_hugetlbfs_are_all_read(lab: Machine) -> None:
    """Which of them exist is unknown: made only where that is wanted, see mtetool-save(1)."""
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


@pytest.mark.every_kernel
def test_a_page_that_is_only_in_the_file_exists(lab: Machine) -> None:
    """Another process wrote it, or the page tables forgot it."""
    guest = Qemu(lab, "g", extra=MEMORIES["memfd"]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    env = {"PYTHONPATH": "/opt/mtetool"}
    lab.run(["python3", "-c", _ONLY_IN_THE_FILE, str(guest.pid)], env=env, check=True, timeout=100)


@pytest.mark.long
def test_64_gib_of_which_a_hundredth_is_touched(lab: Machine) -> None:
    """A guest of which 640 MiB have tags, in 160 places: that is what a save costs."""
    memory = _MEMFD.format(size="64G", share="on")
    guest = Qemu(lab, "g", memory="64G", extra=f"{memory} -S").start()
    ranges = " ".join(f"--range {BASE + n * 400 * MIB}:4M" for n in range(160))
    lab.sh(
        "mtetool emu create /root/e --force --memory 64G && mtetool emu fill /root/e random "
        + ranges
        + " && mtetool save emu:/root/e --force -o /root/r"
        + f" && mtetool restore /root/r kvm:{guest.pid} --no-verify",
        timeout=900,
    )
    before = resident(lab, guest.pid)
    assert 640 * MIB < before < 2000 * MIB
    whole = save(lab, guest.pid, "/root/s")
    grown = resident(lab, guest.pid) - before
    part = save(lab, guest.pid, "/root/part", "--range", f"{BASE}:1G")
    print(
        f"64 GiB, 640 MiB touched: {whole['copy_seconds']:.1f} s, {whole['file_bytes']} bytes,"
        f" grown by {grown >> 10} KiB; 1 GiB of it: {part['copy_seconds']:.1f} s"
    )
    assert grown < before // 100
    assert (
        lab.run(["mtetool", "diff", "/root/r", "/root/s", "--range", f"{BASE}:64G"]).returncode == 0
    )
