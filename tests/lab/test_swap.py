"""Tags survive swapping: guest memory on a swap device is saved and restored exactly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtetool.cli import group
from tests.lab.guests import Qemu, kill_vmms, page_bytes, start_test_vmm
from tests.lab.machine import Machine

PAGE = 4096
BASE = 0x40000000
MIB = 1 << 20

_ON = """
fallocate -l 192M /root/swap
chmod 600 /root/swap
mkswap /root/swap >/dev/null
swapon /root/swap
mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/vmm
printf '#!/bin/sh\\necho $$ >/sys/fs/cgroup/vmm/cgroup.procs\\nexec "$@"\\n' >/root/swappable
chmod 755 /root/swappable
"""
_OFF = "swapoff /root/swap && rmdir /sys/fs/cgroup/vmm && rm /root/swap /root/swappable"


@dataclass(frozen=True)
class Swap:
    """A machine with a swap file; a VMM that `wrapper` starts can be paged out to it."""

    lab: Machine
    wrapper: str = "/root/swappable"

    def page_out(self, pid: int, size: int, enough: int = 0) -> list[int]:
        """Page out the mappings of a size; return how many pages of each are on swap only.

        These are all that were in memory, or at least `enough`.
        """
        words = [str(pid), str(size), *([str(enough)] if enough else [])]
        env = {"PYTHONPATH": "/opt/mtetool"}
        command = ["python3", "-m", "tests.lab.swapping", *words]
        found = json.loads(self.lab.run(command, env=env, check=True).stdout)
        for each in found:
            assert each["copies"] == 0
            assert each["swapped"] >= enough if enough else each["present"] == 0
        return [each["swapped"] for each in found]

    def read_in(self) -> int:
        """Count the pages ever read from the swap file: all but those whose data are zeros."""
        return int(self.lab.sh("sed -n 's/^pswpin //p' /proc/vmstat").stdout)


@pytest.fixture
def swap(lab: Machine) -> Iterator[Swap]:
    lab.sh(_ON)
    yield Swap(lab)
    kill_vmms(lab)
    lab.sh(_OFF)


def _mtetool(*words: object) -> bytes:
    """Run a command that needs no kernel outside the lab; return its output."""
    result = CliRunner().invoke(group, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout_bytes


def _snapshot(directory: Path, seed: int, slots: list[str]) -> Path:
    guest, path = directory / f"guest{seed}", directory / f"snapshot{seed}"
    options = [word for slot in slots for word in ("--slot", slot)]
    _mtetool("emu", "create", guest, *options, "--fill", "random", "--seed", seed)
    _mtetool("save", f"emu:{guest}", "-o", path)
    return path


@pytest.mark.long
def test_swapped_memory_is_saved_and_restored(swap: Swap, tmp_path: Path) -> None:
    lab, size = swap.lab, 1 * MIB
    slots = [f"{BASE:#x}:{size}", f"{BASE + 16 * MIB:#x}:{size}"]
    first, second = (_snapshot(tmp_path, seed, slots) for seed in (1, 2))
    for path in (first, second):
        lab.put(f"/tmp/{path.name}", path.read_bytes())
    memory = ["--data", slots[0], f"{slots[1]}:memfd"]
    pid = start_test_vmm(lab, "--vcpus", "1", *memory, wrapper=swap.wrapper)
    guest = [f"kvm:{pid}", *(word for slot in slots for word in ("--memslot", slot))]
    lab.run(["mtetool", "restore", "/tmp/snapshot1", *guest], check=True)

    pages = size // page_bytes(lab)
    assert swap.page_out(pid, size) == [pages, pages]
    before = swap.read_in()
    lab.run(["mtetool", "save", *guest, "-o", "/tmp/s"], check=True)
    # Every other page has data, and had to come from the swap file.
    assert swap.read_in() - before >= pages
    (tmp_path / "s").write_bytes(lab.get("/tmp/s"))
    tags = _mtetool("dump", first, "--output", "raw")
    assert len(set(tags)) == 16
    assert _mtetool("dump", tmp_path / "s", "--output", "raw") == tags

    # Pages on swap keep the tags that are written to them, even after they go there again.
    swap.page_out(pid, size)
    lab.run(["mtetool", "restore", "/tmp/snapshot2", *guest], check=True)
    swap.page_out(pid, size)
    verified = lab.run(["mtetool", "dump", *guest, "--output", "raw"], check=True)
    assert verified.stdout == _mtetool("dump", second, "--output", "raw") != tags


@pytest.mark.long
def test_live_guest_whose_memory_is_swapped(swap: Swap, tmp_path: Path) -> None:
    lab, size = swap.lab, 128 * MIB
    options = "tagger.ipas=1 tagger.mib=2"
    guest = Qemu(lab, "g", memory="128M", wrapper=swap.wrapper, guest_options=options).start()
    guest.wait_for_checks(1)
    guest.qmp("stop")
    ipas = guest.ipas()
    assert len(ipas) == 512

    (n_pages,) = swap.page_out(guest.pid, size)
    assert n_pages > len(ipas)
    lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s"], check=True)
    (tmp_path / "s").write_bytes(lab.get("/tmp/s"))
    tags = _mtetool("dump", tmp_path / "s", "--range", f"{BASE:#x}:128M", "--output", "raw")
    for page, ipa in ipas.items():
        start = (ipa - BASE) // 16
        expected = bytes((granule * 5 + page) & 15 for granule in range(PAGE // 16))
        assert tags[start : start + PAGE // 16] == expected
    swap.page_out(guest.pid, size, n_pages)
    lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{guest.pid}"], check=True)
    swap.page_out(guest.pid, size, n_pages)
    guest.qmp("cont")
    checks = guest.wait_for_checks()
    assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0), (0, 0)]
