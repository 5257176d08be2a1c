"""`mtetool probe` as a user meets it."""

from __future__ import annotations

import errno

import pytest

from mtetool.vmm import host
from tests.cli.running import run

GOOD = host.HostFacts("aarch64", "6.12.107", 4096, 0, True, True, 1, 0)
NOT_ARM64 = host.HostFacts("x86_64", "6.1.0", 4096, errno.ENOENT, None, False, 1, 2)


@pytest.mark.parametrize(("facts", "status"), [(GOOD, 0), (NOT_ARM64, 4)])
def test_its_status_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, facts: host.HostFacts, status: int
) -> None:
    monkeypatch.setattr(host, "host_facts", lambda: facts)
    done = run("probe")
    assert done.status == status
    assert facts.machine in done.out
    assert ("cannot copy tags" in done.out) is bool(status)
    assert ("try:" in done.out) is bool(status)
    report = run("probe", "--json").json
    assert report["schema"] == "mtetool.probe/1"
    assert report["able"] is not bool(status)
    assert report["mte"] is not bool(status)
    assert {row["state"] for row in report["rows"]} <= {"ok", "no", "unknown"}


def test_on_this_host() -> None:
    report = run("probe", "--json").json
    assert [row["id"] for row in report["rows"]] == [
        "architecture",
        "kernel",
        "page-size",
        "kvm",
        "mte",
        "cap-sys-ptrace",
        "ptrace-scope",
        "seccomp",
    ]
