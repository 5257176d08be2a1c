"""The backends that the suite runs on: `--backend emu` (the default), `kvm` or `proc`.

`kvm` and `proc` need an arm64 host with MTE, and a program's path: the test VMM in
MTETOOL_TEST_VMM, the program with tagged memory in MTETOOL_TEST_PROGRAM. Plain pytest is enough;
the lab has no plugins.

Tests of what only a VM has are marked `vm`: MTE that is enabled before the first vCPU. On `proc`
these tests are deselected, and counted as such: they do not apply to a process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mtetool.uapi import PAGE_SIZES
from tests.conformance.guests import EmulatedGuests, Factory, ProcessGuests, RealGuests


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known if this directory is named on the command line; otherwise the default applies.
    parser.addoption("--backend", action="append", choices=["emu", "kvm", "proc"])


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "vm: tests of what only a VM has, not a process")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if item.get_closest_marker("vm") and _of_process(item)]
    items[:] = [item for item in items if item not in left_out]
    if left_out:
        config.hook.pytest_deselected(items=left_out)


def _of_process(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    return call is not None and call.params["make_guest"][0] == "proc"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "make_guest" not in metafunc.fixturenames:
        return
    backends = metafunc.config.getoption("--backend", default=None) or ["emu"]
    params: list[tuple[str, int]] = []
    if "emu" in backends:
        params += [("emu", page) for page in PAGE_SIZES]
    params += [(name, os.sysconf("SC_PAGE_SIZE")) for name in ("kvm", "proc") if name in backends]
    ids = [f"{backend}-{page // 1024}K" for backend, page in params]
    metafunc.parametrize("make_guest", params, ids=ids, indirect=True)


@pytest.fixture
def make_guest(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Factory]:
    """Make guests: `make_guest(slots, mte=True, vcpus=0)`; they end with the test."""
    backend, page_size_bytes = request.param
    with ExitStack() as stack:
        if backend == "emu":
            yield EmulatedGuests(tmp_path, page_size_bytes, stack)
        elif backend == "proc":
            yield ProcessGuests(os.environ["MTETOOL_TEST_PROGRAM"], stack)
        else:
            yield RealGuests(os.environ["MTETOOL_TEST_VMM"], stack)


@pytest.fixture
def page(make_guest: Factory) -> int:
    """The page size in bytes."""
    return make_guest.page_size_bytes
