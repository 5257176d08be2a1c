"""Named steps, and the faults that tests inject at them."""

from __future__ import annotations

import signal

import pytest

from mtetool.attach import steps
from mtetool.errors import UsageError


def test_fault_comes_at_the_nth_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(signal, "pthread_kill", lambda _, number: sent.append(number))
    steps.on_step(steps.fault("TERM@home/setregset:2"))
    told = []
    try:
        steps.enter("home")
        for request in ("setregset", "cont", "setregset", "setregset"):
            steps.reach(request)
            told.append(list(sent))
    finally:
        steps.on_step(None)
    assert told == [[], [], [signal.SIGTERM], [signal.SIGTERM]]


@pytest.mark.parametrize("plan", ["KILL", "@", "WHAT@borrow/seize", "KILL@borrow/seize:x"])
def test_fault_that_makes_no_sense(plan: str) -> None:
    if plan == "KILL":  # at a step without a name, which is never reached
        steps.fault(plan)
    else:
        with pytest.raises(UsageError, match="MTETOOL_FAULT"):
            steps.fault(plan)
