"""`virsh save`, `restore`, `managedsave` and snapshots with memory carry the tags along."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mtetool.relay.frames import PROLOGUE
from mtetool.relay.saved import MAGIC
from tests.lab.killing import kill_later, killed
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
    changed = replace(
        host,
        daemon_rules=rules,
        environment=environment[1].decode(),
        settings={**host.settings, "snapshot_image_format": '"gzip"'},
    )
    return changed.start()


def _web(host: Libvirt) -> Domain:
    guest = Domain(
        host,
        "web",
        emulator=WRAPPER,
        memory_mib=128,
        initrd="/lab/hammer.cpio",
        guest_options="hammer.mib=1 hammer.pause=5",
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
def test_file_that_is_not_sound_restores_nothing_and_stays_as_it_is(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    host.virsh("save", "web", _SAVED)
    whole = lab.get(_SAVED)
    for name, (data, said) in _unsound(whole).items():
        print("==", name, flush=True)
        lab.put(_SAVED, data, 0o600)
        refused = host.virsh("restore", _SAVED, check=False)
        print(refused.stderr.decode(), flush=True)
        assert refused.returncode
        assert guest.state() == "shut off"
        assert lab.get(_SAVED) == data
        lab.sh(f"grep '{said}' {_LOG}")
    lab.put(_SAVED, whole, 0o600)
    host.virsh("restore", _SAVED)
    _check(guest)


def _unsound(whole: bytes) -> dict[str, tuple[bytes, str]]:
    """Files that are not as they were saved, each with what the daemon's log says of it."""
    at = whole.index(MAGIC)
    _, version, flags = PROLOGUE.unpack_from(whole, at)
    older = PROLOGUE.pack(MAGIC, version - 1, flags)
    middle = at + (len(whole) - at) // 2
    flipped = bytes([whole[middle] ^ 1])
    return {
        "cut": (whole[:-20], "ends at byte"),
        "cut in half": (whole[:middle], "ends at byte"),
        "damaged": (whole[:middle] + flipped + whole[middle + 1 :], "is damaged at byte"),
        "longer": (whole + bytes(1), "bytes after its end"),
        "older": (whole[:at] + older + whole[at + PROLOGUE.size :], f"has version {version - 1}"),
        "foreign": (whole[:at] + b"Not at all: gzip has to refuse this.", "gzip"),
    }


@pytest.mark.long
def test_managed_save_and_bypassed_cache(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    host.virsh("managedsave", "web")
    host.virsh("start", "web")
    _check(guest)
    host.virsh("save", "web", _SAVED, "--bypass-cache")
    print("file:", _size(lab))
    host.virsh("restore", _SAVED, "--bypass-cache")
    _check(guest)
    assert host.denials() == []


@pytest.mark.long
def test_snapshot_with_memory_and_paused_domain(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
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
    lab.sh(f"cp {_SAVED} /tmp/saved")
    host = _with_filter(host)  # which starts with directories of its own
    lab.sh(f"cp /tmp/saved {_SAVED}")
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
def test_full_disk_leaves_the_domain_running(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    full = "/var/lib/libvirt/qemu/save/full"
    lab.sh(f"mkdir -p {full}; mount -t tmpfs -o size=2M full {full}")
    try:
        _fails(host, guest, f"{full}/web")
    finally:
        lab.sh(f"umount {full}")
    _saves(host, guest)


@pytest.mark.long
def test_filter_that_is_killed_leaves_the_domain_running_or_the_file_whole(lab: Machine) -> None:
    host = _host(lab)
    guest = _web(host)
    for n_bytes in _SAVING:
        kill_later(lab, "filter", "-c", read=n_bytes)
        _fails(host, guest, _SAVED)
        print(killed(lab), flush=True)
    _saves(host, guest)
    host.virsh("save", "web", _SAVED)
    lab.sh(f"cp {_SAVED} /tmp/whole")
    for n_bytes in _LOADING:
        kill_later(lab, "filter", "-dc", written=n_bytes)
        refused = host.virsh("restore", _SAVED, check=False)
        print(refused.stderr.decode(), killed(lab), flush=True)
        assert refused.returncode
        assert guest.state() == "shut off"
        lab.sh(f"cmp {_SAVED} /tmp/whole")
    host.virsh("restore", _SAVED)
    _check(guest)


def _fails(host: Libvirt, guest: Domain, path: str) -> None:
    """Try to save the domain, and check that it goes on, and that there is no file."""
    failed = host.virsh("save", "web", path, check=False)
    print(failed.stderr.decode(), flush=True)
    assert failed.returncode
    assert guest.state() == "running"
    host.lab.sh(f"! ls {path}")
    _check(guest)


def _saves(host: Libvirt, guest: Domain) -> None:
    host.virsh("save", "web", _SAVED)
    host.virsh("restore", _SAVED)
    _check(guest)


@pytest.mark.long
def test_filter_that_is_killed_before_its_first_byte(lab: Machine) -> None:
    """QEMU waits for it then, as it would for any program, until it is ended."""
    host = _host(lab)
    guest = _web(host)
    host.virsh("save", "web", _SAVED)
    lab.sh(f"cp {_SAVED} /tmp/whole")
    kill_later(lab, "filter", "-dc", written=0)
    lab.sh(f"virsh -c {host.uri} restore {_SAVED} >/tmp/restored 2>&1 &")
    lab.sh("until grep -q killed /tmp/killed; do sleep 0.2; done")
    host.virsh("destroy", "web")
    assert guest.state() == "shut off"
    lab.sh("until grep -q 'Failed to restore' /tmp/restored; do sleep 0.2; done")
    lab.sh(f"cmp {_SAVED} /tmp/whole")
    host.virsh("restore", _SAVED)
    _check(guest)


# After so many bytes that the filter has read of QEMU's stream, or has given to QEMU.
_SAVING = (0, 12 << 20, 30 << 20)
_LOADING = (4, 1 << 20, 12 << 20, 36 << 20)
