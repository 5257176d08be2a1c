"""Progress shown by a thread: the work never waits for its display."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mtetool.cli.latest import never_waiting
from tests.cli.running import spawn

_F_SETPIPE_SZ = 1031


def test_what_is_shown_is_the_latest_and_the_last() -> None:
    shown: list[tuple[int, int | None]] = []
    with never_waiting(lambda done, total: shown.append((done, total))) as show:
        for done in range(1000):
            show(done, 1000)
    assert shown[-1] == (999, 1000)
    assert len(shown) < 1000


def test_one_who_does_not_look_is_not_waited_for() -> None:
    looks = threading.Event()

    def stuck(done: int, total: int | None) -> None:
        looks.wait()

    def fail() -> None:
        with never_waiting(stuck) as show:
            show(1, 2)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with never_waiting(stuck) as show:
        for done in range(1000):
            show(done, None)
        looks.set()


def test_what_goes_wrong_with_it_is_not_lost() -> None:
    def closed(done: int, total: int | None) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError), never_waiting(closed) as show:
        show(1, 2)


def test_a_signal_ends_a_command_whose_progress_nobody_reads(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, _F_SETPIPE_SZ, 4096)
    os.write(writing, bytes(4096))
    words = ("emu", "create", tmp_path / "g", "--memory", "1M", "--fill", "heap")
    process = spawn(*words, "--progress", "json", stderr=writing)
    os.close(writing)
    try:
        # All is done except the last line of progress.
        while not _writes_to_a_pipe(process.pid):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        os.close(reading)


def _writes_to_a_pipe(pid: int) -> bool:
    """Whether a thread of the process waits for room in a pipe."""
    tasks = Path(f"/proc/{pid}/task").glob("*/wchan")
    return any("pipe_write" in task.read_text() for task in tasks)
