"""The commands of mtetool-libvirt(7), and stand-ins for the programs that the lab does not have."""

from __future__ import annotations

import re
from pathlib import Path

from tests.lab.machine import Machine

PAGE = Path(__file__).parents[2] / "man" / "mtetool-libvirt.7"

# The lab's root was made of these packages; there is no package manager in it.
_APT = """#!/bin/sh
# The packages bring what the page then installs by hand: tests/deb tries them.
[ "$*" != "install ./mtetool_*.deb ./mtetool-libvirt_*.deb" ] || exit 0
[ "$*" = "install libvirt-daemon-system libvirt-clients qemu-system-arm python3-libvirt" ] || exit 9
for program in libvirtd virsh qemu-system-aarch64; do command -v $program || exit 8; done
python3 -c 'import libvirt'
"""
# Does with the installed units what systemd does with them: listens, starts the service for a
# client, and again when it has ended. (systemd's own parser: tests/companion.)
_SYSTEMCTL = """#!/usr/bin/python3
import os, re, select, shlex, socket, sys

if sys.argv[1:] == ["daemon-reload"]:
    sys.exit()
assert sys.argv[1:3] == ["enable", "--now"] and len(sys.argv) == 4, sys.argv
name, at, instance = sys.argv[3].removesuffix(".socket").partition("@")


def setting(kind, key):
    text = open(f"/etc/systemd/system/{name}{at}.{kind}").read()
    found = re.search(f"^{key}=(.*)$", text, re.M)
    return found and found[1].replace("%i", instance)


stream = setting("socket", "ListenStream")
path = stream or setting("socket", "ListenSequentialPacket")
os.makedirs(os.path.dirname(path), exist_ok=True)
if os.path.exists(path):
    os.unlink(path)
made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM if stream else socket.SOCK_SEQPACKET)
made.bind(path)
os.chmod(path, int(setting("socket", "SocketMode"), 8))
made.listen()
if os.fork():
    sys.exit()
os.setsid()
log = os.open(f"/tmp/{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
    os.dup2(fd, number)
words = shlex.split(setting("service", "ExecStart"))
while True:
    select.select([made], [], [])
    service = os.fork()
    if not service:
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        if made.fileno() == 3:
            os.set_inheritable(3, True)
        else:
            os.dup2(made.fileno(), 3)
        os.execvp(words[0], words)
    os.waitpid(service, 0)
"""
_TMPFILES = """#!/bin/sh
[ "$1" = --create ] || exit 9
grep -v '^#' "$2" | while read -r kind path mode user group; do
    [ "$kind" = d ] || exit 9
    mkdir -p "$path"
    chmod "$mode" "$path"
    chown "$user:$group" "$path"
done
"""


def stand_in(machine: Machine) -> None:
    """Put stand-ins for the programs that the lab does not have into a machine."""
    machine.sh("mkdir -p /etc/systemd/system /etc/tmpfiles.d")
    for name, text in (("apt", _APT), ("systemctl", _SYSTEMCTL), ("systemd-tmpfiles", _TMPFILES)):
        machine.put(f"/usr/local/bin/{name}", text.encode(), 0o755)


def sections() -> dict[str, list[str]]:
    """Return the page's commands by the section that they are in, in order."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^\.SH ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        blocks = re.findall(r"^\.EX\n(.*?)^\.EE", body, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.replace("\\e\n", "").splitlines()]
        if lines:
            found[title] = [line.replace("\\-", "-") for line in lines]
    return found
