"""Run in the lab, by its agent: Python programs of the checkout as forks of the agent.

Under emulation a start of Python with mtetool's modules takes two to six seconds, a fork a tenth
of a second. The fork has a session, descriptors, environment and name as if it had been started;
its executable and command line are the agent's, and the modules are already loaded.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import sys
import threading
import traceback
import types
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Self

CHECKOUT = "/opt/mtetool"
_COMMANDS = (
    "save",
    "restore",
    "diff",
    "dump",
    "verify",
    "info",
    "enable",
    "emu",
    "listing",
    "exec",
    "companion",
    "relay",
)
_FLOWS = ("save", "restore", "diff", "dump", "verify", "enable", "exec")
_BACKENDS = ("kvm.guest", "kvm.listing", "proc.guest", "emu.guest")
_COMPANION = ("listening", "service", "serving")
MODULES = (
    "mtetool.__main__",
    *(f"mtetool.cli.{name}" for name in _COMMANDS),
    *(f"mtetool.flows.{name}" for name in _FLOWS),
    *(f"mtetool.backends.{name}" for name in _BACKENDS),
    *(f"mtetool.companion.{name}" for name in _COMPANION),
    "mtetool.cli.virtual",
    "mtetool.backends.kvm.addresses",
    "mtetool.vmm.taggable",
    "mtetool.relay.running",
)
"""The modules that are loaded once."""


def program(argv: Sequence[str], environment: dict[str, str]) -> Callable[[], object] | None:
    """Return what a fork must call for a command line, or None if that is not the checkout's."""
    if argv[0] == "mtetool":
        return _mtetool
    if argv[0] != "python3" or environment.get("PYTHONPATH") != CHECKOUT:
        return None
    rest = list(argv[1:])
    while rest[:1] == ["-B"]:
        del rest[0]
    if rest[:1] == ["-m"] and rest[1].startswith("tests.lab."):
        return lambda: _module(rest[1], rest[2:])
    if rest[:1] == ["-c"]:
        return lambda: _text(rest[1], rest[2:])
    if rest[0].endswith(".py"):
        return lambda: _file(rest[0], rest[1:])
    return None


def _mtetool() -> object:
    from mtetool.__main__ import main

    return main()


def _module(name: str, words: list[str]) -> None:
    sys.argv = [name, *words]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _file(path: str, words: list[str]) -> None:
    sys.argv = [path, *words]
    runpy.run_path(path, run_name="__main__")


def _text(text: str, words: list[str]) -> None:
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    sys.argv = ["-c", *words]
    exec(compile(text, "<string>", "exec"), main.__dict__)  # noqa: S102 - as python3 -c does


class Fork:
    """A running fork, with those parts of subprocess.Popen that the agent uses."""

    def __init__(
        self, run: Callable[[], object], argv: Sequence[str], cwd: str, env: dict[str, str]
    ) -> None:
        _load()
        self.returncode: int | None = None
        pipes = [os.pipe() for _ in range(3)]
        # The child must not collect this process's garbage: that would close descriptors whose
        # numbers belong to other files by then.
        gc.collect()
        gc.freeze()
        self.pid = os.fork()
        if self.pid == 0:
            _become(run, argv, cwd, env, [pipes[0][0], pipes[1][1], pipes[2][1]])
        self.stdin: IO[bytes] = os.fdopen(pipes[0][1], "wb", 0)
        self.stdout: IO[bytes] = os.fdopen(pipes[1][0], "rb", 0)
        self.stderr: IO[bytes] = os.fdopen(pipes[2][0], "rb", 0)
        for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
            os.close(fd)

    def poll(self) -> int | None:
        """Return its status once it has ended, -N for signal N."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self.stdin, self.stdout, self.stderr):
            file.close()


def _load() -> None:
    if MODULES[0] not in sys.modules:
        for name in MODULES:
            import_module(name)


def _become(
    run: Callable[[], object], argv: Sequence[str], cwd: str, env: dict[str, str], fds: list[int]
) -> None:
    """Run that program in the child; does not return."""
    status = 1
    try:
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        os.chdir(cwd)
        os.environ.update(env)
        Path("/proc/self/comm").write_text(argv[0])
        sys.argv = list(argv)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        raw = open(2, "wb", closefd=False)  # noqa: SIM115
        sys.stderr = TextIOWrapper(raw, errors="backslashreplace", line_buffering=True)
        status = _ended(run)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
    finally:
        os._exit(status)


def _ended(run: Callable[[], object]) -> int:
    """Return the status that the interpreter would end with."""
    try:
        result: object = run()
    except SystemExit as end:
        result = end.code
    except BaseException:  # noqa: BLE001 - the interpreter's last resort
        traceback.print_exc()
        return 1
    if result is None or isinstance(result, int):
        return (result or 0) & 255
    print(result, file=sys.stderr)
    return 1
