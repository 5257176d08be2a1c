"""A guard: a process that kills this one if it stops or stalls while it holds a VMM's threads.

A stopped tracer keeps its tracees stopped: a SIGSTOP to mtetool while it holds the vCPUs would stop
the guest until the user continues mtetool, and all our timeouts would stand still as well. Only
another process can help. Death is safe (see `mtetool.attach.borrow`), so the guard kills.

The guard is forked before anything is traced. It has a session of its own, so no terminal stops it.
It blocks all signals, and keeps no file open but a pidfd of the process that it watches: a reader
that waits for the end of a pipe does not wait for the guard. It ends when that process ends.

It looks at a page of memory that both share: what we hold now, and a count that one of our threads
(the heart) advances. While the count advances, this process runs, and the guard looks at nothing
else. When it does not, /proc says why:

- a thread is in state T: the process was stopped. The guard kills it at once.
- all threads sleep in the same state (t: a debugger; D or S: a cgroup's freezer), and have used no
  CPU for several looks: nothing in this process can run. The guard kills it if it holds a thread.

A process that is merely slow does not look like that: one of its threads waits for a CPU (R), or
has used one, or waits for a page of memory (D) while the others wait for that thread (S).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import select
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import NoReturn

from mtetool import procfs
from mtetool.attach.stops import Stops
from mtetool.errors import HostError, errno_name, no_thread

_BEAT_SECONDS = 0.05
_LOOK_MS = 100
# This many looks without a sign of life are a stall: below a second, with the reaction to it.
_QUIET_LOOKS = 7
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # include/uapi/linux/prctl.h
_NAME = "mte-guard"
# Words of the page; the count is 0 where there is no heart.
_LEVEL, _BEATS = 0, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class Level(IntEnum):
    """What we hold; the more it is, the less time the guard gives us."""

    NOTHING = 0
    ATTACHED = 1
    """A helper thread of ours is traced: the VMM could not end while we are stopped."""
    HOLDING = 2
    """A thread of the VMM or a vCPU is borrowed or held: it waits for us."""


class Watch:
    """While open, a guard watches over this process, and the terminal's stop signals wait.

    `level` says what we hold; it is raised before a thread is stopped, and lowered after it was let
    go. All watches of the process share one guard. Raises HostError where no guard can be started;
    then nothing may be held.
    """

    def __init__(self) -> None:
        self._level = Level.NOTHING
        with _lock:
            _shared.begin()
            _watches.add(self)

    @property
    def level(self) -> Level:
        """What we hold."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        with _lock:
            self._level = level
            if self in _watches:
                _shared.set_level(max(watch.level for watch in _watches))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Set the level to HOLDING for the body."""
        before = self.level
        self.level = Level.HOLDING
        try:
            yield
        finally:
            self.level = before

    def close(self) -> None:
        """Hold nothing any more; a stop signal that has waited takes effect now. Idempotent."""
        self.level = Level.NOTHING
        with _lock:
            if self not in _watches:
                return
            _watches.remove(self)
            if not _watches:
                _shared.end()
        if not _watches:
            _stops.end()


def become_guarded() -> None:
    """Go on in a child; this process stays as its guard until the child ends.

    For a process that waits for all its children, so that its guard is not one of them. It must
    have only one thread, and holds something from now on. Raises OSError.
    """
    guard = os.getpid()
    child = os.fork()
    if child:
        _be_guard(os.pidfd_open(child), child, _new_page(Level.ATTACHED))
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard:
        os._exit(1)


class _Guard:
    """This process's guard, and the heart."""

    def __init__(self) -> None:
        self._owner = 0
        self._pid = 0
        self._page = memoryview(b"")
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self) -> None:
        """Make sure that a guard runs: start one if the last is not alive. Raises HostError."""
        if self._owner == os.getpid():
            if self._alive():
                return
            self.end()
        self._page = _new_page(Level.NOTHING)
        try:
            self._pid = _fork_guard(self._page)
        except OSError as error:
            raise _no_guard(error) from error
        self._owner = os.getpid()
        try:
            self._start_heart()
        except RuntimeError as error:
            self.end()
            raise no_thread("starting mtetool's guard", error) from error
        _stops.begin()

    def set_level(self, level: Level) -> None:
        """Pass the level on to the guard."""
        self._page[_LEVEL] = level

    def end(self) -> None:
        """End the guard and reap it."""
        pid, self._pid, self._owner = self._pid, 0, 0
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # an unreaped child: the PID is still its own
        with suppress(ChildProcessError):  # other code reaps all children, or ignores SIGCHLD
            os.waitpid(pid, 0)

    def _alive(self) -> bool:
        try:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def _start_heart(self) -> None:
        stop, page = threading.Event(), self._page
        page[_BEATS] = 1

        def beat() -> None:
            while not stop.wait(_BEAT_SECONDS):
                page[_BEATS] += 1

        heart = threading.Thread(target=beat, name="heart", daemon=True)
        heart.start()
        self._stop, self._heart = stop, heart


