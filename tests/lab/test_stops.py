"""A guest never stands still because mtetool was stopped, or because its output is not read."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import start_test_vmm
from tests.lab.machine import Machine

# The guest goes on within a second of the stop (`tests.lab.stops` measures that); here it is
# enough that it did not wait until mtetool was continued.
_AT_ALL_SECONDS = 30.0


@pytest.mark.two_cpus
def test_a_guest_goes_on_when_mtetool_is_stopped_or_nobody_reads(lab: Machine) -> None:
    # Its only thread is a vCPU, whose guest never stops. (Real guests: test_torture.)
    pid = start_test_vmm(lab, "--run", "0x40000000:0x4000000")
    words = ["python3", "-m", "tests.lab.stops", str(pid)]
    env = {"PYTHONPATH": "/opt/mtetool"}
    found = json.loads(lab.run(words, timeout=500, env=env, check=True).stdout)
    print(json.dumps(found))
    assert found["sigstop"]["statuses"] == [-9]
    assert max(found["sigstop"]["seconds"]) < _AT_ALL_SECONDS
    later = {"stopped": True, "held": False, "status": 0, "whole": True}
    assert found["by_sigtstp"] == later
    assert found["by_ctrl_z"] == later
    tostop = found["by_tostop"]
    assert (tostop["held"], tostop["status"], tostop["whole"]) == (False, 0, True)
    read_late = {"held": False, "done": True, "status": 0, "whole": True}
    assert found["by_nobody_reading"] == read_late
    assert found["guards_left"] == 0
    assert lab.sh(f"grep -c ^6d74 /proc/{pid}/maps; true").stdout == b"0\n"
    assert b"TracerPid:\t0" in lab.sh(f"cat /proc/{pid}/status").stdout
