"""Who may work on a VMM, and the errors that others get: real users, real processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.lab.guests import start_test_vmm
from tests.lab.machine import Machine

_SLOT = "0x40000000:0x100000"
_SCOPE = "/proc/sys/kernel/yama/ptrace_scope"

# Changes its identity, word by word, and then executes the program.
_AS = """
import ctypes, os, sys

libc = ctypes.CDLL(None, use_errno=True)
words, argv = sys.argv[1].split(","), sys.argv[2:]
for word in words:
    name, _, value = word.partition("=")
    if name == "uid":
        os.setgroups([])
        os.setresgid(int(value), int(value), int(value))
        os.setresuid(int(value), int(value), int(value))
        assert libc.prctl(4, 1, 0, 0, 0) == 0  # dumpable, as after a login
    elif name == "no-ptrace":
        assert libc.prctl(24, 19, 0, 0, 0) == 0  # CAP_SYS_PTRACE out of the bounding set
    elif name == "namespace":
        uid, gid = os.getuid(), os.getgid()
        os.unshare(os.CLONE_NEWUSER)
        maps = {"setgroups": "deny", "uid_map": f"0 {uid} 1", "gid_map": f"0 {gid} 1"}
        for file, text in maps.items():
            with open(f"/proc/self/{file}", "w") as opened:
                opened.write(text)
    elif name == "stdin":  # one that never ends
        reading, writing = os.pipe()
        os.dup2(reading, 0)
        os.set_inheritable(writing, True)
os.execv(argv[0], argv)
"""

# mtetool with a VMM that is killed before the second read.
_KILLING = """
import os, signal, sys, time
sys.path.insert(0, "/opt/mtetool")
from mtetool.__main__ import main
from mtetool.backends.kvm.guest import KvmGuest

read, calls = KvmGuest.begin_read, []

def killing(self, ipa, out):
    calls.append(ipa)
    if len(calls) == 2:
        pid = self.vm.process.pid
        os.kill(pid, signal.SIGKILL)
        # A zombie or gone, depending on its parent.
        while os.path.exists(f"/proc/{pid}") and os.listdir(f"/proc/{pid}/fd"):
            time.sleep(0.01)
    return read(self, ipa, out)

