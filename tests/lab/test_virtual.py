"""`dump --virtual`: addresses of a guest's kernel and programs, by its own page tables."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.jsonkeys import check_keys
from tests.lab.guests import Qemu, start_test_vmm
from tests.lab.machine import Machine

_ENV = {"PYTHONPATH": "/opt/mtetool"}

# Stops the guest in its only program, and prints an address that this maps to tagged memory.
_TAGGED = """
import sys
from mtetool.backends.kvm.guest import open_kvm
from mtetool.guest import GuestOptions, Mapped
from tests.lab.virtual import Qmp, stop_at
stop_at(Qmp(sys.argv[2]), 0)
with open_kvm(sys.argv[1], GuestOptions()) as guest:
    (space,) = guest.address_spaces()
    for part in space.parts(0, 1 << 48):
        if isinstance(part, Mapped):
            tags = bytearray(256)
            guest.read_tags(part.ipa // 4096 * 4096, tags)
            first = part.ipa % 4096 // 16
            if tags[first] and tags[first] != tags[first + 1]:
                print(part.address, part.ipa, tags[first])
                break
"""


def _compared(lab: Machine, guest: Qemu, half: int, each: int) -> dict[str, Any]:
    words = ["python3", "-m", "tests.lab.virtual"]
    words += [str(guest.pid), guest.qmp_path, str(half), str(each)]
    result = lab.run(words, env=_ENV, check=True, timeout=900)
    found: dict[str, Any] = json.loads(result.stdout)
    print(found, flush=True)
    return found


# Thousands of addresses take some minutes.
@pytest.mark.parametrize("each", [40, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.every_kernel(long=["6.12-16k", "7.3"])
def test_the_kernels_addresses_are_those_of_qemu(lab: Machine, each: int) -> None:
    guest = Qemu(lab, "g").start()
    guest.wait_for_checks(1)
    found = _compared(lab, guest, 1, each)
    assert found["differing"] == []
    assert found["n"] >= 3 * each
    assert sum(n for size, n in found["sizes"].items() if size != "unmapped") >= each
    # The kernel's own memory is mapped in blocks, too.
    assert len(found["sizes"]) >= 3
    assert {check.wrong for check in guest.wait_for_checks(1)} == {0}


@pytest.mark.long
def test_a_programs_addresses_are_those_of_qemu(lab: Machine) -> None:
    guest = Qemu(lab, "g", guest_options="tagger.load=1").start()
    guest.wait_for_checks(1)
    found = _compared(lab, guest, 0, 1000)
    assert found["differing"] == []
    assert found["n"] >= 3000
    assert sum(n for size, n in found["sizes"].items() if size != "unmapped") >= 1000
    assert {check.wrong for check in guest.wait_for_checks(1)} == {0}


def _at(lab: Machine, guest: Qemu, address: int, *more: str) -> tuple[int, dict[str, Any], bytes]:
    words = ["dump", f"kvm:{guest.pid}", "--virtual", "--at", f"{address:#x}", "--json", *more]
    result = lab.run(["mtetool", *words])
    document = json.loads(result.stdout or result.stderr)
    if result.stdout:
        check_keys(document)
    return result.returncode, document, result.stderr


@pytest.mark.long
def test_pointers_of_a_program(lab: Machine) -> None:
    """The tag of a pointer is compared with that of the page that the guest maps it to."""
    guest = Qemu(lab, "g").start()
    guest.wait_for_checks(1)
    lab.put("/tmp/tagged.py", _TAGGED.encode())
    words = ["python3", "/tmp/tagged.py", str(guest.pid), guest.qmp_path]
    found = lab.run(words, env=_ENV, check=True, timeout=300).stdout.split()
    address, ipa, tag = (int(word) for word in found)
    status, document, _ = _at(lab, guest, address | tag << 56)
    (row,) = document["addresses"]
    assert status == 0, row
    assert (row["ipa"], row["tag"], row["match"]) == (ipa, tag, True)
    assert row["virtual"]["address"] == address
    assert (row["virtual"]["vcpu"], row["virtual"]["ttbr"]) == (0, 0)
    assert row["context"][32] == tag
    wrong = (tag + 1) % 16
    status, document, _ = _at(lab, guest, address | wrong << 56, "--vcpu", "0", "--no-monitor")
    (row,) = document["addresses"]
    assert (status, row["match"], row["pointer_tag"]) == (1, False, wrong)
    text = lab.run(
        ["mtetool", "dump", f"kvm:{guest.pid}", "--virtual", "--at", f"{address | wrong << 56:#x}"]
    )
    print(text.stdout.decode(), flush=True)
    assert f"pointer {wrong:x}, memory {tag:x}: mismatch".encode() in text.stdout
    # What the guest does not map, and what no address is.
    for nowhere in (0x0000_7FFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000, 0xFF00_1234_5678_0000):
        status, document, stderr = _at(lab, guest, nowhere)
        assert (status, document["error"]) == (4, "not-mapped"), stderr
    # One that is mapped is shown all the same.
    status, document, _ = _at(lab, guest, address, "--at", "0x7ffffffff000")
    assert status == 3
    assert [row["error"] for row in document["addresses"]] == [None, "not-mapped"]
    status, document, _ = _at(lab, guest, address, "--vcpu", "5")
    assert (status, document["error"]) == (4, "no-vcpu")
    guest.qmp("cont")
    assert {check.wrong for check in guest.wait_for_checks(1)} == {0}


def test_a_vcpu_that_was_never_started(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--vcpus", "1", "0x40000000:0x100000")
    words = ["dump", f"kvm:{pid}", "--virtual", "--at", "0x40000000", "--json"]
    result = lab.run(["mtetool", *words])
    assert (result.returncode, json.loads(result.stderr)["error"]) == (4, "no-vcpu")
    assert b"never initialized" in result.stderr
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    result = lab.run(["mtetool", "dump", f"kvm:{pid}", *words[2:]])
    assert (result.returncode, json.loads(result.stderr)["error"]) == (4, "no-vcpu")


def test_before_the_mmu_is_on(lab: Machine) -> None:
    """QEMU's vCPU has not run yet: an address is a physical one."""
    guest = Qemu(lab, "g", extra="-S").start().wait_for_machine()
    status, document, stderr = _at(lab, guest, 0x4000_0000, "--every-page")
    assert status == 0, stderr
    (row,) = document["addresses"]
    assert (row["ipa"], row["virtual"]["ttbr"]) == (0x4000_0000, None)


def test_a_vmm_whose_only_thread_is_its_vcpu(lab: Machine) -> None:
    """It never leaves KVM_RUN by itself, which the question would wait for."""
    pid = start_test_vmm(lab, "--run", "0x40000000:0x100000")
    words = ["dump", f"kvm:{pid}", "--virtual", "--at", "0x40000000", "--every-page", "--json"]
    for _ in range(3):
        result = lab.run(["mtetool", *words], timeout=120)
        assert result.returncode == 0, result.stderr
        (row,) = json.loads(result.stdout)["addresses"]
        assert (row["ipa"], row["virtual"]["ttbr"]) == (0x4000_0000, None)
    lab.sh(f"kill -0 {pid}")
