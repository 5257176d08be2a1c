"""The Debian packages, in fresh trees of Debian 13: installed, used, upgraded, removed."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtetool import __version__
from mtetool.companion.installing import text_of
from tests.deb.trees import ROOT, TOOLS, Tree, fresh

pytestmark = pytest.mark.long  # make test-deb, make test-wheels

_DIST = ROOT / "dist"
_RULES = "/etc/apparmor.d/abstractions/libvirt-qemu.d"
_CONFFILE = f"{_RULES}/mtetool"
_NEEDED = ("click", "libvirt", "msgpack", "numpy", "rich", "xxhash", "zstandard")
_OLD = "0.0.9"
# What a user's system has besides; the shells and man are there to be completed and read.
_SYSTEM = ("systemd-sysv", "dbus", "man-db", "bash-completion", "zsh", "fish")
# A client of the companion's socket, over and over: it prints how many were answered, and why not.
_CLIENTS = """
import socket, sys, time
answered, failed = 0, []
while not __import__("os").path.exists("/srv/enough"):
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(30)
        try:
            end.connect("/run/mtetool/companion.sock")
            end.send(b"mtetool-companion/0 hello")
            if end.recv(1024):
                answered += 1
            else:
                failed.append("closed")
        except OSError as error:
            failed.append(str(error))
    time.sleep(0.02)
print(answered, failed)
"""


def package(architecture: str, name: str = "mtetool", directory: Path = _DIST) -> Path:
    """The one package of that name and architecture."""
    (found,) = directory.glob(f"{name}_*_{architecture}.deb")
    return found


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the packages of a version before."""
    into = tmp_path_factory.mktemp("older")
    subprocess.run([TOOLS / "deb", "--version", _OLD, into], check=True)
    _change_conffile(package("all", "mtetool-libvirt", into), into / "unpacked")
    return into


def _change_conffile(deb: Path, unpacked: Path) -> None:
    """Give a package another conffile, as if this version had changed it."""
    subprocess.run(["dpkg-deb", "--raw-extract", deb, unpacked], check=True)
    with (unpacked / _CONFFILE.lstrip("/")).open("a") as file:
        file.write("  # as it was before\n")
    subprocess.run(["dpkg-deb", "--build", unpacked, deb], check=True)


@pytest.fixture(scope="module", params=["amd64", "arm64"])
def tree(request: pytest.FixtureRequest) -> Iterator[Tree]:
    # The libraries come before, and stay: here only what mtetool itself leaves is looked at.
    with fresh(request.param, *_SYSTEM, *(f"python3-{name}" for name in _NEEDED)) as made:
        yield made


def test_a_stranger_installs_uses_and_removes_it(tree: Tree) -> None:
    before = tree.files()
    tree.put(package(tree.architecture), package("all", "mtetool-libvirt"))
    # As in the README, but without libvirt.
    for start in ("apt install ./mtetool_", "apt install ./mtetool-libvirt_"):
        words = _readme_command(start).replace("apt ", "apt -y --no-install-recommends ")
        tree.run(f"cd /srv; {words}")
    wrapper = (tree.path / "usr/bin/qemu-system-aarch64-mte").read_text()
    assert wrapper == text_of("wrapper")  # debhelper changes the first line of scripts
    _is_used(tree)
    _is_read(tree)
    _is_completed(tree)
    wants = tree.path / "etc/systemd/system/sockets.target.wants/mtetool-companion.socket"
    assert wants.is_symlink()
    tree.run("systemd-analyze verify --man=no /usr/lib/systemd/system/mtetool-*")
    tree.run("apt-get remove -q -y mtetool")
    # The link of a unit that is on is kept until purge, as configuration is.
    left = set(tree.files()) - set(before)
    rules = _CONFFILE.lstrip("/")
    assert {rules, f"{rules}-relay"} <= left
    kept = ("etc/apparmor.d", "etc/systemd", "var/lib/systemd")
    assert [name for name in left if not name.startswith(kept)] == []
    tree.run("apt-get purge -q -y mtetool mtetool-libvirt")
    assert tree.files() == before
    assert not wants.is_symlink()


def _readme_command(start: str) -> str:
    lines = (ROOT / "README.md").read_text().splitlines()
    (found,) = [line.strip(" #") for line in lines if line.strip(" #").startswith(start)]
    return found


def _is_used(tree: Tree) -> None:
    shown = tree.run("mtetool --version -v", user="nobody")
    first, second = shown.splitlines()
    assert first == f"mtetool {__version__}"
    assert second.startswith("deb in /usr/lib/python3/dist-packages/mtetool, C loops, Python 3.13")
    assert "missing" not in second
    demo = tree.run("/usr/share/doc/mtetool/examples/demo.sh /tmp/demo", user="nobody")
    assert "mtetool diff" in demo
    tree.run("rm -r /tmp/demo")


