"""Only the process's own threads are held or borrowed; on real processes, with real ptrace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mtetool.attach.borrow import BorrowedThread
from mtetool.attach.held import HeldThreads
from mtetool.procfs import status_of


@contextmanager
def _process() -> Iterator[int]:
    """Start a process that waits; yield its PID."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield process.pid
            assert process.poll() is None
        finally:
            process.kill()


def test_threads_of_the_process_are_held() -> None:
    with _process() as pid:
        held = HeldThreads(pid)
        assert [tracee.tid for tracee in held.hold([pid])] == [pid]
        assert status_of(pid)["TracerPid"] == str(os.getpid())
        held.release()
        assert status_of(pid)["TracerPid"] == "0"


def test_thread_whose_id_is_another_process_s_by_now_is_not_held() -> None:
    with _process() as pid, _process() as other:
        held = HeldThreads(pid)
        assert held.hold([other]) == []
        assert held.tracees == ()
        assert status_of(other)["TracerPid"] == "0"
        assert not status_of(other)["State"].startswith(("T", "t"))


def test_thread_whose_id_is_another_process_s_by_now_is_not_borrowed() -> None:
    with _process() as pid, _process() as other:
        with pytest.raises(ProcessLookupError), BorrowedThread(pid, other, ()):
            pass
        assert status_of(other)["TracerPid"] == "0"
