"""Runs of mtetool under strace, which makes single system calls fail or kill.

`python -m tests.interrupted.server FD` imports everything once. For each request on that socket
it forks; the child is the run, and waits, without a system call of its own, until strace has
attached to it. So numbering starts with the first system call of `main`, after the thousand
calls of the interpreter's start, and is the same in every run.
"""

from __future__ import annotations

import ctypes
import difflib  # noqa: F401 - click imports it when it first parses an option
import errno
import mmap
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import mtetool.__main__ as program
from mtetool.cli import COMMANDS, group

_PR_SET_PTRACER = 0x59616D61
_HANG_SECONDS = 20.0
_READY, _GO = 1, 2
_PR_SET_PTRACER_ANY = ctypes.c_ulong(-1)


@dataclass(frozen=True)
class Request:
    """A run: its arguments, its streams, and what strace does to it.

    `inject` is a value of strace's `-e inject=`, "" for none; `log` is where strace writes, ""
    for a run without it. `stdin` can be `|PATH`, that file through a pipe; `stdout` can be `|`, a
    pipe without a reader, or `-`, closed. `named` makes nameless files unavailable.
    `limit_bytes` is RLIMIT_FSIZE, -1 for none.
    """

    arguments: tuple[str, ...]
    directory: str
    stdin: str
    stdout: str
    stderr: str
    log: str
    inject: str = ""
    named: bool = False
    limit_bytes: int = -1


def _preload() -> None:
    """Import what the commands import when they run."""
    from mtetool.backends.emu import guest, patterns  # noqa: F401
    from mtetool.backends.kvm import memslots  # noqa: F401
    from mtetool.cli import counts, many, rows, screen, views  # noqa: F401
    from mtetool.files import output  # noqa: F401
    from mtetool.flows import diff, dump, enable, relocation, restore, save, verify  # noqa: F401
    from mtetool.snapshot import frames  # noqa: F401
    from mtetool.sources import opening, source, watching  # noqa: F401

    for name in COMMANDS:
        group.get_command(None, name)  # type: ignore[arg-type]


def _become(request: Request, go: mmap.mmap) -> int:
    """Carry out the run, in the child; return its exit status."""
    os.chdir(request.directory)
    stdout = os.devnull if request.stdout == "-" else request.stdout
    new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    _onto(0, _pipe(request.stdin[1:]) if request.stdin[0] == "|" else os.open(request.stdin, 0))
    _onto(1, _unread_pipe() if request.stdout == "|" else os.open(stdout, new, 0o600))
    _onto(2, os.open(request.stderr, new, 0o600))
    # As the interpreter opens them when it starts.
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    if request.stdout == "-":
        sys.stdout = None
        os.close(1)
    sys.argv = ["mtetool", *request.arguments]
    if request.named:
        _without_nameless_files()
    if request.limit_bytes >= 0:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (request.limit_bytes, request.limit_bytes))
    # Where only ancestors may trace (Yama), strace is not one.
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)
    go[0] = _READY
    while go[0] != _GO:
        pass
    return program.main()


def _onto(fd: int, opened: int) -> None:
    os.dup2(opened, fd)
    os.close(opened)


def _pipe(path: str) -> int:
    """The read end of a pipe that holds the bytes of a (small) file."""
    reader, writer = os.pipe()
    data = Path(path).read_bytes()
    os.set_blocking(writer, False)
    if os.write(writer, data) != len(data):
        raise RuntimeError(f"{path} does not fit into a pipe")
    os.close(writer)
    return reader


def _unread_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _without_nameless_files() -> None:
    real = os.open

    def open_named(path: str, flags: int, *arguments: int, **options: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return real(path, flags, *arguments, **options)

    os.open = open_named  # type: ignore[assignment]


def _trace(pid: int, request: Request, go: mmap.mmap) -> int:
    """Attach strace and let the child run; return its wait status."""
    names = request.inject.partition(":")[0] or "all"
    words = ["strace", "-f", "-s", "0", "-o", request.log, "-e", f"trace={names}"]
    if request.inject:
        words += ["-e", f"inject={request.inject}"]
    with subprocess.Popen([*words, "-p", str(pid)], stderr=subprocess.PIPE) as strace:
        assert strace.stderr is not None
        line = strace.stderr.readline()
        if b"attached" not in line:
            raise RuntimeError(line)
        go[0] = _GO
        return _wait(pid)


def _wait(pid: int) -> int:
    """Return the child's wait status; a child that hangs gets SIGALRM, which no trial sends."""
    deadline = time.monotonic() + _HANG_SECONDS
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGALRM)
            deadline += _HANG_SECONDS
        time.sleep(0.002)


def serve(connection: Connection) -> int | None:
    """Answer requests with wait statuses until they end; in a child, the run's exit status."""
    _preload()
    connection.send("ready")
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return None
        go = mmap.mmap(-1, mmap.PAGESIZE)
        pid = os.fork()
        if pid == 0:
            connection.close()
            return _become(request, go)
        while go[0] != _READY:
            time.sleep(0.001)
        if request.log:
            status = _trace(pid, request, go)
        else:
            go[0] = _GO
            status = _wait(pid)
        go.close()
        connection.send(status)


if __name__ == "__main__":
    sys.exit(serve(Connection(int(sys.argv[1]))))
