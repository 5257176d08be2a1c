"""Domains of libvirt move live between two hosts with their tags, or go on where they are."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from subprocess import CompletedProcess

import pytest

from mtetool.files.installed import installed
from tests.lab.libvirt import Domain, Libvirt
from tests.lab.mte_hosts import WRAPPER, mte_host
from tests.lab.two_hosts import TwoHosts, two_hosts
from tests.lab.walk import sections, stand_in

pytestmark = pytest.mark.long  # two machines with libvirt: minutes

_MOVE = "/opt/mtetool/examples/virsh-migrate.sh"
_TO = "qemu+ssh://root@there/system"
_URI = "unix:///run/mtetool/relay/there.sock"
_DISK = "/var/lib/libvirt/images/disk.img"
_HAS_DISK = f"""
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none'/>
      <source file='{_DISK}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
"""
_SECONDS = 120.0  # libvirt at the destination may still be at it


class _Scene:
    """Two hosts with libvirt, and a domain that runs at the first."""

    def __init__(self, hosts: TwoHosts, mib: int) -> None:
        self.machines = hosts
        rules = installed("mtetool.relay", "domains")
        with ThreadPoolExecutor(2) as pool:
            self.here, self.there = pool.map(
                lambda machine, name: mte_host(machine, rules=rules, hostname=name),
                hosts,
                ("here", "there"),
            )
        hosts.allow_ssh()
        for machine in hosts:
            stand_in(machine)
            machine.put("/etc/tmpfiles.d/x", installed("mtetool.relay", "tmpfiles").encode())
            machine.sh("systemd-tmpfiles --create /etc/tmpfiles.d/x")
        self.domain = Domain(
            self.here,
            "web",
            emulator=WRAPPER,
            vcpus=2,
            initrd="/lab/hammer.cpio",
            guest_options=f"hammer.mib={mib} hammer.pause=20",
        )
        self.start()

    def start(self, **changed: str) -> None:
        """Start the domain anew at the source, wherever it is; its guest hammers its tags."""
        for host in (self.here, self.there):
            host.virsh("destroy", "web", check=False)
        self.domain = replace(self.domain, **changed)  # type: ignore[arg-type]
        self.domain.start().wait_for_checks(1)

    def move(self, *options: str, back: bool = False) -> CompletedProcess[bytes]:
        """Move the domain by the example."""
        machine, to = (self.machines.there, "here") if back else (self.machines.here, "there")
        result = machine.run([_MOVE, "web", to, *options], timeout=400)
        print(result.stdout.decode(), result.stderr.decode(), flush=True)
        return result

    def migrate(self, *options: str, check: bool = True) -> CompletedProcess[bytes]:
        """Let virsh migrate the domain to the socket."""
        words = ["migrate", "--live", "web", _TO, "--migrateuri", _URI, *options]
        result = self.here.virsh(*words, check=check, timeout=400)
        print(options, result.stdout.decode(), result.stderr.decode(), flush=True)
        return result

    def wrong(self, host: Libvirt) -> set[tuple[int, int]]:
        """What the guest finds wrong on a host, in three rounds."""
        checks = self.domain.on(host).wait_for_checks(3)
        return {(check.wrong, check.data_wrong) for check in checks}

    def stays(self) -> None:
        """Check that the domain goes on at the source, and nothing of it is elsewhere."""
        assert self.domain.state() == "running"
        assert self.wrong(self.here) == {(0, 0)}
        deadline = time.monotonic() + _SECONDS
        while b"web" in self.there.virsh("list", "--name").stdout:
            assert time.monotonic() < deadline
            time.sleep(1)

    def moved(self) -> None:
        """Check that the domain runs at the destination, with every tag."""
        assert self.domain.on(self.there).state() == "running"
        assert self.wrong(self.there) == {(0, 0)}
        assert b"web" not in self.here.virsh("list", "--name").stdout


@contextmanager
def _scene(mib: int = 1) -> Iterator[_Scene]:
    """`mib` of memory is what each of the guest's two processes hammers."""
    with two_hosts(memory="3G") as hosts:
        yield _Scene(hosts, mib)


