"""A campaign: commands on a busy VMM, ended in every bad way, and nobody is worse off.

`make torture` lets a thousand of them die; the test run, as many as MTETOOL_DEATHS says (40).
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_DEATHS = int(os.environ.get("MTETOOL_DEATHS", "40"))
_BATCH = 50


@pytest.fixture
def busy(lab: Machine) -> Qemu:
    """A QEMU whose guest keeps four vCPUs busy and checks its tags."""
    guest = Qemu(lab, "busy", extra="-smp 4", guest_options="tagger.load=3").start()
    guest.wait_for_checks()
    return guest


def _batch(guest: Qemu, deaths: int, seed: int) -> list[dict[str, Any]]:
    words = ["python3", "-m", "tests.lab.torture", str(guest.pid), str(deaths), str(seed), "/tmp/s"]
    result = guest.lab.run(
        words,
        timeout=60 + 30 * deaths,
        env={"PYTHONPATH": "/opt/mtetool"},
        check=True,
    )
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_torture(busy: Qemu) -> None:
    busy.lab.sh(f"mtetool save kvm:{busy.pid} --range 0x40000000:64M -o /tmp/s")
    survived = 0
    for seed, first in enumerate(range(0, _DEATHS, _BATCH)):
        lines = _batch(busy, min(_BATCH, _DEATHS - first), seed)
        done = lines[-1]["done"]
        print(json.dumps(done), flush=True)
        # What the commands do is what tests.lab.deaths dies in, step by step.
        assert set(done["steps"]) <= set(done["steps_of_a_cycle"])
        assert len(lines) == 1, lines
        survived += done["deaths"]
        assert done["most_mappings_left"] <= 1
        assert done["mappings_in_the_end"] == 0
        assert done["files_left"] == []
        checks = busy.wait_for_checks()
        assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0)] * len(checks)
    print(f"deaths survived: {survived} of {_DEATHS}", flush=True)
    assert survived == _DEATHS
    busy.lab.run(["mtetool", "verify", "/tmp/s", "--against", f"kvm:{busy.pid}"], check=True)
