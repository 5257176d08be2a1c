"""`python -m tests.bench.looking`: what looking at tags costs, beside tools on the bare tags.

Saves an emulated guest of 4 GiB with random tags and one of 64 GiB of which 5% of the pages are
tagged, and prints a table for `tests/bench/results/looking.md`: time and peak memory of `dump`,
`diff` and `stats`, of `xxd` and of `cmp`. All files are read once before, and output is dropped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from tests.bench.machine import describe
from tests.bench.model import Run
from tests.bench.running import BenchError, mtetool_command, program, run_cold

_ROUNDS = 3
_MAX_LOAD = 0.5
_SEED = "1"


def measured(argv: Sequence[str], scratch: Path, rounds: int) -> Run:
    """Run a command some times; return the medians, and the largest peak."""
    runs = [run_cold(argv, scratch) for _ in range(rounds)]
    return Run(
        median(run.seconds for run in runs),
        median(run.cpu_seconds for run in runs),
        max(run.peak_bytes or 0 for run in runs),
    )


def _files(directory: Path, size: str, fill: str) -> tuple[Path, Path, Path, Path]:
    """Two equal snapshots of a guest, and its bare tags twice."""
    tool = mtetool_command()
    guest, one, raw = directory / "guest", directory / "one", directory / "raw"
    create = ("emu", "create", guest, "--memory", size, "--fill", fill, "--seed", _SEED)
    subprocess.run([*tool, *create], check=True)
    subprocess.run([*tool, "save", f"emu:{guest}", "-o", one, "-q"], check=True)
    guest.unlink()
    with raw.open("wb") as out:
        subprocess.run([*tool, "dump", one, "--output", "raw"], stdout=out, check=True)
    same, raw_same = directory / "same", directory / "raw-same"
    shutil.copyfile(one, same)
    shutil.copyfile(raw, raw_same)
    return one, same, raw, raw_same


def rows(directory: Path, size: str, fill: str, rounds: int) -> list[tuple[str, Run]]:
    """What each command takes for one guest."""
    tool = mtetool_command()
    one, same, raw, raw_same = map(str, _files(directory, size, fill))
    commands: list[tuple[str, list[str]]] = [
        ("dump", [*tool, "dump", one, "--progress", "none"]),
        ("dump --output jsonl", [*tool, "dump", one, "--output", "jsonl", "--progress", "none"]),
        ("dump --only-tagged", [*tool, "dump", one, "--only-tagged", "--progress", "none"]),
        ("xxd", [program("xxd"), raw]),
        ("diff", [*tool, "diff", one, same, "--progress", "none"]),
        ("cmp", [program("cmp"), raw, raw_same]),
        ("stats", [*tool, "stats", one, "--progress", "none"]),
    ]
    return [(name, measured(argv, directory, rounds)) for name, argv in commands]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.looking", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--dense", default="4G", metavar="SIZE")
    parser.add_argument("--sparse", default="64G", metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--force", action="store_true", help="also on a busy machine")
    asked = parser.parse_args(argv)
    load = os.getloadavg()[0]
    if load > _MAX_LOAD and not asked.force:
        print(f"bench: the load average is {load:.2f}: wait, or use --force", file=sys.stderr)
        return 2
    print("\n".join(f"- {name}: {value}" for name, value in describe(asked.directory).items()))
    print(f"- load average at the start: {load:.2f}\n")
    print("| guest | command | seconds | CPU seconds | peak memory, MiB |")
    print("| ----- | ------- | ------- | ----------- | ---------------- |")
    try:
        for size, fill in ((asked.dense, "random"), (asked.sparse, "sparse")):
            with tempfile.TemporaryDirectory(dir=asked.directory) as directory:
                for name, cost in rows(Path(directory), size, fill, asked.rounds):
                    peak = (cost.peak_bytes or 0) / (1 << 20)
                    times = f"{cost.seconds:.2f} | {cost.cpu_seconds:.2f}"
                    print(f"| {size} {fill} | `{name}` | {times} | {peak:.0f} |", flush=True)
    except (BenchError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
