"""The guard: it kills a process that is stopped while it holds something, and no other one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent.parent
_PATIENCE_SECONDS = 60.0
_SEIZE, _INTERRUPT, _WALL, _STOPPED = 0x4206, 0x4207, 0x40000000, 0x057F

# A process that prints where it is, and continues at each line of its input.
_WATCHED = """
import os, sys
from mtetool.attach.guard import Level, Watch
watch = Watch()
def stand(level):
    watch.level = level
    print(level.name, flush=True)
    return sys.stdin.readline()
"""
_HOLDS = _WATCHED + "stand(Level.HOLDING)\nwatch.close()\nprint('closed', flush=True)\n"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.01)


@contextmanager
def started(script: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().decode().strip()


def go_on(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def guard_of(pid: int) -> int | None:
    """Return the PID of a process's guard, whatever its parent is by now."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().rstrip(b"\0")
        except OSError:
            continue
        if words == b"mte-guard of %d" % pid:
            return int(process.name)
    return None


def test_a_process_that_is_stopped_with_something_in_its_hands_is_ended() -> None:
    for level in ("HOLDING", "ATTACHED"):
        with started(_WATCHED + f"stand(Level.{level})") as process:
            assert line(process) == level
            began = time.monotonic()
            process.send_signal(signal.SIGSTOP)
            assert process.wait(_PATIENCE_SECONDS) == -signal.SIGKILL
            print(f"{level}: ended after {time.monotonic() - began:.3f} s")
            until(lambda pid=process.pid: guard_of(pid) is None)  # type: ignore[misc]


def test_a_process_that_holds_nothing_may_be_stopped() -> None:
    script = _WATCHED + "stand(Level.HOLDING)\nstand(Level.NOTHING)\nstand(Level.HOLDING)\n"
    with started(script) as process:
        assert line(process) == "HOLDING"
        go_on(process)
        assert line(process) == "NOTHING"
        process.send_signal(signal.SIGSTOP)
        until(lambda: state(process.pid) == "T")
        # After so many switches, the guard has looked several times.
        guard = guard_of(process.pid)
        looks = _switches(guard)
        until(lambda: _switches(guard) > looks + 10)
        assert state(process.pid) == "T"
        process.send_signal(signal.SIGCONT)
        go_on(process)
        assert line(process) == "HOLDING"


def _switches(pid: int | None) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


def test_a_process_that_a_debugger_stops_is_ended_where_it_holds_something() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with started(_HOLDS) as process:
        assert line(process) == "HOLDING"
        tids = sorted(map(int, os.listdir(f"/proc/{process.pid}/task")), reverse=True)  # noqa: PTH208
        for tid in tids:
            assert libc.ptrace(_SEIZE, tid, None, None) == 0
            assert libc.ptrace(_INTERRUPT, tid, None, None) == 0
        # As debuggers do, reap each thread, the first thread last.
        for tid in tids:
            until(lambda tid=tid: os.WIFSIGNALED(_next_status(tid)))  # type: ignore[misc]
        until(lambda: guard_of(process.pid) is None)


def _next_status(tid: int) -> int:
    done, status = os.waitpid(tid, _WALL | os.WNOHANG)
    return status if done else _STOPPED


def test_a_process_that_is_busy_is_no_process_that_stands() -> None:
    # One call that lets no other Python thread run: the heart stands still meanwhile.
    script = _WATCHED + (
        "stand(Level.HOLDING)\n"
        "import time\n"
        "number, began = 1 << 20, time.monotonic()\n"
        "while time.monotonic() - began < 2:\n"
        "    number *= 4\n"
        "    began = time.monotonic()\n"
        "    sum(range(number))\n"
        "print('through', flush=True)\n"
    )
    with started(script) as process:
        assert line(process) == "HOLDING"
        go_on(process)
        assert line(process) == "through"


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_nothing_of_it_stays(end: signal.Signals | None) -> None:
    with started(_HOLDS) as process:
        assert line(process) == "HOLDING"
        assert guard_of(process.pid) is not None
        if end is None:
            go_on(process)
            assert line(process) == "closed"
        else:
            process.send_signal(end)
            process.wait(_PATIENCE_SECONDS)
        until(lambda: guard_of(process.pid) is None)


