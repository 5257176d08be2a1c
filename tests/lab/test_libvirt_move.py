"""A domain moves between two hosts with its tags, by `examples/migrate-libvirt.sh`."""

from __future__ import annotations

import pytest

from tests.lab.libvirt import Domain, Host
from tests.lab.machine import Machine
from tests.lab.mte_hosts import WRAPPER, two_mte_hosts

_MOVE = "/opt/mtetool/examples/migrate-libvirt.sh"


def _wrong(guest: Domain) -> list[int]:
    return [check.wrong for check in guest.wait_for_checks()]


def _leftovers(host: Host) -> bytes:
    return host.run("sh", "-c", "ls -d /run/mtetool-migrate* /tmp/tmp.*; true").stdout


def test_a_domain_moves_with_its_tags(lab: Machine) -> None:
    first, second = two_mte_hosts(lab)
    guest = Domain(first, "web", emulator=WRAPPER).start()
    assert _wrong(guest) == [0, 0]
    result = first.run(_MOVE, "web", "host2", check=False)
    print(result.stdout.decode(), result.stderr.decode())
    assert result.returncode == 0
    assert result.stdout.endswith(b"migrate: web is at host2, with its tags\n")
    moved = guest.on(second)
    assert moved.state() == "running"
    assert _wrong(moved) == [0, 0]
    assert _leftovers(first) + _leftovers(second) == b""


@pytest.mark.long
def test_a_destination_without_mte_leaves_the_domain_at_the_source(lab: Machine) -> None:
    first, second = two_mte_hosts(lab)
    guest = Domain(first, "web", emulator=WRAPPER).start()
    assert _wrong(guest) == [0, 0]
    second.run("rm", "/run/mtetool/companion.sock")
    result = first.run(_MOVE, "web", "host2", check=False)
    print(result.stdout.decode(), result.stderr.decode())
    assert result.returncode == 4
    assert b"MTE is not enabled" in result.stderr or b"mte" in result.stderr.lower()
    assert result.stderr.endswith(b"migrate: failed; the domain is at the source, as before\n")
    assert guest.state() == "running"
    assert _wrong(guest) == [0, 0]
    assert b"web" not in second.virsh("list", "--all", "--name").stdout
    assert _leftovers(first) + _leftovers(second) == b""
