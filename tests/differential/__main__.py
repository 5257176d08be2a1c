"""`python -m tests.differential`: the same calls on real kernels in the lab and on the emulator.

Prints one line a kernel: `KERNEL calls=N differences=0 seed=S`. A difference ends it, with the
shortest sequence of calls that shows it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from mtetool.emulator import Behaviour, Host
from tests.differential.sequences import Ask, Call, Differences
from tests.lab.images import KERNELS
from tests.lab.machine import Machine, Talk

_EXECUTOR = ("env", "PYTHONPATH=/opt/mtetool", "python3", "-B", "-m", "tests.differential.executor")


def main(argv: list[str] | None = None) -> int:
    """Run it; 1 where there is a difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential")
    parser.add_argument("--kernel", action="append", choices=list(KERNELS))
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument(
        "--no-shrink", action="store_true", help="end at the first difference as it is"
    )
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))  # noqa: S311
    arguments = parser.parse_args(argv)
    failed = False
    for kernel in arguments.kernel or KERNELS:
        with executor(kernel) as (host, ask):
            phases = [Phase.generate] if arguments.no_shrink else [Phase.generate, Phase.shrink]
            found = differences(host, ask, arguments.calls, arguments.seed, phases)
        failed = failed or found > 0
        calls = Differences.calls_compared
        print(f"{kernel} calls={calls} differences={found} seed={arguments.seed}", flush=True)
    return int(failed)


@contextmanager
def executor(kernel: str) -> Iterator[tuple[Host, Ask]]:
    """A real kernel that answers calls: what kind it is, and how to ask it."""
    with Machine(kernel=kernel) as machine, machine.talk(_EXECUTOR) as talk:
        described = json.loads(talk.line())
        names = frozenset(Behaviour(name) for name in described.pop("behaviours"))
        yield Host(**described, behaviours=names), _asking(talk)


def _asking(talk: Talk) -> Ask:
    def ask(calls: list[Call]) -> list[int]:
        answers: list[int] = json.loads(talk.ask(json.dumps(calls).encode()))
        return answers

    return ask


def differences(host: Host, ask: Ask, calls: int, seed_number: int, phases: Sequence[Phase]) -> int:
    """Compare until so many calls were compared; the sequences that differed: 0 or 1.

    Hypothesis ends at the first that differs, and prints the shortest of its kind.
    """
    Differences.calls_compared = Differences.sequences = 0
    Differences.host, Differences.ask = host, staticmethod(ask)
    chunk = 0
    while Differences.calls_compared < calls:
        case = seed(seed_number + chunk)(type("Sequences", (Differences,), {}))
        chunk += 1
        try:
            run_state_machine_as_test(case, settings=settings(_SETTINGS, phases=phases))
        except AssertionError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


_SETTINGS = settings(
    max_examples=50,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
    print_blob=False,
)


if __name__ == "__main__":
    sys.exit(main())
