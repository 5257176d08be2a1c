"""Named steps of the work on another process; at each, a test can make mtetool die.

A step is reached before each request to the kernel that looks at or changes the process; between
two steps, everything happens in mtetool alone. So a death before every step covers a death at every
instant. `MTETOOL_FAULT=SIGNAL@STEP[:NTH]` in the environment sends this process that signal when it
reaches the step for the NTH time (default 1), as in `KILL@home/setregset:2`; mtetool's own tests
set it. A step's name is the phase of the work and the request.
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
    """Start that phase of the work: the steps that follow belong to it."""
    global _phase
    _phase = phase


def reach(request: str) -> None:
    """Reach the step before a request to the kernel."""
    if _hook is not None:
        _hook(f"{_phase}/{request}")


def on_step(hook: Hook | None) -> None:
    """Call `hook` with the name of every step, before it."""
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
            hint="unset it: it is for mtetool's own tests",
        ) from None
    seen = Counter[str]()

    def hook(reached: str) -> None:
        seen[reached] += 1
        if reached == step and seen[reached] == due:
            # To this thread: sent to the process, it might go to another, and this one would go on.
            signal.pthread_kill(threading.get_ident(), number)

    return hook


if plan := os.environ.get("MTETOOL_FAULT"):
    on_step(fault(plan))
