"""The package and the wheel of arm64 in a lab machine: a kernel with KVM and MTE, and libvirt.

The lab has neither dpkg nor systemd, so the packages' files are unpacked, and what their units
start is started by hand; `test_deb` has the rest, without such a kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from mtetool import __version__
from mtetool.relay.saved import MAGIC
from tests.deb.trees import ROOT
from tests.lab.libvirt import Domain, Libvirt
from tests.lab.machine import Machine
from tests.lab.mte_hosts import SETTINGS, WRAPPER

pytestmark = pytest.mark.long  # make test-deb, make test-wheels

_DIST = ROOT / "dist"
_SAVED = "/var/lib/libvirt/qemu/save/web.saved"
_PATH = re.compile(r"^Environment=(PATH=\S+)$", re.MULTILINE)
_START = re.compile(r"^ExecStart=(.*)$", re.MULTILINE)
_UNITS = "/usr/lib/systemd/system"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with everything that is in dist/ for it, unpacked."""
    into = tmp_path_factory.mktemp("with")
    debs = [*_DIST.glob("*_arm64.deb"), *_DIST.glob("*_all.deb")]
    for deb in debs:
        subprocess.run(["dpkg-deb", "-x", deb, into / "deb"], check=True)
    for wheel in _DIST.glob("*_aarch64.whl"):
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, into / "wheel"], check=True)
    with Machine(cpus=1, with_dir=into) as machine:
        if debs:
            machine.sh("cp -a /with/deb/. /")
        yield machine


def test_deb_runs(lab: Machine) -> None:
    shown = lab.sh("/usr/bin/mtetool --version -v").stdout.decode()
    print(shown)
    assert shown.startswith(f"mtetool {__version__}\ndeb in /usr/lib/python3/dist-packages/mtetool")
    assert ", C loops, " in shown
    demo = "PATH=/usr/bin:$PATH /usr/share/doc/mtetool/examples/demo.sh /tmp/demo"
    print(lab.sh(demo, timeout=300).stdout.decode())


def test_domain_gets_mte_and_is_saved_with_its_tags(lab: Machine) -> None:
    """By the packages' files only, with AppArmor enforced and libvirt's own profile unchanged."""
    (start,) = _START.findall(lab.get(f"{_UNITS}/mtetool-companion.service").decode())
    assert start.startswith("/usr/bin/mtetool ")
    ready = "until [ -S /run/mtetool/companion.sock ]; do sleep 0.1; done"
    lab.sh(f"{start} >/tmp/companion.log 2>&1 & {ready}")
    (environment,) = _PATH.findall(lab.get(f"{_UNITS}/libvirtd.service.d/mtetool.conf").decode())
    # The compressor that the lab has.
    lab.sh("[ -e /usr/bin/gzip ] || ln -s busybox /usr/bin/gzip")
    host = Libvirt(lab, settings=SETTINGS, environment=environment).start()
    hammer = {"initrd": "/lab/hammer.cpio", "guest_options": "hammer.mib=4 hammer.pause=5"}
    guest = Domain(host, "web", emulator=WRAPPER, memory_mib=128, **hammer).start()  # type: ignore[arg-type]
    guest.wait_for(b"TAGGER ready")
    host.virsh("suspend", "web")
    for words in ("save libvirt:web -o /tmp/s", "verify /tmp/s --against libvirt:web"):
        print(lab.sh(f"/usr/bin/mtetool {words}", timeout=300).stdout.decode())
    host.virsh("resume", "web")
    host.virsh("save", "web", _SAVED)
    assert MAGIC in lab.get(_SAVED)
    host.virsh("restore", _SAVED)
    assert {(check.wrong, check.data_wrong) for check in guest.wait_for_checks(3)} == {(0, 0)}
    assert host.denials() == []


def test_wheel_saves_a_running_guest(lab: Machine) -> None:
    run = "cd /tmp; export PYTHONPATH=/with/wheel; m='python3 -m mtetool'"
    shown = lab.sh(f"{run}; $m --version -v").stdout.decode()
    print(shown)
    assert shown.splitlines()[1].startswith("wheel in /with/wheel/mtetool, C loops, ")
    made = "$m emu create a --memory 64M --fill heap; $m emu create b --memory 64M"
    moved = "$m save emu:a -o s; $m restore s emu:b; $m diff emu:a emu:b && echo same"
    assert lab.sh(f"{run}; {made}; {moved}", timeout=300).stdout.endswith(b"same\n")
    print(lab.sh(f"{run}; $m probe --selftest", timeout=300).stdout.decode())
