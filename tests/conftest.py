"""Settings and fixtures for all tests."""

from __future__ import annotations

import signal

import pytest
from hypothesis import settings

from tests.lab.images import DEFAULT_KERNEL, KERNELS

# A shell starts background jobs with SIGINT ignored (nohup: SIGHUP), programs inherit that, and
# mtetool respects it. The tests that send signals mean programs that came without.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler)

# How long an example takes says how busy the machine is, not whether it is right.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options are only known where pytest starts to look for tests, so not in the lab's own."""
    parser.addoption(
        "--lab-kernel",
        choices=list(KERNELS),
        help=f"run the lab's tests on this kernel (by default {DEFAULT_KERNEL}, some on all)",
    )