KvmGuest.begin_read = killing
sys.exit(main())
"""


def _prepare(lab: Machine) -> None:
    lab.put("/tmp/as.py", _AS.encode())
    lab.sh("chmod 666 /dev/kvm")


def _vmm(lab: Machine, words: str = "uid=1000", program: str = "/lab/testvmm") -> int:
    """Start a test VMM with another identity; return its PID."""
    _prepare(lab)
    result = lab.sh(
        f"python3 /tmp/as.py stdin,{words} {program} {_SLOT} >/tmp/vmm.out 2>&1 & echo $!;"
        " until grep -q ready /tmp/vmm.out || ! kill -0 $!; do sleep 0.1; done;"
        " cat /tmp/vmm.out >&2"
    )
    assert b"ready" in result.stderr, result.stderr
    return int(result.stdout)


def _save(lab: Machine, words: str, pid: int) -> subprocess.CompletedProcess[bytes]:
    command = ["mtetool", "save", f"kvm:{pid}", "--memslot", _SLOT, "-o", "/dev/null", "--json"]
    if words:
        command = ["python3", "/tmp/as.py", words, "/usr/local/bin/mtetool", *command[1:]]
    return lab.run([*command, "--force"])


def _told(result: subprocess.CompletedProcess[bytes]) -> Any:
    assert result.returncode == 4, result.stdout + result.stderr
    return json.loads(result.stderr)


@contextmanager
def _ptrace_scope(lab: Machine, scope: int) -> Iterator[None]:
    lab.sh(f"echo {scope} >{_SCOPE}")
    try:
        yield
    finally:
        lab.sh(f"echo 0 >{_SCOPE}")


@pytest.mark.parametrize(
    ("vmm", "runner", "scope"),
    [
        ("uid=1000", "", 2),
        pytest.param("uid=1000", "uid=1000", 0, marks=pytest.mark.long),
        pytest.param("uid=1000,namespace", "", 1, marks=pytest.mark.long),
        ("uid=1000,namespace", "uid=1000", 0),
    ],
)
def test_who_may(lab: Machine, vmm: str, runner: str, scope: int) -> None:
    pid = _vmm(lab, vmm)
    with _ptrace_scope(lab, scope):
        result = _save(lab, runner, pid)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("vmm", "runner", "scope", "reason", "words"),
    [
        ("uid=1000", "uid=1000", 1, "ptrace-scope", "ptrace_scope is 1"),
        ("uid=1000", "uid=1000", 2, "ptrace-scope", "ptrace_scope is 2"),
        ("uid=1000", "uid=1001", 0, "other-user", "runs as user 1000 and mtetool as user 1001"),
        ("uid=0", "no-ptrace", 0, "capabilities", "holds capabilities"),
        ("uid=1000", "uid=1000,namespace", 1, "user-namespace", "user namespace"),
        ("uid=0", "uid=1000,namespace", 0, "user-namespace", "user namespace"),
    ],
)
def test_who_may_not(
    lab: Machine, vmm: str, runner: str, scope: int, reason: str, words: str
) -> None:
    pid = _vmm(lab, vmm)
    with _ptrace_scope(lab, scope):
        told = _told(_save(lab, runner, pid))
    assert (told["error"], told["reason"]) == ("permission", reason), told
    assert told["errno"] in ("EPERM", "EACCES")
    assert words in told["message"]
    assert str(pid) in told["message"]
    assert told["hint"]


def test_a_process_that_protects_itself_from_its_user(lab: Machine) -> None:
    # A program that its user can run but not read is not dumpable.
    lab.sh("mkdir /tmp/bin; cp /lab/testvmm /tmp/bin/testvmm; chmod 711 /tmp/bin/testvmm")
    pid = _vmm(lab, program="/tmp/bin/testvmm")
    told = _told(_save(lab, "uid=1000", pid))
    assert (told["error"], told["reason"]) == ("permission", "not-dumpable"), told
    assert "not dumpable" in told["message"]
    assert _save(lab, "", pid).returncode == 0


@pytest.mark.long
def test_where_nobody_may_until_the_next_boot() -> None:
    with Machine(cpus=1) as lab:
        pid = start_test_vmm(lab, _SLOT)
        lab.sh(f"echo 3 >{_SCOPE}")
        told = _told(_save(lab, "", pid))
        probe = lab.run(["mtetool", "probe"])
    assert (told["error"], told["reason"]) == ("permission", "ptrace-scope"), told
    assert "ptrace_scope is 3" in told["message"]
    assert "reboot" in told["hint"]
    assert probe.returncode == 4
    assert b"no process may trace" in probe.stdout


def test_a_process_that_is_traced_names_its_tracer(lab: Machine) -> None:
    pid = _vmm(lab)
    tracer = (
        "import ctypes, time\n"
        f"assert ctypes.CDLL(None).ptrace(0x4206, {pid}, None, None) == 0\n"
        "print('on', flush=True)\ntime.sleep(1000)\n"
    )
    lab.put("/tmp/tracer.py", tracer.encode())
    started = lab.sh(
        "python3 /tmp/tracer.py >/tmp/on & echo $!; until grep -q on /tmp/on; do sleep 0.1; done"
    )
    told = _told(_save(lab, "", pid))
    lab.sh(f"kill -KILL {int(started.stdout)}")
    assert (told["error"], told["tracer"]) == ("busy", int(started.stdout))
    assert f"traced by process {int(started.stdout)} (python3)" in told["message"]


def test_a_zombie_is_one_that_has_ended(lab: Machine) -> None:
    program = (
        "import os, time\n"
        "pid = os.fork() or os._exit(0)\n"
        "os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        "print(pid, flush=True)\ntime.sleep(1000)\n"
    )
    lab.put("/tmp/parent.py", program.encode())
    started = lab.sh(
        "python3 /tmp/parent.py >/tmp/pid & echo $!; until [ -s /tmp/pid ]; do sleep 0.1; done"
    )
    parent, ended = int(started.stdout), int(lab.get("/tmp/pid"))
    told = _told(_save(lab, "", ended))
    lab.sh(f"kill -KILL {parent}")
    assert told["error"] == "no-such-process"
    assert f"process {ended} (python3) has ended" in told["message"]
    assert f"process {parent} (python3)" in told["message"]


def test_threads_are_no_vmms(lab: Machine) -> None:
    kernel = _told(_save(lab, "", 2))
    assert kernel["error"] == "no-vm"
    assert "process 2 (kthreadd) is a kernel thread" in kernel["message"]
    program = (
        "import threading, time\n"
        "thread = threading.Thread(target=lambda: time.sleep(1000))\nthread.start()\n"
        "print(thread.native_id, flush=True)\n"
    )
    lab.put("/tmp/threads.py", program.encode())
    started = lab.sh(
        "python3 /tmp/threads.py >/tmp/tid & echo $!; until [ -s /tmp/tid ]; do sleep 0.1; done"
    )
    pid = int(started.stdout)
    tid = int(lab.get("/tmp/tid"))
    told = _told(_save(lab, "", tid))
    lab.sh(f"kill -KILL {pid}")
    assert (told["error"], told["hint"]) == ("no-vm", f"kvm:{pid}")
    assert f"{tid} is a thread of process {pid}" in told["message"]


@pytest.mark.parametrize("partial", [None, "fail", "keep"])
def test_a_vmm_that_ends_during_the_copy(lab: Machine, partial: str | None) -> None:
    pid = start_test_vmm(lab, _SLOT, "0x50000000:0x100000")
    lab.put("/tmp/killing.py", _KILLING.encode())
    words = ["save", f"kvm:{pid}", "--memslot", _SLOT, "--memslot", "0x50000000:1M"]
    asked = ["--partial", partial] if partial else []
    result = lab.run(["python3", "/tmp/killing.py", *words, "-o", "/tmp/s", *asked])
    said = result.stdout + result.stderr
    assert result.returncode == 4, said
    assert b"ended while mtetool was attached" in said
    assert b"the tags of 1048576 bytes had been read" in said
    left = lab.sh("ls -A /tmp | grep '^[.]*s'; true").stdout
    if partial != "keep":
        assert left == b""
        return
    assert left == b"s\n"
    info = json.loads(lab.run(["mtetool", "info", "/tmp/s", "--json"], check=True).stdout)
    assert [(m["ipa"], m["size_bytes"]) for m in info["missing"]] == [(0x50000000, 1 << 20)]
    assert lab.run(["mtetool", "verify", "/tmp/s"]).returncode == 3
