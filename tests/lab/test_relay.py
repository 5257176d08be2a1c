"""A live guest that hammers its tags moves through two relays, and finds every tag."""

from __future__ import annotations

import pytest

from tests.lab.machine import Machine
from tests.lab.relays import Migration


def test_guest_moves_live_with_every_tag(lab: Machine) -> None:
    migration = Migration(lab)
    migration.start()
    found = migration.wait()
    reports = migration.reports()
    print(found, reports, migration.relay_output().decode())
    assert found["status"] == "completed"
    checks = migration.checks()
    assert {(check.wrong, check.data_wrong) for check in checks} == {(0, 0)}
    assert reports["source"]["tag_pages"] == reports["destination"]["tag_pages"] > 1000


@pytest.mark.long
def test_without_relays_the_same_guest_finds_wrong_tags_at_once(lab: Machine) -> None:
    """The control."""
    migration = Migration(lab)
    migration.start("direct")
    assert migration.wait()["status"] == "completed"
    checks = migration.checks(1)
    assert checks[0].wrong > 1000
