"""Another process's standard error: writes never block, and it is not kept open."""

from __future__ import annotations

import os
import signal
import subprocess

from mtetool.attach.stderr import stderr_of, write_briefly

_PAGE = 4096


def _full_pipe() -> tuple[int, int]:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(_PAGE))
    except BlockingIOError:
        os.set_blocking(writing, True)
    return reading, writing


def test_what_nobody_reads_is_dropped() -> None:
    reading, writing = _full_pipe()
    write_briefly(writing, b"one")
    os.read(reading, _PAGE)
    write_briefly(writing, bytes(2 * _PAGE))  # there is room for half of it
    os.set_blocking(reading, False)
    held = b"".join(iter(lambda: _read(reading), b""))
    assert not held.strip(b"\0")
    os.close(reading)
    write_briefly(writing, b"none reads")
    os.close(writing)


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def test_an_alarm_that_was_set_comes_later() -> None:
    reading, writing = os.pipe()
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    try:
        write_briefly(writing, b"two")
        assert os.read(reading, _PAGE) == b"two"
        left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
        assert left > 0
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        os.close(reading)
        os.close(writing)


def test_it_is_the_file_itself_and_held_for_that_time_alone() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with stderr_of((process.pid,)) as fd:
            assert fd is not None
            write_briefly(fd, b"three\n")
        assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
        assert process.stderr.readline() == b"three\n"
        assert process.stdin is not None
        process.stdin.close()
        assert process.stderr.read() == b""
    with stderr_of((process.pid,)) as fd:
        assert fd is None
