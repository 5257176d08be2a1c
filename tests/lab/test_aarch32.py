"""Memory tags and AArch32 code: at EL0 of a guest with MTE it runs as always, unchecked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mtetool.cli import group
from tests.lab.guests import Qemu
from tests.lab.machine import Machine

PAGE = 4096
BASE = 0x40000000
_SAID = re.compile(r"^MIXED (\S+) (-?\d+)$", re.MULTILINE)
EINVAL = -22
SEGV_MTESERR = 9

# What the guest `mixed` must print (tests/lab/programs/mixed.c).
FINDINGS = {
    # The 64-bit side of the guest has MTE, and a 32-bit process runs beside it.
    "hwcap2-64-mte": 1,
    "runs": 1,
    # It can map memory that can have tags, but cannot turn on checks.
    "own-prot-mte": 0,
    "own-tagged": 1,
    "own-mprotect": 0,
    "set-checks": EINVAL,
    "get-checks": EINVAL,
    # Tags that a 64-bit process gave to that memory do not affect it.
    "own-poked": PAGE // 16,
    "own-load": 1,
    "own-store": 1,
    # The same for memory shared with 64-bit code, mapped with PROT_MTE or without; tags stay.
    "shared-prot-mte": 0,
    "plain-loads-wrong": 0,
    "plain-stores-wrong": 0,
    "plain-tags-wrong": 0,
    "tagged-loads-wrong": 0,
    "tagged-stores-wrong": 0,
    "tagged-tags-wrong": 0,
    "system-call": 1,
    # The tags are real: 64-bit code with checks on faults at the same address.
    "checked-64-bit-fault": SEGV_MTESERR,
}
# None of the bits for 32-bit programs (arch/arm64/include/asm/hwcap.h) is for MTE: they are
# AES, PMULL, SHA1, SHA2, CRC32, SB and SSBS.
HWCAP2_OF_32_BIT = 0x7F


@pytest.mark.long
def test_32_bit_process_in_a_guest_with_mte(lab: Machine, tmp_path: Path) -> None:
    guest = Qemu(lab, "g", initrd="/lab/mixed.cpio", memory="128M").start()
    # From now on the guest's CPU is in AArch32 most of the time.
    guest.wait_for_checks(1)
    said = {name: int(value) for name, value in _SAID.findall(guest.output().decode())}
    own_ipa = said.pop("own-ipa")
    said.pop("hwcap-32")
    assert said.pop("hwcap2-32") & ~HWCAP2_OF_32_BIT == 0
    assert said == FINDINGS

    lab.run(["mtetool", "save", f"kvm:{guest.pid}", "--freeze", "-o", "/tmp/s"], check=True)
    (tmp_path / "s").write_bytes(lab.get("/tmp/s"))
    words = ["dump", str(tmp_path / "s"), "--range", f"{BASE:#x}:128M", "--output", "raw"]
    tags = CliRunner().invoke(group, words).stdout_bytes
    shared = guest.ipas()
    assert len(shared) == 2
    for page, ipa in shared.items():
        expected = bytes((granule * 5 + page) & 15 for granule in range(PAGE // 16))
        assert _tags_of_page(tags, ipa) == expected
    assert _tags_of_page(tags, own_ipa) == bytes((g * 3 + 1) & 15 for g in range(PAGE // 16))
    lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{guest.pid}"], check=True)
    checks = guest.wait_for_checks()
    assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0), (0, 0)]


@pytest.mark.long
def test_32_bit_kernel_does_not_start_where_mte_was_enabled(lab: Machine) -> None:
    """KVM refuses the vCPU, not the enabling: it cannot know the kind of the vCPU yet."""
    cpu = "host,aarch64=off,sve=off"
    without = Qemu(lab, "without", mte=False, cpu=cpu).start()
    without.qmp("x-exit-preconfig")
    guest = Qemu(lab, "g", mte=False, cpu=cpu).start()
    lab.run(["mtetool", "enable", f"kvm:{guest.pid}"], check=True)
    with pytest.raises(AssertionError, match="x-exit-preconfig ended with 1"):
        guest.qmp("x-exit-preconfig")
    said = lab.get("/tmp/g.out")
    assert b"kvm_arch_init_vcpu failed (0): Invalid argument" in said
    assert lab.sh(f"cat /proc/{without.pid}/comm").stdout.startswith(b"qemu")


def _tags_of_page(tags: bytes, ipa: int) -> bytes:
    """Return a page's tags, out of those of all the memory."""
    start = (ipa - BASE) // 16
    return tags[start : start + PAGE // 16]