def test_it_goes_with_its_process_also_when_it_is_stopped_itself() -> None:
    with started(_HOLDS) as process:
        assert line(process) == "HOLDING"
        guard = guard_of(process.pid)
        assert guard is not None
        os.kill(guard, signal.SIGSTOP)
        until(lambda: state(guard) == "T")
        process.kill()
        process.wait()
        until(lambda: guard_of(process.pid) is None)


def test_it_is_of_no_terminal_keeps_nothing_open_and_hears_no_signal(tmp_path: Path) -> None:
    with started(_HOLDS, cwd=tmp_path) as process:
        assert line(process) == "HOLDING"
        guard = guard_of(process.pid)
        assert guard is not None
        assert os.getsid(guard) == guard
        root = Path(f"/proc/{guard}")
        assert [link.readlink().name for link in (root / "fd").iterdir()] == ["anon_inode:[pidfd]"]
        assert (root / "cwd").readlink() == Path("/")
        assert (root / "comm").read_text() == "mte-guard\n"
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGTSTP):
            os.kill(guard, number)
        process.send_signal(signal.SIGSTOP)
        assert process.wait(_PATIENCE_SECONDS) == -signal.SIGKILL


def test_one_that_was_killed_is_replaced_before_something_is_held_again() -> None:
    script = _WATCHED + (
        "stand(Level.NOTHING)\n"
        "other = Watch()\n"
        "stand(Level.HOLDING)\n"
        "other.close()\n"
        "watch.close()\n"
        "os.waitid(os.P_ALL, 0, os.WEXITED)\n"
    )
    with started(script) as process:
        assert line(process) == "NOTHING"
        guard = guard_of(process.pid)
        assert guard is not None
        os.kill(guard, signal.SIGKILL)
        until(lambda: guard_of(process.pid) is None)
        go_on(process)
        assert line(process) == "HOLDING"
        go_on(process)
        # There is no child left to wait for.
        assert process.wait(_PATIENCE_SECONDS) == 1


def test_a_forked_child_has_its_own() -> None:
    script = _WATCHED + (
        "stand(Level.HOLDING)\n"
        "if os.fork() == 0:\n"
        "    watch = Watch()\n"
        "    watch.level = Level.HOLDING\n"
        "    print(os.getpid(), flush=True)\n"
        "    sys.stdin.readline()\n"
        "    os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)\n"
    )
    with started(script) as process:
        assert line(process) == "HOLDING"
        go_on(process)
        child = int(line(process))
        assert guard_of(child) not in (None, guard_of(process.pid))
        os.kill(child, signal.SIGSTOP)
        # os.wait reports the child, as its parent's guard has not ended.
        assert line(process) == str(-signal.SIGKILL)


def test_a_process_may_be_split_into_one_that_works_and_its_guard() -> None:
    script = (
        "import os, sys\n"
        "from mtetool.attach.guard import become_guarded\n"
        "become_guarded()\n"
        "print(os.getpid(), flush=True)\n"
        "try:\n"
        "    os.waitid(os.P_ALL, 0, os.WEXITED)\n"
        "except ChildProcessError:\n"
        "    print('no child', flush=True)\n"
        "sys.stdin.readline()\n"
    )
    with started(script) as process:
        worker = int(line(process))
        assert line(process) == "no child"
        os.kill(worker, signal.SIGSTOP)
        assert process.wait(_PATIENCE_SECONDS) == 0


def test_without_room_for_it_nothing_is_held() -> None:
    script = (
        "import os, resource\n"
        "from mtetool.attach.guard import Watch\n"
        "from mtetool.errors import HostError\n"
        "os.setresuid(54321, 54321, 54321)\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, ({limit}, {limit}))\n"
        "try:\n"
        "    Watch()\n"
        "except HostError as error:\n"
        "    print(error.status, error.message, error.hint, flush=True)\n"
        "try:\n"
        "    os.waitid(os.P_ALL, 0, os.WEXITED)\n"
        "except ChildProcessError:\n"
        "    print('no child', flush=True)\n"
    )
    # No room for a process; then room for a process, but not for a thread.
    for limit, what in ((1, "could not start its guard process"), (2, "can't start new thread")):
        with started(script.format(limit=limit)) as process:
            told = line(process)
            assert told.startswith("6 "), told
            assert what in told
            assert "ulimit -u" in told
            assert line(process) == "no child"
