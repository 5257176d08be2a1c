"""Things that mtetool must not do to a VMM, whatever the VMM's state."""

from __future__ import annotations

import json
import re

import pytest

from tests.lab.guests import Qemu, start_test_vmm
from tests.lab.machine import Machine

_SAVE = "save kvm:{pid} --memslot 0x40000000:1M -o /tmp/s --force"
# The VMM ends, and another one gets its PID, after mtetool has examined it and before the attach.
_REUSE = """
import os, sys, time
from pathlib import Path
from mtetool.backends import GuestOptions, open_guest
from mtetool.errors import MtetoolError
from mtetool.guest import Memslot
import subprocess
def start(number):
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
    words = ["/lab/testvmm", "0x40000000:0x100000"]
    vmm = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert vmm.stdout.readline() == b"ready\\n"
    assert vmm.pid == number
    return vmm
first = start(20000)
guest = open_guest("kvm:20000", GuestOptions(memslots=(Memslot(0, 0x40000000, 1 << 20),)))
first.kill()
first.wait()
time.sleep(0.05)  # a start time is counted in hundredths of a second
second = start(20000)
before = Path("/proc/20000/maps").read_text()
try:
    guest.info()
except MtetoolError as error:
    print(error.id, error.message)
guest.close()
assert Path("/proc/20000/maps").read_text() == before
assert "TracerPid:\\t0" in Path("/proc/20000/status").read_text()
second.kill()
"""
_CGROUP = """
cd /sys/fs/cgroup; [ -e cgroup.procs ] || mount -t cgroup2 cgroup .; cd /sys/fs/cgroup
echo +pids >cgroup.subtree_control; mkdir {pid}; cd {pid}; echo {pid} >cgroup.procs
"""

# Frozen vCPUs use no CPU time; the main loop still answers; after the thaw, they run.
_FREEZE = """
import json, sys, time
from pathlib import Path
from mtetool.backends import GuestOptions, open_guest
from mtetool.guest import Memslot
pid = int(sys.argv[1])
def used():
    stats = [(t / "stat").read_text().rpartition(")")[2].split() for t in tasks]
    return [int(s[11]) + int(s[12]) for s in stats]
tasks = [t for t in Path(f"/proc/{pid}/task").iterdir() if "KVM" in (t / "comm").read_text()]
slot = Memslot(0, 0x40000000, 1 << 20)
with open_guest(f"kvm:{pid}", GuestOptions(memslots=(slot,))) as guest:
    guest.freeze()
    states = [(t / "stat").read_text().rpartition(")")[2].split()[0] for t in tasks]
    main = (Path(f"/proc/{pid}/stat")).read_text().rpartition(")")[2].split()[0]
    first = used()
    time.sleep(0.5)
    second = used()
    seconds = guest.thaw()
while used() == second:
    time.sleep(0.01)
print(json.dumps([len(tasks), states, main, first == second, seconds > 0.5]))
"""

# What mtetool imports, and how many pages it faults in, while the guest is frozen.
_WHILE_FROZEN = """
import gc, json, resource, sys
from mtetool.backends.kvm.guest import KvmGuest
from mtetool.__main__ import main
freeze, thaw, seen = KvmGuest.freeze, KvmGuest.thaw, []
def look():
    seen.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt, set(sys.modules)))
def freeze_and_look(self):
    freeze(self)
    look()
def look_and_thaw(self):
    look()
    return thaw(self)
KvmGuest.freeze, KvmGuest.thaw = freeze_and_look, look_and_thaw
status = main()
(before, loaded), (after, loaded_then) = seen[:2]
print(json.dumps([status, after - before, sorted(loaded_then - loaded)]), file=sys.stderr)
"""


def _threads(lab: Machine, pid: int) -> bytes:
    script = f"for t in /proc/{pid}/task/*; do grep -E 'State|TracerPid|SigBlk' $t/status; done"
    return lab.sh(script).stdout


def _ours(lab: Machine, pid: int) -> bytes:
    return lab.sh(f"grep -c ^6d74 /proc/{pid}/maps; true").stdout


