"""Running tools: in fresh processes, and in workers that repeat an operation when told to."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.bench.model import Run

ROOT = Path(__file__).parents[2]

# What pip's script does, for a checkout that is not installed.
_MAIN = "import sys; from mtetool.__main__ import main; sys.exit(main())"

WITHOUT_C = "import sys; sys.modules['mtetool._loops'] = None\n"
"""A first line of code, which makes mtetool use its loops in numpy."""


class BenchError(Exception):
    """Nothing can be measured; the message says why."""


def program(name: str) -> str:
    """The path of a program. Raises BenchError if it is not installed."""
    path = shutil.which(name)
    if path is None:
        raise BenchError(f"{name} is not installed: make deps")
    return path


@cache
def mtetool_command() -> tuple[str, ...]:
    """How a user starts this checkout's mtetool: by its script, if that runs this checkout."""
    script = Path(sys.executable).with_name("mtetool")
    if script.exists():
        code = "import mtetool; print(mtetool.__file__)"
        found = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/"
        ).stdout.strip()
        if found and Path(found).is_relative_to(ROOT):
            return (str(script),)
    return (sys.executable, "-c", _MAIN)


def numpy_command() -> tuple[str, ...]:
    """The same without the C extension."""
    return (sys.executable, "-c", WITHOUT_C + _MAIN)


def has_extension() -> bool:
    """Whether mtetool's loops were compiled."""
    return importlib.util.find_spec("mtetool._loops") is not None


def run_cold(argv: Sequence[str], scratch: Path) -> Run:
    """Run a whole process. Raises BenchError if its exit status is not 0.

    Peak memory is measured by time(1), a small program: Linux counts a child's peak from the
    memory of the process that forked it (mm_struct's hiwater_rss), and this one is Python.
    """
    peak, errors = scratch / "peak", scratch / "errors"
    words = [program("time"), "-q", "-f", "%M", "-o", str(peak), *argv]
    with errors.open("wb") as stderr:
        start = time.perf_counter()
        child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        said = errors.read_text(errors="replace")[-2000:]
        raise BenchError(f"{' '.join(argv)}: status {child.returncode}\n{said}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, int(peak.read_text()) << 10)


def run(argv: Sequence[str], *, out: Path | None = None) -> None:
    """Run a command that is not measured. Raises BenchError if it fails."""
    with (out or Path(os.devnull)).open("wb") as stdout:
        done = subprocess.run(argv, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise BenchError(f"{' '.join(argv)}: status {done.returncode}\n{done.stderr[-2000:]}")


class Worker:
    """A long-running process, with everything loaded, which runs what it is told to."""

    def __init__(self, *, without_c: bool = False) -> None:
        code = (WITHOUT_C if without_c else "") + "from tests.bench.worker import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, operation: str, *words: str) -> Run:
        """Run one operation of `tests.bench.worker`. Raises BenchError."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([operation, *words]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the worker died"}
        if "error" in answer:
            raise BenchError(f"{operation} {' '.join(words)}: {answer['error']}")
        return Run(answer["seconds"], answer["cpu_seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
