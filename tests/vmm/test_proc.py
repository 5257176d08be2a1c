"""Processes as /proc shows them."""

from __future__ import annotations

import os

import pytest

from mtetool.errors import NoSuchProcessError, NotAVmmError, SeveralVmsError, SourceError
from mtetool.vmm import proc


def _process(*fds: int) -> proc.VmmProcess:
    return proc.VmmProcess(77, 1, "qemu", fds, 0)


def test_the_only_vm_is_chosen_and_one_of_several_must_be() -> None:
    assert proc.choose_vm(_process(9), None) == 9
    assert proc.choose_vm(_process(9, 11), 11) == 11
    with pytest.raises(SeveralVmsError, match="fds 9, 11") as caught:
        proc.choose_vm(_process(9, 11), None)
    assert caught.value.hint == "name one: kvm:77:9"


def test_what_is_no_vm_is_refused() -> None:
    with pytest.raises(NotAVmmError):
        proc.choose_vm(_process(), None)
    with pytest.raises(SourceError):
        proc.choose_vm(_process(9), 10)


def test_this_process_is_no_vmm_and_keeps_its_start_time() -> None:
    found = proc.find(os.getpid())
    assert (found.vm_fds, found.vcpus) == ((), 0)
    assert found.start_time == proc.start_time(os.getpid()) > 0


def test_a_process_that_is_not_there() -> None:
    with pytest.raises(NoSuchProcessError):
        proc.find(2**22 + 1)
