"""A process of ours that ends this one when it stops or stalls while it holds a VMM's threads.

A stopped tracer holds what it traces: a SIGSTOP to mtetool while it holds the vCPUs would stop the
guest until somebody continues mtetool, and every timeout of ours would stand still with it. Only
another process can help. Death is safe (see `mtetool.attach.borrow`), so the guard kills.

The guard is forked before anything is traced. It has a session of its own, so that no terminal
stops it, blocks all signals, and keeps no file open but a pidfd of the process that it watches:
nobody who waits for the end of a pipe waits for the guard. It ends when that process ends.

What it looks at is a page of memory that both share: what we hold now, and a count that a thread
of ours (the heart) advances. Where the count advances, this process runs, and nothing else is
looked at. Where it does not, /proc says why:

- a thread in state T: the process was stopped. It is killed at once.
- all threads sleep in one same state (t: a debugger; D or S: a cgroup's freezer), and used no CPU
  for several looks: nothing of this process can run. It is killed if it holds a thread.

A process that is merely slow does not look like that: one of its threads waits for a CPU (R), or
used one, or it waits for a page of memory (D) while the others wait for that thread (S).
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
# So many looks without a sign of life are a stall: with the reaction to it, below a second.
_QUIET_LOOKS = 7
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # include/uapi/linux/prctl.h
_NAME = "mte-guard"
# Words of the page; the count is 0 where there is no heart.
_LEVEL, _BEATS = 0, 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4


class Level(IntEnum):
    """What is in our hands; the more, the less time the guard gives us."""

    NOTHING = 0
    ATTACHED = 1
    """A helper thread of ours is traced: the VMM could not end while we are stopped."""
    HOLDING = 2
    """A thread of the VMM or a vCPU is borrowed or held: it waits for us."""


class Watch:
    """While open, a guard watches over this process; stop signals of the terminal wait until then.

    `level` says what is in our hands; it is raised before a thread is stopped, and lowered after it
    was let go. All watches of the process share a guard. Raises HostError where there can be none;
    nothing may be held then.
    """

    def __init__(self) -> None:
        self._level = Level.NOTHING
        with _lock:
            _shared.begin()
            _watches.add(self)

    @property
    def level(self) -> Level:
        """What is in our hands."""
        return self._level

    @level.setter
    def level(self, level: Level) -> None:
        with _lock:
            self._level = level
            if self in _watches:
                _shared.set_level(max(watch.level for watch in _watches))

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Something is held meanwhile."""
        before = self.level
        self.level = Level.HOLDING
        try:
            yield
        finally:
            self.level = before

    def close(self) -> None:
        """Nothing is in our hands any more. A stop that waited for that happens now. Idempotent."""
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
    """Go on in a child, as whose guard this process stays until the child ends.

    For a process that waits for all its children, where a guard must not be one of them. It has one
    thread, and holds something from now on. Raises OSError.
    """
    guard = os.getpid()
    child = os.fork()
    if child:
        _be_guard(os.pidfd_open(child), child, _new_page(Level.ATTACHED))
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != guard:
        os._exit(1)


class _Guard:
    """The guard process of this one, and the heart."""

    def __init__(self) -> None:
        self._owner = 0
        self._pid = 0
        self._page = memoryview(b"")
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()

    def begin(self) -> None:
        """Have a guard, a new one where the last is not alive. Raises HostError."""
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
            raise no_thread("watching over mtetool itself", error) from error
        _stops.begin()

    def set_level(self, level: Level) -> None:
        """Tell the guard."""
        self._page[_LEVEL] = level

    def end(self) -> None:
        """End the guard, and leave nothing of it to be waited for."""
        pid, self._pid, self._owner = self._pid, 0, 0
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)  # a child that was not waited for: the PID is its own
        with suppress(ChildProcessError):  # somebody waits for all children, or ignores SIGCHLD
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
    """In a forked child: the guard is its parent's."""
    global _lock, _shared
    _lock, _shared = threading.RLock(), _Guard()
    _watches.clear()
    _stops.forget()


os.register_at_fork(after_in_child=_forget)


def _no_guard(error: OSError) -> HostError:
    name = errno_name(error.errno or 0)
    return HostError(
        f"no process could be started to watch over mtetool: {error.strerror} ({name}); without"
        " it a guest could be left standing, so nothing was attached to",
        hint="raise the limit on processes: ulimit -u, pids.max of the cgroup",
        errno=name,
    )


def _new_page(level: Level) -> memoryview:
    page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")
    page[_LEVEL] = level
    return page


def _fork_guard(page: memoryview) -> int:
    """Start the guard of this process and wait until it is in place; its PID. Raises OSError."""
    watched, pid = os.pidfd_open(os.getpid()), os.getpid()
    reading, writing = os.pipe()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        with warnings.catch_warnings():
            # What other threads have locked does not matter to the child: it only makes calls.
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
            raise OSError(errno.ESRCH, "the process ended at once")
    return guard


# --- in the guard ---------------------------------------------------------------------------


def _be_guard(watched: int, pid: int, page: memoryview, ready: int | None = None) -> NoReturn:
    """Watch over a process until it ends; never comes back. `ready` is written to once it does."""
    try:
        # What this process inherited is not its own to tidy up.
        gc.disable()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        with suppress(PermissionError):  # it leads a session already
            os.setsid()
        if ready is not None and threading.current_thread() is threading.main_thread():
            # For one that is itself stopped then. (It comes when the *thread* that forked ends.)
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
    """Let `ps` and `pkill` see this process as what it is, not as another mtetool."""
    name = ctypes.create_string_buffer(_NAME.encode())
    _libc.prctl(_PR_SET_NAME, ctypes.addressof(name), 0, 0, 0)
    # Fields 48 and 49 of /proc/PID/stat: where the command line lies.
    fields = procfs.stat_of("/proc/self")
    start, end = int(fields[45]), int(fields[46])
    if 0 < start < end:
        text = title.encode()[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def _close_all_but(*kept: int | None) -> None:
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
        if fd not in kept:
            with suppress(OSError):  # the listing's own is closed by now
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
    """Each thread: its id, its state, and the time that it has run, as user and in the kernel."""
    found: list[tuple[str, ...]] = []
    for tid in sorted(os.listdir(tasks)):  # noqa: PTH208 - one call
        with suppress(OSError):
            fields = procfs.stat_of(tasks / tid)
            found.append((tid, fields[0], fields[11], fields[12]))
    return found
