"""A guest whose VMM goes wrong while it is frozen: its vCPUs run on all the same."""

from __future__ import annotations

import pytest

from mtetool.backends.kvm.guest import KvmGuest
from mtetool.errors import GuestLostError
from mtetool.guest import GuestOptions
from mtetool.vmm.proc import VmmProcess


class _Session:
    released = False

    def release(self) -> None:
        self.released = True

    def close(self) -> None:
        pass


class _Transfer:
    def send(self) -> None:
        pass

    def drain(self) -> None:
        raise GuestLostError("a copy in flight failed")


def test_thaw_lets_the_vcpus_run_before_it_looks_at_copies() -> None:
    session = _Session()
    with KvmGuest(VmmProcess(1, 1, "vmm", (3,), 1), 3, GuestOptions()) as guest:
        guest.vm.__dict__.update(session=session, transfer=_Transfer())
        guest._frozen_since = 1.0
        with pytest.raises(GuestLostError):
            guest.thaw()
        assert session.released
