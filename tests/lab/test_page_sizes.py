"""Snapshots between hosts with 4 KiB and 16 KiB pages: every tag, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.lab.guests import Qemu, fill_with_random_tags, start_test_vmm
from tests.lab.machine import Machine

SMALL, LARGE = "6.12", "6.12-16k"
MIB = 1 << 20
RAM = 0x40000000
# Otherwise QEMU gives its guest a page for stolen time, as large as the host's pages.
_CPU = "-cpu host,kvm-steal-time=off"

LabOn = Callable[[str], Machine]


def _carry(path: str, source: Machine, target: Machine) -> None:
    target.put(path, source.get(path))


def _run(lab: Machine, command: str) -> None:
    lab.run(["mtetool", *command.split()], check=True, timeout=300)


def _tags(lab: Machine, source: str) -> bytes:
    return lab.run(["mtetool", "dump", *source.split(), "--output", "raw"], check=True).stdout


@pytest.mark.long
def test_every_tag_there_and_back(lab_on: LabOn) -> None:
    """A guest's tags go to a VMM on a host with other pages; the guest checks what comes back."""
    labs = lab_on(SMALL), lab_on(LARGE)
    guest, other = (Qemu(lab, "guest", extra=_CPU).start() for lab in labs)
    for qemu in (guest, other):
        assert [check.wrong for check in qemu.wait_for_checks()] == [0, 0]
        qemu.qmp("stop")
    _run(labs[0], f"save kvm:{guest.pid} -o /tmp/out")
    _carry("/tmp/out", *labs)
    # Clear all tags first, so every tag comes with the snapshot.
    for lab, qemu in zip(labs, (guest, other), strict=True):
        _run(lab, f"emu create /tmp/e --memory {qemu.memory}")
        _run(lab, "save emu:/tmp/e -o /tmp/none")
        _run(lab, f"restore /tmp/none kvm:{qemu.pid}")
    _run(labs[1], f"restore /tmp/out kvm:{other.pid}")
    _run(labs[1], f"verify /tmp/out --against kvm:{other.pid}")
    _run(labs[1], f"save kvm:{other.pid} -o /tmp/back")
    _carry("/tmp/back", labs[1], labs[0])
    _run(labs[0], "diff /tmp/out /tmp/back")
    assert labs[0].run(["mtetool", "diff", "/tmp/out", f"kvm:{guest.pid}"]).returncode == 1
    _run(labs[0], f"restore /tmp/back kvm:{guest.pid}")
    _run(labs[0], f"diff /tmp/out kvm:{guest.pid}")
    guest.qmp("cont")
    checks = guest.wait_for_checks(3)
    assert [(check.wrong, check.granules) for check in checks] == [(0, 262_144)] * 3


@pytest.mark.long
def test_a_range_of_random_tags_and_nothing_else(lab_on: LabOn) -> None:
    """The range spans two adjacent slots."""
    labs = lab_on(SMALL), lab_on(LARGE)
    slots = (f"{RAM:#x}:0x104000", f"{RAM + 0x104000:#x}:0xfc000")
    pids = [start_test_vmm(lab, *slots) for lab in labs]
    fill_with_random_tags(labs[0], pids[0], "2M")
    _run(labs[0], f"save kvm:{pids[0]} -o /tmp/s --range 0x40100000:32K")
    _carry("/tmp/s", *labs)
    _run(labs[1], f"restore /tmp/s kvm:{pids[1]}")
    wanted, found = (_tags(lab, f"kvm:{pid}") for lab, pid in zip(labs, pids, strict=True))
    first, last = MIB // 16, (MIB + 0x8000) // 16
    assert len(set(wanted[first:last])) == 16
    assert found[first:last] == wanted[first:last]
    assert not any(found[:first] + found[last:])


# Snapshots of a host with 4 KiB pages: its VMM's slot, options and exit status of the save, and
# words of the refusal. The VMM on the other host has 2 MiB.
_REFUSED = (
    ("0x5000", "", 0, "the snapshot's memory 0x40000000:0x5000"),
    ("0x101000", "--memslot 0x40000000:2M", 3, "missing, 0x40101000:0xff000,"),
)


@pytest.mark.long
def test_what_cannot_be_aligned_is_refused(lab_on: LabOn) -> None:
    small, large = lab_on(SMALL), lab_on(LARGE)
    target = start_test_vmm(large, f"{RAM:#x}:0x200000")
    fill_with_random_tags(large, target, "2M")
    before = _tags(large, f"kvm:{target}")
    assert len(set(before)) == 16
    for size, words, status, message in _REFUSED:
        pid = start_test_vmm(small, f"{RAM:#x}:{size}")
        save = ["mtetool", "save", f"kvm:{pid}", "--force", "-o", "/tmp/s", *words.split()]
        assert small.run(save).returncode == status
        _carry("/tmp/s", small, large)
        result = large.run(["mtetool", "restore", "/tmp/s", f"kvm:{target}"])
        assert (result.returncode, result.stdout) == (4, b"")
        assert message in result.stderr.decode()
        assert b"pages of the guest, which have 16384 bytes" in result.stderr
    words = f"restore /tmp/s kvm:{target} --map {RAM:#x}={RAM + 0x1000:#x}"
    result = large.run(["mtetool", *words.split()])
    assert result.returncode == 2, result.stderr
    assert b"16384 bytes" in result.stderr
    assert _tags(large, f"kvm:{target}") == before


@pytest.mark.long
def test_stolen_time_of_qemu_does_not_fit(lab_on: LabOn) -> None:
    """The page that holds it is as large as the host's; see mtetool-restore(1)."""
    small, large = lab_on(SMALL), lab_on(LARGE)
    source, target = (Qemu(lab, "guest", extra="-S").start().pid for lab in (small, large))
    _run(small, f"save kvm:{source} -o /tmp/whole")
    _run(small, f"save kvm:{source} -o /tmp/ram --slot 3")
    for name in ("whole", "ram"):
        _carry(f"/tmp/{name}", small, large)
    result = large.run(["mtetool", "restore", "/tmp/whole", f"kvm:{target}"])
    assert result.returncode == 4
    assert b"0x90a0000:0x1000 does not start and end on pages" in result.stderr
    _run(large, f"restore /tmp/ram kvm:{target}")
