"""A live guest moves between two hosts with a network between them, or stays where it is."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from tests.lab.relays import INCOMING, OUTGOING, Migration
from tests.lab.two_hosts import THERE, TwoHosts, two_hosts

_CUTS = int(os.environ.get("MTETOOL_CUTS", "3"))
# Otherwise QEMU gives its guest a page for stolen time, as large as the host's pages.
_ANY_PAGES = "-smp 2 -cpu host,kvm-steal-time=off"


def _wrong(migration: Migration, *, at_source: bool = False) -> set[tuple[int, int]]:
    guest = migration.source if at_source else migration.target
    return {(check.wrong, check.data_wrong) for check in guest.wait_for_checks(3)}


def _runs(migration: Migration, *, at_source: bool = False) -> bool:
    """Whether the guest runs in one of the QEMUs, by QEMU's own word."""
    qemu = migration.source if at_source else migration.target
    if qemu.lab.sh(f"kill -0 {qemu.pid}", check=False).returncode:
        return False
    return json.loads(qemu.qmp("query-status"))["running"] is True


def _start_by_tls(migration: Migration) -> None:
    migration.run_relay("destination", f"listen:tls:{THERE}:7000", f"unix:{INCOMING}")
    migration.start_relays(f"tls:{THERE}:7000")
    waits = migration.lab.sh(f"[ -S {OUTGOING} ]", check=False).returncode == 0
    assert waits, migration.relay_output().decode()


@pytest.mark.long
def test_example_moves_a_guest_over_ssh_with_every_tag() -> None:
    """It finds the guest by its socket, and starts the other relay by a command."""
    with two_hosts() as hosts:
        migration = Migration(hosts.here, hosts.there, target_listens=False)
        hosts.allow_ssh()
        words = [migration.source.qmp_path, "there", migration.target.qmp_path]
        example = ["/opt/mtetool/examples/live-migrate.sh", *words]
        result = hosts.here.run(example, timeout=400)
        print(result.stdout.decode(), result.stderr.decode())
        assert result.returncode == 0
        assert b"tags in place" not in result.stdout
        end = b"the guest is at there, with its tags; end QEMU at the source\n"
        assert result.stdout.endswith(end)
        assert _wrong(migration) == {(0, 0)}
        assert migration.state()["status"] == "completed"
        assert not _runs(migration, at_source=True)


@pytest.mark.long
def test_every_tag_over_tls_to_a_host_with_larger_pages(tmp_path: Path) -> None:
    with two_hosts("6.12", "6.12-16k") as hosts:
        hosts.give_certificates(tmp_path)
        migration = Migration(hosts.here, hosts.there, extra=_ANY_PAGES)
        _start_by_tls(migration)
        migration.migrate()
        assert migration.wait()["status"] == "completed", migration.relay_output()
        reports = migration.reports()
        print(reports)
        assert reports["destination"]["tag_pages"] > 100
        assert _wrong(migration) == {(0, 0)}
        assert not _runs(migration, at_source=True)


@pytest.mark.long
@pytest.mark.parametrize(("here", "there"), [("6.12-16k", "6.12"), ("6.12", "7.3")])
def test_guest_goes_on_where_qemu_refuses_it_at_the_other_host(
    tmp_path: Path, here: str, there: str
) -> None:
    """Without relays QEMU does not take these, either: smaller pages, a newer kernel."""
    with two_hosts(here, there) as hosts:
        hosts.give_certificates(tmp_path)
        migration = Migration(hosts.here, hosts.there, extra=_ANY_PAGES)
        _start_by_tls(migration)
        migration.migrate()
        assert migration.wait()["status"] == "failed"
        assert [migration.status(role) for role in ("source", "destination")] == [4, 4]
        assert _wrong(migration, at_source=True) == {(0, 0)}


# After a relay says something: when the last tags are on their way, when they are in place, and
# while the end of the stream goes to the destination and its answer comes back.
_MOMENTS = {
    "held": ("source", "the guest has stopped"),
    "in place": ("destination", "all tags are in place"),
    "end sent": ("destination", "all tags are in place"),
}
_MOST_SECONDS = {"held": 0.0, "in place": 0.0, "end sent": 1.5, "time": 30.0}


def _cut_at(hosts: TwoHosts, moment: str, seconds: float) -> None:
    """Cut the network some time after a relay has said something, or after now."""
    cut = f"sleep {seconds:.2f}; ifconfig eth0 down"
    if moment not in _MOMENTS:
        hosts.here.sh(cut)
        return
    role, said = _MOMENTS[moment]
    lab = hosts.here if role == "source" else hosts.there
    lab.sh(
        f"until grep -q '{said}' /tmp/relay-{role}.err || [ -s /tmp/relay-{role}.status ];"
        f" do sleep 0.02; done; {cut}",
        timeout=300,
    )


@pytest.mark.long
def test_lost_network_never_leaves_two_guests_nor_wrong_tags(tmp_path: Path) -> None:
    """It drops everything at some moment: the guest goes on at one of the hosts, or waits."""
    chance = random.Random(1)  # noqa: S311
    moments = ["held", "in place", *["end sent", "time"] * _CUTS]
    found = []
    with two_hosts() as hosts:
        hosts.give_certificates(tmp_path)
        migration = Migration(hosts.here, hosts.there)
        for moment in moments:
            _start_by_tls(migration)
            migration.migrate()
            _cut_at(hosts, moment, chance.uniform(0, _MOST_SECONDS[moment]))
            found.append((moment, _what_became_of_it(hosts, migration)))
            print(found[-1], flush=True)
            if found[-1][1] != "moved":
                # It can be tried again, with a QEMU that waits.
                hosts.there.sh(f"kill -KILL {migration.target.pid} 2>/dev/null; true")
                migration.target = migration.new_target()
            else:
                migration = Migration(hosts.here, hosts.there)
    assert "stayed" in dict(found).values()


def _what_became_of_it(hosts: TwoHosts, migration: Migration) -> str:
    """Whether the guest stayed, moved, or waits at the source until somebody decides."""
    migration.status("destination")
    is_there = _runs(migration)
    if not is_there:
        # At last the source's relay has noticed, too, unless it holds the guest on purpose.
        hosts.here.sh(
            "until [ -s /tmp/relay-source.status ] || grep -q 'stays paused' /tmp/relay-source.err;"
            " do sleep 0.1; done",
            timeout=120,
        )
    said = hosts.here.get("/tmp/relay-source.err")
    is_here = _runs(migration, at_source=True)
    assert not (is_here and is_there), migration.relay_output()
    if is_there:
        assert _wrong(migration) == {(0, 0)}
    hosts.mend()
    if is_there:
        return "moved"
    if not is_here:
        # The source's end was sent: the guest waits, and an operator who sees that it does not run
        # at the destination lets it go on.
        assert b"stays paused here" in said
        migration.source.qmp("migrate_cancel")
        migration.status("source")
    assert migration.wait()["status"] in ("failed", "cancelled")
    assert _wrong(migration, at_source=True) == {(0, 0)}
    return "stayed" if is_here else "waited"
