"""A domain of libvirt has MTE: the emulator wrapper and the companion service, confined."""

from __future__ import annotations

import pytest

from tests.lab.libvirt import Domain
from tests.lab.machine import Machine
from tests.lab.mte_hosts import WRAPPER, debian_host, list_vms, mte_host
from tests.lab.walk import sections, stand_in

_CACHE = "/var/cache/libvirt/qemu/capabilities"
_ON_DISK = """<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>"""


def _check(guest: Domain) -> None:
    assert {check.wrong for check in guest.wait_for_checks()} == {0}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_walk_of_the_manual_page(lab: Machine, whole: bool) -> None:
    """All its commands, in its order; the last but one section's are in test_libvirt_live.

    The short one ends when the domain has MTE.
    """
    page = sections()
    assert list(page) == [
        "INSTALL (ON EACH HOST)",
        "SWITCH MTE ON FOR A DOMAIN",
        "LOOK, SAVE, RESTORE",
        "MOVE A DOMAIN",
        "UPGRADES OF QEMU",
    ]
    install, switch, look, _, upgrade = page.values()
    lab.sh(f"rm -f {WRAPPER} /run/mtetool/companion.sock")
    stand_in(lab)
    host = debian_host(lab)
    _run(lab, install)
    guest = Domain(host, "web").define()
    said = _run(lab, switch)
    assert "libvirt:web  qemu-system-aarch64-" not in said  # QEMU itself, not the wrapper
    assert "libvirt:web  qemu-system-aarch64" in said
    assert "mtetool: " not in guest.log()
    _check(guest)
    (vm,) = list_vms(lab)
    assert (vm["source"], vm["pid"], vm["mte"]) == ("libvirt:web", guest.pid, True)
    assert lab.get(f"/proc/{guest.pid}/attr/current") == f"{guest.profile} (enforce)\n".encode()
    if not whole:
        assert host.denials() == []
        return
    host.virsh("suspend", "web")  # it hammers its tags: what was saved must still be there
    _run(lab, look[:2])
    host.virsh("resume", "web")
    _run(lab, look[2:])
    _check(guest)
    before = lab.sh(f"grep -l {WRAPPER} {_CACHE}/* | xargs cat").stdout
    _run(lab, upgrade)
    host.virsh("domcapabilities", "--emulatorbin", WRAPPER)
    assert lab.sh(f"grep -l {WRAPPER} {_CACHE}/* | xargs cat").stdout != before
    assert host.denials() == []


def _run(lab: Machine, lines: list[str]) -> str:
    """Run a section as a script that ends at the first failure."""
    result = lab.run(["sh", "-ec", "\n".join(lines)], timeout=400, check=True)
    return result.stdout.decode()


@pytest.mark.long
def test_what_virsh_does_to_a_domain_it_does_to_one_with_mte(lab: Machine) -> None:
    host = mte_host(lab)
    guest = Domain(host, "web", emulator=WRAPPER).start()
    _check(guest)
    first = guest.pid
    host.virsh("reset", "web")
    _check(guest)
    assert guest.pid == first
    host.virsh("suspend", "web")
    assert [vm["state"] for vm in list_vms(lab)] == ["paused"]
    lab.mtetool("save libvirt:web -o /tmp/s")
    host.virsh("managedsave", "web")
    host.virsh("start", "web", "--paused")
    lab.mtetool("restore /tmp/s libvirt:web")
    host.virsh("resume", "web")
    _check(guest)
    host.virsh("destroy", "web")
    host.virsh("start", "web")
    _check(guest)
    assert host.denials() == []


@pytest.mark.long
def test_memory_in_a_file_ends_qemu_and_the_log_has_said_so(lab: Machine) -> None:
    host = mte_host(lab)
    guest = Domain(host, "web", emulator=WRAPPER)
    lab.put("/tmp/web.xml", guest.xml().replace("<vcpu>", f"{_ON_DISK}<vcpu>").encode())
    host.virsh("define", "/tmp/web.xml")
    assert host.virsh("start", "web", check=False).returncode
    log = guest.log()
    assert "KVM refuses memory of a file outside tmpfs" in log
    assert log.index("KVM refuses") < log.index("error registering slot")


@pytest.mark.long
def test_without_the_service_a_domain_starts_and_its_log_says_why(lab: Machine) -> None:
    host = mte_host(lab)
    lab.sh("rm /run/mtetool/companion.sock")
    guest = Domain(host, "web", emulator=WRAPPER).start()
    guest.wait_for(b"no-mte")
    assert "so this VM has no MTE" in guest.log()
    assert host.virsh("domstate", "web").stdout.strip() == b"running"