def _job(host: Libvirt) -> dict[str, str]:
    """What libvirt reports of the last migration."""
    said = host.virsh("domjobinfo", "web", "--completed").stdout.decode()
    return dict(re.findall(r"^([^:\n]+):\s+(.*?)\s*$", said, re.M))


def test_a_domain_moves_live_with_every_tag() -> None:
    with _scene(mib=4) as scene:
        assert scene.move().returncode == 0
        scene.moved()
        print(_job(scene.there))
        for host in (scene.here, scene.there):
            assert host.denials() == []
        for machine in scene.machines:
            assert machine.sh("ls /run/mtetool/relay").stdout == b""


def test_the_page_s_units_move_domains_there_and_back() -> None:
    """Again and again, peer to peer too, without a word about tags; then back by the example."""
    install, migrate, *_ = _page()
    with _scene() as scene:
        here = scene.machines.here
        here.run(["sh", "-ec", install], check=True)
        for number, options in enumerate(([], ["--p2p"], ["--persistent", "--undefinesource"])):
            if number:
                scene.start()
            here.run([*migrate, *options], timeout=400, check=True)
            scene.moved()
            print(options, _job(scene.there), flush=True)
        assert b"web" not in scene.here.virsh("list", "--all", "--name").stdout
        assert b"web" in scene.there.virsh("list", "--name", "--persistent").stdout
        scene.machines.allow_ssh_back()
        assert scene.move(back=True).returncode == 0
        assert scene.wrong(scene.here) == {(0, 0)}
        assert b"web" not in scene.there.virsh("list", "--name").stdout
        assert scene.here.denials() == scene.there.denials() == []


def test_disks_move_by_the_page_s_commands() -> None:
    """The hosts do not share the disk, of which the destination has an empty image."""
    install, _, tunnel, with_disks = _page()
    with _scene() as scene:
        here, there = scene.machines
        here.run(["sh", "-ec", install], check=True)
        here.sh(f"head -c 8388608 /dev/urandom >{_DISK}")
        for words in ([], ["--p2p"]):
            scene.start(devices=_HAS_DISK)
            there.sh(f"rm -f {_DISK}; truncate -s 8M {_DISK}")
            here.run(["sh", "-ec", tunnel], check=True)
            here.run([*with_disks, *words], timeout=400, check=True)
            scene.moved()
            print(words, _job(scene.there), flush=True)
            _check_disk(scene)
        assert scene.here.denials() == scene.there.denials() == []


def _page() -> tuple[str, list[str], str, list[str]]:
    """The page's commands: to install the units, to move, and both for disks."""
    lines = [line.replace("host2", "there") for line in sections()["MOVE A DOMAIN"]]
    example, *install, migrate, tunnel, with_disks = lines
    assert example.startswith("examples/")
    return "\n".join(install), migrate.split(), tunnel, with_disks.split()


def _check_disk(scene: _Scene) -> None:
    """Check that the destination has the disk's contents. The domain ends."""
    scene.there.virsh("destroy", "web")
    here, there = (machine.sh(f"sha256sum {_DISK}").stdout for machine in scene.machines)
    assert here == there


def test_disks_move_with_the_domain_by_the_example() -> None:
    with _scene() as scene:
        scene.machines.here.sh(f"head -c 8388608 /dev/urandom >{_DISK}")
        scene.start(devices=_HAS_DISK)
        # Without an image there, nothing moves.
        assert scene.move("--copy-storage-all").returncode
        scene.stays()
        for options in (["--copy-storage-all"], ["--copy-storage-all", "--p2p"]):
            scene.start()
            scene.machines.there.sh(f"rm -f {_DISK}; truncate -s 8M {_DISK}")
            assert scene.move(*options).returncode == 0
            scene.moved()
            print(options, _job(scene.there), flush=True)
            _check_disk(scene)
        for host in (scene.here, scene.there):
            assert host.denials() == []
        for machine in scene.machines:
            assert machine.sh("ls /run/mtetool/relay").stdout == b""


