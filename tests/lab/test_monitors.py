"""Only the VMM's own monitor is believed, whatever is found at its path.

In each of these tests a QEMU of another size answers at the path of the first one's monitor: its
answer would be taken for the guest's memory, and tags would be lost silently.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

MIB = 1 << 20
PATH = "/tmp/vm/run/monitor"

# A container: a mount namespace of its own, in which the path is another file. The link in it is
# absolute, and has no target outside.
_CONTAINER = """
import os, subprocess, sys
os.unshare(os.CLONE_NEWNS)
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "-t", "tmpfs", "none", "/tmp/vm"], check=True)
os.mkdir("/tmp/vm/inside")
os.symlink("/tmp/vm/inside", "/tmp/vm/run")
os.execvp(sys.argv[1], sys.argv[1:])
"""
# A manager, like libvirt and Kata: it listens, and gives the socket to QEMU. With "pids", they are
# in a PID namespace, where QEMU's threads have the same ids as in any other one.
_MANAGER = """
import os, socket, sys
path, namespace, command = sys.argv[1], sys.argv[2], sys.argv[3:]
if namespace == "pids":
    os.unshare(os.CLONE_NEWPID)
    if os.fork():
        os.wait()
        sys.exit()
server = socket.socket(socket.AF_UNIX)
server.bind(path)
server.listen(1)
server.set_inheritable(True)
chardev = f"socket,id=c,fd={server.fileno()},server=on,wait=off"
if os.fork():
    os.wait()
else:
    os.execvp(command[0], [*command, "-chardev", chardev, "-mon", "chardev=c,mode=control"])
