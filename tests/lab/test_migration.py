"""The acceptance test: a live guest moves from one QEMU to another with every tag.

`examples/migrate-qemu.sh` does it, as an operator would run it.
"""

from __future__ import annotations

import pytest

from tests.lab.guests import Check, Qemu
from tests.lab.machine import Machine

# A stand-in for mtetool that enables MTE but moves no tags: the control.
_NO_TAGS = """#!/bin/sh
case $1 in
save | restore) exit 0 ;;
esac
exec mtetool "$@"
"""
_SOCKET = "/tmp/migration.sock"


def _migrate(lab: Machine, *, tags: str = "file", mtetool: str = "mtetool") -> list[Check]:
    """Move the guest; return its first checks after the move."""
    source = Qemu(lab, "source", mte=False).start()
    lab.run(["mtetool", "enable", f"kvm:{source.pid}"], check=True)
    source.qmp("x-exit-preconfig")
    assert [check.wrong for check in source.wait_for_checks()] == [0, 0]
    target = Qemu(lab, "target", mte=False, extra="-incoming defer").start()
    words = [str(source.pid), source.qmp_path, str(target.pid), target.qmp_path, _SOCKET]
    result = lab.run(
        ["/opt/mtetool/examples/migrate-qemu.sh", *words],
        timeout=300,
        env={"TAGS": tags, "MTETOOL": mtetool},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    print(result.stdout.decode(), result.stderr.decode())
    # The first round may have begun before the move; those after it count as well.
    return target.wait_for_checks(4)


@pytest.mark.long  # CI moves a guest live: test_relay
@pytest.mark.parametrize("tags", ["file", "pipe"])
def test_migration_moves_every_tag(lab: Machine, tags: str) -> None:
    checks = _migrate(lab, tags=tags)
    assert {check.granules for check in checks} == {262_144}
    assert [check.wrong for check in checks] == [0] * 4
    assert [check.data_wrong for check in checks] == [0] * 4


@pytest.mark.long
def test_migration_without_mtetool_loses_tags(lab: Machine) -> None:
    """The control: the test above would see lost tags."""
    lab.put("/tmp/no-tags", _NO_TAGS.encode(), mode=0o755)
    checks = _migrate(lab, mtetool="/tmp/no-tags")
    assert all(check.wrong > 200_000 for check in checks[1:])
    assert [check.data_wrong for check in checks] == [0] * 4


@pytest.mark.long
def test_migration_that_fails_leaves_the_guest_running_at_the_source(lab: Machine) -> None:
    broken = _NO_TAGS.replace("save | restore) exit 0", "restore) exit 3")
    lab.put("/tmp/broken", broken.encode(), mode=0o755)
    source = Qemu(lab, "source", mte=False).start()
    lab.run(["mtetool", "enable", f"kvm:{source.pid}"], check=True)
    source.qmp("x-exit-preconfig")
    source.wait_for_checks()
    target = Qemu(lab, "target", mte=False, extra="-incoming defer").start()
    words = [str(source.pid), source.qmp_path, str(target.pid), target.qmp_path, _SOCKET]
    result = lab.run(
        ["/opt/mtetool/examples/migrate-qemu.sh", *words],
        timeout=300,
        env={"MTETOOL": "/tmp/broken"},
    )
    assert result.returncode == 3
    assert b"goes on at the source" in result.stderr
    assert [check.wrong for check in source.wait_for_checks(3)] == [0] * 3
    assert lab.run(["kill", "-0", str(target.pid)]).returncode != 0
