"""`libvirt:DOMAIN`, with libvirt's own daemon and QEMU confined as on a Debian host."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.jsonkeys import check_keys
from tests.lab.guests import as_user
from tests.lab.libvirt import Domain, Libvirt, two_hosts
from tests.lab.machine import Machine

pytestmark = pytest.mark.long  # the walk in test_libvirt_mte has the rest

MIB = 1 << 20
_NAMESPACE = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
_MTE = """\
  <qemu:commandline>
    <qemu:arg value='-machine'/>
    <qemu:arg value='mte=on'/>
  </qemu:commandline>
</domain>
"""
# The words by which `virsh dominfo` and the domain's log report a monitor that others have used.
_TAINT = "custom-monitor"


_DISK = "/var/lib/libvirt/images/disk.img"
_HAS_DISK = f"""
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw'/>
      <source file='{_DISK}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
"""


@dataclass
class TaggedDomain(Domain):
    """A domain whose QEMU turns MTE on by itself."""

    def xml(self) -> str:
        plain = super().xml().replace("<domain ", f"<domain {_NAMESPACE} ", 1)
        head, _, _ = plain.rpartition("</domain>")
        return head + _MTE


def _ask(lab: Machine, *words: str, status: int = 0, env: dict[str, str] | None = None) -> Any:
    """The report of a command, or its error."""
    result = lab.run(["mtetool", *words, "--json"], env=env)
    assert result.returncode == status, result
    document = json.loads(result.stderr.splitlines()[-1] if status == 4 else result.stdout)
    check_keys(document)
    return document


def _vm(lab: Machine, *words: str) -> Any:
    (vm,) = _ask(lab, "list", *words)["vms"]
    return vm


def test_tags_of_a_domain(lab: Machine) -> None:
    host = Libvirt(lab).start()
    lab.sh(f"mkdir -p /var/lib/libvirt/images; truncate -s 1M {_DISK}")
    guest = TaggedDomain(host, "web", devices=_HAS_DISK).start()
    guest.wait_for_checks()
    # The list does without the monitor, and does not taint.
    vm = _vm(lab)
    shown = {key: vm[key] for key in ("source", "name", "pid", "mte", "state", "owner", "reason")}
    assert shown == {
        "source": "libvirt:web",
        "name": "web",
        "pid": guest.pid,
        "mte": True,
        "state": "running",
        "owner": "libvirt-qemu",
        "reason": None,
    }
    assert vm["memslots"][-1]["size_bytes"] == 256 * MIB
    # Nor does what leaves the monitor out.
    asked = _ask(lab, "save", "libvirt:web", "--no-monitor", "-o", "/tmp/asked", "--freeze")
    assert asked["consistent"] is True
    assert _TAINT not in guest.log()
    host.virsh("suspend", "web")
    assert _vm(lab)["state"] == "paused"
    saved = _ask(lab, "save", f"libvirt:{guest.uuid}", "-o", "/tmp/s")
    assert (saved["consistent"], saved["source"]) == (True, f"libvirt:{guest.uuid}")
    assert _TAINT in guest.log()
    described = _ask(lab, "info", "/tmp/s")
    assert (described["source"], described["name"]) == ("libvirt:web", "web")
    assert _ask(lab, "diff", f"kvm:{guest.pid}", "libvirt:web")["same"] is True
    _ask(lab, "restore", "/tmp/s", "libvirt:web")
    assert _ask(lab, "verify", "/tmp/s", "--against", "libvirt:web")["same"] is True
    assert _ask(lab, "enable", "libvirt:web")["changed"] is False
    host.virsh("resume", "web")
    checks = guest.wait_for_checks()
    assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0)] * len(checks)
    assert host.denials() == []
    # No output replaces what the domain has open.
    refused = lab.run(["mtetool", "save", "libvirt:web", "--force", "-o", _DISK])
    assert refused.returncode == 2
    assert b"open in the guest" in refused.stderr


# As on a host where polkit lets everybody read, and members of a group do the rest.
_PERMISSIONS = """
printf '%s\\n' 'auth_unix_ro = "none"' 'auth_unix_rw = "none"' 'unix_sock_rw_perms = "0770"' \\
    >>/etc/libvirt/libvirtd.conf