def test_without_relays_tags_stay_behind() -> None:
    """The control: ssh alone carries the socket."""
    path = _URI.removeprefix("unix://")
    with _scene() as scene:
        scene.machines.here.sh(f"ssh -fN -L {path}:{path} root@there")
        scene.migrate()
        print(_job(scene.there), flush=True)
        assert scene.domain.on(scene.there).wait_for_checks(2)[-1].wrong > 1000


def test_what_does_not_go_with_tags_is_refused_before_anything_moves() -> None:
    with _scene() as scene:
        for option, instead in (
            ("--postcopy", "cannot follow a guest that has started"),
            ("--parallel", "beside one connection"),
            ("--tls", "the relays encrypt"),
            ("--tunnelled", "the relays are the tunnel"),
        ):
            result = scene.move(option)
            assert result.returncode == 2
            assert instead in result.stderr.decode()
        # The same by hand, past the example: the relay says it, and libvirt that it failed.
        for options, said in (
            (["--postcopy"], "postcopy-ram"),
            # QEMU's second connection finds nobody: the migration fails before the relay can speak.
            (["--parallel"], ""),
            (["--tls"], ""),
            (["--p2p", "--tunnelled"], ""),
        ):
            assert said in _by_hand(scene, *options)
            scene.stays()


def _by_hand(scene: _Scene, *options: str) -> str:
    """Migrate with these options, which fails; return what the source's relay said."""
    here, path = scene.machines.here, _URI.removeprefix("unix://")
    command = f"exec:ssh root@there mtetool relay destination --from - --to unix:{path}"
    here.sh(
        f"mtetool relay source --listen-first --from listen:unix:{path} --to '{command}'"
        f" >/tmp/relay.out 2>/tmp/relay.err & echo $! >/tmp/relay.pid;"
        f" until [ -S {path} ]; do sleep 0.1; done",
        timeout=120,
    )
    assert scene.migrate(*options, check=False).returncode
    # Where libvirt refuses the option itself, nobody connects.
    end = "kill $pid 2>/dev/null; while kill -0 $pid 2>/dev/null; do sleep 0.1; done"
    here.sh(f"pid=$(cat /tmp/relay.pid); sleep 2; {end}")
    said = here.get("/tmp/relay.err").decode()
    print(options, said, flush=True)
    return said


def test_whatever_fails_the_domain_goes_on() -> None:
    with _scene() as scene:
        for name in _FAILURES:
            print("==", name, flush=True)
            _fail(scene, name)
            scene.stays()
        # Without MTE there, the example says so, and the domain stays.
        print("== MTE is off", flush=True)
        scene.machines.there.sh("rm /run/mtetool/companion.sock")
        result = scene.move()
        assert result.returncode
        assert b"MTE is off" in result.stderr
        scene.stays()


# Each is a command that runs at the source while memory moves. (A pattern must not find itself.)
_KILL = (
    "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '{}'"
    " && kill -KILL ${{p#/proc/}}; done; true"
)
_FAILURES = {
    # A second run meanwhile does nothing.
    "aborted": f"{_MOVE} web there 2>&1 | grep 'is being moved already' && virsh domjobabort web",
    "relay killed": _KILL.format("relay [s]ource"),
    "connection cut": _KILL.format("^[s]sh .* mtetool relay"),
    # Longer than the relays' 20 seconds, and than libvirt's 30 of keepalives.
    "network cut": "ifconfig eth0 down; sleep 60",
    "libvirtd restarted": "",
}


def _fail(scene: _Scene, name: str) -> None:
    """Start a migration by the example, and let something happen while memory moves."""
    here = scene.machines.here
    script = f"{_MOVE} web there >/tmp/move.out 2>&1; echo $? >/tmp/move.status"
    here.sh(f"rm -f /tmp/move.*; ({script}) >/dev/null 2>&1 &")
    moving = "virsh domjobinfo web | grep 'Data processed'"
    here.sh(f"until [ -s /tmp/move.status ] || {moving}; do sleep 2; done", timeout=300)
    if command := _FAILURES[name]:
        here.sh(command)
        scene.machines.mend()
    else:
        scene.here.restart()
    here.sh("until [ -s /tmp/move.status ]; do sleep 1; done", timeout=300)
    print(here.get("/tmp/move.out").decode(), flush=True)
    assert here.get("/tmp/move.status") != b"0\n"