def _is_read(tree: Tree) -> None:
    pages = {page.stem for page in (ROOT / "man").iterdir()}
    tree.run(f"for page in {' '.join(sorted(pages))}; do man -w $page >/dev/null; done")
    assert "save the MTE tags" in tree.run("man mtetool-save", user="nobody")


def _is_completed(tree: Tree) -> None:
    """In each shell as it starts for a user: nothing is switched on."""
    bash = """
        . /usr/share/bash-completion/bash_completion
        COMP_LINE='mtetool resto' COMP_POINT=13 COMP_WORDS=(mtetool resto) COMP_CWORD=1
        _comp_load mtetool
        _mtetool_completion mtetool resto
        echo "<${COMPREPLY[*]}>"
    """
    (tree.path / "srv/complete.bash").write_text(bash)
    assert "<restore>" in tree.run("bash /srv/complete.bash", user="nobody")
    (tree.path / "srv/complete.zsh").write_text(
        'autoload -Uz compinit; compinit -D; echo "<$_comps[mtetool]>"\n'
    )
    assert "<_mtetool>" in tree.run("zsh -f /srv/complete.zsh", user="nobody")
    shown = tree.run("HOME=/tmp fish -c 'complete -C \"mtetool resto\"'", user="nobody")
    assert "restore" in shown.split()


def test_the_service_upgrades_under_its_clients(older: Path) -> None:
    with fresh("amd64", *_SYSTEM) as tree, tree.booted():
        old, new = tree.put(package("amd64", directory=older)), tree.put(package("amd64"))
        tree.run(f"apt-get install -q -y --no-install-recommends {old}")
        assert tree.run("systemctl is-enabled mtetool-companion.socket") == "enabled\n"
        assert tree.run("systemctl is-active mtetool-companion.socket") == "active\n"
        # Nobody has asked yet: the service is not running.
        tree.run("systemctl is-active mtetool-companion.service", status=3)
        (tree.path / "srv/clients.py").write_text(_CLIENTS)
        tree.run("python3 /srv/clients.py >/srv/clients 2>&1 & sleep 2")
        service = tree.run("systemctl show -P MainPID mtetool-companion.service")
        socket = _since(tree)
        tree.run(f"apt-get install -q -y {new}")
        assert __version__ in tree.run("mtetool --version")
        assert tree.run("systemctl show -P MainPID mtetool-companion.service") != service
        assert _since(tree) == socket
        tree.run("sleep 2; touch /srv/enough; sleep 2")
        answered, _, failed = tree.run("cat /srv/clients").partition(" ")
        assert (failed, int(answered) > 5) == ("[]\n", True)
        tree.run("apt-get purge -q -y mtetool")
        assert "could not be found" in tree.run(
            "systemctl status mtetool-companion.socket", status=4
        )
        assert not re.search("mtetool", tree.run("systemctl list-units --all --no-pager"))
        tree.run("ls /run/mtetool", status=2)


def _since(tree: Tree, unit: str = "mtetool-companion.socket") -> str:
    return tree.run(f"systemctl show -P ActiveEnterTimestampMonotonic {unit}")


_DOMAIN = """<domain type="qemu"><name>web</name><memory unit="MiB">64</memory>
<os><type arch="aarch64" machine="virt">hvm</type></os>
<devices><emulator>/usr/bin/qemu-system-aarch64-mte</emulator></devices></domain>
"""


def test_libvirt_comes_afterwards_and_its_domain_stays(older: Path) -> None:
    with fresh("amd64", *_SYSTEM) as tree, tree.booted():
        old = tree.put(package("amd64", directory=older), package("all", "mtetool-libvirt", older))
        tree.run(f"apt-get install -q -y --no-install-recommends {old}")
        assert "libvirtd" not in tree.run("ls /usr/sbin")
        before_libvirt = tree.run(f"cat {_CONFFILE}")
        tree.run(
            "apt-get install -q -y --no-install-recommends apparmor libvirt-daemon-system "
            "libvirt-clients qemu-system-arm zstd >/dev/null"
        )
        _rules_are_included(tree)
        _start_domain(tree)
        _goes_through_the_filter(tree)
        domain = _domain(tree)
        relay = _enable_relay(tree)
        # The administrator changes the rules: the upgrade, which has others too, keeps them.
        tree.run(f"echo '  # ours' >>{_CONFFILE}")
        new = tree.put(package("amd64"), package("all", "mtetool-libvirt"))
        tree.run(f"apt-get install -q -y -o Dpkg::Options::=--force-confold {new}")
        assert tree.run(f"cat {_CONFFILE}") == before_libvirt + "  # ours\n"
        assert "# as it was before" not in tree.run(f"cat {_CONFFILE}.dpkg-dist")
        assert _since(tree, _RELAY) == relay
        assert _domain(tree) == domain
        tree.run("apt-get remove -q -y mtetool-libvirt mtetool")
        assert "# ours" in tree.run(f"cat {_CONFFILE}")
        _rules_are_included(tree)
        assert tree.run("systemctl list-units --no-legend 'mtetool-*'") == ""
        tree.run("ls /run/mtetool", status=2)
        assert _domain(tree) == domain
        tree.run("apt-get purge -q -y mtetool-libvirt mtetool")
        tree.run(f"ls {_CONFFILE}", status=2)
        tree.run("apparmor_parser --skip-kernel-load --preprocess /srv/profile >/dev/null")
        assert _domain(tree) == domain
        assert [name for name in tree.files() if "mtetool" in name] == []


