"""What others than the kernel say about one VM: its monitor and, for a domain, libvirt."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from mtetool.errors import GuestError, LayoutUnknownError
from mtetool.vmm import monitors
from mtetool.vmm.qemu import NAME_LENGTH

if TYPE_CHECKING:
    from mtetool.guest import GuestOptions
    from mtetool.vmm import proc, qemu
    from mtetool.vmm.libvirt import Domain


class VmmMonitor:
    """The monitor of a process: opened by `find` on first use, None if there is none.

    A monitor that was `given` must be the VM's own; without `is_wanted` none is looked for. For the
    process of a `domain`, libvirt knows the name and the state.
    """

    def __init__(
        self,
        process: proc.VmmProcess,
        find: Callable[[], qemu.Monitor | None],
        *,
        given: bool = False,
        is_wanted: bool = True,
        domain: Domain | None = None,
    ) -> None:
        self._process = process
        self._find = find
        self._given = given
        self._domain = domain
        self._open: qemu.Monitor | None = None
        self._silent: LayoutUnknownError | None = None
        self.may_exist = is_wanted
        """Whether there may be a monitor: False once it is known that there is none."""

    def ask(self) -> qemu.Monitor:
        """Return the monitor; once it has failed to answer, it is not asked again.

        Raises LayoutUnknownError, ForeignMonitorError.
        """
        if self._silent is not None:
            raise self._silent
        if self._open is None:
            try:
                found = self._find() if self.may_exist else None
                if found is None:
                    raise self._none()
            except LayoutUnknownError as error:
                self._silent = error
                raise
            self._open = found
        return self._open

    def check(self) -> None:
        """Check that the given monitor is not another VM's. Raises ForeignMonitorError."""
        if self._given:
            with suppress(LayoutUnknownError):
                self.ask()

    def source(self, fd: int) -> str:
        """The VM's name for mtetool, if it is behind the file descriptor `fd`."""
        return self._domain.source if self._domain else f"kvm:{self._process.pid}:{fd}"

    def name(self) -> str | None:
        """The VM's name, from libvirt, its monitor or its command line."""
        if self._domain:
            return self._domain.name[:NAME_LENGTH]
        try:
            return self.ask().name()
        except LayoutUnknownError:
            return monitors.name_of(self._process.pid)

    def paused(self) -> bool | None:
        """Whether the vCPUs are stopped; None if nobody says."""
        try:
            return self._domain.paused() if self._domain else self.ask().paused()
        except GuestError:
            return None

    def _none(self) -> LayoutUnknownError:
        self.may_exist = False
        return LayoutUnknownError(
            f"process {self._process.pid} ({self._process.program}) has no QMP monitor on a unix"
            " socket to describe its memory layout",
            hint="name the memory by hand: --memslot IPA:SIZE (repeatable)",
        )

    def close(self) -> None:
        """Close the monitor. Idempotent."""
        found, self._open = self._open, None
        if found is not None:
            found.close()


def monitor_of(
    process: proc.VmmProcess, options: GuestOptions, domain: Domain | None = None
) -> VmmMonitor:
    """The process's own monitor: the one that the user named, or one on its command line."""
    pid, given = process.pid, options.qmp
    if given is not None:
        open_given = partial(monitors.open_given, pid, given)
        return VmmMonitor(process, open_given, given=True, domain=domain)
    open_found = partial(monitors.open_found, pid)
    return VmmMonitor(process, open_found, is_wanted=options.use_monitor, domain=domain)
