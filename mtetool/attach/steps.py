"""The steps of the work on another process, by name, where a test can make mtetool die.

A step is reached before each request to the kernel that looks at or changes the process; what
happens between two steps happens in mtetool alone. So a death before every step is a death at
every instant. `MTETOOL_FAULT=SIGNAL@STEP[:NTH]` in the environment sends this process that
signal at the NTH time (1) that it reaches the step, `KILL@home/setregset:2`; mtetool's own
tests set it. A step's name has the phase of the work and the request.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Callable

from mtetool.errors import UsageError

Hook = Callable[[str], None]

_phase = "attach"
_hook: Hook | None = None


def enter(phase: str) -> None:
    """From now on, steps belong to that phase of the work."""
    global _phase
    _phase = phase


def reach(request: str) -> None:
    """Before a request to the kernel."""
    if _hook is not None:
        _hook(f"{_phase}/{request}")


def on_step(hook: Hook | None) -> None:
    """Let `hook` be called with the name of every step, before it."""
    global _hook
    _hook = hook


def fault(plan: str) -> Hook:
    """The hook that carries out `SIGNAL@STEP[:NTH]`. Raises UsageError."""
    name, _, step = plan.partition("@")
    step, _, nth = step.partition(":")
    try:
        number, due = signal.Signals[f"SIG{name}"], int(nth or 1)
    except (KeyError, ValueError):
        raise UsageError(
            f"MTETOOL_FAULT={plan} is not of the form SIGNAL@STEP:NTH",
            hint="it is for mtetool's own tests; unset it",
        ) from None
    seen = Counter[str]()

    def hook(reached: str) -> None:
        seen[reached] += 1
        if reached == step and seen[reached] == due:
            # To this thread: to the process, another may have to take it, and this one goes on.
            signal.pthread_kill(threading.get_ident(), number)

    return hook


if plan := os.environ.get("MTETOOL_FAULT"):
    on_step(fault(plan))
