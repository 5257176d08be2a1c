"""An interrupted restore into a live VMM: run again, it gives exact tags."""

from __future__ import annotations

import json

import pytest

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_ENDS = 3
_RANGES = 4


@pytest.mark.long
def test_a_restore_that_is_broken_off_and_run_again_is_exact(lab: Machine) -> None:
    guest = Qemu(lab, "guest", memory="64M").start()
    guest.wait_for_checks()
    guest.qmp("stop")
    # In memory that the guest has tagged; each range is a write of its own.
    last = max(guest.ipas().values()) & ~0xFFFFF
    ranges = [f"{last - (number << 20):#x}:256K" for number in range(_RANGES)]
    options = " ".join(f"--range {one}" for one in ranges)
    slots = " ".join(f"--slot {one}" for one in ranges)
    lab.mtetool(
        f"save kvm:{guest.pid} {options} -o /tmp/right",
        f"emu create /tmp/e {slots} --fill random",
        "save emu:/tmp/e -o /tmp/wrong",
    )
    words = f"python3 -m tests.lab.restores {guest.pid} /tmp/right /tmp/wrong {_ENDS}"
    env = {"PYTHONPATH": "/opt/mtetool"}
    result = lab.run([*words.split(), *ranges], timeout=300, env=env, check=True)
    found = json.loads(result.stdout)
    print(json.dumps(found))
    assert len(found["ends"]) == _ENDS
    for end in found["ends"]:
        assert end["dirtied"] == 0, end
        assert end["as_asked"], end
        assert end["harmed"] is None, end
        assert end["again"] == 0, end
        assert end["same"] == 0, end
    # Interrupted before, and after, the last tag was written.
    assert {end["differed"] for end in found["ends"]} == {0, 1}
    guest.qmp("cont")
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
