"""The lab for tests: one machine per kernel, shared by all and booted when first needed.

If the lab cannot run, its tests fail with the reason: a skip would hide that nothing was
tested on a real kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.lab.guests import kill_vmms
from tests.lab.images import DEFAULT_KERNEL, KERNELS
from tests.lab.machine import Machine, MachineLostError
from tests.lab.packages import LabUnavailableError

# Machines that one process keeps at a time: each can take 4 GiB.
_KEPT = 2

LabOn = Callable[[str], Machine]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests for every kernel on each, unless one is requested; see the markers."""
    if "lab" not in metafunc.fixturenames:
        return
    own = metafunc.definition.get_closest_marker("kernel")
    if own is not None:
        metafunc.parametrize("lab", [own.args[0]], indirect=True)
        return
    every = metafunc.definition.get_closest_marker("every_kernel")
    if every is not None and not _asked(metafunc.config):
        long = {name: [pytest.mark.long] for name in every.kwargs.get("long", ())}
        kernels = [pytest.param(name, marks=long.get(name, ())) for name in KERNELS]
        metafunc.parametrize("lab", kernels, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One machine after the other, so that none is booted twice.

    First what needs none: the lab's images may still be being built. With several workers (`--dist
    loadgroup --no-loadscope-reorder`), each kind of machine but the default one is booted by one of
    them, and its tests come next: they are long, and none should be alone at the end.
    """
    for item in items:
        if (kind := _kind(item)) is not None:
            item.add_marker(pytest.mark.xdist_group(kind))
    items.sort(key=_place)


def _place(item: pytest.Item) -> tuple[int, int, int]:
    turn = 0 if not _uses_lab(item) else 2 if _kind(item) is None else 1
    return turn, list(KERNELS).index(_kernel(item)), -_cpus(item)


def _kind(item: pytest.Item) -> str | None:
    """The kind of machine that a test needs, if it is not the default one."""
    if not _uses_lab(item):
        return None
    fixtures = getattr(item, "fixturenames", ())
    kernel, cpus = _kernel(item) if "lab" in fixtures else "two kernels", _cpus(item)
    return f"{kernel} {cpus}" if (kernel, cpus) != (DEFAULT_KERNEL, 1) else None


def _uses_lab(item: pytest.Item) -> bool:
    return "lab_on" in getattr(item, "fixturenames", ())


def _kernel(item: pytest.Item) -> str:
    call = getattr(item, "callspec", None)
    kernel: str = call.params.get("lab", DEFAULT_KERNEL) if call else DEFAULT_KERNEL
    return kernel


def _cpus(item: pytest.Item) -> int:
    # One if that is enough: two machines with two CPUs each, on two real ones, take three times
    # as long for what mtetool's threads pass to each other.
    return 2 if item.get_closest_marker("two_cpus") else 1


def _asked(config: pytest.Config) -> str | None:
    asked: str | None = config.getoption("--lab-kernel")
    return asked


# Huge pages as Debian's kernels set them at boot, whatever a test has changed.
_AS_AT_BOOT = """
cd /sys/kernel/mm/transparent_hugepage || exit 0
[ ! -e enabled ] || echo always >enabled
[ ! -e shmem_enabled ] || echo never >shmem_enabled
"""


class Kind(NamedTuple):
    """The kind of machine that a test needs."""

    kernel: str
    cpus: int


class Machines:
    """The machines of this test session; one that a test lost is booted again."""

    def __init__(self, libvirt: str) -> None:
        self._libvirt = libvirt
        self._running: dict[Kind, tuple[Machine, ExitStack]] = {}

    def machine(self, kind: Kind) -> Machine:
        """Return a booted machine of that kind; the least recently used one may end."""
        found = self._running.pop(kind, None)
        if found is None:
            while len(self._running) >= _KEPT:
                self.drop(next(iter(self._running)))
            stack = ExitStack()
            machine = stack.enter_context(
                Machine(kernel=kind.kernel, libvirt=self._libvirt, cpus=kind.cpus)
            )
            machine.mtetool("--version", timeout=300)  # load it before any guest is busy
            found = machine, stack
        self._running[kind] = found
        return found[0]

    def drop(self, kind: Kind) -> None:
        """End a machine."""
        _, stack = self._running.pop(kind)
        stack.close()

    def clean(self, kind: Kind) -> None:
        """Remove VMMs and files that a test left; end the machine if it was lost."""
        if kind not in self._running:
            return
        machine, _ = self._running[kind]
        try:
            kill_vmms(machine)
            machine.sh(f"rm -rf /tmp/*; {_AS_AT_BOOT}")
        except MachineLostError:
            self.drop(kind)

    def close(self) -> None:
        """End all machines."""
        for kind in list(self._running):
            self.drop(kind)


@pytest.fixture(scope="session")
def lab_machines(pytestconfig: pytest.Config) -> Iterator[Machines]:
    machines = Machines(pytestconfig.getoption("--lab-libvirt"))
    yield machines
    machines.close()


@pytest.fixture
def lab_on(lab_machines: Machines, request: pytest.FixtureRequest) -> Iterator[LabOn]:
    """Give a machine with the named kernel; remove what the test leaves in it afterwards."""
    used: list[Kind] = []

    def booted(kernel: str) -> Machine:
        kind = Kind(kernel, _cpus(request.node))
        used.append(kind)
        try:
            return lab_machines.machine(kind)
        except LabUnavailableError as error:
            pytest.fail(f"THE LAB CANNOT RUN, nothing was tried on a real kernel: {error}")

    yield booted
    for kind in set(used):
        lab_machines.clean(kind)


@pytest.fixture
def lab(lab_on: LabOn, request: pytest.FixtureRequest) -> Machine:
    """A lab machine with the kernel of the test's markers, of --lab-kernel, or the default one."""
    return lab_on(getattr(request, "param", None) or _asked(request.config) or DEFAULT_KERNEL)
