"""`python -m tests.bench`: speed, file sizes and memory, compared with other tools.

Writes a report, its charts and the figures behind them. Exits with status 2 when nothing can be
measured, for example because the machine is busy.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mtetool.backends.emu.patterns import PATTERNS
from mtetool.cli.options import parse_number
from tests.bench import machine, report
from tests.bench.contenders import Material, Race
from tests.bench.loop import beside_the_loop
from tests.bench.model import Results
from tests.bench.others import scaling, sizes, starts
from tests.bench.running import BenchError, Worker

_GIB = 1 << 30
_SEED = 1
_JOBS = (1, 2, 3, 4)
# All of this guest's tags take work to compress; parts of the others cost nothing.
_SCALING_PATTERN = "kernel"
_MAX_LOAD = 0.5
_LAB_ROUNDS = 7
# The guest, its raw tags, four results of a save, four of a restore, and the workers' buffers.
_SPACE_FACTOR = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; return the exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = _arguments(words)
    try:
        if arguments.render:
            results = Results.read(arguments.out / "results.json")
        else:
            results = _measure(arguments, words)
            arguments.out.mkdir(parents=True, exist_ok=True)
            results.write(arguments.out / "results.json")
        print(report.write(results, arguments.out))
    except (BenchError, OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--sizes", type=_sizes, metavar="SIZE,…", help="of the guests (1G,4G,16G)")
    parser.add_argument("--patterns", default=list(PATTERNS), type=_patterns, metavar="NAME,…")
    parser.add_argument("--rounds", type=int, help="per guest (7 at 1G, 5 at 4G, 3 at 16G)")
    parser.add_argument("--quick", action="store_true", help="a short trial: 1G, 2 rounds, no lab")
    parser.add_argument("--scratch", type=Path, help="a directory for the files (/dev/shm, in RAM)")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="where to write the report")
    parser.add_argument("--no-lab", action="store_true", help="do not measure a live guest")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    parser.add_argument("--render", action="store_true", help="rewrite the last run's report")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.force = arguments.no_lab = True
        arguments.rounds = arguments.rounds or 2
    if arguments.sizes is None:
        arguments.sizes = [_GIB] if arguments.quick else [_GIB, 4 * _GIB, 16 * _GIB]
    return arguments


def _sizes(text: str) -> list[int]:
    return sorted({parse_number(word) for word in text.split(",")})


def _patterns(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in PATTERNS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such pattern: {', '.join(unknown)}")
    return names


def _measure(arguments: argparse.Namespace, words: Sequence[str]) -> Results:
    load = os.getloadavg()[0]
    contended = load > _MAX_LOAD
    if contended and not arguments.force:
        raise BenchError(
            f"this machine is busy (load average {load:.2f}, at most {_MAX_LOAD}), so its figures"
            " would mean nothing; --force measures all the same"
        )
    with _scratch(arguments.scratch, max(arguments.sizes)) as scratch:
        described = machine.describe(scratch)
        described["date"] = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        described["command"] = shlex.join(["python", "-m", "tests.bench", *words])
        described["load average at the start"] = f"{load:.2f}"
        results = Results(described, contended)
        if not arguments.no_lab:
            print("bench: a live guest in the lab", file=sys.stderr, flush=True)
            results.lab = beside_the_loop(_LAB_ROUNDS)
        with Worker() as ours, Worker(without_c=True) as numpy, Worker() as others:
            race = Race(scratch, ours, numpy, others)
            for memory_bytes in arguments.sizes:
                for pattern in arguments.patterns:
                    material = Material(scratch / pattern, pattern, memory_bytes)
                    _one_guest(results, race, material, arguments)
    return results


def _one_guest(
    results: Results, race: Race, material: Material, arguments: argparse.Namespace
) -> None:
    n_rounds = arguments.rounds or _n_rounds(material.memory_bytes)
    smallest = min(arguments.sizes)
    print(
        f"bench: {material.pattern}, {material.memory_bytes >> 20} MiB of guest, {n_rounds} rounds",
        file=sys.stderr,
        flush=True,
    )
    material.directory.mkdir()
    try:
        material.make(_SEED)
        results.cells += race.rounds(material, n_rounds)
        if material.memory_bytes == smallest:
            results.sizes_memory_bytes = smallest
            results.sizes += sizes(material)
        if material.pattern == _scaling_pattern(arguments.patterns):
            jobs = _JOBS[:2] if arguments.quick else _JOBS
            results.scales += scaling(material, jobs, n_rounds)
            if material.memory_bytes == smallest:
                results.starts = starts(material, 3 if arguments.quick else 31)
    finally:
        shutil.rmtree(material.directory)


def _scaling_pattern(patterns: Sequence[str]) -> str:
    return _SCALING_PATTERN if _SCALING_PATTERN in patterns else patterns[-1]


def _n_rounds(memory_bytes: int) -> int:
    if memory_bytes <= _GIB:
        return 7
    return 5 if memory_bytes <= 4 * _GIB else 3


@contextmanager
def _scratch(wanted: Path | None, memory_bytes: int) -> Iterator[Path]:
    """A directory with enough space. Raises BenchError."""
    needed = _SPACE_FACTOR * memory_bytes // 16
    parent = wanted or Path("/dev/shm")
    free = shutil.disk_usage(parent).free
    if machine.is_in_memory(parent):
        free = min(free, machine.available_bytes())
    if free < needed:
        raise BenchError(
            f"{parent} has {free >> 20} MiB of the {needed >> 20} MiB that are needed:"
            " use smaller --sizes, or another --scratch"
        )
    with tempfile.TemporaryDirectory(prefix="mtetool-bench-", dir=parent) as directory:
        yield Path(directory)


if __name__ == "__main__":
    sys.exit(main())
