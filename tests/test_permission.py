"""Why a process is refused, by /proc; `tests/lab/test_permissions.py` has real processes."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from mtetool import permission
from mtetool.errors import NoSuchProcessError, PermissionRefusedError
from mtetool.permission import Rights, own_rights, refusal
from mtetool.procfs import status_of

EPERM = OSError(errno.EPERM, "Operation not permitted")
PLAIN = Rights(cap_sys_ptrace=False, ptrace_scope=0, seccomp=0, first_user_namespace=True)
# The same for every user who runs these tests: a process of that user, without capabilities.
STATUS = {"Uid": "\t".join([str(os.getuid())] * 4), "CapPrm": "0000000000000000"}


def reason(rights: Rights, status: dict[str, str] | None = None) -> str:
    return permission._cause(rights, os.getpid(), STATUS | (status or {})).id


@pytest.mark.parametrize(
    ("rights", "status", "expected"),
    [
        (replace(PLAIN, cap_sys_ptrace=True, ptrace_scope=3), {}, "ptrace-scope"),
        (replace(PLAIN, cap_sys_ptrace=True, ptrace_scope=2), {}, "unknown"),
        (replace(PLAIN, cap_sys_ptrace=True, seccomp=2), {}, "seccomp"),
        (replace(PLAIN, cap_sys_ptrace=True, first_user_namespace=False), {}, "user-namespace"),
        (PLAIN, {}, "unknown"),
        (PLAIN, {"Uid": "7\t7\t7\t7"}, "other-user"),
        (replace(PLAIN, ptrace_scope=2), {"Uid": "7\t7\t7\t7"}, "other-user"),
        (replace(PLAIN, ptrace_scope=2), {}, "ptrace-scope"),
        (replace(PLAIN, ptrace_scope=1), {}, "ptrace-scope"),
        (replace(PLAIN, ptrace_scope=None, seccomp=2), {}, "seccomp"),
        # A bit that no kernel defines.
        (replace(PLAIN, ptrace_scope=1), {"CapPrm": "8000000000000000"}, "capabilities"),
        (PLAIN, {"Uid": "", "CapPrm": "nonsense"}, "unknown"),
    ],
)
def test_the_reason(rights: Rights, status: dict[str, str], expected: str) -> None:
    assert reason(rights, status) == expected


def test_rights_are_read_and_what_cannot_be_is_none(tmp_path: Path) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/status").write_text("Name:\tx\nCapEff:\t0000000000080000\nSeccomp:\t2\n")
    (tmp_path / "self/ns/user").symlink_to("user:[4026531837]")
    assert own_rights(tmp_path) == Rights(True, None, 2, True)
    assert own_rights(tmp_path / "nothing") == Rights(None, None, None, None)


def test_who_is_gone_is_not_refused() -> None:
    for pid, error in ((2**22 + 1, EPERM), (os.getpid(), OSError(errno.ESRCH, "gone"))):
        assert isinstance(refusal(pid, error), NoSuchProcessError)


def test_a_zombie_is_told_with_its_parent() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    try:
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        error = refusal(child, EPERM)
        assert isinstance(error, NoSuchProcessError)
        assert "has ended" in error.message
        assert f"process {os.getpid()} (" in error.message
    finally:
        os.waitpid(child, 0)
    assert status_of(child) == {}


def test_what_was_asked_and_what_happened_are_said() -> None:
    error = refusal(os.getpid(), EPERM)
    assert isinstance(error, PermissionRefusedError)
    assert f"attaching to process {os.getpid()} (" in error.message
    assert "was refused (EPERM): " in error.message
    assert error.hint
    assert error.details["errno"] == "EPERM"
    assert error.details["reason"]
