"""The kernel to call: `--side emulated` (the default, several hosts) or `--side real`.

`real` needs an arm64 host with KVM and MTE, like the lab. Plain pytest is enough.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mtetool.emulator import Behaviour, Host
from tests.differential.emulated import EmulatedSide
from tests.differential.features import find_host
from tests.differential.real import RealSide
from tests.differential.sides import Side

_HOSTS = {
    "4K": Host(),
    "16K": Host(page_size_bytes=16 << 10, hugepage_bytes=2 << 20),
    "4K-all-behaviours": Host(behaviours=frozenset(Behaviour)),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    # Known if this directory is named on the command line; otherwise the default applies.
    parser.addoption("--side", choices=["emulated", "real"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "side" in metafunc.fixturenames:
        real = metafunc.config.getoption("--side", default=None) == "real"
        metafunc.parametrize("side", ["real"] if real else list(_HOSTS), indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Tests that call no kernel run only with the emulator.
    if config.getoption("--side", default=None) == "real":
        items[:] = [item for item in items if "side" in getattr(item, "fixturenames", ())]


@pytest.fixture
def side(request: pytest.FixtureRequest) -> Iterator[Side]:
    """A kernel to call, without VMs or memory yet."""
    if request.param != "real":
        yield EmulatedSide(_HOSTS[request.param])
        return
    real = RealSide()
    yield real
    real.close()


@pytest.fixture
def host(side: Side) -> Host:
    """The kind of kernel that the side is, found by trying."""
    return find_host(side)
