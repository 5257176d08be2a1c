"""Make each system call of a run fail, or be the run's last: one run for each."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.interrupted.runs import After, Run, make_template
from tests.interrupted.server import Request

# Calls that touch neither a file nor a guest: dying there is like dying before the next call.
_OWN_BUSINESS = {
    "brk", "clone", "clone3", "exit", "exit_group", "futex", "getpid", "getrandom", "gettid",
    "madvise", "mmap", "mprotect", "mremap", "munmap", "prctl", "restart_syscall", "rseq",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sched_getaffinity", "sched_yield",
    "set_robust_list", "sigaltstack", "tgkill", "wait4",
}  # fmt: skip

_FULL = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EINTR")
_ERRORS = {
    "openat": ("EIO", "EMFILE", "ENFILE", "ENOMEM", "ENOSPC", "EROFS", "EACCES", "EINTR"),
    "write": _FULL,
    "pwrite64": _FULL,
    "ftruncate": _FULL,
    "read": ("EIO", "EINTR", "ESTALE"),
    "pread64": ("EIO", "EINTR"),
    "preadv": ("EIO", "EINTR"),
    "preadv2": ("EIO", "EINTR"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "close": ("EIO", "ENOSPC", "EDQUOT", "EINTR"),
    "linkat": ("EIO", "ENOSPC", "EROFS", "EPERM"),
    "link": ("EIO", "ENOSPC", "EROFS", "EPERM"),
    "rename": ("EIO", "ENOSPC", "EROFS", "EPERM"),
    "unlink": ("EIO", "EROFS"),
    "flock": ("EIO", "ENOLCK", "EINTR"),
    "fchmod": ("EIO", "EPERM", "EROFS"),
    "clone3": ("EAGAIN",),
}
_OTHER_ERRORS = ("EIO", "ENOMEM")
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_CALL = re.compile(r"^(\d+) +([a-z0-9_]+)\(", re.MULTILINE)
# Statuses allowed besides that of the whole run: the guest refuses, or the host failed.
_GUEST_REFUSES = 4
_HOST_FAILED = 6


@dataclass(frozen=True)
class Trial:
    """One interruption: the `nth` call of that name fails with an errno, or gets a signal."""

    call: str
    nth: int
    what: str

    @property
    def inject(self) -> str:
        """The value of strace's `-e inject=`."""
        kind = "signal" if self.what.startswith("SIG") else "error"
        return f"{self.call}:{kind}={self.what}:when={self.nth}"


def trials(log: str) -> list[Trial]:
    """All interruptions of a run that strace has logged."""
    counts: Counter[str] = Counter()
    for thread in {pid for pid, _ in _CALL.findall(log)}:
        counts |= Counter(name for pid, name in _CALL.findall(log) if pid == thread)
    return [
        Trial(call, nth, what)
        for call, count in sorted(counts.items())
        for nth in range(1, count + 1)
        for what in _whats(call)
    ]


def _whats(call: str) -> Iterator[str]:
    if call in _OWN_BUSINESS:
        yield from _ERRORS.get(call, ())
        return
    yield from (number.name for number in _SIGNALS)
    yield from _ERRORS.get(call, _OTHER_ERRORS)


class Campaign:
    """Runs with interruptions, each in a directory of its own below `directory`."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("strace") is None:
            raise RuntimeError("strace is not installed, so nothing can be interrupted: make deps")
        self._directory = directory
        self._count = 0
        directory.mkdir(exist_ok=True)
        make_template(directory / "template")
        ours, theirs = socket.socketpair()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, "-m", "tests.interrupted.server", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())
        assert self._connection.recv() == "ready"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._server.wait()

    def record(self, run: Run) -> tuple[After, list[Trial]]:
        """Run without interruptions; return the outcome, and all possible interruptions."""
        after, log = self._run(run, "")
        assert after.status == run.status, after.err
        return after, trials(log)

    def interrupt(self, run: Run, trial: Trial, whole: After) -> tuple[bool, str]:
        """Return whether the interruption came, and what is wrong after it ("" for nothing)."""
        after, log = self._run(run, trial.inject)
        came = "INJECTED" in log if not trial.what.startswith("SIG") else trial.what in log
        wrong = _bad_end(after, trial, whole) or _left_over(after, run, trial, whole)
        wrong = wrong or run.judge(after, whole) or _left_in_the_end(after, run, whole)
        shutil.rmtree(after.directory)
        return came, wrong and f"{run.name}, {trial.inject}: {wrong}"

    def alone(self, run: Run, *, stdout: str = "", limit_bytes: int = -1) -> After:
        """Run without strace; see `Request` for the streams and limits it can have."""
        return self._run(run, None, stdout, limit_bytes)[0]

    def _run(
        self, run: Run, inject: str | None, stdout: str = "", limit_bytes: int = -1
    ) -> tuple[After, str]:
        self._count += 1
        directory = self._directory / str(self._count)
        shutil.copytree(self._directory / "template", directory)
        beside = self._directory / "streams"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for name in ("out", "err", "log"):
            (beside / name).touch()
        request = Request(
            arguments=run.arguments,
            directory=str(directory),
            stdin=run.stdin,
            stdout=stdout or str(beside / "out"),
            stderr=str(beside / "err"),
            log="" if inject is None else str(beside / "log"),
            inject=inject or "",
            named=run.named,
            limit_bytes=limit_bytes,
        )
        self._connection.send(request)
        status = os.waitstatus_to_exitcode(self._connection.recv())
        out, err, log = ((beside / name).read_bytes() for name in ("out", "err", "log"))
        return After(directory, status, err.decode(), out), log.decode()


def _bad_end(after: After, trial: Trial, whole: After) -> str:
    if any(word in after.err for word in ("Traceback", "should not happen", "Exception")):
        return f"said {after.err}"
    if trial.what.startswith("SIG"):
        ends = {whole.status, -signal.Signals[trial.what]}
    else:
        ends = {whole.status, _HOST_FAILED}
        if trial.what in ("EACCES", "EPERM", "EROFS"):
            ends.add(_GUEST_REFUSES)
    if after.status not in ends:
        return f"status {after.status}: {after.err}"
    if after.status == _HOST_FAILED and not _names(after.err, trial.what):
        return f"no name, no hint: {after.err}"
    return ""


def _names(err: str, what: str) -> bool:
    # Python itself turns any errno of lseek into "not seekable".
    return "mtetool: error: " in err and (what in err or "seek" in err) and "\n  try: " in err


def _listing(after: After) -> set[str]:
    return {path.name for path in after.directory.iterdir()}


def _left_over(after: After, run: Run, trial: Trial, whole: After) -> str:
    left = _listing(after) - _listing(whole) - {run.makes}
    if after.status == -signal.SIGKILL or trial.call.startswith("unlink"):
        left = {name for name in left if not name.endswith(".tmp")}
    return f"left: {left}" if left else ""


# Files left under temporary names are gone once the same command was run again.
def _left_in_the_end(after: After, run: Run, whole: After) -> str:
    left = _listing(after) - _listing(whole) - {run.makes}
    return f"left for good: {left}" if left else ""


def sample(found: list[Trial], share: float, seed: int) -> list[Trial]:
    """Choose that share of the trials, and at least four."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    return chance.sample(found, min(len(found), max(4, round(share * len(found)))))
