"""`python -m tests.bench.profile`: where the CPU time of a save goes, stage by stage.

The command runs in this process, warm; see `tests.bench.sampling` for what the figures are.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TypeVar

from mtetool.backends.emu.patterns import PATTERNS
from mtetool.cli import group
from mtetool.cli.options import parse_number
from tests.bench.contenders import Material
from tests.bench.report import table
from tests.bench.running import BenchError
from tests.bench.sampling import Line, Sampler, Stack, cpu_seconds, waits

# What a line does, judged by its text; the innermost line that matches counts.
_STAGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("checksum", re.compile(r"xxh|checksum|digest", re.IGNORECASE)),
    ("compress", re.compile(r"compress|zstd", re.IGNORECASE)),
    ("read from the guest", re.compile(r"preadv?\(|read_tags|_read_span|SEEK_(DATA|HOLE)")),
    ("write to the guest", re.compile(r"pwrite|write_tags|write_all")),
    ("read the file", re.compile(r"readinto|\.read\(|exactly\(")),
    ("write the file", re.compile(r"\.write\(|fsync")),
    ("compare", re.compile(r"compare|first_difference|array_equal|differences")),
    ("encode", re.compile(r"pack|encode|decode|scan|mask|runs?\b|fill|\.tags\(")),
)
_WAITING = "handing over to other threads"
_OTHER = "everything else"
_NATIVE = "threads that Python did not start"
_N_LINES = 15

_Key = TypeVar("_Key")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the profile; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.profile", description=__doc__)
    parser.add_argument("--action", choices=("save", "restore", "verify"), default="save")
    parser.add_argument("--pattern", choices=PATTERNS, default="kernel")
    parser.add_argument("--size", type=parse_number, default=4 << 30, help="size of the guest (4G)")
    parser.add_argument("--jobs", type=int, default=2, help="workers of the save (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scratch", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as directory:
            material = Material(Path(directory), arguments.pattern, arguments.size)
            material.make(1)
            _profile(material, arguments)
    except (BenchError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _profile(material: Material, arguments: argparse.Namespace) -> None:
    snapshot = material.path("snapshot")
    save = ("save", material.guest, "-o", snapshot, "--force", "--jobs", str(arguments.jobs))
    words = {
        "save": save,
        "restore": ("restore", snapshot, material.fresh),
        "verify": ("verify", snapshot),
    }[arguments.action]
    for warming in (save, words):
        _timed(material, warming)
    sampler = Sampler()
    wall = cpu = 0.0
    plain = []
    for _ in range(arguments.rounds):
        # Also without the sampler, to show what sampling costs.
        plain.append(_timed(material, words)[0])
        took, spent = _timed(material, words, sampler)
        wall, cpu = wall + took, cpu + spent
    n = arguments.rounds
    mebibytes = material.n_bytes / (1 << 20)
    print(f"{arguments.action} of {arguments.pattern}, {mebibytes:.0f} MiB of tags, warm,")
    print(
        f"{n} rounds: {1000 * wall / n:.0f} ms each (without sampling"
        f" {1000 * statistics.median(plain):.0f}),"
    )
    print(f"{1000 * (cpu - sampler.sampling_seconds) / n:.0f} ms of CPU time each\n")
    print("\n".join(_tables(sampler.spent, n)))


def _timed(
    material: Material, words: Sequence[str], sampler: AbstractContextManager[object] | None = None
) -> tuple[float, float]:
    """Return wall-clock and CPU seconds. Raises BenchError if the command fails."""
    if words[0] == "restore":
        material.empty_guest()
    with (
        Path(os.devnull).open("w") as null,
        redirect_stdout(null),
        sampler or nullcontext(),
    ):
        before, start = cpu_seconds(), time.perf_counter()
        status = group.main([*words, "--quiet"], prog_name="mtetool", standalone_mode=False)
        took, spent = time.perf_counter() - start, cpu_seconds() - before
    if status:
        raise BenchError(f"{' '.join(words)}: status {status}")
    return took, spent


def _tables(spent: Mapping[Stack, float], n_rounds: int) -> Iterator[str]:
    total = sum(spent.values()) or 1.0
    stages: dict[str, float] = defaultdict(float)
    lines: dict[tuple[str, Line | None], float] = defaultdict(float)
    for stack, seconds in spent.items():
        name = stage(stack)
        stages[name] += seconds
        # Our line that led there, not one deep in a library.
        line = next((line for line in stack if line.module.startswith("mtetool")), None)
        lines[name, line] += seconds
    yield from table(
        ("stage", "CPU", "share"),
        [(name, *_shares(seconds, total, n_rounds)) for name, seconds in _most(stages)],
    )
    yield ""
    rows = []
    for (name, line), seconds in _most(lines)[:_N_LINES]:
        where = f"{line.module}:{line.number} {line.function}" if line else ""
        rows.append((name, where, line.text if line else "", *_shares(seconds, total, n_rounds)))
    yield from table(("stage", "where", "line", "CPU", "share"), rows)


def _most(spent: Mapping[_Key, float]) -> list[tuple[_Key, float]]:
    return sorted(spent.items(), key=lambda item: -item[1])


def _shares(seconds: float, total: float, n_rounds: int) -> tuple[str, str]:
    return f"{1000 * seconds / n_rounds:.0f} ms", f"{100 * seconds / total:.0f}%"


def stage(stack: Stack) -> str:
    """Return what a thread is doing, judged by its stack."""
    if not stack:
        return _NATIVE
    if waits(stack):
        return _WAITING
    ours = [line for line in stack if line.module.startswith("mtetool")]
    for line in ours:
        for name, pattern in _STAGES:
            if pattern.search(f"{line.function} {line.text}"):
                return name
    return _OTHER


if __name__ == "__main__":
    sys.exit(main())
