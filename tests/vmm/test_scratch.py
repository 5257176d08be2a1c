"""The wrappers of scratch VMs, on file descriptors that are not VMs; `tests/lab` has real VMs."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mtetool import uapi
from mtetool.vmm.scratch import Kvm, ScratchVm

CALLS: list[Callable[[ScratchVm], int]] = [
    lambda vm: vm.check_extension(uapi.KVM_CAP_ARM_MTE),
    lambda vm: vm.enable(uapi.KVM_CAP_ARM_MTE),
    lambda vm: vm.set_memslot(0, 0, vm.page_size_bytes, 0),
    lambda vm: vm.create_vcpu(),
    lambda vm: vm.copy_tags(0, 0, np.zeros(1, dtype=np.uint8), uapi.KVM_ARM_TAGS_FROM_GUEST),
]


@pytest.mark.parametrize("call", CALLS)
def test_errors_are_answers(call: Callable[[ScratchVm], int]) -> None:
    with ScratchVm(os.open("/dev/null", os.O_RDWR)) as vm:
        assert call(vm) == -errno.ENOTTY


def test_closing_closes_once() -> None:
    fd = os.open("/dev/null", os.O_RDWR)
    vm = ScratchVm(fd)
    vm.set_memslot(0, 0, vm.page_size_bytes, 0)
    vm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    again = os.open("/dev/null", os.O_RDWR)
    assert again == fd
    vm.close()
    os.fstat(again)
    os.close(again)


def test_what_is_no_kvm() -> None:
    with Kvm(Path("/dev/null")) as kvm, pytest.raises(OSError) as caught:  # noqa: PT011
        kvm.create_vm()
    assert caught.value.errno == errno.ENOTTY
    with pytest.raises(FileNotFoundError):
        Kvm(Path("/dev/no-such-kvm"))
