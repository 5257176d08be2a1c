"""The program with tagged memory (programs/tagged.c), run in a lab machine."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtetool.tags import Tags
from mtetool.uapi import GRANULE_BYTES
from tests.lab.machine import Machine

_SECONDS = 60.0
_MAP = re.compile(rb"TAGGED map (\w+) 0x([0-9a-f]+) (\d+)")
_CHECK = re.compile(rb"TAGGED check=(\d+) wrong=(\d+) signals=(\d+) disorder=(\d+)\n")

SET = ("private", "shared", "memfd", "mirror", "copied", "sealed", "scratch")
"""The mappings whose granules all have tags of the pattern."""


@dataclass
class Tagged:
    """The running program; `kill_vmms` ends it. `maps` has its mappings' addresses and sizes."""

    lab: Machine
    words: str = ""
    name: str = "tagged"
    pid: int = field(init=False)
    maps: dict[str, tuple[int, int]] = field(init=False)

    def __post_init__(self) -> None:
        result = self.lab.sh(
            f"/lab/tagged {self.words} >{self.log} 2>&1 & echo $!;"
            f" until grep -q check= {self.log} || ! kill -0 $!; do sleep 0.1; done"
        )
        self.pid = int(result.stdout)
        found = _MAP.findall(self.lab.get(self.log))
        self.maps = {name.decode(): (int(at, 16), int(size)) for name, at, size in found}
        assert len(self.maps) == 11, found

    @property
    def log(self) -> str:
        """The file that it prints to."""
        return f"/tmp/{self.name}.out"

    @property
    def source(self) -> str:
        """Its name for mtetool."""
        return f"proc:{self.pid}"

    def range_of(self, name: str) -> str:
        """Return a mapping as --range takes it."""
        at, size = self.maps[name]
        return f"{at:#x}:{size}"

    def paint(self, name: str, tag: int) -> list[str]:
        """Return the command (for `commands`) that gives a whole mapping one tag."""
        at, size = self.maps[name]
        return ["paint", str(self.pid), hex(at), str(size), str(tag)]

    def dump(self, source: str, name: str) -> list[str]:
        """Return the command that prints a mapping's tags in a source, one byte per granule."""
        return ["mtetool", "dump", source, "--output", "raw", "--range", self.range_of(name)]

    def unharmed(self) -> None:
        """Check that it goes on: two more rounds, no wrong tag, no signal lost, no tracer."""
        seen = len(_CHECK.findall(self.lab.get(self.log)))
        deadline = time.monotonic() + _SECONDS
        while len(checks := _CHECK.findall(self.lab.get(self.log))) < seen + 2:
            assert time.monotonic() < deadline, self.status()
            time.sleep(0.1)
        assert {(wrong, disorder) for _, wrong, _, disorder in checks} == {(b"0", b"0")}, checks
        assert "TracerPid:\t0" in self.status()

    def signals(self) -> int:
        """Return how many numbered signals it has handled."""
        return int(_CHECK.findall(self.lab.get(self.log))[-1][2])

    def status(self) -> str:
        """Return the status of all its threads."""
        return self.lab.sh(f"cat /proc/{self.pid}/task/*/status; true").stdout.decode()


@dataclass(frozen=True)
class Outcome:
    """The outcome of a command: its status, and what it printed."""

    status: int
    raw: bytes
    err: str

    @property
    def json(self) -> Any:
        """The report of a command with --json."""
        return json.loads(self.raw)

    @property
    def error(self) -> Any:
        """The error of a command with --json."""
        return json.loads(self.err.splitlines()[-1])

    @property
    def tags(self) -> Tags:
        """The tags that `Tagged.dump` printed."""
        return np.frombuffer(self.raw, dtype=np.uint8)


def commands(lab: Machine, *commands: list[str]) -> list[Outcome]:
    """Run commands one after the other, see `tests.lab.many`; return their outcomes."""
    result = lab.run(
        ["python3", "-B", "-m", "tests.lab.many"],
        stdin=json.dumps(commands).encode(),
        env={"PYTHONPATH": "/opt/mtetool"},
        timeout=400,
        check=True,
    )
    return [Outcome(n, out.encode("latin-1"), err) for n, out, err in json.loads(result.stdout)]


SIZE = 64 << 10
"""The size of each mapping."""


def pattern() -> Tags:
    """Return the tags that the program gives to a mapping."""
    granule = np.arange(SIZE // GRANULE_BYTES)
    return ((granule * 7 + granule // 256 + 3) & 15).astype(np.uint8)
