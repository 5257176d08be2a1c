"""The kind of kernel that is found by trying is the kind that is emulated."""

from __future__ import annotations

import pytest

from mtetool.emulator import Behaviour, Host
from tests.differential.emulated import EmulatedSide
from tests.differential.features import find_host

HOSTS = [
    Host(),
    Host(16 << 10, ipa_bits=48, va_bits=47, max_vcpus=255, hugepage_bytes=2 << 20, aarch32=False),
    *(Host(behaviours=frozenset({behaviour})) for behaviour in Behaviour),
]


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_the_host_that_is_emulated_is_found(host: Host) -> None:
    assert find_host(EmulatedSide(host)) == host
