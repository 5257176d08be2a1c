"""What kind of memory a file is, and KVM's answers; `tests/lab` has real ones."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import get_args

import pytest

from mtetool import procfs, uapi
from mtetool.vmm.mte_limits import Memory
from mtetool.vmm.scratch import ScratchVm
from mtetool.vmm.taggable import ThisHost

SHM = Path("/dev/shm")


class Vm(ScratchVm):
    """A VM that answers each offer the same, and looks at the memory offered."""

    def __init__(self, answer: int, *, has_mte: bool = True) -> None:
        super().__init__(os.open("/dev/null", os.O_RDWR))
        self.answer = answer
        self.has_mte = has_mte
        self.offered: list[procfs.Mapping] = []

    def enable(self, capability: int) -> int:
        assert capability == uapi.KVM_CAP_ARM_MTE
        return 0 if self.has_mte else -errno.EINVAL

    def offer_memory(self, slot: int, ipa: int, size_bytes: int, address: int) -> int:
        assert size_bytes % mmap.PAGESIZE == 0
        maps = procfs.mappings(os.getpid())
        self.offered += [each for each in maps if each.start <= address < each.end]
        return self.answer


@pytest.mark.parametrize("memory", ["device", "shmem"])
def test_kvm_is_offered_memory_of_that_kind(memory: Memory) -> None:
    vm = Vm(0)
    assert ThisHost(lambda: vm).accepts(memory) is True
    (offered,) = vm.offered
    assert offered.name.startswith({"device": "[vvar]", "shmem": "/memfd:"}[memory])
    assert offered.flags[3] == {"device": "p", "shmem": "s"}[memory]


@pytest.mark.parametrize("memory", ["device", "shmem"])
def test_kvms_answers(memory: Memory) -> None:
    assert ThisHost(lambda: Vm(-errno.EINVAL)).accepts(memory) is False
    assert ThisHost(lambda: Vm(-errno.EFAULT)).accepts(memory) is None
    assert ThisHost(lambda: Vm(0, has_mte=False)).accepts(memory) is None


@pytest.mark.parametrize("memory", get_args(Memory))
def test_without_kvm_only_the_answer_about_files_is_known(memory: Memory) -> None:
    def create_vm() -> ScratchVm:
        raise OSError(errno.ENOENT, "no /dev/kvm")

    assert ThisHost(create_vm).accepts(memory) is (False if memory == "file" else None)


def test_no_descriptor_and_no_mapping_is_left() -> None:
    fds = Path("/proc/self/fd")
    before = len(list(fds.iterdir()))
    for memory in get_args(Memory):
        ThisHost(lambda: Vm(0)).accepts(memory)
    assert len(list(fds.iterdir())) == before
    assert not any("memfd:mtetool" in each.name for each in procfs.mappings(os.getpid()))


def _magic(path: Path) -> int:
    buffer = (ctypes.c_long * 32)()
    assert ctypes.CDLL(None).statfs(os.fsencode(path), buffer) == 0
    return buffer[0]


@pytest.mark.skipif(not SHM.is_dir() or _magic(SHM) != 0x01021994, reason="no tmpfs at /dev/shm")
def test_tmpfs() -> None:
    host = ThisHost()
    for path in ("/dev/shm", "/dev/shm/no-such-file"):
        assert host.memory_at(path) == "shmem"


def test_other_file_systems_and_files() -> None:
    host = ThisHost()
    assert host.memory_at("/proc/self/status") == "file"
    # A device in devtmpfs, which is shmem.
    assert host.memory_at("/dev/null") == "file"


def test_a_path_that_does_not_exist_is_where_its_directory_is(tmp_path: Path) -> None:
    host = ThisHost()
    assert host.memory_at(f"{tmp_path}/new") == host.memory_at(str(tmp_path))


@pytest.mark.parametrize("path", ["", "\0", "\ud800", "x" * 5000, "/no/such/directory/file"])
def test_paths_that_tell_nothing(path: str) -> None:
    assert ThisHost().memory_at(path) in (None, ThisHost().memory_at("."))
