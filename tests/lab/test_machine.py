"""The lab itself, on which the other tests' verdicts rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import cpio
from tests.lab.machine import CommandTimeoutError, Machine, MachineLostError
from tests.lab.packages import LabUnavailableError, need_tools

_ASK_KVM = """
import fcntl, os
kvm = os.open("/dev/kvm", os.O_RDWR)
vm = fcntl.ioctl(kvm, 0xAE01, 0)
print(fcntl.ioctl(vm, 0xAE03, 205))
"""


def test_exit_status_and_streams_come_back_apart(lab: Machine) -> None:
    result = lab.sh("echo out; echo err >&2; exit 7", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (7, b"out\n", b"err\n")


def test_output_is_binary_clean_both_ways(lab: Machine) -> None:
    data = bytes(range(256)) * 3000
    assert lab.run(["cat"], stdin=data).stdout == data


def test_a_command_killed_by_a_signal_says_which(lab: Machine) -> None:
    assert lab.sh("kill -USR1 $$", check=False).returncode == -10


def test_a_missing_command_is_127(lab: Machine) -> None:
    assert lab.run(["no-such-command"]).returncode == 127


def test_a_child_left_in_the_background_does_not_hold_the_command(lab: Machine) -> None:
    assert lab.sh("sleep 1000 & echo started").stdout == b"started\n"


def test_a_command_that_takes_too_long_is_killed_and_the_machine_goes_on(lab: Machine) -> None:
    with pytest.raises(CommandTimeoutError):
        lab.run(["sleep", "1000"], timeout=0.5)
    assert lab.sh("echo on").stdout == b"on\n"


def test_kvm_offers_mte_to_guests(lab: Machine) -> None:
    assert lab.run(["python3", "-c", _ASK_KVM], check=True).stdout == b"1\n"


def test_mtetool_is_an_executable_on_the_path(lab: Machine) -> None:
    assert lab.run(["mtetool", "--version"], check=True).stdout.startswith(b"mtetool")


def test_a_lost_machine_is_told_from_a_failing_command() -> None:
    with pytest.raises(MachineLostError), Machine(cpus=1) as machine:  # not shared with other tests
        machine.sh("sync; poweroff -f; sleep 60")


def test_command_line_gives_status_files_and_modes(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\necho ran; exit 5\n")
    script.chmod(0o755)
    (tmp_path / "secret").write_text("x")
    (tmp_path / "secret").chmod(0o600)
    command = "/with/script; echo $?; stat -c %a /with/secret; exit 3"
    result = _lab_cli("--with", str(tmp_path), "--", "sh", "-c", command)
    assert (result.returncode, result.stdout) == (3, b"ran\n5\n600\n")


@pytest.mark.long
def test_command_line_gives_a_lost_machine_its_own_status() -> None:
    result = _lab_cli("--", "poweroff", "-f")
    assert result.returncode == 125
    assert b"lost" in result.stderr


def test_command_line_says_what_it_cannot_do(tmp_path: Path) -> None:
    result = _lab_cli("--with", str(tmp_path / "missing"), "--", "true")
    assert result.returncode == 2
    assert b"no such directory" in result.stderr


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LabUnavailableError, match="Debian package e2fsprogs"):
        need_tools("mke2fs")


def test_cpio_is_as_the_kernel_reads_it() -> None:
    data = cpio.archive([cpio.Entry.file("a", b"xyz")])
    assert data[:6] == b"070701"
    assert data[54:62] == b"00000003"
    assert data[94:102] == b"00000002"
    assert data[110:112] == b"a\0"
    assert data[112:116] == b"xyz\0"
    assert b"TRAILER!!!\0" in data


def _lab_cli(*words: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "tests.lab", "run", *words]
    return subprocess.run(
        command, capture_output=True, check=False, cwd=Path(__file__).parents[2], env=os.environ
    )