def test_stopped_vmm_is_saved_and_stays_stopped(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    lab.sh(f"kill -STOP {pid}; until grep -q 'State:.T' /proc/{pid}/status; do sleep 0.1; done")
    before = _threads(lab, pid)
    lab.mtetool(_SAVE.format(pid=pid))
    assert b"State:\tT" in before
    assert b"State:\tT" in lab.sh(f"grep State /proc/{pid}/status").stdout
    # The helper ends when the VMM is continued, and frees its memory.
    lab.sh(f"kill -CONT {pid}; until ! grep -q ^6d74 /proc/{pid}/maps; do sleep 0.1; done")
    assert lab.sh(f"ls /proc/{pid}/task | wc -l").stdout == b"1\n"
    lab.mtetool(_SAVE.format(pid=pid))


def test_frozen_vmm_is_given_up_and_goes_on_when_thawed(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    before = _threads(lab, pid)
    lab.sh(
        _CGROUP.format(pid=pid)
        + "echo 1 >cgroup.freeze; until grep -q 'frozen 1' cgroup.events; do sleep 0.1; done"
    )
    result = lab.run(["mtetool", *_SAVE.format(pid=pid).split()])
    assert result.returncode == 4, result.stderr
    assert b"did not answer" in result.stderr
    lab.sh(
        f"echo 0 >/sys/fs/cgroup/{pid}/cgroup.freeze;"
        f" until [ $(ls /proc/{pid}/task | wc -l) = 1 ]; do sleep 0.1; done"
    )
    lab.mtetool(_SAVE.format(pid=pid))
    assert (_threads(lab, pid), _ours(lab, pid)) == (before, b"0\n")


def test_vmm_that_may_have_no_more_threads_is_refused_and_untouched(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    before = _threads(lab, pid)
    lab.sh(_CGROUP.format(pid=pid) + "echo 1 >pids.max")
    result = lab.run(["mtetool", *_SAVE.format(pid=pid).split()])
    assert result.returncode == 4
    assert b"could not start a thread" in result.stderr
    assert (_threads(lab, pid), _ours(lab, pid)) == (before, b"0\n")


@pytest.mark.long
@pytest.mark.two_cpus
def test_threads_that_the_vmm_makes_meanwhile_are_left_alone(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--churn", "0x40000000:0x100000")
    for _ in range(4):
        lab.mtetool(_SAVE.format(pid=pid))
    # When its input ends, it prints its counts.
    lab.sh(
        "for p in /proc/[0-9]*; do"
        " [ \"$(tr '\\0' ' ' <$p/cmdline)\" = 'sleep 100000 ' ] && kill ${p#/proc/}; done;"
        " until grep -q wrong= /tmp/vmm.out; do sleep 0.1; done"
    )
    found = re.fullmatch(r"ready\nthreads=(\d+) wrong=0\n", lab.get("/tmp/vmm.out").decode())
    assert found, lab.get("/tmp/vmm.out")
    assert int(found[1]) > 100


@pytest.mark.long
@pytest.mark.two_cpus
def test_vcpu_that_is_the_only_thread_runs_on(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--run", "0x40000000:0x100000")
    in_guest = f"grep -qE '^(running|29 0x[0-9a-f]* 0xae80 )' /proc/{pid}/syscall"
    lab.sh(f"until {in_guest}; do sleep 0.1; done")
    for _ in range(3):
        lab.mtetool(_SAVE.format(pid=pid))
        lab.mtetool(_SAVE.format(pid=pid) + " --freeze")
    used = f"read -r line </proc/{pid}/stat; set -- ${{line##*)}}; echo ${{12}} ${{13}}"
    lab.sh(f'a=$({used}); until [ "$({used})" != "$a" ]; do sleep 0.1; done; {in_guest}')
    assert lab.sh(f"ls /proc/{pid}/task | wc -l").stdout == b"1\n"
    assert _ours(lab, pid) == b"0\n"


@pytest.mark.two_cpus
@pytest.mark.long
@pytest.mark.parametrize("load", [0, 3])
def test_frozen_vcpus_stand_still_and_run_on(lab: Machine, load: int) -> None:
    guest = Qemu(lab, "g", extra="-smp 4", guest_options=f"tagger.load={load}").start()
    guest.wait_for_checks()
    lab.put("/tmp/freeze.py", _FREEZE.encode())
    command = ["python3", "/tmp/freeze.py", str(guest.pid)]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    n_vcpus, states, main, stood, timed = json.loads(result.stdout)
    assert (n_vcpus, states, stood, timed) == (4, ["t"] * 4, True, True)
    assert main != "t"
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


@pytest.mark.long
def test_save_freeze_of_a_running_guest_is_consistent(lab: Machine) -> None:
    guest = Qemu(lab, "g", extra="-smp 2").start()
    guest.wait_for_checks()
    words = ["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s", "--freeze", "--json"]
    saved = json.loads(lab.run(words, check=True).stdout)
    assert saved["consistent"] is True
    assert 0 < saved["frozen_seconds"] < saved["elapsed_seconds"]
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def test_nothing_is_made_ready_while_the_guest_waits(lab: Machine) -> None:
    guest = Qemu(lab, "g", extra="-S").start().wait_for_machine()
    lab.mtetool(
        "emu create /root/heap --memory 256M --fill heap",
        "save emu:/root/heap -o /root/s",
        f"restore /root/s kvm:{guest.pid} --memslot 0x40000000:256M",
    )
    lab.put("/tmp/frozen.py", _WHILE_FROZEN.encode())
    words = ["save", f"kvm:{guest.pid}", "-o", "/root/t", "--freeze", "--quiet"]
    env = {"PYTHONPATH": "/opt/mtetool"}
    # Not a fork: the test is about what it imports, and when.
    result = lab.run(["python3", "/tmp/frozen.py", *words], env=env, check=True, fork=False)
    status, n_faults, imported = json.loads(result.stderr.splitlines()[-1])
    print(f"{n_faults} page faults while the guest stood still")
    assert (status, imported) == (0, [])
    # Before memory was prepared for it: one for each page of the snapshot, 180, and 160 others.
    assert n_faults < 60


def test_pid_that_changes_hands_before_the_attach_is_noticed(lab: Machine) -> None:
    lab.put("/tmp/reuse.py", _REUSE.encode())
    command = ["python3", "/tmp/reuse.py"]
    result = lab.run(command, env={"PYTHONPATH": "/opt/mtetool"}, check=True)
    assert b"no-such-process" in result.stdout
    assert b"another one has its PID now" in result.stdout


@pytest.mark.long
@pytest.mark.two_cpus
def test_runs_at_the_same_time_do_not_get_into_each_others_way(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x4000000")
    save = f"mtetool save kvm:{pid} --memslot 0x40000000:64M --force"
    starts = " ".join(f"{save} -o /tmp/s{n} >/dev/null 2>/tmp/e{n} & p{n}=$!;" for n in range(4))
    waits = " ".join(f"wait $p{n}; echo $?;" for n in range(4))
    told = lab.sh(f"{starts} {waits} cat /tmp/e? >&2")
    assert told.stdout.split() == [b"0"] * 4, told.stderr
    assert _ours(lab, pid) == b"0\n"
    assert lab.sh(f"ls /proc/{pid}/task | wc -l").stdout == b"1\n"
