"""A restore into a live VMM that is broken off: run again, it ends exact."""

from __future__ import annotations

import json

from tests.lab.guests import Qemu
from tests.lab.machine import Machine

_ENDS = 8


def test_a_restore_that_is_broken_off_and_run_again_is_exact(lab: Machine) -> None:
    guest = Qemu(lab, "guest", memory="64M").start()
    guest.wait_for_checks()
    guest.qmp("stop")
    lab.sh(
        f"mtetool save kvm:{guest.pid} --range 0x40000000:64M -o /tmp/right"
        " && mtetool emu create /tmp/e --memory 64M"
        " && mtetool emu set /tmp/e 0x40000000:64M=9"
        " && mtetool save emu:/tmp/e -o /tmp/wrong"
    )
    words = ["python3", "-m", "tests.lab.restores", str(guest.pid), "/tmp/right", "/tmp/wrong"]
    env = {"PYTHONPATH": "/opt/mtetool"}
    result = lab.run([*words, str(_ENDS)], timeout=300, env=env, check=True)
    found = json.loads(result.stdout)
    print(json.dumps(found))
    assert len(found["ends"]) == _ENDS
    for end in found["ends"]:
        assert end["dirtied"] == 0, end
        assert end["as_asked"], end
        assert end["harmed"] is None, end
        assert end["again"] == 0, end
        assert end["same"] == 0, end
    # Broken off before, and behind, the first tag that was written.
    assert {end["differed"] for end in found["ends"]} == {0, 1}
    guest.qmp("cont")
    assert [check.wrong for check in guest.wait_for_checks()] == [0, 0]
