"""Threads that ptrace alone holds stopped: whatever becomes of us, they run on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from mtetool.attach.ptrace import Tracee
from mtetool.errors import GuestLostError
from mtetool.permission import refusal, thread_has_ended


class HeldThreads:
    """Held threads of one process, used from the OS thread that traces. Signals to them wait."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._held: dict[int, Tracee] = {}

    @property
    def tracees(self) -> tuple[Tracee, ...]:
        """All held threads, by thread id."""
        return tuple(self._held[tid] for tid in sorted(self._held))

    def hold(self, tids: Iterable[int]) -> list[Tracee]:
        """Stop these threads; return those that were not held before.

        Threads that have ended, or are not of the process, are left out. Raises
        PermissionRefusedError, BusyError (another process traces one); threads seized by then are
        held until `release`.
        """
        seized: list[Tracee] = []
        for tid in sorted(set(tids) - set(self._held)):
            try:
                tracee = self._held[tid] = Tracee.seize_of(self._pid, tid)
                tracee.interrupt()
                seized.append(tracee)
            except OSError as error:
                self._held.pop(tid, None)
                # A thread that is about to end cannot be traced any more: EPERM.
                if not thread_has_ended(self._pid, tid):
                    raise refusal(self._pid, error) from error
        # All are asked to stop before the first is waited for.
        stopped = []
        for tracee in seized:
            try:
                tracee.until_event_stop()
                stopped.append(tracee)
            except (GuestLostError, ProcessLookupError):
                del self._held[tracee.tid]
        return stopped

    def release(self, tids: Iterable[int] | None = None) -> None:
        """Let threads run on: these, or all."""
        for tid in list(self._held) if tids is None else tids:
            if (tracee := self._held.pop(tid, None)) is not None:
                with suppress(ProcessLookupError):
                    tracee.detach()