_lock = threading.RLock()
_watches: set[Watch] = set()
_shared = _Guard()
_stops = Stops()


def _forget() -> None:
    """Forget the guard in a forked child: it is the parent's."""
    global _lock, _shared
    _lock, _shared = threading.RLock(), _Guard()
    _watches.clear()
    _stops.forget()


os.register_at_fork(after_in_child=_forget)


def _no_guard(error: OSError) -> HostError:
    name = errno_name(error.errno or 0)
    return HostError(
        f"mtetool could not start its guard process: {error.strerror} ({name}); without it a"
        " guest could be left stopped, so mtetool attached to nothing",
        hint="raise the limit on processes: ulimit -u, pids.max of the cgroup",
        errno=name,
    )


def _new_page(level: Level) -> memoryview:
    page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    page[_LEVEL] = level
    return page


def _fork_guard(page: memoryview) -> int:
    """Start this process's guard, wait until it is in place; return its PID. Raises OSError."""
    watched, pid = os.pidfd_open(os.getpid()), os.getpid()
    reading, writing = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # Locks that other threads hold do not matter to the child: it only makes system calls.
            warnings.simplefilter("ignore", DeprecationWarning)
            guard = os.fork()
        if guard == 0:
            _be_guard(watched, pid, page, writing)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(watched)
        os.close(writing)
    with open(reading, "rb", buffering=0) as ready:  # noqa: PTH123 - a descriptor
        if not ready.read(1):
            os.waitpid(guard, 0)
            raise OSError(errno.ESRCH, "it ended at once")
    return guard


# --- in the guard ---------------------------------------------------------------------------


def _be_guard(watched: int, pid: int, page: memoryview, ready: int | None = None) -> NoReturn:
    """Watch over a process until it ends; never return. Once it watches, it writes to `ready`."""
    try:
        # What this process inherited is not its own to tidy up.
        gc.disable()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with suppress(PermissionError):  # it leads a session already
            os.setsid()
        if ready is not None and threading.current_thread() is threading.main_thread():
            # For a guard that is itself stopped then. (It comes when the forking *thread* ends.)
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        os.chdir("/")
        _call_yourself(f"{_NAME} of {pid}")
        _close_all_but(watched, ready)
        if ready is not None:
            os.write(ready, b"+")
            os.close(ready)
        _watch_over(watched, Path(f"/proc/{pid}/task"), page)
    finally:
        os._exit(0)


def _call_yourself(title: str) -> None:
    """Let `ps` and `pkill` see this process as a guard, not as another mtetool."""
    name = ctypes.create_string_buffer(_NAME.encode())
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(name), 0, 0, 0)
    # Fields 48 and 49 of /proc/PID/stat: where the command line is.
    fields = procfs.stat_of("/proc/self")
    start, end = int(fields[45]), int(fields[46])
    if 0 < start < end:
        text = title.encode()[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def _close_all_but(*kept: int | None) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
        if fd not in kept:
            with suppress(OSError):  # the listing's own fd is closed by now
                os.close(fd)


def _watch_over(watched: int, tasks: Path, page: memoryview) -> None:
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    beats, quiet = -1, 0
    before: list[tuple[str, ...]] = []
    while not poll.poll(_LOOK_MS):
        level = page[_LEVEL]
        if level == Level.NOTHING or page[_BEATS] != beats:
            beats, quiet = page[_BEATS], 0
            continue
        now = _look(tasks)
        states = {thread[1] for thread in now}
        still = now == before and len(states) == 1 and states <= {"t", "D", "S"}
        quiet, before = quiet + 1 if still else 0, now
        stalled = quiet >= _QUIET_LOOKS and level == Level.HOLDING and beats > 0
        if "T" in states or stalled:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched, signal.SIGKILL)


def _look(tasks: Path) -> list[tuple[str, ...]]:
    """Each thread's id, its state, and its CPU time in user mode and in the kernel."""
    found: list[tuple[str, ...]] = []
    for tid in sorted(os.listdir(tasks)):  # noqa: PTH208 - one call
        with suppress(OSError):
            fields = procfs.stat_of(tasks / tid)
            found.append((tid, fields[0], fields[11], fields[12]))
    return found
