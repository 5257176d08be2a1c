"""`virsh save`, `restore`, `managedsave` and snapshots with memory carry the tags along."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mtetool.relay.saved import MAGIC
from tests.lab.libvirt import Domain, Libvirt
from tests.lab.machine import Machine
from tests.lab.mte_hosts import WRAPPER, list_vms, mte_host

_FILTERS = "/usr/lib/mtetool/filters"
_SAVED = "/var/lib/libvirt/qemu/save/web.saved"
_LOG = "/var/log/libvirt/libvirtd.log"
# gzip is the compressor that the lab has.
_INSTALL = f"""
mkdir -p {_FILTERS}
mtetool relay filter --show program >{_FILTERS}/gzip
chmod 755 {_FILTERS}/gzip
mtetool relay filter --show unit >/tmp/unit
mtetool relay filter --show apparmor
"""
_UNIT = re.compile(rb"^Environment=(PATH=\S+)$", re.MULTILINE)


def _host(lab: Machine, *, filtered: bool = True) -> Libvirt:
    """A host whose libvirt saves through the stand-in, installed as its page says."""
    host = mte_host(lab)
    return _with_filter(host) if filtered else host


def _with_filter(host: Libvirt) -> Libvirt:
    lab = host.lab
    rules = lab.sh(_INSTALL).stdout.decode()
    environment = _UNIT.search(lab.get("/tmp/unit"))
    assert environment
    host.stop()
    lab.sh("pkill virtlogd; true")
    changed = replace(host, daemon_rules=rules, environment=environment[1].decode())
    return changed.start()


def _web(host: Libvirt) -> Domain:
    guest = Domain(
        host,
        "web",
        emulator=WRAPPER,
        memory_mib=128,
        initrd="/lab/hammer.cpio",
        guest_options="hammer.mib=4 hammer.pause=5",
    ).start()
    guest.wait_for(b"TAGGER ready")
    _check(guest)
    return guest


def _check(guest: Domain) -> None:
    assert {(check.wrong, check.data_wrong) for check in guest.wait_for_checks(3)} == {(0, 0)}


def _size(lab: Machine, path: str = _SAVED) -> int:
    return int(lab.sh(f"stat -c %s {path}").stdout)


@pytest.mark.long
def test_saved_and_restored_with_every_tag(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    host.virsh("save", "web", _SAVED)
    data = lab.get(_SAVED)
    assert data.startswith(b"LibvirtQemudSave")
    assert MAGIC in data
    print("file:", len(data))
    host.virsh("restore", _SAVED)
    _check(guest)
    assert [vm["mte"] for vm in list_vms(lab)] == [True]
    assert host.denials() == []


@pytest.mark.long
def test_file_that_was_cut_restores_nothing_and_stays_as_it_is(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    host.virsh("save", "web", _SAVED)
    lab.sh(f"cp {_SAVED} /tmp/whole; head -c -20 /tmp/whole >{_SAVED}; cp {_SAVED} /tmp/cut")
    refused = host.virsh("restore", _SAVED, check=False)
    assert refused.returncode
    assert guest.state() == "shut off"
    lab.sh(f"cmp {_SAVED} /tmp/cut; cp /tmp/whole {_SAVED}; grep 'ends at byte' {_LOG}")
    host.virsh("restore", _SAVED)
    _check(guest)


@pytest.mark.long
def test_managed_save_snapshot_and_bypassed_cache(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    host.virsh("managedsave", "web")
    host.virsh("start", "web")
    _check(guest)
    host.virsh("save", "web", _SAVED, "--bypass-cache")
    print("file:", _size(lab))
    host.virsh("restore", _SAVED, "--bypass-cache")
    _check(guest)
    memory = "/var/lib/libvirt/qemu/save/memory"
    host.virsh("snapshot-create-as", "web", "one", "--live", "--memspec", memory)
    _check(guest)
    assert MAGIC in lab.get(memory)
    host.virsh("destroy", "web")
    host.virsh("restore", memory)
    _check(guest)
    host.virsh("save", "web", _SAVED, "--paused")
    host.virsh("restore", _SAVED)
    assert guest.state() == "paused"
    host.virsh("resume", "web")
    _check(guest)
    assert host.denials() == []


@pytest.mark.long
def test_file_made_without_the_filter_and_domain_without_mte(lab: Machine) -> None:
    host = _host(lab, filtered=False)
    guest = _web(host)
    host.virsh("save", "web", _SAVED)
    print("file without tags:", _size(lab))
    host = _with_filter(host)
    guest = replace(guest, host=host)
    host.virsh("restore", _SAVED)
    # The control: the guest is back, and its tags are not.
    assert guest.wait_for_checks(2)[-1].wrong > 1000
    plain = Domain(host, "plain").start()
    plain.wait_for(b"no-mte")
    host.virsh("save", "plain", _SAVED)
    assert MAGIC not in lab.get(_SAVED)
    host.virsh("restore", _SAVED)
    assert plain.state() == "running"
    assert host.denials() == []


@pytest.mark.long
@pytest.mark.parametrize("how", ["full", "killed"])
def test_save_that_fails_leaves_the_domain_running(lab: Machine, how: str) -> None:
    host = _host(lab)
    guest = _web(host)
    path = _SAVED
    if how == "full":
        path = "/var/lib/libvirt/qemu/save/full/web"
        lab.sh("mkdir -p /var/lib/libvirt/qemu/save/full")
        lab.sh("mount -t tmpfs -o size=2M full /var/lib/libvirt/qemu/save/full")
    else:
        lab.put("/tmp/kill.py", _KILL.encode())
        lab.sh("python3 /tmp/kill.py >/tmp/killed 2>&1 &")
    failed = host.virsh("save", "web", path, check=False)
    print(failed.stderr.decode())
    assert failed.returncode
    assert guest.state() == "running"
    lab.sh(f"! ls {path}")
    _check(guest)
    host.virsh("save", "web", _SAVED)
    host.virsh("restore", _SAVED)
    _check(guest)
    if how == "full":
        lab.sh("umount /var/lib/libvirt/qemu/save/full")


# Kills the filter once it has read a part of the stream. (It writes to a helper of libvirt's.)
_KILL = """
import os, signal, time
while True:
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\\0")
            read = int(open(f"/proc/{pid}/io").readline().split()[1])
            if b"filter" in words and read > 12 << 20:
                os.kill(int(pid), signal.SIGKILL)
                print("killed", pid)
                raise SystemExit
        except OSError:
            pass
    time.sleep(0.3)
"""
