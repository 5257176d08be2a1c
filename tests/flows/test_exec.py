"""What `mtetool exec` checks before it starts anything."""

from __future__ import annotations

import errno
import os
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
from mtetool.flows.exec import Configs, check_file, check_host, find_program
from mtetool.vmm import taggable
from mtetool.vmm.host import HostFacts
from mtetool.vmm.mte_limits import Memory
from mtetool.vmm.mte_warnings import warnings

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


def limits_of(words: list[str]) -> list[MteUnsupportedError]:
    return warnings(words, Configs().read)


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


class Host:
    """A kernel that refuses whatever it may refuse, and files that are on a disk."""

    def accepts(self, memory: Memory) -> bool | None:
        return False

    def memory_at(self, path: str) -> Memory | None:
        return "file"


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taggable, "ThisHost", Host)


@pytest.mark.usefixtures("refusing")
def test_each_limit_is_one_line_and_the_last_one_has_a_hint() -> None:
    words = ["qemu-system-aarch64", "-device", "vfio-pci,host=01:00.0", "-mem-path", "/var/ram"]
    first, second = limits_of(words)
    assert first.message == (
        "'-device vfio-pci,host=01:00.0': KVM refuses device memory in a VM with MTE, and QEMU"
        " will abort when the guest enables this device"
    )
    assert second.message.startswith("'-mem-path /var/ram': KVM refuses memory of a file")
    assert first.hint is None
    assert second.hint is not None
    assert "man mtetool-exec" in second.hint


@pytest.mark.usefixtures("refusing")
def test_many_limits_are_a_few_lines() -> None:
    found = limits_of(["kvm", *["-device", "vfio-pci,id=" + "x" * 10**5] * 100])
    assert len(found) == 4
    assert "\n" not in "".join(error.message for error in found)
    assert max(len(error.message) for error in found) < 300
    assert found[-1].message.endswith("; 96 other options may end it too")


@pytest.mark.usefixtures("refusing")
def test_programs_that_are_not_qemu_have_no_limits() -> None:
    assert limits_of(["lkvm", "run", "-device", "vfio-pci"]) == []
    assert limits_of(["qemu-system-aarch64", "-m", "1G"]) == []


@pytest.mark.usefixtures("refusing")
def test_configuration_files_of_qemu_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "with\nnewline"
    config.write_text('[device "d"]\ndriver = "vfio-pci"\n')
    (found,) = limits_of(["kvm", "-readconfig", config.name])
    assert r"'-readconfig with\nnewline [device \"d\"]'".replace('\\"', '"') in found.message


@pytest.mark.usefixtures("refusing")
def test_configuration_files_that_are_not_read(tmp_path: Path) -> None:
    fifo, long = tmp_path / "fifo", tmp_path / "long"
    os.mkfifo(fifo)
    long.write_text('[device "d"]\ndriver = "vfio-pci"\n' * 10_000)
    for path in (str(fifo), str(long), str(tmp_path), "/no/such", "", "\udcff"):
        assert limits_of(["kvm", "-readconfig", path]) == []
    few = tmp_path / "few"
    few.write_text('[device "d"]\ndriver = "vfio-pci"\n')
    assert len(limits_of(["kvm", *["-readconfig", str(few)] * 2])) == 2
    assert "other option" not in limits_of(["kvm", *["-readconfig", str(few)] * 1000])[-1].message
