"""`python -m tests.differential`: the same calls on real kernels in the lab and on the emulator.

Prints one line per kernel: `KERNEL calls=N differences=0 seed=S`. It ends at a difference, with
the shortest sequence of calls that shows it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from hypothesis import Phase

from tests.differential.campaign import compare
from tests.lab.images import KERNELS


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; return 1 if there is a difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS))
    parser.add_argument("--calls", type=int, default=4000, help="at least this many per kernel")
    parser.add_argument(
        "--no-shrink", action="store_true", help="do not shorten a sequence that differs"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))  # noqa: S311
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels at a time")
    arguments = parser.parse_args(argv)
    phases = [Phase.generate] if arguments.no_shrink else [Phase.generate, Phase.shrink]
    found = 0
    with ProcessPoolExecutor(arguments.jobs, multiprocessing.get_context("spawn")) as pool:
        job = partial(compare, calls=arguments.calls, number=arguments.seed, phases=phases)
        for differences, line in pool.map(job, arguments.kernel or KERNELS):
            print(line, flush=True)
            found += differences
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
