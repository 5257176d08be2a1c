"""Settings and fixtures for all tests."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

from tests.lab.images import DEFAULT_KERNEL, DEFAULT_LIBVIRT, KERNELS, LIBVIRTS

# A shell starts background jobs with SIGINT ignored (nohup: SIGHUP), programs inherit that, and
# mtetool respects it. The tests that send signals need programs that do not ignore them.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)

# How long an example takes shows how busy the machine is, not whether the code is right.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options here: pytest knows only those of the conftest where it starts, not the lab's."""
    parser.addoption(
        "--lab-kernel",
        choices=list(KERNELS),
        help=f"run the lab's tests on this kernel (by default {DEFAULT_KERNEL}, some on all)",
    )
    parser.addoption(
        "--lab-libvirt",
        choices=LIBVIRTS,
        default=DEFAULT_LIBVIRT,
        help=f"run the lab's tests with the libvirt of this Debian suite ({DEFAULT_LIBVIRT})",
    )
