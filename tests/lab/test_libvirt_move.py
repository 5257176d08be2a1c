"""A domain moves between two hosts with its tags, by `examples/migrate-libvirt.sh`."""

from __future__ import annotations

import pytest

from tests.lab.libvirt import Domain, Host
from tests.lab.machine import Machine
from tests.lab.mte_hosts import WRAPPER, two_mte_hosts
from tests.lab.walk import sections

pytestmark = pytest.mark.long  # two hosts in one emulated machine: minutes

_MOVE = "/opt/mtetool/examples/migrate-libvirt.sh"


def _wrong(guest: Domain) -> set[int]:
    return {check.wrong for check in guest.wait_for_checks()}


def _leftovers(host: Host) -> bytes:
    return host.run("sh", "-c", "ls -d /run/mtetool-migrate* /tmp/tmp.*; true").stdout


def test_the_page_names_this_script() -> None:
    assert sections()["MOVE A DOMAIN"] == ["examples/migrate-libvirt.sh web host2"]


def test_a_domain_moves_with_its_tags(lab: Machine) -> None:
    first, second = two_mte_hosts(lab)
    guest = Domain(first, "web", emulator=WRAPPER).start()
    assert _wrong(guest) == {0}
    result = first.run(_MOVE, "web", "host2", check=False)
    print(result.stdout.decode(), result.stderr.decode())
    assert result.returncode == 0
    assert result.stdout.endswith(b"migrate: web is at host2, with its tags\n")
    moved = guest.on(second)
    assert moved.state() == "running"
    assert _wrong(moved) == {0}
    assert _leftovers(first) + _leftovers(second) == b""


def test_a_destination_without_mte_leaves_the_domain_at_the_source(lab: Machine) -> None:
    first, second = two_mte_hosts(lab)
    guest = Domain(first, "web", emulator=WRAPPER).start()
    assert _wrong(guest) == {0}
    second.run("rm", "/run/mtetool/companion.sock")
    result = first.run(_MOVE, "web", "host2", check=False)
    print(result.stdout.decode(), result.stderr.decode())
    assert result.returncode == 4
    assert b"MTE is not enabled" in result.stderr or b"mte" in result.stderr.lower()
    assert result.stderr.endswith(b"migrate: failed; the domain is at the source, as before\n")
    assert guest.state() == "running"
    assert _wrong(guest) == {0}
    assert b"web" not in second.virsh("list", "--all", "--name").stdout
    assert _leftovers(first) + _leftovers(second) == b""


def test_without_mtetool_the_tags_stay_behind(lab: Machine) -> None:
    """The control: the same migration, without tags."""
    first, second = two_mte_hosts(lab)
    guest = Domain(first, "web", emulator=WRAPPER).start()
    assert _wrong(guest) == {0}
    lab.put("/tmp/true", b'#!/bin/sh\n[ $1 != save ] || : >"$6"\n', 0o755)
    result = first.run("env", "MTETOOL=/tmp/true", _MOVE, "web", "host2")
    assert result.returncode == 0
    assert min(_wrong(guest.on(second))) > 200_000