libvirtd --daemon --pid-file /run/libvirt/libvirtd.pid
"""
_NOBODY = 65534
_SYSTEM = ("--connect", "qemu:///system")


def test_what_is_no_guest(lab: Machine) -> None:
    host = Libvirt(lab).start()
    host.stop()
    lab.sh(_PERMISSIONS)
    guest = Domain(host, "plain").start()
    Domain(host, "off").define()
    guest.wait_for(b"TAGGER no-mte")
    save = ("save", "-o", "/tmp/s")
    for more in ([], ["--no-monitor"]):
        for name, error in (
            ("nix", "no-such-domain"),
            ("x" * 10_000, "no-such-domain"),
            ("\x1b[2J", "no-such-domain"),
            ("11111111-2222-3333-4444-555555555555", "no-such-domain"),
            ("off", "domain-off"),
            ("plain", "mte-off"),
        ):
            refused = _ask(lab, *save, f"libvirt:{name}", *more, status=4)
            assert (name, refused["error"]) == (name, error)
            assert refused["hint"]
    for words in (["libvirt:"], ["libvirt:plain", "--connect", "test:///default"]):
        assert lab.run(["mtetool", *save, *words]).returncode == 2
    # Another user may read what libvirt says of domains, but not look at their processes.
    words = as_user(lab, _NOBODY, "mtetool", *save, "libvirt:plain", *_SYSTEM, "--json")
    for more, why in (([], "refuses this user"), (["--no-monitor"], f"process {guest.pid}")):
        result = lab.run([*words, *more])
        refused = json.loads(result.stderr)
        assert (result.returncode, refused["error"]) == (4, "permission")
        assert why in refused["message"]
    assert guest.state() == "running"
    host.virsh("destroy", "plain")
    assert _ask(lab, *save, "libvirt:plain", status=4)["error"] == "domain-off"


def test_libvirt_that_does_not_answer(lab: Machine) -> None:
    host = Libvirt(lab).start()
    guest = TaggedDomain(host, "web").start()
    guest.wait_for_checks()
    save = ["mtetool", "save", "libvirt:web", "-o", "/tmp/s"]
    lab.sh(f"kill -STOP {host.pid}")
    _listed_by_pid(lab, guest, "has not answered within 4 seconds")
    # Ctrl-C ends the waiting.
    interrupted = lab.run(["timeout", "-s", "INT", "8", *save])
    assert (interrupted.returncode, interrupted.stderr) == (-2, b"")
    assert _ask(lab, *save[1:], status=4)["error"] == "libvirt-unavailable"
    lab.sh(f"kill -CONT {host.pid}")
    _ask(lab, *save[1:], "--freeze")
    # Without its module, without its daemon.
    lab.put("/tmp/none/libvirt.py", b"raise ImportError('it is not here')")
    result = lab.run([*save, "--force"], env={"PYTHONPATH": "/tmp/none:/opt/mtetool"}, fork=False)
    assert result.returncode == 4
    assert b"apt install python3-libvirt" in result.stderr
    host.stop()
    refused = _ask(lab, *save[1:], "--force", status=4)
    assert refused["error"] == "libvirt-unavailable"
    assert "No such file" in refused["message"] or "refused" in refused["message"]
    _listed_by_pid(lab, guest, "libvirt-sock")
    _ask(lab, "save", f"kvm:{guest.pid}", "--no-monitor", "--freeze", "-o", "/tmp/by-pid")


def _listed_by_pid(lab: Machine, guest: Domain, why: str) -> None:
    result = lab.run(["mtetool", "list", "--json"], check=True)
    (vm,) = json.loads(result.stdout)["vms"]
    assert vm["source"].startswith(f"kvm:{guest.pid}:")
    assert (vm["mte"], vm["name"]) == (True, "web")
    warnings = result.stderr.decode().splitlines()
    assert len([line for line in warnings if why in line]) == 1, warnings


def test_domain_that_is_gone_or_forged(lab: Machine) -> None:
    host = Libvirt(lab).start()
    guest = TaggedDomain(host, "web").start()
    guest.wait_for_checks()
    # Processes of others may say what they want.
    lab.sh(
        "ln -s $(command -v python3) /tmp/qemu;"
        f" /tmp/qemu -c 'import time; time.sleep(1000)' -name guest=web -uuid {guest.uuid}"
        " >/dev/null 2>&1 &"
    )
    assert _vm(lab)["source"] == "libvirt:web"
    _ask(lab, "save", "libvirt:web", "-o", "/tmp/s", "--freeze")
    lab.sh(f"kill -KILL {guest.pid}; while [ -e /proc/{guest.pid} ]; do sleep 0.1; done")
    error = _ask(lab, "save", "libvirt:web", "-o", "/tmp/t", status=4)["error"]
    assert error in ("domain-off", "domain-process", "guest-lost")


def test_libvirt_in_a_namespace_of_its_own(lab: Machine) -> None:
    """Of two, each knows its own domains."""
    first, second = two_hosts(lab)
    guest = TaggedDomain(first, "web").start()
    guest.wait_for_checks()
    save = ("save", "libvirt:web", "--freeze", "-o", "/tmp/s")
    _ask(lab, *save, "--connect", first.uri)
    assert _vm(lab, "--connect", first.uri)["source"] == "libvirt:web"
    refused = _ask(lab, *save, "--connect", second.uri, "--force", status=4)
    assert refused["error"] == "no-such-domain"
    assert _vm(lab, "--connect", second.uri)["source"].startswith(f"kvm:{guest.pid}:")
    _ask(lab, *save, "--force", "--no-monitor", env={"LIBVIRT_DEFAULT_URI": first.uri})
