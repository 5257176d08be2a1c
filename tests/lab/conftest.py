"""The lab for tests: one machine a kernel for all of them, booted when the first one needs it.

Where the lab cannot run, its tests fail and say why: a skip would hide that nothing was
tried on a real kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lab.guests import kill_vmms
from tests.lab.images import DEFAULT_KERNEL
from tests.lab.machine import Machine, MachineLostError
from tests.lab.packages import LabUnavailableError


class Lab:
    """A machine of this test session; another one is booted when a test lost it."""

    def __init__(self, kernel: str = DEFAULT_KERNEL) -> None:
        self._kernel = kernel
        self._stack = ExitStack()
        self._machine: Machine | None = None

    def machine(self) -> Machine:
        """The machine, booted."""
        if self._machine is None:
            self._machine = self._stack.enter_context(Machine(kernel=self._kernel))
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


@pytest.fixture(scope="session")
def lab73_session() -> Iterator[Lab]:
    session = Lab("7.3")
    yield session
    session.drop()


@pytest.fixture(scope="session")
def lab16k_session() -> Iterator[Lab]:
    session = Lab("6.12-16k")
    yield session
    session.drop()


@pytest.fixture
def lab(lab_session: Lab) -> Iterator[Machine]:
    """A booted lab machine; VMMs and files that a test leaves are removed behind it."""
    yield from _machine(lab_session)


@pytest.fixture
def lab73(lab73_session: Lab) -> Iterator[Machine]:
    """As `lab`, with the newest kernel: it knows registers that the default one does not."""
    yield from _machine(lab73_session)


@pytest.fixture
def lab16k(lab16k_session: Lab) -> Iterator[Machine]:
    """As `lab`, with pages of 16 KiB."""
    yield from _machine(lab16k_session)


def _machine(session: Lab) -> Iterator[Machine]:
    try:
        machine = session.machine()
    except LabUnavailableError as error:
        pytest.fail(f"THE LAB CANNOT RUN, nothing was tried on a real kernel: {error}")
    yield machine
    try:
        kill_vmms(machine)
        machine.sh("rm -rf /tmp/*")
    except MachineLostError:
        session.drop()
