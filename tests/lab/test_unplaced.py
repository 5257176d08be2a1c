"""If it is unknown which pages exist, no memory is allocated unless the user requests it.

On kernels before 6.7 it is known as well: from the words of /proc/PID/pagemap.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.lab.guests import Qemu, kill_vmms, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.test_touched import MEMORIES

BASE = 0x4000_0000
MIB = 1 << 20
_ENV = {"PYTHONPATH": "/opt/mtetool"}

# As on a kernel before 6.7: pagemap knows no ioctl.
_WITHOUT_THE_SCAN = """
import errno, sys
from mtetool.__main__ import main
from mtetool.vmm.pagemap import Pagemap
def scan(self, *words):
    raise OSError(errno.ENOTTY, "no such ioctl")
Pagemap._scan = scan
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def _no_vmms(lab: Machine) -> Iterator[None]:
    yield
    kill_vmms(lab)


def file_bytes(lab: Machine, pid: int) -> int:
    """Return how many bytes the memfds of a process have."""
    script = (
        f"for fd in /proc/{pid}/fd/*; do case $(readlink $fd) in"
        " /memfd:*) stat -L -c %b $fd ;; esac; done"
    )
    return 512 * sum(map(int, lab.sh(script).stdout.split()))


@pytest.mark.long
@pytest.mark.parametrize("memory", ["private", "memfd"])
def test_words_show_what_the_scan_shows(lab: Machine, memory: str) -> None:
    guest = Qemu(lab, "g", extra=MEMORIES[memory]).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    command = ["python3", "-m", "tests.lab.words", str(guest.pid)]
    found = json.loads(lab.run(command, env=_ENV, check=True, timeout=600).stdout)
    print(found)
    assert found["scanned"] > 1000
    assert (found["lost"], found["not_zeros"]) == (0, 0)
    if memory == "private":
        return
    # A whole save that way has the same tags, and allocates no memory either.
    lab.put("/tmp/old.py", _WITHOUT_THE_SCAN.encode())
    before = file_bytes(lab, guest.pid)
    lab.run(
        ["python3", "/tmp/old.py", "save", f"kvm:{guest.pid}", "-o", "/tmp/old"],
        env=_ENV,
        check=True,
        timeout=600,
    )
    assert file_bytes(lab, guest.pid) == before
    lab.mtetool(f"save kvm:{guest.pid} -o /tmp/s --every-page")
    same = lab.run(["mtetool", "diff", "/tmp/s", "/tmp/old"])
    assert (same.returncode, same.stdout) == (0, b""), same.stdout[:400]


@pytest.mark.long
def test_one_memslot_of_which_nobody_knows_where_it_is(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--memfd", f"{BASE:#x}:0x4000000")
    guest = f"kvm:{pid}"
    ranges = f"--range {BASE:#x}:1M"
    lab.mtetool(
        "emu create /tmp/e --memory 64M",
        f"emu set /tmp/e {BASE:#x}:64K=5",
        "save emu:/tmp/e -o /tmp/r",
        f"save {guest} {ranges} -o /tmp/small",
    )
    before = file_bytes(lab, pid)
    assert MIB <= before < 2 * MIB
    for words in (
        f"save {guest} -o /tmp/s",
        f"dump {guest} --memslot {BASE:#x}:64M",
        f"restore /tmp/r {guest}",
    ):
        refused = lab.run(["mtetool", *words.split()])
        assert refused.returncode == 4, words
        assert not refused.stdout
        wanted = f"up to {64 * MIB - before} bytes of memory would be newly allocated".encode()
        assert wanted in refused.stderr, refused.stderr
        assert b"--every-page" in refused.stderr
    assert file_bytes(lab, pid) == before
    # Told where the memory is, none of them allocates more than it restores.
    maps = lab.sh(f"cat /proc/{pid}/maps").stdout.decode()
    (address,) = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ rw-s .*/memfd:memory", maps, re.MULTILINE)
    slot = f"--memslot {BASE:#x}:64M@0x{address}"
    lab.mtetool(f"restore /tmp/r {guest} {slot}")
    restored = file_bytes(lab, pid)
    assert restored <= before + 64 * 1024
    lab.mtetool(f"save {guest} {slot} -o /tmp/s", f"diff {guest} /tmp/r {slot}")
    assert file_bytes(lab, pid) == restored
    wrong = f"{BASE:#x}:64M@{int(address, 16) + MIB:#x}"
    refused = lab.run(["mtetool", "save", guest, "-o", "/tmp/t", "--memslot", wrong, "--json"])
    assert (refused.returncode, json.loads(refused.stderr)["error"]) == (2, "out-of-range")
    # All of it is allocated if that is requested.
    lab.mtetool(f"save {guest} --every-page -o /tmp/every", "diff /tmp/s /tmp/every")
    assert file_bytes(lab, pid) == 64 * MIB
    # Where memory is does not matter if all of it exists.
    lab.mtetool(f"save {guest} -o /tmp/s --force")


@pytest.mark.long
def test_private_memory_costs_nothing(lab: Machine) -> None:
    pid = start_test_vmm(lab, f"{BASE:#x}:0x4000000")
    lab.mtetool(f"save kvm:{pid} -o /tmp/s")
