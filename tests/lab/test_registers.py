"""A borrowed thread gets back all its registers and the call that it was in."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.machine import Machine

Found = dict[str, dict[str, Any] | None]

# 6.12 has neither the scalable matrix extension nor guarded control stacks.
_SME_AND_GCS = pytest.mark.kernel("7.3")
_SLEEPS = ["nanosleep", "clock_nanosleep", "clock_nanosleep-absolute", "futex"]


def _holders(machine: Machine, what: str, *modes: str) -> Found:
    result = machine.run(
        ["python3", "-m", "tests.lab.holders", what, *modes],
        timeout=200,
        env={"PYTHONPATH": "/opt/mtetool"},
    )
    print(result.stderr.decode())
    assert result.returncode == 0, result.stderr.decode()
    found: Found = json.loads(result.stdout)
    return found


def _unharmed(found: Found) -> bool:
    assert all(counts is not None for counts in found.values()), found
    return all(
        counts is not None and (counts["changed"], counts["mask_kept"]) == (0, True)
        for counts in found.values()
    )


def test_registers_come_back_to_the_bit(lab: Machine) -> None:
    """`plain` has the general registers, signed pointers and branch types in turn."""
    found = _holders(lab, "registers", "plain", "fp", "sve", "sve-long", "rseq")
    assert _unharmed(found)
    assert all(counts and counts["attached"] == 4 for counts in found.values())


@pytest.mark.long
@_SME_AND_GCS
def test_matrix_registers_come_back_to_the_bit(lab: Machine) -> None:
    """With SME2, ZA, ZT0, TPIDR2 and FPMR survive the borrow; the vectors are longer, too."""
    found = _holders(lab, "registers", "za", "sve", "sve-long")
    assert _unharmed(found)
    assert all(counts and counts["attached"] == 4 for counts in found.values())


@pytest.mark.long
@_SME_AND_GCS
def test_streaming_mode_is_waited_out_or_refused(lab: Machine) -> None:
    found = _holders(lab, "registers", "ssve", "ssve-at-times")
    assert _unharmed(found)
    assert found["ssve-at-times"] is not None
    assert found["ssve-at-times"]["attached"] > 0


@pytest.mark.long
@_SME_AND_GCS
def test_guarded_control_stack_is_refused(lab: Machine) -> None:
    found = _holders(lab, "registers", "gcs")
    assert _unharmed(found)
    assert found["gcs"] is not None
    assert found["gcs"]["attached"] == 0


@pytest.mark.long
def test_sleeps_keep_their_end(lab: Machine) -> None:
    """Without the kernel's state of a sleep, an attach would restart it."""
    found = _holders(lab, "calls", *_SLEEPS)
    for mode, counts in found.items():
        assert counts is not None
        assert (mode, counts["came_back"] > 0, counts["early"]) == (mode, True, 0)
        # If it were restarted, it would be late by all the time that it had slept.
        assert counts["late_without_death_ms"] < counts["attached_at_ms"] / 2, mode


def test_waits_go_on_behind_attaches(lab: Machine) -> None:
    found = _holders(lab, "calls", "ppoll", "read", "ppoll-for-ever", "futex-for-ever")
    for mode, counts in found.items():
        assert counts is not None
        assert (mode, counts["early"]) == (mode, 0)


def test_waits_that_any_stop_breaks_off_say_so(lab: Machine) -> None:
    """mtetool(1) lists these; if a kernel improves, the page must follow."""
    for mode, counts in _holders(lab, "calls", "epoll", "sigtimedwait").items():
        assert counts is not None
        assert counts["early"] > 0, mode


def test_signals_come_once_in_order_and_break_off_waits(lab: Machine) -> None:
    counts = _holders(lab, "signals", "signals")["signals"]
    assert counts is not None
    # Some deaths came with a signal in hand, seen but not passed on yet.
    assert counts["deaths"] > 0
    assert counts["signals"] == counts["sent"] > 30
    assert (counts["disorder"], counts["unbroken"]) == (0, 0)


def test_stack_that_is_part_of_the_heap_is_left_alone(lab: Machine) -> None:
    found = _holders(lab, "registers", "stack-in-heap", "stack-with-guard")
    assert _unharmed(found)
    heap, guarded = found["stack-in-heap"], found["stack-with-guard"]
    assert heap is not None
    assert guarded is not None
    assert (heap["attached"], guarded["attached"]) == (0, 4)


def test_fault_in_the_borrowed_call_ends_in_an_error(lab: Machine) -> None:
    found = _holders(lab, "faults", "fp")
    assert _unharmed(found)
    assert found["fp"] is not None
    assert (found["fp"]["faulted"], found["fp"]["attached"]) == (True, 4)


def test_process_that_is_stopped_is_not_let_run_on(lab: Machine) -> None:
    found = _holders(lab, "stopped", "rseq-for-ever")["rseq-for-ever"]
    assert found is not None
    assert (found["let_on"], found["ran"], found["still"]) == (0, 0, True)
