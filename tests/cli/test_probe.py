"""`mtetool probe` as a user meets it."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from mtetool.vmm import host, scratch
from tests.cli.running import run
from tests.flows.test_selftest import FakeVm, of_parity

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
        "user-namespace",
        "seccomp",
    ]


def prepare(monkeypatch: pytest.MonkeyPatch, vm: FakeVm) -> None:
    monkeypatch.setattr(host, "host_facts", lambda: GOOD)
    monkeypatch.setattr(scratch, "scratch_vm", lambda: replace(vm, slots={}))


def test_selftest_joins_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, FakeVm(errors={"busy": 0}))
    report = run("probe", "--selftest", "--json").json
    assert report["schema"] == "mtetool.probe/1"
    selftest = report["selftest"]
    assert (selftest["passed"], selftest["not_run"], selftest["defects"]) == (True, None, [])
    for row in selftest["rows"]:
        assert set(row) == {"id", "title", "state", "expected", "answered", "note"}
    assert run("probe", "--json").json["selftest"] is None
    done = run("probe", "--selftest")
    assert done.status == 0
    assert "note: this kernel accepts the write" in done.out
    assert "19 of 19 checks hold" in done.out


def test_selftest_that_fails_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(monkeypatch, FakeVm(keep=of_parity))
    done = run("probe", "--selftest", "--json")
    assert (done.status, done.json["able"], done.json["mte"]) == (4, False, True)
    assert done.json["selftest"]["passed"] is False
    assert done.json["selftest"]["defects"][0]["id"] == "tags-overwrite-in-page"
    text = run("probe", "--selftest")
    assert text.status == 4
    for words in ("must be: 4096 granules", "defect: tags set in a page", "17 of 19 checks hold"):
        assert words in text.out
    assert text.out.endswith("this host cannot copy tags of KVM guests\n")
    assert run("probe").status == 0


def test_selftest_refuses_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_facts", lambda: NOT_ARM64)
    done = run("probe", "--selftest")
    assert done.status == 4
    assert "the selftest cannot run: this host is x86_64" in done.out
    selftest = run("probe", "--selftest", "--json").json["selftest"]
    assert "x86_64" in selftest["not_run"]
    assert {row["state"] for row in selftest["rows"]} == {"unknown"}
