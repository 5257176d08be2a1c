"""The verdicts on a host, from its facts."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from mtetool.flows.probe import able, judge
from mtetool.vmm.host import HostFacts, host_facts

GOOD = HostFacts(
    machine="aarch64",
    kernel="6.12.107",
    page_size_bytes=4096,
    kvm_errno=0,
    mte=True,
    cap_sys_ptrace=True,
    ptrace_scope=1,
    seccomp=0,
)


def states(facts: HostFacts) -> dict[str, str]:
    return {row.id: row.state for row in judge(facts)}


def test_a_good_host_is_able_and_all_rows_are_ok() -> None:
    assert able(judge(GOOD))
    assert set(states(GOOD).values()) == {"ok"}


@pytest.mark.parametrize(
    ("facts", "row"),
    [
        (replace(GOOD, machine="x86_64", mte=None), "architecture"),
        (replace(GOOD, mte=False), "mte"),
        (replace(GOOD, cap_sys_ptrace=False, ptrace_scope=1), "cap-sys-ptrace"),
        (replace(GOOD, cap_sys_ptrace=True, ptrace_scope=3), "ptrace-scope"),
    ],
)
def test_what_ends_all_hope(facts: HostFacts, row: str) -> None:
    assert not able(judge(facts))
    assert states(facts)[row] == "no"
    assert next(r for r in judge(facts) if r.id == row).hint


@pytest.mark.parametrize(
    "facts",
    [
        replace(GOOD, cap_sys_ptrace=False, ptrace_scope=0),
        replace(GOOD, cap_sys_ptrace=False, ptrace_scope=None),
        replace(GOOD, kvm_errno=errno.EACCES, mte=None),
        replace(GOOD, seccomp=2),
        replace(GOOD, first_user_namespace=False),
        replace(GOOD, first_user_namespace=None),
    ],
)
def test_what_leaves_hope(facts: HostFacts) -> None:
    assert able(judge(facts))


def test_a_container_is_said_to_limit_who_can_be_reached() -> None:
    rows = judge(replace(GOOD, first_user_namespace=False))
    row = next(row for row in rows if row.id == "user-namespace")
    assert (row.state, row.needed) == ("unknown", False)
    assert "container" in row.value


def test_an_errno_is_named() -> None:
    row = next(r for r in judge(replace(GOOD, kvm_errno=errno.EACCES)) if r.id == "kvm")
    assert row.state == "no"
    assert "EACCES" in row.value


def test_facts_are_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("Name:\tx\nCapEff:\t0000000000080000\nSeccomp:\t2\n")
    (tmp_path / "sys/kernel/yama").mkdir(parents=True)
    (tmp_path / "sys/kernel/yama/ptrace_scope").write_text("2\n")
    (tmp_path / "self/ns").mkdir()
    (tmp_path / "self/ns/user").symlink_to("user:[4026532123]")
    facts = host_facts(tmp_path, tmp_path / "no-kvm")
    assert facts.first_user_namespace is False
    assert facts.cap_sys_ptrace is True
    assert facts.seccomp == 2
    assert facts.ptrace_scope == 2
    assert facts.kvm_errno == errno.ENOENT
    assert facts.mte is None


def test_a_host_that_shows_nothing_raises_nothing(tmp_path: Path) -> None:
    facts = host_facts(tmp_path / "none", tmp_path / "none")
    assert (facts.cap_sys_ptrace, facts.seccomp, facts.ptrace_scope) == (None, None, None)
