"""The monitor of one VMM: found or given, opened on first use, and proven to be the VMM's."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from mtetool.errors import LayoutUnknownError
from mtetool.vmm import monitors

if TYPE_CHECKING:
    from pathlib import Path

    from mtetool.vmm import proc, qemu


class VmmMonitor:
    """The monitor of a process: the one at `given` if the user named one."""

    def __init__(self, process: proc.VmmProcess, given: Path | None) -> None:
        self._process = process
        self._given = given
        self._open: qemu.Monitor | None = None
        self._silent: LayoutUnknownError | None = None
        self.may_exist = True
        """Whether there may be a monitor: False once it is known that there is none."""

    def ask(self) -> qemu.Monitor:
        """Return the monitor; once it has failed to answer, it is not asked again.

        Raises LayoutUnknownError, ForeignMonitorError.
        """
        if self._silent is not None:
            raise self._silent
        if self._open is None:
            pid, given = self._process.pid, self._given
            try:
                found = monitors.open_given(pid, given) if given else monitors.open_found(pid)
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

    def name(self) -> str | None:
        """The VM's name, from its monitor or its command line."""
        try:
            return self.ask().name()
        except LayoutUnknownError:
            return monitors.name_of(self._process.pid)

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
