"""The commands of mtetool-libvirt(7), and stand-ins for the programs that the lab does not have."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "man" / "mtetool-libvirt.7"

# The lab's root was made of these packages; there is no package manager in it.
APT = """#!/bin/sh
[ "$*" = "install libvirt-daemon-system libvirt-clients qemu-system-arm python3-libvirt" ] || exit 9
for program in libvirtd virsh qemu-system-aarch64; do command -v $program || exit 8; done
python3 -c 'import libvirt'
"""
# Does with the installed units what systemd does with them: listens, and starts the service for the
# first client. (systemd's own parser and its systemd-socket-activate: tests/companion.)
SYSTEMCTL = """#!/usr/bin/python3
import os, re, select, shlex, socket, sys

units = "/etc/systemd/system/mtetool-companion."
if sys.argv[1:] == ["daemon-reload"]:
    sys.exit()
assert sys.argv[1:] == ["enable", "--now", "mtetool-companion.socket"], sys.argv
unit = open(units + "socket").read()
path = re.search("^ListenSequentialPacket=(.*)$", unit, re.M)[1]
command = re.search("^ExecStart=(.*)$", open(units + "service").read(), re.M)[1]
os.makedirs(os.path.dirname(path), exist_ok=True)
if os.path.exists(path):
    os.unlink(path)
made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
made.bind(path)
os.chmod(path, int(re.search("^SocketMode=(.*)$", unit, re.M)[1], 8))
made.listen()
if os.fork():
    sys.exit()
os.setsid()
log = os.open("/tmp/companion.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
for fd, number in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)):
    os.dup2(fd, number)
select.select([made], [], [])
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
if made.fileno() == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(made.fileno(), 3)
words = shlex.split(command)
os.execvp(words[0], words)
"""


def sections() -> dict[str, list[str]]:
    """Return the page's commands by the section that they are in, in order."""
    found: dict[str, list[str]] = {}
    for part in re.split(r"^\.SH ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        blocks = re.findall(r"^\.EX\n(.*?)^\.EE", body, flags=re.MULTILINE | re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        if lines:
            found[title] = [line.replace("\\-", "-") for line in lines]
    return found
