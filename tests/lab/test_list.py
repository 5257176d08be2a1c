"""`mtetool list`: every VM of the host, whatever its user and whatever it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.jsonkeys import check_keys
from tests.lab.guests import Qemu, page_bytes, start_test_vmm
from tests.lab.machine import Machine

MIB = 1 << 20


def _list(lab: Machine, *words: str) -> dict[int, dict[str, Any]]:
    result = lab.run(["mtetool", "list", "--json", *words], check=True)
    found = json.loads(result.stdout)
    check_keys(found)
    return {vm["pid"]: vm for vm in found["vms"]}


def _keys(vm: dict[str, Any], *keys: str) -> list[Any]:
    return [vm[key] for key in keys]


def test_all_vms_of_the_host(lab: Machine) -> None:
    guest = Qemu(lab, "first", extra="-smp 2 -name guest=web,debug-threads=on").start()
    paused = Qemu(lab, "second", extra="-S", uid=4711).start()
    plain = start_test_vmm(lab, "--no-mte", "0x40000000:0x100000")
    guest.wait_for_machine()
    paused.wait_for_machine()
    vms = _list(lab)
    keys = ("vmm", "name", "vcpus", "memory_bytes", "mte", "state", "owner", "reason")
    assert set(vms) == {guest.pid, paused.pid, plain}
    qemu = "qemu-system-aarch64"
    # QEMU's memory, and the page for stolen time that it gives each guest.
    size = 256 * MIB + page_bytes(lab)
    shown = [qemu, "web", 2, size, True, "running", "root", None]
    assert _keys(vms[guest.pid], *keys) == shown
    shown = [qemu, None, 1, size, True, "paused", "4711", None]
    assert _keys(vms[paused.pid], *keys) == shown
    assert _keys(vms[plain], *keys) == ["testvmm", None, 0, None, False, None, "root", None]
    assert [slot["ipa"] for slot in vms[guest.pid]["memslots"]][-1] == 0x40000000
    text = lab.run(["mtetool", "list"], check=True).stdout.decode().splitlines()
    assert text[0].split() == ["GUEST", "VMM", "NAME", "VCPUS", "MEMORY", "MTE", "STATE", "OWNER"]
    assert [line.split()[0].split(":")[1] for line in text[1:]] == sorted(map(str, vms), key=int)


def test_nothing_is_attached_to_when_that_is_asked(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    before = lab.sh(f"grep ctxt /proc/{pid}/status").stdout
    vm = _list(lab, "--no-attach")[pid]
    assert _keys(vm, "mte", "memslots", "reason") == [None, [], None]
    assert lab.sh(f"grep ctxt /proc/{pid}/status").stdout == before
    assert _list(lab)[pid]["mte"] is True


def test_vm_that_refuses_is_listed_with_the_reason(lab: Machine) -> None:
    strict = start_test_vmm(lab, "--allow", "29", "0x40000000:0x100000")
    result = lab.run(["mtetool", "list"], check=True)
    assert f"kvm:{strict}".encode() in result.stdout
    assert b"unknown" in result.stdout
    assert b"does not allow" in result.stderr
    assert _list(lab)[strict]["reason"]["error"] == "attach-refused"


@pytest.mark.long  # test_hardened attaches to one whose monitor is held
def test_monitor_that_somebody_holds_is_done_without(lab: Machine) -> None:
    guest = Qemu(lab, "busy").start().wait_for_machine()
    hold = (
        "import socket, time\n"
        "monitor = socket.socket(socket.AF_UNIX)\n"
        f"monitor.connect({guest.qmp_path!r})\n"
        "print(monitor.recv(4096), flush=True)\n"
        "time.sleep(1000)\n"
    )
    lab.put("/tmp/hold.py", hold.encode())
    lab.sh("python3 /tmp/hold.py >/tmp/held & until grep -q QMP /tmp/held; do sleep 0.1; done")
    vm = _list(lab)[guest.pid]
    assert _keys(vm, "mte", "state") == [True, "running"]
    assert vm["memslots"][-1]["size_bytes"] == 256 * MIB
    saved = lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s", "--json"], check=True)
    assert json.loads(saved.stdout)["consistent"] is False


def test_user_without_the_right_sees_what_there_is_to_see(lab: Machine) -> None:
    start_test_vmm(lab, "0x40000000:0x100000")
    lab.put(
        "/tmp/become.py", b"import os, sys\nos.setuid(1000)\nos.execvp(sys.argv[1], sys.argv[1:])"
    )
    result = lab.run(["python3", "/tmp/become.py", "mtetool", "list", "--json"], check=True)
    found = json.loads(result.stdout)
    assert found["vms"] == []
    assert found["unseen_processes"] > 0
    assert b"of other users could not be inspected" in result.stderr
    assert b"run mtetool as root" in result.stderr


def test_the_reason_why_a_process_is_not_seen_is_said_to_root_too(lab: Machine) -> None:
    """Root lacks a capability that other processes have, and so may not examine them."""
    lab.put(
        "/tmp/drop.py",
        b"import ctypes, os, sys\n"
        b"for capability in (19, 21):\n"  # CAP_SYS_PTRACE, CAP_SYS_ADMIN
        b"    assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0\n"
        b"os.execvp(sys.argv[1], sys.argv[1:])\n",
    )
    result = lab.run(["python3", "/tmp/drop.py", "mtetool", "list", "--json"], check=True)
    count = json.loads(result.stdout)["unseen_processes"]
    assert count > 0
    noun = "process" if count == 1 else "processes"
    said = f"{count} {noun} with capabilities that mtetool does not have could not be inspected"
    assert said.encode() in result.stderr
    assert b"other users" not in result.stderr


def test_thread_of_the_kernel_is_no_vcpu(lab: Machine) -> None:
    """It runs all the time, like a vCPU, and has no registers to borrow."""
    pid = start_test_vmm(lab, "--sqpoll", "--no-mte", "0x40000000:0x100000")
    assert b"iou-sqp" in lab.sh(f"cat /proc/{pid}/task/*/comm").stdout
    assert _list(lab)[pid]["state"] is None
    lab.sh(f"kill {pid}")
    # Its only own thread is a vCPU. A vCPU is borrowed last, but here it must be borrowed.
    pid = start_test_vmm(lab, "--sqpoll", "--run", "0x40000000:0x100000")
    lab.run(["mtetool", "save", "--freeze", f"kvm:{pid}", "-o", "/tmp/s"], check=True)
    traced = f"cat /proc/{pid}/task/*/status | grep TracerPid: | cut -f2"
    assert lab.sh(traced).stdout == b"0\n0\n"