"""


@dataclass
class Contained(Qemu):
    """A QEMU with the tagger in a container; its monitor is at PATH in there."""

    @property
    def qmp_path(self) -> str:
        return PATH

    def start(self) -> Contained:
        self.lab.put("/tmp/container.py", _CONTAINER.encode())
        self.wrapper = "python3 /tmp/container.py"
        self.pid = _started(self.lab, self.command(), "/proc/$!/root/tmp/vm/inside/monitor")
        return self


def _started(lab: Machine, command: str, socket: str) -> int:
    """Start a command, wait for its socket, and return its PID."""
    wait = f"until [ -S {socket} ]; do kill -0 $! || exit 1; sleep 0.1; done"
    return int(lab.sh(f"mkdir -p /tmp/vm/run; {command} >/tmp/out 2>&1 & echo $!; {wait}").stdout)


def _paused(lab: Machine, memory: str, path: str = PATH) -> int:
    """Start a QEMU in this namespace, with its guest paused from the start; return its PID."""
    lab.sh(f"rm -f {path}")
    return _started(lab, f"{_qemu(memory)} -qmp unix:{path},server=on,wait=off", path)


def _qemu(memory: str) -> str:
    return (
        "qemu-system-aarch64 -M virt,gic-version=3,mte=on -accel kvm -cpu host -S"
        f" -m {memory} -nodefaults -display none"
    )


def _managed(lab: Machine, memory: str, path: str, namespace: str) -> int:
    """Start such a QEMU with a manager that listens at `path`; return its PID."""
    lab.put("/tmp/manager.py", _MANAGER.encode())
    _started(lab, f"python3 /tmp/manager.py {path} {namespace} {_qemu(memory)}", path)
    look = f"grep -l '^qemu.*{memory}.*id=c,fd=' /proc/[0-9]*/cmdline"
    found = lab.sh(f"until {look} 2>/dev/null; do sleep 0.1; done").stdout
    return int(found.split(b"/")[2])


def _ask(lab: Machine, *words: str, status: int = 0) -> dict[str, Any]:
    result = lab.run(["mtetool", *words, "--json"])
    assert result.returncode == status, (result.stdout, result.stderr)
    answer: dict[str, Any] = json.loads(result.stderr.splitlines()[-1] if status else result.stdout)
    return answer


def _main_memory(document: dict[str, Any]) -> int:
    size: int = max(document["memslots"], key=lambda slot: slot["ipa"])["size_bytes"]
    return size


def _saved(lab: Machine, pid: int, *words: str) -> dict[str, Any]:
    """Save with these options, and return what `info` reports about the snapshot."""
    _ask(lab, "save", f"kvm:{pid}", "--freeze", "--force", "-o", "/tmp/s", *words)
    return _ask(lab, "info", "/tmp/s")


@pytest.mark.long
def test_the_same_path_in_a_container_and_outside(lab: Machine) -> None:
    paused = _paused(lab, "256M")
    guest = Contained(lab, "guest", memory="128M").start()
    guest.wait_for_checks()

    info = _saved(lab, guest.pid)
    assert info["tagged_bytes"] > 0
    assert _main_memory(info) == 128 * MIB
    listed = {vm["pid"]: vm for vm in _ask(lab, "list")["vms"]}
    assert [listed[pid]["state"] for pid in (paused, guest.pid)] == ["paused", "running"]
    assert [_main_memory(listed[pid]) for pid in (paused, guest.pid)] == [256 * MIB, 128 * MIB]

    # Out here, PATH is the other VMM's monitor; the guest's own monitor has a path here, too.
    words = ("save", f"kvm:{guest.pid}", "-o", "/tmp/none")
    for more in ((), ("--memslot", "0x40000000:256M")):
        refused = _ask(lab, *words, "--qmp", PATH, *more, status=4)
        assert refused["error"] == "foreign-monitor"
        assert f"process {paused} " in refused["message"]
    assert lab.run(["ls", "/tmp/none"]).returncode
    own = f"/proc/{guest.pid}/root/tmp/vm/inside/monitor"
    assert _main_memory(_saved(lab, guest.pid, "--qmp", own)) == 128 * MIB


def test_a_path_that_another_vm_has_taken_over(lab: Machine) -> None:
    """The kernel is probed instead: it does not show which memory is read-only."""
    first = _paused(lab, "256M")
    second = _paused(lab, "128M")
    for pid, size, told in ((first, 256 * MIB, False), (second, 128 * MIB, True)):
        info = _saved(lab, pid)
        assert _main_memory(info) == size
        assert any(slot["readonly"] for slot in info["memslots"]) is told


@pytest.mark.parametrize("namespace", [pytest.param("host", marks=pytest.mark.long), "pids"])
def test_a_socket_that_a_manager_made(lab: Machine, namespace: str) -> None:
    """QEMU did not create it: the ids of QEMU's threads prove that it is QEMU's."""
    paths = ("/tmp/one", "/tmp/other")
    one, other = (
        _managed(lab, memory, path, namespace)
        for memory, path in zip(("256M", "128M"), paths, strict=True)
    )
    info = _saved(lab, one, "--qmp", paths[0])
    assert _main_memory(info) == 256 * MIB
    assert any(slot["readonly"] for slot in info["memslots"])  # as QEMU reports
    ids = lab.sh(f"cat /proc/{one}/task/*/status /proc/{other}/task/*/status | grep NSpid").stdout
    inner = [line.split()[-1] for line in ids.splitlines()]
    assert (len(set(inner)) < len(inner)) is (namespace == "pids")
    refused = _ask(lab, "save", f"kvm:{one}", "--qmp", paths[1], "-o", "/tmp/none", status=4)
    assert refused["error"] == "foreign-monitor"


# A VMM, as any user could write it, whose monitor gives the answer that its argument names.
_STRANGE = """
import fcntl, itertools, os, socket, sys, threading
answer = {
    "error": [b'{"error": "x"}\\n'] * 9,
    "list": [b'{"QMP": 1}\\n', *[b'{"return": []}\\n'] * 9],
    "deep": itertools.repeat(b"[" * 4096),
    "line": itertools.repeat(b'{"QMP": "' + b"x" * 4096),
    "events": itertools.chain([b'{"QMP": 1}\\n'], itertools.repeat(b'{"event": "X"}\\n')),
}[sys.argv[1]]
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
server = socket.socket(socket.AF_UNIX)
server.bind(sys.argv[3].removeprefix("unix:").partition(",")[0])
server.listen(8)
while True:
    client, _ = server.accept()
    try:
        for piece in answer:
            client.sendall(piece)
        client.recv(1 << 20)
    except OSError:
        pass
"""


def test_a_strange_monitor_costs_one_row_of_the_list(lab: Machine) -> None:
    lab.put("/tmp/strange.py", _STRANGE.encode())
    kinds = {}
    for kind in ("error", "list", "deep", "line", "events"):
        socket = f"/tmp/{kind}"
        words = f"python3 /tmp/strange.py {kind} -qmp unix:{socket},server=on"
        kinds[_started(lab, words, socket)] = kind
    good = _paused(lab, "128M")
    vms = {vm["pid"]: vm for vm in _ask(lab, "list")["vms"]}
    assert set(vms) == {*kinds, good}
    assert (vms[good]["state"], vms[good]["reason"]) == ("paused", None)
    for pid in kinds:
        assert (vms[pid]["mte"], vms[pid]["memslots"]) == (False, [])
        assert vms[pid]["reason"]["error"] == "layout-unknown"


@pytest.mark.long
def test_a_vm_before_its_vcpus(lab: Machine) -> None:
    """QEMU does not report its threads yet: the proof is that it created the socket."""
    one, other = (Qemu(lab, name, mte=False).start() for name in ("one", "other"))
    refused = _ask(lab, "enable", f"kvm:{one.pid}", "--qmp", other.qmp_path, status=4)
    assert refused["error"] == "foreign-monitor"
    _ask(lab, "enable", f"kvm:{one.pid}", "--qmp", one.qmp_path)
