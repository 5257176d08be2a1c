"""Domains of libvirt move live between two hosts with their tags, or go on where they are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import CompletedProcess

from mtetool.files.installed import installed
from tests.lab.libvirt import Domain, Libvirt
from tests.lab.mte_hosts import WRAPPER, mte_host
from tests.lab.two_hosts import TwoHosts, two_hosts

_MOVE = "/opt/mtetool/examples/virsh-migrate.sh"
_TO = "qemu+ssh://root@there/system"
_URI = "unix:///run/mtetool/relay/there.sock"
_HAMMER = {"initrd": "/lab/hammer.cpio", "guest_options": "hammer.mib=4 hammer.pause=5"}


class _Scene:
    """Two hosts with libvirt, and a domain that runs at the first."""

    def __init__(self, hosts: TwoHosts) -> None:
        self.machines = hosts
        rules = installed("mtetool.relay", "domains")
        self.here = mte_host(hosts.here, rules=rules, hostname="here")
        self.there = mte_host(hosts.there, rules=rules, hostname="there")
        hosts.allow_ssh()
        for machine in hosts:
            # As systemd-tmpfiles would make them.
            made = installed("mtetool.relay", "tmpfiles")
            for path, mode, user, group in re.findall(r"^d (\S+) (\S+) (\S+) (\S+)", made, re.M):
                machine.sh(f"mkdir -p {path}; chmod {mode} {path}; chown {user}:{group} {path}")
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
