"""Hardened VMMs: QEMU as libvirt starts it, and a VMM with the strictest kind of filter."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu, start_test_vmm
from tests.lab.machine import Machine
from tests.lab.stride import ENVIRONMENT

_SANDBOX = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_HOLD = """
import socket, sys, time
monitor = socket.socket(socket.AF_UNIX)
monitor.connect(sys.argv[1])
print(monitor.recv(4096), flush=True)
time.sleep(1000)
"""
_SLOT = "0x40000000:0x100000"
_SAVE = ["mtetool", "save", "-o", "/tmp/s", "--memslot", "0x40000000:1M"]
# mmap, madvise, clone, munmap, exit, rt_sigreturn, ioctl of KVM_ARM_MTE_COPY_TAGS.
_NEEDED = {
    "mmap": "222",
    "madvise": "233",
    "clone": "220",
    "munmap": "215",
    "exit": "93",
    "rt_sigreturn": "139",
    "ioctl 0x8030aeb4": "29:0x8030aeb4",
}


def _executable(lab: Machine, pid: int) -> bytes:
    return lab.sh(f"grep ' ..x. ' /proc/{pid}/maps || grep '..xp' /proc/{pid}/maps").stdout


def _deaths(lab: Machine, pid: int, *words: str) -> dict[str, object]:
    command = ["python3", "-m", "tests.lab.deaths", str(pid), *words]
    result = lab.run(command, timeout=400, env=ENVIRONMENT, check=True)
    found: dict[str, object] = json.loads(result.stdout)
    print({key: found[key] for key in found if key not in ("before", "steps")})
    return found


@pytest.mark.long
def test_qemu_as_libvirt_starts_it(lab: Machine) -> None:
    guest = Qemu(lab, "guest", extra=_SANDBOX, uid=64055).start()
    guest.wait_for_checks()
    status = lab.sh(f"grep -E 'Uid|CapEff|Seccomp:|NoNewPrivs' /proc/{guest.pid}/status").stdout
    assert b"Uid:\t64055" in status
    assert b"CapEff:\t0000000000000000" in status
    assert b"Seccomp:\t2" in status
    # Another client, libvirt, holds the monitor all the time.
    lab.put("/tmp/hold.py", _HOLD.encode())
    lab.sh(
        f"python3 /tmp/hold.py {guest.qmp_path} >/tmp/held 2>&1 &"
        " until grep -q QMP /tmp/held; do sleep 0.1; done"
    )
    executable = _executable(lab, guest.pid)
    lab.run([*_SAVE, f"kvm:{guest.pid}"], check=True)
    found = _deaths(lab, guest.pid)
    assert found["harmed"] == {}, found["before"]
    assert found["mappings_in_the_end"] == 0
    assert _executable(lab, guest.pid) == executable
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def test_strict_filter_that_allows_what_is_needed_and_no_more(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--allow", ",".join(_NEEDED.values()), _SLOT)
    executable = _executable(lab, pid)
    lab.run([*_SAVE, f"kvm:{pid}"], check=True)
    found = _deaths(lab, pid, "no-exit")
    assert found["harmed"] == {}, found["before"]
    assert found["mappings_in_the_end"] == 0
    assert _executable(lab, pid) == executable


@pytest.mark.parametrize("call", _NEEDED)
def test_filter_that_lacks_one_call_is_refused_before_anything(lab: Machine, call: str) -> None:
    allowed = [number for name, number in _NEEDED.items() if name != call]
    pid = start_test_vmm(lab, "--allow", ",".join(allowed), _SLOT)
    before = lab.sh(f"cat /proc/{pid}/maps /proc/{pid}/task/*/status | grep -v ctxt").stdout
    result = lab.run([*_SAVE, f"kvm:{pid}"])
    assert result.returncode == 4
    assert f"does not allow {call}".encode() in result.stderr
    after = lab.sh(f"cat /proc/{pid}/maps /proc/{pid}/task/*/status | grep -v ctxt").stdout
    assert after == before


def test_enable_that_the_filter_does_not_allow(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--no-mte", "--allow", ",".join(_NEEDED.values()), _SLOT)
    result = lab.run(["mtetool", "enable", f"kvm:{pid}"])
    assert result.returncode == 4
    assert b"does not allow ioctl 0x4068aea3" in result.stderr
    assert lab.sh(f"ls /proc/{pid}/task | wc -l").stdout == b"1\n"


def test_vdso_that_may_not_be_executed_is_not_borrowed_from(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--no-vdso", _SLOT)
    result = lab.run([*_SAVE, f"kvm:{pid}"])
    assert result.returncode == 4
    assert b"has no vDSO with the instructions" in result.stderr
    assert lab.sh(f"ls /proc/{pid}/task | wc -l; kill -0 {pid}").stdout == b"1\n"
