"""The lab for tests: one machine for all of them, booted when the first one needs it.

Where the lab cannot run, its tests fail and say why: a skip would hide that nothing was
tried on a real kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lab.guests import kill_vmms
from tests.lab.machine import Machine, MachineLostError
from tests.lab.packages import LabUnavailableError


class Lab:
    """The machine of this test session; another one is booted when a test lost it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._machine: Machine | None = None

    def machine(self) -> Machine:
        """The machine, booted."""
        if self._machine is None:
            self._machine = self._stack.enter_context(Machine())
        return self._machine

    def drop(self) -> None:
        """End the machine."""
        self._machine = None
        self._stack.close()


@pytest.fixture(scope="session")
def lab_session() -> Iterator[Lab]:
    session = Lab()
    yield session
    session.drop()


@pytest.fixture
def lab(lab_session: Lab) -> Iterator[Machine]:
    """A booted lab machine; VMMs and files that a test leaves are removed behind it."""
    try:
        machine = lab_session.machine()
    except LabUnavailableError as error:
        pytest.fail(f"THE LAB CANNOT RUN, nothing was tried on a real kernel: {error}")
    yield machine
    try:
        kill_vmms(machine)
        machine.sh("rm -rf /tmp/*")
    except MachineLostError:
        lab_session.drop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep all tests of the one machine in one worker."""
    for item in items:
        if "lab" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group("lab"))
