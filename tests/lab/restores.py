"""Run in the lab: interrupt a restore at its steps, and then run it again.

`python3 -m tests.lab.restores PID RIGHT WRONG ENDS RANGE...` gives the VMM the tags of the snapshot
WRONG, ends a restore of RIGHT at one of its steps (see `mtetool.attach.steps`) with a signal,
restores RIGHT again, and compares the ranges. It does that ENDS times, at steps spread over the
whole restore, and prints the results as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import import_module

from mtetool.attach import steps
from tests.lab.deaths import settled, state
from tests.lab.torture import _LOADED, Command, drain, learn, start

_SIGNALS = ("KILL", "TERM", "INT")


def ended(words: list[str], hook: steps.Hook | None = None) -> int:
    """Run a command to its end; return its status, or -N for signal N."""
    child, reading = start(Command(words), hook)
    drain(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def spread(command: Command, count: int) -> list[tuple[str, int]]:
    """Return that many of a command's steps, from the first to the last."""
    last = len(command.steps) - 1
    return [command.steps[number * last // (count - 1)] for number in range(count)]


def main() -> None:
    """Interrupt restores, and print the results."""
    pid, right, wrong, count = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    within = [word for asked in sys.argv[5:] for word in ("--range", asked)]
    for module in (*_LOADED, "mtetool.cli.diff"):
        import_module(module)
    guest = f"kvm:{pid}"
    restore = Command(["restore", right, guest])
    learn(restore)
    before = state(pid)
    rows = []
    for number, (step, nth) in enumerate(spread(restore, count)):
        name = _SIGNALS[number % len(_SIGNALS)]
        row: dict[str, object] = {"at": f"{name}@{step}:{nth}"}
        row["dirtied"] = ended(["restore", "--no-verify", wrong, guest])
        row["broken_off"] = ended(restore.words, steps.fault(f"{name}@{step}:{nth}"))
        row["as_asked"] = row["broken_off"] == -signal.Signals[f"SIG{name}"]
        row["harmed"] = settled(pid, before)
        row["differed"] = ended(["diff", right, guest, *within])
        row["again"] = ended(restore.words)
        row["same"] = ended(["diff", right, guest, *within])
        rows.append(row)
    print(json.dumps({"steps": len(restore.steps), "ends": rows}))


if __name__ == "__main__":
    main()
