"""Which backends the suite is run on: `--backend emu` (the default) or `--backend kvm`.

`kvm` wants an arm64 host with MTE, and the test VMM's path in MTETOOL_TEST_VMM. Plain pytest is
enough; the lab has no plugins.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtetool.backends.emulated_file import PAGE_SIZES
from tests.conformance.guests import EmulatedGuests, Factory, RealGuests


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known where this directory is named on the command line; elsewhere the default holds.
    parser.addoption("--backend", action="append", choices=["emu", "kvm"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_guest" not in metafunc.fixturenames:
        return
    backends = metafunc.config.getoption("--backend", default=None) or ["emu"]
    params: list[tuple[str, int]] = []
    if "emu" in backends:
        params += [("emu", page) for page in PAGE_SIZES]
    if "kvm" in backends:
        params.append(("kvm", os.sysconf("SC_PAGE_SIZE")))
    ids = [f"{backend}-{page // 1024}K" for backend, page in params]
    metafunc.parametrize("make_guest", params, ids=ids, indirect=True)


@pytest.fixture
def make_guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Factory]:
    """Makes guests: `make_guest(slots, mte=True, vcpus=0)`; they end with the test."""
    backend, page_size_bytes = request.param
    with ExitStack() as stack:
        if backend == "emu":
            yield EmulatedGuests(tmp_path, page_size_bytes, stack)
        else:
            yield RealGuests(os.environ["MTETOOL_TEST_VMM"], stack)


@pytest.fixture
def page(make_guest: Factory) -> int:
    """The page size in bytes."""
    return make_guest.page_size_bytes
