"""Kill mtetool: the VMM and its guest go on, and nothing of ours stays behind.

For deaths at random instants, see `test_torture`.
"""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu, fill_with_random_tags, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.stride import ENVIRONMENT, enough


def _stalled_save(lab: Machine) -> int:
    """Start a save that hangs, attached, within its stream; return the test VMM's PID."""
    pid = start_test_vmm(lab, "0x40000000:0x4000000")
    fill_with_random_tags(lab, pid, "64M")
    # Another process holds the pipe open and does not read it.
    lab.sh(
        "mkfifo /tmp/pipe; sleep 1000 </tmp/pipe & "
        f"mtetool save kvm:{pid} --memslot 0x40000000:64M -o - >/tmp/pipe 2>/tmp/err & "
        "tool=$!; echo $tool >/tmp/pid;"
        # Attached: the helper exists, and the thread that made it is back home.
        f" until [ $(ls /proc/{pid}/task | wc -l) = 2 ]"
        f" && grep -q 'TracerPid:.0' /proc/{pid}/status || ! kill -0 $tool; do sleep 0.1; done"
    )
    return pid


def _threads(lab: Machine, pid: int) -> int:
    return int(lab.sh(f"ls /proc/{pid}/task | wc -l").stdout)


def test_interrupted_save_ends_by_its_signal_and_leaves_nothing(lab: Machine) -> None:
    pid = _stalled_save(lab)
    assert _threads(lab, pid) == 2
    script = "kill -TERM $(cat /tmp/pid); while kill -0 $(cat /tmp/pid); do sleep 0.1; done"
    lab.sh(script + " 2>/dev/null", timeout=60, check=False)
    assert lab.sh(f"grep -c ^6d74 /proc/{pid}/maps; true").stdout == b"0\n"
    assert _threads(lab, pid) == 1


def test_vmm_that_ends_while_attached_is_gone_at_once(lab: Machine) -> None:
    pid = _stalled_save(lab)
    # mtetool is blocked on its pipe; it must not keep the VMM as a zombie.
    lab.sh(f"kill -KILL {pid}; while [ -e /proc/{pid} ]; do sleep 0.1; done", timeout=30)
    assert lab.sh("kill -0 $(cat /tmp/pid)").returncode == 0
    # With a reader, the save goes on until it finds that the guest is gone.
    lab.sh("cat /tmp/pipe >/dev/null; while kill -0 $(cat /tmp/pid); do sleep 0.1; done 2>&1")
    assert b"ended" in lab.get("/tmp/err")


@pytest.mark.long
def test_death_before_every_step_is_harmless_without_the_c_librarys_exit(lab: Machine) -> None:
    # With it: test_hardened, in a QEMU as libvirt starts it.
    guest = Qemu(lab, "guest").start()
    guest.wait_for_checks()
    command = ["python3", "-m", "tests.lab.deaths", str(guest.pid), "no-exit"]
    result = lab.run(command, timeout=400, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    print({key: found[key] for key in found if key != "before"})
    assert found["harmed"] == {}, found["before"]
    assert found["last_status"] == 0
    assert found["deaths"] > enough(50)
    assert found["mappings_in_the_end"] == 0
    # One mapping at most, however often it died: each run removes what the previous one left.
    assert found["most_mappings_left"] <= 1
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def test_vmm_that_dies_at_any_step_is_let_go_and_told_of(lab: Machine) -> None:
    command = ["python3", "-m", "tests.lab.vmm_deaths"]
    result = lab.run(command, timeout=400, env=ENVIRONMENT, check=True)
    found = json.loads(result.stdout)
    print(found)
    assert found["stuck"] == []
    assert found["statuses"] == {"4": found["deaths"]}
    assert found["deaths"] > enough(50)
