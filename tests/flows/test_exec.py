"""What `mtetool exec` checks before it starts anything."""

from __future__ import annotations

import errno
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from mtetool.errors import (
    MtetoolError,
    MteUnsupportedError,
    NoSuchFileError,
    PermissionRefusedError,
    UsageError,
    WrongHostError,
)
from mtetool.flows.exec import check_file, check_host, find_program
from mtetool.vmm.host import HostFacts

GOOD = HostFacts(
    machine="aarch64",
    kernel="6.12",
    page_size_bytes=4096,
    kvm_errno=0,
    mte=True,
    cap_sys_ptrace=False,
    ptrace_scope=1,
    seccomp=0,
)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (replace(GOOD, machine="x86_64", mte=None), WrongHostError),
        (replace(GOOD, kvm_errno=errno.EACCES, mte=None), PermissionRefusedError),
        (replace(GOOD, kvm_errno=errno.ENOENT, mte=None), MteUnsupportedError),
        (replace(GOOD, mte=False), MteUnsupportedError),
    ],
)
def test_hosts_that_cannot(facts: HostFacts, expected: type[MtetoolError]) -> None:
    with pytest.raises(expected) as caught:
        check_host(facts)
    assert caught.value.hint


def test_hosts_that_can_or_may() -> None:
    check_host(GOOD)
    check_host(replace(GOOD, mte=None))


@pytest.mark.parametrize("bit", [stat.S_ISUID, stat.S_ISGID])
def test_a_program_with_privileges_of_its_own(tmp_path: Path, bit: int) -> None:
    program = tmp_path / "program"
    program.touch()
    program.chmod(0o755)
    check_file(str(program), GOOD)
    program.chmod(0o755 | bit)
    check_file(str(program), replace(GOOD, cap_sys_ptrace=True))
    with pytest.raises(PermissionRefusedError, match="setuid"):
        check_file(str(program), GOOD)


def test_programs_are_found_as_a_shell_does(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        (directory / "vmm").touch()
    (second / "vmm").chmod(0o755)
    environment = {b"PATH": f"{first}:{second}".encode()}
    assert find_program("vmm", environment) == str(second / "vmm")
    assert find_program(str(second / "vmm"), {}) == str(second / "vmm")
    with pytest.raises(UsageError, match="executable"):
        find_program(str(first / "vmm"), environment)
    with pytest.raises(NoSuchFileError, match="PATH"):
        find_program("other", environment)
