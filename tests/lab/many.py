"""Run in the lab: several mtetool commands, without starting Python for each.

Standard input is a JSON list of command lines. The first word is `mtetool`, or `sh` for a shell
script; `paint PID ADDRESS SIZE TAG` gives memory of a process one tag. Each command runs in a
process of its own. Standard output is a JSON list of [status, output, errors], the output in
Latin-1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module

import numpy as np

from mtetool.__main__ import main as mtetool
from mtetool.backends import open_guest

_COMMANDS = ("save", "restore", "diff", "dump", "verify", "info", "enable")


def run(words: list[str]) -> tuple[int, str, str]:
    """Run a command; return its status, output and errors."""
    if words[0] == "sh":
        done = subprocess.run(["sh", "-c", words[1]], capture_output=True)
        return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            work(words)
        _, status = os.waitpid(child, 0)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode("latin-1"))
    return os.waitstatus_to_exitcode(status), said[0], said[1]


def work(words: list[str]) -> None:
    """Run a command in this process, and exit with its status."""
    status = 70
    try:
        if words[0] == "paint":
            paint(*(int(word, 0) for word in words[1:]))
            status = 0
        else:
            sys.argv = words
            status = mtetool()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def paint(pid: int, address: int, size: int, tag: int) -> None:
    """Give memory of a process one tag."""
    with open_guest(f"proc:{pid}") as guest:
        written = guest.write_tags(address, np.full(size // 16, tag, dtype=np.uint8))
        assert written == size, written


def main() -> None:
    """Run all commands in turn."""
    for name in _COMMANDS:
        import_module(f"mtetool.cli.{name}")
    for name in ("save", "restore", "diff", "dump", "verify"):
        import_module(f"mtetool.flows.{name}")
    import_module("mtetool.backends.proc.guest")
    print(json.dumps([run(words) for words in json.load(sys.stdin)]))


if __name__ == "__main__":
    main()
