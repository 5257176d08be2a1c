"""Run sequences of calls on a real kernel in the lab and on the emulated one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from mtetool.emulator import Behaviour, Host
from tests.differential.sequences import Ask, Call, Differences
from tests.lab.machine import Machine, Talk

_EXECUTOR = ("env", "PYTHONPATH=/opt/mtetool", "python3", "-B", "-m", "tests.differential.executor")


def compare(kernel: str, calls: int, number: int, phases: list[Phase]) -> tuple[int, str]:
    """Compare at least that many calls on a lab kernel; return differences and a line to print."""
    with Machine(kernel=kernel) as machine, executor(machine) as (host, ask):
        found = differences(host, ask, calls, number, phases)
    compared = Differences.calls_compared
    return found, f"{kernel} calls={compared} differences={found} seed={number}"


@contextmanager
def executor(machine: Machine) -> Iterator[tuple[Host, Ask]]:
    """Let the kernel of a lab machine answer calls; yield its kind, and how to ask it."""
    with machine.talk(_EXECUTOR) as talk:
        described = json.loads(talk.line())
        names = frozenset(Behaviour(name) for name in described.pop("behaviours"))
        yield Host(**described, behaviours=names), _asking(talk)


def _asking(talk: Talk) -> Ask:
    def ask(calls: list[Call]) -> list[int]:
        answers: list[int] = json.loads(talk.ask(json.dumps(calls).encode()))
        return answers

    return ask


def differences(host: Host, ask: Ask, calls: int, seed_number: int, phases: Sequence[Phase]) -> int:
    """Compare at least that many calls; return how many sequences differed: 0 or 1.

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
