"""A domain of libvirt has MTE: the emulator wrapper and the companion service, confined."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mtetool.companion.installing import text_of
from tests.lab.libvirt import Domain, Libvirt
from tests.lab.machine import Machine

WRAPPER = "/usr/bin/qemu-system-aarch64-mte"


def install(lab: Machine) -> None:
    """Install the wrapper, and start the service."""
    lab.put(WRAPPER, text_of("wrapper").encode(), 0o755)
    lab.sh(
        "mtetool companion >/tmp/companion.log 2>&1 &"
        " until grep -q /run/mtetool/companion.sock /proc/net/unix; do sleep 0.1; done"
    )


@pytest.fixture
def host(lab: Machine) -> Libvirt:
    """libvirt, with all that mtetool-libvirt(7) installs."""
    install(lab)
    return Libvirt(lab, rules=text_of("apparmor")).start()


def vms(lab: Machine) -> Any:
    """What list says."""
    return json.loads(lab.run(["mtetool", "list", "--json"], check=True).stdout)["vms"]


def test_a_domain_has_mte_and_obeys_virsh(lab: Machine, host: Libvirt) -> None:
    guest = Domain(host, "web", emulator=WRAPPER).start()
    try:
        assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
    finally:
        print(guest.log(), lab.get("/tmp/companion.log").decode(), host.denials())
    assert [(vm["pid"], vm["mte"]) for vm in vms(lab)] == [(guest.pid, True)]
    assert lab.get(f"/proc/{guest.pid}/attr/current") == f"{guest.profile} (enforce)\n".encode()
    assert host.denials() == []
    assert "mtetool" not in guest.log().replace(WRAPPER, "")
    lab.mtetool(f"save kvm:{guest.pid} --freeze -o /tmp/s", "verify /tmp/s")
    first = guest.pid
    host.virsh("reset", "web")
    guest.wait_for_checks()
    assert guest.pid == first
    host.virsh("destroy", "web")
    host.virsh("start", "web")
    assert guest.pid != first
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
