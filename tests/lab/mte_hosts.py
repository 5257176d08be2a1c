"""Hosts of libvirt on which domains can have MTE, set up as mtetool-libvirt(7) says."""

from __future__ import annotations

import json
from typing import Any

from mtetool.companion.installing import text_of
from tests.lab.libvirt import Host, Libvirt, two_hosts
from tests.lab.machine import Machine

WRAPPER = "/usr/bin/qemu-system-aarch64-mte"
# libvirt 11.3 gives QEMU an uncompressed image as a descriptor of a file, which QEMU 11 refuses: no
# domain can be restored from it. A compressed one comes through a pipe.
SETTINGS = {"save_image_format": '"gzip"'}
_GZIP = "[ -e /usr/bin/gzip ] || ln -s busybox /usr/bin/gzip"
_SOCKET = "/run/mtetool/companion.sock"


def mte_host(lab: Machine, *, rules: str = "", hostname: str = "lab") -> Libvirt:
    """Start libvirt and the companion service, with the wrapper and AppArmor's rules for it.

    `rules` are more of these.
    """
    _install_wrapper(lab)
    lab.sh(_service("/tmp/companion.log"))
    return debian_host(lab, text_of("apparmor") + rules, hostname)


def debian_host(lab: Machine, rules: str = "", hostname: str = "lab") -> Libvirt:
    """Start libvirt, so that `virsh save` and `virsh restore` work."""
    lab.sh(_GZIP)
    return Libvirt(lab, settings=SETTINGS, rules=rules, hostname=hostname).start()


def two_mte_hosts(lab: Machine) -> tuple[Host, Host]:
    """Start two hosts, each with a companion service."""
    _install_wrapper(lab)
    hosts = two_hosts(lab)
    for host in hosts:
        host.run("sh", "-c", _service(f"/tmp/{host.name}.companion"))
    return hosts


def list_vms(lab: Machine) -> Any:
    """Return the VMs that list shows."""
    return json.loads(lab.run(["mtetool", "list", "--json"], check=True).stdout)["vms"]


def _install_wrapper(lab: Machine) -> None:
    lab.put(WRAPPER, text_of("wrapper").encode(), 0o755)


def _service(log: str) -> str:
    return (
        f"rm -f {_SOCKET}; mtetool companion >{log} 2>&1 &"
        f" until [ -S {_SOCKET} ]; do sleep 0.1; done"
    )
