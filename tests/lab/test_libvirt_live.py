"""Domains of libvirt move live between two hosts with their tags, or go on where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
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
_HAMMER = {"initrd": "/lab/hammer.cpio", "guest_options": "hammer.mib=4 hammer.pause=5"}


class _Scene:
    """Two hosts with libvirt, and a domain that runs at the first."""

    def __init__(self, hosts: TwoHosts) -> None:
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
        self.domain = self.new_domain()

    def new_domain(self, **more: object) -> Domain:
        """Start a domain whose guest hammers its tags."""
        made = Domain(self.here, "web", emulator=WRAPPER, vcpus=2, **_HAMMER, **more)  # type: ignore[arg-type]
        made.start().wait_for_checks(1)
        return made

    def move(self, *options: str) -> CompletedProcess[bytes]:
        """Move the domain by the example."""
        words = [_MOVE, "web", "there", *options]
        result = self.machines.here.run(words, timeout=400)
        print(result.stdout.decode(), result.stderr.decode(), flush=True)
        return result

    def wrong(self, host: Libvirt) -> set[tuple[int, int]]:
        """What the guest finds wrong on a host, in three rounds."""
        checks = self.domain.on(host).wait_for_checks(3)
        return {(check.wrong, check.data_wrong) for check in checks}

    def stays(self) -> None:
        """Check that the domain goes on at the source, and nothing of it is elsewhere."""
        assert self.domain.state() == "running"
        assert self.wrong(self.here) == {(0, 0)}
        assert b"web" not in self.there.virsh("list", "--name").stdout

    def moved(self) -> None:
        """Check that the domain runs at the destination, with every tag."""
        assert self.domain.on(self.there).state() == "running"
        assert self.wrong(self.there) == {(0, 0)}
        assert b"web" not in self.here.virsh("list", "--name").stdout


@contextmanager
def _scene() -> Iterator[_Scene]:
    with two_hosts(memory="3G") as hosts:
        yield _Scene(hosts)


def _job(host: Libvirt) -> dict[str, str]:
    """What libvirt reports of the last migration."""
    said = host.virsh("domjobinfo", "web", "--completed").stdout.decode()
    return dict(re.findall(r"^([^:\n]+):\s+(.*?)\s*$", said, re.M))


def test_a_domain_moves_live_with_every_tag() -> None:
    with _scene() as scene:
        assert scene.move().returncode == 0
        scene.moved()
        print(_job(scene.there))
        for host in (scene.here, scene.there):
            assert host.denials() == []
        for machine in scene.machines:
            assert machine.sh("ls /run/mtetool/relay").stdout == b""


def test_the_page_s_units_move_domains_there_and_back() -> None:
    """Again and again, peer to peer too, without a word about tags; then back by the example."""
    lines = sections()["MOVE A DOMAIN"]
    with _scene() as scene:
        here = scene.machines.here
        install = "\n".join(lines[1:-1]).replace("host2", "there")
        here.run(["sh", "-ec", install], check=True)
        migrate = lines[-1].replace("host2", "there").split()
        for number, options in enumerate(([], ["--p2p"], ["--persistent", "--undefinesource"])):
            if number:
                scene.there.virsh("destroy", "web")
                scene.domain = scene.new_domain()
            result = here.run([*migrate, *options], timeout=400, check=True)
            print(result.stdout.decode(), _job(scene.there), flush=True)
            scene.moved()
        assert b"web" not in scene.here.virsh("list", "--all", "--name").stdout
        assert b"web" in scene.there.virsh("list", "--name", "--persistent").stdout
        assert scene.here.denials() == scene.there.denials() == []


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
        for option, said in (("--postcopy", "postcopy-ram"), ("--parallel", "multifd")):
            result = _by_hand(scene, option)
            assert result.returncode
            assert said in scene.machines.here.get("/tmp/relay.err").decode()
            scene.stays()


def _by_hand(scene: _Scene, *options: str) -> CompletedProcess[bytes]:
    path = _URI.removeprefix("unix://")
    command = f"exec:ssh root@there mtetool relay destination --from - --to unix:{path}"
    scene.machines.here.sh(
        f"mtetool relay source --listen-first --from listen:unix:{path} --to '{command}'"
        f" >/tmp/relay.out 2>/tmp/relay.err & echo $! >/tmp/relay.pid;"
        f" until [ -S {path} ]; do sleep 0.1; done",
        timeout=120,
    )
    words = ["migrate", "--live", "web", _TO, "--migrateuri", _URI, *options]
    result = scene.here.virsh(*words, check=False, timeout=400)
    print(options, result.stderr.decode(), scene.machines.here.get("/tmp/relay.err").decode())
    scene.machines.here.sh("kill $(cat /tmp/relay.pid) 2>/dev/null; true")
    return result


def test_whatever_fails_the_domain_goes_on() -> None:
    with _scene() as scene:
        for name in ("aborted", "relay killed", "connection cut", "libvirtd restarted"):
            print("==", name, flush=True)
            _fail(scene, name)
            scene.stays()
        # Without MTE there, the example says so, and the domain stays.
        scene.machines.there.sh("rm /run/mtetool/companion.sock")
        result = scene.move()
        assert result.returncode == 4
        assert b"MTE is off" in result.stderr
        scene.stays()


def _fail(scene: _Scene, name: str) -> None:
    """Start a migration by the example, and let something happen while memory moves."""
    here = scene.machines.here
    script = f"{_MOVE} web there >/tmp/move.out 2>&1; echo $? >/tmp/move.status"
    here.sh(f"rm -f /tmp/move.*; ({script}) >/dev/null 2>&1 &")
    until = "until virsh domjobinfo web | grep -q 'Data processed'; do sleep 0.2; done"
    here.sh(until, timeout=300)
    if name == "aborted":
        scene.here.virsh("domjobabort", "web")
    elif name == "libvirtd restarted":
        scene.here.restart()
    else:
        program = "relay source" if name == "relay killed" else "ssh root@there"
        here.sh(
            f"for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline 2>/dev/null | grep -q '{program}'"
            " && kill -KILL ${p#/proc/}; done; true"
        )
    here.sh("until [ -s /tmp/move.status ]; do sleep 0.2; done", timeout=300)
    print(here.get("/tmp/move.out").decode(), flush=True)
    assert here.get("/tmp/move.status") != b"0\n"
