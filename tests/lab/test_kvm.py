"""`kvm:PID` on live VMMs: the tags read are the guest's, and the VMM never notices."""

from __future__ import annotations

import json

import pytest

from tests.jsonkeys import check_keys
from tests.lab.guests import Qemu, fill_with_random_tags, start_test_vmm
from tests.lab.machine import Machine

MIB = 1 << 20

# Everything in a process that an attach could leave changed.
_STATE = """
cd /proc/$0
for t in task/*; do grep -E 'SigBlk|SigPnd|TracerPid|^Pid' $t/status; done
ls fd | sort -n | tr '\\n' ' '
awk '$6 == "" && $5 == 0 { print $1, $2 }' maps
"""


@pytest.fixture
def guest(lab: Machine) -> Qemu:
    """A QEMU whose guest has tagged its memory and keeps checking it."""
    qemu = Qemu(lab, "guest").start()
    qemu.wait_for_checks()
    return qemu


def _state(lab: Machine, pid: int) -> bytes:
    return lab.run(["sh", "-c", _STATE, str(pid)], check=True).stdout


def _json(data: bytes) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(data)
    check_keys(loaded)
    return loaded


def test_tags_are_the_guests_own_and_the_vmm_is_as_before(lab: Machine, guest: Qemu) -> None:
    before = _state(lab, guest.pid)
    for page, ipa in guest.ipas().items():
        words = ["dump", f"kvm:{guest.pid}", "--range", f"{ipa:#x}:4K", "--output", "raw"]
        tags = lab.run(["mtetool", *words], check=True).stdout
        assert tags == bytes((granule * 5 + page) & 15 for granule in range(256))
        if page >= 3:
            break
    assert _state(lab, guest.pid) == before
    _save_while_it_runs(lab, guest)
    assert _state(lab, guest.pid) == before
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def _save_while_it_runs(lab: Machine, guest: Qemu) -> None:
    """A save warns that the guest ran, and verifies."""
    saved = lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s"], check=True)
    assert b"ran during the save" in saved.stderr
    info = _json(lab.run(["mtetool", "info", "/tmp/s", "--json"], check=True).stdout)
    assert info["consistent"] is False
    assert [slot["ipa"] for slot in info["memslots"]] == [0, 64 * MIB, 0x90A0000, 0x40000000]  # type: ignore[attr-defined]
    assert [slot["readonly"] for slot in info["memslots"]] == [True, True, False, False]  # type: ignore[attr-defined]
    against = lab.run(["mtetool", "verify", "/tmp/s", "--against", f"kvm:{guest.pid}"])
    assert against.returncode == 0, against.stderr


