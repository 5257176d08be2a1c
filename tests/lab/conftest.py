"""The lab for tests: one machine a kernel for all of them, booted when the first one needs it.

Where the lab cannot run, its tests fail and say why: a skip would hide that nothing was
tried on a real kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.lab.guests import kill_vmms
from tests.lab.images import DEFAULT_KERNEL, KERNELS
from tests.lab.machine import Machine, MachineLostError
from tests.lab.packages import LabUnavailableError

# Machines that one process keeps at a time: each may take 4 GiB.
_KEPT = 2

LabOn = Callable[[str], Machine]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests for every kernel run on each, unless one is asked for; see the markers."""
    if "lab" not in metafunc.fixturenames:
        return
    own = metafunc.definition.get_closest_marker("kernel")
    if own is not None:
        metafunc.parametrize("lab", [own.args[0]], indirect=True)
    elif metafunc.definition.get_closest_marker("every_kernel") and not _asked(metafunc.config):
        metafunc.parametrize("lab", list(KERNELS), indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One kernel after the other, so that no machine is booted twice; the default one first."""
    items.sort(key=lambda item: list(KERNELS).index(_kernel(item)))


def _kernel(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    kernel: str = call.params.get("lab", DEFAULT_KERNEL) if call else DEFAULT_KERNEL
    return kernel


def _asked(config: pytest.Config) -> str | None:
    asked: str | None = config.getoption("--lab-kernel")
    return asked


# Huge pages as Debian's kernels have them at boot, whatever a test made of that.
_AS_AT_BOOT = """
cd /sys/kernel/mm/transparent_hugepage || exit 0
[ ! -e enabled ] || echo always >enabled
[ ! -e shmem_enabled ] || echo never >shmem_enabled
"""


class Machines:
    """The machines of this test session, by kernel; another one is booted when a test lost it."""

    def __init__(self) -> None:
        self._running: dict[str, tuple[Machine, ExitStack]] = {}

    def machine(self, kernel: str) -> Machine:
        """A machine with that kernel, booted; the one that was used longest ago may end."""
        found = self._running.pop(kernel, None)
        if found is None:
            while len(self._running) >= _KEPT:
                self.drop(next(iter(self._running)))
            stack = ExitStack()
            machine = stack.enter_context(Machine(kernel=kernel))
            machine.mtetool("--version", timeout=300)  # which loads it before any guest is busy
            found = machine, stack
        self._running[kernel] = found
        return found[0]

    def drop(self, kernel: str) -> None:
        """End a machine."""
        _, stack = self._running.pop(kernel)
        stack.close()

    def clean(self, kernel: str) -> None:
        """Remove VMMs and files that a test left; end the machine where it was lost."""
        if kernel not in self._running:
            return
        machine, _ = self._running[kernel]
        try:
            kill_vmms(machine)
            machine.sh(f"rm -rf /tmp/*; {_AS_AT_BOOT}")
        except MachineLostError:
            self.drop(kernel)

    def close(self) -> None:
        """End all."""
        for kernel in list(self._running):
            self.drop(kernel)


@pytest.fixture(scope="session")
def lab_machines() -> Iterator[Machines]:
    machines = Machines()
    yield machines
    machines.close()


@pytest.fixture
def lab_on(lab_machines: Machines) -> Iterator[LabOn]:
    """Gives a machine with the kernel that is named; what a test leaves is removed behind it."""
    used: list[str] = []

    def booted(kernel: str) -> Machine:
        used.append(kernel)
        try:
            return lab_machines.machine(kernel)
        except LabUnavailableError as error:
            pytest.fail(f"THE LAB CANNOT RUN, nothing was tried on a real kernel: {error}")

    yield booted
    for kernel in set(used):
        lab_machines.clean(kernel)


@pytest.fixture
def lab(lab_on: LabOn, request: pytest.FixtureRequest) -> Machine:
    """A lab machine with the kernel asked for: by the test's markers, --lab-kernel or nobody."""
    return lab_on(getattr(request, "param", None) or _asked(request.config) or DEFAULT_KERNEL)
