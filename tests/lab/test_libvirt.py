"""libvirt as Debian packages it: what mtetool sees of its domains, with QEMU confined."""

from __future__ import annotations

import json

import pytest

from tests.lab.libvirt import QEMU, Domain, Libvirt
from tests.lab.machine import Machine

MIB = 1 << 20


@pytest.mark.long  # the walk in test_libvirt_mte is confined, too
def test_domain_is_as_confined_as_on_a_debian_host(lab: Machine) -> None:
    host = Libvirt(lab).start()
    guest = Domain(host, "web").start()
    guest.wait_for(b"TAGGER no-mte")
    assert guest.state() == "running"
    assert lab.sh(f"readlink /proc/{guest.pid}/exe").stdout.decode() == f"{QEMU}\n"
    status = lab.sh(f"grep -E '^(Uid|CapEff|NoNewPrivs|Seccomp):' /proc/{guest.pid}/status")
    values = dict(line.split(":\t", 1) for line in status.stdout.decode().splitlines())
    assert values == {
        "Uid": "\t".join(["64055"] * 4),
        "CapEff": "0" * 16,
        "NoNewPrivs": "1",
        "Seccomp": "2",
    }
    confined = lab.get(f"/proc/{guest.pid}/attr/current").decode()
    assert confined == f"{guest.profile} (enforce)\n"
    assert lab.get(f"/proc/{host.pid}/attr/current") == b"libvirtd (enforce)\n"
    namespaces = [lab.sh(f"readlink /proc/{pid}/ns/mnt").stdout for pid in (guest.pid, 1)]
    assert len(set(namespaces)) == 2
    assert host.denials() == []
    pid = guest.pid
    host.virsh("destroy", guest.name)
    assert guest.state() == "shut off"
    assert lab.sh(f"[ -e /proc/{pid} ]", check=False).returncode
    assert guest.profile.encode() not in lab.get("/sys/kernel/security/apparmor/profiles")


@pytest.mark.long
def test_domain_without_mte(lab: Machine) -> None:
    host = Libvirt(lab).start()
    guest = Domain(host, "web", vcpus=2).start()
    (vm,) = _list(lab)
    shown = {key: vm[key] for key in ("pid", "vmm", "name", "vcpus", "mte", "owner", "reason")}
    assert shown == {
        "pid": guest.pid,
        "vmm": "qemu-system-aarch64",
        "name": "web",
        "vcpus": 2,
        "mte": False,
        "owner": "libvirt-qemu",
        "reason": None,
    }
    result = lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s", "--json"])
    assert result.returncode == 4
    assert json.loads(result.stderr)["error"] == "mte-off"
    assert guest.state() == "running"
    assert host.denials() == []


@pytest.mark.long
def test_daemon_begins_with_the_packaged_state(lab: Machine) -> None:
    """Whatever an earlier test has left."""
    host = Libvirt(lab, settings={"remember_owner": "0"}, rules="  /tmp/mine rw,\n").start()
    Domain(host, "web").start()
    host.stop()
    lab.sh("kill $(cat /run/libvirt/qemu/web.pid)")
    host = Libvirt(lab).start()
    assert host.virsh("list", "--all", "--name").stdout.strip() == b""
    assert lab.sh("grep -r ^remember_owner /etc/libvirt", check=False).stdout == b""
    assert lab.sh("ls /etc/apparmor.d/libvirt").stdout.split() == [b"TEMPLATE.qemu"]


def _list(lab: Machine) -> list[dict[str, object]]:
    result = lab.run(["mtetool", "list", "--json"], check=True)
    vms: list[dict[str, object]] = json.loads(result.stdout)["vms"]
    return vms
