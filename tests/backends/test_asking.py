"""Asking the kernel for memslots: what happens where the kernel is not as it has to be."""

from __future__ import annotations

import errno
import os
from typing import cast

import pytest

from mtetool import uapi
from mtetool.attach.session import Session
from mtetool.backends import asking
from mtetool.errors import GuestLostError, LayoutUnknownError


class FakeSession:
    """A process whose kernel gives the same answer to every ioctl."""

    pid = os.getpid()

    def __init__(self, answer: int) -> None:
        self.answer = answer
        self.sizes: list[int] = []

    def ioctl(self, fd: int, request: int, argument: bytes) -> int:
        assert (fd, request) == (7, uapi.KVM_SET_USER_MEMORY_REGION)
        self.sizes.append(uapi.KVM_MEMORY_REGION_STRUCT.unpack(argument)[3])
        return self.answer


def ask(session: FakeSession) -> None:
    asking.memslots_of(cast(Session, session), 7)


def test_kernel_that_may_take_it_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_kernel_refuses", lambda: False)
    session = FakeSession(0)
    with pytest.raises(LayoutUnknownError, match="must refuse"):
        ask(session)
    assert session.sizes == []


def test_slot_that_was_made_after_all_is_deleted_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_kernel_refuses", lambda: True)
    session = FakeSession(0)
    with pytest.raises(LayoutUnknownError, match="answered"):
        ask(session)
    assert len(session.sizes) == 2
    assert session.sizes[1] == 0


def test_dead_vm_and_no_slots_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "_kernel_refuses", lambda: True)
    with pytest.raises(GuestLostError):
        ask(FakeSession(-errno.EIO))
    with pytest.raises(LayoutUnknownError, match="as if there were none"):
        ask(FakeSession(-errno.EFAULT))