_RELAY = "mtetool-relay@host2.socket"


def _enable_relay(tree: Tree) -> str:
    """Switch a relay on, which was off; return since when it is."""
    assert tree.run("stat -c '%U %a' /run/mtetool/relay") == "libvirt-qemu 750\n"
    assert tree.run(f"systemctl is-enabled {_RELAY}", status=1) == "disabled\n"
    tree.run(f"systemctl enable --now {_RELAY}; test -S /run/mtetool/relay/host2.sock")
    since = _since(tree, _RELAY)
    _each_connection_is_served(tree)
    return since


# A client of the relay's socket that is no QEMU: it waits until nobody has its connection any more.
_NO_QEMU = """
import socket
with socket.socket(socket.AF_UNIX) as end:
    end.settimeout(60)
    end.connect("/run/mtetool/relay/host2.sock")
    try:
        end.recv(1)
    except ConnectionResetError:
        pass
"""


def _each_connection_is_served(tree: Tree) -> None:
    """systemd starts the relay for each connection, also after one that failed."""
    (tree.path / "srv/no-qemu.py").write_text(_NO_QEMU)
    service = _RELAY.replace("socket", "service")
    for number in (1, 2):
        tree.run("python3 /srv/no-qemu.py")
        tree.run(f"while systemctl is-active {service}; do sleep 0.1; done")
        said = tree.run(f"journalctl --no-pager -o cat -u {service}")
        assert said.count("mtetool: error: ") == number
        assert tree.run(f"systemctl is-active {_RELAY}") == "active\n"


def _goes_through_the_filter(tree: Tree) -> None:
    """Save and restore the domain through the filter, which becomes zstd: no guest here has MTE."""
    tree.run("echo 'save_image_format = \"zstd\"' >>/etc/libvirt/qemu.conf")
    tree.run("systemctl restart libvirtd")
    path = tree.run("tr '\\0' '\\n' </proc/$(pidof libvirtd)/environ | grep ^PATH=")
    assert path.startswith("PATH=/usr/lib/mtetool/filters:")
    assert tree.run(f"{path.strip()}; command -v zstd").startswith("/usr/lib/mtetool")
    tree.run("virsh save web /var/lib/libvirt/qemu/save/web")
    assert b"\x28\xb5\x2f\xfd" in (tree.path / "var/lib/libvirt/qemu/save/web").read_bytes()
    tree.run("virsh restore /var/lib/libvirt/qemu/save/web; rm /var/lib/libvirt/qemu/save/web")


def _rules_are_included(tree: Tree) -> None:
    """AppArmor finds the package's rules in the profile that libvirt makes for a domain."""
    tree.run(
        "sed s/LIBVIRT_TEMPLATE/libvirt-test/ /etc/apparmor.d/libvirt/TEMPLATE.qemu >/srv/profile"
    )
    shown = tree.run("apparmor_parser --skip-kernel-load --preprocess /srv/profile")
    assert "/usr/bin/qemu-system-aarch64-mte{,-*} rix," in shown
    assert "/mtetool/relay/*.sock rw," in shown
    tree.run("apparmor_parser --skip-kernel-load --skip-cache --abort-on-error /srv/profile")


def _start_domain(tree: Tree) -> None:
    (tree.path / "srv/web.xml").write_text(_DOMAIN)
    tree.run("virsh create /srv/web.xml")


def _domain(tree: Tree) -> str:
    """The PID of the domain, which is running."""
    assert "running" in tree.run("virsh domstate web")
    return tree.run("pgrep -f '[g]uest=web'")


def test_a_package_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    subprocess.run([TOOLS / "deb", tmp_path], check=True, env=os.environ | {"TZ": "Asia/Tokyo"})
    made = {path.name: _sum(path) for path in tmp_path.iterdir()}
    assert made == {path.name: _sum(path) for path in _DIST.glob("*.deb")}


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
