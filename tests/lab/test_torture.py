"""A campaign: commands on a busy VMM, ended in every bad way, do no harm.

`make torture` kills a thousand of them; a test run kills MTETOOL_DEATHS of them (default 4).
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_DEATHS = int(os.environ.get("MTETOOL_DEATHS", "4"))
_BATCH = 50


# The second one is as libvirt starts it: another user, without capabilities, in a sandbox.
_SANDBOX = "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_VMMS = {"plain": ("", 0), "sandboxed": (_SANDBOX, 64055)}


def _busy(lab: Machine, vmm: str) -> Qemu:
    """A QEMU whose guest keeps its vCPUs busy and checks its tags; it has one in the test run."""
    sandbox, uid = _VMMS[vmm]
    n_vcpus = 4 if _DEATHS > _BATCH else 1
    extra, load = f"-smp {n_vcpus} {sandbox}", f"tagger.load={n_vcpus - 1}"
    guest = Qemu(lab, "busy", extra=extra, guest_options=load, uid=uid).start()
    guest.wait_for_checks()
    return guest


def _batch(guest: Qemu, deaths: int, seed: str) -> list[dict[str, Any]]:
    words = ["python3", "-m", "tests.lab.torture", str(guest.pid), str(deaths), seed, "/tmp/s"]
    env = {"PYTHONPATH": "/opt/mtetool"}
    result = guest.lab.run(words, timeout=120 + 30 * deaths, env=env, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.two_cpus
@pytest.mark.parametrize("vmm", [pytest.param("plain", marks=pytest.mark.long), "sandboxed"])
def test_torture(lab: Machine, vmm: str) -> None:
    busy = _busy(lab, vmm)
    wanted, survived = _DEATHS // len(_VMMS), 0
    lab.mtetool(f"save kvm:{busy.pid} --range 0x40000000:64M -o /tmp/s")
    for first in range(0, wanted, _BATCH):
        lines = _batch(busy, min(_BATCH, wanted - first), f"{vmm} {first}")
        done = lines[-1]["done"]
        print(json.dumps(done), flush=True)
        assert len(lines) == 1, lines
        # The commands take only steps that tests.lab.deaths dies at, one by one.
        # (Except for signals in flight, which may come or not.)
        steps = {step for step in done["steps"] if not step.endswith("-signal")}
        assert steps <= set(done["steps_of_a_cycle"])
        survived += done["deaths"]
        assert done["most_mappings_left"] <= 1
        assert done["mappings_in_the_end"] == 0
        assert done["files_left"] == []
        checks = busy.wait_for_checks()
        assert [(check.wrong, check.data_wrong) for check in checks] == [(0, 0)] * len(checks)
    print(f"{vmm}: deaths survived: {survived} of {wanted}", flush=True)
    assert survived == wanted
    lab.run(["mtetool", "verify", "/tmp/s", "--against", f"kvm:{busy.pid}"], check=True)
