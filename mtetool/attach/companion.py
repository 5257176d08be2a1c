"""A companion: an orphaned process that traces this one from now on.

It starts before this process becomes another program, so it sees that program from its first
instruction on. Its parent is the process that adopts orphans. It has a session of its own and keeps
nothing of ours open, no file, no pipe, no directory, so no other process waits for it.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from mtetool import signals
from mtetool.attach.guard import become_guarded
from mtetool.errors import AttachRefusedError

_PR_SET_PTRACER = 0x59616D61  # include/uapi/linux/prctl.h
_NUMBER = struct.Struct("<i")
_STANDARD = (0, 1, 2)
# Python ignores these from its start, and does not remember how it found them.
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4

Work = Callable[[], object]


def accompany(attach: Callable[[int], Work]) -> None:
    """Start a companion and wait until it has attached to this process.

    The companion calls `attach` with our PID, and then the function that `attach` returned. Raises
    AttachRefusedError if the companion died, and the OSError that `attach` raised.
    """
    pid = os.getpid()
    here, there = socket.socketpair()
    with here:
        with there:
            between = os.fork()
            if between == 0:
                _orphan(lambda: _keep_company(pid, there, attach))
        with suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(between, 0)
        tracer = _receive(here)
        # With Yama, only ancestors may trace, and tracers that we name. Without it, this fails.
        _libc.prctl(_PR_SET_PTRACER, tracer, 0, 0, 0)
        try:
            here.sendall(_NUMBER.pack(0))
            number = _receive(here)
        finally:
            _libc.prctl(_PR_SET_PTRACER, 0, 0, 0, 0)
    if number:
        raise OSError(number, os.strerror(number))


def become(path: str, arguments: list[str], environment: dict[bytes, bytes]) -> NoReturn:
    """Become that program, with the signal handling that this process was started with.

    It ignores SIGPIPE and SIGXFSZ if our parent does: nothing better can be known. Raises OSError
    where the program cannot be executed.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    ignored = _ignored_by(os.getppid())
    try:
        # A signal that comes now must end this process. A handler would only note it, and the note
        # would be lost with the handler.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signals.raise_delayed()
        for number in signals.ENDING:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)
        for number in _IGNORED_BY_PYTHON:
            if not ignored >> (number - 1) & 1:
                signal.signal(number, signal.SIG_DFL)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.execve(path, arguments, environment)  # noqa: S606 - what the user asked for


def initial_environment() -> dict[bytes, bytes]:
    """The environment that this process was started with: Python may have set LC_CTYPE since."""
    try:
        raw = Path("/proc/self/environ").read_bytes()
    except OSError:
        return dict(os.environb)
    found: dict[bytes, bytes] = {}
    for entry in raw.split(b"\0"):
        name, equals, value = entry.partition(b"=")
        if name and equals:
            found.setdefault(name, value)
    return found


def _orphan(run: Callable[[], object]) -> NoReturn:
    """In a child: call `run` in a grandchild, and end."""
    try:
        os.setsid()
        if os.fork() == 0:
            run()
    finally:
        os._exit(0)


def _keep_company(pid: int, there: socket.socket, attach: Callable[[int], Work]) -> None:
    for number in signals.ENDING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # its own alarms must reach it
    become_guarded()
    with _alone_with(there) as there:
        there.sendall(_NUMBER.pack(os.getpid()))
        _receive(there)
        try:
            work = attach(pid)
        except OSError as error:
            there.sendall(_NUMBER.pack(error.errno or 0))
            return
        there.sendall(_NUMBER.pack(0))
    work()


def _alone_with(end: socket.socket) -> socket.socket:
    """Close all files but the socket: others may wait for their end, or want to unmount.

    The socket gets a number that is not a standard stream's; it has one where those were closed.
    """
    kept = socket.socket(fileno=fcntl.fcntl(end.detach(), fcntl.F_DUPFD_CLOEXEC, len(_STANDARD)))
    for fd in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208 - numbers, not paths
        if fd != kept.fileno():
            with suppress(OSError):  # the listing's own is closed by now
                os.close(fd)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in _STANDARD:
        os.dup2(null, fd)
    if null not in _STANDARD:
        os.close(null)
    os.chdir("/")
    return kept


def _receive(end: socket.socket) -> int:
    data = end.recv(_NUMBER.size)
    if len(data) != _NUMBER.size:
        raise AttachRefusedError("the process meant to trace the VMM died", hint="try again")
    number: int = _NUMBER.unpack(data)[0]
    return number


def _ignored_by(pid: int) -> int:
    """The signals that a process ignores, bit N-1 for signal N; 0 where they are unknown."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1], 16) for line in lines if line.startswith("SigIgn:")), 0)
