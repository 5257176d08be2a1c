"""Guest memory of huge pages, which kernels since 6.13 accept for a VM with MTE."""

from __future__ import annotations

import json

import pytest

from tests.lab.machine import Machine

_START = """
cd /opt/mtetool
{ sleep 1000 & echo $! >/tmp/sleeper; wait; } | python3 -m tests.lab.hugetlb >/tmp/out 2>&1 &
until grep -q ready /tmp/out || ! kill -0 $!; do sleep 0.1; done
cat /tmp/out; echo $!
"""


@pytest.mark.long
@pytest.mark.kernel("7.3")
def test_a_restore_leaves_no_tags_of_a_huge_pages_last_user(lab: Machine) -> None:
    words = lab.sh(_START).stdout.split()
    size, huge, stale, ready, pid = *map(int, words[:3]), words[3], int(words[4])
    assert ready == b"ready"
    # The kernel shows them after a copy to a part; once it does not, mtetool-restore(1) and the
    # emulator can be simplified.
    assert stale > (huge - 4096) // 16 // 2
    slot = ["--memslot", f"0x40000000:{size}"]
    create = ["mtetool", "emu", "create", "/tmp/e", "--slot", f"0x40000000:{size}"]
    lab.run([*create, "--fill", "heap"], check=True)
    lab.run(["mtetool", "save", "emu:/tmp/e", "-o", "/tmp/s"], check=True)
    restored = lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{pid}", *slot, "--json"], check=True)
    assert json.loads(restored.stdout)["restored_bytes"] == size
    lab.run(["mtetool", "diff", "/tmp/s", f"kvm:{pid}", *slot], check=True)
    lab.sh("kill $(cat /tmp/sleeper)")
