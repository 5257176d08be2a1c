"""A live guest that hammers its tags moves through two relays, and finds every tag."""

from __future__ import annotations

import json
import os

import pytest

from tests.lab.machine import Machine
from tests.lab.relays import Migration

_MIGRATIONS = int(os.environ.get("MTETOOL_MIGRATIONS", "2"))


def _wrong(migration: Migration, *, at_source: bool = False) -> set[tuple[int, int]]:
    guest = migration.source if at_source else migration.target
    return {(check.wrong, check.data_wrong) for check in guest.wait_for_checks(3)}


def test_example_moves_a_guest_live_with_every_tag(lab: Machine) -> None:
    """The example finds the guest by its socket, and starts the other relay by a command."""
    # It leaves the emulated CPU to the relays; those that do not are long.
    options = "hammer.mib=1 hammer.pause=100"
    migration = Migration(lab, target_listens=False, guest_options=options, extra="-smp 1")
    words = [migration.source.qmp_path, "here", migration.target.qmp_path]
    example = ["/opt/mtetool/examples/live-migrate.sh", *words]
    environment = {"REMOTE": "", "SOCKET": "/tmp/incoming"}
    result = lab.run(example, env=environment, timeout=400)
    print(result.stdout.decode(), result.stderr.decode())
    assert result.returncode == 0
    assert b"tags in place" not in result.stdout
    assert result.stdout.endswith(b"the guest is at here, with its tags; end QEMU at the source\n")
    assert _wrong(migration) == {(0, 0)}
    assert migration.state()["status"] == "completed"


@pytest.mark.long
def test_guest_moves_again_and_again(lab: Machine) -> None:
    """`make relay-campaign` lets it move ten times."""
    migration = Migration(lab)
    for number in range(_MIGRATIONS):
        if number:
            migration.go_on()
        migration.start()
        found, reports = migration.wait(), migration.reports()
        print(found["status"], found.get("downtime"), reports, flush=True)
        assert found["status"] == "completed"
        assert reports["source"]["tag_pages"] == reports["destination"]["tag_pages"] > 1000
        assert _wrong(migration) == {(0, 0)}


@pytest.mark.long
def test_without_relays_the_same_guest_finds_wrong_tags_at_once(lab: Machine) -> None:
    """The control."""
    migration = Migration(lab)
    migration.start("direct")
    assert migration.wait()["status"] == "completed"
    assert migration.target.wait_for_checks(1)[0].wrong > 1000


@pytest.mark.long
@pytest.mark.parametrize("role", ["source", "destination"])
def test_relay_that_is_killed_leaves_the_guest_at_the_source(lab: Machine, role: str) -> None:
    migration = Migration(lab)
    migration.start()
    migration.lab.sh("sleep 2")
    migration.kill_relay(role)
    assert migration.wait()["status"] == "failed"
    assert _wrong(migration, at_source=True) == {(0, 0)}
    # It can be tried again.
    migration.lab.sh(f"kill -KILL {migration.target.pid} 2>/dev/null; true")
    migration.target = migration.new_target()
    migration.start()
    assert migration.wait()["status"] == "completed"
    assert migration.reports()["source"]["finished"]
    assert _wrong(migration) == {(0, 0)}


@pytest.mark.long
def test_destination_without_mte_is_said_before_the_guest_is_touched(lab: Machine) -> None:
    migration = Migration(lab, target_has_mte=False)
    with pytest.raises(AssertionError, match="MTE is off"):
        migration.start_relays()
    assert _wrong(migration, at_source=True) == {(0, 0)}


@pytest.mark.long
def test_return_path_off_is_refused(lab: Machine) -> None:
    migration = Migration(lab, capabilities={"return-path": False})
    migration.start()
    assert migration.wait()["status"] == "failed"
    assert b"return-path is off" in migration.relay_output()
    assert _wrong(migration, at_source=True) == {(0, 0)}


class _Grown(Migration):
    """A guest to which memory was added; it never ran, and all of its memory has tags."""

    def __post_init__(self) -> None:
        self.lab.sh("truncate -s 1M /tmp/firmware")  # hotplug needs ACPI, which needs a firmware
        self.memory, self.extra = "64M,slots=2,maxmem=1G", "-bios /tmp/firmware -S"
        self.prepare()
        self.source = self.start_qemu(self.lab).wait_for_machine()
        backend = {"qom-type": "memory-backend-ram", "id": "m", "size": 64 << 20}
        self.source.qmp("object-add", json.dumps(backend))
        self.source.qmp("device_add", json.dumps({"driver": "pc-dimm", "id": "d", "memdev": "m"}))
        self.extra += " -object memory-backend-ram,id=m,size=64M -device pc-dimm,id=d,memdev=m"
        self.target = self.new_target()
        self.allow(self.source)


@pytest.mark.long
def test_memory_that_was_added_moves_with_its_tags(lab: Machine) -> None:
    migration = _Grown(lab)
    source, target = (f"kvm:{qemu.pid}" for qemu in (migration.source, migration.target))
    lab.mtetool(f"save {source} -o /tmp/empty")
    info = json.loads(lab.run(["mtetool", "info", "/tmp/empty", "--json"], check=True).stdout)
    slots = [slot for slot in info["memslots"] if slot["ipa"] >= 1 << 30]
    assert len(slots) == 2
    words = " ".join(f"--slot {slot['ipa']:#x}:64M" for slot in slots)
    lab.mtetool(
        f"emu create /tmp/e {words} --fill heap",
        "save emu:/tmp/e -o /tmp/heap",
        f"restore /tmp/heap {source}",
        f"save {source} -o /tmp/tags",
    )
    migration.start()
    assert migration.wait()["status"] == "completed", migration.relay_output()
    print(migration.reports())
    assert lab.run(["mtetool", "diff", "/tmp/tags", target, "--stat"]).returncode == 0
    lab.sh("rm -f /tmp/e /tmp/heap /tmp/tags /tmp/empty")