def test_restore_puts_back_what_was_changed(lab: Machine, guest: Qemu) -> None:
    guest.qmp("stop")
    lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s"], check=True)
    lab.run(["mtetool", "emu", "create", "/tmp/e", "--slot", "0x40000000:256M", "--fill", "random"])
    lab.run(["mtetool", "save", "emu:/tmp/e", "-o", "/tmp/random"], check=True)
    lab.run(["mtetool", "restore", "/tmp/random", f"kvm:{guest.pid}"], check=True)
    assert lab.run(["mtetool", "diff", "/tmp/random", f"kvm:{guest.pid}"]).returncode == 1
    lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{guest.pid}"], check=True)
    assert lab.run(["mtetool", "diff", "/tmp/s", f"kvm:{guest.pid}"], check=True).returncode == 0
    guest.qmp("cont")
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def test_enable_comes_too_late_for_a_vm_with_vcpus(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--no-mte", "--vcpus", "1", "0x40000000:0x100000")
    before = _state(lab, pid)
    result = lab.run(["mtetool", "enable", f"kvm:{pid}"])
    assert result.returncode == 4
    assert b"vCPUs already" in result.stderr
    assert b"-preconfig" in result.stderr
    assert _state(lab, pid) == before


def test_enable_before_the_first_vcpu_and_again(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--no-mte", "0x40000000:0x100000")
    slot = ["--memslot", "0x40000000:1M"]
    lab.mtetool("emu create /tmp/e --memory 1M", "save emu:/tmp/e -o /tmp/zeros")
    for words in (
        f"save kvm:{pid} -o /tmp/s",
        f"dump kvm:{pid}",
        f"diff emu:/tmp/e kvm:{pid}",
        f"verify /tmp/zeros --against kvm:{pid}",
        f"restore /tmp/zeros kvm:{pid} --dry-run",
        f"restore /tmp/zeros kvm:{pid}",
    ):
        for told in ([], slot):
            off = lab.run(["mtetool", *words.split(), *told, "--json"])
            assert off.returncode == 4, words
            assert _json(off.stderr)["error"] == "mte-off", words
    assert lab.run(["ls", "/tmp/s"]).returncode != 0
    lab.run(["mtetool", "enable", f"kvm:{pid}"], check=True)
    again = lab.run(["mtetool", "enable", f"kvm:{pid}"], check=True)
    assert b"already" in again.stdout + again.stderr
    lab.run(["mtetool", "save", f"kvm:{pid}", *slot, "-o", "/tmp/s"], check=True)


def test_partial_copy_is_kept_recorded_and_reported(lab: Machine) -> None:
    # The first slot ends 1 MiB before the end that --memslot gives; the second is read-only.
    pid = start_test_vmm(lab, "0x40000000:0x100000", "0x50000000:0x100000:ro")
    told = ["--memslot", "0x40000000:2M", "--memslot", "0x50000000:1M"]
    saved = lab.run(["mtetool", "save", f"kvm:{pid}", *told, "-o", "/tmp/s", "--json"])
    assert saved.returncode == 3, saved.stderr
    info = _json(lab.run(["mtetool", "info", "/tmp/s", "--json"], check=True).stdout)
    missing = info["missing"]
    assert isinstance(missing, list)
    assert [(m["ipa"], m["size_bytes"]) for m in missing] == [(0x40100000, MIB)]
    assert missing[0]["errno"] == "EFAULT"
    restored = lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{pid}", *told])
    assert restored.returncode == 3
    assert b"0x40100000" in restored.stdout + restored.stderr
    failed = lab.run(["mtetool", "save", f"kvm:{pid}", *told, "-o", "/tmp/f", "--partial", "fail"])
    assert failed.returncode == 3
    assert lab.run(["ls", "/tmp/f"]).returncode != 0


def test_read_only_slot_that_differs_is_reported(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000:ro")
    lab.run(
        ["mtetool", "emu", "create", "/tmp/e", "--slot", "0x40000000:1M", "--fill", "random"],
        check=True,
    )
    lab.run(["mtetool", "save", "emu:/tmp/e", "-o", "/tmp/s"], check=True)
    slot = ["--memslot", "0x40000000:1M"]
    result = lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{pid}", *slot])
    assert result.returncode == 3, result.stdout + result.stderr
    assert b"0x40000000" in result.stdout + result.stderr
    zeros = lab.run(["mtetool", "dump", f"kvm:{pid}", *slot, "--output", "raw"], check=True)
    assert zeros.stdout == bytes(MIB // 16)


def test_dirty_logging_makes_a_restore_wait(lab: Machine) -> None:
    source = Qemu(lab, "source", mte=False).start()
    lab.run(["mtetool", "enable", f"kvm:{source.pid}"], check=True)
    source.qmp("x-exit-preconfig")
    source.wait_for_checks()
    lab.run(["mtetool", "save", f"kvm:{source.pid}", "-o", "/tmp/s"], check=True)
    source.qmp("migrate-set-parameters", '{"max-bandwidth": 4096}')
    source.qmp("migrate", '{"uri": "exec:cat >/dev/null"}')
    for more in ([], ["--dry-run"]):
        result = lab.run(["mtetool", "restore", "/tmp/s", f"kvm:{source.pid}", *more])
        assert result.returncode == 4, result.stdout + result.stderr
        assert b"dirty" in result.stderr
    source.qmp("migrate_cancel")
    assert [check.wrong for check in source.wait_for_checks()] == [0, 0]


def test_what_is_no_vm(lab: Machine) -> None:
    for words, status, said in (
        ("save kvm:1 -o /tmp/s", 4, b"no KVM virtual machine"),
        ("save kvm:4000000 -o /tmp/s", 4, b"no process"),
        ("save kvm:abc -o /tmp/s", 2, b"kvm:PID"),
        ("enable kvm:1", 4, b"no KVM virtual machine"),
    ):
        result = lab.run(["mtetool", *words.split()])
        assert (result.returncode, said in result.stderr) == (status, True), result.stderr


def test_what_the_guest_does_not_have(lab: Machine) -> None:
    guest = Qemu(lab, "guest", extra="-S").start().wait_for_machine()
    before = _state(lab, guest.pid)
    for words, status, said in (
        ("--range 0x40000100:4K", 2, b"not a multiple"),
        ("--range 0x40000000:100", 2, b"not a multiple"),
        ("--range 0x20000000:64K", 2, b"outside"),
        ("--slot 77", 2, b"77"),
        ("--memslot 0x40000100:4K", 2, b"not a multiple"),
        ("--memslot 1G:2M --memslot 0x40100000:64K", 2, b"overlap"),
        ("--qmp /tmp/nothing", 4, b"--memslot"),
    ):
        result = lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s", *words.split()])
        assert (result.returncode, said in result.stderr) == (status, True), result.stderr
        assert lab.run(["ls", "/tmp/s"]).returncode != 0
    assert _state(lab, guest.pid) == before


def test_process_that_is_traced_already(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x100000")
    tracer = (
        "import ctypes, time\n"
        f"assert ctypes.CDLL(None).ptrace(0x4206, {pid}, None, None) == 0\n"
        "print('on', flush=True)\ntime.sleep(1000)\n"
    )
    lab.put("/tmp/tracer.py", tracer.encode())
    lab.sh(
        "python3 /tmp/tracer.py >/tmp/on & echo $! >/tmp/pid;"
        " until grep -q on /tmp/on; do sleep 0.1; done"
    )
    save = ["mtetool", "save", f"kvm:{pid}", "-o", "/tmp/s", "--memslot", "0x40000000:1M"]
    result = lab.run(save)
    assert result.returncode == 4
    assert b"traced by process" in result.stderr
    lab.sh("kill -KILL $(cat /tmp/pid)")
    lab.run(save, check=True)


def test_disk_full_in_the_middle_leaves_no_file(lab: Machine) -> None:
    pid = start_test_vmm(lab, "0x40000000:0x1000000")
    fill_with_random_tags(lab, pid, "16M")
    before = _state(lab, pid)
    lab.sh("mkdir /tmp/small; mount -t tmpfs -o size=128k small /tmp/small")
    save = ["mtetool", "save", f"kvm:{pid}", "--memslot", "0x40000000:16M", "-o"]
    result = lab.run([*save, "/tmp/small/s"])
    left = lab.sh("ls -A /tmp/small; umount /tmp/small").stdout
    assert result.returncode == 6, result.stderr
    assert b"space" in result.stderr
    assert left == b""
    assert lab.run([*save, "/dev/full", "--force"]).returncode == 6
    assert _state(lab, pid) == before


@pytest.mark.long  # test_hardened has one that runs as another user, too
def test_sandboxed_qemu_is_borrowed_from_within_its_filter(lab: Machine) -> None:
    sandbox = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    guest = Qemu(lab, "guest", extra=sandbox).start()
    guest.wait_for_checks()
    lab.run(["mtetool", "save", f"kvm:{guest.pid}", "-o", "/tmp/s"], check=True)
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]


def test_vm_without_mte_says_so_without_a_monitor_too(lab: Machine) -> None:
    pid = start_test_vmm(lab, "--no-mte", "0x40000000:0x100000")
    for words in (["save", "-o", "/tmp/s"], ["dump"]):
        result = lab.run(["mtetool", *words, f"kvm:{pid}", "--json"])
        assert (result.returncode, _json(result.stderr)["error"]) == (4, "mte-off"), words
