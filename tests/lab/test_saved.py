"""A guest that hammers its tags is saved to one file by `exec:`, and comes back from it."""

from __future__ import annotations

import pytest

from tests.lab.guests import Qemu, kill_vmms
from tests.lab.killing import kill_later, killed
from tests.lab.machine import Machine

_EXAMPLE = "/opt/mtetool/examples/save-vm.sh"
_FILE = "/tmp/vm.saved"
# A stand-in for mtetool that loads everything but the tags: the control.
_NO_TAGS = """#!/usr/bin/python3
import sys

sys.path.insert(0, "/opt/mtetool")
from mtetool.relay.incoming import Incoming

Incoming._write = lambda *words: None
from mtetool.__main__ import main

sys.exit(main())
"""


def _guest(lab: Machine, name: str, extra: str = "") -> Qemu:
    return Qemu(
        lab,
        name,
        mte=False,
        memory="128M",
        guest_options="hammer.mib=4 hammer.pause=5",
        initrd="/lab/hammer.cpio",
        extra=f"-smp 2 {extra}",
        wrapper="mtetool exec --",
    ).start()


def _running(lab: Machine) -> Qemu:
    kill_vmms(lab)
    lab.sh(f"rm -f {_FILE} {_FILE}.part")
    guest = _guest(lab, "saved")
    guest.wait_for(b"TAGGER ready")
    guest.wait_for_checks(1)
    return guest


def _example(lab: Machine, task: str, guest: Qemu, status: int = 0, **env: str) -> str:
    result = lab.run([_EXAMPLE, task, guest.qmp_path, _FILE], timeout=300, env=env)
    said = result.stderr.decode()
    print(said)
    assert result.returncode == status, said
    return said


def _load(lab: Machine, status: int = 0, **env: str) -> tuple[Qemu, str]:
    guest = _guest(lab, "loaded", "-incoming defer")
    return guest, _example(lab, "load", guest, status, **env)


def _wrong(guest: Qemu) -> set[tuple[int, int]]:
    return {(check.wrong, check.data_wrong) for check in guest.wait_for_checks(3)}


@pytest.mark.long
def test_guest_is_saved_and_comes_back_with_every_tag(lab: Machine) -> None:
    source = _running(lab)
    _example(lab, "save", source)
    assert b"postmigrate" in source.qmp("query-status")
    lab.sh(f"kill -KILL {source.pid}; ls -l {_FILE}; ! ls {_FILE}.part 2>/dev/null")
    # Cut and damaged, it starts no guest, and stays as it is.
    lab.sh(f"cp {_FILE} /tmp/whole; head -c -20 /tmp/whole >{_FILE}")
    guest, said = _load(lab, status=5)
    assert "ends at byte" in said
    assert b"inmigrate" in guest.qmp("query-status")
    lab.sh(f"kill -KILL {guest.pid}; mv /tmp/whole {_FILE}; rm {guest.qmp_path}")
    guest, _ = _load(lab)
    assert b"running" in guest.qmp("query-status")
    assert _wrong(guest) == {(0, 0)}


@pytest.mark.long
def test_without_tags_the_same_guest_finds_wrong_ones(lab: Machine) -> None:
    """The control."""
    source = _running(lab)
    _example(lab, "save", source)
    lab.sh(f"kill -KILL {source.pid}")
    lab.put("/tmp/no-tags", _NO_TAGS.encode(), 0o755)
    guest, _ = _load(lab, MTETOOL="/tmp/no-tags")
    assert guest.wait_for_checks(1)[0].wrong > 1000


@pytest.mark.long
@pytest.mark.parametrize("read", [None, 0, 30 << 20], ids=["full", "killed", "killed later"])
def test_save_that_fails_leaves_the_guest_running(lab: Machine, read: int | None) -> None:
    source = _running(lab)
    if read is None:
        lab.sh(
            "mkdir -p /tmp/full; mount -t tmpfs -o size=2M full /tmp/full;"
            f" ln -s /tmp/full/x {_FILE}"
        )
    else:
        kill_later(lab, "relay", "save", read=read)
    result = lab.run([_EXAMPLE, "save", source.qmp_path, _FILE], timeout=300)
    print(result.stderr.decode(), flush=True)
    assert b"the guest goes on" in result.stderr
    if read is not None:
        print(killed(lab), flush=True)
    lab.sh(f"! ls {_FILE} {_FILE}.part; umount /tmp/full 2>/dev/null; true")
    assert _wrong(source) == {(0, 0)}
    _example(lab, "save", source)
